"""The model that is trained: a frozen base and, beside it, the new words' rows.

Shapes: B batch, T tokens, D hidden size, V base tokens, N new words, M scored positions.
"""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from wake2vec import kernels
from wake2vec.base import FrozenBase
from wake2vec.checkpointing import Checkpointing, HostStash
from wake2vec.loss import split_cross_entropy
from wake2vec.overlay import WakeOverlay, to_device
from wake2vec.plan import Plan


class WakeModel:
    """A frozen base with trained rows.

    `rows` holds fp32 parameters: `input`, and `head` where the base's head is its own. A tied model has one set,
    which is looked up and scored.
    """

    def __init__(self, base: FrozenBase, rows: dict[str, Tensor], plan: Plan) -> None:
        assert set(rows) == ({"input"} if base.tied else {"input", "head"})
        self.base = base
        self.rows = {name: nn.Parameter(tensor.to(base.device, torch.float32)) for name, tensor in rows.items()}
        self.overlay = WakeOverlay(base.table_VD, self.rows["input"], len(base.table_VD))
        kernels.prepare(base, fused=plan.fused)
        self.follow(plan)

    def follow(self, plan: Plan) -> None:
        """Compute as a plan says from now on; the base table stays where it is."""
        self.chunk_tokens = plan.chunk_tokens
        self._stash = HostStash() if plan.activations == "offloaded" else None
        if plan.activations == "kept":
            self.base.causal_lm.gradient_checkpointing_disable()
        else:
            self.base.causal_lm._set_gradient_checkpointing(True, Checkpointing(self._stash))
        kernels.place_weights(self.base.body, kept_layers=plan.kept_layers, shared_buffer=plan.shared_buffer)

    @property
    def head_rows(self) -> nn.Parameter:
        """Return the rows that are scored."""
        return self.rows["input" if self.base.tied else "head"]

    def zero_grad(self) -> None:
        """Forget the gradients: the head rows' buffer is kept and zeroed, the input rows' is sparse and dropped."""
        if self._stash is not None:
            self._stash.clear()
        for parameter in self.rows.values():
            if parameter is not self.head_rows:
                parameter.grad = None
            elif parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            else:
                parameter.grad.zero_()

    def backward(self, blocks_BT: Tensor) -> Tensor:
        """Add the gradient of a micro-batch's summed loss to the rows'; return that sum in nats, 0-dim float64.

        The sum, not the mean: micro-batches add up whatever they hold, and small means would underflow in float16.

        Args:
            blocks_BT: seq_len + 1 ids a block, -1 where there is no token; best on `ids_device`.
        """
        hidden_MD = self._hidden(blocks_BT)
        nll_M, grad_MD = split_cross_entropy(
            hidden_MD.detach(),
            to_device(blocks_BT[:, 1:].flatten(), self.base.device),
            self.base.head_VD,
            self.head_rows.detach(),
            softcap=self.base.softcap,
            rows_grad_ND=self.head_rows.grad,
            grad_scale=1.0,
            chunk_tokens=self.chunk_tokens,
        )
        hidden_MD.backward(grad_MD)
        return nll_M.sum(dtype=torch.float64)

    @torch.no_grad()
    def token_losses(self, blocks_BT: Tensor) -> Tensor:
        """Return the loss in nats of every scored position M = B * seq_len; 0 where there is no token."""
        nll_M, _ = split_cross_entropy(
            self._hidden(blocks_BT),
            to_device(blocks_BT[:, 1:].flatten(), self.base.device),
            self.base.head_VD,
            self.head_rows.detach(),
            softcap=self.base.softcap,
            chunk_tokens=self.chunk_tokens,
        )
        return nll_M

    @torch.no_grad()
    def base_token_losses(self, blocks_BT: Tensor) -> Tensor:
        """Return the same for the base model alone, without new words; the blocks are its own tokenizer's."""
        base = self.base
        nll_M, _ = split_cross_entropy(
            base.hidden(base.table_VD[blocks_BT[:, :-1].clamp(min=0)].to(base.device)).flatten(0, 1),
            to_device(blocks_BT[:, 1:].flatten(), self.base.device),
            base.head_VD,
            self.head_rows.detach()[:0],
            softcap=base.softcap,
            chunk_tokens=self.chunk_tokens,
        )
        return nll_M

    @property
    def ids_device(self) -> torch.device:
        """Return where ids are looked up without a wait: beside the base table."""
        return self.base.table_VD.device

    def peak_memory_bytes(self) -> int:
        """Return the most memory held so far: the device's, or the process's on a CPU."""
        if self.base.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.base.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _hidden(self, blocks_BT: Tensor) -> Tensor:
        return self.base.hidden(self.overlay(blocks_BT[:, :-1].clamp(min=0))).flatten(0, 1)

    @contextmanager
    def shuffled_rows(self, order_N: Tensor) -> Iterator[None]:
        """Give every new word another's rows for a while; the true ones wait in host memory."""
        kept = {name: parameter.detach().cpu().clone() for name, parameter in self.rows.items()}
        try:
            self._set_rows({name: rows_ND[order_N] for name, rows_ND in kept.items()})
            yield
        finally:
            self._set_rows(kept)

    @torch.no_grad()
    def _set_rows(self, rows: dict[str, Tensor]) -> None:
        for name, parameter in self.rows.items():
            parameter.copy_(rows[name])
