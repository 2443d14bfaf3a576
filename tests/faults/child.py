"""What runs in a forked child: the real command, after faults were prepared."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from wake2vec import cli

Prepare = tuple[Callable[..., None], tuple[Any, ...]]
"""A function of a module here and its arguments, called in the child before the command."""


def command(
    arguments: Sequence[str], streams: Path, cwd: Path, environment: Mapping[str, str], prepare: Sequence[Prepare]
) -> None:
    """Become `wake2vec ARGUMENTS`; what it prints is appended to `streams`.out and .err."""
    for number, suffix in ((1, ".out"), (2, ".err")):
        descriptor = os.open(f"{streams}{suffix}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(cwd)
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = ["wake2vec", *arguments]
    for function, values in prepare:
        function(*values)
    cli.main()
