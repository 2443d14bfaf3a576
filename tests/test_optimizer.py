"""Shapes: N rows, D hidden size, K entries of a sparse gradient."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.optimization import Adafactor as PlainAdafactor

from wake2vec.errors import WakeError
from wake2vec.optimizer import Optimizer, clip_scale, grad_norm, make_optimizer

N, D, K, STEPS = 13, 8, 9, 25
KINDS = ["adafactor", "adamw"]


def make_params(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(8)
    return {
        name: nn.Parameter(torch.randn(N, D, dtype=torch.float64, generator=generator).to(dtype))
        for name in ("input", "head")
    }


def dense_gradient(step: int, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a gradient whose rows, columns and steps differ in size, with zeros, from the first step on too."""
    generator = torch.Generator().manual_seed(100 * step + (name == "head"))
    grad_ND = torch.randn(N, D, dtype=torch.float64, generator=generator)
    grad_ND *= torch.logspace(-3, 1, N, dtype=torch.float64)[:, None] * torch.linspace(0.1, 3, D, dtype=torch.float64)
    grad_ND[step % N] = 0
    grad_ND[:, 3] *= step >= 4
    return (grad_ND * (1 + step % 3)).to(dtype)


def sparse_gradient(step: int, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a gradient of K entries as the overlay's: repeated rows, an entry of zeros, most rows without any."""
    generator = torch.Generator().manual_seed(100 * step + (name == "head"))
    rows_K = torch.randint(0, N, (K,), generator=generator)
    rows_K[1] = rows_K[0]
    values_KD = torch.randn(K, D, dtype=torch.float64, generator=generator).to(dtype)
    values_KD[2] = 0
    return torch.sparse_coo_tensor(rows_K[None], values_KD, (N, D), check_invariants=True)


def rate(step: int) -> float:
    return 0.01 * (1 + step % 4)


def plain_optimizer(kind: str, params: dict[str, nn.Parameter], weight_decay: float) -> torch.optim.Optimizer:
    if kind == "adamw":
        return torch.optim.AdamW(params.values(), lr=1.0, weight_decay=weight_decay)
    return PlainAdafactor(
        params.values(),
        lr=1.0,
        scale_parameter=False,
        relative_step=False,
        warmup_init=False,
        weight_decay=weight_decay,
    )


def train(
    optimizer: Optimizer, params: dict[str, nn.Parameter], gradient: Callable[..., Tensor], steps: range, **options: Any
) -> None:
    for step in steps:
        for name, param in params.items():
            param.grad = gradient(step, name, param.dtype)
        optimizer.step(rate(step), **options)


def plain_train(
    kind: str, gradient: Callable[..., Tensor], dtype: torch.dtype, weight_decay: float = 0.0, scale: float = 1.0
) -> dict[str, nn.Parameter]:
    params = make_params(dtype)
    optimizer = plain_optimizer(kind, params, weight_decay)
    for step in range(STEPS):
        for name, param in params.items():
            param.grad = gradient(step, name, dtype).to_dense() * scale
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.step()
    return params


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("slice_rows", [1, 3, 4096])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("gradient", [dense_gradient, sparse_gradient])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_the_plain_optimizer(
    kind: str, gradient: Callable[..., Tensor], weight_decay: float, slice_rows: int, dtype: torch.dtype
) -> None:
    params = make_params(dtype)
    optimizer = make_optimizer(kind, params, weight_decay=weight_decay, slice_rows=slice_rows)
    train(optimizer, params, gradient, range(STEPS))
    for name, expected in plain_train(kind, gradient, dtype, weight_decay).items():
        torch.testing.assert_close(params[name], expected)


@pytest.mark.parametrize("scale", [0.25, torch.tensor(0.25)])
@pytest.mark.parametrize("gradient", [dense_gradient, sparse_gradient])
@pytest.mark.parametrize("kind", KINDS)
def test_scale_multiplies_the_gradient(kind: str, gradient: Callable[..., Tensor], scale: Tensor | float) -> None:
    params = make_params()
    train(make_optimizer(kind, params, slice_rows=3), params, gradient, range(STEPS), grad_scale=scale)
    for name, expected in plain_train(kind, gradient, torch.float32, scale=0.25).items():
        torch.testing.assert_close(params[name], expected)


def test_adafactor_shrinks_a_sudden_large_update() -> None:
    # a gradient a thousand times the running mean: without the threshold the rows would jump
    params = make_params()
    optimizer = make_optimizer("adafactor", params, slice_rows=3)
    train(optimizer, params, dense_gradient, range(10))
    before = params["head"].detach().clone()
    train(optimizer, params, lambda *args: 1000 * dense_gradient(*args), range(10, 11))
    update_ND = (params["head"].detach() - before) / rate(10)
    torch.testing.assert_close(update_ND.square().mean().sqrt(), torch.tensor(1.0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_coalesced_gradient_means_the_same(kind: str) -> None:
    coalesced, repeated = make_params(), make_params()
    train(make_optimizer(kind, repeated), repeated, sparse_gradient, range(STEPS))
    train(make_optimizer(kind, coalesced), coalesced, lambda *a: sparse_gradient(*a).coalesce(), range(STEPS))
    for name in repeated:
        torch.testing.assert_close(coalesced[name], repeated[name])


@pytest.mark.parametrize("gradient", [dense_gradient, sparse_gradient])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_only_reads_the_gradients(kind: str, gradient: Callable[..., Tensor]) -> None:
    params = make_params()
    train(make_optimizer(kind, params), params, gradient, range(1), grad_scale=0.5)
    for name, param in params.items():
        assert param.grad is not None
        assert torch.equal(param.grad.to_dense(), gradient(0, name).to_dense())


# --- state ---


@pytest.mark.parametrize("gradient", [dense_gradient, sparse_gradient])
@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_optimizer_goes_on_to_the_bit(kind: str, gradient: Callable[..., Tensor]) -> None:
    params = make_params()
    optimizer = make_optimizer(kind, params)
    train(optimizer, params, gradient, range(7))
    saved = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    resumed = {name: nn.Parameter(param.detach().clone()) for name, param in params.items()}
    again = make_optimizer(kind, resumed)
    again.load_state_tensors(saved, optimizer.step_count)
    train(optimizer, params, gradient, range(7, 14))
    train(again, resumed, gradient, range(7, 14))
    assert again.step_count == optimizer.step_count == 14
    assert all(torch.equal(resumed[name], params[name]) for name in params)
    assert all(torch.equal(again.state_tensors()[name], tensor) for name, tensor in optimizer.state_tensors().items())


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_of_the_state_counts(kind: str) -> None:
    names = make_optimizer(kind, make_params()).state_tensors()
    for left_out in [*names, "step"]:
        params = make_params()
        optimizer = make_optimizer(kind, params)
        train(optimizer, params, dense_gradient, range(3))
        saved = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
        if left_out != "step":
            saved[left_out].zero_()
        again = {name: nn.Parameter(param.detach().clone()) for name, param in params.items()}
        resumed = make_optimizer(kind, again)
        resumed.load_state_tensors(saved, 0 if left_out == "step" else 3)
        train(optimizer, params, dense_gradient, range(3, 4))
        train(resumed, again, dense_gradient, range(3, 4))
        assert any(not torch.equal(again[name], params[name]) for name in params), left_out


@pytest.mark.parametrize("kind", KINDS)
def test_state_tensors_are_the_live_ones(kind: str) -> None:
    params = make_params()
    optimizer = make_optimizer(kind, params)
    held = optimizer.state_tensors()
    train(optimizer, params, dense_gradient, range(1))
    optimizer.load_state_tensors({name: tensor.clone() for name, tensor in held.items()}, 1)
    assert all(tensor is held[name] for name, tensor in optimizer.state_tensors().items())
    assert all((tensor != 0).any() for tensor in held.values())
    assert not any(tensor.requires_grad for tensor in held.values())


def test_adafactor_s_state_is_one_number_a_row_and_column() -> None:
    param = nn.Parameter(torch.empty(44_223, 5_120, device="meta"))
    state = make_optimizer("adafactor", {"input": param}).state_tensors()
    assert {name: tensor.numel() for name, tensor in state.items()} == {
        "input/exp_avg_sq_row": 44_223,
        "input/exp_avg_sq_col": 5_120,
    }
    assert sum(tensor.nbytes for tensor in state.values()) < 1_000_000


def test_another_model_s_or_optimizer_s_state_is_refused_whole() -> None:
    optimizer = make_optimizer("adafactor", make_params())
    saved = {name: tensor.clone() + 1 for name, tensor in optimizer.state_tensors().items()}
    saved["input/exp_avg_sq_row"] = torch.zeros(N + 1)
    saved["head/exp_avg_sq_col"] = saved["head/exp_avg_sq_col"].double()
    saved["head/exp_avg"] = saved.pop("head/exp_avg_sq_row")
    with pytest.raises(WakeError) as caught:
        optimizer.load_state_tensors(saved, 3)
    lines = [line.partition(";")[0] for line in str(caught.value).split("\n")]
    assert lines == [
        "optimizer state head/exp_avg: float32 [13] is saved, nothing is needed",
        "optimizer state head/exp_avg_sq_col: float64 [8] is saved, float32 [8] is needed",
        "optimizer state head/exp_avg_sq_row: nothing is saved, float32 [13] is needed",
        "optimizer state input/exp_avg_sq_row: float32 [14] is saved, float32 [13] is needed",
    ]
    assert optimizer.step_count == 0
    assert all((tensor == 0).all() for tensor in optimizer.state_tensors().values())


# --- clipping ---


@pytest.mark.parametrize("max_grad_norm", [0.5, 1e9])
@pytest.mark.parametrize("slice_rows", [1, 3, 4096])
def test_clipping_is_torch_s(slice_rows: int, max_grad_norm: float) -> None:
    params = make_params()
    params["input"].grad, params["head"].grad = sparse_gradient(0, "input"), dense_gradient(0, "head")
    plain = make_params()
    for name, param in plain.items():
        grad = params[name].grad
        assert grad is not None
        param.grad = grad.to_dense().clone()
    norm = grad_norm(params.values(), slice_rows)
    expected = torch.nn.utils.clip_grad_norm_(plain.values(), max_grad_norm)
    torch.testing.assert_close(norm, expected, check_dtype=False)
    before = params["head"].grad
    assert before is not None
    assert plain["head"].grad is not None
    torch.testing.assert_close(before * clip_scale(norm, max_grad_norm), plain["head"].grad)


def test_no_clipping() -> None:
    assert clip_scale(torch.tensor(1e9), 0.0) == 1.0


def test_a_missing_gradient_is_noticed() -> None:
    with pytest.raises(AssertionError, match="did not reach"):
        make_optimizer("adafactor", make_params()).step(0.1)


# --- what it costs ---


class Recorder(TorchDispatchMode):
    """Notes every operation, and the values of the largest tensor that came into being."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        held = {part.untyped_storage().data_ptr() for tensor in inputs for part in strided(tensor)}
        out = func(*args, **kwargs)
        self.names.add(func.overloadpacket.__name__)
        for part in itertools.chain.from_iterable(strided(t) for t in tree_leaves(out) if isinstance(t, Tensor)):
            if part.untyped_storage().data_ptr() not in held:
                self.largest = max(self.largest, part.numel())
        return out


def strided(tensor: Tensor) -> list[Tensor]:
    return [tensor._indices(), tensor._values()] if tensor.is_sparse else [tensor]


@pytest.mark.parametrize(("gradient", "largest"), [(dense_gradient, 3 * D), (sparse_gradient, K * D)])
@pytest.mark.parametrize("kind", KINDS)
def test_temporaries_are_a_slice_or_the_entries_of_a_sparse_gradient(
    kind: str, gradient: Callable[..., Tensor], largest: int
) -> None:
    params = make_params()
    optimizer = make_optimizer(kind, params, weight_decay=0.1, slice_rows=3)
    for name, param in params.items():
        param.grad = gradient(0, name)
    with Recorder() as recorder:
        optimizer.step(0.01, clip_scale(grad_norm(params.values(), 3), 1.0))
    assert recorder.largest == largest < N * D


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_asks_the_device_for_a_value(kind: str) -> None:
    params = make_params()
    optimizer = make_optimizer(kind, params, weight_decay=0.1)
    params["input"].grad, params["head"].grad = sparse_gradient(0, "input"), dense_gradient(0, "head")
    with Recorder() as recorder:
        optimizer.step(0.01, clip_scale(grad_norm(params.values()), 1.0))
    assert not recorder.names & {"_local_scalar_dense", "nonzero", "masked_select", "_coalesce", "_unique2"}


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("gradient", [dense_gradient, sparse_gradient])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_gives_the_same_and_is_not_waited_for(kind: str, gradient: Callable[..., Tensor]) -> None:
    params = make_params()
    on_gpu = {name: nn.Parameter(param.detach().cuda()) for name, param in params.items()}
    optimizer = make_optimizer(kind, on_gpu, weight_decay=0.1, slice_rows=3)
    plain = make_optimizer(kind, params, weight_decay=0.1)
    for step in range(STEPS):
        for name in params:
            params[name].grad = gradient(step, name)
            on_gpu[name].grad = gradient(step, name).cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step(rate(step), clip_scale(grad_norm(on_gpu.values()), 1.0))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        plain.step(rate(step), clip_scale(grad_norm(params.values()), 1.0))
    for name, param in params.items():
        torch.testing.assert_close(on_gpu[name].cpu(), param)
