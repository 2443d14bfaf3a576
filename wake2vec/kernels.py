"""The frozen body's kernels: products with 4-bit weights, and fused norms, activations and rotary embeddings.

None changes what is computed: the products are bitsandbytes' own numbers to the bit, wherever the 16-bit weights come
from; the fused kernels are Liger's (arXiv 2410.10989) and round differently in the
last place.

Shapes: K tokens, I and O features in and out, B blocks, T tokens, D hidden size.
"""

import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from wake2vec.base import FrozenBase
from wake2vec.errors import WakeError
from wake2vec.packed import Linear4bit, dequantize_4bit, dequantize_blockwise, dequantize_into

_LARGEST_DIFFERENCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 1e-4}
_CHECKED_TOKENS = 64


def prepare(base: FrozenBase, *, fused: bool) -> None:
    """Give every 4-bit layer a forward of fewer steps, and the model fused kernels if wanted; both once.

    Raises:
        WakeError: the fused kernels do not compute what the model's own code computes.
    """
    for module in _packed(base.body):
        module.weight_OI = functools.partial(_unpack, module)
        module.forward = MethodType(_forward, module)
    if fused:
        _fuse(base)


def place_weights(body: Any, *, kept_layers: int, shared_buffer: bool) -> None:
    """Say where 16-bit weights come from; the packed ones stay where they are.

    Args:
        kept_layers: the first decoder layers, whose weights are unpacked now and kept.
        shared_buffer: whether the other layers' are unpacked a layer at a time into memory that they share, by one
            launch; otherwise a matrix at a time, each time it is used.
    """
    layers = [list(_packed(layer)) for layer in body.layers]
    for layer in layers:
        for module in layer:
            module.weight_OI = functools.partial(_unpack, module)
    for module in itertools.chain(*layers[:kept_layers]):
        module.weight_OI = functools.partial(_same, _unpack(module))
    others = layers[kept_layers:]
    if shared_buffer and others:
        buffer = _SharedBuffer(others)
        for number, layer in enumerate(others):
            for place, module in enumerate(layer):
                module.weight_OI = functools.partial(buffer.weight, number, place)


def _packed(module: nn.Module) -> Iterator[Any]:
    return (part for part in module.modules() if isinstance(part, Linear4bit))


def _same(weight_OI: Tensor) -> Tensor:
    return weight_OI


@torch.no_grad()
def _unpack(module: Any) -> Tensor:
    weight_OI: Tensor = dequantize_4bit(module.weight.data, module.weight.quant_state)
    return weight_OI


@torch.no_grad()
def _unpack_into(module: Any, out_OI: Tensor) -> None:
    if not out_OI.is_cuda:
        out_OI.copy_(_unpack(module))
        return
    state = module.weight.quant_state
    scales_K = dequantize_blockwise(state.absmax, state.state2).add_(state.offset) if state.nested else state.absmax
    # bitsandbytes 0.49.2 has an operator with `out`, which takes no shape for the right one: this is what it calls
    dequantize_into(module.weight.data, scales_K, state.blocksize, state.quant_type, out_OI.dtype, out=out_OI)


class _SharedBuffer:
    """The 16-bit weights of the decoder layer that is being computed.

    On a GPU a layer is unpacked by replaying a CUDA graph: its 21 kernels, called one by one from Python, keep an H100
    waiting.
    """

    def __init__(self, layers: Sequence[Sequence[Any]]) -> None:
        self._layers = layers
        self._weights = [torch.empty_like(_unpack(module)) for module in layers[0]]
        self._holds: int | None = None
        on_gpu = self._weights[0].is_cuda
        self._unpack(0)  # whatever is set up at first use is no part of a graph
        # one stream and one pool: memory is used again within a stream only
        self._pool = torch.cuda.graph_pool_handle() if on_gpu else None
        self._stream = torch.cuda.Stream() if on_gpu else None
        self._graphs = [self._capture(number) for number in range(len(layers))] if on_gpu else []

    def weight(self, number: int, place: int) -> Tensor:
        """Return a weight of a layer, OI; it is gone when another layer's is asked for."""
        if self._holds != number:
            self._holds = None  # a signal may come in the middle
            if self._graphs:
                self._graphs[number].replay()
            else:
                self._unpack(number)
            self._holds = number
        return self._weights[place]

    def _unpack(self, number: int) -> None:
        for module, weight_OI in zip(self._layers[number], self._weights, strict=True):
            _unpack_into(module, weight_OI)

    def _capture(self, number: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            # not torch.cuda.graph: it collects garbage before each capture
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                self._unpack(number)
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph


def _forward(self: Any, x_KI: Tensor) -> Tensor:
    out_KO: Tensor = _Product.apply(x_KI, self)
    return out_KO


class _Product(torch.autograd.Function):
    """x @ weight.T + bias, with a gradient for x alone."""

    @staticmethod
    def forward(ctx: Any, x_KI: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        return functional.linear(x_KI, layer.weight_OI(), layer.bias)

    @staticmethod
    def backward(ctx: Any, grad_KO: Tensor) -> tuple[Tensor, None]:
        return grad_KO @ ctx.layer.weight_OI(), None


def _fuse(base: FrozenBase) -> None:
    """Replace norms, gated activations and rotary embeddings, and compare a layer before and after."""
    before_BTD = _one_layer(base)
    model_type = base.causal_lm.config.model_type
    apply = _liger(model_type)
    if apply is None:
        return
    module: Any = sys.modules[type(base.body).__module__]
    names = dict(vars(module))
    apply(model=base.causal_lm, rope=False, cross_entropy=False, fused_linear_cross_entropy=False)
    vars(module).update(names)  # this model alone: one that is built later may lie on a CPU
    _fuse_rotary(module)
    after_BTD = _one_layer(base)
    difference = float((after_BTD - before_BTD).norm() / before_BTD.norm())
    if not difference <= _LARGEST_DIFFERENCE[base.head_VD.dtype]:
        raise WakeError(
            f"fused kernels: a layer of {model_type} differs by {difference:.2g} from transformers' own, at most "
            f"{_LARGEST_DIFFERENCE[base.head_VD.dtype]:g} is rounding; set train.exact = true, which uses none"
        )


def _liger(model_type: str) -> Callable[..., None] | None:
    """Return what puts Liger's kernels into a model of a type, None where it knows none for it."""
    from liger_kernel.transformers import monkey_patch

    apply: Callable[..., None] | None = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN.get(model_type)
    return apply


def _fuse_rotary(module: Any) -> None:
    """Patch the rotary embedding of a transformers module: Liger's for tensors on a GPU, its own for others."""
    from liger_kernel.transformers import liger_rotary_pos_emb

    plain = module.apply_rotary_pos_emb
    if hasattr(plain, "unfused"):
        return

    @functools.wraps(plain)
    def rotate(q: Tensor, k: Tensor, cos: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        whole = q.is_cuda and cos.shape[-1] == q.shape[-1]  # some models rotate a part of each head only
        rotated: tuple[Tensor, Tensor] = (liger_rotary_pos_emb if whole else plain)(q, k, cos, *args, **options)
        return rotated

    rotate.unfused = plain  # type: ignore[attr-defined]
    module.apply_rotary_pos_emb = rotate


@torch.no_grad()
def _one_layer(base: FrozenBase) -> Tensor:
    """Return the normed hidden states after the first decoder layer alone, in float32."""
    ids_BT = torch.arange(min(_CHECKED_TOKENS, len(base.table_VD)), device=base.table_VD.device)[None]
    embeds_BTD = base.table_VD[ids_BT].to(base.device)
    body: Any = base.body
    layers = body.layers
    body.layers = layers[:1]
    try:
        return base.hidden(embeds_BTD).float()
    finally:
        body.layers = layers
