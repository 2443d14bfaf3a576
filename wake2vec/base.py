"""The frozen base model: which one exactly, its tokenizer, its body in 4 bits, its two tables.

Shapes: B batch, T tokens, D hidden size, V tokens of the base tokenizer (rows past it are padding).
"""

import contextlib
import functools
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from wake2vec import hub, quantized
from wake2vec.errors import WakeError

# transformers 5 loads shards asynchronously otherwise and can reserve far more GPU memory than it uses
os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")
# pieces of memory of many sizes otherwise leave gaps that no plan can foresee
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
# says at import that an optional CPU kernel, which it would fetch from the hub, is not there
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_LEAST_TOKENS = 16
EAGER_ATTENTION = {"gemma2"}  # its attention scores are soft-capped, which the sdpa kernels ignore


def default_device() -> torch.device:
    """Return the first GPU, by its index, as torch's limits on memory want it; where there is none, the CPU."""
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class BaseId:
    """Which base model: where it is loaded from, and the commit or content hash that fixes it."""

    name: str
    source: str
    commit: str

    @property
    def revision(self) -> str | None:
        """Return its commit on the hub, None for a folder."""
        return None if self.commit.startswith("sha256:") else self.commit

    def files(self) -> Path:
        """Return the folder of its configuration and tokenizer, fetched if they are not in the cache.

        Everything is loaded from folders: by a hub id transformers would look files up again, each time.
        """
        return Path(self.source) if self.revision is None else hub.fetch_small_files(self.name, self.commit)


def identify(name: str, source: str, commit: str | None) -> BaseId:
    """Resolve a hub id or a folder to an exact base model; `commit` is the one a run holds to, if it has one.

    Raises:
        WakeError: it is not there, not to be had, or a folder's content is not what the run began with.
    """
    if os.path.isdir(source):  # pathlib's raises for a name that is too long
        found = f"sha256:{_hash_folder(Path(source))}"
        if commit not in (None, found):
            raise WakeError(f"base model {name}: its files changed (now {found}, the run has {commit}); put them back")
        return BaseId(name, source, found)
    was_folder = commit is not None and commit.startswith("sha256:")
    if was_folder or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise WakeError(f"base model {name}: no such folder; check model.base (working directory {Path.cwd()})")
    return BaseId(name, source, hub.resolve_commit(name, commit))


def _hash_folder(folder: Path) -> str:
    if not (folder / "config.json").is_file():
        raise WakeError(f"base model {folder}: has no config.json; give a folder in Hugging Face format")
    paths = sorted({path for pattern in (*hub.MODEL_FILES, "*.safetensors") for path in folder.glob(pattern)})
    digest = hashlib.sha256()
    for path, file_digest in zip(paths, quantized.hash_files(paths), strict=True):
        digest.update(f"{path.name}\0{file_digest}\n".encode())
    return digest.hexdigest()


def load_tokenizer(base: BaseId) -> Any:
    """Return the base model's own fast tokenizer."""
    _quieten()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base.files(), trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise WakeError(
            f"base model {base.name}: its tokenizer cannot be loaded ({_first_line(error)}); it needs a whole "
            "tokenizer.json"
        ) from None
    # transformers 5 makes a tokenizer of a few special tokens where there are no files
    if not tokenizer.is_fast or len(tokenizer) < _LEAST_TOKENS:
        raise WakeError(f"base model {base.name}: it has no fast tokenizer; add its tokenizer.json")
    return tokenizer


def load_config(base: BaseId) -> Any:
    """Return the base model's transformers configuration."""
    _quieten()
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(base.files(), trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WakeError(
            f"base model {base.name}: its config.json cannot be loaded ({_first_line(error)}); put it back"
        ) from None


def on_meta(config: Any) -> Any:
    """Return the transformers model of a configuration without weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")


@dataclass(frozen=True)
class FrozenBase:
    """A loaded base model; nothing in it is ever trained.

    Attributes:
        causal_lm: the transformers model, in training mode without dropout (checkpointing asks for the mode).
        body: its decoder with the final norm, `inputs_embeds` to hidden states.
        table_VD: input rows; `head_VD`: output rows, the same tensor where `tied`; both cut to V. The input rows of an
            untied base may lie in host memory: then they are looked up by ids on the host (`WakeOverlay`).
        softcap: bound of the final logits (Gemma 2) or None.
    """

    causal_lm: Any
    body: nn.Module
    table_VD: Tensor
    head_VD: Tensor
    tied: bool
    softcap: float | None

    @property
    def device(self) -> torch.device:
        """Return where the body lies."""
        return self.head_VD.device

    def hidden(self, embeds_BTD: Tensor) -> Tensor:
        """Return the normed hidden states BTD."""
        hidden_BTD: Tensor = self.body(inputs_embeds=embeds_BTD, use_cache=False).last_hidden_state
        return hidden_BTD


def _say_nothing(message: str) -> None:
    del message


def load(
    base: BaseId,
    vocab_size: int,
    *,
    quantization: str,
    compute_dtype: str,
    device: torch.device,
    say: Callable[[str], None] = _say_nothing,
) -> FrozenBase:
    """Load a base model; a body that is quantised here is kept, and taken from there the next time.

    Args:
        vocab_size: the length of its tokenizer.
        quantization: "nf4" or "none".
        say: is told what takes long, and when a body cannot be kept.

    Raises:
        WakeError: it cannot be had or loaded, or its head is of a kind that the loss does not compute.
    """
    comes_quantized = quantized.is_quantized(load_config(base), base.name, quantization)
    source = None
    if quantization == "nf4" and not comes_quantized:
        source = quantized.Source.of(base.commit, compute_dtype, device)
    load_from = functools.partial(
        load_folder, name=base.name, quantization=quantization, compute_dtype=compute_dtype, device=device
    )
    kept = _load_kept(source, load_from, say) if source else None
    folder = _whole_folder(base, say) if kept is None else None
    causal_lm = kept if folder is None else load_from(folder)
    frozen = freeze(causal_lm, vocab_size, base.name)
    _check_head(frozen, base.name)
    if source and folder:
        quantized.keep(source, causal_lm, folder / "config.json", say)
    return frozen


def _load_kept(source: quantized.Source, load_from: Callable[[Path], Any], say: Callable[[str], None]) -> Any:
    """Load a kept body while its files are read against their hashes; None where there is none or they differ."""
    if not source.folder.is_dir():
        return None
    with ThreadPoolExecutor(1) as beside:
        whole = beside.submit(quantized.is_whole, source, say)
        try:
            causal_lm = load_from(source.folder)
        except Exception:  # a damaged file may fail anywhere in transformers
            if whole.result():
                raise
        return causal_lm if whole.result() else None


def _whole_folder(base: BaseId, say: Callable[[str], None]) -> Path:
    """Return the folder with the weights, downloaded if they are not there."""
    return Path(base.source) if base.revision is None else hub.download(base.name, base.commit, say)


def load_folder(folder: Path, name: str, quantization: str, compute_dtype: str, device: torch.device) -> Any:
    """Return the transformers model of a folder, quantised on the way unless its weights are already."""
    _quieten()
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    options: dict[str, Any] = {}
    if quantized.is_quantized(config, name, quantization):
        # activations are computed in the recipe's type, whatever the file's maker had in mind
        config.quantization_config = {**_as_dict(config.quantization_config), "bnb_4bit_compute_dtype": compute_dtype}
    elif quantization == "nf4":
        how = {key: value for key, value in quantized.NF4.items() if key != "quant_method"}
        options["quantization_config"] = BitsAndBytesConfig(**how, bnb_4bit_compute_dtype=compute_dtype)
    try:
        with _no_warmup():
            causal_lm, loaded = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                dtype=getattr(torch, compute_dtype),
                device_map={"": device},
                attn_implementation="eager" if config.model_type in EAGER_ATTENTION else "sdpa",
                **options,
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise WakeError(f"base model {name}: cannot be loaded ({_first_line(error)})") from None
    except RuntimeError as error:
        if "size" not in str(error):
            raise
        raise WakeError(f"base model {name}: its weights do not fit its config.json; put both back") from None
    if loaded["missing_keys"]:
        missing = ", ".join(sorted(loaded["missing_keys"])[:3])
        raise WakeError(
            f"base model {name}: {len(loaded['missing_keys'])} of its weights are not in its files ({missing}), "
            "and would be random; put the files back"
        )
    return causal_lm


def _as_dict(config: Any) -> dict[str, Any]:
    return dict(config if isinstance(config, dict) else config.to_dict())


@contextlib.contextmanager
def _no_warmup() -> Iterator[None]:
    """Keep transformers from reserving half of the 16-bit weights' bytes on the GPU before it quantises them."""
    from transformers import modeling_utils

    plain = modeling_utils.caching_allocator_warmup
    modeling_utils.caching_allocator_warmup = lambda *_, **__: None
    try:
        yield
    finally:
        modeling_utils.caching_allocator_warmup = plain


def with_table_on_host(frozen: FrozenBase) -> FrozenBase:
    """Return the base with its input table in host memory, pinned beside a GPU; a tied one is the head, and stays."""
    if frozen.tied:
        return frozen
    embedding = frozen.causal_lm.get_input_embeddings()
    host_VD = torch.empty_like(embedding.weight, device="cpu", pin_memory=embedding.weight.is_cuda)
    embedding.weight = nn.Parameter(host_VD.copy_(embedding.weight), requires_grad=False)
    return replace(frozen, table_VD=embedding.weight.detach()[: len(frozen.table_VD)])


def freeze(causal_lm: Any, vocab_size: int, name: str) -> FrozenBase:
    """Take a transformers model apart; its parameters stop training and its dropout is off."""
    causal_lm.requires_grad_(False)
    causal_lm.train()
    for module in causal_lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack the weights in place at the first evaluation, for a kernel without a backward
            module.support_avx512bf16_for_cpu = False
    table, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None or not head.weight.is_floating_point():
        raise WakeError(f"base model {name}: its output head is not a plain matrix; use another model")
    if table.weight.shape[0] < vocab_size:
        raise WakeError(
            f"base model {name}: its table has {table.weight.shape[0]} rows, its tokenizer {vocab_size} tokens; "
            "tokenizer and model do not belong together"
        )
    return FrozenBase(
        causal_lm=causal_lm,
        body=causal_lm.base_model,
        table_VD=table.weight.detach()[:vocab_size],
        head_VD=head.weight.detach()[:vocab_size],
        tied=head.weight is table.weight or head.weight.data_ptr() == table.weight.data_ptr(),
        softcap=getattr(causal_lm.config, "final_logit_softcapping", None),
    )


@torch.no_grad()
def _check_head(base: FrozenBase, name: str) -> None:
    """Compare the logits as the loss computes them with the model's own: a scaled or biased head would show."""
    from wake2vec.loss import logits

    ids_BT = torch.arange(8, device=base.device)[None]
    expected_BTV = base.causal_lm(input_ids=ids_BT, use_cache=False).logits[..., : len(base.head_VD)].float()
    hidden_BTD = base.hidden(base.table_VD[ids_BT])
    no_rows_ND = base.head_VD.new_zeros(0, base.head_VD.shape[1])
    ours_MV = logits(hidden_BTD.flatten(0, 1), base.head_VD, no_rows_ND, softcap=base.softcap).float()
    difference = (ours_MV - expected_BTV.flatten(0, 1)).abs().max() / expected_BTV.abs().max()
    # two kernels may round a bfloat16 logit differently; a head of another kind is off by far more
    if not difference < 2e-2:
        raise WakeError(
            f"base model {name}: its logits differ from a plain head's by {difference:.2g}; use another model"
        )


def fingerprint(base: FrozenBase) -> str:
    """Return a hash over every parameter, buffer and quantisation state of the base, to prove that none changed."""
    digest = hashlib.sha256()
    for key, tensor in sorted(base.causal_lm.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _quieten() -> None:
    """Keep transformers' progress bars and load reports off the terminal: the console has its own."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
