"""Promise: a kill at any instant loses at most the steps since the last save, and the end is bit-identical."""

import random
import time

from faults.lab import DONE, KILL, Lab, newest_step

from wake2vec.metrics import read_records
from wake2vec.rundir import RunDir


def kills(lab: Lab, count: int) -> str:
    """Kill whole runs again and again, at random instants from the fork to the end; every other resume too."""
    per_run = 5
    results = lab.each(-(-count // per_run), lambda _, rng: _killed_run(lab, rng, per_run))
    struck = sum(kills for kills, _ in results)
    lost = max(lost for _, lost in results)
    return f"{struck} kills in {len(results)} runs; at most {lost} steps done again"


def _killed_run(lab: Lab, rng: random.Random, num_kills: int) -> tuple[int, int]:
    """Kill a run so many times, then let it end; return the kills and the most logged steps that one of them cost."""
    runs = lab.fresh()
    run = RunDir(runs / "tiny")
    struck = lost = 0
    while struck < num_kills:
        before = newest_step(run)
        started = lab.train(runs)
        # half of the kills anywhere, half while it is starting or resuming
        time.sleep(rng.uniform(0, lab.seconds if rng.random() < 0.5 else lab.seconds / 4))
        started.send(KILL)
        done = started.wait()
        assert done.code in (-KILL, DONE), done
        if done.code == DONE:  # it was faster: another run
            lab.check_end(run)
            runs = lab.fresh()
            run = RunDir(runs / "tiny")
            continue
        after = newest_step(run)
        assert after >= before, f"step {before} was saved, after a kill {after} is the newest"
        struck += 1
        reached = max((record["step"] for record in read_records(run.metrics)), default=0)
        lost = max(lost, reached - max(after, 0))
    lab.train_to_end(runs)
    return struck, lost
