"""The frozen body's kernels: the same numbers from packed and kept weights; fused kernels within rounding."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import make_base
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
)

from wake2vec import base, kernels
from wake2vec.errors import WakeError

SIZES = {
    "vocab_size": 576,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
FAMILIES: dict[str, type[PretrainedConfig]] = {
    "qwen2": Qwen2Config,
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "phi3": Phi3Config,
    "gemma2": Gemma2Config,
}


def frozen_model(family: str, device: str, dtype: torch.dtype) -> base.FrozenBase:
    others = {"head_dim": 32, "query_pre_attn_scalar": 32} if family == "gemma2" else {}
    attention = "eager" if family in base.EAGER_ATTENTION else "sdpa"
    torch.manual_seed(1)
    config = FAMILIES[family](**SIZES, **others)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).to(device)
    return base.freeze(model, 500, family)


@pytest.fixture
def packed(tmp_path: Path) -> base.FrozenBase:
    folder = make_base(tmp_path / "base")
    identity = base.identify(str(folder), str(folder), None)
    vocab_size = len(base.load_tokenizer(identity))
    cpu = torch.device("cpu")
    return base.load(identity, vocab_size, quantization="nf4", compute_dtype="float32", device=cpu)


def outcome(frozen: base.FrozenBase) -> tuple[torch.Tensor, torch.Tensor]:
    embeds_BTD = frozen.table_VD[torch.arange(20)[None]].clone().requires_grad_()
    hidden_BTD = frozen.hidden(embeds_BTD)
    hidden_BTD.square().sum().backward()
    assert embeds_BTD.grad is not None
    return hidden_BTD.detach(), embeds_BTD.grad


def test_products_are_bitsandbytes_own(packed: base.FrozenBase) -> None:
    expected = outcome(packed)
    before = base.fingerprint(packed)
    kernels.prepare(packed, fused=False)
    for num_layers, shared in ((0, False), (1, False), (2, True), (0, True), (1, True), (0, False)):
        kernels.place_weights(packed.body, kept_layers=num_layers, shared_buffer=shared)
        for mine, theirs in zip(outcome(packed), expected, strict=True):
            assert torch.equal(mine, theirs)
    assert base.fingerprint(packed) == before


def test_weights_come_from_where_the_plan_says(packed: base.FrozenBase) -> None:
    kernels.prepare(packed, fused=False)
    first, second = (layer.mlp.up_proj for layer in packed.body.layers)
    kernels.place_weights(packed.body, kept_layers=1, shared_buffer=False)
    assert first.weight_OI().shape == (first.out_features, first.in_features)
    assert first.weight_OI().data_ptr() == first.weight_OI().data_ptr()
    kept = first.weight_OI().clone()
    kernels.place_weights(packed.body, kept_layers=0, shared_buffer=True)
    buffer = first.weight_OI()
    assert torch.equal(buffer, kept)
    assert second.weight_OI().data_ptr() == buffer.data_ptr()
    assert not torch.equal(buffer, kept)  # it holds the second layer's now
    kernels.place_weights(packed.body, kept_layers=0, shared_buffer=False)
    assert torch.equal(first.weight_OI(), kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_models_of_the_process_are_left_alone(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger puts its classes in the place of transformers' own, and they know no CPU."""
    before = outcome(frozen_model(family, "cpu", torch.float32))
    monkeypatch.setattr(kernels, "_one_layer", lambda _: torch.ones(1))  # the fused one would need a GPU
    fused = frozen_model(family, "cpu", torch.float32)
    kernels.prepare(fused, fused=True)
    assert "Liger" in repr(fused.body.layers[0])
    other = frozen_model(family, "cpu", torch.float32)
    assert "Liger" not in repr(other.body)
    for mine, theirs in zip(outcome(other), before, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_kernels_round_as_much_as_the_plain_ones(family: str, dtype: torch.dtype) -> None:
    """The oracle is the plain model in float64; both are as far from it as their type's rounding."""
    exact, plain, fused = (frozen_model(family, "cuda", d) for d in (torch.float64, dtype, dtype))
    assert {frozen.head_VD.dtype for frozen in (plain, fused)} == {dtype}
    exact.causal_lm.load_state_dict({k: v.double() for k, v in plain.causal_lm.state_dict().items()})
    fused.causal_lm.load_state_dict(plain.causal_lm.state_dict())
    kernels.prepare(fused, fused=True)
    ids_BT = torch.randint(500, (2, 64), device="cuda", generator=torch.Generator("cuda").manual_seed(0))

    def both(frozen: base.FrozenBase) -> list[torch.Tensor]:
        embeds_BTD = plain.table_VD[ids_BT].to(frozen.table_VD.dtype).requires_grad_()
        hidden_BTD = frozen.hidden(embeds_BTD)
        hidden_BTD.sin().sum().backward()
        assert embeds_BTD.grad is not None
        return [hidden_BTD.detach().double(), embeds_BTD.grad.double()]

    for true, of_plain, of_fused in zip(both(exact), both(plain), both(fused), strict=True):
        error_plain, error_fused = ((found - true).norm() / true.norm() for found in (of_plain, of_fused))
        print(f"{family} {dtype} plain {error_plain:.3g}, fused {error_fused:.3g}")
        assert error_fused <= 1.5 * error_plain + 1e-7, f"plain {error_plain:.3g}, fused {error_fused:.3g}"


@pytest.mark.gpu
def test_fused_kernels_that_compute_something_else_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = frozen_model("qwen2", "cuda", torch.float32)

    def scale_a_norm(model: torch.nn.Module, **_: bool) -> None:
        model.model.layers[0].input_layernorm.weight.data.mul_(torch.linspace(1, 1.5, 128, device="cuda"))

    monkeypatch.setattr(kernels, "_liger", lambda _: scale_a_norm)
    with pytest.raises(WakeError, match=r"fused kernels: a layer of qwen2 differs by 0\.\d+ from transformers' own"):
        kernels.prepare(frozen, fused=True)


def test_bitsandbytes_is_imported_without_pip_and_compiler(tmp_path: Path) -> None:
    pip = tmp_path / "pip"
    pip.write_text(f"#!/bin/sh\ntouch {tmp_path}/asked\n")
    pip.chmod(0o755)
    program = (
        "import os, sys, torch; before = torch.compile, os.environ['PATH']; import wake2vec.packed;"
        "assert (torch.compile, os.environ['PATH']) == before; sys.exit('torch._inductor.compile_fx' in sys.modules)"
    )
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", program], env=environment, check=False).returncode == 0
    assert not (tmp_path / "asked").exists()
