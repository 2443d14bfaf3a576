"""Writes small files beside the loop, so that no slow, hanging or full volume stops the training."""

import threading
from collections.abc import Callable


class Scribe:
    """A thread that carries out writes by name; one that waits is replaced by the next of its name, never queued.

    A write that fails (a full disk, no memory) is reported once, and the run goes on; whoever put it puts the next one.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._waiting: dict[str, Callable[[], None]] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._busy = False
        self._failing: set[str] = set()
        self._thread = threading.Thread(target=self._work, name="scribe", daemon=True)
        self._thread.start()

    def put(self, name: str, write: Callable[[], None]) -> None:
        """Have something written, in place of what waits under the same name."""
        with self._changed:
            self._waiting[name] = write
            self._changed.notify_all()

    def drain(self) -> None:
        """Wait until everything that was put is written or has failed."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._busy)

    def close(self) -> None:
        """Finish what waits and end."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                name = next(iter(self._waiting))
                write, self._busy = self._waiting.pop(name), True
            self._carry_out(name, write)

    def _carry_out(self, name: str, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:  # short of memory, libraries raise anything; the thread must live
            if name not in self._failing:
                reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
                self._say(f"{name}: not written ({reason}); the run goes on and tries again")
            self._failing.add(name)
        else:
            self._failing.discard(name)
