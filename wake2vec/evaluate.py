"""Loss on held-out text, in nats a token and in bits a character.

Bits per character = nats of the scored tokens / ln 2 / characters of those tokens. It does not depend on how the text
is cut into tokens, so models with different vocabularies can be compared by it; nats per token cannot.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from wake2vec.data import PAD, Blocks
from wake2vec.overlay import to_device

TokenLosses = Callable[[Tensor], Tensor]
"""Takes blocks_BT, gives the nats of B * (T - 1) positions."""


def evaluate(
    token_losses: TokenLosses,
    blocks: Blocks,
    *,
    first_new_id: int,
    batch_size: int,
    device: torch.device,
    ids_device: torch.device,
    each: Callable[[Tensor, Tensor], None] | None = None,
) -> dict[str, float]:
    """Return the losses over all blocks.

    A kind of token that the text does not hold has no loss: its key is left out.

    Args:
        device: where the losses come out; `ids_device`: where the blocks are wanted.
        each: is given every batch's targets_M (`PAD` where nothing is scored) and losses_M.
    """
    nats = torch.zeros(2, dtype=torch.float64, device=device)
    counts = torch.zeros(2, dtype=torch.float64, device=device)
    for start in range(0, len(blocks.ids_KT), batch_size):
        blocks_BT = blocks.ids_KT[start : start + batch_size]
        losses_M = token_losses(to_device(blocks_BT, ids_device)).double()
        targets_M = to_device(blocks_BT[:, 1:].flatten(), device)
        if each is not None:
            each(targets_M, losses_M)
        for kind, mask_M in enumerate((targets_M >= first_new_id, (targets_M < first_new_id) & (targets_M != PAD))):
            nats[kind] += (losses_M * mask_M).sum()
            counts[kind] += mask_M.sum()
    new_nats, old_nats = nats.tolist()
    num_new, num_old = counts.tolist()
    result = {
        "val/loss_nats": (new_nats + old_nats) / (num_new + num_old),
        "val/bits_per_char": (new_nats + old_nats) / math.log(2) / blocks.scored_chars,
    }
    if num_new:
        result["val/loss_new_nats"] = new_nats / num_new
    if num_old:
        result["val/loss_old_nats"] = old_nats / num_old
    return result
