"""Fixtures that several files share."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_inputs


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep quantised bodies out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WAKE2VEC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny untied base, a text and a lexicon."""
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def tied_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same with a tied base."""
    return make_inputs(tmp_path_factory.mktemp("tied-inputs"), tied=True)


@pytest.fixture(scope="session")
def in_child() -> Iterator[Callable[..., int]]:
    """Return a function that runs `target(*args)` in a process of its own and returns its exit code.

    The processes are forked off a server that has imported the heavy modules and done nothing else.
    """
    context = multiprocessing.get_context("forkserver")
    # the server of Python 3.11 is not given sys.path
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    context.set_forkserver_preload(["killing"])

    def run(target: Callable[..., None], *args: Any) -> int:
        process = context.Process(target=target, args=args)
        process.start()
        process.join(120)
        assert process.exitcode is not None, "the child hangs"
        return process.exitcode

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
