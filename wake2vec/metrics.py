"""The run's numbers on disk: one JSON object a line with its own checksum, and the loss table made from them."""

import contextlib
import json
import os
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from wake2vec.rundir import RunDir, write_file
from wake2vec.scribe import Scribe

Record = dict[str, Any]


def read_records(path: Path) -> list[Record]:
    """Return the whole lines of a metrics file; damaged ones, and one cut off by a kill, are left out."""
    return _read(path)[0]


def _read(path: Path) -> tuple[list[Record], list[int]]:
    """Return the whole lines, and the numbers of the damaged ones; the last line may be cut off and is no damage."""
    records: list[Record] = []
    damaged = []
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], []
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):
            damaged.append(number)
    return records, damaged


def _parse(line: bytes) -> Record | None:
    """Return the record of a line, or None where it is not what was written."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    checksum = record.pop("crc32", None)
    return record if checksum in (None, _checksum(record)) else None


def _line(record: Record) -> bytes:
    return json.dumps({**record, "crc32": _checksum(record)}, allow_nan=False).encode() + b"\n"


def _checksum(record: Record) -> str:
    return f"{zlib.crc32(json.dumps(record).encode()):08x}"


class MetricsLog:
    """Appends to `metrics.jsonl`, cut back on opening to the step a run continues from.

    Nothing here waits for the disk but `sync` and `close`: lines are written by the scribe, in their order, and those
    that a full disk refuses are tried again.
    """

    def __init__(self, run: RunDir, step: int, say: Callable[[str], None]) -> None:
        self._run = run
        records, damaged = _read(run.metrics)
        if damaged:
            say(f"{run.metrics.name} is damaged: lines {', '.join(map(str, damaged))} are left out")
        self.records = [record for record in records if record["step"] <= step]
        write_file(run.metrics, [_line(record) for record in self.records])
        self._file = os.open(run.metrics, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._lines: deque[bytes] = deque()
        self._writing = threading.Lock()
        self.scribe = Scribe(say)
        self.write_loss_table()

    def append(self, step: int, values: Mapping[str, float | int]) -> None:
        """Have one line written."""
        record = {"step": step, **values}
        self.records.append(record)
        self._lines.append(_line(record))
        self.scribe.put(self._run.metrics.name, self._write)

    def _write(self) -> None:
        """Write the lines that wait; of one that finds no room, the rest waits."""
        with self._writing:
            while self._lines:
                written = os.write(self._file, self._lines[0])
                if written == len(self._lines[0]):
                    self._lines.popleft()
                else:
                    self._lines[0] = self._lines[0][written:]

    def has(self, step: int, key: str) -> bool:
        """Say whether a value of a step is on record."""
        return any(record["step"] == step and key in record for record in self.records)

    def value(self, key: str, step: int | None = None) -> float | None:
        """Return the last value on record of a key, of one step or of any."""
        found = [r[key] for r in self.records if key in r and step in (None, r["step"])]
        return found[-1] if found else None

    def best_step(self) -> int | None:
        """Return the step of the lowest loss on held-out text."""
        losses = [(r["val/loss_nats"], r["step"]) for r in self.records if "val/loss_nats" in r]
        return min(losses)[1] if losses else None

    def sync(self) -> None:
        """Make the lines durable, so that no sentry outlives the numbers before it.

        Raises:
            OSError: they cannot be written.
        """
        self._write()
        os.fsync(self._file)

    def write_loss_table(self) -> None:
        """Have `loss_table.md` written anew from the lines."""
        content = loss_table(self.records).encode()
        self.scribe.put(self._run.loss_table.name, lambda: write_file(self._run.loss_table, [content], durable=False))

    def close(self) -> None:
        """Finish writing and close the file; what a full disk refuses now is lost, and done again by a resume."""
        self.scribe.close()
        with contextlib.suppress(OSError):
            self._write()
        os.close(self._file)


def mend_loss_table(run: RunDir) -> list[Record]:
    """Write a finished run's loss table again where a power cut left an older one; return the run's records."""
    records = read_records(run.metrics)
    content = loss_table(records).encode()
    if not run.loss_table.exists() or run.loss_table.read_bytes() != content:
        write_file(run.loss_table, [content])
    return records


def loss_table(records: Iterable[Record]) -> str:
    """Return the evaluations as the Markdown table `| Step | Train | Val | Notes |`; losses in nats a token."""
    rows: dict[int, Record] = {}
    train = None
    best = None
    for record in records:
        train = record.get("train/loss_nats", train)
        if "val/loss_nats" not in record and record["step"] not in rows:
            continue
        row = rows.setdefault(record["step"], {})
        row.update(record)
        row["train"] = train
    lines = ["| Step | Train | Val | Notes |", "|------|-------|-----|-------|"]
    for step, row in rows.items():
        notes = [f"{row['val/bits_per_char']:.4f} bits/char"]
        if "base/bits_per_char" in row:
            notes.append(f"base model {row['base/bits_per_char']:.4f}")
        if best is None or row["val/loss_nats"] < best:
            best = row["val/loss_nats"]
            notes.append("best so far")
        if "control/bits_per_char" in row:
            notes.append(f"rows shuffled {row['control/bits_per_char']:.4f}")
        shown = "" if row["train"] is None else f"{row['train']:.4f}"
        lines.append(f"| {step} | {shown} | {row['val/loss_nats']:.4f} | {', '.join(notes)} |")
    return "\n".join(lines) + "\n"
