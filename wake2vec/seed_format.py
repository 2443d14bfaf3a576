"""The seed's sentry files: fp16 rows in a `.pt`, written for other scripts and read without unpickling.

{"embeddings": fp16 [N, D], "step": int, "best_metric": float | None, "epoch": float, "wake_start": int,
 "num_wake": int}, and "head_embeddings" where the head has its own rows
"""

import io
import math
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wake2vec.errors import WakeError
from wake2vec.rundir import write_file

_STORAGES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
}
# What torch.save writes for a dictionary of tensors, numbers and names. BUILD is not among them: it sets attributes.
_OPCODES = {
    *("PROTO", "STOP", "MARK", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
    *("EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("BINUNICODE", "BINFLOAT", "BININT", "BININT1", "BININT2", "LONG1", "NONE", "NEWTRUE", "NEWFALSE"),
    *("GLOBAL", "REDUCE", "BINPERSID"),
}


def write_pt(path: Path, rows: Mapping[str, Tensor], *, step: int, epoch: float, first_new_id: int) -> None:
    """Write rows as the seed did, in half precision."""
    payload = {
        "embeddings": rows["input"].to(torch.float16),
        "step": step,
        "best_metric": None,
        "epoch": epoch,
        "wake_start": first_new_id,
        "num_wake": len(rows["input"]),
    }
    if "head" in rows:
        payload["head_embeddings"] = rows["head"].to(torch.float16)
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    write_file(path, [buffer.getbuffer()])


def read_pt(path: Path) -> dict[str, Any]:
    """Return the payload of a seed's file; its rows as fp32.

    A reader of its own rebuilds tensors from their bytes and refuses everything else a pickle may ask for.

    Raises:
        WakeError: it is no such file, or asks for more than tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            payload = _TensorUnpickler(archive).load()
    except FileNotFoundError:
        raise WakeError(f"{path}: no such file; check the path") from None
    except (OSError, zipfile.BadZipFile) as error:
        raise WakeError(f"{path}: not a file of torch.save ({error}); give a sentry_step_*.pt") from None
    except pickle.UnpicklingError as error:
        raise WakeError(f"{path}: refused: {error}; only tensors, numbers and names are read") from None
    except (
        EOFError,
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        AttributeError,
        OverflowError,
        RuntimeError,
        MemoryError,
    ) as error:
        raise WakeError(f"{path}: damaged ({type(error).__name__}: {error}); give another file") from None
    return _checked(path, payload)


def _checked(path: Path, payload: Any) -> dict[str, Any]:
    if not isinstance(payload, dict):
        raise WakeError(f"{path}: holds no dictionary; give a sentry_step_*.pt")
    problems = [
        f"{path}: {key} is missing or no integer; give a whole sentry_step_*.pt"
        for key in ("step", "wake_start", "num_wake")
        if not isinstance(payload.get(key), int) or isinstance(payload.get(key), bool) or payload[key] < 0
    ]
    keys = [key for key in ("embeddings", "head_embeddings") if key == "embeddings" or key in payload]
    for key in keys:
        rows = payload.get(key)
        if not isinstance(rows, Tensor) or rows.dim() != 2 or len(rows) != payload.get("num_wake"):
            shape = tuple(rows.shape) if isinstance(rows, Tensor) else None
            problems.append(f"{path}: {key} has shape {shape}, num_wake is {payload.get('num_wake')}; they must agree")
        elif not bool(torch.isfinite(rows).all()):
            problems.append(f"{path}: {key} holds NaN or Inf; give an earlier file")
        elif rows.shape != payload["embeddings"].shape:
            problems.append(f"{path}: {key} has {rows.shape[1]} values a row, embeddings has not; give a whole file")
    if problems:
        raise WakeError("\n".join(problems))
    return {**payload, **{key: payload[key].float() for key in keys}}


class _TensorUnpickler(pickle.Unpickler):
    """Knows tensors, their storages and ordered dictionaries; every other global is refused."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise pickle.UnpicklingError("it holds no single data.pkl")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise pickle.UnpicklingError("it is compressed, which torch.save never does")
        code = archive.read(pickles[0])
        _check_opcodes(code)
        super().__init__(io.BytesIO(code))
        self._archive = archive
        self._folder = pickles[0].removesuffix("data.pkl")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _device, numel = pid
        known = isinstance(dtype, torch.dtype) and isinstance(key, str) and key.isdecimal() and isinstance(numel, int)
        if not isinstance(kind, str) or kind != "storage" or not known:
            raise pickle.UnpicklingError("it asks for something that is no storage of numbers")
        data = self._archive.read(f"{self._folder}data/{key}")
        storage = torch.frombuffer(bytearray(data), dtype=dtype)
        if storage.numel() != numel:
            raise pickle.UnpicklingError(f"storage {key} has {storage.numel()} values, {numel} are named")
        return storage


def _check_opcodes(code: bytes) -> None:
    """Refuse a pickle that does more than torch.save's; `genops` reads it without running anything."""
    for opcode, argument, _ in pickletools.genops(code):
        if opcode.name not in _OPCODES:
            raise pickle.UnpicklingError(f"it uses {opcode.name}")
        if opcode.name == "LONG_BINPUT" and int(argument or 0) > len(code):
            raise pickle.UnpicklingError("it asks for more memory than it can need")


def _rebuild(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """Return a contiguous tensor over a whole storage; nothing else is in the seed's files."""
    whole = all(isinstance(part, tuple) and all(type(n) is int and n >= 0 for n in part) for part in (size, stride))
    if not isinstance(storage, Tensor) or not whole or type(offset) is not int or offset != 0:
        raise pickle.UnpicklingError("a tensor is not a whole storage")
    if math.prod(size) != storage.numel():
        raise pickle.UnpicklingError(f"a tensor of shape {size} does not fill its storage of {storage.numel()} values")
    tensor = storage.reshape(size)
    if tensor.stride() != stride:
        raise pickle.UnpicklingError(f"a tensor has strides {stride}, not those of its shape")
    return tensor
