"""Adafactor and AdamW over the trained rows, a slice of rows at a time: no temporary has the size of the rows.

The gradient is read from `parameter.grad`: dense, or sparse with one entry for each looked-up token, repeated rows
adding up. A sparse gradient means the same as the dense one that it stands for and is never made dense. It is only
read; between steps the caller zeroes a dense one in place and sets a sparse one to None (added to a sparse gradient,
the next would make it longer).

A step does not wait for the device, and on a CPU repeats to the bit.

Shapes: N rows, D hidden size, K entries of a gradient (N where it is dense), S of them in one slice.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from wake2vec.errors import WakeError

_SLICE_ROWS = 4096
RowIndex = slice | Tensor
"""Which rows a slice of a gradient belongs to."""


class Optimizer(Protocol):
    """What the loop asks of an optimizer."""

    step_count: int

    def step(self, learning_rate: float, grad_scale: Tensor | float = 1.0) -> None:
        """Update the rows in place from their gradients times `grad_scale`."""

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the live state, which the next step overwrites, named parameter/what."""

    def load_state_tensors(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Continue from the state after `step` steps."""


def make_optimizer(
    kind: str, params: Mapping[str, nn.Parameter], *, weight_decay: float = 0.0, slice_rows: int = _SLICE_ROWS
) -> Optimizer:
    """Return the "adafactor" or "adamw" optimizer of named row parameters."""
    if kind == "adafactor":
        return Adafactor(params, weight_decay=weight_decay, slice_rows=slice_rows)
    assert kind == "adamw", f"no optimizer is called {kind!r}"
    return AdamW(params, weight_decay=weight_decay, slice_rows=slice_rows)


@torch.no_grad()
def grad_norm(params: Iterable[nn.Parameter], slice_rows: int = _SLICE_ROWS) -> Tensor:
    """Return the L2 norm of all gradients together as a 0-dim float64 tensor."""
    grads = [_row_gradient(param) for param in params]
    total = torch.zeros((), dtype=torch.float64, device=grads[0].values_KD.device)
    for grad in grads:
        for _, values_SD in grad.slices(slice_rows):
            # Not vector_norm: over 2e7 float32 values it is 1e-3 off on a CPU.
            total += values_SD.square().sum()
    return total.sqrt_()


def clip_scale(norm: Tensor, max_grad_norm: float) -> Tensor | float:
    """Return the factor that `torch.nn.utils.clip_grad_norm_` would multiply the gradients by; 0 turns it off."""
    return (max_grad_norm / (norm + 1e-6)).clamp(max=1.0) if max_grad_norm > 0 else 1.0


class Adafactor:
    """Adafactor (arXiv 1804.04235) without momentum, with the learning rate from outside.

    The same as transformers' with scale_parameter, relative_step and warmup_init off and beta1 None. Its state is one
    number a row and one a column.
    """

    decay_rate = -0.8
    eps = 1e-30
    clip_threshold = 1.0

    def __init__(
        self, params: Mapping[str, nn.Parameter], *, weight_decay: float = 0.0, slice_rows: int = _SLICE_ROWS
    ) -> None:
        self.params = dict(params)
        self.weight_decay = weight_decay
        self.slice_rows = slice_rows
        self.step_count = 0
        self._state = {}
        for name, param in self.params.items():
            self._state[f"{name}/exp_avg_sq_row"] = param.new_zeros(param.shape[0], requires_grad=False)
            self._state[f"{name}/exp_avg_sq_col"] = param.new_zeros(param.shape[1], requires_grad=False)

    @torch.no_grad()
    def step(self, learning_rate: float, grad_scale: Tensor | float = 1.0) -> None:
        """Update the rows in place from their gradients times `grad_scale`."""
        self.step_count += 1
        for name, param in self.params.items():
            grad = _row_gradient(param)
            row_N, col_D = self._state[f"{name}/exp_avg_sq_row"], self._state[f"{name}/exp_avg_sq_col"]
            self._update_statistics(grad, row_N, col_D, grad_scale * grad_scale)
            row_factor_N, col_factor_D = (row_N / row_N.mean()).rsqrt_(), col_D.rsqrt()
            rms = self._update_rms(grad, row_factor_N, col_factor_D) * grad_scale / math.sqrt(param.numel())
            row_factor_N *= -learning_rate * grad_scale / (rms / self.clip_threshold).clamp(min=1.0)
            if self.weight_decay != 0.0:
                param.add_(param, alpha=-self.weight_decay * learning_rate)
            for index, values_SD in grad.slices(self.slice_rows):
                _add_to_rows(param, index, (values_SD * col_factor_D).mul_(row_factor_N[index].unsqueeze(1)))

    def _update_statistics(self, grad: "_RowGradient", row_N: Tensor, col_D: Tensor, scale_sq: Tensor | float) -> None:
        """Move the running means of squared gradients, by row and by column."""
        keep = 1.0 - math.pow(self.step_count, self.decay_rate)
        row_N.mul_(keep).add_(self.eps * (1.0 - keep))
        col_sum_D = torch.zeros_like(col_D, dtype=torch.float64)
        for index, values_SD in grad.slices(self.slice_rows):
            square_SD = values_SD.square()
            _add_to_rows(row_N, index, square_SD.mean(1) * (scale_sq * (1.0 - keep)))
            col_sum_D += square_SD.sum(0)
        col_mean_D = (col_sum_D * (scale_sq / row_N.shape[0])).to(col_D.dtype)
        col_D.mul_(keep).add_(col_mean_D.add_(self.eps), alpha=1.0 - keep)

    def _update_rms(self, grad: "_RowGradient", row_factor_N: Tensor, col_factor_D: Tensor) -> Tensor:
        """Return sqrt(sum((row_factor * col_factor * gradient)^2)) without the product itself."""
        # float64: the factors of rows that never had a gradient are near 1e15.
        row_sq_N, col_sq_D = row_factor_N.double().square(), col_factor_D.square()
        total = torch.zeros((), dtype=torch.float64, device=row_factor_N.device)
        for index, values_SD in grad.slices(self.slice_rows):
            total += torch.dot((values_SD.square() @ col_sq_D).double(), row_sq_N[index])
        return total.sqrt_()

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the live state, which the next step overwrites, named parameter/what."""
        return dict(self._state)

    def load_state_tensors(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Continue from the state after `step` steps."""
        _load_state(self._state, tensors)
        self.step_count = step


class AdamW:
    """AdamW (arXiv 1711.05101), the same as torch's with its default betas and eps."""

    betas = (0.9, 0.999)
    eps = 1e-8

    def __init__(
        self, params: Mapping[str, nn.Parameter], *, weight_decay: float = 0.0, slice_rows: int = _SLICE_ROWS
    ) -> None:
        self.params = dict(params)
        self.weight_decay = weight_decay
        self.slice_rows = slice_rows
        self.step_count = 0
        self._state = {}
        for name, param in self.params.items():
            self._state[f"{name}/exp_avg"] = torch.zeros_like(param, requires_grad=False)
            self._state[f"{name}/exp_avg_sq"] = torch.zeros_like(param, requires_grad=False)

    @torch.no_grad()
    def step(self, learning_rate: float, grad_scale: Tensor | float = 1.0) -> None:
        """Update the rows in place from their gradients times `grad_scale`."""
        self.step_count += 1
        beta1, beta2 = self.betas
        step_size = learning_rate / (1.0 - beta1**self.step_count)
        spread = math.sqrt(1.0 - beta2**self.step_count)
        for name, param in self.params.items():
            mean_ND, square_ND = self._state[f"{name}/exp_avg"], self._state[f"{name}/exp_avg_sq"]
            mean_ND.mul_(beta1)
            square_ND.mul_(beta2)
            for index, values_SD in _row_gradient(param).slices(self.slice_rows):
                scaled_SD = values_SD * grad_scale
                _add_to_rows(mean_ND, index, scaled_SD, alpha=1.0 - beta1)
                _add_to_rows(square_ND, index, scaled_SD.square_(), alpha=1.0 - beta2)
            if self.weight_decay != 0.0:
                param.mul_(1.0 - learning_rate * self.weight_decay)
            # Rows without a gradient move too: their mean still carries them.
            for rows in _slices(param.shape[0], self.slice_rows):
                denominator_SD = square_ND[rows].sqrt().div_(spread).add_(self.eps)
                param[rows].addcdiv_(mean_ND[rows], denominator_SD, value=-step_size)

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the live state, which the next step overwrites, named parameter/what."""
        return dict(self._state)

    def load_state_tensors(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Continue from the state after `step` steps."""
        _load_state(self._state, tensors)
        self.step_count = step


@dataclass(frozen=True)
class _RowGradient:
    """A gradient as entries of rows; `rows_K` is None where entry i is row i."""

    values_KD: Tensor
    rows_K: Tensor | None

    def slices(self, slice_rows: int) -> Iterator[tuple[RowIndex, Tensor]]:
        """Yield the entries a slice at a time, each with the rows that they belong to."""
        for entries in _slices(self.values_KD.shape[0], slice_rows):
            yield entries if self.rows_K is None else self.rows_K[entries], self.values_KD[entries]


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _row_gradient(param: nn.Parameter) -> _RowGradient:
    """Return a parameter's gradient with every row in one entry, besides entries that are zero.

    That is what coalescing is for, but it waits for the device to say how many rows there are.
    """
    grad = param.grad
    assert grad is not None, "no gradient: the backward pass did not reach the rows"
    if not grad.is_sparse:
        return _RowGradient(grad, None)
    rows_K, values_KD = grad._indices()[0], grad._values()
    if grad.is_coalesced():
        return _RowGradient(values_KD, rows_K)
    entry_K = torch.arange(rows_K.shape[0], device=rows_K.device)
    first_entry_N = entry_K.new_full((param.shape[0],), rows_K.shape[0]).scatter_reduce_(0, rows_K, entry_K, "amin")
    return _RowGradient(torch.zeros_like(values_KD).index_add_(0, first_entry_N[rows_K], values_KD), rows_K)


def _add_to_rows(target: Tensor, index: RowIndex, source: Tensor, alpha: float = 1.0) -> None:
    """Add to some rows of a tensor, or entries of a vector, in place."""
    if isinstance(index, slice):
        target[index].add_(source, alpha=alpha)
    else:
        target.index_add_(0, index, source, alpha=alpha)


def _load_state(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy saved state over the live one, if it is exactly what this optimizer saves."""
    wanted = {name: _describe(tensor) for name, tensor in state.items()}
    given = {name: _describe(tensor) for name, tensor in tensors.items()}
    problems = [
        f"optimizer state {name}: {given.get(name, 'nothing')} is saved, {wanted.get(name, 'nothing')} is needed; "
        "continue with the model and optimizer that saved it, or start another run"
        for name in sorted(wanted.keys() | given.keys())
        if wanted.get(name) != given.get(name)
    ]
    if problems:
        raise WakeError("\n".join(problems))
    for name, tensor in tensors.items():
        state[name].copy_(tensor)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
