"""Shapes: B batch, T tokens, D hidden size, V base table rows, N new rows."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Gemma2Config

from wake2vec.overlay import WakeOverlay

FIRST_NEW, PADDING, NEW, DIM = 11, 3, 5, 4
IDS_BT = torch.tensor([[0, 11, 10, 15, 13], [13, 3, 13, 5, 11]])


def make(dtype: torch.dtype = torch.float32, rows_dtype: torch.dtype = torch.float32) -> WakeOverlay:
    """Return an overlay whose padding rows would show: they are not numbers."""
    generator = torch.Generator().manual_seed(5)
    base_VD = torch.randn(FIRST_NEW + PADDING, DIM, generator=generator)
    base_VD[FIRST_NEW:] = torch.nan
    rows_ND = torch.randn(NEW, DIM, generator=generator)
    return WakeOverlay(base_VD.to(dtype), nn.Parameter(rows_ND.to(rows_dtype)), FIRST_NEW)


def plain_table(overlay: WakeOverlay) -> Tensor:
    return torch.cat([overlay.base_VD[:FIRST_NEW], overlay.rows_ND.detach().to(overlay.base_VD.dtype)])


def weights(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*IDS_BT.shape, DIM, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plain_gradient(overlay: WakeOverlay, ids_BT: Tensor, weights_BTD: Tensor) -> Tensor:
    """Return the new rows' gradient of one table in the rows' dtype: a narrow base does not narrow the sum."""
    table = plain_table(overlay).to(overlay.rows_ND.dtype).requires_grad_()
    (torch.nn.functional.embedding(ids_BT, table) * weights_BTD).sum().backward()
    assert table.grad is not None
    return table.grad[FIRST_NEW:]


def rows_gradient(overlay: WakeOverlay) -> Tensor:
    assert overlay.rows_ND.grad is not None
    return overlay.rows_ND.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_looks_up_what_one_table_of_all_rows_holds(dtype: torch.dtype) -> None:
    overlay = make(dtype)
    every_id = torch.arange(FIRST_NEW + NEW)
    assert torch.equal(overlay(every_id[None]), plain_table(overlay)[None])
    assert torch.equal(overlay(IDS_BT), plain_table(overlay)[IDS_BT])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_row_gradient_is_that_of_one_table(dtype: torch.dtype) -> None:
    overlay = make(dtype, torch.promote_types(dtype, torch.float32))
    (overlay(IDS_BT) * weights(dtype=dtype)).sum().backward()
    assert rows_gradient(overlay).is_sparse
    expected_ND = plain_gradient(overlay, IDS_BT, weights(dtype=dtype))
    torch.testing.assert_close(rows_gradient(overlay).to_dense(), expected_ND)


def test_old_tokens_leave_exact_zeros_even_where_their_gradient_is_not_a_number() -> None:
    overlay = make()
    weights_BTD = weights()
    weights_BTD[IDS_BT < FIRST_NEW] = torch.nan
    overlay(IDS_BT).backward(weights_BTD)
    dense = rows_gradient(overlay).to_dense()
    used = torch.zeros(NEW, dtype=torch.bool)
    used[IDS_BT[IDS_BT >= FIRST_NEW] - FIRST_NEW] = True
    assert torch.isfinite(dense).all()
    assert (dense[~used] == 0).all()
    assert (dense[used] != 0).all()


def test_a_batch_of_old_tokens_has_a_zero_gradient() -> None:
    overlay = make()
    overlay(torch.tensor([[0, 3, 10]])).sum().backward()
    assert (rows_gradient(overlay).to_dense() == 0).all()


def test_micro_batches_add_up() -> None:
    overlay = make()
    for row in range(2):
        (overlay(IDS_BT[row : row + 1]) * weights()[row : row + 1]).sum().backward()
    assert rows_gradient(overlay).is_sparse
    torch.testing.assert_close(rows_gradient(overlay).to_dense(), plain_gradient(overlay, IDS_BT, weights()))


def test_gradient_is_added_in_place_to_a_dense_one() -> None:
    overlay = make()
    from_head_ND = torch.randn(NEW, DIM, generator=torch.Generator().manual_seed(9))
    buffer = overlay.rows_ND.grad = from_head_ND.clone()
    for row in range(2):
        (overlay(IDS_BT[row : row + 1]) * weights()[row : row + 1]).sum().backward()
    assert overlay.rows_ND.grad is buffer
    torch.testing.assert_close(buffer, from_head_ND + plain_gradient(overlay, IDS_BT, weights()))


def test_base_table_is_neither_copied_nor_registered_nor_moved() -> None:
    table = nn.Parameter(torch.randn(FIRST_NEW, DIM))
    overlay = WakeOverlay(table, nn.Parameter(torch.randn(NEW, DIM)), FIRST_NEW)
    assert overlay.base_VD.data_ptr() == table.data_ptr()
    assert set(overlay.state_dict()) == {"rows_ND"}
    assert [name for name, _ in overlay.named_parameters()] == ["rows_ND"]
    overlay(torch.tensor([[1, 12]])).sum().backward()
    assert table.grad is None
    assert overlay.double().base_VD.dtype == torch.float32


def test_ids_past_the_last_row_are_not_taken_for_others() -> None:
    with pytest.raises(IndexError):
        make()(torch.tensor([[FIRST_NEW + NEW]]))


def test_nothing_asks_the_device_for_a_value() -> None:
    class Names(TorchDispatchMode):
        seen: set[str] = set()  # noqa: RUF012 - one use

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    overlay = make()
    with Names() as names:
        overlay(IDS_BT).sum().backward()
    assert "embedding" in names.seen
    assert not names.seen & {"_local_scalar_dense", "nonzero", "masked_select", "index", "_coalesce", "_unique2"}


def test_gemma2_scales_embeddings_that_are_passed_in() -> None:
    config = Gemma2Config(
        vocab_size=FIRST_NEW + PADDING,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
    )
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    rows = nn.Parameter(torch.randn(NEW, 16))
    resized = copy.deepcopy(base)
    resized.resize_token_embeddings(FIRST_NEW + NEW)
    with torch.no_grad():
        resized.get_input_embeddings().weight[FIRST_NEW:] = rows
        embeds_BTD = WakeOverlay(base.get_input_embeddings().weight, rows, FIRST_NEW)(IDS_BT)
        hidden_BTD = base.model(inputs_embeds=embeds_BTD, use_cache=False).last_hidden_state
        expected_BTD = resized.model(input_ids=IDS_BT, use_cache=False).last_hidden_state
        unscaled_BTD = base.model(inputs_embeds=embeds_BTD / 16**0.5, use_cache=False).last_hidden_state
    assert torch.equal(hidden_BTD, expected_BTD)
    assert not torch.isclose(unscaled_BTD, expected_BTD).all()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("table_on_gpu", [True, False])
def test_a_gpu_gives_the_same_and_is_not_waited_for(table_on_gpu: bool) -> None:
    overlay = make(torch.bfloat16)
    table_VD = overlay.base_VD.cuda() if table_on_gpu else overlay.base_VD
    on_gpu = WakeOverlay(table_VD, nn.Parameter(overlay.rows_ND.detach().cuda()), FIRST_NEW)
    ids_BT = IDS_BT.cuda() if table_on_gpu else IDS_BT
    weights_BTD = weights(dtype=torch.bfloat16)
    weights_on_gpu_BTD = weights_BTD.cuda()
    # ids and looked-up rows that come from the host are copied, which counts as waiting
    torch.cuda.set_sync_debug_mode("error" if table_on_gpu else "default")
    try:
        found_BTD = on_gpu(ids_BT)
        found_BTD.backward(weights_on_gpu_BTD)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected_BTD = overlay(IDS_BT)
    expected_BTD.backward(weights_BTD)
    assert torch.equal(found_BTD.cpu(), expected_BTD)
    torch.testing.assert_close(rows_gradient(on_gpu).to_dense().cpu(), rows_gradient(overlay).to_dense())
    assert torch.equal(on_gpu(IDS_BT.cuda()), found_BTD)
