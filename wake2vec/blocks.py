"""A run's text and words as blocks of tokens: cut once, and kept for the next start.

To add 44,000 words to a tokenizer, and to prove that it gives the text back, takes ten seconds. The same inputs give
the same blocks under the same versions. In WAKE2VEC_CACHE and safe to delete: blocks/<key>.safetensors.
"""

import contextlib
import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from wake2vec import __version__, sentry, tokens
from wake2vec.base import BaseId
from wake2vec.data import Blocks, Split, make_blocks
from wake2vec.rundir import cache_folder, make_folder

FORMAT = 1
"""To be raised when the same inputs are cut, or kept, otherwise."""
_PARTS = ("train", "val", "lexicon", "base_val")


@dataclass(frozen=True)
class Cut:
    """A text and a lexicon in tokens.

    Attributes:
        words: those that were no tokens yet; `words[i]` has id `first_new_id + i`.
        tokenizer_sha256: of the tokenizer with the words in it.
        train, val: the text's two parts; `lexicon`: the words, one a line.
        base_val: the held-out part by the base's own tokenizer.
    """

    words: tuple[str, ...]
    first_new_id: int
    tokenizer_sha256: str
    train: Blocks
    val: Blocks
    lexicon: Blocks
    base_val: Blocks


def cut(
    text: str,
    split: Split,
    lexicon: Sequence[str],
    base: BaseId,
    base_tokenizer: Any,
    *,
    match: Literal["word", "substring"],
    seq_len: int,
    where: str,
) -> Cut:
    """Add the words to the base's tokenizer and cut the text into blocks, or take what an earlier start kept.

    Args:
        where: what the text is called in an error.

    Raises:
        WakeError: no word is new, or the tokenizer does not give the text back.
    """
    key = _key(text, split, lexicon, base, match, seq_len)
    path = cache_folder() / "blocks" / f"{key}.safetensors"
    kept = _read(path, key, lexicon)
    if kept is not None:
        return kept
    words = tokens.add_words(base_tokenizer, list(lexicon), match)
    tokens.check_round_trip(words.tokenizer, text, where)

    def blocks(part: str, tokenizer: Any) -> Blocks:
        return make_blocks(*tokens.encode(tokenizer, part), seq_len, tokens.bos_id(tokenizer))

    made = Cut(
        words.words,
        words.first_new_id,
        tokens.tokenizer_sha256(words.tokenizer),
        train=blocks(split.train_text, words.tokenizer),
        val=blocks(split.val_text, words.tokenizer),
        lexicon=blocks("\n".join(lexicon), words.tokenizer),
        base_val=blocks(split.val_text, base_tokenizer),
    )
    with contextlib.suppress(OSError):  # the next start cuts again
        _write(path, key, made, lexicon)
    return made


def _key(text: str, split: Split, lexicon: Sequence[str], base: BaseId, match: str, seq_len: int) -> str:
    """Return the hash of all that decides how a text is cut."""
    versions = {name: importlib.metadata.version(name) for name in ("tokenizers", "transformers")}
    parts = [FORMAT, __version__, versions, base.commit, match, seq_len, split.sha256]
    texts = [hashlib.sha256(part.encode()).hexdigest() for part in (text, "\n".join(lexicon))]
    return hashlib.sha256(json.dumps([*parts, *texts]).encode()).hexdigest()


def _read(path: Path, key: str, lexicon: Sequence[str]) -> Cut | None:
    try:
        kept = sentry.read(path)
    except sentry.DamagedError:  # or not there
        return None
    if kept.header["identity"] != key:
        return None
    counts = kept.header["counts"]
    return Cut(
        tuple(word for word, is_new in zip(lexicon, kept.tensors["is_new"].tolist(), strict=True) if is_new),
        kept.header["first_new_id"],
        kept.header["tokenizer_sha256"],
        **{name: Blocks(kept.tensors[name], *counts[name]) for name in _PARTS},
    )


def _write(path: Path, key: str, made: Cut, lexicon: Sequence[str]) -> None:
    new = set(made.words)
    parts: dict[str, Blocks] = {name: getattr(made, name) for name in _PARTS}
    header = {
        "format": sentry.FORMAT,
        "step": 0,
        "identity": key,
        "first_new_id": made.first_new_id,
        "tokenizer_sha256": made.tokenizer_sha256,
        "counts": {name: [part.num_scored, part.scored_chars] for name, part in parts.items()},
    }
    is_new = torch.tensor([word in new for word in lexicon], dtype=torch.uint8)
    make_folder(path.parent)
    sentry.write(path, {"is_new": is_new, **{name: part.ids_KT for name, part in parts.items()}}, header)
