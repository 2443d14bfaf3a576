"""Runs that are killed at a chosen point; each function is called in a process of its own."""

import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tiny
import torch

import wake2vec.base  # noqa: F401 - the forkserver imports all that is slow to import, once
from wake2vec import model, resume, rundir, sentry, sentry_writer, train
from wake2vec.errors import Stopped
from wake2vec.rundir import RunDir

Changes = Mapping[str, Mapping[str, Any]]


def run(inputs: Path, folder: Path, changes: Changes, point: str, step: int, number: int = signal.SIGKILL) -> None:
    """Train, and send this process a signal at `point` of `step`; exit 75 where it stops well."""
    torch.set_num_threads(1)
    console = tiny.Quiet()

    def strike() -> None:
        os.kill(os.getpid(), number)

    # a save that is due waits for the one before instead of being skipped: which steps are saved is then no race
    sentry_writer.SentryWriter.busy = property(lambda writer: bool(writer.wait()) and False)
    _ARM[point](step, strike, console)
    try:
        train.train(tiny.make_recipe(inputs, changes), RunDir(folder), console)
    except Stopped:
        sys.exit(75)


def _after_step(step: int, strike: Callable[[], None], console: Any) -> None:
    console.step = lambda at, _max, _values: strike() if at == step else None


def _in_step(step: int, strike: Callable[[], None], console: Any) -> None:
    """Strike between the forward and the backward pass of the step's second micro-batch."""
    calls = iter(range(1, 10**6))
    plain = model.split_cross_entropy

    def striking(*args: Any, **options: Any) -> Any:
        if options.get("rows_grad_ND") is not None and train_steps["done"] == step - 1 and next(calls) == 1:
            strike()
        return plain(*args, **options)

    train_steps = {"done": 0}
    console.step = lambda at, _max, _values: train_steps.update(done=at)
    model.split_cross_entropy = striking


def _in_evaluation(step: int, strike: Callable[[], None], _console: Any) -> None:
    plain = train._losses

    def striking(training: Any, token_losses: Any, blocks: Any, words: Any = None) -> Any:
        def losses(blocks_BT: Any) -> Any:
            if training.step == step:
                strike()
            return token_losses(blocks_BT)

        return plain(training, losses, blocks, words)

    train._losses = striking


def _in_update(step: int, strike: Callable[[], None], _console: Any) -> None:
    """Strike when the rows are half updated."""
    plain = train.resume

    def loaded(*args: Any, **options: Any) -> Any:
        training = plain(*args, **options)
        update = training.optimizer.step

        def striking(*update_args: Any) -> None:
            if training.step == step - 1:
                with torch.no_grad():
                    before = training.model.rows["input"].clone()
                    update(*update_args)
                    after = training.model.rows["input"].clone()
                    training.model.rows["input"][::2] = before[::2]
                    strike()
                    training.model.rows["input"].copy_(after)
            else:
                update(*update_args)

        training.optimizer.step = striking
        return training

    train.resume = loaded


def _in_save(step: int, strike: Callable[[], None], _console: Any) -> None:
    """Strike when half of the sentry's parts are written."""
    plain = rundir.write_file

    def striking(path: Path, parts: Any, **options: Any) -> None:
        def halting() -> Any:
            for index, part in enumerate(parts):
                if index == len(parts) // 2 and f"{step:06d}" in path.name:
                    strike()
                yield part

        plain(path, halting(), **options)

    sentry.write_file = striking


def _before_read_back(step: int, strike: Callable[[], None], _console: Any) -> None:
    """Strike when a sentry has its name but is not read back yet."""
    plain = sentry.verify

    def striking(path: Path) -> None:
        if f"{step:06d}" in path.name:
            strike()
        plain(path)

    sentry_writer.sentry.verify = striking


def _in_load(_step: int, strike: Callable[[], None], _console: Any) -> None:
    plain = resume.base.load

    def striking(*args: Any, **options: Any) -> Any:
        strike()
        return plain(*args, **options)

    resume.base.load = striking


def _never(_step: int, _strike: Callable[[], None], _console: Any) -> None:
    pass


_ARM: dict[str, Callable[[int, Callable[[], None], Any], None]] = {
    "after step": _after_step,
    "in step": _in_step,
    "in update": _in_update,
    "in evaluation": _in_evaluation,
    "in save": _in_save,
    "before read-back": _before_read_back,
    "in load": _in_load,
    "never": _never,
}
