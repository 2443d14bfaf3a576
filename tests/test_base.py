"""The base model: which one exactly, and whether what is loaded is what the loss expects."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_base
from tokenizers_tiny import byte_level
from torch import nn
from transformers import (
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.models.auto import AutoModelForCausalLM

from wake2vec import base, data, model
from wake2vec.errors import WakeError
from wake2vec.plan import Plan

CPU = torch.device("cpu")
PADDING = 12
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
DROPS = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attention_dropout": 0.5}
CAPS = {"head_dim": 32, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}

# Every architecture of the shipped recipes, with whether its head is tied and its soft-cap.
FAMILIES: dict[str, tuple[type[PretrainedConfig], dict[str, Any], bool, float | None]] = {
    "qwen14b": (Qwen2Config, {"tie_word_embeddings": False, "attention_dropout": 0.5}, False, None),
    "llama1b llama3b": (LlamaConfig, {"tie_word_embeddings": True}, True, None),
    "llama8b tinyllama": (LlamaConfig, {"tie_word_embeddings": False}, False, None),
    "mistral7b": (MistralConfig, {"tie_word_embeddings": False}, False, None),
    "phi35": (Phi3Config, {"tie_word_embeddings": False, **DROPS}, False, None),
    "gemma9b": (Gemma2Config, CAPS, True, 30.0),
}


@pytest.fixture(scope="session")
def vocab_size() -> int:
    return len(byte_level())


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory, vocab_size: int) -> Callable[..., Path]:
    """Return a function that writes a random model of a family, once each."""
    folder = tmp_path_factory.mktemp("families")

    def write(config: type[PretrainedConfig], **options: Any) -> Path:
        path = folder / f"{config.__name__} {sorted(options.items())}".replace("/", " ")
        if not path.exists():
            torch.manual_seed(5)
            settings = config(vocab_size=vocab_size + PADDING, **SIZES, **options)
            AutoModelForCausalLM.from_config(settings).save_pretrained(path)
            byte_level().save_pretrained(path)
        return path

    return write


def load(path: Path, vocab_size: int, quantization: str = "none", dtype: str = "float32") -> base.FrozenBase:
    identity = base.identify(str(path), str(path), None)
    return base.load(identity, vocab_size, quantization=quantization, compute_dtype=dtype, device=CPU)


def plain(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def random_ids(vocab_size: int) -> torch.Tensor:
    return torch.randint(vocab_size, (3, 17), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_the_recipes_loads(
    family: str, quantization: str, make: Callable[..., Path], vocab_size: int
) -> None:
    config, options, tied, softcap = FAMILIES[family]
    path = make(config, **options)
    frozen = load(path, vocab_size, quantization)
    assert (frozen.tied, frozen.softcap) == (tied, softcap)
    assert frozen.table_VD.shape == frozen.head_VD.shape == (vocab_size, 64)
    assert (frozen.table_VD.data_ptr() == frozen.head_VD.data_ptr()) == tied
    assert not any(parameter.requires_grad for parameter in frozen.causal_lm.parameters())
    assert len(base.load_tokenizer(base.identify(str(path), str(path), None))) == vocab_size
    kinds = {type(module).__name__ for module in frozen.body.modules() if isinstance(module, nn.Linear)}
    assert kinds == ({"Linear4bit"} if quantization == "nf4" else {"Linear"})
    assert frozen.table_VD.dtype == torch.float32
    assert frozen.causal_lm.training  # checkpointing asks for it
    embeds = frozen.table_VD[random_ids(vocab_size)]
    assert torch.equal(frozen.hidden(embeds), frozen.hidden(embeds))  # no dropout is left
    again = load(path, vocab_size, quantization)  # in NF4, the body that was kept
    assert base.fingerprint(again) == base.fingerprint(frozen)
    assert torch.equal(again.hidden(embeds), frozen.hidden(embeds))


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_the_plain_model(family: str, make: Callable[..., Path], vocab_size: int) -> None:
    """The oracle is transformers' own model on the same files: its logits cut at the tokenizer's length."""
    config, options, tied, _ = FAMILIES[family]
    path = make(config, **options)
    frozen, ids_BT = load(path, vocab_size), random_ids(vocab_size)
    rows = {name: torch.full((2, 64), 9.0) for name in ("input", "head") if name == "input" or not tied}
    ours_M = model.WakeModel(frozen, rows, Plan(1, "kept", 7)).base_token_losses(ids_BT)
    with torch.no_grad():
        logits_BTV = plain(path)(input_ids=ids_BT[:, :-1]).logits[..., :vocab_size]
    expected_M = nn.functional.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(ours_M, expected_M)


def test_bfloat16_is_close_to_float32(make: Callable[..., Path], vocab_size: int) -> None:
    path = make(Qwen2Config)
    frozen, whole = load(path, vocab_size, dtype="bfloat16"), load(path, vocab_size)
    assert {p.dtype for p in frozen.causal_lm.parameters()} == {torch.bfloat16}
    assert frozen.table_VD.equal(whole.table_VD.bfloat16())


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_base_is_the_same_after_evaluation_and_backward(
    quantization: str, make: Callable[..., Path], vocab_size: int
) -> None:
    frozen = load(make(Qwen2Config), vocab_size, quantization)
    before = base.fingerprint(frozen)
    rows = {"input": torch.randn(3, 64), "head": torch.randn(3, 64)}
    wake = model.WakeModel(frozen, rows, Plan(1, "recomputed", 7))
    blocks_BT = random_ids(vocab_size + 3)
    first_M = wake.token_losses(blocks_BT)
    wake.zero_grad()
    wake.backward(blocks_BT)
    assert torch.equal(wake.token_losses(blocks_BT), first_M)
    assert base.fingerprint(frozen) == before
    assert wake.rows["input"].grad is not None


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_fingerprint_sees_one_bit(quantization: str, make: Callable[..., Path], vocab_size: int) -> None:
    frozen = load(make(Qwen2Config), vocab_size, quantization)
    before = base.fingerprint(frozen)
    tensors = dict(frozen.causal_lm.named_parameters())
    for name, weight in list(tensors.items()):
        if quantization == "nf4" and hasattr(weight, "quant_state"):
            state: Any = weight.quant_state
            tensors |= {f"{name} absmax": state.absmax, f"{name} codes": state.code, f"{name} offset": state.offset}
            tensors |= {f"{name} absmax of absmax": state.state2.absmax}
    assert len(tensors) > (40 if quantization == "nf4" else 20)
    for name, tensor in tensors.items():
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        flat[-1] ^= 1
        assert base.fingerprint(frozen) != before, name
        flat[-1] ^= 1
    assert base.fingerprint(frozen) == before


@pytest.mark.parametrize(
    ("config", "options"), [(CohereConfig, {"logit_scale": 0.0625}), (GraniteConfig, {"logits_scaling": 8.0})]
)
def test_scaled_head_is_refused(
    config: type[PretrainedConfig], options: dict[str, Any], make: Callable[..., Path], vocab_size: int
) -> None:
    with pytest.raises(WakeError, match="its logits differ from a plain head's"):
        load(make(config, **options), vocab_size)


def test_biased_head_and_short_table_are_refused(make: Callable[..., Path], vocab_size: int) -> None:
    causal_lm: Any = plain(make(Qwen2Config))
    with pytest.raises(WakeError, match=rf"table has {vocab_size + 12} rows, its tokenizer {vocab_size + 13} tokens"):
        base.freeze(causal_lm, vocab_size + 13, "b")
    causal_lm.lm_head.bias = nn.Parameter(torch.zeros(vocab_size + 12))
    with pytest.raises(WakeError, match="its output head is not a plain matrix"):
        base.freeze(causal_lm, vocab_size, "b")


# --- a folder that is not whole


@pytest.fixture
def folder(make: Callable[..., Path], tmp_path: Path) -> Path:
    """Return a Qwen2 folder of this test's own."""
    return Path(shutil.copytree(make(Qwen2Config), tmp_path / "base"))


def drop(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def write_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "cannot be loaded"),
    "weights cut off": (lambda f: os.truncate(f / "model.safetensors", 5000), "cannot be loaded"),
    "weights of noise": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 99), "cannot be loaded"),
    "a layer lacks": (lambda f: drop(f, "model.layers.1.mlp.up_proj.weight"), r"1 of its weights .*up_proj.*random"),
    "the head lacks": (lambda f: drop(f, "lm_head.weight"), r"1 of its weights .*lm_head.*random"),
    "other sizes": (lambda f: write_config(f, intermediate_size=128), "its weights do not fit its config"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), r"its config\.json cannot be loaded"),
    "unknown model": (lambda f: write_config(f, model_type="nonesuch"), r"its config\.json cannot be loaded"),
    "no causal model": (lambda f: write_config(f, model_type="t5"), "cannot be loaded"),
    "code of its own": (
        lambda f: write_config(f, model_type="own", auto_map={"AutoConfig": "own.Own"}),
        r"its config\.json cannot be loaded",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_folder_that_is_not_whole_is_refused(kind: str, folder: Path, vocab_size: int) -> None:
    breaks, wanted = BROKEN[kind]
    breaks(folder)
    with pytest.raises(WakeError, match=wanted):
        load(folder, vocab_size)


def test_pickled_weights_are_never_read(folder: Path, vocab_size: int) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(WakeError, match="cannot be loaded"):
        load(folder, vocab_size)


@pytest.mark.parametrize("content", [None, "{", '{"version": "1.0"}'])
def test_folder_without_a_tokenizer_is_refused(content: str | None, folder: Path) -> None:
    for path in [*folder.glob("tokenizer*"), *folder.glob("*.txt"), *folder.glob("vocab*")]:
        path.unlink()
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(WakeError, match="tokenizer"):
        base.load_tokenizer(base.identify("b", str(folder), None))


def test_folder_is_known_by_its_content(folder: Path, tmp_path: Path) -> None:
    (folder / "extra-00001.safetensors").write_bytes(b"a shard that an index may name")
    found = base.identify("b", str(folder), None)
    assert found.commit.startswith("sha256:")
    assert found.revision is None
    assert base.identify("b", str(folder), found.commit) == found
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert base.identify("b", str(copy), found.commit).commit == found.commit
    for path in sorted(copy.iterdir()):
        content = path.read_bytes()
        path.write_bytes(content + b" ")
        with pytest.raises(
            WakeError, match=r"its files changed \(now sha256:.*, the run has sha256:.*\); put them back"
        ):
            base.identify("b", str(copy), found.commit)
        path.write_bytes(content)
    (copy / "extra-00001.safetensors").rename(copy / "extra-00002.safetensors")
    assert base.identify("b", str(copy), None).commit != found.commit


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WakeError, match=r"has no config\.json"):
        base.identify("b", str(tmp_path), None)


@pytest.mark.parametrize("source", ["./none", "/none", "~/none", "a/b/c", "../x"])
def test_path_that_is_no_folder_is_refused(source: str) -> None:
    with pytest.raises(WakeError, match="no such folder"):
        base.identify("b", source, None)


def test_folder_that_is_gone_is_not_looked_for_on_the_hub() -> None:
    with pytest.raises(WakeError, match="no such folder"):
        base.identify("data/base", "data/base", "sha256:" + "0" * 64)


# --- the hub, in a child process: its client reads its settings when it is imported

OLD, NEW = "a" * 40, "b" * 40
RESOLVE = """
import sys, time
from wake2vec.errors import WakeError
from wake2vec.hub import resolve_commit
time.sleep = lambda seconds: None  # the client waits between its attempts
for line in sys.stdin.read().splitlines():
    name, commit = line.split(" ")
    try:
        print("commit", resolve_commit(name, commit if commit != "-" else None))
    except WakeError as error:
        print("error", str(error).replace("\\n", " "))
"""


def resolve_in_child(cache: Path, *wanted: tuple[str, str | None], **settings: str) -> list[str]:
    """Return what is said of each name and commit in a process with its own settings of the hub."""
    lines = "\n".join(f"{name} {commit or '-'}" for name, commit in wanted)
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}
    settings = {"HF_HUB_CACHE": str(cache), "HF_HOME": str(cache), "OMP_NUM_THREADS": "1", **settings}
    command = [sys.executable, "-c", RESOLVE]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=False, env={**kept, **settings})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def make_cache(cache: Path) -> Path:
    """Write a cache as the hub's client lays it out: two commits of one model, `main` at the new one."""
    repo = cache / "models--org--tiny"
    for commit in (OLD, NEW):
        (repo / "snapshots" / commit).mkdir(parents=True)
        (repo / "snapshots" / commit / "config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(NEW)
    return cache


def test_commit_comes_from_the_cache_when_offline(tmp_path: Path) -> None:
    wanted: list[tuple[str, str | None]] = [
        ("org/tiny", None),
        ("org/tiny", OLD),
        ("org/tiny", "c" * 40),
        ("org/no", None),
    ]
    found = resolve_in_child(make_cache(tmp_path), *wanted, HF_HUB_OFFLINE="1")
    assert found[0] == f"commit {NEW}"
    assert found[1] == f"commit {OLD}"  # a run holds to its commit though main has moved
    assert found[2].startswith("error base model org/tiny: not in the cache and the hub cannot be reached")
    assert found[3].startswith("error base model org/no: not in the cache and the hub cannot be reached")


class FakeHub(BaseHTTPRequestHandler):
    """Answers for config.json as the hub does; a repository's name says what it is."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        kind, revision = self.path.split("/")[2], self.path.split("/")[4]
        commit = NEW if revision == "main" else revision
        error = {"gated": (401, "GatedRepo"), "gone": (404, "RepoNotFound"), "private": (401, "RepoNotFound")}.get(kind)
        if commit == "c" * 40:
            error = (404, "RevisionNotFound")
        if kind == "empty":
            error = (404, "EntryNotFound")
        if kind == "broken":
            error = (500, "")
        content = b'{"model_type": "qwen2"}'
        if kind == "cut" and body:
            self.close_connection = True  # the connection breaks before the answer
            return
        self.send_response(error[0] if error else 200)
        if error and error[1]:
            self.send_header("X-Error-Code", error[1])
            self.send_header("X-Error-Message", "a message of the hub")
        elif not error:
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{commit}"')
        self.send_header("Content-Length", str(0 if error else len(content)))
        self.end_headers()
        if body and not error:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextlib.contextmanager
def fake_hub() -> Iterator[str]:
    """Serve a hub on this machine alone and yield its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), FakeHub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


ANSWERS: list[tuple[str, str | None, str]] = [
    ("org/tiny", None, f"commit {NEW}"),
    ("org/tiny", OLD, f"commit {OLD}"),
    ("org/tiny", "c" * 40, f"error base model org/tiny: commit {'c' * 40} is not on the hub any more"),
    ("org/gated", None, "error base model org/gated: gated; accept its licence on the hub and set HF_TOKEN"),
    ("org/gone", None, "error base model org/gone: not on the hub, or private; check model.base and HF_TOKEN"),
    ("org/private", None, "error base model org/private: not on the hub, or private"),
    ("org/empty", None, "error base model org/empty: the hub did not give it"),
    ("org/cut", None, "error base model org/cut: "),
    ("org/bad--name", None, "error base model org/bad--name: neither a hub id nor a folder"),
    ("demo:nothing", None, "error base model demo:nothing: neither a hub id nor a folder"),
]


def test_every_answer_of_the_hub_has_its_message(tmp_path: Path) -> None:
    with fake_hub() as address:
        found = resolve_in_child(tmp_path, *[(name, commit) for name, commit, _ in ANSWERS], HF_ENDPOINT=address)
        assert (tmp_path / "models--org--tiny" / "refs" / "main").read_text() == NEW
    for line, (_, _, wanted) in zip(found, ANSWERS, strict=True):
        assert line.startswith(wanted)


def test_hub_that_is_not_reached_leaves_the_cache(tmp_path: Path) -> None:
    wanted: list[tuple[str, str | None]] = [("org/tiny", None), ("org/tiny", OLD), ("org/no", None)]
    with fake_hub() as address:
        pass  # nobody listens there any more
    found = resolve_in_child(make_cache(tmp_path), *wanted, HF_ENDPOINT=address)
    assert found[:2] == [f"commit {NEW}", f"commit {OLD}"]
    assert found[2].startswith("error base model org/no: not in the cache and the hub cannot be reached")


def test_hub_id_holds_to_the_commit_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        base.hub, "resolve_commit", lambda name, commit: {("org/tiny", None): NEW, ("org/tiny", OLD): OLD}[name, commit]
    )
    for commit, found in ((None, NEW), (OLD, OLD)):
        identity = base.identify("org/tiny", "org/tiny", commit)
        assert (identity.commit, identity.revision) == (found, found)


def test_tiny_base_of_the_tests_has_padding_rows(tmp_path: Path, vocab_size: int) -> None:
    frozen = load(make_base(tmp_path / "base", tied=True), vocab_size)
    table: Any = frozen.causal_lm.get_input_embeddings()
    assert len(table.weight) == vocab_size + PADDING
    assert data.PAD < 0 < len(frozen.table_VD) < len(table.weight)
