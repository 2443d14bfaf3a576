"""Promise: a damaged newest file is named and skipped, never loaded."""

import json
import random
import shutil
from pathlib import Path

from ends import numbers
from faults import hooks
from faults.lab import DONE, KILL, STEPS, USER, Lab, as_json, newest_step, no_traceback

from wake2vec import sentry
from wake2vec.rundir import RunDir

_AT = STEPS - 4
"""The step after which the run that is damaged was killed: a resume is short."""


def damage(lab: Lab, count: int) -> str:
    """Damage one file of a killed run and resume it: it ends like the reference, or is refused by the file's name."""
    runs = lab.fresh()
    done = lab.train(runs, prepare=[(hooks.kill_after_step, (_AT,))]).wait()
    assert done.code == -KILL, done
    kinds = sorted(path.relative_to(runs) for path in runs.rglob("*") if path.is_file())
    outcomes = lab.each(count, lambda index, rng: _damaged_run(lab, runs, kinds[index % len(kinds)], rng))
    told = {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))}
    return f"{count} files damaged, of {len(kinds)}; {told}"


def _damaged_run(lab: Lab, runs: Path, victim: Path, rng: random.Random) -> str:
    copy = lab.fresh() / "runs"
    shutil.copytree(runs, copy)
    run = RunDir(copy / "tiny")
    before = newest_step(run)
    how = rng.choice(sorted(_HOW))
    path = copy / victim
    content = path.read_bytes()
    damaged = _HOW[how](content, rng)
    path.write_bytes(damaged)
    done = lab.train(copy).wait()
    no_traceback(done)
    where = f"{how} of {victim}: {done}"
    if damaged == content:
        lab.check_end(run)
        return "unchanged"
    if done.code == USER:
        assert path.name in done.err, where
        assert path.name == "run.json", f"only the record itself stops a run; {where}"
        path.write_bytes(content)
        lab.train_to_end(copy)
        return "run.json refused, put back, resumed"
    assert done.code == DONE, where
    if path.parent.name == "sentries":
        assert f"{path.name} is damaged" in done.err or path != run.sentry(before), where
        lab.check_end(run)
        return "sentry named and skipped" if "is damaged" in done.err else "older sentry, never read"
    if path.name == "run.json":
        taken, true = as_json(path), json.loads(content)
        apart = [key for key in true if key != "sha256" and taken.get(key) != true[key]]
        assert not apart, f"went on with another {apart}; {where}"
    if path.name == "metrics.jsonl":
        return _check_metrics(lab, run, done.err)
    lab.check_end(run)
    return f"{path.name} made anew"


def _check_metrics(lab: Lab, run: RunDir, said: str) -> str:
    """A run whose numbers were damaged has the reference's but for lines that are missing; its rows are the same."""
    ours, theirs = numbers(run), numbers(lab.reference)
    known = [{key: value for key, value in record.items() if "/" in key or key == "step"} for record in ours]
    assert all(record in theirs for record in known), f"a wrong number was taken over: {ours}"
    missing = len(theirs) - len(ours)
    assert not missing or "metrics.jsonl is damaged" in said or as_json(run.heartbeat), said
    rows, wanted = (sentry.read(of.sentry(STEPS)).tensors for of in (run, lab.reference))
    assert all(bool((rows[name] == tensor).all()) for name, tensor in wanted.items())
    return "metrics lines left out" if missing else "metrics unharmed"


def _flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 8])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _truncate(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def _zero(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content))
    size = min(len(content) - start, rng.choice([1, 16, 4096]))
    return content[:start] + bytes(size) + content[start + size :]


def _replace(content: bytes, rng: random.Random) -> bytes:
    """Put another file's content in its place, or noise of the same length."""
    return rng.choice(
        [b"", b"{}", b"null\n", b"[" * 10**5, rng.randbytes(len(content)), b'{"step": 1, "crc32": "00000000"}\n' * 3]
    )


def _double(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content))
    return content[:start] + content[start : start + 512] * 2 + content[start + 512 :]


_HOW = {"flip": _flip, "truncate": _truncate, "zero": _zero, "replace": _replace, "double": _double}
