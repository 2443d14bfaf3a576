"""The image's health check, on a made-up /proc: found is the run this container holds, not its neighbours'."""

import importlib.util
import json
import os
import time
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parents[1] / "deploy" / "healthcheck.py"
HOUR = 3600.0


@pytest.fixture
def health() -> ModuleType:
    spec = importlib.util.spec_from_file_location("healthcheck", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def process(proc: Path, pid: int, opened: Path, age_s: float) -> None:
    folder = proc / str(pid)
    (folder / "fd").mkdir(parents=True)
    (folder / "fd" / "3").symlink_to(opened)
    ticks = int((time.clock_gettime(time.CLOCK_BOOTTIME) - age_s) * os.sysconf("SC_CLK_TCK"))
    (folder / "stat").write_text(f"{pid} (a name) with) S " + "0 " * 18 + f"{ticks} 0")


def beat(run: Path, age_s: float) -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / "heartbeat.json").write_text(json.dumps({"step": 7, "time": time.time() - age_s}))


def test_the_run_that_is_held_open_is_found_with_its_start(health: ModuleType, tmp_path: Path) -> None:
    runs, proc = tmp_path / "runs", tmp_path / "proc"
    beat(runs / "mine", 0)
    beat(runs / "neighbours", 0)
    process(proc, 12, runs / "mine" / "lock", 50)
    process(proc, 13, tmp_path / "elsewhere", 90)
    found = health.held_runs(runs, proc)
    assert set(found) == {runs / "mine"}
    assert found[runs / "mine"] == pytest.approx(time.time() - 50, abs=1)


@pytest.mark.parametrize(
    ("started_ago_s", "beat_ago_s", "said"),
    [
        (10, None, None),  # starting, nothing there yet
        (3 * HOUR, None, None),  # still downloading
        (5 * HOUR, None, "no step since the start"),
        (60, 10 * HOUR, None),  # an earlier container's heartbeat
        (5 * HOUR, 10 * HOUR, "no step since the start"),
        (5 * HOUR, 170, None),  # a slow card
        (5 * HOUR, 2 * HOUR, "last step 7"),
    ],
)
def test_a_run_is_judged_by_its_heartbeat_and_its_start(
    health: ModuleType, tmp_path: Path, started_ago_s: float, beat_ago_s: float | None, said: str | None
) -> None:
    run = tmp_path / "run"
    if beat_ago_s is not None:
        beat(run, beat_ago_s)
    now = time.time()
    trouble = health.trouble(run, now - started_ago_s, now)
    assert (trouble is None) == (said is None)
    assert said is None or said in trouble


def test_a_heartbeat_just_being_written_is_no_trouble(health: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "heartbeat.json").write_text('{"ste')
    assert health.trouble(tmp_path, time.time() - 10, time.time()) is None


def test_a_container_that_trains_nothing_is_healthy(
    health: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WAKE2VEC_RUNS", str(tmp_path / "runs"))
    assert health.main() == 0
    assert capsys.readouterr().out == "ok\n"
