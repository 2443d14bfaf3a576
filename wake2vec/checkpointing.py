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
        self._leaving: tuple[Tensor, torch.cuda.Event] | None = None
        self._coming: tuple[int, Tensor, torch.cuda.Event] | None = None
        self._stream: torch.cuda.Stream | None = None

    def clear(self) -> None:
        """Forget what an unfinished pass left."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        self._depth, self._leaving, self._coming = 0, None, None

    def put(self, tensor: Tensor) -> int:
        """Copy a tensor out; return its place."""
        place, self._depth = self._depth, self._depth + 1
        if place == len(self._buffers):
            self._buffers.append(_host_buffer(tensor))
        elif self._buffers[place].shape != tensor.shape:
            self._buffers[place] = _host_buffer(tensor)
        if not tensor.is_cuda:
            self._buffers[place].copy_(tensor)
            return place
        self._stream = self._stream or torch.cuda.Stream(tensor.device)
        # The tensor is held here until its copy is over: by then the computation is a layer further.
        if self._leaving is not None:
            torch.cuda.current_stream().wait_event(self._leaving[1])
        self._leaving = (tensor, self._copy(tensor, self._buffers[place]))
        return place

    def take(self, place: int, device: torch.device) -> Tensor:
        """Return the tensor of a place on its device, and begin to fetch the one before it."""
        if device.type != "cuda":
            return self._buffers[place].clone()
        if self._coming is None or self._coming[0] != place:
            self._coming = self._fetch(place, device)
        _, tensor, here = self._coming
        torch.cuda.current_stream().wait_event(here)
        self._depth, self._leaving = place, None
        self._coming = self._fetch(place - 1, device) if place > 0 else None
        return tensor

    def _fetch(self, place: int, device: torch.device) -> tuple[int, Tensor, torch.cuda.Event]:
        buffer = self._buffers[place]
        tensor = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
        return place, tensor, self._copy(buffer, tensor)

    def _copy(self, source: Tensor, target: Tensor) -> torch.cuda.Event:
        """Copy beside the computation, after all of it that is under way; return the event of its end."""
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        event = torch.cuda.Event()
        event.record(self._stream)
        return event


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

        out_BTD: Tensor = _Recomputed.apply(run, self.stash, hidden_BTD)
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
