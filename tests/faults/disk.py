"""Promises: a full disk stops nothing that can go on; a slow or hanging volume does not stop training."""

import itertools
import random
import re
import time

from faults import hooks
from faults.lab import DONE, STEPS, USER, Lab, newest_step, no_traceback
from faults.volume import Volume, volume

from wake2vec.rundir import RunDir

_WHEN = ("in training", "in the report", "at any moment")
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
    if done.code == DONE:
        return "went on, with a save missed" if said else "went on"
    return "ended with a message at its end, resumed" if begun else "refused at its start, begun again"


def hanging_volume(lab: Lab, count: int) -> str:
    """Let every write hang for seconds, again and again: the steps go on, the saves are skipped and counted."""
    said = []
    for kind in ("ext4", "xfs"):
        with volume(lab.fresh(), kind) as on:
            said += [_frozen_run(lab, on, random.Random(f"{lab.seed} {kind} {index}")) for index in range(count // 2)]
    return f"{count} runs: {'; '.join(said)}"


def _frozen_run(lab: Lab, on: Volume, rng: random.Random) -> str:
    runs = on.path / f"slow-{rng.random()}"
    pause_s = 0.2
    slow = [(hooks.slow_steps, (pause_s,)), (hooks.frequent_beats, ())]
    started = lab.train(runs, "--set", "run.snapshot_every=0", prepare=slow)
    started.wait_for("step 4: train")
    before, threads = _step(started.err()), started.threads()
    frozen_s = rng.uniform(2.5, 3.5)
    with on.frozen():
        time.sleep(frozen_s)
        during, threads_after = _step(started.err()), started.threads()
    steps = during - before
    assert steps >= 0.5 * frozen_s / (pause_s + 0.1), f"{steps} steps in {frozen_s:.1f} s\n{started.err()}"
    assert threads_after <= threads + 1, f"{threads} threads, then {threads_after}"
    done = started.wait()
    assert done.code == DONE, done
    skipped = re.search(r"(\d+) saves came due while one was being written: skipped", done.err)
    assert skipped is not None, done
    lab.check_end(RunDir(runs / "tiny"))
    return f"{steps} steps in {frozen_s:.1f} s of hanging, {skipped[1]} saves skipped"


def _step(said: str) -> int:
    return int((_STEP.findall(said) or ["0"])[-1])
