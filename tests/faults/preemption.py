"""Promise: a preempted run saves its last finished step within the notice, and goes on from there."""

import random
import re
import subprocess
import sys
import time

from faults import hooks
from faults.child import Prepare
from faults.lab import DONE, INT, KILL, STOPPED, TERM, Child, Lab, newest_step, no_traceback

from wake2vec.rundir import RunDir

_GRACE_S = 10.0
_COMMAND = "from wake2vec.cli import main; main()"


def preemption(lab: Lab, count: int) -> str:
    """Send SIGTERM or SIGINT at random instants, once or twice, and in every phase by name; the runs go on."""
    stops = lab.each(count, lambda _, rng: _stopped_run(lab, rng))
    stops += [_stopped_in(lab, *phase) for phase in _PHASES]
    stops += [_stopped_at_start(lab, random.Random(f"{lab.seed} start {index}")) for index in range(3)]
    codes = {code: [c for c, _ in stops].count(code) for code in sorted({code for code, _ in stops})}
    return f"{len(stops)} signals; exit codes {codes}; the slowest ended in {max(s for _, s in stops):.1f} s"


def _stop(child: Child, rng: random.Random) -> tuple[int, float]:
    """Stop a command, in half of the cases with a second signal close behind; return its exit code and how long."""
    began = time.monotonic()
    child.send(rng.choice([TERM, TERM, INT]))
    if rng.random() < 0.5:
        time.sleep(rng.choice([0, 0.01, 0.1]))
        child.send(TERM)
    done = child.wait(timeout_s=_GRACE_S + 50)
    took = time.monotonic() - began
    no_traceback(done)
    assert took < _GRACE_S, f"took {took:.1f} s\n{done}"
    # only a signal before the command listens ends it plainly, and one that comes when all is done changes nothing
    assert done.code in (STOPPED, DONE, -TERM, -INT), done
    at_its_end = done.code == DONE and re.search("shuffled|is done", done.err)
    assert done.code == STOPPED or not done.err or at_its_end, done
    return done.code, took


def _stopped_run(lab: Lab, rng: random.Random) -> tuple[int, float]:
    runs = lab.fresh()
    run = RunDir(runs / "tiny")
    for _ in range(rng.randrange(2)):
        killed = lab.train(runs)
        time.sleep(rng.uniform(0, lab.seconds))
        killed.send(KILL)
        killed.wait()
    seldom: list[Prepare] = [(hooks.seldom_saves, ())] if rng.random() < 0.5 else []
    started = lab.train(runs, prepare=[(hooks.slow_steps, (0.02,)), *seldom])
    time.sleep(rng.uniform(0, lab.seconds + 0.3))
    before = newest_step(run)
    result = _stop(started, rng)
    said = re.findall(r"stopped after step (\d+), saved", started.err())
    after = newest_step(run)
    assert after >= before
    assert not said or after == int(said[0]), f"it said {said}, the newest is of step {after}"
    lab.train_to_end(runs)
    return result


_PHASES: list[tuple[str, Prepare, str]] = [
    ("load", (hooks.pause_in, ("base.load", 3600.0)), "loading"),
    ("a step of 240 s", (hooks.long_step, (5, 240.0)), "in step 5"),
    ("evaluation", (hooks.pause_in, ("evaluate", 3600.0)), "in evaluate"),
    ("save", (hooks.pause_in, ("sentry.write", 2.0)), "in sentry.write"),
    ("report", (hooks.pause_in, ("_show_result", 3600.0)), "in _show_result"),
]


def _stopped_in(lab: Lab, _name: str, prepare: Prepare, sign: str) -> tuple[int, float]:
    """Stop a run in a phase that is made to last."""
    runs = lab.fresh()
    started = lab.train(runs, prepare=[prepare])
    started.wait_for(sign)
    time.sleep(0.1)
    result = _stop(started, random.Random(0))
    lab.train_to_end(runs)
    return result


def _stopped_at_start(lab: Lab, rng: random.Random) -> tuple[int, float]:
    """Stop a command that was started like a user's, while Python still imports."""
    runs = lab.fresh()
    command = [sys.executable, "-c", _COMMAND, "train", str(lab.recipe), "--runs", str(runs)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        time.sleep(rng.uniform(0.05, 3))
        began = time.monotonic()
        process.terminate()
        said = process.communicate(timeout=60)[0]
    took = time.monotonic() - began
    assert process.returncode in (STOPPED, -TERM, DONE), (process.returncode, said)
    assert took < _GRACE_S
    assert "Traceback" not in said, said
    lab.train_to_end(runs)
    return process.returncode, took
