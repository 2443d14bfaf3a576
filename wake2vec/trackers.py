"""TensorBoard, Weights & Biases and trackio, through accelerate: off unless asked for, each an extra to install.

A tracker is told every line of the metrics log; it is no part of a run's identity, and a run goes on without it.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from types import TracebackType
from typing import Any

from wake2vec.errors import WakeError
from wake2vec.rundir import RunDir

KINDS = ("tensorboard", "wandb", "trackio")
_PROJECT = "wake2vec"


class Trackers:
    """The trackers that were asked for; a context, and a watcher of log lines."""

    def __init__(self, kinds: Sequence[str], run: RunDir, settings: Mapping[str, Any]) -> None:
        """Check what was asked for; nothing is begun yet.

        Args:
            settings: the recipe, shown beside the curves.

        Raises:
            WakeError: an unknown kind, or one that is not installed.
        """
        problems = [f"--track {kind}: no such tracker; use {', '.join(KINDS)}" for kind in kinds if kind not in KINDS]
        problems += [
            f"--track {kind}: not installed; `uv sync --extra {kind}`, or `pip install {kind}`"
            for kind in kinds
            if kind in KINDS and find_spec(kind) is None
        ]
        if problems:
            raise WakeError("\n".join(problems))
        self._kinds, self._run, self._settings = kinds, run, settings
        self._open: list[Any] = []

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """Take a line of the metrics log; the first one begins the trackers."""
        if self._kinds and not self._open:
            self._open = [_begin(kind, self._run, self._settings) for kind in self._kinds]
        for tracker in self._open:
            tracker.log(dict(values), step=step)

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for tracker in self._open:
            tracker.finish()


def _begin(kind: str, run: RunDir, settings: Mapping[str, Any]) -> Any:
    from accelerate.state import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # accelerate's trackers ask it which process they are
    folder = run.path / "trackers"
    folder.mkdir(exist_ok=True)
    options: dict[str, Any] = {"name": run.name}
    if kind == "tensorboard":
        return _started(LOGGER_TYPE_TO_CLASS[kind](run.name, logging_dir=str(folder)))
    options["resume"] = "allow"  # a run that was killed goes on in the same curves
    if kind == "wandb":
        options |= {"id": run.name, "dir": str(folder)}
    tracker = _started(LOGGER_TYPE_TO_CLASS[kind](_PROJECT, **options))
    tracker.store_init_configuration(dict(settings))
    return tracker


def _started(tracker: Any) -> Any:
    start = getattr(tracker, "start", None)  # newer accelerates begin it apart from the constructor
    if start is not None:
        start()
    return tracker
