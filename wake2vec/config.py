"""A recipe: everything that decides what a run computes, typed, strict and with its defaults."""

import difflib
import tomllib
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from wake2vec.errors import WakeError
from wake2vec.rundir import refuse_endless

Count = Annotated[int, Field(gt=0, lt=2**31)]
Interval = Annotated[int, Field(ge=0, lt=2**31)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[^\x00]+$")]
"""Not empty, and without the NUL that no path may hold."""
_SHOWN_CHARS = 80
_MAX_RECIPE_BYTES = 2**14


class _Section(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelSection(_Section):
    """The frozen base model."""

    base: Name
    """A Hugging Face hub id, a folder in Hugging Face format, or `demo:base`."""
    quantization: Literal["nf4", "none"] = "nf4"
    """How the body's linear layers are held."""
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """The type activations are computed in; a part of the run's identity."""


class TokensSection(_Section):
    """The new words."""

    lexicon: Name
    """A UTF-8 file, one word a line; the order fixes the ids."""
    match: Literal["word", "substring"] = "word"
    """Whether a new word is found only whole or inside other words too."""
    start: Literal["sphere", "subword-mean"] = "sphere"
    """Where the new rows start."""
    start_radius: Annotated[Finite, Field(gt=0)] = 1.5
    """Length of a starting row, in radii of the base rows."""


class DataSection(_Section):
    """What is read."""

    text: Name
    """A UTF-8 text file."""
    seq_len: Annotated[int, Field(gt=0, le=2**20)] = 128
    """Tokens a block."""


class TrainSection(_Section):
    """How the rows are trained."""

    optimizer: Literal["adafactor", "adamw"] = "adafactor"
    """Adafactor runs without momentum: its state is one number a row and one a column."""
    learning_rate: Annotated[Finite, Field(gt=0)] = 5e-4
    """The rate after the warm-up; a cosine takes it down to zero."""
    batch_size: Count = 16
    """Blocks a step; the planner splits them into micro-batches."""
    max_steps: Count = 3000
    """Optimizer steps."""
    warmup_steps: Interval = 150
    """Steps of linear warm-up."""
    max_grad_norm: Annotated[Finite, Field(ge=0)] = 1.0
    """Global norm the gradient is clipped to; 0 turns clipping off."""
    weight_decay: Annotated[Finite, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    val_fraction: Annotated[Finite, Field(gt=0, lt=1)] = 0.1
    """Share of the text's characters held out."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    """Decides the split, the order of blocks and the starting rows."""
    exact: bool = False
    """Use deterministic GPU kernels, so that a resume on the same card is identical to the bit."""

    @model_validator(mode="after")
    def _warmup_ends(self) -> "TrainSection":
        if self.warmup_steps >= self.max_steps:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) must be less than max_steps ({self.max_steps}); lower warmup_steps"
            )
        return self


class RunSection(_Section):
    """What is written, and how often."""

    log_every: Count = 20
    """Steps a log line."""
    eval_every: Count = 50
    """Steps an evaluation on the held-out text."""
    sentry_every: Count = 20
    """Steps a sentry, where the gaps below allow it."""
    sentry_min_gap_s: Annotated[Finite, Field(ge=0)] = 60.0
    """No sentry sooner than this after the last, in seconds."""
    sentry_max_gap_s: Annotated[Finite, Field(gt=0)] = 120.0
    """A sentry at the latest this long after the last, in seconds."""
    keep_last: Count = 3
    """Sentries kept whatever their step."""
    keep_every: Interval = 500
    """Sentries at multiples of this step are kept for good; 0 keeps none but the last and the best."""
    snapshot_every: Interval = 0
    """Steps a snapshot of the rows in half precision; 0 takes none."""

    @model_validator(mode="after")
    def _gaps_fit(self) -> "RunSection":
        if self.sentry_min_gap_s > self.sentry_max_gap_s:
            raise ValueError(
                f"sentry_min_gap_s ({self.sentry_min_gap_s:g}) must not be above sentry_max_gap_s "
                f"({self.sentry_max_gap_s:g}); lower it"
            )
        return self


class Recipe(_Section):
    """A whole recipe."""

    phase: Literal["rows"] = "rows"
    """What is trained; `rows` are the new words' rows alone."""
    model: ModelSection
    tokens: TokensSection
    data: DataSection
    train: TrainSection = TrainSection()
    run: RunSection = RunSection()


def shipped_recipes() -> dict[str, str]:
    """Return the TOML text of every recipe in the package by its name."""
    folder = files("wake2vec") / "recipes"
    return {f.name.removesuffix(".toml"): f.read_text("utf-8") for f in folder.iterdir() if f.name.endswith(".toml")}


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> tuple[str, Recipe]:
    """Return the run's default name and the recipe; `overrides` are `key=value` with the value in TOML.

    Raises:
        WakeError: naming every mistake of the recipe at once.
    """
    name, text = _recipe_text(name_or_path)
    table = _parse_toml(text, f"recipe {name_or_path}")
    problems = [problem for override in overrides for problem in _override(table, override)]
    try:
        recipe = Recipe.model_validate(table)
    except ValidationError as error:
        problems += [_explain(problem) for problem in error.errors()]
    else:
        if not problems:
            return name, recipe
    raise WakeError("\n".join(f"recipe {name_or_path}: {problem}" for problem in problems))


def parse_size(text: str, where: str) -> int:
    """Return the bytes that `15GiB`, `16GB` or a plain number means.

    Raises:
        WakeError: it means none.
    """
    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        size = 0
    if size <= 0:
        raise WakeError(f"{where}: {_shown(text)!r} is no size; write for example 15GiB")
    return size


def _recipe_text(name_or_path: str) -> tuple[str, str]:
    shipped = shipped_recipes()
    if name_or_path in shipped:
        return name_or_path, shipped[name_or_path]
    path = Path(name_or_path)
    if path.suffix != ".toml":
        names = ", ".join(sorted(shipped))
        guess = _did_you_mean(name_or_path, shipped)
        raise WakeError(f"recipe {name_or_path}: no such recipe{guess}; use one of {names}, or a path ending in .toml")
    refuse_endless(path, "recipe")
    try:
        size = path.stat().st_size
        if size > _MAX_RECIPE_BYTES:  # a parser may take hours over what is no recipe
            raise WakeError(
                f"recipe {name_or_path}: has {size:,} bytes, a recipe at most {_MAX_RECIPE_BYTES:,}; check the path"
            )
        return path.stem, path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise WakeError(
            f"recipe {name_or_path}: no such file; check the path (working directory {Path.cwd()})"
        ) from None
    except UnicodeDecodeError as error:
        raise WakeError(f"recipe {name_or_path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except OSError as error:
        raise WakeError(f"recipe {name_or_path}: cannot be read ({error.strerror}); check the file") from None


def _parse_toml(text: str, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except ValueError as error:  # TOMLDecodeError, or an integer of thousands of digits
        raise WakeError(f"{where}: not TOML: {error}; mend that place") from None
    except RecursionError:
        raise WakeError(f"{where}: nested too deep to be a recipe; use plain tables and values") from None


def _override(table: dict[str, Any], override: str) -> Iterator[str]:
    """Set one `key=value` in the table; yield what is wrong with it."""
    key, equals, value = override.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        yield f"--set {_shown(override)}: not key=value; write for example --set train.max_steps=100"
        return
    try:
        parsed = tomllib.loads(f"value = {value}")
    except (ValueError, RecursionError):
        parsed = {}
    if set(parsed) != {"value"}:
        yield (
            f"--set {_shown(override)}: the part after '=' is no TOML value; "
            f"text needs quotes: --set '{_shown(key)}=\"{_shown(value)}\"'"
        )
        return
    *sections, last = key.split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            yield f"--set {_shown(override)}: {section} is a value, not a table; check the key"
            return
    table[last] = parsed["value"]


def _explain(problem: Any) -> str:
    """Turn one of pydantic's problems into `key: what is wrong; what to do`."""
    key = ".".join(str(part) for part in problem["loc"]) or "recipe"
    given = problem["input"]
    if problem["type"] == "extra_forbidden":
        known = _keys_at(problem["loc"][:-1])
        return f"{key}: unknown key{_did_you_mean(str(problem['loc'][-1]), known)}; use one of {', '.join(known)}"
    if problem["type"] == "missing":
        return f"{key}: missing; every recipe needs it"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}: {message}"
    text = _text(given)
    guess = _did_you_mean(text, [part.strip("'") for part in problem.get("ctx", {}).get("expected", "").split()])
    shown = repr(given) if isinstance(given, str) else text
    return f"{key}: {message[0].lower()}{message[1:]}, not {_shown(shown)}{guess}; mend the value"


def _text(value: Any) -> str:
    """Return a value as text; one too deep or too long for Python to write out, by its kind."""
    try:
        return str(value)
    except (RecursionError, ValueError):
        return f"a {type(value).__name__} that cannot be shown"


def _shown(text: str) -> str:
    """Return a piece of someone's input fit for one line of a message."""
    line = text if text.isprintable() else repr(text)[1:-1]
    return line if len(line) <= _SHOWN_CHARS else line[:_SHOWN_CHARS] + "..."


def _keys_at(location: Sequence[Any]) -> list[str]:
    section: Any = Recipe
    for part in location:
        section = section.model_fields[part].annotation
    return list(section.model_fields)


def _did_you_mean(given: str, known: Sequence[str] | dict[str, str]) -> str:
    close = difflib.get_close_matches(given, list(known), n=1)
    return f', did you mean "{close[0]}"?' if close else ""
