"""Promise: a power cut cannot fake a complete file, nor lose an acknowledged save."""

import itertools
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from faults import hooks
from faults.lab import DONE, KILL, USER, Lab, newest_step
from faults.volume import Volume, volume

from wake2vec import sentry
from wake2vec.rundir import RunDir

KINDS = ("ext4", "xfs")
_CONTROLS = 20
_LEAST_CONTROL = 0.8


class Cut(NamedTuple):
    """What a power cut left."""

    acknowledged: int
    """The newest step that was acknowledged before the cut; -1 for none."""
    late: int
    """The same, counting what was acknowledged while the cut was being made."""
    newest: int
    """The newest whole sentry after it."""
    torn: int
    """Files under a final name that are not whole."""


def power_cuts(lab: Lab, count: int) -> str:
    """Cut the power under the real command, see it go on, and compare its end."""

    def cut_runs(kind: str) -> list[int]:
        with volume(lab.fresh(), kind) as on:
            return [_cut_run(lab, on, random.Random(f"{lab.seed} {kind} {index}")) for index in range(count // 2)]

    losses = [*itertools.chain.from_iterable(lab.each(len(KINDS), lambda index, _: cut_runs(KINDS[index])))]
    return f"{len(losses)} runs cut off and resumed, {sum(losses)} saves before the cuts, none lost"


def _cut_run(lab: Lab, on: Volume, rng: random.Random) -> int:
    runs = on.path / f"runs {rng.random()}"
    acks = lab.fresh() / "acks"
    started = lab.train(runs, prepare=[(hooks.acknowledge, (acks,))])
    time.sleep(rng.uniform(lab.seconds / 8, lab.seconds))
    acknowledged = _last(acks)
    on.cut()
    started.send(KILL)
    done = started.wait()
    assert done.code in (-KILL, DONE, USER), done
    on.reboot()
    run = RunDir(runs / "tiny")
    newest = newest_step(run)
    assert newest >= acknowledged, f"step {acknowledged} was acknowledged, after the cut {newest} is the newest"
    said = lab.train_to_end(runs).err
    assert "put aside" not in said, said
    shutil.rmtree(runs)  # hundreds do not fit on the volume
    return acknowledged + 1


def _last(acks: Path) -> int:
    return int(acks.read_text().split()[-1]) if acks.exists() and acks.read_text() else -1


def storms(lab: Lab, count: int) -> str:
    """Cut the power under back-to-back saves, the worst case; and under the same without fsync, as a control."""
    return "; ".join(lab.each(len(KINDS), lambda index, _: _storms_on(lab, KINDS[index], count // 2)))


def _storms_on(lab: Lab, kind: str, count: int) -> str:
    with volume(lab.fresh(), kind) as on:
        cuts = [_cut_storm(lab, on, random.Random(f"{lab.seed} {kind} {index}")) for index in range(count)]
        control = [_cut_storm(lab, on, random.Random(index), hooks.without_fsync) for index in range(_CONTROLS)]
    bad = [cut for cut in cuts if cut.torn or cut.newest < cut.acknowledged]
    assert not bad, f"{kind}: {len(bad)} of {len(cuts)} power cuts lost something: {bad}"
    blind = sum(not cut.torn and cut.newest >= cut.acknowledged for cut in control)
    assert blind <= (1 - _LEAST_CONTROL) * len(control), f"{kind}: the harness is blind: {control}"
    late = sum(cut.newest < cut.late for cut in cuts)
    return f"{kind}: 0 of {len(cuts)} ({late} at the cut itself; control {len(control) - blind}/{len(control)})"


def _cut_storm(lab: Lab, on: Volume, rng: random.Random, prepare: Callable[[], None] | None = None) -> Cut:
    run, acks = RunDir(on.path / f"run-{rng.random()}"), lab.fresh() / "acks"
    storm = lab.fork(hooks.storm, run.path, acks, prepare)
    while _last(acks) < 0 and storm.running:
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.1))
    acknowledged = _last(acks)
    on.cut()
    storm.send(KILL)
    storm.wait()
    on.reboot()
    torn, newest = 0, -1
    for path in run.sentries.glob("sentry_step_*.safetensors"):
        try:
            newest = max(newest, sentry.read(path).step)
        except sentry.DamagedError:
            torn += 1
    shutil.rmtree(run.path, ignore_errors=True)
    return Cut(acknowledged, _last(acks), newest, torn)
