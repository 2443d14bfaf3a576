"""Writes sentries beside the training: the loop waits for a copy in memory, a thread does the rest."""

import contextlib
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from wake2vec import sentry
from wake2vec.errors import WakeError
from wake2vec.rundir import RunDir, make_folder


class SentryWriter:
    """One save at a time: a save that comes due while one is being written is skipped and counted.

    A save that fails (a full disk) is reported and the run goes on; the next one tries again.
    """

    def __init__(
        self,
        run: RunDir,
        *,
        keep_last: int,
        keep_every: int,
        before: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        self.run = run
        self.saved_step: int | None = None
        self.started_step: int | None = None
        self.num_skipped = 0
        self.problem: str | None = None
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._before = before
        self._say = say
        self._host: dict[str, Tensor] = {}
        self._copied: torch.cuda.Event | None = None
        self._stream: torch.cuda.Stream | None = None
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Say whether a save is being written."""
        return self._thread is not None and self._thread.is_alive()

    def reserve(self, tensors: Mapping[str, Tensor]) -> None:
        """Make the host memory that saves of these tensors are copied to, pinned where they are on a GPU.

        Pinning takes the loop's time, so it is done before the first step, not at the first save.
        """
        if not self._host:
            self._host = {
                name: torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda) for name, t in tensors.items()
            }
            self._stream = torch.cuda.Stream() if any(t.is_cuda for t in tensors.values()) else None

    def save(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any], *, snapshot: bool = False) -> bool:
        """Start a save of the tensors as they are now; return False where it is skipped.

        On a GPU the copy runs beside the next step: call `wait_for_copy` before the tensors change.
        """
        if self.busy:
            self.num_skipped += 1
            return False
        self._copy(tensors)
        self.started_step = header["step"]
        self._thread = threading.Thread(target=self._write, args=(dict(header), snapshot), name="sentry")
        try:
            self._thread.start()
        except RuntimeError as error:  # no room for another thread
            self._thread = None
            self._fail(f"sentry of step {header['step']}: not saved ({error}); free memory, or raise the process limit")
        return True

    def wait_for_copy(self) -> None:
        """Make the GPU wait for the copy of the save under way; the host goes on."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Wait for the save under way, at most so long; return the step of the last one that succeeded."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self.saved_step

    def save_now(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any], *, snapshot: bool = False) -> None:
        """Save and wait.

        Raises:
            WakeError: it could not be written.
        """
        self.wait()
        self.save(tensors, header, snapshot=snapshot)
        self.wait()
        if self.saved_step != header["step"]:
            raise WakeError(f"{self.problem}; {self.last_save()}")

    def last_save(self) -> str:
        """Wait for the save under way; return what an error says of the last one that succeeded."""
        step = self.wait()
        return "no sentry is there yet" if step is None else f"the sentry of step {step} is whole and kept"

    def _copy(self, tensors: Mapping[str, Tensor]) -> None:
        self.reserve(tensors)
        if self._stream is None:
            for name, tensor in tensors.items():
                self._host[name].copy_(tensor.detach())
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for name, tensor in tensors.items():
                self._host[name].copy_(tensor.detach(), non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def _write(self, header: dict[str, Any], snapshot: bool) -> None:
        if self._copied is not None:
            self._copied.synchronize()
        step = header["step"]
        path = self.run.sentry(step)
        try:
            bad = sentry.not_finite(self._host)
            if bad:
                self._fail(f"sentry of step {step}: not saved ({', '.join(bad)} holds NaN or Inf); see the step's loss")
                return
            self._before()
            make_folder(path.parent)
            sentry.write(path, self._host, header)
            sentry.verify(path)
            sentry.retire(
                self.run, keep_last=self._keep_last, keep_every=self._keep_every, best_step=header["best_step"]
            )
            self.saved_step, self.problem = step, None
            if snapshot:
                make_folder(self.run.snapshots)
                rows = sentry.half_precision(self._host, [name for name in self._host if name.startswith("rows/")])
                sentry.write(self.run.snapshot(step), rows, header)
        except OSError as error:
            self._fail(f"sentry of step {step}: not saved ({error.strerror}); free space on {self.run.path}")
        except MemoryError:
            self._fail(f"sentry of step {step}: not saved (out of host memory); free memory")
        except sentry.DamagedError as error:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            self._fail(f"sentry of step {step}: read back damaged ({error}); check the volume {self.run.path}")
        except Exception as error:  # short of memory, libraries raise anything
            self._fail(f"sentry of step {step}: not saved ({type(error).__name__}: {error}); free memory")

    def _fail(self, problem: str) -> None:
        self.problem = problem
        self._say(problem)
