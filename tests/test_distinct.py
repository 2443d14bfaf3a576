"""A lexicon out of a text, and the check of one: by hand on small texts."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from wordfreq import zipf_frequency

from wake2vec import cli, distinct
from wake2vec.errors import WakeError
from wake2vec.lexicon import read_words

TEXT = (
    "riverrun, past Eve and Adam's. The Riverrun runs past the mill; bababad! bababad bababad.\n"
    "Some funfer-\nall is here, and a swan-song of the o'erflow befor the \u00e9ternit\u00e9 came. It was xy.\n"
)


def kept(text: str, **options: float) -> dict[str, distinct.Entry]:
    return {entry.word: entry for entry in distinct.extract(text, **options) if not entry.dropped}  # type: ignore[arg-type]


def reasons(text: str) -> dict[str, str]:
    return {entry.word: entry.dropped for entry in distinct.extract(text)}


def test_distinctive_words_are_found_with_counts() -> None:
    found = kept(TEXT)
    assert {word: entry.count for word, entry in found.items()} == {
        "bababad": 3,
        "riverrun": 2,
        "funferall": 1,
        "o'erflow": 1,
        "swan-song": 1,
        "\u00e9ternit\u00e9": 1,
    }
    assert next(iter(found)) == "bababad"


def test_scores_are_zipf_differences() -> None:
    entries = {entry.word: entry for entry in distinct.extract("river " * 9 + "bababad")}
    assert entries["river"].zipf_text == pytest.approx(8.954, abs=1e-3)  # log10(0.9 * 1e9)
    assert entries["river"].zipf_general == zipf_frequency("river", "en")
    assert entries["river"].score == pytest.approx(8.954 - zipf_frequency("river", "en"), abs=1e-3)
    assert entries["bababad"].zipf_text == 8
    assert entries["bababad"].zipf_general == 0


def test_what_is_dropped_says_why() -> None:
    found = reasons(TEXT)
    assert found["the"] == "general English"
    assert found["xy"] == "short"
    assert found["befor"] == "stump of before"
    assert "all" not in found
    assert reasons("a funfer-\nall and one funfer more")["funfer"] == "hyphenation fragment"
    assert {e.word: e.dropped for e in distinct.extract("quark quarkish", min_count=2)}["quarkish"] == "rare"


def test_composed_and_decomposed_letters_are_one_word() -> None:
    found = kept("e\u0301ternite\u0301 \u00e9ternit\u00e9 \u00c9TERNIT\u00c9")
    assert {word: entry.count for word, entry in found.items()} == {"\u00e9ternit\u00e9": 3}


def test_a_text_without_words_is_refused() -> None:
    with pytest.raises(WakeError, match="has no words"):
        distinct.extract("123 456 --- !!")


def test_check_names_unseen_known_and_fragments() -> None:
    words = ["riverrun", "nowhere", "the", "o'erflow", "swan", "song", "funfer", "befor", "river"]
    found = distinct.check(words, TEXT, {"the": 5, "river": 7})
    # "funfer" stands at a line's end before its hyphen: whole-word matching would find it there
    assert found.unseen == ["nowhere", "river"]
    assert found.known == ["the", "river"]
    assert found.fragments == ["funfer", "befor"]
    assert distinct.check(words, TEXT, None).known is None


@pytest.fixture
def wake2vec(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def run(*arguments: str | Path) -> int:
        monkeypatch.setattr(sys, "argv", ["wake2vec", *map(str, arguments)])
        return cli._run()

    return run


def test_command_writes_a_list_that_a_run_reads(
    wake2vec: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "words.txt"
    text.write_text(TEXT, "utf-8")
    assert wake2vec("lexicon", text, "--out", out) == 0
    assert set(read_words(out)) == set(kept(TEXT))
    table = (tmp_path / "words.tsv").read_text("utf-8").splitlines()
    assert table[0].split("\t") == ["word", "count", "zipf_text", "zipf_general", "score", "dropped"]
    assert len(table) > len(read_words(out)) + 1
    capsys.readouterr()
    assert wake2vec("lexicon", text) == 0
    assert capsys.readouterr().out.split() == read_words(out)


def test_command_checks_a_lexicon(
    wake2vec: Callable[..., int], inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["lexicon", inputs / "text.txt", "--check", inputs / "lexicon.txt", "--base", inputs / "base", "--json"]
    assert wake2vec(*arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["num_words"], found["known"], found["fragments"]) == (10, [], [])
    assert wake2vec("lexicon", "nowhere.txt") == 1
    assert "text nowhere.txt: no such file" in capsys.readouterr().err
