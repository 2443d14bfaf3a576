"""The base in 4 bits: which checkpoints already are, and the body that was quantised here, kept for the next start.

A restart then reads 9 GB of a 14B in place of quantising 28. In WAKE2VEC_CACHE, complete or absent, one folder a base:

    quantized/<commit>-<compute dtype>-<device>-bitsandbytes<version>-v1/
        manifest.json                   what it was made from; every other file's size and sha256
        config.json                     the base's own, with NF4 written in
        model-00001.safetensors ...     about 1 GB each, and model.safetensors.index.json

It is a folder in Hugging Face format, which every transformers loads to the same bits. Only bitsandbytes makes the
numbers, and it may round otherwise on another kind of device or in another version: those are part of the name.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from wake2vec import hub
from wake2vec.errors import WakeError
from wake2vec.rundir import alone, built, cache_folder, make_folder, read_json, write_file, write_json
from wake2vec.sentry import DamagedError

FORMAT = 1
NF4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_quant_storage": "uint8",
}
"""How a body is quantised here, in the words of a config.json; the compute dtype is the recipe's."""
_SHARD_BYTES = 10**9
_MANIFEST = "manifest.json"


def is_quantized(config: Any, name: str, quantization: str) -> bool:
    """Say whether a checkpoint comes in NF4 already, by its transformers configuration.

    Args:
        quantization: what the recipe asks for, "nf4" or "none".

    Raises:
        WakeError: it comes in another quantisation, or in one where the recipe asks for none.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return False
    found = found if isinstance(found, dict) else found.to_dict()
    kind = _kind(found)
    if kind != "nf4":
        raise WakeError(
            f"base model {name}: its weights are quantised as {kind}, wake2vec reads bitsandbytes nf4; give the model "
            "it was made from"
        )
    if quantization != "nf4":
        raise WakeError(
            f"base model {name}: its weights are quantised as nf4, model.quantization is {quantization!r}; set "
            'model.quantization = "nf4", or give the model it was made from'
        )
    return True


def _kind(found: Mapping[str, Any]) -> str:
    """Name a quantisation, in few words."""
    eight, four = (found.get(key) or found.get(f"_{key}") for key in ("load_in_8bit", "load_in_4bit"))
    method = str(found.get("quant_method") or ("bitsandbytes" if eight or four else "an unnamed method"))
    if method != "bitsandbytes":
        return method
    if eight or not four:
        return "bitsandbytes 8-bit"
    return str(found.get("bnb_4bit_quant_type", "fp4"))


@dataclass(frozen=True)
class Source:
    """What a quantised body is made from: whatever decides its numbers, and nothing else."""

    commit: str
    compute_dtype: str
    device: str
    bitsandbytes: str
    format: int = FORMAT

    @classmethod
    def of(cls, commit: str, compute_dtype: str, device: torch.device) -> "Source":
        """Return it for a base's commit or content hash, under the installed bitsandbytes."""
        return cls(commit, compute_dtype, device.type, importlib.metadata.version("bitsandbytes"))

    @property
    def folder(self) -> Path:
        """Return where the body lies, if it is kept."""
        base = self.commit.replace(":", "-")
        name = f"{base}-{self.compute_dtype}-{self.device}-bitsandbytes{self.bitsandbytes}-v{self.format}"
        return cache_folder() / "quantized" / name

    def is_kept(self) -> bool:
        """Say whether there is one, without reading it."""
        return (self.folder / _MANIFEST).is_file()


def is_whole(source: Source, say: Callable[[str], None]) -> bool:
    """Say whether every file of a kept body has its sha256; a damaged one is named and removed."""
    try:
        _verify(source.folder, source)
    except DamagedError as error:
        say(f"quantised body {source.folder} is damaged: {error}; making it again")
        shutil.rmtree(source.folder, ignore_errors=True)
        return False
    return True


def _verify(folder: Path, source: Source) -> None:
    """Read every file against the manifest, many at a time: sha256 lets other threads run."""
    try:
        manifest = read_json(folder / _MANIFEST)
    except WakeError as error:
        raise DamagedError(str(error)) from None
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or manifest.get("source") != asdict(source):
        raise DamagedError(f"its {_MANIFEST} does not say what the folder's name says")
    there = {path.name for path in folder.iterdir()} - {_MANIFEST}
    if there != set(files):
        raise DamagedError(f"{', '.join(sorted(there ^ set(files)))} is missing or does not belong there")
    try:
        found = hash_files([folder / name for name in files])
    except OSError as error:
        raise DamagedError(f"{error.filename or folder} cannot be read: {error.strerror}") from None
    for (name, wanted), digest in zip(files.items(), found, strict=True):
        if digest != wanted:
            raise DamagedError(f"the content of {name} does not match its sha256")


def hash_files(paths: list[Path]) -> list[str]:
    """Return each file's sha256, computed on all cores."""
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    try:
        return list(pool.map(_sha256, paths))
    finally:
        pool.shutdown(cancel_futures=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def keep(source: Source, causal_lm: Any, config_file: Path, say: Callable[[str], None]) -> None:
    """Keep a body for the next start; where that cannot be, say why and go on.

    Args:
        causal_lm: the transformers model, its linear layers in NF4.
        config_file: the base's own config.json. It is taken as it is: what one transformers writes of it, another
            may read otherwise (transformers 5 moves `rope_theta`, and transformers 4 then takes its default).
    """
    folder = source.folder
    tensors = _tensors(causal_lm)
    size = sum(map(_size, tensors.values()))
    try:
        make_folder(folder.parent)
        free = shutil.disk_usage(folder.parent).free
        if free < size:
            say(
                f"{folder.parent}: {free / 1e9:.1f} GB free, the quantised body takes {size / 1e9:.1f} GB and is not "
                "kept: the next start quantises again; free space, or set WAKE2VEC_CACHE to another disk"
            )
            return
        with alone(folder) as is_alone:
            if is_alone and not folder.exists():
                _write(source, tensors, config_file)
                say(f"kept the quantised body for the next start: {folder}, {size / 1e9:.1f} GB, may be deleted")
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        say(
            f"{folder.parent}: the quantised body is not kept ({reason}), the next start quantises again; check the "
            "disk, its space and the folder's owner, or set WAKE2VEC_CACHE"
        )


def _tensors(causal_lm: Any) -> dict[str, Tensor]:
    """Return what a file holds: a tied head is left to its table."""
    tensors: dict[str, Tensor] = causal_lm.state_dict()
    table = causal_lm.get_input_embeddings().weight
    if causal_lm.get_output_embeddings().weight is table:
        tied = [name for name, tensor in tensors.items() if tensor.data_ptr() == table.data_ptr()]
        tensors = {name: tensor for name, tensor in tensors.items() if name not in tied[1:]}
    return tensors


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _write(source: Source, tensors: Mapping[str, Tensor], config_file: Path) -> None:
    """Write a body, every file durable."""
    with built(source.folder) as building:
        shards: dict[str, list[str]] = {}
        for number, names in enumerate(_shards(tensors), 1):
            file = f"model-{number:05d}.safetensors"
            # a clone: safetensors writes no two tensors that share memory
            save_file({name: tensors[name].to("cpu", copy=True) for name in names}, building / file, {"format": "pt"})
            _sync(building / file)
            shards[file] = names
        index = {"metadata": {}, "weight_map": {name: file for file, names in shards.items() for name in names}}
        write_file(building / hub.WEIGHTS_INDEX, [json.dumps(index).encode()])
        config = {
            **json.loads(config_file.read_bytes()),
            "quantization_config": {**NF4, "bnb_4bit_compute_dtype": source.compute_dtype},
        }
        write_json(building / "config.json", config)
        paths = sorted(building.iterdir())
        hashes = dict(zip((path.name for path in paths), hash_files(paths), strict=True))
        write_json(building / _MANIFEST, {"source": asdict(source), "files": hashes})


def _shards(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Yield the names that go into each file; a layer's stay together where they can."""
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if names and size + _size(tensor) > _SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += _size(tensor)
    yield names


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
