"""Attack every promise at length: what `tests/faults` does in CI, with larger counts. Needs root; hours for all of it.

    python bench/torture.py                              every attack at its long count
    python bench/torture.py kill="500" "power cut=200"   these, so often
    python bench/torture.py --list                       their names and counts

Prints a line for each attack and goes on after a failure; exits 1 if there was one.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from faults.attacks import ATTACKS
from faults.lab import Lab

from wake2vec.sentry import DamagedError


def main() -> int:
    """Carry out the attacks; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("attacks", nargs="*", metavar="NAME[=COUNT]", help="by default all")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--folder", type=Path, help="where to work; by default the system's temporary folder")
    parser.add_argument("--workers", type=int, default=2, help="how many trials at a time; by default 2")
    parser.add_argument("--list", action="store_true", help="print the attacks and leave")
    options = parser.parse_args()
    chosen = dict(_chosen(word) for word in options.attacks or ATTACKS)
    if options.list:
        for name, attack in ATTACKS.items():
            print(f"{name}: {attack.long} ({attack.ci} in CI)")
        return 0
    failed = 0
    with tempfile.TemporaryDirectory(dir=options.folder, ignore_cleanup_errors=True) as folder:
        lab = Lab(Path(folder) / "lab", options.seed, options.workers)
        print(f"seed {options.seed}", flush=True)
        for name, count in chosen.items():
            failed += not _carry_out(lab, name, count)
    return 1 if failed else 0


def _chosen(word: str) -> tuple[str, int]:
    name, _, count = word.partition("=")
    if name not in ATTACKS:
        raise SystemExit(f"no attack is called {name!r}; use one of {', '.join(ATTACKS)}")
    return name, int(count or ATTACKS[name].long)


def _carry_out(lab: Lab, name: str, count: int) -> bool:
    began = time.monotonic()
    try:
        said = ATTACKS[name].carry_out(lab, count)
    except (AssertionError, OSError, EOFError, ValueError, KeyError, DamagedError, subprocess.SubprocessError):
        said = f"FAILED\n{traceback.format_exc()}"
    print(f"{name}: {said} ({time.monotonic() - began:.0f} s)", flush=True)
    return not said.startswith("FAILED")


if __name__ == "__main__":
    sys.exit(main())
