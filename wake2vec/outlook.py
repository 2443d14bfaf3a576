"""`wake2vec plan`: what a run would load, what each part takes, how its steps would be cut up, and how long they take.

Nothing is loaded but the tokenizer, the text and the lexicon.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from wake2vec import identity
from wake2vec.base import default_device
from wake2vec.config import Recipe
from wake2vec.plan import Work, estimate
from wake2vec.planner import choose_plan, free_memory, leanest
from wake2vec.resume import plan_work

_TIMED_S = 0.3


def outlook(recipe: Recipe, limit_bytes: int | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the plan with its numbers; a limit makes it one for a GPU of that size, wherever it is asked for.

    Raises:
        WakeError: an input is missing or of no use.
    """
    inputs = identity.read_inputs(recipe, None, say)
    work = plan_work(recipe, inputs)
    device = default_device()
    on_gpu = device.type == "cuda" or limit_bytes is not None
    limit = free_memory(device) if limit_bytes is None else limit_bytes
    plan = choose_plan(work, limit, on_gpu=on_gpu, fused=on_gpu and not recipe.train.exact)
    sizes = estimate(plan, work)
    return {
        "base": inputs.base.name,
        "commit": inputs.base.commit,
        "new_words": inputs.num_new_tokens,
        "known_words": inputs.identity["num_known_words"],
        "train_blocks": len(inputs.train_blocks.ids_KT),
        "val_blocks": len(inputs.val_blocks.ids_KT),
        "epochs": recipe.train.max_steps * recipe.train.batch_size / len(inputs.train_blocks.ids_KT),
        "max_steps": recipe.train.max_steps,
        "tokens_per_step": recipe.train.batch_size * recipe.data.seq_len,
        "plan": plan.as_json(),
        "bytes": asdict(sizes),
        "limit_bytes": limit,
        "least_bytes": estimate(leanest(work, fused=plan.fused, host_is_apart=on_gpu), work).peak,
        "flop_per_step": work.flop,
        "matrix_products_s": _matrix_products_s(work, device, recipe) if device.type == "cuda" else None,
    }


def _matrix_products_s(work: Work, device: torch.device, recipe: Recipe) -> float:
    """Time products of the MLP's shape on the card; return what all of a step's would take at that rate."""
    dtype = getattr(torch, recipe.model.compute_dtype)
    left = torch.randn(recipe.train.batch_size * recipe.data.seq_len, work.hidden_size, device=device, dtype=dtype)
    right = torch.randn(work.hidden_size, work.intermediate_size, device=device, dtype=dtype)
    count, seconds = 4, 0.0
    while seconds < _TIMED_S:
        count *= 2
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        for _ in range(count):
            left @ right
        torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
    return work.flop * seconds / count / (2 * left.numel() * work.intermediate_size)


def lines(found: dict[str, Any]) -> list[str]:
    """Return what stands above the table of parts."""
    plan, peak, limit = found["plan"], found["bytes"]["peak"], found["limit_bytes"]
    said = [
        f"{found['base']} ({found['commit'][:19]}): {found['new_words']:,} new words, "
        f"{found['known_words']:,} of the lexicon are tokens already",
        f"{found['max_steps']:,} steps of {found['tokens_per_step']:,} tokens: {found['epochs']:.1f} times through "
        f"{found['train_blocks']:,} blocks; {found['val_blocks']:,} blocks held out",
        f"plan: {', '.join(f'{key} {value}' for key, value in plan.items())}",
        f"peak {peak / 2**30:.2f} GiB of {limit / 2**30:.2f} GiB; the leanest plan takes "
        f"{found['least_bytes'] / 2**30:.2f} GiB",
    ]
    if peak > limit:
        said[-1] += ": it does not fit"
    products = f"{found['flop_per_step'] / 1e12:.1f} TFLOP of matrix products a step"
    if found["matrix_products_s"] is not None:
        seconds = found["matrix_products_s"]
        products += (
            f": {seconds:.3f} s at this card's rate, {seconds * found['max_steps'] / 3600:.2f} h the run at least"
        )
    return [*said, products]
