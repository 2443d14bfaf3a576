"""Matrices in safetensors files, read a slice of rows at a time: their size never counts as memory.

A memory map would do without this code, but its pages count against a container's limit.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wake2vec.errors import WakeError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
_MAX_HEADER_BYTES = 100 << 20  # safetensors' own limit


@dataclass(frozen=True)
class StoredTable:
    """A tensor in a file: `table[a:b]` reads its rows a to b."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Of the first byte, from the file's start."""
    num_bytes: int

    def __getitem__(self, rows: slice, /) -> Tensor:
        """Return the rows of a slice (of step 1) in the file's dtype."""
        start, stop, step = rows.indices(self.shape[0])
        assert step == 1
        count = max(0, stop - start)
        row_bytes = self.num_bytes // max(1, self.shape[0])
        data = bytearray(count * row_bytes)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset + start * row_bytes)
            if _read_into(file, data) != len(data):
                raise WakeError(f"{self.path}: cut off, rows {start} to {stop} are not all there; put back a copy")
        if not data:
            return torch.empty((count, *self.shape[1:]), dtype=DTYPES[self.dtype])
        return torch.frombuffer(data, dtype=DTYPES[self.dtype]).reshape(count, *self.shape[1:])

    def take(self, ids: Tensor) -> Tensor:
        """Return single rows, read one by one: for samples much smaller than the table."""
        found = [self[i : i + 1] for i in ids.tolist()]
        return torch.cat(found) if found else self[0:0]


def _read_into(file: Any, data: bytearray) -> int:
    view, done = memoryview(data), 0
    while done < len(view) and (count := file.readinto(view[done:])):
        done += count
    return done


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return a safetensors file's header (tensors and `__metadata__`) and where the data begin.

    Raises:
        WakeError: it is not such a file, or cut off.
    """
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            text = file.read(size) if size <= _MAX_HEADER_BYTES else b""
        header = json.loads(text)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise WakeError(f"{path}: not a safetensors file, or its header is damaged; put back a copy of it") from None
    except OSError as error:
        raise WakeError(f"{path}: cannot be read ({error.strerror}); check the file") from None
    expected, found = 8 + size + max(ends, default=0), path.stat().st_size
    if found != expected:
        raise WakeError(f"{path}: {found} bytes, its header says {expected}; put back a copy of it")
    return header, 8 + size


def open_tables(path: Path) -> dict[str, StoredTable]:
    """Return every tensor of a safetensors file, none of them read yet."""
    header, data_at = read_header(path)
    return {
        name: StoredTable(
            path,
            entry["dtype"],
            tuple(entry["shape"]),
            data_at + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def bytes_of(table: StoredTable, chunk_bytes: int = 1 << 24) -> Iterator[bytes]:
    """Yield a tensor's bytes in pieces."""
    with open(table.path, "rb", buffering=0) as file:
        file.seek(table.offset)
        left = table.num_bytes
        while left:
            piece = file.read(min(chunk_bytes, left))
            if not piece:
                raise WakeError(f"{table.path}: cut off; put back a copy of it")
            left -= len(piece)
            yield piece


def encode_json(content: Any) -> Tensor:
    """Return JSON as bytes in a tensor."""
    return torch.frombuffer(bytearray(json.dumps(content, ensure_ascii=False).encode()), dtype=torch.uint8)


def decode_json(tensor: Tensor) -> Any:
    """Return what `encode_json` was given; keys of an object are text."""
    return json.loads(tensor.numpy().tobytes())
