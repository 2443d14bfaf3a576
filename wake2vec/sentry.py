"""Sentries: the small files a run continues from.

A sentry is a safetensors file. Its metadata holds `sha256`, the hash of the whole file with these 64 digits read as
zeros, and `wake2vec`, the header as JSON: format, step, identity (of run.json), plan, counters. Nothing is unpickled.
"""

import hashlib
import json
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wake2vec.errors import WakeError
from wake2vec.rundir import RunDir, write_file
from wake2vec.tables import StoredTable, open_tables

FORMAT = 1

_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.uint8: "U8"}
_BEFORE_DIGEST = b'{"__metadata__":{"sha256":"'
_DIGEST_AT = 8 + len(_BEFORE_DIGEST)
_NO_DIGEST = b"0" * 64
_MAX_HEADER_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 24
_SLICE_VALUES = 1 << 22


class DamagedError(Exception):
    """A file is not what was written; the message says why."""


@dataclass(frozen=True)
class Sentry:
    """A verified sentry: where it lies, its header and its tensors."""

    path: Path
    header: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def step(self) -> int:
        """Return the optimizer step it was taken after."""
        return int(self.header["step"])


def write(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write CPU tensors and a header; the file is durable and complete, or absent."""
    start, parts = _lay_out(tensors, header)
    digest = hashlib.sha256(start)
    for part in parts:
        digest.update(part)
    start = start.replace(_BEFORE_DIGEST + _NO_DIGEST, _BEFORE_DIGEST + digest.hexdigest().encode(), 1)
    write_file(path, [start, *parts])


def _lay_out(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> tuple[bytes, list[memoryview]]:
    """Return the bytes up to the data, without their digest, and the data."""
    entries: dict[str, Any] = {"__metadata__": {"sha256": _NO_DIGEST.decode(), "wake2vec": json.dumps(dict(header))}}
    parts = []
    offset = 0
    # safetensors wants the data aligned: larger items first
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        assert tensor.device.type == "cpu", name
        assert tensor.is_contiguous(), name
        size = tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
        parts.append(memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy().data))
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, parts


def read_header(path: Path) -> dict[str, Any]:
    """Return a sentry's header without checking the hash.

    Raises:
        DamagedError: it cannot be one.
    """
    try:
        if not stat.S_ISREG(path.lstat().st_mode):  # a link out of the run, a pipe that never ends
            raise DamagedError("it is no plain file")
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            text = file.read(min(size, _MAX_HEADER_BYTES))
        if len(text) != size or not text.startswith(_BEFORE_DIGEST):
            raise DamagedError("its header is cut off or not a sentry's")
        header = json.loads(json.loads(text)["__metadata__"]["wake2vec"])
        if not isinstance(header, dict) or type(header.get("step")) is not int or header.get("format") != FORMAT:
            raise DamagedError(f"its header is not of format {FORMAT}")
        if not 0 <= header["step"] < 2**31:
            raise DamagedError(f"its step is {header['step']}")
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DamagedError("its header cannot be read") from None
    except OSError as error:
        raise DamagedError(f"it cannot be read: {error.strerror}") from None
    return header


def verify(path: Path) -> None:
    """Read a sentry back against its hash.

    Raises:
        DamagedError: they differ.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            start = file.read(_DIGEST_AT)
            stored = file.read(len(_NO_DIGEST))
            digest.update(start + _NO_DIGEST)
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise DamagedError(f"it cannot be read: {error.strerror}") from None
    if stored != digest.hexdigest().encode():
        raise DamagedError("its content does not match its sha256")


def read(path: Path) -> Sentry:
    """Return a verified sentry.

    Raises:
        DamagedError: it is not what was written.
    """
    verify(path)
    header = read_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise DamagedError(f"its tensors cannot be read: {error}") from None
    bad = not_finite(tensors)
    if bad:
        raise DamagedError(f"{', '.join(bad)} holds NaN or Inf")
    return Sentry(path, header, tensors)


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that hold NaN or Inf; a slice at a time, with no temporary of their size."""
    return [name for name, tensor in tensors.items() if not _is_finite(tensor)]


def _is_finite(tensor: Tensor) -> bool:
    return all(bool(torch.isfinite(part).all()) for part in tensor.reshape(-1).split(_SLICE_VALUES))


def listing(run: RunDir) -> Iterator[tuple[Path, dict[str, Any] | None, str]]:
    """Yield each sentry file with its header, newest first; then the unreadable ones with the reason."""
    readable: list[tuple[Path, dict[str, Any]]] = []
    unreadable = []
    for path in sorted(run.sentries.glob("sentry_step_*.safetensors")):
        try:
            readable.append((path, read_header(path)))
        except DamagedError as error:
            unreadable.append((path, None, str(error)))
    readable.sort(key=lambda item: (-item[1]["step"], item[0]))
    for path, header in readable:
        yield path, header, ""
    yield from unreadable


def whole(run: RunDir, identity: str) -> Iterator[tuple[int, Path]]:
    """Yield step and path of every sentry of this run that reads back against its hash, newest first."""
    for path, header, _ in listing(run):
        if header is None or header.get("identity") != identity:
            continue
        try:
            verify(path)
        except DamagedError:
            continue
        yield header["step"], path


def row_tables(path: Path) -> dict[str, StoredTable]:
    """Return the rows in a sentry or snapshot, "input" and, where the model is untied, "head"; none is read yet."""
    tables = open_tables(path)
    return {name: tables[f"rows/{name}"] for name in ("input", "head") if f"rows/{name}" in tables}


def newest(
    run: RunDir, identity: str, say: Callable[[str], None], check: Callable[[Sentry], None] = lambda _: None
) -> Sentry | None:
    """Return the newest whole sentry of this run; damaged ones are named and put aside.

    Args:
        check: raises DamagedError where a sentry that is whole is still of no use to the run.

    Raises:
        WakeError: a sentry belongs to another run.
    """
    for path, header, reason in list(listing(run)):
        if header is None or path != run.sentry(header["step"]):  # it may be the newest, with a damaged header
            try:
                if header is None:
                    raise DamagedError(reason)
                verify(path)
            except DamagedError as error:
                _put_aside(path, error, say)
    for path, _, _ in list(listing(run)):
        try:
            found = read(path)
            theirs = str(found.header.get("identity"))
            if theirs != identity:
                raise WakeError(
                    f"{path}: belongs to another run (identity {theirs[:12]}, here {identity[:12]}); "
                    "move it out of the folder"
                )
            check(found)
            return found
        except DamagedError as error:
            _put_aside(path, error, say)
    return None


def _put_aside(path: Path, error: DamagedError, say: Callable[[str], None]) -> None:
    aside = path.with_name(path.name + ".damaged")
    path.replace(aside)
    say(f"{path.name} is damaged: {error}; put aside as {aside.name}")


def retire(run: RunDir, *, keep_last: int, keep_every: int, best_step: int | None) -> list[Path]:
    """Remove the sentries that are neither recent, nor the best, nor at a multiple of `keep_every`.

    The caller has verified the newest.
    """
    listed = [(path, header["step"]) for path, header, _ in listing(run) if header is not None]
    keep = {step for _, step in listed[:keep_last]} | {best_step}
    gone = [path for path, step in listed if step not in keep and not (keep_every and step % keep_every == 0)]
    for path in gone:
        path.unlink(missing_ok=True)
    return gone


def half_precision(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Return the named tensors as fp16, for snapshots and the seed's format."""
    return {name: tensors[name].to(torch.float16) for name in names}
