"""The loss, and overlay and loss together, against plain models with one table of all words.

Shapes: B batch, T tokens, M scored tokens, D hidden size, V base words, N new words, W = V + N.
"""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen2Config

from wake2vec import loss
from wake2vec.loss import CAST_ROWS, logits, split_cross_entropy
from wake2vec.overlay import WakeOverlay

# no multiples of the 8 columns that the loss aligns to
V, N, D, M = 37, 13, 16, 23
PADDING = 5
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


# --- the loss alone, against one matrix and F.cross_entropy ---


def inputs(dtype: torch.dtype = torch.float64, spread: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    targets_M = torch.randint(0, V + N, (M,), generator=generator)
    targets_M[[3, 4, 20]] = -1
    return {
        "hidden_MD": (spread * torch.randn(M, D, dtype=torch.float64, generator=generator)).to(dtype),
        "targets_M": targets_M,
        "head_VD": torch.randn(V, D, dtype=torch.float64, generator=generator).to(dtype),
        "rows_ND": torch.randn(N, D, dtype=torch.float64, generator=generator).to(
            torch.promote_types(dtype, torch.float32)
        ),
    }


def plain(given: dict[str, Tensor], scale: float, softcap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return nll_M, and the gradients of hidden states and rows, by autograd through the whole logits matrix."""
    hidden_MD = given["hidden_MD"].clone().requires_grad_()
    rows_ND = given["rows_ND"].clone().requires_grad_()
    logits_MW = hidden_MD @ torch.cat([given["head_VD"], rows_ND.to(hidden_MD.dtype)]).T
    if softcap is not None:
        logits_MW = softcap * torch.tanh(logits_MW / softcap)
    wide = torch.promote_types(hidden_MD.dtype, torch.float32)
    nll_M = functional.cross_entropy(logits_MW.to(wide), given["targets_M"], ignore_index=-1, reduction="none")
    grad_hidden_MD, grad_rows_ND = torch.autograd.grad(nll_M.sum() * scale, [hidden_MD, rows_ND])
    return nll_M.detach(), grad_hidden_MD, grad_rows_ND


def ours(given: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows_grad_ND = torch.zeros_like(given["rows_ND"])
    nll_M, grad_hidden_MD = split_cross_entropy(**given, rows_grad_ND=rows_grad_ND, **options)
    assert grad_hidden_MD is not None
    return nll_M, grad_hidden_MD, rows_grad_ND


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("chunk_tokens", "chunk_rows"), [(1, 1000), (7, CAST_ROWS), (M, 8), (1000, 3), (7, 1000)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_is_one_vocabulary_s_cross_entropy(
    dtype: torch.dtype, chunk_tokens: int, chunk_rows: int, softcap: float | None
) -> None:
    given = inputs(dtype)
    found = ours(given, grad_scale=0.3, softcap=softcap, chunk_tokens=chunk_tokens, chunk_rows=chunk_rows)
    torch.testing.assert_close(found, plain(given, 0.3, softcap))


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("targets", [(0, V), (V, V + N), (V - 1, V + 1), (-1, 0)], ids=["old", "new", "border", "none"])
def test_targets_of_one_kind(targets: tuple[int, int], softcap: float | None) -> None:
    given = inputs()
    given["targets_M"] = torch.randint(*targets, (M,), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(ours(given, softcap=softcap, chunk_tokens=7), plain(given, 1.0, softcap))


def test_scores_far_apart_do_not_overflow() -> None:
    given = inputs(torch.float32, spread=1e4)
    found = ours(given)
    assert all(torch.isfinite(tensor).all() for tensor in found)
    torch.testing.assert_close(found, plain(given, 1.0, None))


def test_a_bfloat16_model_s_loss_is_taken_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(torch.bfloat16)
    monkeypatch.setattr(loss, "_GRAD_SLICE_ROWS", 5)
    expected, found = plain(given, 1.0, None), ours(given, chunk_rows=8, chunk_tokens=7)
    assert [tensor.dtype for tensor in found] == [torch.float32, torch.bfloat16, torch.float32]
    torch.testing.assert_close(found[0], expected[0])
    assert_rounds_no_more(found, expected, given, None)


def assert_rounds_no_more(
    found: tuple[Tensor, ...], expected: tuple[Tensor, ...], given: dict[str, Tensor], softcap: float | None
) -> None:
    """Compare losses and gradients with float64's: where sums nearly cancel, narrow ones are mostly rounding.

    Of the bfloat16 hidden gradient 1.04 times a plain model's rounding was measured: it is a sum of four products.
    """
    wide = {name: tensor if name == "targets_M" else tensor.double() for name, tensor in given.items()}
    for found_MD, expected_MD, exact_MD in zip(found, expected, plain(wide, 1.0, softcap), strict=True):
        assert (found_MD - exact_MD).norm() < 1.2 * (expected_MD - exact_MD).norm() + 1e-6 * exact_MD.norm()


def test_gradient_is_added_to_what_the_buffer_holds() -> None:
    given = inputs()
    held_ND = torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    buffer_ND = held_ND.clone()
    split_cross_entropy(**given, rows_grad_ND=buffer_ND, chunk_tokens=7)
    torch.testing.assert_close(buffer_ND, held_ND + plain(given, 1.0, None)[2])


def test_scale_may_be_a_tensor() -> None:
    given = inputs()
    as_tensor = ours(given, grad_scale=torch.tensor(0.3, dtype=torch.float64))
    assert all(map(torch.equal, as_tensor, ours(given, grad_scale=0.3)))


def test_scoring_alone_gives_the_same_losses() -> None:
    given = inputs(torch.float32)
    nll_M, grad_hidden_MD = split_cross_entropy(**given)
    assert grad_hidden_MD is None
    assert torch.equal(nll_M, ours(given)[0])


def test_without_new_words_it_is_the_base_s_cross_entropy() -> None:
    given = inputs()
    given["rows_ND"] = given["rows_ND"][:0]
    given["targets_M"] = given["targets_M"].clamp(max=V - 1)
    torch.testing.assert_close(ours(given, chunk_tokens=7), plain(given, 1.0, None))


def test_no_tokens_is_no_loss() -> None:
    given = inputs()
    given["hidden_MD"], given["targets_M"] = given["hidden_MD"][:0], given["targets_M"][:0]
    nll_M, grad_hidden_MD, rows_grad_ND = ours(given)
    assert nll_M.shape == (0,)
    assert grad_hidden_MD.shape == (0, D)
    assert (rows_grad_ND == 0).all()


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_whole_logits(softcap: float | None) -> None:
    given = inputs()
    expected_MW = given["hidden_MD"] @ torch.cat([given["head_VD"], given["rows_ND"]]).T
    if softcap is not None:
        expected_MW = softcap * torch.tanh(expected_MW / softcap)
    torch.testing.assert_close(logits(given["hidden_MD"], given["head_VD"], given["rows_ND"], softcap), expected_MW)


# --- what it costs ---


class Recorder(TorchDispatchMode):
    """Notes every operation, and the bytes of every tensor that came into being."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        held = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **kwargs)
        self.names.append(func.overloadpacket.__name__)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in held:
                self.sizes.append(tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize(
    ("dtype", "softcap", "buffer_bytes"),
    [
        (torch.float32, None, [4]),
        (torch.float64, None, [8]),
        (torch.float32, 5.0, [4, 4]),
        (torch.bfloat16, None, [2, 4]),
    ],
)
def test_memory_is_a_chunk_s_logits(dtype: torch.dtype, softcap: float | None, buffer_bytes: list[int]) -> None:
    given = inputs(dtype)
    with Recorder() as recorder:
        ours(given, softcap=softcap, chunk_tokens=16)
    columns = 40 + 16  # V and N, rounded up
    buffers = [size for size in recorder.sizes if size >= 16 * columns * min(buffer_bytes)]
    assert buffers == [16 * columns * value_bytes for value_bytes in buffer_bytes]


def test_rows_of_another_dtype_are_cast_a_slice_at_a_time() -> None:
    given = inputs(torch.bfloat16)
    given = {**given, "hidden_MD": given["hidden_MD"][:2], "targets_M": given["targets_M"][:2]}
    given["rows_ND"] = torch.randn(1000, D)
    with Recorder() as recorder:
        split_cross_entropy(**given, chunk_tokens=1, chunk_rows=8)
    assert max(recorder.sizes) == 4 * (40 + 1000)


def test_scoring_alone_multiplies_each_vocabulary_once_a_chunk() -> None:
    given = inputs(torch.float32)
    with Recorder() as recorder:
        split_cross_entropy(**given, chunk_tokens=8)
    assert [name for name in recorder.names if "mm" in name] == ["mm"] * 4 * 3  # aligned words and the rest


def test_the_frozen_head_costs_no_product_for_a_gradient_of_its_own() -> None:
    given = inputs(torch.float32)
    with Recorder() as recorder:
        ours(given, chunk_tokens=M)
    assert [name for name in recorder.names if "mm" in name] == ["mm"] * (4 + 4) + ["addmm_"]


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_nothing_asks_the_device_for_a_value(softcap: float | None) -> None:
    given = inputs(torch.float32)
    with Recorder() as recorder:
        ours(given, softcap=softcap, grad_scale=torch.tensor(0.5))
    assert not set(recorder.names) & {"_local_scalar_dense", "nonzero", "masked_select", "index", "index_put_"}


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@NEEDS_GPU
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_gives_the_same_and_is_not_waited_for(dtype: torch.dtype, softcap: float | None) -> None:
    given = {name: tensor.cuda() for name, tensor in inputs(dtype).items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = ours(given, softcap=softcap, chunk_tokens=7, chunk_rows=4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_rounds_no_more(found, plain(given, 1.0, softcap), given, softcap)


# --- overlay and loss together, against a resized transformers model ---


@dataclass
class Pair:
    """A base model with rows beside it, and the plain model of the same numbers, resized to all words."""

    base: Any
    rows: dict[str, nn.Parameter]
    plain: Any
    softcap: float | None

    @property
    def head_rows(self) -> nn.Parameter:
        return self.rows.get("head", self.rows["input"])


SIZES = {
    "vocab_size": V + PADDING,
    "hidden_size": D,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.5,
}
CONFIGS = {
    "qwen2-untied": lambda: Qwen2Config(**SIZES, tie_word_embeddings=False),
    "llama-tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gemma2-softcap": lambda: Gemma2Config(
        **SIZES, tie_word_embeddings=True, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=30.0
    ),
}


def make_pair(kind: str, dtype: torch.dtype) -> Pair:
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    base = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype)
    head, table = base.get_output_embeddings().weight, base.get_input_embeddings().weight
    with torch.no_grad():
        if config.model_type == "gemma2":
            table *= 10  # so that scores are beyond the cap
        table[V:] = 100 * torch.randn(PADDING, D)
        head[V:] = 100 * torch.randn(PADDING, D)
    plain = copy.deepcopy(base)
    plain.resize_token_embeddings(V + N)
    rows = {}
    for name, matrix in [("input", plain.get_input_embeddings())] + (
        [] if head is table else [("head", plain.get_output_embeddings())]
    ):
        with torch.no_grad():
            matrix.weight[V:] = table.std() * torch.randn(N, D, dtype=dtype)
        wide = torch.promote_types(dtype, torch.float32)
        rows[name] = nn.Parameter(matrix.weight[V:].detach().to(wide, copy=True))
    base.requires_grad_(False)
    return Pair(base, rows, plain, getattr(config, "final_logit_softcapping", None))


def text(num_blocks: int = 4, seq_len: int = 6) -> Tensor:
    """Return blocks of seq_len + 1 ids, a third of them of new words."""
    generator = torch.Generator().manual_seed(6)
    ids = torch.randint(0, V + N, (num_blocks, seq_len + 1), generator=generator)
    return torch.where(torch.rand(ids.shape, generator=generator) < 0.2, V + ids % N, ids)


def train_step(pair: Pair, blocks_BT: Tensor, targets_BT: Tensor, micro_batch: int, **options: Any) -> Tensor:
    """Fill the rows' gradients as the loop does; return nll_BT."""
    base, head_rows = pair.base, pair.head_rows
    overlay = WakeOverlay(base.get_input_embeddings().weight, pair.rows["input"], V)
    head_rows.grad = torch.zeros_like(head_rows)
    num_scored = int((targets_BT >= 0).sum())
    losses = []
    for ids_BT, targets in zip(blocks_BT[:, :-1].split(micro_batch), targets_BT.split(micro_batch), strict=True):
        hidden_BTD = base.model(inputs_embeds=overlay(ids_BT), use_cache=False).last_hidden_state
        nll_M, grad_hidden_MD = split_cross_entropy(
            hidden_BTD.detach().flatten(0, 1),
            targets.flatten(),
            base.get_output_embeddings().weight[:V],
            head_rows.detach(),
            softcap=pair.softcap,
            rows_grad_ND=head_rows.grad,
            grad_scale=1.0 / num_scored,
            **options,
        )
        assert grad_hidden_MD is not None
        hidden_BTD.backward(grad_hidden_MD.view_as(hidden_BTD))
        losses.append(nll_M.view_as(targets))
    return torch.cat(losses)


def plain_step(pair: Pair, blocks_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return nll_BT and the new rows' gradients of the resized model's mean loss."""
    logits_BTW = pair.plain(input_ids=blocks_BT[:, :-1], use_cache=False).logits
    if pair.softcap is not None:
        assert logits_BTW.abs().max() > 0.95 * pair.softcap, "the cap is not felt"
    wide = torch.promote_types(logits_BTW.dtype, torch.float32)
    nll_BT = functional.cross_entropy(
        logits_BTW.transpose(1, 2).to(wide), targets_BT, ignore_index=-1, reduction="none"
    )
    (nll_BT.sum() / (targets_BT >= 0).sum()).backward()
    matrices = {"input": pair.plain.get_input_embeddings(), "head": pair.plain.get_output_embeddings()}
    return nll_BT.detach(), {name: matrices[name].weight.grad[V:] for name in pair.rows}


def dense(grad: Tensor | None) -> Tensor:
    assert grad is not None
    return grad.to_dense() if grad.is_sparse else grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(("micro_batch", "chunk_tokens"), [(4, 24), (3, 5)])
def test_a_resized_model_has_the_same_loss_and_row_gradients(
    kind: str, dtype: torch.dtype, micro_batch: int, chunk_tokens: int
) -> None:
    pair, blocks_BT = make_pair(kind, dtype), text()
    targets_BT = blocks_BT[:, 1:].clone()
    targets_BT[0, 2:4] = -1
    nll_BT = train_step(pair, blocks_BT, targets_BT, micro_batch, chunk_tokens=chunk_tokens)
    expected_nll_BT, expected_grads = plain_step(pair, blocks_BT, targets_BT)
    torch.testing.assert_close(nll_BT, expected_nll_BT)
    for name, parameter in pair.rows.items():
        torch.testing.assert_close(dense(parameter.grad), expected_grads[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_bfloat16_base_scores_as_its_plain_model_does(kind: str) -> None:
    pair, blocks_BT = make_pair(kind, torch.bfloat16), text()
    with torch.no_grad():
        overlay = WakeOverlay(pair.base.get_input_embeddings().weight, pair.rows["input"], V)
        hidden_BTD = pair.base.model(inputs_embeds=overlay(blocks_BT), use_cache=False).last_hidden_state
        head_VD = pair.base.get_output_embeddings().weight[:V]
        found_MW = logits(hidden_BTD.flatten(0, 1), head_VD, pair.head_rows, pair.softcap)
        expected_BTW = pair.plain(input_ids=blocks_BT, use_cache=False).logits
    assert torch.equal(found_MW, expected_BTW.flatten(0, 1))


@pytest.mark.parametrize("kind", CONFIGS)
def test_micro_batches_change_nothing_but_rounding(kind: str) -> None:
    blocks_BT = text(num_blocks=16)
    whole, single = make_pair(kind, torch.float32), make_pair(kind, torch.float32)
    nll_BT = train_step(whole, blocks_BT, blocks_BT[:, 1:], micro_batch=16)
    torch.testing.assert_close(train_step(single, blocks_BT, blocks_BT[:, 1:], micro_batch=1), nll_BT)
    for name in whole.rows:
        torch.testing.assert_close(dense(single.rows[name].grad), dense(whole.rows[name].grad))
