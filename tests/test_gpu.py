"""Whole tiny runs on a card: exact ones end to the bit alike, however they were cut and wherever things lie."""

import multiprocessing
import signal
from pathlib import Path
from typing import Any

import killing
import pytest
import torch
from tiny import run_to_end

from wake2vec import sentry
from wake2vec.plan import Plan
from wake2vec.rundir import RunDir

pytestmark = pytest.mark.gpu
LAST = 12


def in_process(*args: Any) -> int:
    """Run `killing.run` in a process of its own; a forked one could not use the card."""
    process = multiprocessing.get_context("spawn").Process(target=killing.run, args=args)
    process.start()
    process.join(120)
    assert process.exitcode is not None, "the child hangs"
    return process.exitcode


def rows(run: RunDir) -> dict[str, torch.Tensor]:
    return sentry.read(run.sentry(LAST)).tensors


@pytest.mark.parametrize(("kind", "optimizer"), [("inputs", "adafactor"), ("tied_inputs", "adamw")])
def test_exact_run_that_is_killed_ends_to_the_bit_the_same(
    kind: str, optimizer: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    inputs = request.getfixturevalue(kind)
    changes: dict[str, dict[str, Any]] = {
        "train": {"exact": True, "optimizer": optimizer},
        "model": {"quantization": "nf4", "compute_dtype": "bfloat16"},
    }
    assert in_process(inputs, tmp_path / "whole", changes, "never", 0) == 0
    assert in_process(inputs, tmp_path / "cut", changes, "after step", 6) == -signal.SIGKILL
    assert in_process(inputs, tmp_path / "cut", changes, "never", 0) == 0
    cut, whole = rows(RunDir(tmp_path / "cut")), rows(RunDir(tmp_path / "whole"))
    for name, tensor in whole.items():
        assert torch.equal(cut[name], tensor), name


def test_where_things_lie_changes_nothing(inputs: Path, tmp_path: Path) -> None:
    changes = {"model": {"quantization": "nf4", "compute_dtype": "float32"}}
    plans = {
        "plain": Plan(4, "kept", 64),
        "kept": Plan(4, "kept", 64, kept_layers=2),
        "recomputed": Plan(4, "recomputed", 64),
        "offloaded": Plan(4, "offloaded", 64, table_on_host=True, kept_layers=1, shared_buffer=True),
        "fused": Plan(4, "offloaded", 64, table_on_host=True, shared_buffer=True, fused=True),
        "buffer": Plan(4, "kept", 64, shared_buffer=True),
    }
    found = {name: rows(run_to_end(inputs, tmp_path / name, changes, plan=plan)) for name, plan in plans.items()}
    for name in ("kept", "recomputed", "offloaded", "fused", "buffer"):
        for key, tensor in found["plain"].items():
            torch.testing.assert_close(found[name][key], tensor, rtol=2e-4, atol=2e-5, msg=lambda m: f"{name}: {m}")  # noqa: B023
