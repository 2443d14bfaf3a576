"""Where attacks are carried out: tiny inputs, the real command in children, and the end that every run must have."""

import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from ends import assert_same_end
from faults import child
from tiny import make_inputs, make_recipe, write_recipe

from wake2vec import sentry
from wake2vec.rundir import RunDir

STEPS = 30
CHANGES: dict[str, dict[str, Any]] = {
    "train": {"max_steps": STEPS, "batch_size": 8},
    "run": {"log_every": 2, "eval_every": 10, "sentry_every": 1, "sentry_min_gap_s": 0.0},
}
"""A run of about a second that is saved after every step, or every other where the last save is still under way."""
DONE, USER, BUG, STOPPED = 0, 1, 70, 75
_CONTEXT = multiprocessing.get_context("forkserver")
_PROCESSES = threading.Lock()
"""Held to start or poll a process: multiprocessing polls all of them whenever one starts, in any thread."""
KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT


@dataclass(frozen=True)
class Done:
    """How a command ended: its exit code, or minus a signal's number, and what it printed."""

    code: int
    out: str
    err: str
    seconds: float

    def __str__(self) -> str:
        return f"exit {self.code} after {self.seconds:.1f} s\n{self.out}{self.err}"


class Child:
    """A command under way."""

    def __init__(self, process: ForkServerProcess, streams: Path) -> None:
        self.process = process
        self.streams = streams
        self.started = time.monotonic()

    @property
    def code(self) -> int | None:
        """Return its exit code, or minus a signal's number; None while it runs."""
        with _PROCESSES:
            return self.process.exitcode

    @property
    def running(self) -> bool:
        """Say whether it has not ended yet."""
        return self.code is None

    def err(self) -> str:
        """Return what it has printed on stderr so far."""
        path = Path(f"{self.streams}.err")
        return path.read_text("utf-8", "replace") if path.exists() else ""

    def threads(self) -> int:
        """Return how many threads it has."""
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def send(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.running:
            assert self.process.pid is not None
            os.kill(self.process.pid, number)

    def wait(self, timeout_s: float = 120) -> Done:
        """Wait for its end; one that hangs is killed and fails the test."""
        deadline = time.monotonic() + timeout_s
        while (code := self.code) is None:
            if time.monotonic() > deadline:
                self.send(KILL)
                raise AssertionError(f"still running after {timeout_s} s\n{self.err()}")
            time.sleep(0.002)
        out = Path(f"{self.streams}.out")
        said = out.read_text("utf-8", "replace") if out.exists() else ""
        return Done(code, said, self.err(), time.monotonic() - self.started)

    def wait_for(self, text: str, timeout_s: float = 60) -> None:
        """Wait until it has printed something on stderr."""
        deadline = time.monotonic() + timeout_s
        while text not in self.err():
            assert self.running, f"ended without saying {text!r}: {self.wait()}"
            assert time.monotonic() < deadline, f"never said {text!r}: {self.err()}"
            time.sleep(0.005)


class Lab:
    """A folder for attacks, with the inputs of a tiny run and the reference end that all of them must reach."""

    def __init__(self, folder: Path, seed: int, workers: int = 2) -> None:
        self.folder = folder
        self.workers = workers
        self.seed = seed
        self.inputs = make_inputs(_made(folder / "inputs"))
        self.recipe = self.write_recipe("tiny", CHANGES)
        self._names = itertools.count()
        # the server of Python 3.11 is not given sys.path
        tests = str(Path(__file__).parents[1])
        os.environ["PYTHONPATH"] = os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])
        os.environ["WAKE2VEC_CACHE"] = str(folder / "cache")
        _CONTEXT.set_forkserver_preload(["faults.preload"])

    def write_recipe(self, name: str, changes: Mapping[str, Mapping[str, Any]]) -> Path:
        """Write a recipe of the tiny inputs, its keys changed."""
        return write_recipe(self.folder / f"{name}.toml", make_recipe(self.inputs, changes))

    def fresh(self) -> Path:
        """Return a new empty folder."""
        return Path(tempfile.mkdtemp(prefix="trial-", dir=self.folder))

    def copy(self, runs: Path) -> Path:
        """Return a copy of a folder of runs."""
        return Path(shutil.copytree(runs, self.fresh() / "runs"))

    def start(
        self,
        *arguments: str | Path,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        prepare: Sequence[child.Prepare] = (),
    ) -> Child:
        """Start `wake2vec ARGUMENTS` in a child."""
        streams = self.folder / f"streams-{next(self._names)}"
        words = [str(argument) for argument in arguments]
        return self.fork(child.command, words, streams, cwd or self.folder, environment or {}, prepare, streams=streams)

    def fork(self, call: Callable[..., None], *arguments: Any, streams: Path | None = None) -> Child:
        """Call a function of a module here in a child."""
        process = _CONTEXT.Process(target=call, args=arguments)
        with _PROCESSES:
            process.start()
        return Child(process, streams or self.folder / "no-streams")

    def run(self, *arguments: str | Path, timeout_s: float = 120, **options: Any) -> Done:
        """Run `wake2vec ARGUMENTS` to its end."""
        return self.start(*arguments, **options).wait(timeout_s)

    def train(self, runs: Path, *arguments: str | Path, **options: Any) -> Child:
        """Start or continue the tiny run in a folder of runs."""
        return self.start("train", self.recipe, "--runs", runs, *arguments, **options)

    def train_to_end(self, runs: Path, *arguments: str | Path, **options: Any) -> Done:
        """See the tiny run to its end, and check that it is the reference's."""
        done = self.train(runs, *arguments, **options).wait()
        assert done.code == DONE, done
        self.check_end(RunDir(runs / "tiny"))
        return done

    @cached_property
    def reference(self) -> RunDir:
        """Return the tiny run, never interrupted."""
        runs = self.fresh()
        done = self.train(runs).wait()
        assert done.code == DONE, done
        return RunDir(runs / "tiny")

    @cached_property
    def seconds(self) -> float:
        """Return how long the tiny run takes."""
        return self.train(self.fresh()).wait().seconds if self.reference else 0.0

    def check_end(self, run: RunDir) -> None:
        """Compare a run's end with the reference's: rows, optimizer, header and every logged number, to the bit."""
        assert_same_end(run, self.reference, STEPS)

    def each(self, count: int, trial: Callable[[int, random.Random], Any]) -> list[Any]:
        """Call `trial(index, rng)` for every index, a few at a time; a failure names the index and the seed."""

        name = getattr(trial, "__qualname__", "")
        with ThreadPoolExecutor(self.workers) as pool:
            futures = [pool.submit(trial, i, random.Random(f"{self.seed} {name} {i}")) for i in range(count)]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for index, future in enumerate(futures):
                future.cancel()
                if future in done and (error := future.exception()) is not None:
                    error.add_note(f"in trial {index} of seed {self.seed}")
        return [future.result() for future in futures if not future.cancelled()]

    def close(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def newest_step(run: RunDir) -> int:
    """Return the step of the newest sentry, which must be whole: a kill or a power cut never leaves another; or -1.

    One that is gone meanwhile was removed by a run that is under way.
    """
    steps = [-1]
    for path, _, _ in sentry.listing(run):
        try:
            steps.append(sentry.read(path).step)
        except sentry.DamagedError as error:
            if path.exists():
                raise AssertionError(f"{path.name}: {error}") from None
    return max(steps)


def trained(child: Child) -> bool:
    """Say whether a run has nothing left to do but its report, for which it is not held."""
    return "rows shuffled" in child.err()


def no_traceback(done: Done) -> None:
    """Check that a command ended with one message, or well."""
    assert done.code != BUG, done
    assert "Traceback" not in done.err, done


def refused(done: Done, *parts: str) -> None:
    """Check that a command ended with a message that names all of these, and no traceback."""
    no_traceback(done)
    assert done.code == USER, done
    for part in parts:
        assert part in done.err, f"{part!r} is not in\n{done}"


def as_json(path: Path) -> Any:
    """Return a JSON file's content."""
    return json.loads(path.read_text("utf-8"))
