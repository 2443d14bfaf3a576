"""Where the new words' rows start.

Shapes: V base rows, D hidden size, N new rows, S rows of one slice, K pieces of one slice's words.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from wake2vec.errors import WakeError

_SLICE_ROWS = 4096
_SLICE_WORDS = 1024
# A mean shorter than this, in base radii, is rounding noise: its direction says nothing.
_SHORTEST_MEAN = 1e-6


def start_rows(
    kind: str, tables: Mapping[str, Tensor], pieces: Sequence[Sequence[int]], *, start_radius: float, seed: int
) -> dict[str, Tensor]:
    """Return float32 start rows on the host for each base table, one row for each word.

    Args:
        kind: "sphere" or "subword-mean".
        tables: the base tables that are extended ("input", "head"), without their padding rows. The name chooses the
            random numbers, so that a run's input and head rows differ.
        pieces: the base ids of each new word's pieces; "sphere" only counts them.
        start_radius: the rows' length in units of their table's `base_radius`.

    Raises:
        WakeError: the pieces of some word have no mean that points anywhere.
    """
    if kind == "sphere":
        return {name: sphere_rows(len(pieces), table, start_radius, seed, name) for name, table in tables.items()}
    assert kind == "subword-mean", f"no start is called {kind!r}"
    return {name: subword_mean_rows(pieces, table, start_radius) for name, table in tables.items()}


def base_radius(table_VD: Tensor) -> float:
    """Return std(all entries) * sqrt(D), the length of a row of D independent entries of that spread."""
    total = total_sq = 0.0
    for start in range(0, table_VD.shape[0], _SLICE_ROWS):
        slice_SD = table_VD[start : start + _SLICE_ROWS].float()
        total += slice_SD.sum().item()
        total_sq += slice_SD.square().sum().item()
    count = table_VD.numel()
    variance = (total_sq - total * total / count) / (count - 1)
    return math.sqrt(max(variance, 0.0) * table_VD.shape[1])


def sphere_rows(num_rows: int, table_VD: Tensor, start_radius: float, seed: int, stream: str) -> Tensor:
    """Return rows of random directions, all start_radius * base_radius long; each stream has its own numbers."""
    digest = hashlib.sha256(f"wake2vec rows {seed} {stream}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    rows_ND = torch.randn(num_rows, table_VD.shape[1], generator=generator)
    functional.normalize(rows_ND, dim=1, out=rows_ND)
    return rows_ND.mul_(start_radius * base_radius(table_VD))


def subword_mean_rows(pieces: Sequence[Sequence[int]], table_VD: Tensor, start_radius: float) -> Tensor:
    """Return the mean of the base rows of each word's pieces, drawn out to start_radius * base_radius.

    Raises:
        WakeError: the rows of some word's pieces cancel out or are zero, or it has no pieces.
    """
    radius = base_radius(table_VD)
    rows_ND = torch.empty(len(pieces), table_VD.shape[1])
    for start in range(0, len(pieces), _SLICE_WORDS):
        rows_ND[start : start + _SLICE_WORDS] = _mean_rows(pieces[start : start + _SLICE_WORDS], table_VD)
    length_N1 = torch.linalg.vector_norm(rows_ND, dim=1, keepdim=True)
    nowhere = torch.nonzero(length_N1.squeeze(1) <= _SHORTEST_MEAN * radius).squeeze(1).tolist()
    if nowhere:
        words = "; ".join(f"word {index + 1}: pieces {list(pieces[index])}" for index in nowhere[:5])
        raise WakeError(
            f"start rows: the mean of the pieces' base rows is zero for {len(nowhere)} of {len(pieces)} new words "
            f'({words}); set tokens.start = "sphere", or take these words out of the lexicon'
        )
    return rows_ND.mul_(start_radius * radius / length_N1)


def _mean_rows(pieces: Sequence[Sequence[int]], table_VD: Tensor) -> Tensor:
    """Return the float32 mean row of each word's pieces, zero for a word of none."""
    counts_S = torch.tensor([len(ids) for ids in pieces])
    ids_K = torch.tensor([piece for ids in pieces for piece in ids], dtype=torch.long, device=table_VD.device)
    word_of_piece_K = torch.repeat_interleave(torch.arange(len(pieces)), counts_S)
    piece_rows_KD = table_VD[ids_K].float().cpu()
    sums_SD = torch.zeros(len(pieces), table_VD.shape[1]).index_add_(0, word_of_piece_K, piece_rows_KD)
    return sums_SD.div_(counts_S.clamp(min=1).unsqueeze(1))
