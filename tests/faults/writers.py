"""Promise: one writer."""

import random
import subprocess
import sys
import time

from faults import hooks
from faults.lab import DONE, KILL, Lab, refused, trained
from faults.volume import need

from wake2vec.rundir import RunDir

_HOLD = """
import pathlib, sys
from wake2vec.rundir import RunDir, hold
with hold(RunDir(pathlib.Path(sys.argv[1]))):
    print("held", flush=True)
    sys.stdin.read()
"""


def one_writer(lab: Lab, count: int) -> str:
    """Start two, then ten processes on one run at once; take locks over from the killed; meet another host's."""
    for number in (2, 10) * max(1, count // 2):
        _crowd(lab, number)
    for index in range(count):
        _stale_lock(lab, random.Random(f"{lab.seed} lock {index}"))
    _other_host(lab)
    _look_on(lab)
    return f"{max(1, count // 2)} times 2 and 10 processes at once, {count} stale locks, a lock of another host"


def _crowd(lab: Lab, number: int) -> None:
    runs = lab.fresh()
    crowd = [lab.train(runs) for _ in range(number)]
    ended = [child.wait() for child in crowd]
    winners = [done for done in ended if done.code == DONE]
    assert winners, ended
    for done in ended:
        if done.code != DONE:
            refused(done, "run tiny: held by ", "; wait for it or stop it")
    lab.check_end(RunDir(runs / "tiny"))
    said = "".join(done.err for done in ended)
    assert said.count("starting at step 0") == 1, said


def _stale_lock(lab: Lab, rng: random.Random) -> None:
    """A killed holder's lock file names a process that is gone, or whose number another has now: flock decides."""
    runs = lab.fresh()
    started = lab.train(runs)
    time.sleep(rng.uniform(0.1, lab.seconds))
    started.send(KILL)
    started.wait()
    lock = RunDir(runs / "tiny").lock
    if lock.exists():
        lock.write_text(rng.choice(['{"pid": 1, "host": "elsewhere", "since": "2026-01-01"}', "", "\0" * 50]))
    lab.train_to_end(runs)


def _other_host(lab: Lab) -> None:
    """The lock is held by a process that has another host name; its name is in the refusal."""
    need("unshare")
    runs = lab.fresh()
    command = ["unshare", "--uts", "sh", "-c", 'hostname far-away && exec "$0" -c "$1" "$2"', sys.executable, _HOLD]
    with subprocess.Popen(
        [*command, str(runs / "tiny")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as far:
        assert far.stdout is not None
        assert far.stdout.readline() == "held\n"
        refused(lab.train(runs).wait(), f"run tiny: held by process {far.pid} on far-away since 2")
        far.kill()
    lab.train_to_end(runs)


def _look_on(lab: Lab) -> None:
    """`sentries` lists a run while it is being trained and pruned; what would write is refused."""
    runs = lab.fresh()
    started = lab.train(runs, prepare=[(hooks.slow_steps, (0.02,))])
    started.wait_for("step 4: train")
    held = 0
    while started.running:
        listed = lab.run("sentries", "tiny", "--runs", runs, "--json")
        assert listed.code == DONE, listed
        assert "damaged" not in listed.out, listed
        pruned = lab.run("sentries", "tiny", "--runs", runs, "--prune")
        if not trained(started):
            refused(pruned, "held by process")
            held += 1
    assert held, "the run was over before it was looked at"
    assert started.wait().code == DONE
    lab.check_end(RunDir(runs / "tiny"))
