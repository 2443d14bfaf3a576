"""What a person sees: messages and a live line on stderr, tables and JSON on stdout."""

import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

_SHOWN = {
    "train/loss_nats": "train {:.4f}",
    "val/loss_nats": "val {:.4f}",
    "val/bits_per_char": "val {:.4f} bits/char",
    "base/bits_per_char": "base model {:.4f} bits/char",
    "control/bits_per_char": "rows shuffled {:.4f} bits/char",
    "optim/learning_rate": "lr {:.2e}",
    "optim/grad_norm": "grad norm {:.3g}",
    "time/step_s": "{:.3g} s/step",
}


class TrainConsole:
    """Shows a run: a live line on a terminal, one plain line per log line without one.

    `watchers` are told every line of the metrics log too: trackers, and the report's live page.
    """

    def __init__(self, watchers: Sequence[Callable[[int, Mapping[str, float]], None]] = ()) -> None:
        self._watchers = watchers
        self._console = RichConsole(stderr=True, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None

    def __enter__(self) -> "TrainConsole":
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def say(self, message: str) -> None:
        """Show a message."""
        self._console.print(message, markup=False)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show a line of the metrics log."""
        shown = [form.format(values[key]) for key, form in _SHOWN.items() if key in values]
        self.say(f"step {step}: {', '.join(shown)}")
        for watcher in self._watchers:
            watcher(step, values)

    def step(self, step: int, max_steps: int, values: Mapping[str, float]) -> None:
        """Move the live line."""
        if not self._console.is_terminal:
            return
        if self._progress is None:
            columns = ("step {task.completed:.0f}/{task.total:.0f}", BarColumn(bar_width=20), "{task.description}")
            self._progress = Progress(
                *(TextColumn(c) if isinstance(c, str) else c for c in columns), console=self._console, transient=True
            )
            self._progress.add_task("", total=max_steps)
            self._progress.start()
        left = timedelta(seconds=round((max_steps - step) * values["time/step_s"]))
        shown = [
            _SHOWN[key].format(values[key])
            for key in ("train/loss_nats", "val/loss_nats", "time/step_s")
            if key in values
        ]
        self._progress.update(
            self._progress.task_ids[0], completed=step, description=", ".join([*shown, f"{left} left"])
        )


def print_text(title: str, prompt: str, pieces: Sequence[tuple[str, bool]]) -> None:
    """Print a drawn text on stdout, its new words in colour, or between ** where there is no terminal."""
    out = RichConsole(highlight=False, soft_wrap=True)
    out.print(title, style="bold", markup=False)
    text = Text(prompt, style="dim")
    for piece, new in pieces:
        word = piece.strip()
        if new and word and not out.is_terminal:
            piece = piece.replace(word, f"**{word}**", 1)
        text.append(piece, style="bold magenta" if new else "")
    out.print(text)
    out.print()


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table on stdout."""
    table = Table(header_style="bold", box=None, pad_edge=False, show_header=any(columns))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # where there is no terminal, its supposed width must not cut numbers off
    out = RichConsole(width=None if sys.stdout.isatty() else 200, highlight=False)
    out.print(title, markup=False, soft_wrap=True)
    out.print(table)
