"""Whole tiny runs on a card: exact ones end to the bit alike, however they were cut and wherever things lie."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import killing
import pytest
import torch
from tiny import make_recipe, run_to_end, write_recipe

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


def take_all_memory() -> list[torch.Tensor]:
    torch.cuda.empty_cache()
    held = []
    for size in (2**30, 2**21):
        try:
            while True:
                held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            pass
    return held


def test_card_that_another_program_fills_costs_a_message_and_no_run(inputs: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "tiny.toml", make_recipe(inputs, {}))
    words = ["train", str(recipe), "--runs", str(tmp_path / "runs")]

    def train() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from wake2vec.cli import main; main()", *words]
        environment = {**os.environ, "WAKE2VEC_ALLOW_DRIFT": "1"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    held = take_all_memory()
    done = train()
    held.clear()
    torch.cuda.empty_cache()
    assert done.returncode == 1, done.stderr
    assert "wake2vec: out of memory on the GPU" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs" / "tiny" / "run.json").exists()
    done = train()
    assert done.returncode == 0, done.stderr
