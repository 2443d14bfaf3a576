"""The run's numbers on disk: one JSON object a line, and the loss table made from them."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from wake2vec.rundir import RunDir, write_file

Record = dict[str, Any]


def read_records(path: Path) -> list[Record]:
    """Return the whole lines of a metrics file; a line cut off by a kill is left out."""
    records = []
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


class MetricsLog:
    """Appends to `metrics.jsonl`, cut back on opening to the step a run continues from."""

    def __init__(self, run: RunDir, step: int) -> None:
        self._run = run
        self.records = [record for record in read_records(run.metrics) if record["step"] <= step]
        write_file(run.metrics, [_line(record) for record in self.records])
        self._file = open(run.metrics, "ab", buffering=0)  # noqa: SIM115 - open as long as the run
        self.write_loss_table()

    def append(self, step: int, values: Mapping[str, float | int]) -> None:
        """Write one line."""
        record = {"step": step, **values}
        self.records.append(record)
        self._file.write(_line(record))

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
        """Make the lines durable, so that no sentry outlives the numbers before it."""
        os.fsync(self._file.fileno())

    def write_loss_table(self) -> None:
        """Write `loss_table.md` anew from the lines."""
        write_file(self._run.loss_table, [loss_table(self.records).encode()], durable=False)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


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


def _line(record: Record) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"
