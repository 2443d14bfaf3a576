"""Memory that runs out costs a message and speed, never a run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Quiet, make_recipe, run_to_end

from wake2vec import sentry, train
from wake2vec.errors import WakeError
from wake2vec.metrics import read_records
from wake2vec.model import WakeModel
from wake2vec.plan import Plan
from wake2vec.resume import Options
from wake2vec.rundir import RunDir

CHANGES: dict[str, dict[str, Any]] = {"train": {"batch_size": 8}, "run": {"log_every": 1}}


def hold_back(monkeypatch: pytest.MonkeyPatch, method: str, largest: int, from_call: int = 1) -> None:
    """Let a method of the model run out of memory for more blocks than `largest`, from one of its calls on."""
    plain = getattr(WakeModel, method)
    calls = iter(range(1, 10**6))

    def short(model: WakeModel, blocks_BT: torch.Tensor) -> torch.Tensor:
        if next(calls) >= from_call and len(blocks_BT) > largest:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        result: torch.Tensor = plain(model, blocks_BT)
        return result

    monkeypatch.setattr(WakeModel, method, short)


def losses(run: RunDir) -> torch.Tensor:
    return torch.tensor([r["train/loss_nats"] for r in read_records(run.metrics) if "train/loss_nats" in r])


@pytest.mark.parametrize(("method", "from_call"), [("backward", 1), ("backward", 5), ("token_losses", 1)])
def test_run_goes_on_with_a_leaner_plan(
    method: str, from_call: int, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = run_to_end(inputs, tmp_path / "reference", CHANGES)
    hold_back(monkeypatch, method, largest=2, from_call=from_call)
    console, run = Quiet(), RunDir(tmp_path / "run")
    train.train(make_recipe(inputs, CHANGES), run, console)
    torch.testing.assert_close(losses(run), losses(reference), rtol=1e-5, atol=1e-5)
    said = [message for message in console.said if "memory is not what the plan was made for" in message]
    assert said
    assert "micro-batch" in said[-1]
    history = json.loads(run.identity.read_text())["history"]
    assert [event["plan"]["micro_batch_size"] for event in history][-1] <= 2
    assert sentry.read(run.sentry(12)).header["plan"] == history[-1]["plan"]


def test_where_no_plan_fits_the_run_stops_and_goes_on_later(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = run_to_end(inputs, tmp_path / "reference", CHANGES)
    run = RunDir(tmp_path / "run")
    hold_back(monkeypatch, "backward", largest=0, from_call=6)
    with pytest.raises(WakeError, match=r"out of memory after step 5: even the leanest plan .* sentry of step \d"):
        train.train(make_recipe(inputs, CHANGES), run, Quiet())
    monkeypatch.undo()
    train.train(make_recipe(inputs, CHANGES), run, Quiet())
    torch.testing.assert_close(losses(run), losses(reference), rtol=1e-5, atol=1e-5)


def test_plan_of_another_machine_is_replaced_and_the_change_is_on_record(inputs: Path, tmp_path: Path) -> None:
    plan = Plan(2, "offloaded", 16, fused=False)  # a GPU's: here nothing lies apart from the host
    run = run_to_end(inputs, tmp_path / "run", plan=plan)
    run.metrics.write_text("")
    console = Quiet()
    train.train(make_recipe(inputs), run, console)
    assert any("memory is not what the plan was made for" in message for message in console.said)
    event = json.loads(run.identity.read_text())["history"][-1]
    assert (event["plan_before"], event["plan"]["activations"]) == (plan.as_json(), "kept")


def test_replan_takes_the_fastest_plan_that_fits(inputs: Path, tmp_path: Path) -> None:
    plan = Plan(1, "recomputed", 16)
    run = run_to_end(inputs, tmp_path / "run", plan=plan)
    run.metrics.write_text("")
    train.train(make_recipe(inputs), run, Quiet(), Options(replan=True))
    assert json.loads(run.identity.read_text())["history"][-1]["plan"]["micro_batch_size"] == 4


@pytest.mark.gpu
def test_a_full_card_makes_the_trial_step_down(inputs: Path, tmp_path: Path) -> None:
    changes = {"train": {"batch_size": 1024, "max_steps": 4}, "data": {"seq_len": 64}}
    console, run = Quiet(), RunDir(tmp_path / "run")
    torch.cuda.empty_cache()
    limit_bytes = torch.cuda.memory_reserved() + 128 * 2**20
    try:
        options = Options(plan=Plan(1024, "kept", 2048), gpu_memory_bytes=limit_bytes)
        train.train(make_recipe(inputs, changes), run, console, options)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert any("going on after step 0 with micro-batch" in message for message in console.said)
    assert len(losses(run)) == 2
