"""A tiny base model, text and lexicon on disk, and runs on them: what the tests of whole runs share."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers_tiny import byte_level
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from wake2vec.config import Recipe
from wake2vec.resume import Options
from wake2vec.rundir import RunDir
from wake2vec.train import train

OLD = [
    "the",
    "river",
    "runs",
    "past",
    "old",
    "mill",
    "and",
    "children",
    "run",
    "after",
    "it",
    "home",
    "again",
    "sleep",
    "eat",
    "story",
    "sea",
    "town",
]
NEW = [
    "riverrun",
    "millwheel",
    "bababad",
    "cropse",
    "éternité",
    "funferall",
    "sleepytalking",
    "o'erflow",
    "swan-song",
    "wellknown",
]


def make_base(folder: Path, *, tied: bool = False, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    """Write a Qwen2-architecture model with random weights and padding rows past its tokenizer."""
    tokenizer = tokenizer or byte_level()
    torch.manual_seed(7)
    config = Qwen2Config(
        vocab_size=len(tokenizer) + 12,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_text(num_words: int = 1500) -> str:
    """Return a text in which old and new words stand mixed, some often and some seldom; deterministic."""
    rng = random.Random(3)
    often = [1 / (rank + 1) ** 1.5 for rank in range(max(len(OLD), len(NEW)))]
    kinds = [NEW if rng.random() < 0.3 else OLD for _ in range(num_words)]
    words = [rng.choices(kind, often[: len(kind)])[0] for kind in kinds]
    return "".join(word + rng.choice([" ", " ", " ", ", ", ".\n"]) for word in words)


def make_inputs(folder: Path, **base_options: Any) -> Path:
    """Write base, text and lexicon into a folder."""
    make_base(folder / "base", **base_options)
    (folder / "text.txt").write_text(make_text(), "utf-8")
    (folder / "lexicon.txt").write_text("\n".join(NEW) + "\n", "utf-8")
    return folder


SECTIONS: dict[str, dict[str, Any]] = {
    "model": {"quantization": "none", "compute_dtype": "float32"},
    "tokens": {},
    "data": {"seq_len": 16},
    "train": {"batch_size": 4, "max_steps": 12, "warmup_steps": 2, "learning_rate": 0.02, "seed": 5},
    "run": {"log_every": 3, "eval_every": 5, "sentry_every": 2, "sentry_min_gap_s": 0.0, "keep_every": 0},
}


def make_recipe(inputs: Path, changes: Mapping[str, Mapping[str, Any]] | None = None) -> Recipe:
    """Return a recipe for a run of seconds, with sections' keys changed."""
    sections = {name: {**keys, **(changes or {}).get(name, {})} for name, keys in SECTIONS.items()}
    sections["model"]["base"] = str(inputs / "base")
    sections["tokens"]["lexicon"] = str(inputs / "lexicon.txt")
    sections["data"]["text"] = str(inputs / "text.txt")
    return Recipe.model_validate(sections)


def write_recipe(path: Path, recipe: Recipe) -> Path:
    """Write a recipe as TOML, for tests that go through the command."""
    lines = []
    for name, section in recipe.model_dump().items():
        if isinstance(section, dict):
            lines.append(f"[{name}]")
            lines += [f"{key} = {_toml(value)}" for key, value in section.items()]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else repr(value)


class Quiet:
    """A console that keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        """Keep a message."""
        self.said.append(message)

    def step(self, step: int, max_steps: int, values: Mapping[str, float]) -> None:
        """Ignore the live line; tests override this to act at a step."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Ignore a log line."""


def run_to_end(
    inputs: Path, run: Path, changes: Mapping[str, Mapping[str, Any]] | None = None, **options: Any
) -> RunDir:
    """Train a tiny run and return its folder."""
    folder = RunDir(run)
    train(make_recipe(inputs, changes), folder, Quiet(), Options(**options))
    return folder
