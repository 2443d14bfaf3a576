"""What only a training process can know and a report needs: kept in the run's folder, so that a report needs no base.

    reference/base.safetensors             once: the base tables' norms, sampled rows and principal variances; the words
    reference/word_losses_start.safetensors   nats of each new word in the held-out text, before training
    reference/word_losses.safetensors         the same after the last evaluation
    reference/neighbours.safetensors       of every new word: the nearest base tokens and new words

They are written and verified as sentries are. Losing them loses nothing of a run.

Shapes: N new words, V base tokens, D hidden size, n sampled rows, K neighbours, M scored positions.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from wake2vec import analysis, sentry
from wake2vec.base import FrozenBase
from wake2vec.identity import Inputs
from wake2vec.machine import machine
from wake2vec.rundir import RunDir, make_folder, sweep
from wake2vec.tables import encode_json

SAMPLE_ROWS = 5000
"""Base rows kept for isotropy and pairwise cosines."""
NUM_NEIGHBOURS = 5
_SHARE = 0.02
"""Neighbours are searched between evaluations only if that takes no more than this share of the time."""


Put = Callable[[str, Callable[[], None]], None]


class WordLosses:
    """Sums the losses of each new word over an evaluation: `nats_N`, `counts_N`, float64 and int64 on the host."""

    def __init__(self, num_words: int, first_new_id: int) -> None:
        self.nats_N = torch.zeros(num_words, dtype=torch.float64)
        self.counts_N = torch.zeros(num_words, dtype=torch.int64)
        self._first_new_id = first_new_id

    def clear(self) -> None:
        """Forget everything."""
        self.nats_N.zero_()
        self.counts_N.zero_()

    def add(self, targets_M: Tensor, losses_M: Tensor) -> None:
        """Count a batch; on the host, where the order of a sum is always the same."""
        words_M = targets_M.cpu() - self._first_new_id
        new_M = words_M >= 0
        self.nats_N.index_add_(0, words_M[new_M], losses_M.cpu().double()[new_M])
        self.counts_N.index_add_(0, words_M[new_M], torch.ones_like(words_M[new_M]))


class ReferenceWriter:
    """Writes the files above for one run."""

    def __init__(
        self, run: RunDir, identity_sha256: str, inputs: Inputs, base: FrozenBase, put: Put | None = None
    ) -> None:
        """Take what is written about; `put` has the files of an evaluation written beside the loop (`Scribe.put`)."""
        self._run, self._identity, self._inputs, self._base = run, identity_sha256, inputs, base
        self._put = put or (lambda _, write: write())
        self._searched_at, self._search_s = -float("inf"), 0.0

    def write_base(self) -> None:
        """Write base.safetensors unless it is there whole."""
        make_folder(self._run.reference)
        sweep(self._run.reference)
        path = self._run.reference / "base.safetensors"
        try:
            sentry.verify(path)
            if sentry.read_header(path)["identity"] == self._identity:
                return
        except sentry.DamagedError:
            pass  # or not there yet
        base, inputs = self._base, self._inputs
        tables = {"input": base.table_VD} if base.tied else {"input": base.table_VD, "head": base.head_VD}
        tensors = {"words": encode_json(inputs.words), **_counts(inputs)}
        pca_rows = num_pca_rows(inputs.num_new_tokens, *base.table_VD.shape)
        for name, table_VD in tables.items():
            tensors |= {f"{name}/{key}": tensor for key, tensor in _base_statistics(table_VD, pca_rows).items()}
        header = {"machine": machine(), "tables": list(tables), "pca_rows": pca_rows}
        self._have_written("base", 0, tensors, header)

    def after_evaluation(self, step: int, losses: WordLosses, rows_ND: Tensor, *, last: bool) -> None:
        """Keep the words' losses; and their neighbours, where `last` or long enough after the last search.

        At the start there are none worth a search: the rows have learned nothing yet.
        """
        tensors = {"nats": losses.nats_N.float(), "counts": losses.counts_N}
        self._have_written("word_losses", step, tensors)
        if step == 0:
            self._have_written("word_losses_start", step, tensors)
        started = time.monotonic()
        if last or (step > 0 and _SHARE * (started - self._searched_at) >= self._search_s):
            self._have_written("neighbours", step, _neighbours(rows_ND.detach(), self._base.table_VD, self._inputs))
            self._searched_at = time.monotonic()
            self._search_s = self._searched_at - started

    def _have_written(
        self, name: str, step: int, tensors: Mapping[str, Tensor], header: Mapping[str, Any] | None = None
    ) -> None:
        self._put(f"reference/{name}", lambda: self._write(name, step, tensors, header))

    def _write(
        self, name: str, step: int, tensors: Mapping[str, Tensor], header: Mapping[str, Any] | None = None
    ) -> None:
        whole = {"format": sentry.FORMAT, "step": step, "identity": self._identity, **(header or {})}
        sentry.write(self._run.reference / f"{name}.safetensors", tensors, whole)


def num_pca_rows(num_new: int, num_base: int, dim: int) -> int:
    """Return how many rows the principal variances are of: as many base rows as new ones, so that they compare."""
    return min(num_new, num_base, 2 * dim)


def _base_statistics(table_VD: Tensor, pca_rows: int) -> dict[str, Tensor]:
    num = len(table_VD)
    ids = analysis.sample_ids(num, SAMPLE_ROWS, 0, "base rows")
    variances = analysis.principal_variances(table_VD, analysis.sample_ids(num, pca_rows, 0, "base variances"))
    return {
        "norms": analysis.row_norms(table_VD),
        "sample_ids": ids,
        "sample": analysis.take_rows(table_VD, ids).to(table_VD.dtype),
        "variances": variances.float(),
    }


def _counts(inputs: Inputs) -> dict[str, Tensor]:
    """Return how often each new word stands in the text, in the part that is trained on and in the held-out one."""
    first, num = inputs.base_vocab_size, inputs.num_new_tokens
    parts = {
        "train": inputs.train_blocks.ids_KT[: inputs.num_text_blocks],
        "val": inputs.val_blocks.ids_KT,
    }
    counts = {}
    for name, ids_KT in parts.items():
        # every token is scored once; the very first of a text, where there is no BOS, stands before
        words = torch.cat([ids_KT[:, 1:].flatten(), ids_KT[:1, 0]]) - first
        counts[f"{name}_counts"] = torch.bincount(words[words >= 0], minlength=num)
    return counts


def _neighbours(rows_ND: Tensor, table_VD: Tensor, inputs: Inputs) -> dict[str, Tensor]:
    base_ids, base_cosines = analysis.nearest(rows_ND, table_VD, NUM_NEIGHBOURS)
    new_ids, new_cosines = analysis.nearest(rows_ND, rows_ND, NUM_NEIGHBOURS, exclude_self=True)
    used = base_ids.unique().tolist()
    texts = inputs.base_tokenizer.batch_decode([[i] for i in used], clean_up_tokenization_spaces=False)
    return {
        "base_ids": base_ids,
        "base_cosines": base_cosines,
        "new_ids": new_ids,
        "new_cosines": new_cosines,
        "base_tokens": encode_json(dict(zip(used, texts, strict=True))),
    }
