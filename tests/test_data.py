"""Texts, the split, blocks and batches."""

import unicodedata
from pathlib import Path

import pytest
import torch
from tiny import make_text

from wake2vec.data import PAD, batch_indices, join_blocks, make_blocks, read_text, split_text
from wake2vec.errors import WakeError

TEXT = make_text(6000)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"", "empty"),
        (b" \n\t\r\n", "empty"),
        (b"\xef\xbb\xbf", "empty"),
        (b"ab\xffc", "not UTF-8 at byte 2; save it as UTF-8"),
        ("é".encode("utf-16"), "not UTF-8 at byte 0"),
    ],
)
def test_useless_text_is_refused(content: bytes, wanted: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(WakeError) as caught:
        read_text(path)
    assert str(caught.value).startswith(f"text {path}: {wanted}")


def test_text_that_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WakeError, match=r"no such file; put the text there or set data\.text"):
        read_text(tmp_path / "none.txt")
    with pytest.raises(WakeError, match="cannot be read"):
        read_text(tmp_path)
    with pytest.raises(WakeError, match="cannot be read"):
        read_text(tmp_path / ("x" * 300))


def test_text_is_read_in_one_form(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbf" + unicodedata.normalize("NFD", "Éternité\r\nnäch\n").encode())
    assert read_text(path) == "Éternité\nnäch\n"


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("num_chars", [1, 2, 3, 19, 40, 400, len(TEXT)])
def test_split_parts_are_the_text(num_chars: int, fraction: float) -> None:
    text = TEXT[:num_chars]
    split = split_text(text, fraction, seed=1)
    whole, at, train_at = "", 0, 0
    for start, end in split.val_spans:
        assert at <= start < end <= len(text)
        whole += split.train_text[train_at : train_at + start - at] + text[start:end]
        train_at += start - at
        at = end
    assert whole + split.train_text[train_at:] == text
    assert split.val_text == "".join(text[start:end] for start, end in split.val_spans)
    assert len(split.train_text) + len(split.val_text) == len(text)
    assert split.train_text  # something is always left to train on


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.5])
def test_split_holds_out_the_fraction(fraction: float) -> None:
    held_out = len(split_text(TEXT, fraction, seed=1).val_text)
    piece = len(TEXT) // 20 + 20  # and the rest of a word
    assert fraction * len(TEXT) <= held_out < fraction * len(TEXT) + piece


def test_split_cuts_at_white_space() -> None:
    words = TEXT.split()
    split = split_text(TEXT, 0.1, seed=1)
    assert sorted(split.train_text.split() + split.val_text.split()) == sorted(words)
    assert all(start == 0 or TEXT[start].isspace() for start, _ in split.val_spans)


def test_split_depends_on_text_fraction_and_seed_alone() -> None:
    split = split_text(TEXT, 0.1, 1)
    assert split_text(TEXT, 0.1, 1) == split
    others = [split_text(TEXT, 0.1, 2), split_text(TEXT, 0.3, 1), split_text(TEXT + "more", 0.1, 1)]
    assert len({split.sha256, *(other.sha256 for other in others)}) == 4
    assert others[0].val_text != split.val_text
    # the same on every machine and in every version: runs compare it with what they began with
    assert split_text("a b c d e f g h i j", 0.3, 42).val_spans == GOLDEN_SPANS


GOLDEN_SPANS = ((1, 3), (11, 13), (15, 17))


@pytest.mark.parametrize("bos_id", [None, 99])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 4, 5, 6, 8, 9, 23])
def test_every_token_is_scored_once_with_what_stands_before_it(num_tokens: int, bos_id: int | None) -> None:
    ids = list(range(num_tokens))
    ends = [3 * i + 2 for i in ids]
    blocks = make_blocks(ids, ends, 4, bos_id)
    rows = blocks.ids_KT.tolist()
    scored = [token for row in rows for token in row[1:] if token != PAD]
    assert scored == (ids if bos_id is not None else ids[1:])
    assert blocks.num_scored == len(scored)
    assert blocks.ids_KT.shape[1] == 5
    assert blocks.ids_KT.dtype == torch.int64
    for row in rows:
        inside = row[: row.index(PAD)] if PAD in row else row
        assert set(row[len(inside) :]) <= {PAD}
        assert len(inside) >= 2  # something before, something to score
        if bos_id is None:
            assert inside == list(range(inside[0], inside[0] + len(inside)))
        else:
            assert inside == [bos_id, *range(inside[1], inside[1] + len(inside) - 1)]
    assert not any(PAD in row for row in rows[:-1])


@pytest.mark.parametrize(("bos_id", "chars"), [(None, 9), (0, 12)])
def test_scored_chars_are_those_of_the_scored_tokens(bos_id: int | None, chars: int) -> None:
    # tokens of 3, 0, 4, 5 characters: without BOS the first has nothing before it and is not scored
    assert make_blocks([7, 8, 9, 6], [3, 3, 7, 12], 3, bos_id).scored_chars == chars


@pytest.mark.parametrize(("num_tokens", "bos_id"), [(0, None), (0, 5), (1, None)])
def test_text_without_scored_tokens_has_no_blocks(num_tokens: int, bos_id: int | None) -> None:
    blocks = make_blocks([3] * num_tokens, [1] * num_tokens, 4, bos_id)
    assert (len(blocks.ids_KT), blocks.num_scored, blocks.scored_chars) == (0, 0, 0)


def test_joined_blocks_follow_each_other() -> None:
    first, second = make_blocks(range(6), range(1, 7), 4, None), make_blocks(range(3), range(2, 5), 4, None)
    joined = join_blocks(first, second)
    assert joined.ids_KT.tolist() == first.ids_KT.tolist() + second.ids_KT.tolist()
    assert (joined.num_scored, joined.scored_chars) == (5 + 2, 5 + 2)


@pytest.mark.parametrize(("batch_size", "num_blocks"), [(4, 10), (3, 3), (7, 2), (16, 1), (1, 5)])
def test_every_epoch_is_a_permutation_of_all_blocks(batch_size: int, num_blocks: int) -> None:
    options = {"batch_size": batch_size, "num_blocks": num_blocks, "seed": 3}
    steps = 4 * num_blocks
    order = [index for step in range(1, steps + 1) for index in batch_indices(step, **options)]
    assert len(order) == steps * batch_size
    epochs = [order[at : at + num_blocks] for at in range(0, len(order), num_blocks)]
    assert all(sorted(epoch) == list(range(num_blocks)) for epoch in epochs)
    if num_blocks > 4:
        assert epochs[0] != epochs[1]


def test_batch_is_a_pure_function_of_seed_and_step() -> None:
    options = {"batch_size": 4, "num_blocks": 50}
    forwards = [batch_indices(step, seed=3, **options) for step in range(1, 100)]
    backwards = [batch_indices(step, seed=3, **options) for step in range(99, 0, -1)]
    assert forwards == backwards[::-1]
    assert forwards != [batch_indices(step, seed=4, **options) for step in range(1, 100)]
    # the same on every machine and in every version: a resume may happen anywhere
    assert batch_indices(2, batch_size=4, num_blocks=6, seed=42) == GOLDEN_BATCH


GOLDEN_BATCH = [5, 3, 5, 0]
