"""A lexicon out of a text: its word types, scored by how much more frequent they are there than in English at large.

The Zipf frequency of a word is log10 of its occurrences in a billion words: 6 for a word that is one in a thousand, 3
for one in a million. score = Zipf in the text - Zipf in general English (wordfreq), which is 0 for a word never seen.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from wake2vec.errors import WakeError

JOINERS = "'\u2019-"
"""Inside a word these belong to it."""
_WORD = re.compile(rf"[^\W\d_]+(?:[{JOINERS}][^\W\d_]+)*")
_BROKEN = re.compile(r"([^\W\d_]+)-\n[ \t]*([^\W\d_]+)")
_SHORTEST = 3
_COMMON_ZIPF = 4.0
"""One in a hundred thousand: a word whose stump is taken for a cut word."""
_RARE_ZIPF = 2.0
"""Less than one in ten million: a word that counts as unknown to general English."""
_FAR_RARER = 3.0
"""A thousand times rarer."""
_MOST_CUT = 2


@dataclass(frozen=True)
class Entry:
    """A word type of the text; `dropped` says why it is not in the lexicon, or is empty."""

    word: str
    count: int
    zipf_text: float
    zipf_general: float
    dropped: str

    @property
    def score(self) -> float:
        """Return how distinctive it is."""
        return self.zipf_text - self.zipf_general


def general_zipf(words: Iterable[str]) -> dict[str, float]:
    """Return the Zipf frequency of words in general English, 0 for what it does not have."""
    from wordfreq import get_frequency_dict, zipf_frequency

    listed = get_frequency_dict("en")
    # zipf_frequency would build a joint frequency for what its tokenizer cuts in two ("o'erflow"): not a known word
    return {word: float(zipf_frequency(word, "en")) if word.casefold() in listed else 0.0 for word in words}


def extract(text: str, *, min_count: int = 1, max_zipf: float = 3.0) -> list[Entry]:
    """Return every word type of an NFC text, most distinctive first; equal scores by count, then by spelling.

    Capital letters count as small ones. A word cut at a line's end is put together first; what is left of such cuts,
    and stumps of common words, are dropped, as are words of less than three letters, rarer than `min_count`, or more
    frequent in general English than `max_zipf`.

    Raises:
        WakeError: the text has no words.
    """
    joined, halves = _join_lines(unicodedata.normalize("NFC", text))
    counts = Counter(match[0].replace("\u2019", "'").casefold() for match in _WORD.finditer(joined))
    counts = Counter({unicodedata.normalize("NFC", word): count for word, count in counts.items()})
    total = sum(counts.values())
    if not total:
        raise WakeError("lexicon: the text has no words; give a text in letters")
    zipf = general_zipf(counts)
    stumps = _stumps(counts, zipf)
    entries = []
    for word, count in counts.items():
        zipf_text = math.log10(count * 1e9 / total)
        dropped = _reason(word, count, zipf[word], halves, stumps, min_count, max_zipf)
        entries.append(Entry(word, count, round(zipf_text, 3), zipf[word], dropped))
    return sorted(entries, key=lambda entry: (-entry.score, -entry.count, entry.word))


def _join_lines(text: str) -> tuple[str, set[str]]:
    """Put words together that a hyphen cuts at a line's end; return the text and the halves that it had."""
    halves: set[str] = set()

    def join(match: re.Match[str]) -> str:
        halves.update((match[1].casefold(), match[2].casefold()))
        return match[1] + match[2]

    return _BROKEN.sub(join, text), halves


def _stumps(counts: Mapping[str, int], zipf: Mapping[str, float]) -> dict[str, str]:
    """Return far rarer words that are a common word without its last one or two letters, each with that word."""
    from wordfreq import top_n_list

    common = {word for word in top_n_list("en", 20_000) if len(word) > 4}
    found = general_zipf(common)
    common = {word for word in common if found[word] >= _COMMON_ZIPF}
    cut: dict[str, str] = {}
    for word in sorted(common):
        for length in range(1, _MOST_CUT + 1):
            stump = word[:-length]
            if stump in counts and found[word] - zipf[stump] >= _FAR_RARER:
                cut.setdefault(stump, word)
    return cut


def _reason(
    word: str,
    count: int,
    zipf: float,
    halves: set[str],
    stumps: Mapping[str, str],
    min_count: int,
    max_zipf: float,
) -> str:
    if sum(char.isalpha() for char in word) < _SHORTEST:
        return "short"
    if zipf > max_zipf:
        return "general English"
    if count < min_count:
        return "rare"
    if word in halves and zipf < _RARE_ZIPF:
        return "hyphenation fragment"
    if word in stumps:
        return f"stump of {stumps[word]}"
    return ""


def table(entries: Sequence[Entry]) -> str:
    """Return all entries, the dropped ones with the reason, as tab-separated values."""
    lines = ["word\tcount\tzipf_text\tzipf_general\tscore\tdropped"]
    lines += [
        f"{e.word}\t{e.count}\t{e.zipf_text:.3f}\t{e.zipf_general:.2f}\t{e.score:.3f}\t{e.dropped}" for e in entries
    ]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Check:
    """What an existing lexicon looks like beside a text; every list in the lexicon's order."""

    num_words: int
    unseen: list[str]
    known: list[str] | None
    fragments: list[str]


def check(words: Sequence[str], text: str, vocabulary: Mapping[str, int] | None) -> Check:
    """Say which words are never seen whole in the text, tokens already, or fragments of words cut at a line's end.

    Seen is what a whole-word match would find, letter for letter: no letter, digit or underscore touches it.
    """
    text = unicodedata.normalize("NFC", text)
    joined, halves = _join_lines(text)
    pieces = Counter(re.findall(r"\w+", text))
    whole = {match[0].casefold() for match in _WORD.finditer(joined)}
    stumps = _stumps(dict.fromkeys(words, 1), general_zipf(words))
    return Check(
        num_words=len(words),
        unseen=[word for word in words if not _seen(word, text, pieces)],
        known=None if vocabulary is None else [word for word in words if word in vocabulary],
        fragments=[word for word in words if word in stumps or (word in halves and word not in whole)],
    )


def _seen(word: str, text: str, pieces: Mapping[str, int]) -> bool:
    parts = re.findall(r"\w+", word)
    if not all(part in pieces for part in parts):
        return False
    if parts == [word]:
        return True
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None
