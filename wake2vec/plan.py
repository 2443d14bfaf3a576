"""How a step is cut up: it decides speed and memory, never what is computed."""

from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

_CHUNK_LOGITS_BYTES = 256 * 2**20
_USABLE = 0.6
"""Share of the free memory that activations may take by the estimate, which is rough."""


@dataclass(frozen=True)
class Plan:
    """What the loop follows; it is kept in every sentry, so that a resume repeats it.

    Attributes:
        micro_batch_size: blocks computed at a time; it divides the batch.
        checkpointing: whether activations are computed again in the backward pass instead of being kept.
        chunk_tokens: tokens whose logits are held at a time.
    """

    micro_batch_size: int
    checkpointing: bool
    chunk_tokens: int

    def as_json(self) -> dict[str, Any]:
        """Return what a sentry keeps."""
        return asdict(self)


def make_plan(
    config: Any, *, batch_size: int, seq_len: int, vocab_size: int, dtype_bytes: int, free_bytes: int
) -> Plan:
    """Choose the largest micro-batch that fits, without checkpointing if possible.

    Args:
        config: the base model's transformers configuration.
        vocab_size: base and new tokens together.
        free_bytes: memory that is free once base, rows, gradients and optimizer are in place.
    """
    chunk_tokens = max(16, min(batch_size * seq_len, _CHUNK_LOGITS_BYTES // (4 * vocab_size)))
    divisors = [size for size in range(batch_size, 0, -1) if batch_size % size == 0]
    for checkpointing in (False, True):
        for size in divisors:
            tokens = size * seq_len
            if _activation_bytes(config, tokens, seq_len, dtype_bytes, checkpointing) <= _USABLE * free_bytes:
                return Plan(size, checkpointing, chunk_tokens)
    return Plan(1, True, chunk_tokens)


def _activation_bytes(config: Any, tokens: int, seq_len: int, dtype_bytes: int, checkpointing: bool) -> int:
    """Estimate what the backward pass needs kept: ~20 hidden-sized and 6 MLP-sized tensors and the scores a layer."""
    heads = config.num_attention_heads
    layer: int = tokens * (20 * config.hidden_size + 6 * config.intermediate_size + 2 * heads * seq_len) * dtype_bytes
    boundary: int = tokens * config.hidden_size * dtype_bytes
    layers: int = config.num_hidden_layers
    return layer + layers * boundary if checkpointing else layers * layer


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device."""
    if device.type == "cuda":
        free_bytes: int = torch.cuda.mem_get_info(device)[0]
        return free_bytes
    available_bytes: int = psutil.virtual_memory().available
    return available_bytes
