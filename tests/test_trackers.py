"""Trackers: refused when they are not there, and, where TensorBoard is installed, its files read back."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from wake2vec import trackers
from wake2vec.errors import WakeError
from wake2vec.rundir import RunDir


def test_nothing_is_begun_unless_asked_for(tmp_path: Path) -> None:
    with trackers.Trackers([], RunDir(tmp_path), {}) as tracked:
        tracked(1, {"train/loss_nats": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda _name: None)
    with pytest.raises(WakeError) as caught:
        trackers.Trackers(["strange", "wandb"], RunDir(tmp_path), {})
    assert str(caught.value).splitlines() == [
        "--track strange: no such tracker; use tensorboard, wandb, trackio",
        "--track wandb: not installed; `uv sync --extra wandb`, or `pip install wandb`",
    ]


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="needs the extra tensorboard")
@pytest.mark.filterwarnings("ignore")
def test_tensorboard_holds_every_line(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with trackers.Trackers(["tensorboard"], RunDir(tmp_path), {}) as tracked:
        for step in (10, 20):
            tracked(step, {"train/loss_nats": step / 10})
    found = EventAccumulator(str(tmp_path / "trackers" / tmp_path.name))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("train/loss_nats")] == [(10, 1.0), (20, 2.0)]
