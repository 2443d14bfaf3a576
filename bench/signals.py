"""Send signals to `wake2vec train` in every phase of a run, then compare its end with that of one left alone.

    python bench/signals.py RECIPE [--set KEY=VALUE ...] [--folder FOLDER]

Both runs take 24 steps; a save begins as soon as the last one is done, the worst case for a signal. Prints a JSON
object for each start: when the signal came, the exit code, seconds from the signal to the end of the process, seconds
to the first step. Exits 1 if the two ends differ in a bit.
"""

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from wake2vec import sentry
from wake2vec.metrics import read_records
from wake2vec.rundir import RunDir

STEPS = 24
SHORT = [
    f"train.max_steps={STEPS}",
    "train.warmup_steps=5",
    "run.log_every=1",
    "run.eval_every=12",
    "run.sentry_every=1",
    "run.sentry_min_gap_s=0.0",
]
TIMED = ("time/", "throughput/", "memory/")
# when, after which line (none: after the start), seconds later, which signal; each start goes on where the last ended
SIGNALS = [
    ("in the imports", "", 3.0, signal.SIGTERM),
    ("while loading", "^loading", 0.3, signal.SIGTERM),
    ("after the first step", "^step 1: train", 0.0, signal.SIGTERM),
    ("in a step", "^step 6: train", 0.1, signal.SIGTERM),
    ("in a step", "^step 9: train", 0.1, signal.SIGINT),
    ("in an evaluation", "^step 12: train", 0.2, signal.SIGTERM),
    ("in a step", "^step 15: train", 0.1, signal.SIGKILL),
    ("in the last evaluation", f"^step {STEPS}: train", 0.2, signal.SIGTERM),
    ("in the report", "rows shuffled", 1.0, signal.SIGTERM),
    ("never", "", -1.0, signal.SIGTERM),
]


def main() -> int:
    """Run both; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--folder", type=Path, help="where the runs go; by default the system's temporary folder")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        alone, attacked = RunDir(Path(folder) / "alone"), RunDir(Path(folder) / "attacked")
        for run, signals in ((alone, SIGNALS[-1:]), (attacked, SIGNALS)):
            for when, line, seconds, number in signals:
                found = start(asked.recipe, asked.set, run, line, seconds, number)
                print(json.dumps({"run": run.path.name, "signal": when, "name": number.name, **found}), flush=True)
        same = ends_alike(alone, attacked)
    print(json.dumps({"same end": same}))
    return 0 if same else 1


def start(recipe: str, changes: list[str], run: RunDir, line: str, seconds: float, number: int) -> dict[str, Any]:
    """Start the command, send it a signal so long after a line (a pattern); none where `seconds` is negative."""
    command = [sys.executable, "-c", "from wake2vec.cli import main; main()", "train", recipe]
    command += ["--runs", str(run.path.parent), "--run", run.path.name]
    command += [word for change in [*SHORT, *changes] for word in ("--set", change)]
    began, sent, first_step, last = time.monotonic(), [], None, ""

    def send() -> None:
        if process.poll() is None:
            process.send_signal(number)
            sent.append(time.monotonic())

    timer = threading.Timer(seconds, send)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        waiting = seconds >= 0
        if waiting and not line:
            timer.start()
            waiting = False
        assert process.stderr is not None
        for last in process.stderr:
            if first_step is None and re.search(r"^step \d+: train", last):
                first_step = time.monotonic() - began
            if waiting and re.search(line, last):
                timer.start()
                waiting = False
    timer.cancel()
    found = {"exit": process.returncode, "first_step_s": first_step and round(first_step, 1), "said": last.strip()}
    return {**found, "seconds": round(time.monotonic() - sent[0], 2)} if sent else found


def ends_alike(one: RunDir, other: RunDir) -> bool:
    """Compare rows, optimizer, header and every logged number that is not a time, a rate or a size."""
    ends = [sentry.read(run.sentry(STEPS)) for run in (one, other)]
    numbers = [
        [
            {key: value for key, value in record.items() if not key.startswith(TIMED)}
            for record in read_records(run.metrics)
        ]
        for run in (one, other)
    ]
    tensors = [end.tensors for end in ends]
    return (
        ends[0].header == ends[1].header
        and numbers[0] == numbers[1]
        and tensors[0].keys() == tensors[1].keys()
        and all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    )


if __name__ == "__main__":
    sys.exit(main())
