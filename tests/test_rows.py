import pytest
import torch
from torch import Tensor

from wake2vec import rows
from wake2vec.errors import WakeError
from wake2vec.rows import base_radius, sphere_rows, start_rows, subword_mean_rows


def table(num_rows: int = 50, dim: int = 12, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(3)) * 0.7 + 0.1).to(dtype)


@pytest.fixture(autouse=True)
def _small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_SLICE_ROWS", 7)
    monkeypatch.setattr(rows, "_SLICE_WORDS", 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_radius_is_the_spread_of_all_entries_times_the_root_of_the_width(dtype: torch.dtype) -> None:
    base = table(dtype=dtype)
    torch.testing.assert_close(torch.tensor(base_radius(base)), base.float().std() * 12**0.5)


def test_base_table_is_only_read() -> None:
    base = table()
    kept = base.clone()
    start_rows("sphere", {"input": base}, [[1], [2]], start_radius=1.5, seed=1)
    start_rows("subword-mean", {"input": base}, [[1], [2]], start_radius=1.5, seed=1)
    assert torch.equal(base, kept)


def test_sphere_rows_have_the_radius_and_spread_directions() -> None:
    base = table(dim=64)
    sphere = sphere_rows(500, base, 1.5, seed=42, stream="input")
    assert sphere.dtype == torch.float32
    torch.testing.assert_close(sphere.norm(dim=1), torch.full((500,), 1.5 * base_radius(base)))
    # the mean of 500 random unit vectors is about 1/sqrt(500) long
    assert sphere.mean(0).norm() / sphere.norm(dim=1).mean() < 0.1


def test_sphere_rows_repeat_by_seed_and_differ_by_seed_and_table() -> None:
    base = table()
    first = start_rows("sphere", {"input": base, "head": base}, [[0]] * 9, start_radius=1.5, seed=42)
    again = start_rows("sphere", {"input": base, "head": base}, [[0]] * 9, start_radius=1.5, seed=42)
    other = start_rows("sphere", {"input": base}, [[0]] * 9, start_radius=1.5, seed=43)
    assert torch.equal(first["input"], again["input"])
    assert torch.equal(first["head"], again["head"])
    assert not torch.isclose(first["input"], first["head"]).any()
    assert not torch.isclose(first["input"], other["input"]).any()


def test_each_table_starts_at_its_own_radius() -> None:
    tables = {"input": table(), "head": table() * 3}
    for kind in ("sphere", "subword-mean"):
        started = start_rows(kind, tables, [[1, 2], [3]], start_radius=1.5, seed=42)
        for name, base in tables.items():
            torch.testing.assert_close(started[name].norm(dim=1), torch.full((2,), 1.5 * base_radius(base)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_subword_mean_rows_point_where_the_mean_of_the_pieces_points(dtype: torch.dtype) -> None:
    base = table(dtype=dtype)
    pieces = [[4], [1, 2], [2, 2, 9], [49, 0, 7, 3], [5, 6], [4], [10, 11, 12], [8]]
    means = torch.stack([base.float()[ids].mean(0) for ids in pieces])
    expected = means / means.norm(dim=1, keepdim=True) * 1.25 * base_radius(base)
    torch.testing.assert_close(subword_mean_rows(pieces, base, 1.25), expected)


def test_words_without_a_mean_are_refused_by_number() -> None:
    base = table()
    base[6] = -base[5]
    base[7] = 0
    with pytest.raises(
        WakeError, match=r"3 of 5 new words \(word 2: pieces \[5, 6\]; word 4: .*; word 5: pieces \[\]\)"
    ):
        subword_mean_rows([[1], [5, 6], [5], [7, 7], []], base, 1.0)
