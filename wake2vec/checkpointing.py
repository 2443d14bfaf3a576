"""Activation checkpointing: only each layer's input is kept, on the device or on the host; the rest is computed again.

Unlike torch's own it can keep the inputs in pinned host memory, copied beside the computation both ways: 48 layers'
inputs are 1 GB for 2,048 tokens of Qwen2.5-14B. It keeps no random state: nothing in a frozen model draws numbers.

Shapes: B blocks, T tokens, D hidden size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class HostStash:
    """A stack of tensors in pinned host memory; the buffers are kept and used again.

    The newest comes back first, and the one before it is fetched ahead, so that the device seldom waits.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._depth = 0
        self._ahead: tuple[int, Tensor] | None = None
        self._stream: torch.cuda.Stream | None = None

    def clear(self) -> None:
        """Forget what an unfinished pass left."""
        self._depth, self._ahead = 0, None

    def put(self, tensor: Tensor) -> int:
        """Copy a tensor out; return its place."""
        place, self._depth = self._depth, self._depth + 1
        if place == len(self._buffers):
            self._buffers.append(_host_buffer(tensor))
        elif self._buffers[place].shape != tensor.shape:
            self._buffers[place] = _host_buffer(tensor)
        if self._stream is None and tensor.is_cuda:
            self._stream = torch.cuda.Stream(tensor.device)
        if self._stream is None:
            self._buffers[place].copy_(tensor)
            return place
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._buffers[place].copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)
        return place

    def take(self, place: int, device: torch.device) -> Tensor:
        """Return the tensor of a place on its device, and begin to fetch the one before it."""
        tensor = self._fetch(place, device)
        self._depth, self._ahead = place, None
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
            tensor.record_stream(torch.cuda.current_stream())
            if place > 0:
                self._ahead = (place - 1, self._fetch(place - 1, device))
        return tensor

    def _fetch(self, place: int, device: torch.device) -> Tensor:
        if self._ahead is not None and self._ahead[0] == place:
            return self._ahead[1]
        if self._stream is None:
            return self._buffers[place].clone()
        with torch.cuda.stream(self._stream):
            return self._buffers[place].to(device, non_blocking=True)


def _host_buffer(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


class Checkpointing:
    """What transformers calls in place of each decoder layer; `stash` is where inputs are kept, None for the device."""

    def __init__(self, stash: HostStash | None) -> None:
        self.stash = stash

    def __call__(self, layer: Callable[..., Any], hidden_BTD: Tensor, *args: Any) -> Any:
        """Return what the layer returns: hidden states BTD, in a tuple where it returns one (Gemma 2 in 4.57)."""
        if not torch.is_grad_enabled():
            return layer(hidden_BTD, *args)
        in_tuple = []

        def run(hidden_BTD: Tensor) -> Tensor:
            output = layer(hidden_BTD, *args)
            in_tuple.append(isinstance(output, tuple))
            result: Tensor = output[0] if in_tuple[-1] else output
            return result

        out_BTD = _Recomputed.apply(run, self.stash, hidden_BTD)
        return (out_BTD,) if in_tuple[0] else out_BTD


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], stash: HostStash | None, hidden_BTD: Tensor) -> Tensor:
        ctx.run, ctx.stash, ctx.device = run, stash, hidden_BTD.device
        if stash is None:
            ctx.save_for_backward(hidden_BTD)
        else:
            ctx.place = stash.put(hidden_BTD)
        return run(hidden_BTD)

    @staticmethod
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[None, None, Tensor | None]:
        kept_BTD = ctx.saved_tensors[0] if ctx.stash is None else ctx.stash.take(ctx.place, ctx.device)
        with torch.enable_grad():
            hidden_BTD = kept_BTD.detach().requires_grad_()
            out_BTD = ctx.run(hidden_BTD)
        torch.autograd.backward(out_BTD, grad_BTD)
        return None, None, hidden_BTD.grad
