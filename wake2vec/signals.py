"""SIGTERM and SIGINT: leave an unfinished computation at once, never an update or a save."""

import contextlib
import signal
import types
from collections.abc import Iterator

from wake2vec.errors import Stopped


class StopSignal:
    """While entered, a signal raises `Stopped` inside `interruptible()` and is remembered everywhere else."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._interruptible = False
        self._previous: dict[int, signal.Handlers | None | object] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, _frame: types.FrameType | None) -> None:
        self.received = signal.Signals(number).name
        if self._interruptible:
            self._interruptible = False
            raise Stopped(self.received)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Mark work that may be dropped half way."""
        self.check()
        self._interruptible = True
        try:
            self.check()  # a signal that came in between
            yield
        except Exception:
            self.check()  # native code may make another error of the one raised in it
            raise
        finally:
            self._interruptible = False

    def check(self) -> None:
        """Raise `Stopped` where a signal has come."""
        if self.received:
            raise Stopped(self.received)
