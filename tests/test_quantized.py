"""The body in 4 bits that is kept after the first load, and checkpoints that come in 4 bits."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes.functional
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import Quiet, make_base, make_recipe
from tokenizers_tiny import byte_level

from wake2vec import base, preflight, quantized, resume
from wake2vec.errors import WakeError

CPU = torch.device("cpu")
VOCAB_SIZE = len(byte_level())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WAKE2VEC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "quantized"


@pytest.fixture(params=["untied", "tied"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a base whose rope_theta is not the default, as Qwen's is not."""
    folder = make_base(tmp_path / "base", tied=request.param == "tied")
    write_config(folder, rope_theta=1000000.0)
    return folder


@pytest.fixture
def plain_folder(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


def write_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters", None)  # as transformers 5 writes it, which 4 does not read
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def known(folder: Path) -> base.BaseId:
    return base.identify("b", str(folder), None)


def load(identity: base.BaseId, dtype: str = "bfloat16", **options: Any) -> tuple[base.FrozenBase, list[str]]:
    """Load in NF4 and return what was said, too."""
    console = Quiet()
    settings: dict[str, Any] = {"quantization": "nf4", "compute_dtype": dtype, "device": CPU, **options}
    return base.load(identity, VOCAB_SIZE, say=console.say, **settings), console.said


def buffers(frozen: base.FrozenBase) -> dict[str, torch.Tensor]:
    """Return what a fingerprint does not cover: the rotary frequencies."""
    return {name: tensor.clone() for name, tensor in frozen.causal_lm.named_buffers()}


def logits(frozen: base.FrozenBase) -> torch.Tensor:
    with torch.no_grad():
        return frozen.hidden(frozen.table_VD[torch.arange(40)[None]]) @ frozen.head_VD.T


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_second_load_reads_the_kept_body_and_is_the_same(dtype: str, folder: Path, cache: Path) -> None:
    identity = known(folder)
    first, said = load(identity, dtype)
    assert said[-1].startswith(f"kept the quantised body for the next start: {cache}")
    (folder / "model.safetensors").unlink()
    second, said = load(identity, dtype)
    assert said == []
    assert base.fingerprint(second) == base.fingerprint(first)
    assert buffers(second).keys() == buffers(first).keys()
    assert all(torch.equal(tensor, buffers(second)[name]) for name, tensor in buffers(first).items())
    assert torch.equal(logits(second), logits(first))
    assert second.tied == first.tied
    assert second.head_VD.dtype == first.head_VD.dtype
    for one, other in zip(first.body.modules(), second.body.modules(), strict=True):
        assert type(one) is type(other)
        assert getattr(one, "compute_dtype", None) == getattr(other, "compute_dtype", None)


def test_numbers_are_those_of_bitsandbytes_alone(plain_folder: Path) -> None:
    """So no version of transformers is part of a kept body's name."""
    for _ in range(2):
        frozen, _ = load(known(plain_folder))
        weights = load_file(plain_folder / "model.safetensors")
        num_linear = 0
        for name, parameter in frozen.causal_lm.named_parameters():
            if hasattr(parameter, "quant_state"):
                packed, state = bitsandbytes.functional.quantize_4bit(
                    weights[name].bfloat16(), quant_type="nf4", compress_statistics=True
                )
                assert torch.equal(packed, parameter)
                assert torch.equal(state.absmax, parameter.quant_state.absmax)
                assert torch.equal(state.state2.absmax, parameter.quant_state.state2.absmax)
                assert torch.equal(state.offset, parameter.quant_state.offset)
                assert parameter.quant_state.dtype == torch.bfloat16
                num_linear += 1
            else:
                assert torch.equal(weights[name].bfloat16(), parameter)
        assert num_linear == 2 * 7


def test_kept_folder_holds_the_bases_own_configuration(plain_folder: Path, cache: Path) -> None:
    load(known(plain_folder))
    [kept] = [path for path in cache.iterdir() if path.is_dir()]
    config = json.loads((kept / "config.json").read_text())
    assert config.pop("quantization_config") == {**quantized.NF4, "bnb_4bit_compute_dtype": "bfloat16"}
    assert config == json.loads((plain_folder / "config.json").read_text())
    manifest = json.loads((kept / "manifest.json").read_text())
    assert manifest["source"]["commit"] == known(plain_folder).commit
    assert set(manifest["files"]) == {path.name for path in kept.iterdir()} - {"manifest.json"}
    assert sorted(path.name for path in cache.iterdir()) == [kept.name, f"{kept.name}.lock"]


def test_body_is_cut_into_shards(plain_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "_SHARD_BYTES", 20_000)
    first, _ = load(known(plain_folder))
    shards = sorted(cache.glob("*/*.safetensors"))
    sizes = [sum(tensor.nbytes for tensor in load_file(shard).values()) for shard in shards]
    assert len(shards) > 3
    assert all(size <= 20_000 or len(load_file(shard)) == 1 for shard, size in zip(shards, sizes, strict=True))
    second, said = load(known(plain_folder))
    assert said == []
    assert base.fingerprint(second) == base.fingerprint(first)


def test_another_base_or_dtype_is_another_body(plain_folder: Path, cache: Path) -> None:
    first, _ = load(known(plain_folder))
    load(known(plain_folder), "float16")
    weights = load_file(plain_folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] *= 2
    save_file(weights, plain_folder / "model.safetensors", {"format": "pt"})
    changed, said = load(known(plain_folder))
    assert said[0].startswith("kept")
    assert base.fingerprint(changed) != base.fingerprint(first)
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 3
    source = quantized.Source.of("c" * 40, "bfloat16", torch.device("cuda"))
    assert source.folder.name.startswith(f"{'c' * 40}-bfloat16-cuda-bitsandbytes")


def test_weights_without_nf4_are_not_kept(plain_folder: Path, cache: Path) -> None:
    load(known(plain_folder), quantization="none")
    assert not cache.exists()


def test_room_for_a_download_is_not_asked_for_where_the_body_is_kept(
    plain_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight.hub, "download_sizes", lambda *_: (10**6, 10**16))
    monkeypatch.setattr(base.BaseId, "files", lambda _: plain_folder)
    for other in ("_run_volume", "_memory"):
        monkeypatch.setattr(preflight, other, lambda *_: None)
    run: Any = None
    work: Any = None
    recipe = make_recipe(tmp_path, {"model": {"quantization": "nf4", "compute_dtype": "bfloat16"}})
    identity = base.BaseId("org/tiny", "org/tiny", "d" * 40)
    with pytest.raises(WakeError, match=r"org/tiny needs 9313225\.75 GiB"):
        preflight.check(recipe, run, identity, work)
    monkeypatch.setattr(base, "_whole_folder", lambda *_: plain_folder)
    load(identity)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = quantized.Source.of(identity.commit, "bfloat16", torch.device(device))
    source.folder.mkdir(exist_ok=True)
    (source.folder / "manifest.json").touch()
    preflight.check(recipe, run, identity, work)
    with pytest.raises(WakeError, match="org/tiny needs"):
        preflight.check(make_recipe(tmp_path), run, identity, work)  # not quantised: the weights are read


# --- damage


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a flipped bit": (lambda f: flip(f / "model-00001.safetensors", -1), "the content of model-00001.safetensors does"),
    "its header": (lambda f: flip(f / "model-00001.safetensors", 30), "the content of model-00001.safetensors does"),
    "cut off": (lambda f: os.truncate(f / "model-00001.safetensors", 9000), "the content of model-00001"),
    "a file lacks": (lambda f: (f / "model-00001.safetensors").unlink(), "model-00001.safetensors is missing"),
    "a file more": (lambda f: (f / "adapter_config.json").write_text("{}"), "adapter_config.json is missing or does"),
    "configuration": (lambda f: write_config(f, rms_norm_eps=1e-3), "the content of config.json does not match"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json: no such file"),
    "manifest no JSON": (lambda f: (f / "manifest.json").write_text("{"), "manifest.json: damaged"),
    "another body": (
        lambda f: (f / "manifest.json").write_text((f / "manifest.json").read_text().replace("sha256:", "sha256:0")),
        "its manifest.json does not say what the folder's name says",
    ),
    "a link to nowhere": (
        lambda f: (f / "config.json").unlink() or (f / "config.json").symlink_to("nowhere"),
        "config.json cannot be read: No such file",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_body_is_named_and_made_again(kind: str, plain_folder: Path, cache: Path) -> None:
    first, _ = load(known(plain_folder))
    [kept] = [path for path in cache.iterdir() if path.is_dir()]
    damage, reason = DAMAGE[kind]
    damage(kept)
    second, said = load(known(plain_folder))
    assert said[0].startswith(f"quantised body {kept} is damaged: ")
    assert reason in said[0]
    assert said[1].startswith("kept the quantised body")
    assert base.fingerprint(second) == base.fingerprint(first)
    third, said = load(known(plain_folder))
    assert said == []
    assert base.fingerprint(third) == base.fingerprint(first)


# --- a body that cannot be kept


def test_full_disk_is_said_beforehand(plain_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    _, said = load(known(plain_folder))
    assert "0.0 GB free, the quantised body takes 0.0 GB and is not kept" in said[0]
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("number", [1, 2])
def test_disk_that_fills_up_ends_nothing(
    number: int, plain_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write of the first or the second shard fails as it does on a real full disk."""
    monkeypatch.setattr(quantized, "_SHARD_BYTES", 100_000)
    plain = quantized.save_file

    def failing(tensors: Any, path: Path, metadata: Any) -> None:
        plain(tensors, "/dev/full" if path.name == f"model-{number:05d}.safetensors" else path, metadata)

    monkeypatch.setattr(quantized, "save_file", failing)
    first, said = load(known(plain_folder))
    assert len(said) == 1
    assert "the quantised body is not kept (" in said[0]
    assert "No space left on device" in said[0]
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []
    monkeypatch.undo()
    assert base.fingerprint(load(known(plain_folder))[0]) == base.fingerprint(first)


def test_cache_that_is_a_file_ends_nothing(plain_folder: Path, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("not a folder")
    _, said = load(known(plain_folder))
    assert f"{cache}: the quantised body is not kept (" in said[0]


def test_other_process_keeps_it(plain_folder: Path, cache: Path) -> None:
    cache.mkdir(parents=True)
    folder = quantized.Source.of(known(plain_folder).commit, "bfloat16", CPU).folder
    with open(folder.with_name(f"{folder.name}.lock"), "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        load(known(plain_folder))
        assert not folder.exists()


def test_what_a_killed_process_left_is_removed(plain_folder: Path) -> None:
    folder = quantized.Source.of(known(plain_folder).commit, "bfloat16", CPU).folder
    left = folder.with_name(f".{folder.name}.building")
    left.mkdir(parents=True)
    (left / "model-00009.safetensors").write_bytes(b"half")
    load(known(plain_folder))
    assert folder.is_dir()
    assert not left.exists()
    assert load(known(plain_folder))[1] == []


def test_stop_while_writing_leaves_nothing(plain_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(quantized, "write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        load(known(plain_folder))
    assert [path for path in cache.iterdir() if path.is_dir()] == []


# --- checkpoints that come quantised


@pytest.fixture
def in_nf4(plain_folder: Path, tmp_path: Path, cache: Path) -> Path:
    """Return the base as others publish it in 4 bits: saved by transformers, with a compute dtype of their own."""
    frozen, _ = load(known(plain_folder), "float16")
    folder = tmp_path / "in-nf4"
    frozen.causal_lm.save_pretrained(folder)
    for path in plain_folder.glob("tokenizer*"):
        shutil.copy(path, folder)
    shutil.rmtree(cache)
    return folder


def test_checkpoint_in_nf4_loads_as_it_is(in_nf4: Path, plain_folder: Path, cache: Path) -> None:
    expected, _ = load(known(plain_folder), "float16")
    shutil.rmtree(cache)
    frozen, said = load(known(in_nf4), "float16")
    assert base.fingerprint(frozen) == base.fingerprint(expected)
    assert said == []
    assert not cache.exists()  # what is in 4 bits already is not kept a second time


def test_recipe_decides_what_is_computed_in(in_nf4: Path) -> None:
    frozen, _ = load(known(in_nf4), "bfloat16")
    linear: Any = frozen.body.get_submodule("layers.0.mlp.up_proj")
    assert type(linear).__name__ == "Linear4bit"
    assert linear.compute_dtype == torch.bfloat16
    assert frozen.table_VD.dtype == torch.bfloat16


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, "quantised as gptq, wake2vec reads bitsandbytes nf4"),
    "awq": ({"quant_method": "awq", "bits": 4}, "quantised as awq"),
    "fp8": ({"quant_method": "fp8"}, "quantised as fp8"),
    "8-bit": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "quantised as bitsandbytes 8-bit"),
    "fp4": ({**quantized.NF4, "bnb_4bit_quant_type": "fp4"}, "quantised as fp4"),
    "old 8-bit": ({"load_in_8bit": True}, "quantised as bitsandbytes 8-bit"),
    "unnamed": ({"bits": 4}, "quantised as an unnamed method"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_quantisations_are_refused_before_weights_are_read(kind: str, plain_folder: Path, cache: Path) -> None:
    settings, message = REFUSED[kind]
    write_config(plain_folder, quantization_config=settings)
    (plain_folder / "model.safetensors").unlink()
    for quantization in ("nf4", "none"):
        with pytest.raises(WakeError, match=message):
            load(known(plain_folder), quantization=quantization)
    assert not cache.exists()


def test_nf4_checkpoint_contradicts_a_recipe_without_quantisation(in_nf4: Path, tmp_path: Path) -> None:
    (in_nf4 / "model.safetensors").unlink()
    message = r"quantised as nf4, model\.quantization is 'none'; set model\.quantization = \"nf4\""
    with pytest.raises(WakeError, match=message):
        load(known(in_nf4), quantization="none")
    recipe = make_recipe(tmp_path)
    with pytest.raises(WakeError, match=message):
        resume.plan_work(recipe, SimpleNamespace(base=known(in_nf4), num_new_tokens=10))
    with pytest.raises(WakeError, match=message):
        preflight.check_download(recipe, known(in_nf4))


# --- where the input table lies


def test_table_on_host_is_the_same_table(folder: Path) -> None:
    identity = known(folder)
    usual, _ = load(identity)
    other = base.with_table_on_host(load(identity)[0])
    assert base.fingerprint(other) == base.fingerprint(usual)
    assert torch.equal(other.table_VD, usual.table_VD)
    assert other.table_VD.device == CPU
    assert other.tied == usual.tied
    table = other.causal_lm.get_input_embeddings().weight
    assert table.data_ptr() == other.table_VD.data_ptr()  # no second table stays behind the first
    assert not table.requires_grad
    assert torch.equal(logits(other), logits(usual))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_table_on_host_frees_the_cards_copy(plain_folder: Path) -> None:
    identity, device = known(plain_folder), torch.device("cuda")
    usual, _ = load(identity, device=device)
    fingerprint = base.fingerprint(usual)
    table_bytes = usual.causal_lm.get_input_embeddings().weight.nbytes
    del usual
    before = torch.cuda.memory_allocated()
    usual, _ = load(identity, device=device)
    whole = torch.cuda.memory_allocated() - before
    del usual
    other = base.with_table_on_host(load(identity, device=device)[0])
    assert torch.cuda.memory_allocated() - before <= whole - table_bytes
    assert other.table_VD.is_pinned()
    assert other.device.type == "cuda"
    assert base.fingerprint(other) == fingerprint


def test_transformers_reserves_nothing_ahead(plain_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its warm-up would take 14 GB of a card for a 14B whose body is 8."""
    from transformers import modeling_utils

    def warmup(*_: Any, **__: Any) -> None:
        raise AssertionError("reserved")

    monkeypatch.setattr(modeling_utils, "caching_allocator_warmup", warmup)
    load(known(plain_folder))
    assert modeling_utils.caching_allocator_warmup is warmup
