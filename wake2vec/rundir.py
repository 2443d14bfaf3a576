"""A run's folder: where its files lie, and who holds it; files and folders that are complete or absent."""

import contextlib
import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from wake2vec.errors import WakeError


class RunDir:
    """Names the files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self.identity = path / "run.json"
        self.sentries = path / "sentries"
        self.snapshots = path / "snapshots"
        self.reference = path / "reference"
        self.report = path / "report"
        self.export = path / "export"
        self.heartbeat = path / "heartbeat.json"
        self.metrics = path / "metrics.jsonl"
        self.loss_table = path / "loss_table.md"
        self.lock = path / "lock"

    def sentry(self, step: int) -> Path:
        """Return the path of the sentry of a step."""
        return self.sentries / f"sentry_step_{step:06d}.safetensors"

    def snapshot(self, step: int) -> Path:
        """Return the path of the snapshot of a step."""
        return self.snapshots / f"rows_step_{step:06d}.safetensors"


def find_run(runs: Path, name: str) -> RunDir:
    """Return a run that exists, by its name under `runs` or by its path."""
    for path in (runs / name, Path(name)):
        with contextlib.suppress(OSError):  # a name too long for a file
            if (path / "run.json").is_file():
                return RunDir(path)
    known = sorted(path.parent.name for path in runs.glob("*/run.json"))
    raise WakeError(f"run {name}: not in {runs}/; it holds {', '.join(known) or 'no runs'}; check the name or --runs")


def new_run(runs: Path, name: str) -> RunDir:
    """Return the folder of a run that need not exist yet."""
    if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
        raise WakeError(
            f"run name {name!r}: may hold letters, digits, '_', '-' and '.' only; choose another with --run"
        )
    return RunDir(runs / name)


@contextlib.contextmanager
def hold(run: RunDir) -> Iterator[None]:
    """Hold a run's folder, made if it is not there; a folder still without run.json at the end is removed again.

    Raises:
        WakeError: another process holds it (named), or the folder cannot be made.
    """
    try:
        lock = _acquire(run)
    except OSError as error:
        raise WakeError(f"run folder {run.path}: {error.strerror}; check the volume and its owner") from None
    try:
        _refuse_links(run)
        yield
    finally:
        if not run.identity.exists():
            run.lock.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                run.path.rmdir()
        os.close(lock)


def _refuse_links(run: RunDir) -> None:
    """Refuse a run of which a part lies elsewhere: saving there would write, and removing old sentries delete."""
    own = (run.identity, run.sentries, run.snapshots, run.heartbeat, run.metrics, run.loss_table)
    for path in own:
        if path.is_symlink():
            raise WakeError(f"{path}: a symbolic link to {os.readlink(path)}; put what it stands for in its place")


def _acquire(run: RunDir) -> int:
    while True:
        make_folder(run.path)
        try:
            lock = os.open(run.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except FileNotFoundError:
            continue  # another process has just given the folder up
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise WakeError(f"run {run.name}: held by {_holder(run.lock)}; wait for it or stop it") from None
        if _is_at(lock, run.lock):
            break
        os.close(lock)  # its holder has just removed it
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(UTC).isoformat("T", "seconds")}
    os.ftruncate(lock, 0)
    os.pwrite(lock, json.dumps(holder).encode(), 0)
    return lock


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _holder(lock: Path) -> str:
    try:
        holder = json.loads(lock.read_text("utf-8"))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def cache_folder() -> Path:
    """Return where wake2vec keeps what it can make again: WAKE2VEC_CACHE, or a folder of the user's."""
    return Path(os.environ.get("WAKE2VEC_CACHE") or Path.home() / ".cache" / "wake2vec")


def make_folder(path: Path) -> None:
    """Make a folder and its parents, each one durable: a power cut after a later fsync inside cannot lose it.

    One that is there may have been made by a process that was killed before it could make it durable.
    """
    if path.is_dir():
        with contextlib.suppress(PermissionError):  # a parent that may not be read is not of our making
            sync_folder(path.parent)
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def alone(folder: Path, wait: Callable[[], None] | None = None) -> Iterator[bool]:
    """Hold the lock beside a folder that is to be made; the kernel lets go of a killed process's.

    Args:
        wait: is called before another process that holds it is waited for; without `wait`, False is given at once.
    """
    with open(folder.with_name(f"{folder.name}.lock"), "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if wait is None:
                yield False
                return
            wait()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield True


@contextlib.contextmanager
def built(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """Build a folder that is complete or absent: beside its name, renamed and made durable at the end.

    Args:
        replace: remove what has the name before.
    """
    building = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)  # a killed process leaves one behind
    building.mkdir()
    try:
        yield building
        sync_folder(building)
        if replace and folder.exists():
            shutil.rmtree(folder)
        building.rename(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def write_file(path: Path, parts: Iterable[bytes | memoryview], *, durable: bool = True) -> None:
    """Write a file that is complete or absent: beside its name, then renamed; durable unless told otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb", opener=_open_plain) as file:
            for part in parts:
                file.write(part)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def _open_plain(path: str, flags: int) -> int:
    """Open a file, but not through a symbolic link that somebody has put there."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def write_json(path: Path, content: Any, *, durable: bool = True) -> None:
    """Write JSON for people and programs."""
    write_file(path, [json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"], durable=durable)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        WakeError: it is missing, damaged or cannot be read.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise WakeError(f"{path}: no such file; check the run's folder") from None
    except (ValueError, RecursionError) as error:
        raise WakeError(f"{path}: damaged ({error}); put back a copy of it") from None
    except OSError as error:
        raise WakeError(f"{path}: cannot be read ({error.strerror}); check the file") from None


def refuse_endless(path: Path, what: str) -> None:
    """Refuse to read a device, a pipe or a socket, which may never end."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):  # these never raise
        raise WakeError(f"{what} {path}: not a plain file; give the path of one")


def sweep(folder: Path) -> None:
    """Remove what a killed process left half written in a folder; the caller holds the run."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
