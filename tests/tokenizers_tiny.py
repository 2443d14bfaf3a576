"""Build small tokenizers of every kind the recipes use, in code: no hub, no stored files.

Each is what the hub's `tokenizer.json` of that family holds (normaliser, pre-tokenizer, decoder, post-processor), on a
vocabulary of a few hundred entries. `qwen` is the exception: Qwen's own vocabulary, 151,665 entries.
"""

import json
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

TEXT = """The river runs past the old mill, and the children run after it. "Where do you go?" they ask the river.
It runs, it ran, it will run: past the church, past the bridge, past the last house of the town. Nobody answers them!
Before the evening the mother calls. They come home, they eat, they sleep; the river does not sleep. It's a long way.
"Don't go there before I've told you," said the father's father. "We'll see, we're late, I'm tired, you'd better wait."
A well-known story is told again and again, and again the children listen to the story of the river and the sea.
In 1939 there were 628 pages.  Two spaces, then\ttabs,\n\n    and indented lines (with brackets), and so on...
"""

# Qwen2.5's tokenizer_config.json, ids 151,643 to 151,664; the last eight are not special there.
QWEN_SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
]
QWEN_PLAIN = [
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
]
# How Qwen2 cuts text into pieces before BPE (transformers, models/qwen2).
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MARK = "\u2581"  # SentencePiece writes a space like this


def byte_level(text: str = TEXT, vocab_size: int = 500) -> PreTrainedTokenizerFast:
    """Return a Qwen2-like tokenizer: NFC, byte-level BPE, no BOS."""
    backend = Tokenizer(models.BPE())
    _byte_level_parts(backend)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([text], trainer)
    backend.add_special_tokens([AddedToken("<|endoftext|>", normalized=False, special=True)])
    return _wrap(backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def llama3(text: str = TEXT, vocab_size: int = 500) -> PreTrainedTokenizerFast:
    """Return a Llama-3-like tokenizer: byte-level BPE without a normaliser, BOS in front."""
    backend = byte_level(text, vocab_size - 1).backend_tokenizer
    backend.normalizer = None  # type: ignore[assignment]
    backend.add_special_tokens([AddedToken("<|begin_of_text|>", normalized=False, special=True)])
    bos = ("<|begin_of_text|>", backend.token_to_id("<|begin_of_text|>"))
    template = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    return _wrap(backend, bos_token=bos[0], eos_token="<|endoftext|>")


def sentencepiece_prepend(text: str = TEXT, vocab_size: int = 500) -> PreTrainedTokenizerFast:
    """Return a Llama-2-like tokenizer (TinyLlama, Phi-3.5): a normaliser puts a mark in front of the text."""
    backend = _sentencepiece_bpe(text, vocab_size, ["<unk>", "<s>", "</s>"])
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    backend.decoder = _sentencepiece_decoder(strip=True)
    return _wrap_bos(backend, "<s>", eos_token="</s>", unk_token="<unk>")


def sentencepiece_metaspace(text: str = TEXT, vocab_size: int = 500) -> PreTrainedTokenizerFast:
    """Return a Mistral-v0.3-like tokenizer: the Metaspace pre-tokenizer puts the mark in front."""
    backend = _sentencepiece_bpe(text, vocab_size, ["<unk>", "<s>", "</s>"])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=MARK, prepend_scheme="first", split=False)
    backend.decoder = _sentencepiece_decoder(strip=True)
    return _wrap_bos(backend, "<s>", eos_token="</s>", unk_token="<unk>")


def gemma(text: str = TEXT, vocab_size: int = 500) -> PreTrainedTokenizerFast:
    """Return a Gemma-2-like tokenizer: spaces become marks, nothing is put in front but BOS."""
    backend = _sentencepiece_bpe(text, vocab_size, ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])
    backend.normalizer = normalizers.Replace(" ", MARK)
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = _sentencepiece_decoder(strip=False)
    return _wrap_bos(backend, "<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>")


KINDS = {
    "byte_level": byte_level,
    "llama3": llama3,
    "sentencepiece_prepend": sentencepiece_prepend,
    "sentencepiece_metaspace": sentencepiece_metaspace,
    "gemma": gemma,
}


@cache
def qwen() -> PreTrainedTokenizerFast:
    """Return Qwen2.5's own tokenizer, from the vocabulary file in the package `dashscope`."""
    spec = find_spec("dashscope")  # not imported: the package's import has side effects
    assert spec is not None
    assert spec.submodule_search_locations
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", "")  # tiktoken would keep a copy of the file in the temporary folder
    path = Path(spec.submodule_search_locations[0]) / "resources" / "qwen.tiktoken"
    vocab, merges = TikTokenConverter().extract_vocab_merges_from_model(str(path))
    backend = Tokenizer(models.BPE(vocab, merges, fuse_unk=False))
    _byte_level_parts(backend)
    backend.add_tokens(
        [AddedToken(token, normalized=False, special=True) for token in QWEN_SPECIAL]
        + [AddedToken(token, normalized=False, special=False) for token in QWEN_PLAIN]
    )
    other = [token for token in QWEN_SPECIAL if token != "<|endoftext|>"]
    return _wrap(backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>", additional_special_tokens=other)


def wake_lexicon() -> Path:
    """Return the project's own lexicon: it is not ours to ship, so the test skips where it is not."""
    default = Path(__file__).parents[2] / "shared" / "data" / "wake_lexicon.txt"
    path = Path(os.environ.get("WAKE2VEC_LEXICON", default))
    if not path.is_file():
        pytest.skip("wake_lexicon.txt is not distributed; WAKE2VEC_LEXICON says where it is")
    return path


def _byte_level_parts(backend: Tokenizer) -> None:
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)


def _sentencepiece_bpe(text: str, vocab_size: int, special: list[str]) -> Tokenizer:
    """Train BPE on marked ASCII words; every other character falls back to its bytes."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(replacement=MARK, prepend_scheme="first")
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special + bytes_, initial_alphabet=list(MARK), show_progress=False
    )
    learner.train_from_iterator(["".join(c for c in text if c.isprintable() and c.isascii())], trainer)
    model = json.loads(learner.to_str())["model"]  # without the byte tokens as added tokens
    merges = [tuple(pair) for pair in model["merges"]]
    backend = Tokenizer(models.BPE(model["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return backend


def _sentencepiece_decoder(strip: bool) -> decoders.Decoder:
    parts = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if strip else parts)


def _wrap_bos(backend: Tokenizer, bos: str, **special: str) -> PreTrainedTokenizerFast:
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    return _wrap(backend, bos_token=bos, **special)


def _wrap(backend: Tokenizer, **special: str | list[str]) -> PreTrainedTokenizerFast:
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_input_names=names, clean_up_tokenization_spaces=False, **special
    )
