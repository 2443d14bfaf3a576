"""What must be there before anything large is downloaded or loaded: room on the volumes, memory."""

import shutil
from pathlib import Path

from wake2vec import hub, quantized
from wake2vec.base import BaseId, default_device, load_config
from wake2vec.config import Recipe
from wake2vec.errors import WakeError
from wake2vec.machine import machine
from wake2vec.plan import Work, estimate
from wake2vec.planner import leanest
from wake2vec.rundir import RunDir

GIB = 2**30


def check(recipe: Recipe, run: RunDir, base: BaseId, work: Work) -> None:
    """Refuse to start what cannot fit, naming everything that lacks room.

    Raises:
        WakeError: with what is free, what is needed, and what to do.
    """
    problems = [_run_volume(recipe, run, work), _memory(work)]
    if base.revision is not None and not _is_kept(recipe, base):
        problems.append(_download(base, hub.download_sizes(base.name, base.revision)[1]))
    found = [problem for problem in problems if problem]
    if found:
        raise WakeError("\n".join(found))


def check_download(recipe: Recipe, base: BaseId) -> None:
    """Refuse a download that is of no use to a recipe, or that the cache's volume has no room for."""
    quantized.is_quantized(load_config(base), base.name, recipe.model.quantization)
    if base.revision is not None and (problem := _download(base, hub.download_sizes(base.name, base.revision)[1])):
        raise WakeError(problem)


def _run_volume(recipe: Recipe, run: RunDir, work: Work) -> str | None:
    """Compare what is free with the sentries that are kept, and one that is being written."""
    values = 1 if recipe.train.optimizer == "adafactor" else 3
    sentry_bytes = 4 * work.num_new_tokens * work.hidden_size * work.num_matrices * values + 2**20
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


def _is_kept(recipe: Recipe, base: BaseId) -> bool:
    """Say whether the body was quantised and kept before: then the weights are not read again."""
    if recipe.model.quantization != "nf4":
        return False
    return quantized.Source.of(base.commit, recipe.model.compute_dtype, default_device()).is_kept()


def _memory(work: Work) -> str | None:
    """Compare the memory that is there in all with what the leanest plan takes."""
    here = machine()
    name, total, on_gpu = "this machine", here["memory_bytes"], bool(here["gpus"])
    if on_gpu:
        name, total = here["gpus"][0]["name"], here["gpus"][0]["memory_bytes"]
    needed = estimate(leanest(work, fused=on_gpu, host_is_apart=on_gpu), work).peak
    return _too_little(name, "the leanest plan needs", total or needed, needed, "use more", "of memory")


def _too_little(where: Path | str, what: str, free: int, needed: int, mend: str, kind: str = "free") -> str | None:
    if free >= needed:
        return None
    return f"{where}: {free / GIB:.2f} GiB {kind}, {what} {needed / GIB:.2f} GiB; {mend}"
