"""Cross entropy over two vocabularies, the frozen base head's and the new words', without the logits matrix.

Shapes: M scored tokens, C tokens of one chunk, D hidden size, V base words, N new words, S rows of one slice,
W columns of a chunk's scores; a trailing 1 is a kept dimension. Target ids are 0 .. V - 1 for base words and V + i for
new word i.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_IGNORED = -1
# Matrix products take far slower kernels for scores that lie askew in memory or have an odd number of columns: 89 ms a
# step of Qwen2.5-14B, not 23 (H100). So each vocabulary begins at a multiple of this many columns, as does the next
# token's row, and words past a vocabulary's last such multiple are multiplied apart.
_ALIGNED_COLUMNS = 8
# Rows of one slice of the row gradient, where a matrix product cannot add to it by itself.
_GRAD_SLICE_ROWS = 4096
CAST_ROWS = 8192
"""New rows that are cast to the head's dtype at a time."""


@torch.no_grad()
def logits(hidden_MD: Tensor, head_VD: Tensor, rows_ND: Tensor, softcap: float | None = None) -> Tensor:
    """Return all logits, V + N columns in the hidden states' dtype: for sampling and checks, not for training."""
    words = _Words(head_VD, rows_ND, hidden_MD.dtype, CAST_ROWS)
    scores_MW = words.scores(hidden_MD, hidden_MD.new_empty(hidden_MD.shape[0], words.width))
    logits_MW = torch.cat([scores_MW[:, : words.num_base], scores_MW[:, words.new_at :][:, : words.num_new]], 1)
    return logits_MW if softcap is None else logits_MW.div_(softcap).tanh_().mul_(softcap)


@torch.no_grad()
def split_cross_entropy(
    hidden_MD: Tensor,
    targets_M: Tensor,
    head_VD: Tensor,
    rows_ND: Tensor,
    *,
    softcap: float | None = None,
    rows_grad_ND: Tensor | None = None,
    grad_scale: Tensor | float = 1.0,
    chunk_tokens: int = 512,
    chunk_rows: int = CAST_ROWS,
) -> tuple[Tensor, Tensor | None]:
    """Return nll_M in nats (0 where the target is -1) and, with `rows_grad_ND`, the gradient of the hidden states.

    The numbers are those of a plain model of one concatenated head: logits in the hidden states' dtype (and the
    soft-cap on them), everything after in float32, or float64 for float64 hidden states.

    With `rows_grad_ND`: grad_hidden_MD = grad_scale * d(sum nll)/d(hidden) in the hidden states' dtype, and
    rows_grad_ND += grad_scale * d(sum nll)/d(rows) in place. Nothing is computed for the frozen head. Without it, no
    gradient work at all and grad_hidden_MD is None. A mean over a step's tokens is grad_scale = 1 / their number; in
    float16 such small gradients underflow, so leave it 1 there and scale in the optimizer.

    Memory beside the arguments and results, with W = V + N: chunk_tokens * W * 4 bytes in float32, 6 in bfloat16 or
    float16 (2 for the logits, 4 for their exponentials), 8 in float32 with a soft-cap; and `chunk_rows` of the new rows
    (a multiple of 8, or it is slow) in the hidden states' dtype where they have another: they are cast anew for every
    chunk of tokens, which costs less time than a copy of all of them costs memory. Nothing waits for the device.
    """
    assert targets_M.shape == hidden_MD.shape[:1], f"{tuple(targets_M.shape)} targets, hidden {tuple(hidden_MD.shape)}"
    words = _Words(head_VD, rows_ND, hidden_MD.dtype, chunk_rows)
    wide = torch.promote_types(hidden_MD.dtype, torch.float32)
    scores_CW = hidden_MD.new_empty(min(chunk_tokens, hidden_MD.shape[0]), words.width)
    # The exponentials overwrite the logits, unless those are narrower or are needed for the soft-cap's derivative.
    exp_in_place = wide == hidden_MD.dtype and softcap is None
    exp_CW = scores_CW if exp_in_place else torch.empty_like(scores_CW, dtype=wide)
    nll_M = hidden_MD.new_empty(hidden_MD.shape[0], dtype=wide)
    grad_hidden_MD = None if rows_grad_ND is None else torch.empty_like(hidden_MD)

    for start in range(0, hidden_MD.shape[0], chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        hidden_CD = hidden_MD[chunk]
        scores_CW, exp_CW = scores_CW[: len(hidden_CD)], exp_CW[: len(hidden_CD)]
        scored_C1, target_C1 = words.targets(targets_M[chunk])
        words.scores(hidden_CD, scores_CW)
        nll_C1, sum_C1 = _exponentials(words, scores_CW, exp_CW, target_C1, softcap)
        nll_C1 = torch.where(scored_C1, nll_C1, 0.0)
        nll_M[chunk] = nll_C1.squeeze(1)
        if grad_hidden_MD is not None and rows_grad_ND is not None:
            weight_C1 = scored_C1.to(wide) * grad_scale
            _score_gradient(scores_CW, exp_CW, target_C1, nll_C1, sum_C1, weight_C1, softcap)
            grad_hidden_MD[chunk] = words.hidden_gradient(scores_CW, wide)
            _add_row_gradient(rows_grad_ND, scores_CW[:, words.new_at :], hidden_CD)
    return nll_M, grad_hidden_MD


class _Words:
    """Both vocabularies' rows, and where their scores stand side by side: base words first, then the new ones."""

    def __init__(self, head_VD: Tensor, rows_ND: Tensor, dtype: torch.dtype, chunk_rows: int) -> None:
        assert head_VD.dtype == dtype, f"the head is {head_VD.dtype}, the hidden states are {dtype}"
        self.head_VD = head_VD
        self.rows_ND = rows_ND
        self.chunk_rows = chunk_rows
        self.num_base, self.num_new = head_VD.shape[0], rows_ND.shape[0]
        self.new_at = _round_up(self.num_base)
        self.width = _round_up(self.new_at + self.num_new)

    def _parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield all rows, the new ones cast a slice at a time to the head's dtype, each part with its columns."""
        for rows in _aligned_slices(self.num_base, self.num_base):
            yield rows, self.head_VD[rows]
        for rows in _aligned_slices(self.num_new, self.chunk_rows):
            columns = slice(self.new_at + rows.start, self.new_at + rows.stop)
            yield columns, self.rows_ND[rows].to(self.head_VD.dtype)

    def targets(self, targets_C: Tensor) -> tuple[Tensor, Tensor]:
        """Return whether each token is scored and its target's column, or column 0 where it is not scored."""
        shift_C = torch.where(targets_C >= self.num_base, self.new_at - self.num_base, 0)
        return (targets_C != _IGNORED).unsqueeze(1), (targets_C + shift_C).clamp(min=0).unsqueeze(1)

    def scores(self, hidden_CD: Tensor, out_CW: Tensor) -> Tensor:
        """Write the logits before any soft-cap; the gaps between them are left as they are."""
        for columns, rows_SD in self._parts():
            torch.mm(hidden_CD, rows_SD.T, out=out_CW[:, columns])
        return out_CW

    def hide_gaps(self, scores_CW: Tensor) -> None:
        """Take the columns of no word out of the sum."""
        scores_CW[:, self.num_base : self.new_at] = -torch.inf
        scores_CW[:, self.new_at + self.num_new :] = -torch.inf

    def hidden_gradient(self, grad_CW: Tensor, wide: torch.dtype) -> Tensor:
        """Return the hidden states' gradient from that of the logits."""
        total_CD = grad_CW.new_zeros(grad_CW.shape[0], self.head_VD.shape[1], dtype=wide)
        for columns, rows_SD in self._parts():
            total_CD += _product(grad_CW[:, columns], rows_SD, wide)
        return total_CD


def _aligned_slices(count: int, size: int) -> Iterator[slice]:
    """Cut a range into slices of `size`, the last one in two where its length is not a multiple of the alignment."""
    aligned = count - count % _ALIGNED_COLUMNS
    for start in range(0, aligned, max(1, size)):
        yield slice(start, min(start + size, aligned))
    if aligned < count:
        yield slice(aligned, count)


def _round_up(columns: int) -> int:
    return -(-columns // _ALIGNED_COLUMNS) * _ALIGNED_COLUMNS


def _exponentials(
    words: _Words, scores_CW: Tensor, exp_CW: Tensor, target_C1: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Fill exp_CW with exp(logit - row maximum); return the targets' nll_C1 and the rows' sum_C1.

    With a soft-cap, scores_CW is left as tanh(logit / softcap), which its derivative is made of.
    """
    capped_CW = scores_CW
    if softcap is not None:
        scores_CW.div_(softcap).tanh_()
        capped_CW = torch.mul(scores_CW, softcap, out=exp_CW)
    words.hide_gaps(capped_CW)
    torch.sub(capped_CW, capped_CW.amax(1, keepdim=True).to(exp_CW.dtype), out=exp_CW)
    target_score_C1 = exp_CW.gather(1, target_C1)
    sum_C1 = exp_CW.exp_().sum(1, keepdim=True)
    return sum_C1.log() - target_score_C1, sum_C1


def _score_gradient(
    scores_CW: Tensor,
    exp_CW: Tensor,
    target_C1: Tensor,
    nll_C1: Tensor,
    sum_C1: Tensor,
    weight_C1: Tensor,
    softcap: float | None,
) -> None:
    """Overwrite scores_CW with weight * (softmax - onehot), times the soft-cap's derivative."""
    # expm1(-nll) is the target's probability less one, exact also where that probability is near one.
    target_grad_C1 = torch.expm1(-nll_C1) * weight_C1
    if softcap is None:
        torch.mul(exp_CW, weight_C1 / sum_C1, out=scores_CW)
        scores_CW.scatter_(1, target_C1, target_grad_C1.to(scores_CW.dtype))
    else:
        exp_CW.mul_(weight_C1 / sum_C1).scatter_(1, target_C1, target_grad_C1)
        torch.ops.aten.tanh_backward.grad_input(exp_CW, scores_CW, grad_input=scores_CW)


def _add_row_gradient(rows_grad_ND: Tensor, grad_CW: Tensor, hidden_CD: Tensor) -> None:
    """Add grad^T @ hidden of the first N columns to the rows' gradient, in its own, wider dtype."""
    num_new = rows_grad_ND.shape[0]
    if rows_grad_ND.dtype == hidden_CD.dtype:
        rows_grad_ND.addmm_(grad_CW[:, :num_new].T, hidden_CD)
        return
    for first in range(0, num_new, _GRAD_SLICE_ROWS):
        slice_SD = rows_grad_ND[first : first + _GRAD_SLICE_ROWS]
        slice_SD.add_(_product(grad_CW[:, first : first + len(slice_SD)].T, hidden_CD, slice_SD.dtype))


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return left @ right in a dtype that may be wider than theirs: on a GPU not rounded to theirs in between."""
    if left.dtype != dtype and left.is_cuda:
        # torch.addmm takes a wide sum beside narrow factors only from torch 2.10 on; torch.mm does in both stacks.
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)
