"""Promise: a power cut loses nothing. A model of it: every prefix of a save's system calls, in every allowed order.

strace records what the real command does to its files. The model is stricter than ext4 and xfs: what was not made
durable by an fsync, of the file or of the folder that holds its name, is on the disk or not, each part for itself.
"""

import itertools
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from faults import hooks
from faults.lab import DONE, KILL, Lab
from faults.volume import need

from wake2vec import sentry
from wake2vec.metrics import read_records
from wake2vec.rundir import RunDir

_CALLS = "openat,open,write,pwrite64,ftruncate,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat"
_LINE = re.compile(r"^(?:\d+ +)?(\w+)\((.*)\) += (-?\d+)")
_FD = re.compile(r"^\d+<([^>]*)>")
_MOST_STATES = 64
"""Orders tried at a point where more are possible; all of them where there are fewer."""


@dataclass(frozen=True)
class Change:
    """One step towards a state of the disk: of a file's content, or of a name in a folder."""

    kind: str  # create, write, truncate, rename, unlink, mkdir, fsync, acknowledged
    path: str
    data: bytes = b""
    target: str = ""


@dataclass
class Disk:
    """Files by number, and names; folders are the names that end in a slash."""

    content: dict[int, bytes] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)

    def digest(self) -> int:
        """Return a number that is the same for the same names and contents."""
        return hash(frozenset((name, self.content.get(number)) for name, number in self.names.items()))


def model_check(lab: Lab, count: int) -> str:
    """Record short runs, killed at every fsync of their start and resumed, and check every state of every prefix."""
    need("strace")
    states = longest = 0
    kills = [None, *range(1, count + 1)]
    for kill_at in kills:
        changes = _record(lab, kill_at)
        longest = max(longest, len(changes))
        states += _check(lab, changes)
    return f"{len(kills)} recorded runs of up to {longest} calls; {states} states of the disk, each loads"


def _record(lab: Lab, kill_at: int | None) -> list[Change]:
    """Return what a run of three steps does, after one that was killed as it entered its nth fsync."""
    folder = lab.fresh()
    runs, acks = folder / "runs", folder / "acks"
    changes: list[Change] = []
    for fault in [kill_at, None] if kill_at else [None]:
        trace = folder / f"trace-{fault}"
        traced = lab.train(
            runs,
            *("--set", "train.max_steps=3", "--set", "train.warmup_steps=1"),
            *("--set", "run.keep_last=1", "--set", "run.eval_every=2"),
            prepare=[(hooks.acknowledge, (acks,)), (hooks.wait_for_tracer, ())],
        )
        inject = ["-e", f"inject=fsync:signal=KILL:when={fault}"] if fault else []
        strace = ["strace", "-q", "-f", "-y", "-xx", "-s", str(10**8), "-e", f"trace={_CALLS}", *inject]
        tracer = subprocess.Popen([*strace, "-o", str(trace), "-p", str(traced.process.pid)])
        done = traced.wait()
        assert tracer.wait(60) in (0, 1, -KILL, 128 + KILL)
        assert done.code in ((-KILL, DONE) if fault else (DONE,)), done
        changes += _parse(trace.read_text(), str(runs), str(acks))
    return changes


def _parse(trace: str, runs: str, acks: str) -> list[Change]:
    parent, reports = str(Path(runs).parent), f"{runs}/tiny/report"  # a report is never read again
    changes = []
    for line in _joined(trace):
        match = _LINE.match(line)
        if match is None or int(match[3]) < 0:
            continue
        call, arguments = match[1], match[2]
        strings = [bytes.fromhex(text.replace("\\x", "")) for text in re.findall(r'"((?:\\x[0-9a-f]{2})*)"', arguments)]
        on = _FD.match(arguments)
        path = _plain(on[1]) if on else ""
        names = [string.decode("utf-8", "replace") for string in strings]
        change = _change(call, arguments, path, names, strings)
        if path == acks and call == "write":
            changes.append(Change("acknowledged", strings[0].decode().strip()))
        elif change is None or change.path.startswith(reports):
            continue
        elif change.path.startswith(runs) or change.path == parent:
            changes.append(change)
    return changes


def _change(call: str, arguments: str, path: str, names: list[str], strings: list[bytes]) -> Change | None:
    if call == "openat" and "O_CREAT" in arguments:
        return Change("create" if "O_TRUNC" in arguments else "touch", names[0])
    if call == "write":
        return Change("write", path, strings[0] if strings else b"")
    if call == "ftruncate":
        return Change("truncate", path)
    if call in ("fsync", "fdatasync"):
        return Change("fsync", path)
    if call.startswith("rename"):
        return Change("rename", names[0], target=names[1])
    if call.startswith("unlink"):
        return Change("unlink", names[0])
    if call.startswith("mkdir"):
        return Change("mkdir", names[0])
    return None


def _plain(path: str) -> str:
    """Return a path that strace wrote in hexadecimal."""
    return bytes.fromhex(path.replace("\\x", "")).decode() if path.startswith("\\x") else path


def _joined(trace: str) -> Iterator[str]:
    """Yield whole calls: one that another thread interrupted stands in two lines."""
    unfinished: dict[str, str] = {}
    for line in trace.splitlines():
        thread = line.split(" ", 1)[0]
        if line.endswith("<unfinished ...>"):
            unfinished[thread] = line.removesuffix("<unfinished ...>")
        elif "resumed>" in line:
            yield unfinished.pop(thread, "") + line.split("resumed>", 1)[1]
        else:
            yield line


def _check(lab: Lab, changes: list[Change]) -> int:
    """Check the states that a cut after every call can leave; return how many there were."""
    rng = random.Random(f"{lab.seed} model")
    seen: set[tuple[int, ...]] = set()
    whole: set[tuple[int, int]] = set()
    acknowledged = -1
    durable: set[int] = set()
    checked = 0
    folder = lab.fresh()
    for end, change in enumerate(changes):
        if change.kind == "acknowledged":
            acknowledged = int(change.path)
        elif change.kind == "fsync":
            durable |= _made_durable(changes, end)
        pending = [i for i in range(end + 1) if i not in durable and _matters(changes[i])]
        for kept in _subsets(pending, rng):
            state = tuple(sorted(durable | set(kept)))
            if (acknowledged, *state) in seen:
                continue
            seen.add((acknowledged, *state))
            checked += 1
            made = [changes[i] for i in state]
            disk = _apply(made)
            if (acknowledged, disk.digest()) not in whole:  # other calls lead to the same
                _verify(folder, disk, acknowledged, made)
                whole.add((acknowledged, disk.digest()))
    assert acknowledged >= 3, "the run acknowledged nothing"
    return checked


def _matters(change: Change) -> bool:
    """Leave out what is never read again, and what changes nothing."""
    name = Path(change.target or change.path).name
    return change.kind not in ("fsync", "acknowledged") and not re.search(r"heartbeat|loss_table|^lock$", name)


def _made_durable(changes: list[Change], end: int) -> set[int]:
    """Return what an fsync makes durable: a file's content, or the names in a folder."""
    path = changes[end].path
    names = {path}
    done = set()
    for i in range(end - 1, -1, -1):
        change = changes[i]
        if change.kind == "rename" and change.target in names:
            names.add(change.path)
        if change.kind in ("write", "truncate") and change.path in names:
            done.add(i)
        if change.kind in ("create", "touch", "rename", "unlink", "mkdir") and str(Path(change.path).parent) == path:
            done.add(i)
    return done


def _subsets(pending: list[int], rng: random.Random) -> Iterator[tuple[int, ...]]:
    if 2 ** len(pending) <= _MOST_STATES:
        for size in range(len(pending) + 1):
            yield from itertools.combinations(pending, size)
        return
    yield ()
    yield tuple(pending)
    for one in pending:
        yield (one,)
        yield tuple(i for i in pending if i != one)
    for _ in range(_MOST_STATES // 2):
        yield tuple(i for i in pending if rng.random() < 0.5)


def _verify(folder: Path, disk: Disk, acknowledged: int, changes: list[Change]) -> None:
    """Write a state of the disk and load it as a resume does."""
    told = [f"{change.kind} {Path(change.path).name} {Path(change.target).name}" for change in changes][-12:]
    for name, number in disk.names.items():
        if number >= 0:
            path = folder / Path(name).relative_to("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(disk.content[number])
    _load(folder, acknowledged, told)
    shutil.rmtree(folder, ignore_errors=True)


def _load(folder: Path, acknowledged: int, told: list[str]) -> None:
    runs = [path.parent for path in folder.rglob("run.json")]
    assert runs or acknowledged < 0, f"step {acknowledged} was acknowledged, the run is gone; {told}"
    for path in runs:
        run = RunDir(path)
        steps = []
        for file, header, reason in sentry.listing(run):
            assert header is not None, f"{file.name} has its name and is not whole: {reason}; {told}"
            steps.append(sentry.read(file).step)
        newest = max(steps, default=-1)
        assert newest >= acknowledged, f"step {acknowledged} was acknowledged, {newest} is the newest; {told}"
        for file in run.reference.glob("[!.]*"):
            sentry.verify(file)
        lines = {record["step"] for record in read_records(run.metrics)}
        missing = {step for step in (0, 2) if step <= newest} - lines
        assert not missing, f"the sentry of step {newest} outlived the numbers of {missing}; {told}"


def _apply(changes: list[Change]) -> Disk:
    disk = Disk()
    numbers = itertools.count()
    files: dict[str, int] = {}
    for change in changes:
        path = change.path
        if change.kind in ("create", "touch"):
            if path not in disk.names:
                disk.names[path] = files[path] = next(numbers)
                disk.content[disk.names[path]] = b""
            elif change.kind == "create":
                disk.content[disk.names[path]] = b""
        elif change.kind == "write":
            number = disk.names.get(path)
            if number is not None:
                disk.content[number] += change.data
        elif change.kind == "truncate" and path in disk.names:
            disk.content[disk.names[path]] = b""
        elif change.kind == "rename" and path in disk.names:
            disk.names[change.target] = disk.names.pop(path)
        elif change.kind == "unlink":
            disk.names.pop(path, None)
        elif change.kind == "mkdir":
            disk.names[path] = -1
    return _reachable(disk)


def _reachable(disk: Disk) -> Disk:
    """Drop what lies in a folder that is not there."""
    roots = {name for name, number in disk.names.items() if number < 0}
    every = {str(parent) for name in disk.names for parent in Path(name).parents}
    top = min((root for root in roots | every if "runs" in Path(root).name), key=len, default="")
    kept = {
        name: number
        for name, number in disk.names.items()
        if all(str(p) in roots for p in Path(name).parents if len(str(p)) >= len(top) and str(p).startswith(top))
    }
    return Disk(disk.content, kept)
