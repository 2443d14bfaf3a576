"""Small files are written beside the loop, whatever the disk does."""

import errno
import threading

from wake2vec.scribe import Scribe


def test_what_waits_is_replaced_not_queued() -> None:
    gate, began, written = threading.Event(), threading.Event(), []
    scribe = Scribe(print)

    def hang() -> None:
        began.set()
        assert gate.wait(10)

    scribe.put("a", hang)
    assert began.wait(10)
    for number in range(100):  # none of these waits for the disk
        scribe.put("b", lambda number=number: written.append(number))
    gate.set()
    scribe.close()
    assert written == [99]


def test_what_waits_is_written_at_the_end() -> None:
    written: list[str] = []
    scribe = Scribe(print)
    for name in ("a", "b", "c"):
        scribe.put(name, lambda name=name: written.append(name))
    scribe.close()
    assert written == ["a", "b", "c"]


def test_failure_is_said_once_until_it_is_over() -> None:
    said: list[str] = []
    scribe = Scribe(said.append)
    done = threading.Event()

    def fail() -> None:
        done.set()
        raise OSError(errno.ENOSPC, "No space left on device")

    for write in (fail, fail, done.set, fail):
        done.clear()
        scribe.put("x", write)
        assert done.wait(10)
    scribe.close()
    assert said == ["x: not written (No space left on device); the run goes on and tries again"] * 2


def test_thread_survives_a_lack_of_memory() -> None:
    said: list[str] = []
    written: list[str] = []
    scribe = Scribe(said.append)

    def fail() -> None:
        raise MemoryError

    scribe.put("x", fail)
    scribe.drain()
    scribe.put("x", lambda: written.append("x"))
    scribe.close()
    assert said == ["x: not written (MemoryError: ); the run goes on and tries again"]
    assert written == ["x"]
