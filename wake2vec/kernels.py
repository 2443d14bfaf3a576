"""The frozen body's kernels: products with 4-bit weights, and fused norms, activations and rotary embeddings.

None changes what is computed: the products are bitsandbytes' own numbers to the bit, with the 16-bit weights of some
layers kept instead of unpacked each time; the fused kernels are Liger's (arXiv 2410.10989) and round differently in the
last place.

Shapes: K tokens, I and O features in and out, B blocks, T tokens, D hidden size.
"""

import functools
import importlib
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import Tensor
from torch.nn import functional

from wake2vec.base import FrozenBase
from wake2vec.errors import WakeError

_LARGEST_DIFFERENCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 1e-4}
_CHECKED_TOKENS = 64


def prepare(base: FrozenBase, *, fused: bool) -> None:
    """Give every 4-bit layer a forward of fewer steps, and the model fused kernels if wanted; both once.

    Raises:
        WakeError: the fused kernels do not compute what the model's own code computes.
    """
    for module in base.body.modules():
        if isinstance(module, Linear4bit):
            module.kept_weight_OI = None
            module.forward = MethodType(_forward, module)
    if fused:
        _fuse(base)


def keep_weights(body: Any, num_layers: int) -> None:
    """Keep the unpacked weights of the first decoder layers beside the packed ones; of the others drop them."""
    for index, layer in enumerate(body.layers):
        for module in layer.modules():
            if isinstance(module, Linear4bit):
                module.kept_weight_OI = _unpack(module) if index < num_layers else None


def _forward(self: Any, x_KI: Tensor) -> Tensor:
    out_KO: Tensor = _Product.apply(x_KI, self)
    return out_KO


class _Product(torch.autograd.Function):
    """x @ weight.T + bias, with a gradient for x alone."""

    @staticmethod
    def forward(ctx: Any, x_KI: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        return functional.linear(x_KI, _weight(layer), layer.bias)

    @staticmethod
    def backward(ctx: Any, grad_KO: Tensor) -> tuple[Tensor, None]:
        return grad_KO @ _weight(ctx.layer), None


def _weight(layer: Any) -> Tensor:
    return _unpack(layer) if layer.kept_weight_OI is None else layer.kept_weight_OI


@torch.no_grad()
def _unpack(layer: Any) -> Tensor:
    weight_OI: Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight_OI


def _fuse(base: FrozenBase) -> None:
    """Replace norms, gated activations and rotary embeddings, and compare a layer before and after."""
    before_BTD = _one_layer(base)
    model_type = base.causal_lm.config.model_type
    apply = _liger(model_type)
    if apply is None:
        return
    apply(model=base.causal_lm, rope=False, cross_entropy=False, fused_linear_cross_entropy=False)
    _fuse_rotary(type(base.body).__module__)
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


def _fuse_rotary(module_name: str) -> None:
    """Patch the rotary embedding of a transformers module: Liger's for tensors on a GPU, its own for others."""
    from liger_kernel.transformers import liger_rotary_pos_emb

    module: Any = importlib.import_module(module_name)
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
