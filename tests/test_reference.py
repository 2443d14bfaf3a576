"""What a run keeps for its report: against the text, the loaded model and the metrics."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import NEW, make_recipe, run_to_end

from wake2vec import analysis, reference, sentry
from wake2vec.base import identify, load
from wake2vec.data import read_text, split_text
from wake2vec.identity import read_inputs
from wake2vec.metrics import read_records
from wake2vec.rundir import RunDir
from wake2vec.tables import decode_json, encode_json


@pytest.fixture(scope="module", params=["inputs", "tied_inputs"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunDir]:
    inputs = request.getfixturevalue(request.param)
    return inputs, run_to_end(inputs, tmp_path_factory.mktemp("reference") / "run")


def test_counts_are_those_of_the_text(made: tuple[Path, RunDir]) -> None:
    inputs, run = made
    found = sentry.read(run.reference / "base.safetensors").tensors
    text = read_text(inputs / "text.txt")
    split = split_text(text, 0.1, 5)
    assert decode_json(found["words"]) == NEW
    for name, part in (("train_counts", split.train_text), ("val_counts", split.val_text)):
        whole = [len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", part)) for word in NEW]
        assert found[name].tolist() == whole


def test_base_statistics_are_of_the_tables_without_padding(made: tuple[Path, RunDir]) -> None:
    inputs, run = made
    kept = sentry.read(run.reference / "base.safetensors")
    base = identify(str(inputs / "base"), str(inputs / "base"), None)
    vocab = read_inputs(make_recipe(inputs), None, lambda _: None).base_vocab_size
    frozen = load(base, vocab, quantization="none", compute_dtype="float32", device=torch.device("cpu"))
    assert kept.header["tables"] == (["input"] if frozen.tied else ["input", "head"])
    for name, table_VD in (("input", frozen.table_VD), ("head", frozen.head_VD))[: 1 if frozen.tied else 2]:
        torch.testing.assert_close(kept.tensors[f"{name}/norms"], torch.linalg.vector_norm(table_VD, dim=1))
        assert torch.equal(kept.tensors[f"{name}/sample"], table_VD[kept.tensors[f"{name}/sample_ids"]])
        assert len(kept.tensors[f"{name}/variances"]) == 64
    assert kept.header["machine"]["cores"] >= 1


def test_word_losses_add_up_to_the_evaluations(made: tuple[Path, RunDir]) -> None:
    _, run = made
    records = [record for record in read_records(run.metrics) if "val/loss_new_nats" in record]
    for name, record in (("word_losses_start", records[0]), ("word_losses", records[-1])):
        kept = sentry.read(run.reference / f"{name}.safetensors")
        assert kept.step == record["step"]
        mean = float(kept.tensors["nats"].sum() / kept.tensors["counts"].sum())
        assert mean == pytest.approx(record["val/loss_new_nats"], rel=1e-5)
    base = sentry.read(run.reference / "base.safetensors").tensors
    assert torch.equal(kept.tensors["counts"], base["val_counts"])


def test_neighbours_are_those_of_the_trained_rows(made: tuple[Path, RunDir]) -> None:
    inputs, run = made
    kept = sentry.read(run.reference / "neighbours.safetensors")
    assert kept.step == 12
    rows_ND = sentry.read(run.sentry(12)).tensors["rows/input"]
    read = read_inputs(make_recipe(inputs), None, lambda _: None)
    frozen = load(
        read.base, read.base_vocab_size, quantization="none", compute_dtype="float32", device=torch.device("cpu")
    )
    cosine_NV = analysis.unit_rows(rows_ND) @ analysis.unit_rows(frozen.table_VD).T
    expected = cosine_NV.topk(5, dim=1)
    torch.testing.assert_close(kept.tensors["base_cosines"], expected.values)
    assert torch.equal(kept.tensors["base_ids"], expected.indices)
    assert all(int(ids[0]) != i for i, ids in enumerate(kept.tensors["new_ids"]))
    texts = decode_json(kept.tensors["base_tokens"])
    some = int(kept.tensors["base_ids"][0, 0])
    assert texts[str(some)] == read.base_tokenizer.decode([some])


def test_a_damaged_file_is_written_anew_and_a_whole_one_left_alone(inputs: Path, tmp_path: Path) -> None:
    run = run_to_end(inputs, tmp_path / "run", {"train": {"max_steps": 3}})
    path = run.reference / "base.safetensors"
    whole = path.read_bytes()
    run.sentry(3).unlink()  # so that the run is not done, and is loaded again
    stamp = path.stat().st_mtime_ns
    run_to_end(inputs, run.path, {"train": {"max_steps": 3}})
    assert path.stat().st_mtime_ns == stamp
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    run.sentry(3).unlink()
    run_to_end(inputs, run.path, {"train": {"max_steps": 3}})
    assert path.read_bytes() == whole


def test_a_costly_search_waits_for_the_end(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searched = []
    plain, clock = reference._neighbours, [0.0]

    def slow(*args: object) -> dict[str, torch.Tensor]:
        clock[0] += 100.0
        searched.append(clock[0])
        return plain(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(reference, "_neighbours", slow)
    monkeypatch.setattr(reference, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    run_to_end(inputs, tmp_path / "run")  # evaluations after steps 0, 5, 10 and 12
    assert len(searched) == 2


def test_json_in_a_tensor() -> None:
    assert decode_json(encode_json({"é": [1, "\u2060"]})) == {"é": [1, "\u2060"]}
