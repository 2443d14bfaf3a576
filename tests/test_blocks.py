"""Blocks that were cut once are taken again; whatever decides them is part of the key."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_recipe

from wake2vec import base, blocks, data, tokens
from wake2vec.rundir import cache_folder

TEXT = "riverrun, past Eve and Adam's, from swerve of shore to bend of bay. " * 8
WORDS = ["riverrun", "swerve", "commodius"]


def cut(inputs: Path, text: str = TEXT, words: list[str] = WORDS, **changes: Any) -> blocks.Cut:
    recipe = make_recipe(inputs)
    found = base.identify("tiny", recipe.model.base, None)
    tokenizer = base.load_tokenizer(found)
    found = replace(found, commit=changes.pop("commit", found.commit))
    split = data.split_text(text, changes.pop("val_fraction", 0.2), 1)
    options = {"match": "word", "seq_len": 16, "where": "text", **changes}
    return blocks.cut(text, split, words, found, tokenizer, **options)


def kept() -> list[Path]:
    return sorted((cache_folder() / "blocks").glob("*"))


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAKE2VEC_CACHE", str(tmp_path / "cache"))


def same(a: blocks.Cut, b: blocks.Cut) -> bool:
    parts = [(getattr(a, name), getattr(b, name)) for name in ("train", "val", "lexicon", "base_val")]
    return (a.words, a.first_new_id, a.tokenizer_sha256) == (b.words, b.first_new_id, b.tokenizer_sha256) and all(
        torch.equal(x.ids_KT, y.ids_KT) and (x.num_scored, x.scored_chars) == (y.num_scored, y.scored_chars)
        for x, y in parts
    )


def test_a_second_start_cuts_nothing(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = cut(inputs)
    assert made.words == tuple(WORDS)
    monkeypatch.setattr(tokens, "add_words", lambda *_: pytest.fail("cut again"))
    assert same(cut(inputs), made)
    assert len(kept()) == 1


def test_words_that_are_tokens_already_stay_left_out(inputs: Path) -> None:
    first = cut(inputs, words=["e", *WORDS])
    assert first.words == tuple(WORDS)
    assert same(cut(inputs, words=["e", *WORDS]), first)


@pytest.mark.parametrize(
    "changes",
    [
        {"text": TEXT + "Howth"},
        {"words": WORDS[:2]},
        {"words": WORDS[::-1]},
        {"val_fraction": 0.4},
        {"match": "substring"},
        {"seq_len": 8},
        {"commit": "b" * 40},
    ],
)
def test_what_decides_the_blocks_is_in_the_key(inputs: Path, changes: dict[str, Any]) -> None:
    cut(inputs)
    cut(inputs, **changes)
    assert len(kept()) == 2


def test_versions_are_in_the_key(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(inputs)
    monkeypatch.setattr(blocks.importlib.metadata, "version", lambda _: "9.9")
    cut(inputs)
    assert len(kept()) == 2


@pytest.mark.parametrize("damage", [b"", b"not a sentry", None])
def test_a_damaged_file_is_made_again(inputs: Path, damage: bytes | None) -> None:
    made = cut(inputs)
    (path,) = kept()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]) if damage is None else damage)
    assert same(cut(inputs), made)
    assert path.read_bytes() == whole


def test_without_a_place_to_keep_them_it_goes_on(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert cut(inputs).words == tuple(WORDS)
