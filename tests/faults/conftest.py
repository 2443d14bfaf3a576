"""Attacks on every promise, through the real command. A suite of its own: it needs root, loop devices and minutes.

    WAKE2VEC_FAULT_TESTS=1 pytest tests/faults        as CI does, under ten minutes on two cores
    python bench/torture.py                           the same attacks, longer

Nothing is skipped: what a machine lacks fails. WAKE2VEC_FAULT_SEED repeats the random choices of a run.
"""

import os
import random
from collections.abc import Iterator

import pytest
from faults.lab import Lab

collect_ignore_glob = [] if os.environ.get("WAKE2VEC_FAULT_TESTS") else ["test_*.py"]


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Return the place where attacks are carried out."""
    seed = int(os.environ.get("WAKE2VEC_FAULT_SEED") or random.randrange(10**6))
    print(f"WAKE2VEC_FAULT_SEED={seed}")
    lab = Lab(tmp_path_factory.mktemp("faults"), seed)
    yield lab
    lab.close()
