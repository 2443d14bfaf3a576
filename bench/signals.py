"""Send signals to `wake2vec train` in every phase of a run, then compare its end with that of one left alone.

    python bench/signals.py RECIPE [--set KEY=VALUE ...] [--folder FOLDER]

Both runs take 24 steps; a save begins as soon as the last one is done, the worst case for a signal. Prints a JSON
object for each start: when the signal came, the exit code, seconds from the signal to the end of the process, seconds
to the first step. Ends with what differs if the two ends do, in a bit.
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

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from ends import assert_same_end

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
# when, after which line ("": the start; None: never), seconds later, which signal; each goes on where the last ended
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
    ("never", None, 0.0, signal.SIGTERM),
]


def main() -> None:
    """Run both and compare them."""
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
        assert_same_end(attacked, alone, STEPS)
    print(json.dumps({"same end": True}))


def start(
    recipe: str, changes: list[str], run: RunDir, line: str | None, seconds: float, number: int
) -> dict[str, Any]:
    """Start the command, send it a signal so long after a line (a pattern)."""
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
        if line == "":
            timer.start()
        assert process.stderr is not None
        for last in process.stderr:
            if first_step is None and re.search(r"^step \d+: train", last):
                first_step = time.monotonic() - began
            if line and timer.ident is None and re.search(line, last):
                timer.start()
    timer.cancel()
    found = {"exit": process.returncode, "first_step_s": first_step and round(first_step, 1), "said": last.strip()}
    return {**found, "seconds": round(time.monotonic() - sent[0], 2)} if sent else found


if __name__ == "__main__":
    main()
