"""What `train demo` starts from, made once from English that every Python carries: no network, GPU or account.

    base/          a tiny untied Qwen2, pretrained here on one part of that English, in Hugging Face format
    text.txt       the other part, with frequent words turned into blends that the base has never seen
    lexicon.txt    the blends, rarest first

Shapes: B batch, T tokens, K tokens of the pretraining text, V rows of the base matrices.
"""

import collections
import contextlib
import hashlib
import math
import re
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from tokenizers import (  # type: ignore[import-untyped]
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from torch import Tensor
from torch.nn import functional
from transformers import Qwen2Config, Qwen2ForCausalLM

from wake2vec.errors import WakeError
from wake2vec.rundir import alone, built, make_folder, write_file, write_json

_FILES = ("text.txt", "lexicon.txt", "base/config.json", "base/model.safetensors", "base/tokenizer.json")
_TEXT_SHARE = 0.4
_RUN_OF_PARAGRAPHS = 6
_NUM_WORDS = 300
_LEAST_OCCURRENCES = 8
_WORD = re.compile(r"(?<![\w'-])[a-z]{4,}(?![\w'-])")
_END_OF_TEXT = "<|endoftext|>"
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LEAST_PADDING_ROWS = 8
_SAY_EVERY = 20


@dataclass(frozen=True)
class Pretraining:
    """How the base is made; the defaults are tuned so that two slow cores need about a minute."""

    vocab_size: int = 2048
    """Tokens, <|endoftext|> with them; the matrices have some rows more."""
    hidden_size: int = 128
    """A multiple of 64, the block of NF4; so is `intermediate_size`."""
    intermediate_size: int = 384
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    steps: int = 500
    batch_size: int = 8
    seq_len: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    seed: int = 42


PRETRAINING = Pretraining()


def _say_nothing(line: str) -> None:
    del line


def prepare(folder: Path, say: Callable[[str], None] = _say_nothing, pretraining: Pretraining = PRETRAINING) -> None:
    """Make the demo's folder unless it is there: complete or absent, whoever else is making it or was killed at it.

    `say` is given a line of progress every few seconds.

    Raises:
        WakeError: the folder cannot be made, or is there without all of its files.
    """
    try:
        if _is_prepared(folder):
            return
        make_folder(folder.parent)
        with alone(folder, lambda: say("demo: another process is making the base model; waiting for it")):
            if not _is_prepared(folder):
                _make(folder, say, pretraining)
    except OSError as error:
        problem = f"{error.strerror} at {error.filename or folder}"
        raise WakeError(f"demo folder {folder}: cannot be made ({problem}); check the volume and its owner") from None


def _is_prepared(folder: Path) -> bool:
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing and folder.is_dir() and any(folder.iterdir()):
        raise WakeError(f"demo folder {folder}: {', '.join(missing)} missing; remove the folder, it is made again")
    return not missing


def _make(folder: Path, say: Callable[[str], None], pretraining: Pretraining) -> None:
    with built(folder) as building:
        (building / "base").mkdir()
        base_text, text, words = make_texts()
        write_file(building / "text.txt", [text.encode()])
        write_file(building / "lexicon.txt", ["".join(f"{word}\n" for word in words).encode()])
        write_base(building / "base", base_text, pretraining, say)


def make_texts() -> tuple[str, str, list[str]]:
    """Return the base's text, the text with blends in it, and the blends with the rarest first."""
    paragraphs = english_paragraphs()
    base_text, text = split_paragraphs(paragraphs, _TEXT_SHARE)
    blends = choose_blends(text, "\n".join(paragraphs).lower())
    blended = _WORD.sub(lambda match: blends.get(match[0], match[0]), text)
    counts = collections.Counter(_WORD.findall(blended))
    return base_text, blended, sorted(blends.values(), key=lambda word: (counts[word], word))


def english_paragraphs() -> list[str]:
    """Return the paragraphs of Python's own help, each once: its topics repeat one another."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise WakeError("demo: this Python lacks pydoc_data.topics; use one with its whole standard library") from None
    paragraphs: dict[str, str] = {}
    for topic in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", unicodedata.normalize("NFC", topics[topic])):
            paragraphs.setdefault(" ".join(paragraph.split()), paragraph.strip("\n"))
    paragraphs.pop("", None)
    return list(paragraphs.values())


def split_paragraphs(paragraphs: Sequence[str], share: float) -> tuple[str, str]:
    """Return two texts without a common paragraph: runs of paragraphs are dealt out, `share` of them to the second."""
    runs = ["\n\n".join(paragraphs[i : i + _RUN_OF_PARAGRAPHS]) for i in range(0, len(paragraphs), _RUN_OF_PARAGRAPHS)]
    order = sorted(range(len(runs)), key=lambda run: _hash(f"run {run}"))
    second = set(order[: round(share * len(runs))])
    texts = ["\n\n".join(run for i, run in enumerate(runs) if (i in second) is wanted) for wanted in (False, True)]
    return texts[0] + "\n", texts[1] + "\n"


def choose_blends(text: str, english: str) -> dict[str, str]:
    """Return the frequent words of a text, each with its blend; no blend occurs in `english`, even inside a word."""
    counts = collections.Counter(_WORD.findall(text))
    often = [word for word in counts if counts[word] >= _LEAST_OCCURRENCES]
    frequent = sorted(often, key=lambda word: (-counts[word], word))[:_NUM_WORDS]
    blends: dict[str, str] = {}
    for word in frequent:
        partners = sorted(frequent, key=lambda partner: _hash(f"{word} {partner}"))
        made = (blend(word, partner) for partner in partners)
        free = (new for new in made if 5 <= len(new) <= 12 and new not in english and new not in blends.values())
        if (new := next(free, None)) is not None:
            blends[word] = new
    return blends


def blend(word: str, partner: str) -> str:
    """Join the head of a word, up to a vowel past its middle, to the tail of another from a vowel near its middle."""
    head = next((i for i in range((len(word) + 1) // 2, len(word)) if word[i] in "aeiou"), len(word) - 1)
    tail = next((i for i in range(len(partner) // 2, 0, -1) if partner[i] in "aeiou"), 0)
    return word[:head] + partner[tail:]


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def write_base(folder: Path, text: str, pretraining: Pretraining, say: Callable[[str], None]) -> None:
    """Pretrain a base model on a text and write it in Hugging Face format, the same for every transformers."""
    tokenizer = train_tokenizer(text, pretraining.vocab_size)
    config = base_config(tokenizer.get_vocab_size(), pretraining)
    model = pretrain(config, torch.tensor(tokenizer.encode(text).ids), pretraining, say)
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    write_file(folder / "tokenizer.json", [tokenizer.to_str(pretty=True).encode()])
    write_json(folder / "tokenizer_config.json", _TOKENIZER_CONFIG)
    write_file(folder / "model.safetensors", [safetensors.torch.save(weights, metadata={"format": "pt"})])
    write_json(folder / "generation_config.json", {key: config[key] for key in ("eos_token_id", "pad_token_id")})
    write_json(folder / "config.json", config)


_TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": _END_OF_TEXT,
    "pad_token": _END_OF_TEXT,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 512,
}


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer built like Qwen2's, its special token last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_QWEN_SPLIT), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.add_special_tokens([_END_OF_TEXT])
    return tokenizer


def base_config(num_tokens: int, pretraining: Pretraining) -> dict[str, object]:
    """Return config.json; the matrices are padded past the tokenizer to a multiple of 64, as Qwen's are."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": -(-(num_tokens + _LEAST_PADDING_ROWS) // 64) * 64,
        "hidden_size": pretraining.hidden_size,
        "intermediate_size": pretraining.intermediate_size,
        "num_hidden_layers": pretraining.num_layers,
        "num_attention_heads": pretraining.num_heads,
        "num_key_value_heads": pretraining.num_kv_heads,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "initializer_range": 0.02,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "bos_token_id": None,
        "eos_token_id": num_tokens - 1,
        "pad_token_id": num_tokens - 1,
        "torch_dtype": "bfloat16",
    }


def pretrain(
    config: Mapping[str, object], ids_K: Tensor, pretraining: Pretraining, say: Callable[[str], None]
) -> Qwen2ForCausalLM:
    """Train a model from scratch in float32 on random stretches of a text, on the device where its ids lie.

    The caller's random state is left alone.
    """
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(pretraining.seed)
        model = Qwen2ForCausalLM(Qwen2Config.from_dict(dict(config))).float().to(ids_K.device)
        model.train()
        optimizer = torch.optim.AdamW(_parameter_groups(model, pretraining.weight_decay), betas=(0.9, 0.98))
        started = time.monotonic()
        for step in range(1, pretraining.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = pretraining.learning_rate * _rate_at(step, pretraining.steps)
            loss = _loss(model, _stretches(ids_K, pretraining))
            torch.autograd.backward(loss)  # the method is untyped
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % _SAY_EVERY == 0:
                left_s = (time.monotonic() - started) / step * (pretraining.steps - step)
                say(
                    f"demo: pretraining the base model, once: step {step} of {pretraining.steps}, "
                    f"loss {loss.item():.2f}, {left_s:.0f} s left"
                )
    return model


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one core: the same model on any number of them, and no waiting for cores that others use.

    Measured on two cores: 60 s in place of 39 s when idle, 150 s in place of 230 s when busy.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _parameter_groups(model: Qwen2ForCausalLM, weight_decay: float) -> list[dict[str, object]]:
    matrices = [p for name, p in model.named_parameters() if p.ndim > 1 and "embed_tokens" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or "embed_tokens" in name]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _rate_at(step: int, steps: int) -> float:
    warmup = max(1, steps // 12)
    return min(step / warmup, 0.5 + 0.5 * math.cos(math.pi * (step - 1) / steps))


def _stretches(ids_K: Tensor, pretraining: Pretraining) -> Tensor:
    starts_B = torch.randint(len(ids_K) - pretraining.seq_len, (pretraining.batch_size,))
    return torch.stack([ids_K[start : start + pretraining.seq_len + 1] for start in starts_B.tolist()])


def _loss(model: Qwen2ForCausalLM, ids_BT: Tensor) -> Tensor:
    logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten())
