"""New words in a tokenizer, and text to tokens and back without a change.

The rules of the round trip, for byte-level (Qwen, Llama 3) and SentencePiece-style (Llama 2, Mistral, Gemma) ones:

- Every word is one added token, matched against the normalised text, all in one look-up: the longest word wins.
- A byte-level decoder takes the letters of a non-ASCII token for bytes. Such a word is stored behind MARKER, which the
  normaliser strips before matching and the decoder after decoding.
- A normaliser that puts a space in front of the text would also put one in front of every word, where nothing matches
  it: the pre-tokenizer does it instead, for the start of the text only.

Text is NFC before it comes here (the caller's duty): the Qwen tokenizers compose it, so the round trip ends in NFC.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Tokenizer  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from wake2vec.errors import WakeError

MARKER = "\u2060\u2060"
"""Two WORD JOINERs: invisible where a tool ignores the decoder. `encode` refuses a text that holds them."""

_SPACE_MARK = "\u2581"  # SentencePiece writes a space like this
_MAX_LISTED = 20
_MAX_MIXED = 2000  # words in the second, costlier part of the self-check
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_SETTINGS = ("model_max_length", "padding_side", "truncation_side", "model_input_names", "chat_template")

_PLAIN: dict[str, Any] = {
    "truncation": False,
    "padding": False,
    "split_special_tokens": True,
    "return_attention_mask": False,
    "return_token_type_ids": False,
    "verbose": False,  # no warning about a text longer than the model's context
}


@dataclass(frozen=True)
class WakeTokens:
    """A tokenizer with the new words in it; `words[i]` has id `first_new_id + i`."""

    tokenizer: PreTrainedTokenizerFast
    first_new_id: int
    words: tuple[str, ...]
    known: tuple[str, ...]
    """Words of the lexicon that were tokens already: not added."""


def add_words(tokenizer: PreTrainedTokenizerBase, words: list[str], match: Literal["word", "substring"]) -> WakeTokens:
    """Return a copy of the tokenizer with those words added that are not tokens already, in the order given.

    A word counts as known if it is an entry of the vocabulary, letter for letter. `match="word"` takes a word only
    where no letter, digit, underscore or combining mark touches it; "substring" takes it anywhere. Case counts. A
    longer word that is refused for what touches it hides a shorter one at the same place.

    The copy is of transformers' generic fast class: transformers 5 rebuilds the model's own class from vocabulary and
    merges when it loads one, and would drop the changed normaliser.

    Raises:
        WakeError: a tokenizer without a fast backend, no new word among the words, or a round trip that is not exact.
    """
    base = _fast(tokenizer)
    vocab = base.get_vocab()
    known = tuple(word for word in words if word in vocab)
    new = tuple(word for word in words if word not in vocab)
    assert len(set(new)) == len(new), "read_words refuses duplicates"
    if not new:
        raise WakeError(
            f"tokens: all {len(words)} words of the lexicon are tokens of this tokenizer already; add other words"
        )
    first_new_id = max(vocab.values()) + 1
    state = _without_prepend(json.loads(base.backend_tokenizer.to_str()))
    contents = _contents(base.backend_tokenizer.decoder, new)
    if any(content != word for content, word in zip(contents, new, strict=True)):
        state = _with_marker(state)
    extended = _wrap(base, state)
    # normalized: all words, marked or not, have to be in the same look-up, else an unmarked one inside a longer wins
    extended.add_tokens([AddedToken(content, single_word=match == "word", normalized=True) for content in contents])
    ids = [extended.backend_tokenizer.token_to_id(content) for content in contents]
    if ids != list(range(first_new_id, first_new_id + len(new))):
        raise WakeError(
            f"tokens: this tokenizer numbers new words {ids[0]} to {ids[-1]}, not {first_new_id} to "
            f"{first_new_id + len(new) - 1} after its own tokens; its vocabulary has holes: use another base model"
        )
    added = WakeTokens(extended, first_new_id, new, known)
    _check_words(added)
    return added


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """Return the token ids of a text, without BOS or EOS, and each token's end offset in the text in characters.

    The ends never decrease and the last one is len(text): tokens i..j stand for ends[j] - ends[i-1] characters. Of a
    character that several tokens share, the first token counts as its owner; white space that a tokenizer trims off a
    token's end (Llama 3 does) counts to the next token. A special token's name in the text is plain text.

    Raises:
        WakeError: the text contains MARKER.
    """
    fast = _fast(tokenizer)
    if MARKER in text:
        raise WakeError(
            f"text: character {text.index(MARKER) + 1} begins a pair of U+2060 (word joiner, invisible), which "
            "wake2vec keeps for itself; replace the pair by a single one"
        )
    # Mistral's tokenizers drop a single space in front of the text, but not the second of two.
    shift = 1 if text.startswith(" ") and decode(fast, _encode(fast, " ")[0]) == "" else 0
    ids, offsets = _encode(fast, " " * shift + text)
    ends = []
    end = min(1, len(text))  # a space mark alone in front of the text shares the first character
    for _, offset in offsets:
        end = max(end, offset - shift)
        ends.append(end)
    if ends:
        ends[-1] = len(text)
    return ids, ends


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Return the text of token ids; special tokens are written out.

    A SentencePiece-style tokenizer takes one space off the front: right for a text's first token, not for a piece out
    of its middle.
    """
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def check_round_trip(tokenizer: PreTrainedTokenizerBase, text: str, where: str = "text") -> None:
    """Raise a WakeError that shows the first place where text -> ids -> text is not identical."""
    back = decode(tokenizer, encode(tokenizer, text)[0])
    if back == text:
        return
    same = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
    start = max(0, same - 10)
    raise WakeError(
        f"{where}: this tokenizer does not give the text back: {text[start : same + 20]!r} becomes "
        f"{back[start : same + 20]!r} (character {same + 1}); change the text there or use another base model"
    )


def save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the files of a tokenizer of `add_words` so that AutoTokenizer of both stacks reads them alike.

    transformers 5 writes a class name and a list that transformers 4 does not know; 4's names are good for both.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("added_tokens_decoder", None)  # 7 MB that tokenizer.json says too
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    others = config.pop("extra_special_tokens", None)
    if isinstance(others, list):
        config["additional_special_tokens"] = others
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def subword_pieces(tokenizer: PreTrainedTokenizerBase, words: list[str] | tuple[str, ...]) -> list[list[int]]:
    """Return the base tokenizer's own pieces of each word as it stands inside a text, after a space.

    The space is part of the first piece where the tokenizer has such a piece, and left out where it is a token of its
    own. No list is empty.
    """
    before = "a "
    fast = _fast(tokenizer)
    encodings = fast([before + word for word in words], add_special_tokens=False, return_offsets_mapping=True, **_PLAIN)
    pieces = [
        [id_ for id_, (_, end) in zip(ids, offsets, strict=True) if end > len(before)]
        for ids, offsets in zip(encodings["input_ids"], encodings["offset_mapping"], strict=True)
    ]
    assert all(pieces), "a token reaches to the last character of its word"
    return pieces


def bos_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of BOS if this tokenizer puts it in front of a text by itself."""
    first = tokenizer("a", add_special_tokens=True)["input_ids"][0]
    return int(first) if first == tokenizer.bos_token_id else None


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the sha256 of all that decides ids and text: vocabulary, merges, added tokens, normaliser and so on, BOS.

    Left out is what the stacks write differently without a difference in ids, and the passing state of the last call.
    Gemma alone differs between them: transformers 5 drops its pre-tokenizer.
    """
    state = json.loads(_fast(tokenizer).backend_tokenizer.to_str())
    parts = {name: state[name] for name in ("added_tokens", "normalizer", "pre_tokenizer", "decoder")}
    parts["model"] = {name: value or None for name, value in state["model"].items()}  # "" or null: no prefix
    parts["bos_id"] = bos_id(tokenizer)
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _fast(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise WakeError(
            f"tokenizer: {type(tokenizer).__name__} is a slow (pure Python) one, a fast tokenizer is needed; use a "
            "base model whose folder has a tokenizer.json"
        )
    return tokenizer


def _encode(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, **_PLAIN)
    return encoding["input_ids"], encoding["offset_mapping"]


def _without_prepend(state: dict[str, Any]) -> dict[str, Any]:
    """Let the start of the text alone get the space in front that SentencePiece wants."""
    parts = _parts(state["normalizer"], "normalizers")
    rest = [part for part in parts if part != {"type": "Prepend", "prepend": _SPACE_MARK}]
    metaspace = {"type": "Metaspace", "replacement": _SPACE_MARK, "prepend_scheme": "first", "split": False}
    if len(rest) < len(parts) and state["pre_tokenizer"] is None:
        return {**state, "normalizer": _sequence(rest, "normalizers"), "pre_tokenizer": metaspace}
    before = state["pre_tokenizer"]
    if before is not None and before["type"] == "Metaspace" and before["prepend_scheme"] == "always":
        return {**state, "pre_tokenizer": {**before, "prepend_scheme": "first"}}
    return state


def _with_marker(state: dict[str, Any]) -> dict[str, Any]:
    """Strip MARKER last of all, in the normaliser and in the decoder."""
    strip = {"type": "Replace", "pattern": {"String": MARKER}, "content": ""}
    return {
        **state,
        "normalizer": _sequence([*_parts(state["normalizer"], "normalizers"), strip], "normalizers"),
        "decoder": _sequence([*_parts(state["decoder"], "decoders"), strip], "decoders"),
    }


def _parts(part: dict[str, Any] | None, name: str) -> list[Any]:
    if part is None:
        return []
    return list(part[name]) if part["type"] == "Sequence" else [part]


def _sequence(parts: list[Any], name: str) -> dict[str, Any] | None:
    return {"type": "Sequence", name: parts} if parts else None


def _contents(decoder: Any, words: tuple[str, ...]) -> list[str]:
    """Return each word as its token is stored: behind MARKER where the decoder would misread it."""
    if decoder is None:
        return list(words)
    return [word if decoder.decode([word]) == word else MARKER + word for word in words]


def _wrap(base: PreTrainedTokenizerFast, state: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the generic class around a serialised backend, with the base's special tokens."""
    settings = {name: getattr(base, name) for name in (*_ROLES, *_SETTINGS)}
    settings = {name: value for name, value in settings.items() if value is not None}
    # The list has another name in each stack, and transformers 4 uses the other's for something else.
    others = getattr(base, "additional_special_tokens", None) or getattr(base, "extra_special_tokens", None)
    if isinstance(others, list):
        settings["additional_special_tokens"] = others
    # transformers 4 sets the pre-tokenizer's own flag to this one, and its default is False
    settings["add_prefix_space"] = (state["pre_tokenizer"] or {}).get("add_prefix_space", False)
    backend = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **settings)


def _check_words(added: WakeTokens) -> None:
    """Find each word by itself on a line, and a sample of them between other things; demand the identical text."""
    text = "\n".join(added.words)
    ids = [id_ for id_ in encode(added.tokenizer, text)[0] if id_ >= added.first_new_id]
    if ids != list(range(added.first_new_id, added.first_new_id + len(added.words))):
        found = set(ids)
        missed = [word for i, word in enumerate(added.words) if added.first_new_id + i not in found] or ["(order)"]
        more = f" and {len(missed) - _MAX_LISTED} more" if len(missed) > _MAX_LISTED else ""
        raise WakeError(
            f"tokens: this tokenizer does not find {len(missed)} of {len(added.words)} new words in a text: "
            f"{' '.join(missed[:_MAX_LISTED])}{more}; take them out of the lexicon or use another base model"
        )
    check_round_trip(added.tokenizer, text, "tokens, the new words one a line")
    # the capital letter: a tokenizer that lowers case is not exact either
    between = (" ", ", ", "  ", "-", "\n ", "'", ". A", "x ", '"')
    special = [word for word in added.words if not word.isascii()]
    sample = special[:_MAX_MIXED] + list(added.words[:: len(added.words) // _MAX_MIXED + 1])
    mixed = "".join(word + between[i % len(between)] for i, word in enumerate(sample))
    check_round_trip(added.tokenizer, mixed, "tokens, the new words inside a text")
