"""Time how a full-size Qwen2.5-14B with random weights is kept in NF4 and read back, on a CUDA card, no download.

    python bench/load.py [--folder FOLDER] [--whole] [--layers 48]

Without --whole the body is built on the card (as bench/step.py does) and kept: 11 GB in FOLDER. With it a folder of
16-bit weights is written first (30 GB more), and loaded and quantised as a first `train` does. Then the kept body is
loaded, twice: the files are in the page cache. Prints one JSON object a stage: seconds, peak bytes on the card
(allocated, reserved), peak bytes of this process in host memory, what the body's file pages take with it.
"""

import argparse
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import step
import torch
import transformers
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from wake2vec import base, quantized

CUDA = torch.device("cuda")
VOCAB_SIZE = step.MODELS["qwen14b"][1]


def main() -> None:
    """Run every stage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "wake2vec-bench-load")
    parser.add_argument("--whole", action="store_true", help="begin with 16-bit files, as a user does")
    parser.add_argument("--layers", type=int, default=48)
    asked = parser.parse_args()
    step.QWEN_14B["num_hidden_layers"] = asked.layers
    versions = {module.__name__: module.__version__ for module in (torch, transformers, bitsandbytes)}
    print(json.dumps({"card": torch.cuda.get_device_name(), "cores": os.cpu_count(), **versions}), flush=True)
    torch.zeros(1, device=CUDA)
    shutil.rmtree(asked.folder, ignore_errors=True)
    os.environ["WAKE2VEC_CACHE"] = str(asked.folder / "cache")
    try:
        fingerprint = first_load(asked.folder) if asked.whole else build_and_keep(asked.folder)
        for table_on_host in (False, True):
            frozen = measure(f"kept body, table_on_host={table_on_host}", lambda t=table_on_host: load(asked.folder, t))
            print(json.dumps({"same bits": base.fingerprint(frozen) == fingerprint}), flush=True)
            del frozen
            torch.cuda.empty_cache()
    finally:
        shutil.rmtree(asked.folder)


def build_and_keep(folder: Path) -> str:
    """Build the body on the card and keep it as the base that `known` names."""
    folder.mkdir(parents=True)
    Qwen2Config(**step.QWEN_14B).save_pretrained(folder)
    causal_lm = measure("build on the card", lambda: step.build(Qwen2Config(**step.QWEN_14B)))
    frozen = base.freeze(causal_lm, VOCAB_SIZE, "Qwen2.5-14B, random")
    source = quantized.Source.of(known(folder).commit, "bfloat16", CUDA)
    measure("keep", lambda: quantized.keep(source, causal_lm, folder / "config.json", say))
    return base.fingerprint(frozen)


def first_load(folder: Path) -> str:
    """Write 16-bit files a layer each and load them as a first start does, the keeping included."""
    folder.mkdir(parents=True)
    config = Qwen2Config(**step.QWEN_14B)
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(folder)
    measure("write 16-bit files", lambda: write_files(folder, config))
    return base.fingerprint(measure("first load: quantise and keep", lambda: load(folder, False)))


def write_files(folder: Path, config: Any) -> None:
    """Write random weights, some files of 4 GB at most as on the hub."""
    with torch.device("meta"):
        names = {name: p.shape for name, p in Qwen2ForCausalLM(config).named_parameters()}
    shards: list[dict[str, torch.Tensor]] = [{}]
    index = {}
    for name, shape in names.items():
        if sum(tensor.nbytes for tensor in shards[-1].values()) > 3 * 10**9:
            save_file(shards[-1], folder / f"model-{len(shards):05d}.safetensors", {"format": "pt"})
            shards[-1] = {}
            shards.append({})
        is_norm = len(shape) == 1 and name.endswith("weight")
        tensor = torch.ones(shape, device=CUDA) if is_norm else torch.randn(shape, device=CUDA) * 0.02
        shards[-1][name] = tensor.bfloat16().cpu()
        index[name] = f"model-{len(shards):05d}.safetensors"
    save_file(shards[-1], folder / f"model-{len(shards):05d}.safetensors", {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def known(folder: Path) -> base.BaseId:
    """Name the folder by its configuration alone: hashing 30 GB is no part of a hub model's start."""
    digest = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    return base.BaseId("Qwen2.5-14B, random", str(folder), f"sha256:{digest}")


def load(folder: Path, table_on_host: bool) -> base.FrozenBase:
    """Load as `train` does."""
    settings = {"quantization": "nf4", "compute_dtype": "bfloat16", "device": CUDA}
    frozen = base.load(known(folder), VOCAB_SIZE, **settings, say=say)
    if table_on_host:
        frozen = base.with_table_on_host(frozen)
        torch.cuda.empty_cache()
    return frozen


def say(message: str) -> None:
    """Print what a user would be told."""
    print(json.dumps({"said": message}), flush=True)


def measure(stage: str, work: Callable[[], Any]) -> Any:
    """Run a stage and print what it took."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    reset_host_peak()
    before = torch.cuda.memory_allocated()
    started = time.perf_counter()
    result = work()
    torch.cuda.synchronize()
    took = {
        "stage": stage,
        "seconds": round(time.perf_counter() - started, 2),
        "card_before_gb": round(before / 1e9, 2),
        "card_after_gb": round(torch.cuda.memory_allocated() / 1e9, 2),
        "card_peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "card_reserved_peak_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2),
        "host_peak_gb": round(host_bytes("VmHWM") / 1e9, 2),
        "host_after_gb": round(host_bytes("RssAnon") / 1e9, 2),
    }
    print(json.dumps(took), flush=True)
    return result


def reset_host_peak() -> None:
    """Let the kernel count this process's peak anew, where it may be asked to."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        print(json.dumps({"host peak": f"since the start of the process: {error.strerror}"}), flush=True)


def host_bytes(key: str) -> int:
    """Return a figure of this process: VmHWM counts mapped file pages too, RssAnon does not."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key)))


if __name__ == "__main__":
    main()
