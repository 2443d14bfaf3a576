"""Faults that are prepared inside the child, before the command starts, and what lets the harness look on."""

import ctypes
import itertools
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from wake2vec import base, cli, resume, rundir, sentry, sentry_writer, train


def acknowledge(file: Path) -> None:
    """Append the step of every save that the trainer takes for durable to a file, on another volume."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    plain = sentry_writer.SentryWriter._write

    def write(writer: sentry_writer.SentryWriter, header: dict[str, object], snapshot: bool) -> None:
        plain(writer, header, snapshot)
        if writer.saved_step == header["step"]:
            os.write(descriptor, f"{header['step']}\n".encode())

    sentry_writer.SentryWriter._write = write  # type: ignore[method-assign]


def without_fsync() -> None:
    """Make nothing durable: the control that shows that a power cut is one."""
    rundir.os.fsync = lambda _descriptor: None  # type: ignore[attr-defined]


def storm(folder: Path, acks: Path, prepare: Callable[[], None] | None) -> None:
    """Save back to back until killed, through the trainer's own writer, and put every acknowledged step on record."""
    if prepare is not None:
        prepare()
    acknowledge(acks)
    run = rundir.RunDir(folder)
    writer = sentry_writer.SentryWriter(run, keep_last=3, keep_every=0, before=lambda: None, say=lambda _: None)
    for step in itertools.count():
        tensors = {"rows/input": torch.full((64, 512), float(step)), "optimizer/input": torch.full((64,), float(step))}
        header = {"format": sentry.FORMAT, "step": step, "identity": "storm", "best_step": None}
        writer.save(tensors, header)
        writer.wait()


def kill_after_step(step: int) -> None:
    """Die like a killed process once a step is saved."""
    plain = sentry_writer.SentryWriter._write

    def write(writer: sentry_writer.SentryWriter, header: dict[str, object], snapshot: bool) -> None:
        plain(writer, header, snapshot)
        if int(str(header["step"])) >= step:
            os.kill(os.getpid(), signal.SIGKILL)

    sentry_writer.SentryWriter._write = write  # type: ignore[method-assign]


def slow_steps(seconds: float) -> None:
    """Make every step last longer."""
    plain = train._gradient

    def gradient(training: Any, step: int) -> train.Gradient:
        time.sleep(seconds)
        return plain(training, step)

    train._gradient = gradient


def seldom_saves() -> None:
    """Let no save be due, as between two that are far apart: what a stop loses is not there by chance."""
    train._save_due = lambda *_: False


def frequent_beats() -> None:
    """Let a heartbeat be due after every step."""
    train._HEARTBEAT_GAP_S = 0.0


_PHASES = {
    "base.load": (base, "load"),
    "evaluate": (train, "evaluate"),
    "sentry.write": (sentry_writer.sentry, "write"),
    "_show_result": (cli, "_show_result"),
    "make_optimizer": (resume, "make_optimizer"),
}


def pause_in(name: str, seconds: float) -> None:
    """Make the first call of a function last, and say that it has been reached."""
    owner, attribute = _PHASES[name]
    plain = getattr(owner, attribute)
    paused = iter([True])

    def pausing(*arguments: Any, **options: Any) -> Any:
        if next(paused, False):
            os.write(2, f"in {name}\n".encode())
            time.sleep(seconds)
        return plain(*arguments, **options)

    setattr(owner, attribute, pausing)


def long_step(step: int, seconds: float) -> None:
    """Make one step compute for so long, in many operations as a real one has."""
    plain = train._gradient

    def gradient(training: Any, at: int) -> train.Gradient:
        ends = time.monotonic() + (seconds if at == step else 0)
        if at == step:
            os.write(2, f"in step {step}\n".encode())
        while time.monotonic() < ends:
            torch.randn(64, 64) @ torch.randn(64, 64)
        return plain(training, at)

    train._gradient = gradient


def poison_rows(step: int) -> None:
    """Put NaN into the rows before a step."""
    plain = train._gradient

    def gradient(training: Any, at: int) -> train.Gradient:
        if at == step:
            with torch.no_grad():
                training.model.rows["input"].fill_(float("nan"))
        return plain(training, at)

    train._gradient = gradient


def at_step(step: int, act: Callable[[], None]) -> None:
    """Do something before a step's gradient; before everything where the step is negative."""
    if step < 0:
        act()
        return
    plain = train._gradient

    def gradient(training: Any, at: int) -> train.Gradient:
        if at == step:
            act()
        return plain(training, at)

    train._gradient = gradient


def limit_memory(more_bytes: int, step: int) -> None:
    """Let the address space grow by no more than this, from a step on."""

    def limit() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more_bytes,) * 2)

    at_step(step, limit)


def allocate_too_much(step: int) -> None:
    """Ask for an object that no memory is left for, at a step."""

    def allocate() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limits = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 100 * 2**20, limits[1]))
        try:
            bytearray(400 * 2**20)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)

    at_step(step, allocate)


def fill_gpu(name: str, error: Exception) -> None:
    """Let a function fail as it does where other programs hold the GPU's memory."""

    def fail(*_arguments: Any, **_options: Any) -> None:
        raise error

    setattr(*_PHASES[name], fail)


def no_more_threads(step: int) -> None:
    """Let no further thread start, from a step on: as another user, whose limit of processes is reached."""

    def limit() -> None:
        threading.Thread.start = _cannot_start  # type: ignore[method-assign]

    at_step(step, limit)


def _cannot_start(_thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def enter_group(group: Path, step: int) -> None:
    """Enter a control group at a step, and use more memory than before."""

    def enter() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))
        held.append(bytearray(200 * 2**20))

    held: list[bytearray] = []
    at_step(step, enter)


def jumping_clock() -> None:
    """Let the clock jump by years at every look; what measures time spans is monotonic and does not."""
    plain, jumps = time.time, itertools.cycle([3e8, -6e8, 0.0, 1e9])
    time.time = lambda: plain() + next(jumps)


def stop_soon(seconds: float) -> None:
    """Send this process SIGTERM after a while."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()


def without_capabilities() -> None:
    """Let root be a user like any other, to whom permissions apply."""
    version, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None, use_errno=True).capset(version, none) == 0, os.strerror(ctypes.get_errno())


def limit_files(size_bytes: int) -> None:
    """Let no file grow beyond a size."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, size_bytes))


def wait_for_tracer() -> None:
    """Go on once strace is attached."""
    while "TracerPid:\t0" in Path("/proc/self/status").read_text():
        time.sleep(0.01)
    time.sleep(0.1)
