"""Drives the image through Docker Compose as a user would. A suite of its own: it needs an engine and built images.

    WAKE2VEC_IMAGE_TESTS=1 pytest tests/image        after `.ci/image build`

Every test works in a fresh clone with volumes of its own. The clone's override file only makes the demo shorter.
"""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from image.driver import Clone, docker

collect_ignore_glob = [] if os.environ.get("WAKE2VEC_IMAGE_TESTS") else ["test_*.py"]


@pytest.fixture(scope="session")
def cache() -> Iterator[str]:
    """Name a volume with the demo's base model, made once; WAKE2VEC_TEST_CACHE names one that is kept."""
    kept = os.environ.get("WAKE2VEC_TEST_CACHE")
    name = kept or f"w2vtest-cache-{uuid.uuid4().hex[:8]}"
    docker("volume", "create", name)
    yield name
    if not kept:
        docker("volume", "rm", name)


@pytest.fixture
def clone(tmp_path: Path) -> Iterator[Clone]:
    clone = Clone(tmp_path / "wake2vec")
    yield clone
    clone.close()
