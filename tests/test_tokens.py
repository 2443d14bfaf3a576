"""New words in tokenizers of every kind: ids, matching, and the exact way back."""

import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import tokenizers_tiny as tiny
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from wake2vec import tokens
from wake2vec.errors import WakeError
from wake2vec.lexicon import read_words

WORDS = [
    *("riverrun", "befor", "g\u00e9n\u00e9rations", "k\u00e9kkek", "phiz-\u00e0-phiz", "l'ep\u00e9e", "\u00e9t\u00e9"),
    *("na\u00efve", "'tis", "peut-\u00eatre", "\u0441\u043e\u043d", "\u7720\u3044", "o'er", "never-ending", "a-b"),
    *("za\u017c\u00f3\u0142\u0107", "a" * 40, "\u00e9's", "the-river", "\u0153uvre", "<0x41>x", "\u0109\u010a\u0120"),
]
OTHERS = [
    *("the", "The", "river", "Riverrun", "RIVERRUN", "before", "children", "\u00e9", "\u00fc", "\u65e5\u672c"),
    *("\U0001f600", "\u00df", "\u03a9", "x", "9", "_", "1939"),
]
BETWEEN = [
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", ", ", ".", "...", "'", "\u2019", '"', "(", ")", "-", "\u00ad", "\u00a0"),
    *("\u2060", " \u2060", "\u200d", "\u0301", "<s>", "</s>", "<bos>", "<|endoftext|>"),
]


def metaspace_always() -> PreTrainedTokenizerFast:
    """Return what transformers 5's own LlamaTokenizer builds for `legacy=True`."""
    base = tiny.sentencepiece_metaspace()
    base.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    return base


KINDS = {**tiny.KINDS, "metaspace_always": metaspace_always}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def base(kind: str) -> PreTrainedTokenizerFast:
    return KINDS[kind]()


def random_text(rng: random.Random) -> str:
    parts = [rng.choice(rng.choice((WORDS, OTHERS, BETWEEN, BETWEEN))) for _ in range(rng.randint(1, 14))]
    return unicodedata.normalize("NFC", "".join(parts)).replace(tokens.MARKER, "")


def new_words(wake: tokens.WakeTokens, text: str) -> list[str]:
    ids, _ = tokens.encode(wake.tokenizer, text)
    return [wake.words[id_ - wake.first_new_id] for id_ in ids if id_ >= wake.first_new_id]


@pytest.mark.parametrize("match", ["word", "substring"])
def test_round_trip_of_random_texts(base: PreTrainedTokenizerFast, match: Any) -> None:
    wake = tokens.add_words(base, WORDS, match)
    rng = random.Random(1)
    texts = [random_text(rng) for _ in range(300)]
    assert {word for text in texts for word in new_words(wake, text)} == set(WORDS)
    for text in texts:
        for tokenizer in (base, wake.tokenizer):
            ids, ends = tokens.encode(tokenizer, text)
            assert tokens.decode(tokenizer, ids) == text
            assert len(ends) == len(ids)
            assert ends == sorted(ends)
            assert ends[-1:] == [len(text)][: len(ids)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("riverrun, past", ["riverrun"]),
        ("the end riverrun", ["riverrun"]),
        (" riverrun", ["riverrun"]),
        ("  riverrun  riverrun", ["riverrun", "riverrun"]),
        ("a\nriverrun\n\nriverrun", ["riverrun", "riverrun"]),
        ('("riverrun")', ["riverrun"]),
        ("riverrun's l'riverrun", ["riverrun", "riverrun"]),
        ("a-riverrun-a", ["riverrun"]),
        ("riverrunriverrun riverruns xriverrun riverrun9 riverrun_", []),
        ("Riverrun RIVERRUN", []),
        ("before befor", ["befor"]),
        ("\u00e9t\u00e9 l'\u00e9t\u00e9, \u00e9t\u00e9s", ["\u00e9t\u00e9", "\u00e9t\u00e9"]),
        ("phiz-\u00e0-phiz peut-\u00eatre", ["phiz-\u00e0-phiz", "peut-\u00eatre"]),
        ("\u2060na\u00efve\u2060na\u00efve", ["na\u00efve", "na\u00efve"]),
        ("\u7720\u3044\u3002", ["\u7720\u3044"]),
        ("the-river the-rivers", ["the-river"]),
    ],
)
def test_whole_words(base: PreTrainedTokenizerFast, text: str, expected: list[str]) -> None:
    wake = tokens.add_words(base, WORDS, "word")
    assert new_words(wake, text) == expected
    assert tokens.decode(wake.tokenizer, tokens.encode(wake.tokenizer, text)[0]) == text


def test_substring_matches_inside_words(base: PreTrainedTokenizerFast) -> None:
    wake = tokens.add_words(base, WORDS, "substring")
    assert new_words(wake, "before riverruns") == ["befor", "riverrun"]


def test_longest_word_wins_whichever_is_ascii(base: PreTrainedTokenizerFast) -> None:
    wake = tokens.add_words(base, ["peut", "peut-\u00eatre", "\u00eatre-x", "x-y"], "word")
    assert new_words(wake, "peut-\u00eatre peut") == ["peut-\u00eatre", "peut"]


def test_text_without_new_words_keeps_the_base_tokens(base: PreTrainedTokenizerFast) -> None:
    wake = tokens.add_words(base, WORDS, "word")
    for text in (tiny.TEXT, " " + tiny.TEXT, "  The river\n", "\n the", " ", "\u00e9 \u65e5\u672c \U0001f600", ""):
        assert tokens.encode(wake.tokenizer, text) == tokens.encode(base, text)


def test_argument_is_not_modified(base: PreTrainedTokenizerFast) -> None:
    before = tokens.tokenizer_sha256(base)
    tokens.add_words(base, WORDS, "word")
    tokens.encode(base, " riverrun the")
    assert tokens.tokenizer_sha256(base) == before


def test_ids_in_the_given_order_and_known_words_left_out(base: PreTrainedTokenizerFast) -> None:
    known = next(token for token in base.get_vocab() if token.isascii() and token.isalpha() and len(token) > 2)
    wake = tokens.add_words(base, ["zulu", known, "alpha", "g\u00e9n\u00e9rations"], "word")
    assert wake.first_new_id == len(base)
    assert wake.words == ("zulu", "alpha", "g\u00e9n\u00e9rations")
    assert wake.known == (known,)
    assert len(wake.tokenizer) == len(base) + 3
    for index, word in enumerate(wake.words):
        assert tokens.encode(wake.tokenizer, f"({word})")[0].count(wake.first_new_id + index) == 1


def test_all_words_known() -> None:
    with pytest.raises(WakeError, match="all 2 words of the lexicon are tokens of this tokenizer already"):
        tokens.add_words(tiny.byte_level(), ["a", "b"], "word")


# Ends -----------------------------------------------------------------------------------------------------------------


BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}


def token_bytes(token: str, byte_level: bool) -> bytes:
    if byte_level:
        return bytes(BYTES[letter] for letter in token)
    if token.startswith("<0x"):
        return bytes([int(token[3:5], 16)])
    return token.replace(tiny.MARK, " ").encode()


def test_ends_count_characters_like_the_tokens_own_bytes(kind: str, base: PreTrainedTokenizerFast) -> None:
    """Oracle: the bytes of the tokens so far; a character counts from its first byte on."""
    marked = "prepend" in kind or "metaspace" in kind
    rng = random.Random(2)
    for text in [tiny.TEXT, " " + tiny.TEXT, *(random_text(rng) for _ in range(300))]:
        owner = [number for number, char in enumerate(text, start=1) for _ in char.encode()]
        ids, ends = tokens.encode(base, text)
        sizes = [len(token_bytes(token, "byte" in kind or kind == "llama3")) for token in decoded(base, ids)]
        done = [sum(sizes[: i + 1]) - marked for i in range(len(sizes))]
        # a mark alone in front of the text has no character of its own: it shares the first one's
        assert ends == [owner[max(size, 1) - 1] for size in done]


def decoded(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    return [tokenizer.backend_tokenizer.id_to_token(id_) for id_ in ids]


def test_ends_of_new_words(base: PreTrainedTokenizerFast) -> None:
    wake = tokens.add_words(base, WORDS, "word")
    text = " \u65e5\u672c riverrun, \U0001f600 g\u00e9n\u00e9rations\n\u00e9t\u00e9"
    ids, ends = tokens.encode(wake.tokenizer, text)
    found = [text[([0, *ends])[i] : ends[i]] for i, id_ in enumerate(ids) if id_ >= wake.first_new_id]
    assert found == ["riverrun", "g\u00e9n\u00e9rations", "\u00e9t\u00e9"]


def test_ends_reach_the_end_of_a_text_whose_end_is_dropped() -> None:
    base = tiny.byte_level()
    base.backend_tokenizer.normalizer = normalizers.Strip()
    ids, ends = tokens.encode(base, "  x  ")
    assert (len(ids), ends) == (1, [5])


# What is in a text ----------------------------------------------------------------------------------------------------


def test_names_of_special_tokens_are_plain_text(base: PreTrainedTokenizerFast) -> None:
    special = {base.bos_token_id, base.eos_token_id} - {None}
    text = f"x{base.eos_token} y {base.bos_token or ''}"
    ids, _ = tokens.encode(base, text)
    assert not special & set(ids)
    assert tokens.decode(base, ids) == text
    assert tokens.decode(base, [base.eos_token_id]) == base.eos_token


def test_marker_in_a_text_is_refused(base: PreTrainedTokenizerFast) -> None:
    with pytest.raises(WakeError, match="text: character 3 begins a pair of U\\+2060"):
        tokens.encode(base, "ab\u2060\u2060c")


def test_no_truncation(base: PreTrainedTokenizerFast) -> None:
    whole = tokens.encode(base, tiny.TEXT)
    base.backend_tokenizer.enable_truncation(4)
    base.model_max_length = 4
    assert tokens.encode(base, tiny.TEXT) == whole


def test_check_round_trip_shows_the_place() -> None:
    base = tiny.gemma()
    tokens.check_round_trip(base, "the river")
    with pytest.raises(WakeError, match=r"text: this tokenizer does not give the text back.*character 11"):
        tokens.check_round_trip(base, "the river \u2581 sea")  # SentencePiece's own mark is a space to it


# Tokenizers that cannot be made exact ---------------------------------------------------------------------------------


def test_slow_tokenizer() -> None:
    for call in (lambda t: tokens.add_words(t, WORDS, "word"), lambda t: tokens.encode(t, "a")):
        with pytest.raises(WakeError, match=r"ByT5Tokenizer is a slow .* a fast tokenizer is needed"):
            call(ByT5Tokenizer())


def test_inexact_tokenizers() -> None:
    lower = tiny.byte_level()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    spaced = tiny.byte_level()
    spaced.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    undecoded = tiny.byte_level()
    undecoded.backend_tokenizer.decoder = decoders.Fuse()
    for base in (lower, spaced, undecoded):
        with pytest.raises(WakeError, match="does not give the text back"):
            tokens.add_words(base, WORDS, "word")


def test_words_that_are_one_after_normalising() -> None:
    base = tiny.byte_level()
    base.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(WakeError, match="does not find 1 of 2 new words in a text: RIVERRUN"):
        tokens.add_words(base, ["riverrun", "RIVERRUN"], "word")


def test_vocabulary_with_holes() -> None:
    backend = Tokenizer(models.BPE({"a": 0, "b": 5}, []))
    with pytest.raises(WakeError, match="numbers new words 2 to 2, not 6 to 6"):
        tokens.add_words(PreTrainedTokenizerFast(tokenizer_object=backend), ["riverrun"], "word")


# Saved and read again -------------------------------------------------------------------------------------------------

# The class and the model type that the hub's files of each kind name.
MODELS = {
    "byte_level": ("Qwen2Tokenizer", "qwen2"),
    "llama3": ("PreTrainedTokenizerFast", "llama"),
    "sentencepiece_prepend": ("LlamaTokenizer", "llama"),
    "sentencepiece_metaspace": ("LlamaTokenizer", "mistral"),
    "gemma": ("GemmaTokenizer", "gemma2"),
}


def from_folder(folder: Path, kind: str, tokenizer_class: str | None = None) -> PreTrainedTokenizerFast:
    _, model_type = MODELS[kind]
    # with a version, transformers does not look for an old mistake of Mistral's files
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "transformers_version": "4.57.6"}))
    if tokenizer_class is not None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": tokenizer_class}))
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer


@pytest.mark.parametrize("kind", MODELS)
def test_saved_and_read_again(tmp_path: Path, kind: str) -> None:
    tokens.save(KINDS[kind](), tmp_path)
    base = from_folder(tmp_path, kind, tokenizer_class=MODELS[kind][0])
    wake = tokens.add_words(base, WORDS, "word")
    for save in (lambda path: wake.tokenizer.save_pretrained(path), lambda path: tokens.save(wake.tokenizer, path)):
        save(tmp_path / "wake")
        again = from_folder(tmp_path / "wake", kind)
        assert tokens.tokenizer_sha256(again) == tokens.tokenizer_sha256(wake.tokenizer)
        assert tokens.bos_id(again) == tokens.bos_id(wake.tokenizer) == tokens.bos_id(base)
        assert again.special_tokens_map == wake.tokenizer.special_tokens_map
        rng = random.Random(3)
        for text in (random_text(rng) for _ in range(50)):
            ids, ends = tokens.encode(again, text)
            assert (ids, ends) == tokens.encode(wake.tokenizer, text)
            assert tokens.decode(again, ids) == text


def test_saved_files_name_nothing_that_one_stack_lacks(tmp_path: Path) -> None:
    base = tiny.byte_level()
    base.add_special_tokens({"additional_special_tokens": ["<|pad|>"]})
    wake = tokens.add_words(base, WORDS, "word")
    tokens.save(wake.tokenizer, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(config.get("extra_special_tokens"), list)
    assert "added_tokens_decoder" not in config
    assert "<|pad|>" in from_folder(tmp_path, "byte_level").all_special_tokens


# Identity, BOS, pieces ------------------------------------------------------------------------------------------------


def test_sha256_tells_tokenizers_apart_and_ignores_the_last_call(base: PreTrainedTokenizerFast) -> None:
    one = tokens.add_words(base, WORDS, "word").tokenizer
    assert tokens.tokenizer_sha256(one) == tokens.tokenizer_sha256(tokens.add_words(base, WORDS, "word").tokenizer)
    others = [base, *(tokens.add_words(base, words, "word").tokenizer for words in (WORDS[:-1], WORDS[::-1]))]
    others.append(tokens.add_words(base, WORDS, "substring").tokenizer)
    hashes = {tokens.tokenizer_sha256(other) for other in (one, *others)}
    assert len(hashes) == 5
    one(["a", "b c d"], truncation=True, max_length=2)
    assert tokens.tokenizer_sha256(one) in hashes


def test_sha256_covers_vocabulary_and_bos_but_not_the_stacks_spelling() -> None:
    base = tiny.sentencepiece_metaspace()
    smaller = tiny.sentencepiece_metaspace(vocab_size=490)
    without_bos = tiny.sentencepiece_metaspace()
    without_bos.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    assert len({tokens.tokenizer_sha256(tokenizer) for tokenizer in (base, smaller, without_bos)}) == 3
    state = json.loads(base.backend_tokenizer.to_str())
    assert state["model"]["continuing_subword_prefix"] is None
    state["model"]["continuing_subword_prefix"] = ""  # as transformers 5 builds Qwen2's
    spelled = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<s>")
    assert tokens.tokenizer_sha256(spelled) == tokens.tokenizer_sha256(base)


def test_bos_id(kind: str, base: PreTrainedTokenizerFast) -> None:
    bos = {"byte_level": None, "llama3": "<|begin_of_text|>", "gemma": "<bos>"}.get(kind, "<s>")
    expected = base.get_vocab()[bos] if bos else None
    assert tokens.bos_id(base) == expected
    assert tokens.bos_id(tokens.add_words(base, WORDS, "word").tokenizer) == expected


def test_bos_that_is_named_but_not_put_in_front() -> None:
    base = tiny.byte_level()
    base.bos_token = "<|endoftext|>"
    assert tokens.bos_id(base) is None


def test_subword_pieces_are_the_words_own(kind: str, base: PreTrainedTokenizerFast) -> None:
    words = [*WORDS, "river", "x", "\u00e9"]
    for word, pieces in zip(words, tokens.subword_pieces(base, words), strict=True):
        sizes = [token_bytes(token, "byte" in kind or kind == "llama3") for token in decoded(base, pieces)]
        assert b"".join(sizes) in (word.encode(), b" " + word.encode())
        assert sizes[0] != b" "


def test_subword_pieces_stand_after_a_space(base: PreTrainedTokenizerFast) -> None:
    (pieces,) = tokens.subword_pieces(base, ["river"])
    ids, _ = tokens.encode(base, "past the river")
    assert ids[-len(pieces) :] == pieces


# The real vocabulary --------------------------------------------------------------------------------------------------


def test_qwen_vocabulary_and_real_lexicon() -> None:
    words = read_words(tiny.wake_lexicon())
    base = tiny.qwen()
    assert len(base) == 151_665
    wake = tokens.add_words(base, words, "word")
    assert (len(wake.known), len(wake.words)) == (767, 44_223)
    assert wake.first_new_id == 151_665
    assert wake.first_new_id + len(wake.words) - 1 == 195_887
    assert wake.words[152_064 - 151_665] == "pallyass"
    assert sum(wake.first_new_id + i >= 152_064 for i in range(len(wake.words))) == 43_824
    text = " ".join(words) + "\nThe before " + "'s, ".join(words[::7])
    ids, ends = tokens.encode(wake.tokenizer, text)
    assert tokens.decode(wake.tokenizer, ids) == text
    assert ends[-1] == len(text)
    pieces = tokens.subword_pieces(base, wake.words)
    assert all(pieces)
    assert max(map(max, pieces)) < 151_643
