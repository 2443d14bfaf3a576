"""The lexicon file: UTF-8, one word a line. The file's order fixes the new tokens' ids."""

import unicodedata
from pathlib import Path

from wake2vec.errors import WakeError
from wake2vec.rundir import refuse_endless

_MAX_LISTED = 20
_JOINERS = "\u200c\u200d"  # format characters that Persian and Indic spelling needs


def read_words(path: Path) -> list[str]:
    """Return the words in the file's order, NFC-normalised.

    A byte order mark in front is skipped and CRLF ends a line as LF does. A capital letter is kept: words match text as
    they are written.

    Raises:
        WakeError: no such file, not UTF-8, no words, or lines that are not one word each (all of them named).
    """
    lines = _lines(path)
    problems = []
    first_lines: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        word = unicodedata.normalize("NFC", line)
        problem = _problem(word)
        if problem is None and word in first_lines:
            problem = f"'{word}' is already in line {first_lines[word]}"
        if problem is not None:
            problems.append(f"  line {number}: {problem}")
        first_lines.setdefault(word, number)
    if problems:
        raise WakeError(_report(path, problems))
    return list(first_lines)


def _lines(path: Path) -> list[str]:
    refuse_endless(path, "lexicon")
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except FileNotFoundError:
        raise WakeError(f"lexicon {path}: no such file; put the lexicon there or set tokens.lexicon") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        where = f"byte {error.start}, line {line}"
        raise WakeError(f"lexicon {path}: not UTF-8 ({where}: 0x{data[error.start]:02X}); save it as UTF-8") from None
    except OSError as error:
        raise WakeError(f"lexicon {path}: cannot be read ({error.strerror}); check the file") from None
    if not text.strip():
        raise WakeError(f"lexicon {path}: empty, no words in {len(data)} bytes; write one word a line")
    return text.removesuffix("\n").split("\n")


def _problem(word: str) -> str | None:
    """Say what makes a line no single word, or None."""
    if not word or word.isspace():
        return "empty"
    for position, char in enumerate(word, start=1):
        kind = None
        if char in " \t" or (char.isspace() and unicodedata.category(char) != "Cc"):
            kind = "white space"
        elif unicodedata.category(char) == "Cc":
            kind = "a control character"
        elif unicodedata.category(char) == "Cf" and char not in _JOINERS:
            kind = "an invisible character"
        if kind is not None:
            return f"{word!a} has {kind} (U+{ord(char):04X}, character {position})"
    return None


def _report(path: Path, problems: list[str]) -> str:
    listed = problems[:_MAX_LISTED]
    if len(problems) > _MAX_LISTED:
        listed.append(f"  and {len(problems) - _MAX_LISTED} more")
    lines = "1 line is" if len(problems) == 1 else f"{len(problems)} lines are"
    return "\n".join([f"lexicon {path}: {lines} not one new word; mend and run again", *listed])
