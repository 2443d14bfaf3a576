"""Safetensors files written a piece at a time: memory holds a slice of rows, whatever the file's size."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wake2vec.errors import WakeError
from wake2vec.tables import DTYPES, StoredTable, bytes_of, open_tables

_SLICE_ROWS = 4096


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written: its type, its shape, and a function that yields its bytes in pieces."""

    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[bytes]]

    @property
    def num_bytes(self) -> int:
        """Return its size."""
        size = DTYPES[self.dtype].itemsize
        for length in self.shape:
            size *= length
        return size


def copied(table: StoredTable) -> NewTensor:
    """Return a tensor as it stands in a file."""
    return NewTensor(table.dtype, table.shape, lambda: bytes_of(table))


def extended(table: StoredTable, num_base: int, rows: StoredTable, num_rows: int) -> NewTensor:
    """Return a table's first `num_base` rows, the new rows in its type, and padding rows up to `num_rows`.

    A padding row is the mean of all the others: as a row of the head, its score is the mean of theirs, so that it is
    never the highest and has less than its share of the probability, whatever the hidden state.
    """

    def pieces() -> Iterator[bytes]:
        total = torch.zeros(table.shape[1], dtype=torch.float64)
        for part, count in ((table, num_base), (rows, rows.shape[0])):
            for rows_SD in _slices(part, count):
                cast_SD = rows_SD.to(DTYPES[table.dtype])
                total += cast_SD.double().sum(0)
                yield raw(cast_SD)
        num_padding = num_rows - num_base - rows.shape[0]
        mean = (total / (num_base + rows.shape[0])).to(DTYPES[table.dtype])
        yield raw(mean.expand(num_padding, -1).contiguous())

    assert num_rows >= num_base + rows.shape[0]
    return NewTensor(table.dtype, (num_rows, table.shape[1]), pieces)


def _slices(table: StoredTable, count: int) -> Iterator[Tensor]:
    for start in range(0, count, _SLICE_ROWS):
        yield table[start : min(start + _SLICE_ROWS, count)]


def raw(tensor: Tensor) -> bytes:
    """Return a contiguous tensor's bytes."""
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def write(path: Path, tensors: Mapping[str, NewTensor]) -> dict[str, str]:
    """Write a safetensors file, durable; return the sha256 of every tensor's bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # larger items first, as safetensors wants the data aligned
    order = sorted(tensors, key=lambda name: -DTYPES[tensors[name].dtype].itemsize)
    for name in order:
        end = offset + tensors[name].num_bytes
        entries[name] = {"dtype": tensors[name].dtype, "shape": tensors[name].shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digests = {}
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            digest = hashlib.sha256()
            for piece in tensors[name].pieces():
                digest.update(piece)
                file.write(piece)
            digests[name] = digest.hexdigest()
        file.flush()
        os.fsync(file.fileno())
    return digests


def digest_of(pieces: Iterable[bytes]) -> str:
    """Return the sha256 of bytes in pieces."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def check(path: Path, digests: Mapping[str, str]) -> None:
    """Read a file back and compare every tensor with what was to be written.

    Raises:
        WakeError: they differ.
    """
    found = {name: digest_of(bytes_of(table)) for name, table in open_tables(path).items()}
    wrong = [name for name in {**digests, **found} if digests.get(name) != found.get(name)]
    if wrong:
        raise WakeError(f"{path}: {', '.join(sorted(wrong)[:3])} read back other than written; check the disk")
