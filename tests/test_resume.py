"""A run that was killed ends to the bit like one that never was."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ends
import killing
import pytest
from tiny import Quiet, make_recipe, run_to_end

from wake2vec import resume as resume_module
from wake2vec import sentry
from wake2vec.rundir import RunDir
from wake2vec.train import train

InChild = Callable[..., int]
# 147 blocks, so that the first epoch ends with step 7
CHANGES: dict[str, dict[str, Any]] = {"train": {"batch_size": 21}}
LAST = 12


def assert_same_end(run: RunDir, reference: RunDir) -> None:
    ends.assert_same_end(run, reference, LAST, same_identity=False)


@pytest.fixture(scope="session")
def reference(inputs: Path, tmp_path_factory: pytest.TempPathFactory, in_child: InChild) -> RunDir:
    folder = tmp_path_factory.mktemp("reference") / "run"
    assert in_child(killing.run, inputs, folder, CHANGES, "never", 0) == 0
    run = RunDir(folder)
    assert json.loads(run.identity.read_text())["identity"]["num_train_blocks"] == 7 * 21
    assert len(ends.numbers(run)) == 4 + 4 + 1  # lines at 3 6 9 12, evaluations at 0 5 10 12, the control
    return run


CUTS = [
    ("after step", 1),
    ("after step", 7),
    ("in step", 4),
    ("in update", 4),
    ("in evaluation", 0),
    ("in evaluation", 5),
    ("in evaluation", 12),
    ("in save", 4),
    ("before read-back", 7),
]


@pytest.mark.parametrize(("point", "step"), CUTS)
def test_killed_run_ends_like_an_uninterrupted_one(
    point: str, step: int, inputs: Path, tmp_path: Path, in_child: InChild, reference: RunDir
) -> None:
    folder = tmp_path / "run"
    assert in_child(killing.run, inputs, folder, CHANGES, point, step) == -signal.SIGKILL
    assert in_child(killing.run, inputs, folder, CHANGES, "never", 0) == 0
    assert_same_end(RunDir(folder), reference)


def test_run_killed_twice_ends_the_same(inputs: Path, tmp_path: Path, in_child: InChild, reference: RunDir) -> None:
    folder = tmp_path / "run"
    assert in_child(killing.run, inputs, folder, CHANGES, "in save", 4) == -signal.SIGKILL
    assert in_child(killing.run, inputs, folder, CHANGES, "after step", 9) == -signal.SIGKILL
    assert in_child(killing.run, inputs, folder, CHANGES, "never", 0) == 0
    assert_same_end(RunDir(folder), reference)


SIGNALS = [
    ("after step", 1, signal.SIGTERM),
    ("in step", 4, signal.SIGTERM),
    ("in step", 4, signal.SIGINT),
    ("in update", 4, signal.SIGTERM),
    ("in evaluation", 5, signal.SIGINT),
    ("in evaluation", LAST, signal.SIGTERM),
    ("in save", 4, signal.SIGTERM),
]


@pytest.mark.parametrize(("point", "step", "number"), SIGNALS)
def test_signal_saves_the_last_finished_step(
    point: str, step: int, number: int, inputs: Path, tmp_path: Path, in_child: InChild, reference: RunDir
) -> None:
    folder = tmp_path / "run"
    assert in_child(killing.run, inputs, folder, CHANGES, point, step, number) == 75
    finished = step - 1 if point == "in step" else step
    steps = [header["step"] for _, header, _ in sentry.listing(RunDir(folder)) if header]
    assert steps[0] in (finished, finished + 1)  # a writing thread's signal reaches the loop a step later
    assert in_child(killing.run, inputs, folder, CHANGES, "never", 0) == 0
    assert_same_end(RunDir(folder), reference)


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
@pytest.mark.parametrize("kind", ["inputs", "tied_inputs"])
def test_resume_of_every_kind_of_run(
    kind: str, optimizer: str, request: pytest.FixtureRequest, tmp_path: Path, in_child: InChild
) -> None:
    inputs = request.getfixturevalue(kind)
    changes = {"train": {"optimizer": optimizer, "max_steps": LAST}, "model": {"quantization": "nf4"}}
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    assert in_child(killing.run, inputs, straight, changes, "never", 0) == 0
    assert in_child(killing.run, inputs, cut, changes, "in update", 8) == -signal.SIGKILL
    assert in_child(killing.run, inputs, cut, changes, "never", 0) == 0
    assert_same_end(RunDir(cut), RunDir(straight))


PARTS = ["rows/input", "rows/head", "optimizer/input", "optimizer/head", "step", "window"]


@pytest.mark.parametrize("part", PARTS)
def test_every_restored_part_matters(
    part: str, inputs: Path, tmp_path: Path, in_child: InChild, reference: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leave one part out of a resume: the comparison above must notice."""
    folder = tmp_path / "run"
    assert in_child(killing.run, inputs, folder, CHANGES, "after step", 8) == -signal.SIGKILL
    plain = sentry.read

    def without_part(path: Path) -> sentry.Sentry:
        found = plain(path)
        if path.parent.name != "sentries":
            return found
        for name, tensor in found.tensors.items():
            if name.startswith(part):
                tensor.zero_()
        if part == "window":
            assert found.header["window"]["num_steps"]
            found.header["window"] = {"loss_sum": 0.0, "num_steps": 0}
        if part == "step":
            found.header["step"] -= 1
        return found

    monkeypatch.setattr(resume_module.sentry, "read", without_part)
    try:
        train(make_recipe(inputs, CHANGES), RunDir(folder), Quiet())
    finally:
        monkeypatch.undo()
    with pytest.raises(AssertionError):
        assert_same_end(RunDir(folder), reference)


def test_resume_repeats_the_plan_of_the_sentry(inputs: Path, tmp_path: Path) -> None:
    from wake2vec.plan import Plan

    plan = Plan(micro_batch_size=2, activations="recomputed", chunk_tokens=17)
    run = run_to_end(inputs, tmp_path / "run", plan=plan)
    (run.metrics).write_text("")  # no longer done: the last sentry is taken up again
    seen: list[str] = []

    class Console(Quiet):
        def say(self, message: str) -> None:
            seen.append(message)

    train(make_recipe(inputs), run, Console())
    assert any("micro-batch 2, activations recomputed" in message for message in seen)
    assert sentry.read(run.sentry(LAST)).header["plan"] == plan.as_json()
