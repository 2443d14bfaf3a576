"""What must be there before anything large is downloaded or loaded: room on the volumes, memory."""

import shutil
from pathlib import Path
from typing import Any

import torch

from wake2vec import hub, quantized
from wake2vec.base import BaseId, load_config
from wake2vec.config import Recipe
from wake2vec.errors import WakeError
from wake2vec.machine import machine
from wake2vec.rundir import RunDir

GIB = 2**30
_NF4_SHARE = 0.27
"""Bytes of a linear layer in NF4 with double quantisation over its bytes in 16 bits."""


def check(recipe: Recipe, run: RunDir, base: BaseId, num_new_tokens: int) -> None:
    """Refuse to start what cannot fit, naming everything that lacks room.

    Raises:
        WakeError: with what is free, what is needed, and what to do.
    """
    config = load_config(base)
    share = _share(recipe, base, config)
    problems = [_run_volume(recipe, run, config, num_new_tokens)]
    if base.revision is not None:
        size, missing = hub.download_sizes(base.name, base.revision)
        if not _is_kept(recipe, base):
            problems.append(_download(base, missing))
        problems.append(_memory(config, size, share, num_new_tokens))
    found = [problem for problem in problems if problem]
    if found:
        raise WakeError("\n".join(found))


def check_download(recipe: Recipe, base: BaseId) -> None:
    """Refuse a download that is of no use to a recipe, or that the cache's volume has no room for."""
    _share(recipe, base, load_config(base))
    if base.revision is not None and (problem := _download(base, hub.download_sizes(base.name, base.revision)[1])):
        raise WakeError(problem)


def _run_volume(recipe: Recipe, run: RunDir, config: Any, num_new_tokens: int) -> str | None:
    """Compare what is free with the sentries that are kept, and one that is being written."""
    matrices = (1 if config.tie_word_embeddings else 2) * (1 if recipe.train.optimizer == "adafactor" else 3)
    sentry_bytes = 4 * num_new_tokens * config.hidden_size * matrices + 2**20
    kept_for_good = recipe.train.max_steps // recipe.run.keep_every + 1 if recipe.run.keep_every else 0
    held = sum(file.stat().st_size for file in run.sentries.glob("*.safetensors"))
    needed = sentry_bytes * (recipe.run.keep_last + kept_for_good + 2) - held
    mend = "free space, lower run.keep_last, or raise run.keep_every"
    return _too_little(run.path, "the run's sentries need", shutil.disk_usage(run.path).free, needed, mend)


def _download(base: BaseId, missing_bytes: int) -> str | None:
    folder = hub.cache_folder()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    return _too_little(folder, f"{base.name} needs", free, missing_bytes, "free space, or set HF_HOME to another disk")


def _share(recipe: Recipe, base: BaseId, config: Any) -> float:
    """Return what share of the files' bytes beside the tables the body takes in memory."""
    comes_quantized = quantized.is_quantized(config, base.name, recipe.model.quantization)
    return _NF4_SHARE if recipe.model.quantization == "nf4" and not comes_quantized else 1.0


def _is_kept(recipe: Recipe, base: BaseId) -> bool:
    """Say whether the body was quantised and kept before: then the weights are not read again."""
    if recipe.model.quantization != "nf4":
        return False
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return quantized.Source.of(base.commit, recipe.model.compute_dtype, device).is_kept()


def _memory(config: Any, size_bytes: int, share: float, num_new_tokens: int) -> str | None:
    """Compare the memory that is there with the least that base and rows take; a planner refines it later."""
    here = machine()
    name, total = ("this machine", here["memory_bytes"])
    if here["gpus"]:
        name, total = here["gpus"][0]["name"], here["gpus"][0]["memory_bytes"]
    tables = 2 * config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    rows = 8 * num_new_tokens * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    needed = round(max(0, size_bytes - tables) * share) + tables + rows
    return _too_little(name, "base and rows need", total or needed, needed, "use a card with more memory", "of memory")


def _too_little(where: Path | str, what: str, free: int, needed: int, mend: str, kind: str = "free") -> str | None:
    if free >= needed:
        return None
    return f"{where}: {free / GIB:.2f} GiB {kind}, {what} {needed / GIB:.2f} GiB; {mend}"
