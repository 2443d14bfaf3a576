"""A run's folder: names, locks, files that are complete or absent."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from wake2vec import rundir
from wake2vec.errors import WakeError
from wake2vec.rundir import RunDir, find_run, hold, make_folder, new_run, read_json, sweep, write_file, write_json

HOLDER = """
import pathlib, sys
from wake2vec.rundir import RunDir, hold
with hold(RunDir(pathlib.Path(sys.argv[1]))):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def holder(run: RunDir) -> Iterator[subprocess.Popen[str]]:
    """Run a process that holds a run until its input is closed."""
    command = [sys.executable, "-c", HOLDER, str(run.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_second_process_is_refused_with_the_holders_name(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with holder(run) as process:
        with pytest.raises(WakeError) as caught, hold(run):
            raise AssertionError("held twice")
        assert str(caught.value).startswith(f"run run: held by process {process.pid} on {socket.gethostname()} since 2")
        assert run.path.is_dir()


def test_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with holder(run) as process:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert str(process.pid) in run.lock.read_text()
        with hold(run):
            assert str(os.getpid()) in run.lock.read_text()


def test_hold_is_refused_inside_one_process_too(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with hold(run), pytest.raises(WakeError, match=f"held by process {os.getpid()} "), hold(run):
        raise AssertionError("held twice")
    assert not run.path.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', "\xff\xfe"])
def test_unreadable_holder_is_another_process(content: str, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with hold(run):
        run.lock.write_bytes(content.encode("latin-1"))
        with pytest.raises(WakeError, match="held by another process; wait for it or stop it"), hold(run):
            raise AssertionError("held twice")


def test_folder_without_run_json_is_removed_again(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "runs" / "run")
    existed = []
    with pytest.raises(WakeError, match="mended"), hold(run):
        raise WakeError(f"mended {existed.append(run.path.is_dir())}")
    assert existed == [True]
    assert not run.path.exists()


def test_begun_run_and_foreign_files_stay(tmp_path: Path) -> None:
    begun, foreign = RunDir(tmp_path / "begun"), RunDir(tmp_path / "foreign")
    with hold(begun):
        write_json(begun.identity, {})
    foreign.path.mkdir()
    (foreign.path / "notes.txt").write_text("mine")
    with hold(foreign):
        pass
    assert begun.identity.exists()
    assert (foreign.path / "notes.txt").read_text() == "mine"
    with hold(begun):
        pass


HOLD_OFTEN = """
import contextlib, pathlib, sys
from wake2vec.errors import WakeError
from wake2vec.rundir import RunDir, hold
run = RunDir(pathlib.Path(sys.argv[1]))
for _ in range(100):
    with contextlib.suppress(WakeError), hold(run):
        (run.path / "inside").mkdir()  # fails where another process holds the run too
        (run.path / "inside").rmdir()
"""


def test_lock_file_that_its_holder_removes_is_held_by_one(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD_OFTEN, str(tmp_path / "run")]
    processes = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]


def test_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "run", tmp_path / "file", tmp_path / ("x" * 300)):
        with pytest.raises(WakeError, match="check the volume and its owner"), hold(RunDir(path)):
            raise AssertionError("held")


def test_lock_file_that_was_just_removed_is_not_taken_for_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, flock, calls = RunDir(tmp_path / "run"), rundir.fcntl.flock, []

    def removed_meanwhile(descriptor: int, operation: int) -> None:
        flock(descriptor, operation)
        calls.append(descriptor)
        if len(calls) == 1:
            run.lock.unlink()

    monkeypatch.setattr(rundir.fcntl, "flock", removed_meanwhile)
    with hold(run):
        assert len(calls) == 2
        assert str(os.getpid()) in run.lock.read_text()


@pytest.mark.parametrize("name", ["qwen14b", "demo-2", "a.b_c", "Éire"])
def test_name_of_a_new_run(name: str, tmp_path: Path) -> None:
    assert new_run(tmp_path, name).path == tmp_path / name


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "../a", "/a", "a b", "a\n", "a\0", "a:b", "$x", "*"])
def test_name_that_could_leave_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(WakeError, match="run name"):
        new_run(tmp_path, name)


def test_run_is_found_by_name_or_path(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for name in ("one", "two"):
        make_folder(runs / name)
        write_json(runs / name / "run.json", {})
    (runs / "empty").mkdir()
    assert find_run(runs, "one").path == runs / "one"
    assert find_run(tmp_path, str(runs / "two")).path == runs / "two"
    for name in ("three", "empty", "x" * 300, ".."):
        with pytest.raises(WakeError, match=r"it holds one, two; check the name or --runs"):
            find_run(runs, name)
    with pytest.raises(WakeError, match="it holds no runs"):
        find_run(tmp_path / "nowhere", "one")


def test_names_of_files_sort_by_step(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.sentry(20) == tmp_path / "sentries" / "sentry_step_000020.safetensors"
    assert run.snapshot(250) == tmp_path / "snapshots" / "rows_step_000250.safetensors"


@pytest.mark.parametrize("durable", [True, False])
def test_write_that_fails_leaves_the_old_file_and_nothing_else(durable: bool, tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_file(path, [b"old"], durable=durable)

    def parts() -> Iterator[bytes]:
        yield b"new"
        assert path.read_bytes() == b"old"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(path, parts(), durable=durable)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
    write_file(path, [b"n", memoryview(b"ew")], durable=durable)
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_durable_write_syncs_the_file_before_its_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "file", []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        seen.append((os.readlink(f"/proc/self/fd/{descriptor}"), path.exists()))
        fsync(descriptor)

    monkeypatch.setattr(rundir.os, "fsync", record)
    write_file(path, [b"content"])
    temporary = str(tmp_path / f".file.{os.getpid()}.tmp")
    assert seen == [(temporary, False), (str(tmp_path), True)]


def test_sweep_removes_what_a_killed_process_left(tmp_path: Path) -> None:
    path = tmp_path / "file"
    program = (
        "import os, pathlib, signal, sys; from wake2vec.rundir import write_file\n"
        "parts = (os.kill(os.getpid(), signal.SIGKILL) or b'' for _ in range(1))\n"
        "write_file(pathlib.Path(sys.argv[1]), parts)"
    )
    write_file(path, [b"old"])
    assert subprocess.run([sys.executable, "-c", program, str(path)], check=False).returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 2
    sweep(tmp_path)
    assert os.listdir(tmp_path) == ["file"]
    assert path.read_bytes() == b"old"
    sweep(tmp_path / "none")


def test_made_folders_are_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []
    monkeypatch.setattr(rundir, "sync_folder", seen.append)
    make_folder(tmp_path / "a" / "b")
    assert seen == [tmp_path.parent, tmp_path, tmp_path / "a"]
    seen.clear()
    make_folder(tmp_path / "a" / "b")  # its maker may have been killed before it was durable
    assert seen == [tmp_path / "a"]


def test_json_round_trip(tmp_path: Path) -> None:
    content = {"naïve": [1, 0.1, None, True, "Éire"]}
    write_json(tmp_path / "x.json", content)
    assert read_json(tmp_path / "x.json") == content


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", pytest.param(b"[" * 1_000_000, id="deep"), b"1" * 5000])
def test_damaged_json_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(WakeError, match=r"x\.json: damaged"):
        read_json(path)


def test_json_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WakeError, match="no such file"):
        read_json(tmp_path / "x.json")
    with pytest.raises(WakeError, match="cannot be read"):
        read_json(tmp_path)
