"""Promises: a full disk stops nothing that can go on; a slow or hanging volume does not stop training."""

import itertools
import random
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager

from faults import hooks
from faults.lab import DONE, STEPS, USER, Child, Lab, newest_step, no_traceback
from faults.volume import Volume, volume

from wake2vec.rundir import RunDir

_WHEN = ("in training", "in the report", "at any moment")
_SHORTEST_S, _LONGEST_S = 3.0, 150.0
_STEP = re.compile(r"^step (\d+): train", re.M)


def full_disk(lab: Lab, count: int) -> str:
    """Fill the volume under a run at a random moment, give the space back later; the run ends as if nothing was."""

    def filled_runs(first: int) -> list[str]:
        with volume(lab.fresh(), "ext4") as on:
            return [
                _filled_run(lab, on, random.Random(f"{lab.seed} full {index}"), _WHEN[index % 3])
                for index in range(first, count, 2)
            ]

    outcomes = [*itertools.chain.from_iterable(lab.each(2, lambda first, _: filled_runs(first)))]
    told = {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))}
    return f"{count} times full: {told}"


def _filled_run(lab: Lab, on: Volume, rng: random.Random, when: str) -> str:
    runs = on.path / f"full-{rng.random()}"
    started = lab.train(runs, prepare=[(hooks.slow_steps, (0.03,))])
    if when == "in training":
        started.wait_for(f"step {rng.randrange(2, STEPS // 2, 2)}: train")
    elif when == "in the report":
        started.wait_for("rows shuffled")
    else:
        time.sleep(rng.uniform(0, lab.seconds + 0.03 * STEPS))
    begun = (runs / "tiny" / "run.json").exists()
    emptied = time.monotonic() + rng.uniform(0.3, 2.0)
    while time.monotonic() < emptied:  # what retention frees is taken too
        on.fill(leave_bytes=rng.choice([0, 0, 4096, 20_000]))
        time.sleep(0.01)
    on.empty()
    done = started.wait()
    no_traceback(done)
    said = "not saved (No space" in done.err or "not written (No space" in done.err
    newest_step(RunDir(runs / "tiny"))
    if when == "in training":
        assert said, f"no save found the disk full: {done}"
        assert f"step {STEPS}: train" in done.err, f"it did not go on: {done}"
    if done.code == USER:  # it was full when the run began or ended
        assert "No space left on device" in done.err or "GiB free" in done.err, done
    else:
        assert done.code == DONE, done
    lab.train_to_end(runs)
    shutil.rmtree(runs)  # dozens do not fit on the volume
    if done.code == DONE:
        return "went on, with a save missed" if said else "went on"
    return "ended with a message at its end, resumed" if begun else "refused at its start, begun again"


def hanging_volume(lab: Lab, count: int) -> str:
    """Let every write hang once, the longer the more runs there are, then again and again; the steps go on."""

    def frozen_runs(kind: str) -> list[str]:
        seconds = [_SHORTEST_S * (_LONGEST_S / _SHORTEST_S) ** (2 * index / count) for index in range(count // 2)]
        with volume(lab.fresh(), kind) as on:
            return [_frozen_run(lab, on, frozen_s) for frozen_s in seconds]

    said = lab.each(2, lambda index, _: frozen_runs(("ext4", "xfs")[index]))
    return f"{count} runs: {'; '.join(itertools.chain.from_iterable(said))}"


def _frozen_run(lab: Lab, on: Volume, frozen_s: float) -> str:
    """The volume hangs for so long, about half of the run, then a sixth of that at a time to the run's end."""
    runs = on.path / f"slow-{frozen_s}"
    pause_s = frozen_s / (STEPS / 2)
    slow = [(hooks.slow_steps, (pause_s,)), (hooks.frequent_beats, ())]
    started = lab.train(runs, "--set", "run.snapshot_every=0", prepare=slow)
    started.wait_for("step 4: train")
    threads = started.threads()
    with _going_on(started, pause_s), on.frozen():
        time.sleep(frozen_s)
        threads_after = started.threads()
    assert threads_after <= threads + 1, f"{threads} threads, then {threads_after}"
    with _going_on(started, pause_s):
        while started.running and _step(started) < STEPS - 2:
            with on.frozen():
                time.sleep(frozen_s / 6)
            time.sleep(0.02)
    done = started.wait()
    assert done.code == DONE, done
    skipped = re.search(r"(\d+) saves came due while one was being written: skipped", done.err)
    assert skipped is not None, done
    lab.check_end(RunDir(runs / "tiny"))
    return f"{frozen_s:.1f} s of hanging, {skipped[1]} saves skipped"


@contextmanager
def _going_on(started: Child, pause_s: float) -> Iterator[None]:
    """Check that steps were done meanwhile, at half their pace or better."""
    before, began = _step(started), time.monotonic()
    yield
    steps, seconds = _step(started) - before, time.monotonic() - began
    assert steps >= 0.5 * seconds / (pause_s + 0.1) - 1, f"{steps} steps in {seconds:.1f} s\n{started.err()}"


def _step(started: Child) -> int:
    return int((_STEP.findall(started.err()) or ["0"])[-1])
