"""The statistics against scipy, against closed forms, and against what a random table must give."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import cdist
from torch import Tensor

from wake2vec import analysis, sentry
from wake2vec.errors import WakeError
from wake2vec.tables import open_tables


def gaussian(rows: int, dim: int, seed: int = 0, *, mean: float = 0.0) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)) + mean


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analysis, "SLICE_ROWS", 64)


def test_norms_and_their_comparison_are_scipys() -> None:
    base, new = gaussian(300, 8), gaussian(170, 8, 1) * 2
    base_N, new_N = analysis.row_norms(base), analysis.row_norms(new)
    np.testing.assert_allclose(base_N.numpy(), np.linalg.norm(base.numpy(), axis=1), rtol=1e-6)
    found = analysis.compare_norms(base_N, new_N)
    a, b = base_N.double().numpy(), new_N.double().numpy()
    welch = stats.ttest_ind(a, b, equal_var=False)
    assert found["welch_t"]["statistic"] == pytest.approx(welch.statistic)
    low, high = found["welch_t"]["mean_difference_ci95"]
    assert (low + high) / 2 == pytest.approx(a.mean() - b.mean())
    assert found["mann_whitney_u"]["statistic"] == pytest.approx(stats.mannwhitneyu(a, b).statistic)
    assert found["cohens_d"] == pytest.approx((a.mean() - b.mean()) / math.sqrt((a.var() + b.var()) / 2))


def test_cohens_d_by_hand() -> None:
    # means 2 and 5, population standard deviations 1 and 1
    assert analysis.compare_norms(torch.tensor([1.0, 3.0]), torch.tensor([4.0, 6.0]))["cohens_d"] == pytest.approx(-3)


def test_rows_without_any_spread_have_no_effect_size() -> None:
    found = analysis.compare_norms(torch.ones(5), torch.ones(4))
    assert found["cohens_d"] is None
    assert found["welch_t"] is None


def test_isotropy_is_the_definition_and_a_cross_is_even() -> None:
    rows = gaussian(40, 6, 3, mean=0.7)
    unit = rows.numpy() - rows.numpy().mean(0)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, 0)
    z = np.exp(cosine).sum(1)
    assert analysis.isotropy(rows) == pytest.approx(z.min() / z.max(), rel=1e-5)
    cross = torch.cat([torch.eye(5), -torch.eye(5)])  # every row sees the same: exactly even
    assert analysis.isotropy(cross) == pytest.approx(1.0)


def test_a_random_sphere_is_at_its_baseline_and_a_cone_below_it() -> None:
    baseline = analysis.isotropy_baseline(500, 64, seed=1)
    random = analysis.isotropy(gaussian(500, 64, 9))
    assert 0 < baseline["min"] <= baseline["mean"] <= baseline["max"] < 1
    assert random == pytest.approx(baseline["mean"], abs=0.02)
    clustered = gaussian(500, 64, 9)
    clustered[:100] += 20  # a fifth of the rows points one way
    assert analysis.isotropy(clustered) < baseline["min"] - 0.1


def test_the_baseline_depends_on_the_number_of_rows_and_dimensions() -> None:
    # more dimensions: cosines of spread 1/sqrt(D) hardly differ between rows
    assert analysis.isotropy_baseline(500, 1024, 0)["min"] > analysis.isotropy_baseline(500, 32, 0)["max"] + 0.005


def test_cosines_are_those_of_all_pairs() -> None:
    a, b = gaussian(30, 5), gaussian(20, 5, 1)
    within = analysis.cosines_within(a, 30)
    expected = 1 - cdist(a.numpy(), a.numpy(), "cosine")[np.triu_indices(30, 1)]
    np.testing.assert_allclose(within.values.numpy(), expected, atol=1e-6)
    assert within.mean == pytest.approx(expected.mean(), abs=1e-7)
    between = analysis.cosines_between(a, b, (30, 20))
    expected = 1 - cdist(a.numpy(), b.numpy(), "cosine").ravel()
    np.testing.assert_allclose(between.values.numpy(), expected, atol=1e-6)
    assert between.mean == pytest.approx(expected.mean(), abs=1e-7)


def test_the_interval_of_the_mean_cosine_is_the_plain_jackknifes() -> None:
    rows = gaussian(25, 5, mean=0.3)
    cosine = 1 - cdist(rows.numpy(), rows.numpy(), "cosine")
    left_out = []
    for i in range(25):
        rest = np.delete(np.delete(cosine, i, 0), i, 1)
        left_out.append(rest[np.triu_indices(24, 1)].mean())
    half = stats.norm.ppf(0.975) * math.sqrt(24 / 25 * np.var(left_out) * 25 * (1 - 25 / 1000))
    low, high = analysis.cosines_within(rows, 1000).ci95
    assert (high - low) / 2 == pytest.approx(half, rel=1e-4)


def test_intervals_hold_the_truth_about_95_times_in_100() -> None:
    population = gaussian(3000, 8, 5, mean=0.4)
    other = gaussian(3000, 8, 6, mean=0.2)
    unit, unit_other = analysis.unit_rows(population), analysis.unit_rows(other)
    total = unit.sum(0)
    within = float((total @ total - 3000) / (3000 * 2999))
    between = float(total @ unit_other.sum(0) / 3000**2)
    norms = analysis.row_norms(population)
    hits = np.zeros(3)
    for seed in range(200):
        ids, ids_other = (analysis.sample_ids(3000, 150, seed, name) for name in "ab")
        found = (
            (within, analysis.cosines_within(population[ids], 3000).ci95),
            (between, analysis.cosines_between(population[ids], other[ids_other], (3000, 3000)).ci95),
            (float(norms.mean()), analysis.mean_interval(norms[ids], 3000)),
        )
        hits += [low <= truth <= high for truth, (low, high) in found]
    # 190 expected; 175 to 199 is four standard deviations of a binomial (3.1) around it
    assert all(175 <= count <= 199 for count in hits), hits


def test_a_sample_of_everything_has_an_interval_of_no_width() -> None:
    rows = gaussian(20, 4)
    low, high = analysis.cosines_within(rows, 20).ci95
    assert low == high
    low, high = analysis.mean_interval(rows[:, 0], 20)
    assert low == high


def test_kolmogorov_smirnov_is_on_disjoint_pairs() -> None:
    found = analysis.kolmogorov_smirnov(gaussian(400, 16), gaussian(300, 16, 1))
    assert found is not None
    assert found["pairs"] == [200, 150]
    assert found["p"] > 0.001  # the same distribution
    apart = analysis.kolmogorov_smirnov(gaussian(400, 16), gaussian(300, 16, 1, mean=1.0))
    assert apart is not None
    assert apart["p"] < 1e-10
    assert analysis.kolmogorov_smirnov(gaussian(3, 4), gaussian(9, 4)) is None


@pytest.mark.parametrize("rows", [500, 20])
def test_principal_variances_are_those_of_the_covariance(rows: int) -> None:
    table = gaussian(rows, 32) * torch.linspace(3, 0.1, 32) + 100  # far from the origin: cancellation would show
    expected = np.sort(np.linalg.eigvalsh(np.cov(table.double().numpy().T, bias=True)))[::-1].clip(0)
    found = analysis.principal_variances(table)
    assert len(found) == 32
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-3, atol=2e-4)
    ids = analysis.sample_ids(rows, rows // 2, 0, "x")
    torch.testing.assert_close(
        analysis.principal_variances(table, ids), analysis.principal_variances(table[ids]), rtol=2e-3, atol=2e-4
    )


def test_dimension_has_no_cap() -> None:
    even = analysis.dimension(torch.ones(1000, dtype=torch.float64), 10**6)
    assert (even["components_90"], even["components_95"]) == (900, 950)
    assert even["participation_ratio"] == pytest.approx(1000)
    one = analysis.dimension(torch.tensor([1.0] + [0.0] * 99, dtype=torch.float64), 50)
    assert (one["components_90"], one["participation_ratio"]) == (1, pytest.approx(1))


@pytest.mark.parametrize(("rows", "dim"), [(2000, 200), (400, 200), (150, 200)])
def test_random_rows_have_the_dimension_of_the_baseline(rows: int, dim: int) -> None:
    variances = analysis.principal_variances(gaussian(rows, dim))
    found = analysis.dimension(variances, rows)
    for key in ("components_90", "components_95"):
        assert found[key] == pytest.approx(found["random"][key], abs=2)
    assert found["participation_ratio"] == pytest.approx(found["random"]["participation_ratio"], rel=0.02)


def test_drift_by_hand() -> None:
    start = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    now = torch.tensor([[0.0, 1.0], [0.0, 5.0], [-3.0, 0.0]])
    cosine, distance = analysis.drift(start, now)
    torch.testing.assert_close(cosine, torch.tensor([0.0, 1.0, -1.0]))
    torch.testing.assert_close(distance, torch.tensor([math.sqrt(2), 3.0, 6.0]))


@pytest.mark.parametrize("exclude_self", [False, True])
def test_nearest_are_those_of_the_whole_matrix(exclude_self: bool) -> None:
    table = gaussian(300, 6)
    queries = table if exclude_self else gaussian(50, 6, 1)
    cosine = analysis.unit_rows(queries) @ analysis.unit_rows(table).T
    if exclude_self:
        cosine.fill_diagonal_(-2)
    expected = cosine.topk(5, dim=1)
    ids, cosines = analysis.nearest(queries, table, 5, exclude_self=exclude_self, chunk_queries=32)
    assert torch.equal(ids, expected.indices)
    torch.testing.assert_close(cosines, expected.values)


def test_fewer_neighbours_than_asked_for() -> None:
    ids, _ = analysis.nearest(torch.eye(2), torch.eye(2), 5, exclude_self=True)
    assert ids.tolist() == [[1], [0]]


def test_samples_are_seeded_and_named() -> None:
    first = analysis.sample_ids(1000, 10, 1, "a")
    assert torch.equal(first, analysis.sample_ids(1000, 10, 1, "a"))
    assert not torch.equal(first, analysis.sample_ids(1000, 10, 1, "b"))
    assert first.tolist() == sorted(set(first.tolist()))
    assert analysis.sample_ids(4, 10, 1, "a").tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_table_in_a_file_is_read_by_slices(tmp_path: Path, dtype: torch.dtype) -> None:
    rows = gaussian(100, 7).to(dtype)
    path = tmp_path / "x.safetensors"
    sentry.write(path, {"rows": rows, "other": torch.arange(5)}, {"format": 1, "step": 0})
    table = open_tables(path)["rows"]
    assert torch.equal(table[10:30], rows[10:30])
    assert torch.equal(table[90:200], rows[90:])
    ids = torch.tensor([3, 50, 99])
    assert torch.equal(analysis.take_rows(table, ids), rows[ids].float())
    assert torch.equal(table.take(ids), rows[ids])


def test_a_cut_off_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    sentry.write(path, {"rows": torch.ones(10, 4)}, {"format": 1, "step": 0})
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(WakeError, match=rf"x.safetensors: {size - 8} bytes, its header says {size}"):
        open_tables(path)
    path.write_bytes(b"no tensors at all")
    with pytest.raises(WakeError, match="not a safetensors file"):
        open_tables(path)


_BOUNDED = """
import resource, sys, torch
from pathlib import Path
from wake2vec import analysis
from wake2vec.tables import open_tables
torch.set_num_threads(1)
table = open_tables(Path(sys.argv[1]))["rows"]
analysis.row_norms(table[0:8])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
analysis.row_norms(table); analysis.drift(table, table); analysis.take_rows(table, torch.arange(0, 60000, 600))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
def test_a_large_table_does_not_come_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    sentry.write(path, {"rows": torch.zeros(100_000, 1024)}, {"format": 1, "step": 0})  # 410 MB
    done = subprocess.run([sys.executable, "-c", _BOUNDED, path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200e6  # a few slices of 4,096 x 1,024 x 4 bytes
