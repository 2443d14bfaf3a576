"""Promises beside the table: imports of the earlier format, pruning, retention, and no growth over many steps."""

import os
import random
import time
from pathlib import Path

import torch
from faults import hooks
from faults.lab import DONE, STEPS, Lab, as_json, newest_step, refused, trained

from wake2vec import sentry
from wake2vec.rundir import RunDir

_KIB = 1024


def prune(lab: Lab, count: int) -> str:
    """Damage all but one sentry of a run and prune it: the last good one stays, whichever it is."""
    runs = lab.fresh()
    done = lab.train(runs, "--set", "run.keep_last=6").wait()
    assert done.code == DONE, done
    lab.each(count, lambda _, rng: _pruned(lab, runs, rng))
    return f"{count} runs damaged and pruned"


def _pruned(lab: Lab, runs: Path, rng: random.Random) -> None:
    copy = lab.copy(runs)
    run = RunDir(copy / "tiny")
    files = sorted(run.sentries.iterdir())
    good = rng.choice(files)
    for file in files:
        if file != good:
            content = bytearray(file.read_bytes())
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            file.write_bytes(content)
    done = lab.run("sentries", "tiny", "--runs", copy, "--prune")
    assert done.code == DONE, done
    assert good.exists(), done
    sentry.read(good)
    good.unlink()
    refused(lab.run("sentries", "tiny", "--runs", copy, "--prune"), "has no whole sentry; nothing is removed")


def retention(lab: Lab, count: int) -> str:
    """Look at a run of so many steps all the time: its sentries stay under the bound that the README computes."""
    keep_last, keep_every = 3, 500
    sets = (f"train.max_steps={count}", f"run.keep_every={keep_every}", f"run.keep_last={keep_last}")
    runs = lab.fresh()
    run = RunDir(runs / "tiny")
    more = [word for pair in (*sets, "train.batch_size=1", "run.eval_every=100") for word in ("--set", pair)]
    started = lab.train(runs, *more)
    most = looks = 0
    while started.running:
        most, looks = max(most, _size(run.sentries)), looks + 1
        time.sleep(0.01)
    done = started.wait()
    assert done.code == DONE, done
    one = run.sentry(count).stat().st_size
    files = keep_last + count // keep_every + 1 + 1 + 2  # the first, the best; one being written, one not yet removed
    assert most <= files * (one + 256), f"{most} bytes, {files} sentries of {one} bytes are the bound"
    return f"{count} steps: at most {most / one:.1f} sentries in {looks} looks, the bound is {files}"


def _size(folder: Path) -> int:
    size = 0
    for path in folder.glob("*"):
        try:
            size += path.stat().st_size
        except FileNotFoundError:  # just removed
            continue
    return size


def soak(lab: Lab, count: int) -> str:
    """Run so many steps; memory, open files and threads after the warm-up do not grow."""
    runs = lab.fresh()
    sets = (f"train.max_steps={count}", "train.batch_size=1", "run.sentry_every=20", "run.log_every=20")
    more = [word for pair in (*sets, "run.eval_every=500") for word in ("--set", pair)]
    started = lab.train(runs, *more)
    samples: list[tuple[int, int, int]] = []
    while started.running and not trained(started):
        if (sample := _held(started.process.pid)) is not None:
            samples.append(sample)
        time.sleep(0.2)
    done = started.wait()
    assert done.code == DONE, done
    assert newest_step(RunDir(runs / "tiny")) == count
    warm = samples[len(samples) // 3 :]
    assert len(warm) >= 6, "too short to tell"
    third = len(warm) // 3
    (memory, files, threads), (memory_late, files_late, threads_late) = (
        [max(values) for values in zip(*part, strict=True)] for part in (warm[:third], warm[-third:])
    )
    grown = f"{memory} to {memory_late} KiB, {files} to {files_late} files, {threads} to {threads_late} threads"
    assert memory_late <= memory + 4 * _KIB, grown
    assert files_late <= files + 1, grown
    assert threads_late <= threads + 1, grown
    return f"{count} steps: {grown}"


def _held(pid: int | None) -> tuple[int, int, int] | None:
    """Return a process's memory in KiB, open files and threads."""
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return int(status["VmRSS"].split()[0]), len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"])
    except (OSError, KeyError):
        return None


def imports(lab: Lab, count: int) -> str:
    """Import files of the earlier scripts: rows land on the right words, of another lexicon they are refused."""
    for index in range(count):
        _imported(lab, random.Random(f"{lab.seed} import {index}"))
    return f"{count} files imported, and refused where the lexicon differs"


def _imported(lab: Lab, rng: random.Random) -> None:
    """The earlier scripts began at the base matrix's end, so that the words in its padding gap have no rows."""
    runs = lab.fresh()
    assert lab.train(runs, "--set", "run.keep_every=100", "--set", "train.max_steps=5").wait().code == DONE
    run = RunDir(runs / "tiny")
    start = sentry.read(run.sentry(0)).tensors["rows/input"]
    gap = rng.randrange(1, len(start))
    rows = torch.randn(len(start) - gap, start.shape[1]).half()
    base = as_json(run.identity)["identity"]["base_vocab_size"]
    payload = {"embeddings": rows, "best_metric": None, "epoch": 0.5, "num_wake": len(rows)}
    new = lab.fresh()
    recipe = ["--set", "run.keep_every=100", "--run", "new"]
    stopped = lab.train(new, *recipe, prepare=[(hooks.kill_after_step, (0,))]).wait()
    assert stopped.code != DONE, stopped
    target = RunDir(new / "new")
    for path in target.sentries.iterdir():
        if path != target.sentry(0):
            path.unlink()
    file = new / "sentry_step_0020.pt"
    torch.save({**payload, "step": 20, "wake_start": base + gap + 1}, file)
    refused(lab.run("sentries", "new", "--runs", new, "--import", file), "another lexicon or another base")
    assert not target.sentry(20).exists()
    torch.save({**payload, "step": 20, "wake_start": base + gap}, file)
    done = lab.run("sentries", "new", "--runs", new, "--import", file)
    assert done.code == DONE, done
    imported = sentry.read(target.sentry(20)).tensors["rows/input"]
    assert torch.equal(imported[gap:], rows.float()), "rows on other words"
    assert torch.equal(imported[:gap], start[:gap]), "fresh rows are not the run's first"
    done = lab.train(new, *recipe).wait()
    assert done.code == DONE, done
    assert "continuing after step 20" in done.err, done
    assert newest_step(target) == STEPS
