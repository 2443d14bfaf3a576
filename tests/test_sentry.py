"""A sentry is complete or absent, and a damaged one is never loaded."""

import errno
import json
import os
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from wake2vec import rundir, sentry, sentry_writer
from wake2vec.errors import WakeError
from wake2vec.rundir import RunDir
from wake2vec.sentry_writer import SentryWriter


def tensors(step: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "rows/input": torch.randn(6, 4, generator=generator),
        "optimizer/input/row": torch.randn(6, generator=generator),
        "rows/head": torch.randn(6, 4, generator=generator),
    }


def header(step: int, **more: Any) -> dict[str, Any]:
    return {"format": sentry.FORMAT, "step": step, "identity": "abc", "best_step": None, **more}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.sentries.mkdir(parents=True)
    return run


def save(run: RunDir, step: int, **more: Any) -> Path:
    sentry.write(run.sentry(step), tensors(step), header(step, **more))
    return run.sentry(step)


def test_what_is_written_is_read(run: RunDir) -> None:
    found = sentry.read(save(run, 20))
    assert found.step == 20
    assert found.header == header(20)
    assert found.tensors.keys() == tensors().keys()
    for name, tensor in tensors(20).items():
        assert torch.equal(found.tensors[name], tensor)
    assert [path.name for path in run.sentries.iterdir()] == ["sentry_step_000020.safetensors"]


def test_it_is_a_safetensors_file_for_everybody(run: RunDir) -> None:
    loaded = load_file(save(run, 3))
    assert loaded.keys() == tensors().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors(3).items())


def test_every_single_flipped_byte_is_noticed(run: RunDir) -> None:
    path = save(run, 1)
    content = path.read_bytes()
    rng = random.Random(0)
    for offset in range(len(content)):
        damaged = bytearray(content)
        damaged[offset] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(sentry.DamagedError):
            sentry.read(path)


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 100, 200, -1, -8])
def test_every_truncation_is_noticed(run: RunDir, kept: int) -> None:
    path = save(run, 1)
    content = path.read_bytes()
    path.write_bytes(content[:kept])
    with pytest.raises(sentry.DamagedError):
        sentry.read(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(sentry.DamagedError):
        sentry.read(path)


def test_nan_rows_are_refused(run: RunDir) -> None:
    poisoned = tensors()
    poisoned["rows/head"][2, 1] = float("nan")
    sentry.write(run.sentry(5), poisoned, header(5))
    with pytest.raises(sentry.DamagedError, match="rows/head holds NaN"):
        sentry.read(run.sentry(5))


def test_a_damaged_newest_is_named_put_aside_and_skipped(run: RunDir) -> None:
    save(run, 20)
    newest = save(run, 40)
    newest.write_bytes(newest.read_bytes()[:-3] + b"abc")
    said: list[str] = []
    found = sentry.newest(run, "abc", said.append)
    assert found is not None
    assert found.step == 20
    assert said == [
        "sentry_step_000040.safetensors is damaged: its content does not match its sha256; "
        "put aside as sentry_step_000040.safetensors.damaged"
    ]
    assert not newest.exists()
    assert newest.with_name(newest.name + ".damaged").exists()


def test_the_newest_is_by_header_not_by_name(run: RunDir) -> None:
    save(run, 40).rename(run.sentry(10))
    save(run, 20)
    found = sentry.newest(run, "abc", print)
    assert found is not None
    assert found.step == 40


def test_a_newest_with_a_damaged_header_is_named_too(run: RunDir) -> None:
    save(run, 20)
    unreadable, lowered = save(run, 40), save(run, 60)
    unreadable.write_bytes(b"x" + unreadable.read_bytes()[1:])
    assert b": 60" in lowered.read_bytes()
    lowered.write_bytes(lowered.read_bytes().replace(b": 60", b": 10", 1))
    said: list[str] = []
    found = sentry.newest(run, "abc", said.append)
    assert found is not None
    assert found.step == 20
    assert sorted(line.split()[0] for line in said) == [run.sentry(step).name for step in (40, 60)]


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_plain_file_is_never_opened(kind: str, run: RunDir) -> None:
    path = run.sentry(9)
    if kind == "link":
        path.symlink_to(save(run, 5))
    else:
        os.mkfifo(path) if kind == "pipe" else path.mkdir()
    with pytest.raises(sentry.DamagedError, match="no plain file"):
        sentry.read_header(path)


def test_nan_is_never_saved(run: RunDir) -> None:
    said: list[str] = []
    writer = make_writer(run, said)
    writer.save_now(tensors(), header(1))
    poisoned = tensors()
    poisoned["rows/head"][2, 1] = float("inf")
    with pytest.raises(WakeError, match=r"rows/head holds NaN or Inf.* step 1 is whole and kept"):
        writer.save_now(poisoned, header(2))
    assert [h["step"] for _, h, _ in sentry.listing(run) if h] == [1]


def test_another_runs_sentry_is_refused(run: RunDir) -> None:
    save(run, 20, identity="xyz")
    with pytest.raises(WakeError, match="belongs to another run"):
        sentry.newest(run, "abc", print)


def test_no_sentry_is_none(run: RunDir) -> None:
    assert sentry.newest(run, "abc", print) is None


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 8, b"\x08" + b"\0" * 7 + b"{}      ", json.dumps([1] * 99).encode()]
)
def test_something_else_under_the_name_is_damaged(run: RunDir, content: bytes) -> None:
    run.sentry(9).write_bytes(content)
    with pytest.raises(sentry.DamagedError):
        sentry.read_header(run.sentry(9))


def test_a_failed_write_leaves_nothing(run: RunDir) -> None:
    def parts() -> Any:
        yield b"half"
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        rundir.write_file(run.sentry(1), parts())
    assert list(run.sentries.iterdir()) == []


def test_size_is_the_rows_and_less_than_a_mebibyte(run: RunDir) -> None:
    rows = torch.zeros(4000, 64)
    state = {"rows/input": rows, "rows/head": rows.clone(), "optimizer/input/row": torch.zeros(4000)}
    sentry.write(run.sentry(1), state, header(1))
    assert 0 <= run.sentry(1).stat().st_size - 4 * 4000 * 64 * 2 < 2**20


def test_retire_keeps_recent_best_and_every(run: RunDir) -> None:
    for step in (0, 10, 20, 30, 40, 50, 60):
        save(run, step)
    gone = sentry.retire(run, keep_last=2, keep_every=30, best_step=10)
    assert sorted(path.name for path in gone) == ["sentry_step_000020.safetensors", "sentry_step_000040.safetensors"]
    assert sorted(h["step"] for _, h, _ in sentry.listing(run) if h) == [0, 10, 30, 50, 60]


# the writer beside the loop


def make_writer(run: RunDir, said: list[str]) -> SentryWriter:
    return SentryWriter(run, keep_last=3, keep_every=0, before=lambda: None, say=said.append)


def test_a_save_due_while_one_is_written_is_skipped_and_counted(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    plain = sentry.write

    def slow(*args: Any) -> None:
        assert gate.wait(10)
        plain(*args)

    monkeypatch.setattr(sentry_writer.sentry, "write", slow)
    writer = make_writer(run, [])
    assert writer.save(tensors(), header(1))
    assert not writer.save(tensors(), header(2))
    assert not writer.save(tensors(), header(3))
    gate.set()
    assert writer.wait() == 1
    assert writer.num_skipped == 2
    assert writer.save(tensors(), header(4))
    assert writer.wait() == 4
    assert [h["step"] for _, h, _ in sentry.listing(run) if h] == [4, 1]


def test_the_copy_is_of_the_moment_of_the_call(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    plain = sentry.write

    def slow(*args: Any) -> None:
        assert gate.wait(10)
        plain(*args)

    monkeypatch.setattr(sentry_writer.sentry, "write", slow)
    live = tensors(1)
    writer = make_writer(run, [])
    writer.save(live, header(1))
    for tensor in live.values():
        tensor.zero_()
    gate.set()
    writer.wait()
    for name, tensor in tensors(1).items():
        assert torch.equal(sentry.read(run.sentry(1)).tensors[name], tensor)


def test_saves_use_the_memory_reserved_before_the_first_step(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = make_writer(run, [])
    writer.reserve(tensors(1))
    monkeypatch.setattr(torch, "empty", None)  # whoever calls it now makes memory on the loop's time
    assert writer.save(tensors(1), header(1))
    assert writer.wait() == 1
    for name, tensor in tensors(1).items():
        assert torch.equal(sentry.read(run.sentry(1)).tensors[name], tensor)


def fail_writes(monkeypatch: pytest.MonkeyPatch, *errors: Exception) -> None:
    """Let the next writes of sentries fail, one with each error."""
    left, plain = list(errors), sentry.write

    def write(*args: Any) -> None:
        if left:
            raise left.pop(0)
        plain(*args)

    monkeypatch.setattr(sentry_writer.sentry, "write", write)


def test_a_full_disk_is_reported_and_the_next_save_tries_again(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    fail_writes(monkeypatch, full, full)
    said: list[str] = []
    writer = make_writer(run, said)
    writer.save(tensors(), header(1))
    assert writer.wait() is None
    assert said == [f"sentry of step 1: not saved (No space left on device); free space on {run.path}"]
    with pytest.raises(WakeError, match="not saved"):
        writer.save_now(tensors(), header(2))
    writer.save_now(tensors(), header(3))
    assert writer.saved_step == 3


@pytest.mark.parametrize("error", [MemoryError(), SystemError("NULL result without an error"), ValueError("no buffer")])
def test_whatever_a_save_fails_with_is_reported_and_the_next_one_tries_again(
    error: Exception, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_writes(monkeypatch, error)
    said: list[str] = []
    writer = make_writer(run, said)
    writer.save(tensors(), header(1))
    assert writer.wait() is None
    assert writer.last_save() == "no sentry is there yet"
    assert len(said) == 1
    assert said[0].startswith("sentry of step 1: not saved (")
    writer.save_now(tensors(), header(2))
    assert writer.last_save() == "the sentry of step 2 is whole and kept"


def test_a_save_that_reads_back_damaged_does_not_count(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = sentry.write

    def write(path: Path, *args: Any) -> None:
        plain(path, *args)
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    save(run, 1)
    monkeypatch.setattr(sentry_writer.sentry, "write", write)
    said: list[str] = []
    writer = make_writer(run, said)
    writer.save(tensors(), header(2))
    assert writer.wait() is None
    assert "read back damaged" in said[0]
    assert [h["step"] for _, h, _ in sentry.listing(run) if h] == [1]


def test_a_power_cut_cannot_lose_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every folder that is made is made durable in its parent before anything lies in it."""
    synced: list[Path] = []
    monkeypatch.setattr(rundir, "sync_folder", synced.append)
    rundir.make_folder(tmp_path / "a" / "b")
    assert synced == [tmp_path.parent, tmp_path, tmp_path / "a"]
    shutil.rmtree(tmp_path / "a")
