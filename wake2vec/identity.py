"""What makes a run the run it is: its inputs, read and hashed, and `run.json`."""

import hashlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from wake2vec import blocks, demo
from wake2vec.base import BaseId, identify, load_tokenizer
from wake2vec.config import Recipe
from wake2vec.data import Blocks, join_blocks, read_text, split_text
from wake2vec.environment import StackReport, check_same_stack
from wake2vec.errors import WakeError
from wake2vec.lexicon import read_words
from wake2vec.record import FORMAT, digest, write_run
from wake2vec.record import read_run as read_run
from wake2vec.rundir import RunDir, cache_folder

_DEMO = "demo:"


@dataclass(frozen=True)
class Inputs:
    """Everything a run reads but the base model's weights.

    Attributes:
        base_vocab_size: number of tokens of the base tokenizer, which is the first new id.
        words: the new words in the order of their ids.
        train_blocks: the text that is trained on (`num_text_blocks` of them), then the lexicon.
        val_blocks: the held-out text; `base_val_blocks`: the same text by the base model's own tokenizer.
        tokenizer_sha256: of the tokenizer as this stack builds it; two stacks may build it differently and still cut
            the text alike, so that `blocks_sha256` is what a run holds to.
        identity: the resolved recipe and the hashes of all of it.
    """

    base: BaseId
    base_tokenizer: Any
    base_vocab_size: int
    words: tuple[str, ...]
    tokenizer_sha256: str
    train_blocks: Blocks
    num_text_blocks: int
    val_blocks: Blocks
    base_val_blocks: Blocks
    identity: dict[str, Any]

    @property
    def num_new_tokens(self) -> int:
        """Return the number of new words."""
        return len(self.words)


def read_inputs(recipe: Recipe, commit: str | None, say: Callable[[str], None]) -> Inputs:
    """Read and check the text, the lexicon and the tokenizer; `commit` is the base commit a run holds to.

    Raises:
        WakeError: something is missing or of no use.
    """
    text = read_text(Path(locate(recipe.data.text, say)))
    lexicon = read_words(Path(locate(recipe.tokens.lexicon, say)))
    base = identify(recipe.model.base, locate(recipe.model.base, say), commit)
    base_tokenizer = load_tokenizer(base)
    split = split_text(text, recipe.train.val_fraction, recipe.train.seed)
    cut = blocks.cut(
        text,
        split,
        lexicon,
        base,
        base_tokenizer,
        match=recipe.tokens.match,
        seq_len=recipe.data.seq_len,
        where=f"text {recipe.data.text}",
    )
    if cut.train.num_scored < recipe.data.seq_len or not cut.val.num_scored:
        raise WakeError(
            f"text {recipe.data.text}: {cut.train.num_scored} tokens to train on and {cut.val.num_scored} held out, "
            f"less than one block of {recipe.data.seq_len}; give a longer text or a smaller data.seq_len"
        )
    train_blocks = join_blocks(cut.train, cut.lexicon)
    identity = {
        "recipe": recipe.model_dump(),
        "base": {"name": base.name, "commit": base.commit},
        "lexicon_sha256": _sha256("\n".join(lexicon)),
        "text_sha256": _sha256(text),
        "split": {"sha256": split.sha256, "val_chars": len(split.val_text), "train_chars": len(split.train_text)},
        "blocks_sha256": _sha256(train_blocks.ids_KT.numpy().tobytes() + cut.val.ids_KT.numpy().tobytes()),
        "seed": recipe.train.seed,
        "base_vocab_size": cut.first_new_id,
        "num_new_tokens": len(cut.words),
        "num_train_blocks": len(train_blocks.ids_KT),
        "num_known_words": len(lexicon) - len(cut.words),
    }
    return Inputs(
        base=base,
        base_tokenizer=base_tokenizer,
        base_vocab_size=cut.first_new_id,
        words=cut.words,
        tokenizer_sha256=cut.tokenizer_sha256,
        train_blocks=train_blocks,
        num_text_blocks=len(cut.train.ids_KT),
        val_blocks=cut.val,
        base_val_blocks=cut.base_val,
        identity=identity,
    )


def locate(value: str, say: Callable[[str], None]) -> str:
    """Return what a recipe's value means; `demo:` names a file of the demo, made at first use."""
    if not value.startswith(_DEMO):
        return value
    folder = cache_folder() / f"demo-python{sys.version_info.major}.{sys.version_info.minor}"
    demo.prepare(folder, say)
    return str(folder / value.removeprefix(_DEMO))


def _sha256(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def check_recipe(run: RunDir, record: Mapping[str, Any], recipe: Recipe) -> None:
    """Refuse to continue a run under another recipe, naming every field that differs."""
    recorded, given = _flat(record["identity"]["recipe"]), _flat(recipe.model_dump())
    _refuse(run, {key: (recorded.get(key), given.get(key)) for key in {**recorded, **given}}, "the recipe has")


def check_inputs(run: RunDir, record: Mapping[str, Any], inputs: Inputs) -> None:
    """Refuse to continue a run on other inputs, naming everything that differs."""
    recorded, found = _flat(record["identity"]), _flat(inputs.identity)
    _refuse(run, {key: (recorded.get(key), found.get(key)) for key in {**recorded, **found}}, "now it is")


def _refuse(run: RunDir, pairs: Mapping[str, tuple[Any, Any]], now: str) -> None:
    changed = [f"{key}: the run has {a!r}, {now} {b!r}" for key, (a, b) in pairs.items() if a != b]
    if changed:
        raise WakeError(
            f"run {run.name}: cannot continue, it was begun otherwise; put that back, or name another run with "
            "--run\n  " + "\n  ".join(changed)
        )


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def begin_record(run: RunDir, inputs: Inputs, stack: StackReport, version: str) -> dict[str, Any]:
    """Write run.json for a new run and return it."""
    record = {
        "format": FORMAT,
        "run": run.name,
        "created": _now(),
        "wake2vec": version,
        "identity": inputs.identity,
        "identity_sha256": digest(inputs.identity),
        "tokenizer_sha256": inputs.tokenizer_sha256,
        "stack": stack.as_dict(),
        "history": [],
    }
    write_run(run, record)
    return record


def check_stack_change(record: Mapping[str, Any], stack: StackReport, *, allow: bool | None) -> bool:
    """Say whether the run crosses to other versions; refuse where that was not asked for."""
    return bool(check_same_stack(record["stack"]["versions"], stack, allow=allow)) or (
        record["stack"]["drift"] != stack.as_dict()["drift"]
    )


def note(run: RunDir, record: dict[str, Any], event: Mapping[str, Any], *, stack: dict[str, Any] | None = None) -> None:
    """Put something that happened to a run on record; `stack` is what it goes on with, where that changed."""
    record["history"].append({"at": _now(), **event})
    if stack is not None:
        record["stack"] = stack
    write_run(run, record)


def _now() -> str:
    return datetime.now(UTC).isoformat("T", "seconds")
