"""Which plan is followed: the fastest whose estimate fits, of a few hundred.

A run's own plan is followed as long as it fits, so that a resume computes the same numbers.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import psutil
import torch

from wake2vec.errors import WakeError
from wake2vec.plan import ACTIVATIONS, Plan, Work, estimate

_CHUNKS = (2048, 1024, 512, 256, 128, 64, 32, 16)
USABLE = 0.95
"""Share of the limit that is planned for: the allocator loses a few percent to fragments."""
_STEP_DOWN = 0.95
"""Share of a plan that ran out of memory which the next one is made for, before `USABLE`."""
# What decides between two plans, in seconds on an H100 (bench/RESULTS.md, 2026-11-23); only their relation matters.
_FLOP_PER_S = 6.5e14
_ELEMENTWISE = 0.25
"""Time of norms, activations and attention over that of the matrix products."""
_UNPACK_BYTES_PER_S = 1.7e12
"""16-bit bytes that bitsandbytes writes a second."""
_CALL_LAYER_S, _CALL_UNPACK_S = 1.8e-3, 1.4e-3
"""Time that Python takes for a pass through a layer, and for unpacking its matrices one by one."""
_LOSS_S, _CHUNK_S = 9e-9, 1.5e-12
"""Time of the loss a token and word row of 5,120 values, and of a chunk a word and value."""


def make_plan(
    work: Work, limit_bytes: int, *, fused: bool, host_is_apart: bool, like: Plan | None = None
) -> Plan | None:
    """Return the fastest plan whose estimate fits, or None.

    Args:
        limit_bytes: memory for everything, weights included.
        host_is_apart: whether moving things to the host frees the device's memory (not on a CPU).
        like: a plan in use, whose base table stays where it is.
    """
    fitting = [
        filled
        for plan in _candidates(work, fused=fused, host_is_apart=host_is_apart, like=like)
        if (filled := _with_kept_layers(plan, work, limit_bytes)) is not None
    ]
    return min(fitting, key=lambda plan: (_cost(plan, work), estimate(plan, work).peak), default=None)


def leaner_plan(plan: Plan, work: Work, *, host_is_apart: bool) -> Plan | None:
    """Return a plan after one ran out of memory: the fastest that takes clearly less, else the leanest, else None."""
    before = estimate(plan, work).peak
    found = make_plan(work, int(before * _STEP_DOWN), fused=plan.fused, host_is_apart=host_is_apart, like=plan)
    last = found or leanest(work, fused=plan.fused, host_is_apart=host_is_apart, like=plan)
    return last if estimate(last, work).peak < before else None


def leanest(work: Work, *, fused: bool, host_is_apart: bool, like: Plan | None = None) -> Plan:
    """Return the plan that takes least."""
    plans = _candidates(work, fused=fused, host_is_apart=host_is_apart, like=like)
    return min(plans, key=lambda plan: estimate(plan, work).peak)


def _candidates(work: Work, *, fused: bool, host_is_apart: bool, like: Plan | None) -> Iterator[Plan]:
    sizes = [size for size in range(work.batch_size, 0, -1) if work.batch_size % size == 0]
    activations = ACTIVATIONS if host_is_apart else ACTIVATIONS[:2]
    tables = [like.table_on_host] if like else [False, True] if host_is_apart and not work.tied else [False]
    buffers = [False, True] if host_is_apart and work.packed else [False]
    for size, where, table, buffer in itertools.product(sizes, activations, tables, buffers):
        tokens = size * work.seq_len
        for chunk in [c for c in _CHUNKS if c < tokens] + [min(tokens, _CHUNKS[0])]:
            yield Plan(size, where, chunk, table_on_host=table, shared_buffer=buffer, fused=fused)


def _with_kept_layers(plan: Plan, work: Work, limit_bytes: int) -> Plan | None:
    """Return the plan with as many layers unpacked as fit, None if it does not fit at all."""
    spare = int(limit_bytes * USABLE) - estimate(plan, work).peak
    if spare < 0:
        return None
    layers = min(work.num_layers, spare // (work.layer_params * work.element_bytes)) if work.packed else 0
    return replace(plan, kept_layers=layers, shared_buffer=plan.shared_buffer and layers < work.num_layers)


def _cost(plan: Plan, work: Work) -> float:
    """Return about how long a step takes: whichever is slower, the device or Python calling it, and the loss."""
    count = work.batch_size // plan.micro_batch_size
    tokens = plan.micro_batch_size * work.seq_len
    passes = 2 if plan.activations == "kept" else 3
    unpackings = (2 if plan.shared_buffer else passes) * work.packed
    layers = work.num_layers - plan.kept_layers
    on_device = work.body_flop / count * passes * (1 + _ELEMENTWISE) / _FLOP_PER_S
    on_device += unpackings * layers * work.layer_params * work.element_bytes / _UNPACK_BYTES_PER_S
    on_device *= 1.02 if plan.activations == "offloaded" else 1.0
    calling = work.num_layers * passes * _CALL_LAYER_S
    calling += unpackings * layers * _CALL_UNPACK_S * (not plan.shared_buffer)
    words = (work.vocab_size + work.num_new_tokens) * work.hidden_size
    loss = words * (tokens * _LOSS_S / 1e6 + math.ceil(tokens / plan.chunk_tokens) * _CHUNK_S)
    return count * (max(on_device, calling) + loss + 2e-3 * plan.table_on_host)


def saved_plan(header: Mapping[str, Any]) -> Plan | None:
    """Return the plan that a sentry holds, None where another version wrote another kind."""
    try:
        return Plan(**header)
    except TypeError:
        return None


def choose_plan(work: Work, limit_bytes: int, *, on_gpu: bool, fused: bool, saved: Plan | None = None) -> Plan:
    """Return the run's own plan where it can be followed, otherwise the fastest that fits.

    Where none fits by the estimate it is the one that takes least: the trial before the first step will tell.

    Args:
        fused: whether fused kernels may be used: on a GPU, where there is a C compiler, and not for an exact run.
    """
    if saved is not None and _possible(saved, work, limit_bytes, fused=fused, on_gpu=on_gpu):
        return saved
    plan = make_plan(work, limit_bytes, fused=fused, host_is_apart=on_gpu)
    return plan or leanest(work, fused=fused, host_is_apart=on_gpu)


def _possible(plan: Plan, work: Work, limit_bytes: int, *, fused: bool, on_gpu: bool) -> bool:
    apart = plan.table_on_host or plan.activations == "offloaded"
    return plan.fused == fused and (on_gpu or not apart) and estimate(plan, work).peak <= limit_bytes


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process may still allocate, and those it holds without need."""
    if device.type == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        held_bytes = torch.cuda.memory_reserved(device)
        share: float = torch.cuda.get_per_process_memory_fraction(device)
        return min(free_bytes + held_bytes, int(share * total_bytes))
    available_bytes: int = psutil.virtual_memory().available
    return available_bytes


def limit_memory(device: torch.device, limit_bytes: int) -> None:
    """Make torch fail above a limit, as a smaller card would.

    Raises:
        WakeError: the card has less.
    """
    total_bytes = torch.cuda.mem_get_info(device)[1]
    if limit_bytes > total_bytes:
        raise WakeError(
            f"--gpu-memory: {limit_bytes / 2**30:.1f} GiB asked for, {torch.cuda.get_device_name(device)} has "
            f"{total_bytes / 2**30:.1f} GiB; ask for less"
        )
    torch.cuda.set_per_process_memory_fraction(limit_bytes / total_bytes, device)
