#!/opt/wake2vec/bin/python
"""Say whether the training run in this container still makes progress; 1 means it does not.

The volume may hold other containers' runs, so the run is found by what this container's processes hold open. Limits
are generous: a step takes up to 170 s on a T4, an evaluation longer, and a start may download 30 GB first.
"""

import json
import os
import sys
import time
from pathlib import Path

START_LIMIT_S = float(os.environ.get("WAKE2VEC_HEALTH_START_S") or 4 * 3600)
STEP_LIMIT_S = float(os.environ.get("WAKE2VEC_HEALTH_STEP_S") or 3600)


def held_runs(runs: Path, proc: Path = Path("/proc")) -> dict[Path, float]:
    """Return the run folders that processes here hold open, with the time the first such process started."""
    found: dict[Path, float] = {}
    for link in proc.glob("[0-9]*/fd/*"):
        try:
            target, started = Path(os.readlink(link)), start_time(link.parents[1])
        except OSError:  # the process ended, or is another user's
            continue
        if target.is_relative_to(runs) and target != runs:
            run = runs / target.relative_to(runs).parts[0]
            found[run] = min(started, found.get(run, started))
    return found


def start_time(process: Path) -> float:
    """Return when a process started, in Unix seconds; the kernel counts ticks since boot."""
    ticks = int((process / "stat").read_text().rpartition(")")[2].split()[19])
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")


def trouble(run: Path, started: float, now: float) -> str | None:
    """Return what is wrong with a held run, None if nothing is."""
    try:
        beat = json.loads((run / "heartbeat.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # not there yet, or just being replaced
        beat = {}
    last = float(beat.get("time", 0))
    if last < started:  # left by an earlier container
        waited = now - started
        return f"{run.name}: no step since the start, {waited:.0f} s ago" if waited > START_LIMIT_S else None
    if now - last > STEP_LIMIT_S:
        return f"{run.name}: last step {beat.get('step')}, {now - last:.0f} s ago"
    return None


def main() -> int:
    """Check every run this container holds; a container that trains nothing is healthy."""
    runs = Path(os.environ.get("WAKE2VEC_RUNS", "/runs"))
    found = [trouble(run, started, time.time()) for run, started in held_runs(runs).items()]
    print("\n".join(filter(None, found)) or "ok")
    return 1 if any(found) else 0


if __name__ == "__main__":
    sys.exit(main())
