"""Whole runs through Compose: to the end, killed, stopped, recreated, and across the stacks."""

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image.driver import TF4, TF5, Clone, docker
from safetensors.numpy import load

STEPS = 30
SHORT = (
    f"train.max_steps={STEPS}",
    "train.warmup_steps=3",
    "run.log_every=2",
    "run.eval_every=15",
    "run.sentry_every=5",
    "run.sentry_min_gap_s=0",
)
EARLY = 5  # a step that is past the start and well before the end
FLOAT32 = {"rtol": 1.3e-6, "atol": 1e-5}  # torch.testing's defaults for float32


def rows(clone: Clone, step: int, run: str = "demo") -> dict[str, np.ndarray]:
    return load(clone.read(f"{run}/sentries/sentry_step_{step:06d}.safetensors"))


def values(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out what a clock or a memory meter says."""
    kept = [{k: v for k, v in r.items() if not k.startswith(("time", "throughput", "memory"))} for r in records]
    return [record for record in kept if len(record) > 1]


def wait_for(condition: Callable[[], bool], timeout_s: float = 600) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.5)


def step_of(clone: Clone) -> int:
    """Return the last step on record; the heartbeat is younger, but a kill may leave it behind."""
    return max((int(record["step"]) for record in clone.records()), default=-1)


@pytest.fixture(scope="module")
def uninterrupted(cache: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the short demo to its end once."""
    clone = Clone(tmp_path_factory.mktemp("whole") / "wake2vec")
    try:
        clone.shorten_demo(cache, *SHORT)
        clone.compose("up", "demo")
        assert clone.state()["ExitCode"] == 0, clone.compose("logs", "demo").stdout
        return {"rows": rows(clone, STEPS), "values": values(clone.records())}
    finally:
        clone.close()


def assert_same_end(clone: Clone, uninterrupted: dict[str, Any]) -> None:
    ended = rows(clone, STEPS)
    assert set(ended) == set(uninterrupted["rows"])
    for name, wanted in uninterrupted["rows"].items():
        np.testing.assert_array_equal(ended[name], wanted, err_msg=name)
    assert values(clone.records()) == uninterrupted["values"]


def start_and_reach(clone: Clone, step: int, **options: str) -> None:
    clone.compose("up", "--detach", "demo", **options)
    wait_for(lambda: step_of(clone) >= step or not clone.state()["Running"])
    assert clone.state()["Running"], clone.compose("logs", "demo").stdout


def test_the_demo_ends_well_and_says_what_it_did(clone: Clone) -> None:
    said = clone.compose("up", "demo").stdout
    assert clone.state()["ExitCode"] == 0, said
    assert "stack    torch2.9-tf4.57, as locked" in said
    assert "bits/char" in said
    again = clone.compose("run", "--rm", "demo")
    assert "is done" in again.stdout


def test_the_suite_passes_inside_the_image(clone: Clone) -> None:
    done = clone.compose("run", "--rm", "test")
    assert " passed" in done.stdout
    print(done.stdout.splitlines()[-1])


def test_a_kill_at_a_random_moment_changes_nothing(clone: Clone, cache: str, uninterrupted: dict[str, Any]) -> None:
    clone.shorten_demo(cache, *SHORT)
    pause_s = random.uniform(0, 2)
    print(f"killed {pause_s:.3f} s after step {EARLY}")
    start_and_reach(clone, EARLY)
    time.sleep(pause_s)
    docker("kill", clone.container())
    assert clone.wait() == 137
    clone.compose("up", "demo")
    assert clone.state()["ExitCode"] == 0, clone.compose("logs", "demo").stdout
    assert_same_end(clone, uninterrupted)


def test_a_stop_saves_exits_75_and_the_run_goes_on(clone: Clone, cache: str, uninterrupted: dict[str, Any]) -> None:
    clone.shorten_demo(cache, *SHORT)
    start_and_reach(clone, EARLY)
    assert docker("exec", clone.container(), "healthcheck.py").stdout == "ok\n"
    late = docker("exec", "--env", "WAKE2VEC_HEALTH_STEP_S=1e-9", clone.container(), "healthcheck.py", check=False)
    assert (late.returncode, "last step" in late.stdout) == (1, True)
    began = time.monotonic()
    clone.compose("stop", "demo")
    took_s = time.monotonic() - began
    state = clone.state()
    assert (state["ExitCode"], state["OOMKilled"]) == (75, False)
    print(f"stopped in {took_s:.1f} s")
    assert "saved" in clone.compose("logs", "demo").stdout
    # The container goes, the volume stays.
    clone.compose("down")
    clone.compose("up", "demo")
    said = clone.compose("logs", "demo").stdout
    assert clone.state()["ExitCode"] == 0, said
    assert_same_end(clone, uninterrupted)


@pytest.mark.parametrize("number", range(int(os.environ.get("WAKE2VEC_STOPS", "2"))))
def test_a_stop_at_a_random_moment_changes_nothing(
    number: int, clone: Clone, cache: str, uninterrupted: dict[str, Any]
) -> None:
    """Docker gives ten seconds, as it does without a compose file: also in start-up, load and report."""
    clone.shorten_demo(cache, *SHORT)
    clone.compose("up", "--detach", "demo")
    pause_s = random.uniform(0, 20)
    time.sleep(pause_s)
    docker("stop", "--time", "10", clone.container())
    code = clone.wait()
    print(f"stop {number}: {pause_s:.1f} s after the start, exit {code}")
    assert code in (75, 143, 0), clone.compose("logs", "demo").stdout  # 143: before the command listens
    clone.compose("up", "demo")
    assert clone.state()["ExitCode"] == 0, clone.compose("logs", "demo").stdout
    assert_same_end(clone, uninterrupted)


def test_a_run_crosses_stacks_only_when_told_and_then_on_record(clone: Clone, cache: str) -> None:
    clone.shorten_demo(cache, *SHORT)
    start_and_reach(clone, EARLY)
    clone.compose("stop", "demo")
    stopped = int(json.loads(clone.read("demo/heartbeat.json"))["step"])
    refused = clone.compose("run", "--rm", "demo", stack=TF5, check=False)
    assert refused.returncode == 1
    assert "torch: 2.9.0 -> 2.10.0" in refused.stdout
    assert "--allow-stack-change" in refused.stdout

    # The rest of the steps on both stacks, from the same sentry.
    clone.compose("run", "--rm", "shell", "cp", "-r", "/runs/demo", "/runs/home")
    for stack, run, allow in ((TF5, "demo", "1"), (TF4, "home", "")):
        clone.compose("run", "--rm", "demo", stack=stack, WAKE2VEC_RUN=run, WAKE2VEC_ALLOW_STACK_CHANGE=allow)
    crossed, stayed = rows(clone, STEPS), rows(clone, STEPS, run="home")
    for name, wanted in stayed.items():
        np.testing.assert_allclose(crossed[name], wanted, **FLOAT32, err_msg=name)
    apart = max(float(np.abs(crossed[name] - wanted).max()) for name, wanted in stayed.items())
    print(f"crossed after step {stopped}; at step {STEPS} at most {apart:.2g} apart")
    record = json.loads(clone.read("demo/run.json"))
    assert record["stack"]["name"] == TF5
    assert record["history"][-1]["stack_before"]["name"] == TF4


def test_no_token_is_left_in_the_log_or_the_record(clone: Clone, cache: str, tmp_path: Path) -> None:
    token, file_token = "hf_variablecanary", "hf_filecanary"
    file = tmp_path / "token"
    file.write_text(file_token)
    file.chmod(0o644)
    clone.shorten_demo(cache, "train.max_steps=2", "train.warmup_steps=1")
    said = clone.compose("up", "demo", HF_TOKEN=token, WAKE2VEC_HF_TOKEN_FILE=str(file)).stdout
    kept = docker(
        "run",
        "--rm",
        "--volume",
        f"{clone.project}_runs:/runs:ro",
        "--entrypoint",
        "grep",
        f"wake2vec:{TF4}",
        "-rlE",
        f"{token}|{file_token}",
        "/runs",
        check=False,
    )
    assert kept.stdout == ""
    assert token not in said
    assert file_token not in said
