"""The lexicon file: what is read, and every mistake named by its line."""

import unicodedata
from pathlib import Path

import pytest
from tokenizers_tiny import wake_lexicon

from wake2vec.errors import WakeError
from wake2vec.lexicon import read_words


def write(folder: Path, data: bytes | str) -> Path:
    path = folder / "lexicon.txt"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def problems(folder: Path, data: bytes | str) -> list[str]:
    with pytest.raises(WakeError) as caught:
        read_words(write(folder, data))
    return str(caught.value).splitlines()


def test_reads_in_file_order(tmp_path: Path) -> None:
    words = ["zed", "alpha", "l'ep\u00e9e", "peut-\u00eatre", "Alpha", "\u0441\u043e\u043d", "\u7720\u3044"]
    assert read_words(write(tmp_path, "\n".join(words) + "\n")) == words
    assert read_words(write(tmp_path, "\n".join(words))) == words


def test_composes_to_nfc(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "g\u00e9n\u00e9rations")
    assert read_words(write(tmp_path, decomposed)) == ["g\u00e9n\u00e9rations"]


def test_skips_a_byte_order_mark_and_takes_crlf(tmp_path: Path) -> None:
    assert read_words(write(tmp_path, b"\xef\xbb\xbfalpha\r\nbeta\r\n")) == ["alpha", "beta"]


def test_joiners_are_part_of_a_word(tmp_path: Path) -> None:
    word = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"  # Persian, spelled with U+200C
    assert read_words(write(tmp_path, word)) == [word]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("two words", "'two words' has white space (U+0020, character 4)"),
        ("word ", "'word ' has white space (U+0020, character 5)"),
        ("a\tb", "'a\\tb' has white space (U+0009, character 2)"),
        ("a\u00a0b", "'a\\xa0b' has white space (U+00A0, character 2)"),
        ("a\u2028b", "'a\\u2028b' has white space (U+2028, character 2)"),
        ("a\x00b", "'a\\x00b' has a control character (U+0000, character 2)"),
        ("a\x1fb", "'a\\x1fb' has a control character (U+001F, character 2)"),
        ("a\rb", "'a\\rb' has a control character (U+000D, character 2)"),
        ("a\u0085b", "'a\\x85b' has a control character (U+0085, character 2)"),
        ("sof\u00adt", "'sof\\xadt' has an invisible character (U+00AD, character 4)"),
        ("\u2060a", "'\\u2060a' has an invisible character (U+2060, character 1)"),
        ("first", "'first' is already in line 1"),
        ("cafe\u0301", "'caf\u00e9' is already in line 2"),
    ],
)
def test_names_the_line_and_the_problem(tmp_path: Path, line: str, expected: str) -> None:
    lines = problems(tmp_path, f"first\ncaf\u00e9\n{line}\nlast\n")
    assert lines[0].endswith("1 line is not one new word; mend and run again")
    assert lines[1:] == [f"  line 3: {expected}"]


def test_reports_all_problems_at_once_up_to_twenty(tmp_path: Path) -> None:
    lines = problems(tmp_path, "alpha\n" + "alpha\n" * 20)
    assert len(lines) == 1 + 20
    assert lines[-1] == "  line 21: 'alpha' is already in line 1"
    lines = problems(tmp_path, "alpha\n" + "alpha\nb c\n" * 15)
    assert "30 lines are" in lines[0]
    assert len(lines) == 1 + 20 + 1
    assert lines[-1] == "  and 10 more"


def test_second_empty_line_at_the_end_is_a_problem(tmp_path: Path) -> None:
    assert problems(tmp_path, "alpha\n\n")[1:] == ["  line 2: empty"]


@pytest.mark.parametrize("data", [b"", b"\n", b" \n\n", b"\xef\xbb\xbf"])
def test_empty_file(tmp_path: Path, data: bytes) -> None:
    assert "empty, no words" in problems(tmp_path, data)[0]


def test_not_utf8_names_byte_and_line(tmp_path: Path) -> None:
    (line,) = problems(tmp_path, "alpha\nbeta\nfa\u00e7ade\n".encode("latin-1"))
    assert line.endswith("lexicon.txt: not UTF-8 (byte 13, line 3: 0xE7); save it as UTF-8")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(WakeError, match=r"none\.txt: no such file; put the lexicon there"):
        read_words(tmp_path / "none.txt")
    with pytest.raises(WakeError, match="cannot be read"):
        read_words(tmp_path)


def test_real_lexicon() -> None:
    words = read_words(wake_lexicon())
    assert len(words) == 44_990
    assert sum(not word.isascii() for word in words) == 79
    assert sum("'" in word for word in words) == 2_050
    assert sum("-" in word for word in words) == 235
    assert (min(map(len, words)), max(map(len, words))) == (3, 58)
