"""A whole run: what it changes, what it logs, and that the split into micro-batches does not matter."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Quiet, make_recipe, run_to_end
from torch.nn import functional

from wake2vec import base, sentry, sentry_writer, train
from wake2vec.data import batch_indices
from wake2vec.errors import WakeError
from wake2vec.identity import read_inputs
from wake2vec.metrics import read_records
from wake2vec.plan import Plan
from wake2vec.resume import Training
from wake2vec.rundir import RunDir

LAST = 12


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return what a run loads, once it has loaded it."""
    kept: dict[str, Any] = {}
    plain = train.resume

    def resume(*args: Any, **options: Any) -> Training:
        kept["training"] = plain(*args, **options)
        kept["base"] = base.fingerprint(kept["training"].model.base)
        return kept["training"]

    monkeypatch.setattr(train, "resume", resume)
    return kept


@pytest.mark.parametrize("kind", ["inputs", "tied_inputs"])
def test_only_the_rows_change(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, training: dict[str, Any]
) -> None:
    changes = {"model": {"quantization": "nf4"}, "run": {"keep_every": 12}}
    run = run_to_end(request.getfixturevalue(kind), tmp_path / "run", changes)
    assert base.fingerprint(training["training"].model.base) == training["base"]
    first, last = sentry.read(run.sentry(0)), sentry.read(run.sentry(LAST))
    names = {"rows/input"} | ({"rows/head"} if kind == "inputs" else set())
    assert {name for name in last.tensors if name.startswith("rows/")} == names
    for name in names:
        assert not torch.equal(first.tensors[name], last.tensors[name])


def test_fingerprint_sees_one_changed_value(inputs: Path, tmp_path: Path, training: dict[str, Any]) -> None:
    run_to_end(inputs, tmp_path / "run", {"train": {"max_steps": 3}})
    frozen = training["training"].model.base
    with torch.no_grad():
        next(iter(frozen.body.parameters()))[0, 0] += 1e-3
    assert base.fingerprint(frozen) != training["base"]


def test_training_lowers_the_loss_and_the_words_have_rows_of_their_own(inputs: Path, tmp_path: Path) -> None:
    run = run_to_end(inputs, tmp_path / "run", {"train": {"max_steps": 60}, "run": {"eval_every": 60}})
    records = read_records(run.metrics)
    bits = [record["val/bits_per_char"] for record in records if "val/bits_per_char" in record]
    control = records[-1]["control/bits_per_char"]
    assert bits[-1] < bits[0]
    assert bits[-1] < control


def test_validation_numbers_are_those_of_a_plain_model(inputs: Path, tmp_path: Path, training: dict[str, Any]) -> None:
    run = run_to_end(inputs, tmp_path / "run", {"train": {"max_steps": 3}, "run": {"keep_every": 3}})
    loaded: Training = training["training"]
    rows = sentry.read(run.sentry(0)).tensors
    frozen = loaded.model.base
    table_VD = torch.cat([frozen.table_VD, rows["rows/input"]])
    head_VD = torch.cat([frozen.head_VD, rows["rows/head"]])
    nats = 0.0
    kinds = {True: [0.0, 0], False: [0.0, 0]}
    for block_T in loaded.inputs.val_blocks.ids_KT:
        ids_T = block_T[block_T >= 0]
        with torch.no_grad():
            logits_TV = frozen.hidden(table_VD[ids_T[None, :-1]])[0] @ head_VD.T
        for loss, target in zip(
            functional.cross_entropy(logits_TV, ids_T[1:], reduction="none"), ids_T[1:], strict=True
        ):
            nats += float(loss)
            kinds[bool(target >= len(frozen.table_VD))][0] += float(loss)
            kinds[bool(target >= len(frozen.table_VD))][1] += 1
    record = read_records(run.metrics)[0]
    scored = loaded.inputs.val_blocks.num_scored
    assert record["val/loss_nats"] == pytest.approx(nats / scored, rel=1e-6)
    assert record["val/loss_new_nats"] == pytest.approx(kinds[True][0] / kinds[True][1], rel=1e-6)
    assert record["val/loss_old_nats"] == pytest.approx(kinds[False][0] / kinds[False][1], rel=1e-6)
    chars = loaded.inputs.val_blocks.scored_chars
    assert record["val/bits_per_char"] == pytest.approx(nats / math.log(2) / chars, rel=1e-6)


def test_train_loss_is_the_mean_of_the_steps_since_the_last_line(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    plain = train._gradient

    def gradient(training: Training, step: int) -> train.Gradient:
        found = plain(training, step)
        losses.append(found.loss)
        return found

    monkeypatch.setattr(train, "_gradient", gradient)
    run = run_to_end(inputs, tmp_path / "run")
    logged = [record["train/loss_nats"] for record in read_records(run.metrics) if "train/loss_nats" in record]
    assert logged == [sum(losses[i : i + 3]) / 3 for i in (0, 3, 6, 9)]


@pytest.mark.parametrize("kind", ["inputs", "tied_inputs"])
def test_micro_batches_do_not_change_the_curve(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    inputs = request.getfixturevalue(kind)
    changes = {"train": {"batch_size": 16, "max_steps": 8}, "run": {"log_every": 1}}
    curves = []
    for size, activations in ((1, "kept"), (16, "kept"), (4, "recomputed")):
        plan = Plan(size, activations, chunk_tokens=64)
        run = run_to_end(inputs, tmp_path / f"by-{size}", changes, plan=plan)
        curves.append([r["train/loss_nats"] for r in read_records(run.metrics) if "train/loss_nats" in r])
    assert len(curves[0]) == 8
    # summed in another order: float32 rounding, which training carries along
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[2]), rtol=1e-5, atol=1e-5)


def test_every_block_is_seen_once_an_epoch_whatever_the_batch() -> None:
    seen = [i for step in range(1, 11) for i in batch_indices(step, batch_size=7, num_blocks=14, seed=1)]
    for epoch in range(5):
        assert sorted(seen[14 * epoch : 14 * (epoch + 1)]) == list(range(14))
    assert seen[:14] != seen[14:28]


def test_a_finished_run_is_reported_without_loading_anything(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_to_end(inputs, tmp_path / "run")
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file() and path != run.lock}
    monkeypatch.setattr(train, "resume", None)
    console = Quiet()
    records = train.train(make_recipe(inputs), run, console)
    assert records == read_records(run.metrics)
    assert console.said == ["run run is done: 12 steps"]
    assert {path: path.read_bytes() for path in before} == before


def test_nan_stops_the_run_with_step_and_blocks_and_a_good_sentry(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train._gradient

    def poisoned(training: Training, step: int) -> train.Gradient:
        if step == 7:
            with torch.no_grad():
                training.model.rows["input"][0] = math.nan
                training.model.rows["head"][0] = math.nan
        return plain(training, step)

    monkeypatch.setattr(train, "_gradient", poisoned)
    run = RunDir(tmp_path / "run")
    with pytest.raises(WakeError, match=r"step 7: loss nan, .*blocks \[\d+, .*sentry of step [56] is whole"):
        train.train(make_recipe(inputs), run, Quiet())
    newest = next(header for _, header, _ in sentry.listing(run) if header)
    assert newest["step"] in (5, 6)
    for name in sentry.read(run.sentry(newest["step"])).tensors:
        assert name  # read() refuses NaN


def test_snapshots_are_half_precision_rows_at_their_steps(inputs: Path, tmp_path: Path) -> None:
    run = run_to_end(inputs, tmp_path / "run", {"run": {"snapshot_every": 6, "keep_every": 6}})
    assert sorted(path.name for path in run.snapshots.iterdir()) == [
        "rows_step_000006.safetensors",
        "rows_step_000012.safetensors",
    ]
    snapshot, whole = sentry.read(run.snapshot(6)), sentry.read(run.sentry(6))
    assert set(snapshot.tensors) == {"rows/input", "rows/head"}
    for name, tensor in snapshot.tensors.items():
        assert torch.equal(tensor, whole.tensors[name].half())


@pytest.mark.parametrize("gap_s", [0.0, 100.0])
def test_retention_keeps_the_last_the_best_and_every_so_many(
    gap_s: float, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a save that is due waits for the one before instead of being skipped
    monkeypatch.setattr(sentry_writer.SentryWriter, "busy", property(lambda writer: bool(writer.wait()) and False))
    section = {"keep_last": 2, "keep_every": 6, "sentry_every": 1, "sentry_min_gap_s": gap_s}
    run = run_to_end(inputs, tmp_path / "run", {"run": section})
    steps = sorted(header["step"] for _, header, _ in sentry.listing(run) if header)
    best = sentry.read(run.sentry(LAST)).header["best_step"]
    assert {0, 6, 12} <= set(steps)
    assert best in steps
    assert len(steps) <= 2 + 1 + 3


def test_base_number_is_the_base_models_own(inputs: Path, tmp_path: Path, training: dict[str, Any]) -> None:
    run = run_to_end(inputs, tmp_path / "run", {"train": {"max_steps": 3}})
    frozen = training["training"].model.base
    blocks = read_inputs(make_recipe(inputs), None, lambda _: None).base_val_blocks
    assert int(blocks.ids_KT.max()) < len(frozen.table_VD)
    nats = 0.0
    for block_T in blocks.ids_KT:
        ids_T = block_T[block_T >= 0]
        with torch.no_grad():
            logits_TV = frozen.causal_lm(input_ids=ids_T[None]).logits[0, :-1, : len(frozen.table_VD)]
        nats += float(functional.cross_entropy(logits_TV, ids_T[1:], reduction="sum"))
    expected = nats / math.log(2) / blocks.scored_chars
    assert read_records(run.metrics)[0]["base/bits_per_char"] == pytest.approx(expected, rel=1e-6)
