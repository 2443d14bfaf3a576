"""From text to blocks of tokens, and which blocks a step reads. Everything here is a pure function.

Shapes: K blocks, T tokens.
"""

import functools
import hashlib
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wake2vec.errors import WakeError
from wake2vec.rundir import refuse_endless

PAD = -1
"""Stands for 'no token' in a block: never looked up and never scored."""

_PIECE_CHARS = 2000
_LEAST_PIECES = 20


def read_text(path: Path) -> str:
    """Return a UTF-8 text file, NFC-normalised, with Unix line ends and without a byte order mark."""
    refuse_endless(path, "text")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise WakeError(f"text {path}: no such file; put the text there or set data.text") from None
    except UnicodeDecodeError as error:
        raise WakeError(f"text {path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except OSError as error:
        raise WakeError(f"text {path}: cannot be read ({error.strerror}); check the file") from None
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n"))
    if not text.strip():
        raise WakeError(f"text {path}: empty; put the text there or set data.text")
    return text


@dataclass(frozen=True)
class Split:
    """The text cut in two by characters, so that every phase and every tokenizer holds out the same words."""

    train_text: str
    val_text: str
    val_spans: tuple[tuple[int, int], ...]
    sha256: str


def split_text(text: str, val_fraction: float, seed: int) -> Split:
    """Hold out seeded pieces of about 2,000 characters, cut at white space, until `val_fraction` is reached."""
    pieces = _pieces(text)
    held_out: set[int] = set()
    chars = 0
    for index in _seeded_order(len(pieces), f"split {seed}"):
        if chars >= val_fraction * len(text) or len(held_out) == len(pieces) - 1:
            break
        held_out.add(index)
        chars += pieces[index][1] - pieces[index][0]
    spans = tuple(piece for index, piece in enumerate(pieces) if index in held_out)
    return Split(
        train_text="".join(text[a:b] for index, (a, b) in enumerate(pieces) if index not in held_out),
        val_text="".join(text[a:b] for a, b in spans),
        val_spans=spans,
        sha256=hashlib.sha256(json.dumps([len(text), spans]).encode()).hexdigest(),
    )


def _pieces(text: str) -> list[tuple[int, int]]:
    size = max(1, min(_PIECE_CHARS, len(text) // _LEAST_PIECES))
    pieces = []
    start = 0
    while start < len(text):
        end = min(start + size, len(text))
        while end < len(text) and not text[end].isspace():
            end += 1
        pieces.append((start, end))
        start = end
    return pieces


@dataclass(frozen=True)
class Blocks:
    """Blocks of `seq_len + 1` tokens in which every token of a text is scored once.

    Attributes:
        ids_KT: int64, `PAD` past the end of the text in the last block.
        num_scored: scored tokens, the last `seq_len` of each block less the padding.
        scored_chars: characters of the scored tokens.
    """

    ids_KT: Tensor
    num_scored: int
    scored_chars: int


def make_blocks(ids: Sequence[int], ends: Sequence[int], seq_len: int, bos_id: int | None) -> Blocks:
    """Cut a text's tokens into blocks; `ends` are the tokens' end offsets in it, in characters.

    With a BOS every block starts with it. Without one, blocks overlap by a token and the text's first is not scored.
    """
    stream = torch.tensor(ids, dtype=torch.int64)
    context = 1 if bos_id is None else 0
    num_scored = max(0, len(stream) - context)
    num_blocks = -(-num_scored // seq_len)
    ids_KT = torch.full((num_blocks, seq_len + 1), PAD, dtype=torch.int64)
    for block in range(num_blocks):
        row = stream[block * seq_len : (block + 1) * seq_len + context]
        ids_KT[block, 1 - context : 1 - context + len(row)] = row
    if bos_id is not None:
        ids_KT[:, 0] = bos_id
    chars = ends[-1] - (ends[0] if context else 0) if num_scored else 0
    return Blocks(ids_KT, num_scored, chars)


def join_blocks(first: Blocks, second: Blocks) -> Blocks:
    """Return the blocks of two texts one after the other."""
    ids_KT = torch.cat([first.ids_KT, second.ids_KT])
    return Blocks(ids_KT, first.num_scored + second.num_scored, first.scored_chars + second.scored_chars)


def batch_indices(step: int, *, batch_size: int, num_blocks: int, seed: int) -> list[int]:
    """Return the blocks of a step (from 1): an epoch is a seeded permutation of all blocks, epoch follows epoch."""
    first = (step - 1) * batch_size
    positions = range(first, first + batch_size)
    return [epoch_order(num_blocks, seed, p // num_blocks)[p % num_blocks] for p in positions]


@functools.lru_cache(maxsize=4)
def epoch_order(num_blocks: int, seed: int, epoch: int) -> list[int]:
    """Return the seeded permutation of all blocks that an epoch (from 0) follows."""
    return _seeded_order(num_blocks, f"epoch {seed} {epoch}")


def _seeded_order(count: int, seed: str) -> list[int]:
    """Return a permutation by sorting hashes: the same on every machine and in every version of any library."""
    return sorted(range(count), key=lambda i: hashlib.blake2b(f"{seed} {i}".encode(), digest_size=16).digest())
