"""Recipes: what is shipped, and what is said about a wrong one."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from wake2vec.config import load_recipe, shipped_recipes
from wake2vec.errors import WakeError

GOOD = '[model]\nbase = "b"\n[tokens]\nlexicon = "l"\n[data]\ntext = "t"\n'

# The earlier runs' settings: base, optimizer, learning rate, seq_len, start, radius, save / eval / log cadence.
SPHERE, MEAN = ("sphere", 1.5), ("subword-mean", 1.0)
EARLIER_RUNS = {
    "qwen14b": ("Qwen/Qwen2.5-14B", "adafactor", 5e-4, 128, *SPHERE, 20, 50, 20),
    "llama1b": ("meta-llama/Llama-3.2-1B", "adamw", 2e-4, 512, *SPHERE, 50, 100, 50),
    "llama3b": ("meta-llama/Llama-3.2-3B", "adamw", 2e-4, 512, *SPHERE, 50, 100, 50),
    "llama8b": ("meta-llama/Llama-3.1-8B", "adamw", 2e-4, 256, *MEAN, 50, 100, 50),
    "mistral7b": ("mistralai/Mistral-7B-v0.3", "adamw", 2e-4, 256, *SPHERE, 50, 50, 50),
    "tinyllama": ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "adafactor", 5e-4, 256, *SPHERE, 100, 100, 50),
    "phi35": ("microsoft/Phi-3.5-mini-instruct", "adamw", 2e-4, 512, *SPHERE, 50, 100, 50),
    "gemma9b": ("google/gemma-2-9b", "adamw", 2e-4, 512, *MEAN, 50, 100, 50),
}


def write(folder: Path, text: str | bytes) -> str:
    path = folder / "mine.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def problems(path: str, *overrides: str) -> list[str]:
    """Return the lines of what is wrong, without the recipe's name in front."""
    with pytest.raises(WakeError) as caught:
        load_recipe(path, overrides)
    lines = str(caught.value).split("\n")
    assert all(line.startswith(f"recipe {path}: ") and line.isprintable() for line in lines)
    return [line.removeprefix(f"recipe {path}: ") for line in lines]


@pytest.mark.parametrize("name", EARLIER_RUNS)
def test_shipped_recipe_has_the_earlier_runs_settings(name: str) -> None:
    default_name, recipe = load_recipe(name)
    model, tokens, data, train, run = recipe.model, recipe.tokens, recipe.data, recipe.train, recipe.run
    special = (model.base, train.optimizer, train.learning_rate, data.seq_len, tokens.start, tokens.start_radius)
    assert default_name == name
    assert (*special, run.sentry_every, run.eval_every, run.log_every) == EARLIER_RUNS[name]
    assert (train.batch_size, train.max_steps, train.warmup_steps) == (16, 3000, 150)
    assert (train.max_grad_norm, train.weight_decay, train.seed, train.val_fraction) == (1.0, 0.0, 42, 0.1)
    assert (model.quantization, model.compute_dtype, tokens.match, recipe.phase) == ("nf4", "bfloat16", "word", "rows")


def test_shipped_recipes_are_the_earlier_runs_and_the_demo() -> None:
    assert set(shipped_recipes()) == {*EARLIER_RUNS, "demo"}
    assert load_recipe("demo")[1].model.quantization == "nf4"


def test_defaults_are_those_of_the_largest_run(tmp_path: Path) -> None:
    name, recipe = load_recipe(write(tmp_path, GOOD))
    ours, shipped = recipe.model_dump(), load_recipe("qwen14b")[1].model_dump()
    for section, key in (("model", "base"), ("tokens", "lexicon"), ("data", "text")):
        ours[section].pop(key)
        shipped[section].pop(key)
    assert name == "mine"
    assert ours == shipped


def test_recipe_is_frozen() -> None:
    recipe = load_recipe("demo")[1]
    with pytest.raises(ValidationError, match="frozen"):
        recipe.train.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "wanted"), [("qwen14", '"qwen14b"'), ("gema9b", '"gemma9b"'), ("xyz", "use one of"), ("", "use one of")]
)
def test_unknown_recipe_gets_a_guess(given: str, wanted: str) -> None:
    assert wanted in problems(given)[0]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (GOOD + "[trian]\nseed = 1\n", 'trian: unknown key, did you mean "train"?; use one of phase, model,'),
        (GOOD + "[train]\nmax_step = 1\n", 'train.max_step: unknown key, did you mean "max_steps"?; use one of'),
        (GOOD + "[train]\noptimizer = 'adamww'\n", "train.optimizer: input should be 'adafactor' or 'adamw', not "),
        (GOOD + "[run]\nqq = 1\n", "run.qq: unknown key; use one of log_every"),
        ("model = 5\n" + GOOD[GOOD.index("[tokens]") :], "model: input should be a valid dictionary"),
        (GOOD.replace('base = "b"', ""), "model.base: missing"),
    ],
)
def test_wrong_key_or_choice_is_named(text: str, wanted: str, tmp_path: Path) -> None:
    (line,) = problems(write(tmp_path, text))
    assert line.startswith(wanted)


def test_every_mistake_is_reported_at_once(tmp_path: Path) -> None:
    text = """
    phrase = "rows"
    [model]
    bass = "b"
    compute_dtype = "bf16"
    [data]
    text = "t"
    seq_len = 0
    [train]
    learning_rate = "5e-4"
    [run]
    sentry_min_gap_s = 500
    """
    found = problems(write(tmp_path, text), "train.seed", "train.batch_size=x")
    assert [line.split(": ")[0] for line in found[:2]] == ["--set train.seed", "--set train.batch_size=x"]
    assert {line.split(":")[0] for line in found[2:]} == {
        *("phrase", "model.bass", "model.base", "model.compute_dtype", "tokens", "data.seq_len"),
        *("train.learning_rate", "run"),
    }


WRONG: list[tuple[str, str]] = [
    ("train.max_steps", '"3000"'),
    ("train.max_steps", "3000.0"),
    ("train.max_steps", "true"),
    ("train.max_steps", "0"),
    ("train.max_steps", "-1"),
    ("train.max_steps", "1" * 30),
    ("train.warmup_steps", "-1"),
    ("train.learning_rate", '"5e-4"'),
    ("train.learning_rate", "true"),
    ("train.learning_rate", "0"),
    ("train.learning_rate", "-1.0"),
    ("train.learning_rate", "inf"),
    ("train.learning_rate", "nan"),
    ("train.learning_rate", "1e999"),
    ("train.learning_rate", "1" + "0" * 400),
    ("train.max_grad_norm", "nan"),
    ("train.weight_decay", "-0.1"),
    ("train.val_fraction", "0"),
    ("train.val_fraction", "1.0"),
    ("train.seed", "-1"),
    ("train.seed", str(2**63)),
    ("train.exact", "1"),
    ("train.optimizer", "1"),
    ("data.seq_len", str(10**9)),
    ("data.text", '""'),
    ("data.text", '"a\\u0000b"'),
    ("data.text", "[]"),
    ("data.text", "1979-05-27"),
    ("model.base", "1"),
    ("model.quantization", '"int8"'),
    ("tokens.start_radius", "0"),
    ("tokens.match", '"Word"'),
    ("run.keep_last", "0"),
    ("run.sentry_max_gap_s", "inf"),
    ("phase", '"lora"'),
]


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_wrong_value_is_refused_with_its_key(key: str, value: str, tmp_path: Path) -> None:
    (line,) = problems(write(tmp_path, GOOD), f"{key}={value}")
    assert line.startswith(f"{key}: ")
    assert line.endswith("mend the value")
    assert len(line) < 250


def test_whole_number_is_a_number(tmp_path: Path) -> None:
    value = load_recipe(write(tmp_path, GOOD), ["train.max_grad_norm=2"])[1].train.max_grad_norm
    assert (value, type(value)) == (2.0, float)


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("warmup_steps=3000", "train: warmup_steps (3000) must be less than max_steps (3000)"),
        ("max_steps=150", "train: warmup_steps (150) must be less than max_steps (150)"),
    ],
)
def test_warm_up_must_end_before_the_run(override: str, wanted: str, tmp_path: Path) -> None:
    (line,) = problems(write(tmp_path, GOOD), f"train.{override}")
    assert line.startswith(wanted)


def test_set_overrides_and_adds(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "[train]\nseed = 1\n")
    _, recipe = load_recipe(path, ["train.seed=2", "train.seed=3", " run.keep_last = 9 # few", 'data.text="a=b.txt"'])
    assert (recipe.train.seed, recipe.run.keep_last, recipe.data.text) == (3, 9, "a=b.txt")
    _, recipe = load_recipe(path, ["train={max_steps=7, warmup_steps=1}"])
    assert (recipe.train.max_steps, recipe.train.seed) == (7, 42)


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("train.max_steps", "--set train.max_steps: not key=value; write for example"),
        ("=5", "--set =5: not key=value"),
        ("data.text=my.txt", "--set data.text=my.txt: the part after '=' is no TOML value; text needs quotes"),
        ("model.base=", "--set model.base=: the part after '=' is no TOML value"),
        ("model.base.name=1", "--set model.base.name=1: base is a value, not a table"),
        ("run.max_steps=5", "run.max_steps: unknown key"),
        ("max_steps=5", "max_steps: unknown key"),
        (".=5", "--set .=5: not key=value"),
        ("train..seed=5", "--set train..seed=5: not key=value"),
        ("train.seed=1\nexact=true", "--set train.seed=1\\nexact=true: the part after '='"),
        ("train.seed=1\n[run]\nkeep_last=1", "--set train.seed=1\\n[run]\\nkeep_last=1: the part after '='"),
        ("train.seed=1\nvalue.x=2", "--set train.seed=1\\nvalue.x=2: the part after '='"),
        pytest.param("train.seed=" + "[" * 100_000, "--set train.seed=[[[", id="deep"),
        pytest.param("train.seed=" + "1" * 5000, "--set train.seed=111", id="long"),
    ],
)
def test_wrong_set_is_refused(override: str, wanted: str, tmp_path: Path) -> None:
    found = problems(write(tmp_path, GOOD), override)
    assert len(found) == 1
    assert found[0].startswith(wanted)
    assert len(found[0]) < 400


def test_set_shows_how_text_is_quoted(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    line = problems(path, "data.text=my.txt")[0]
    quoted = line[line.index("--set '") + len("--set '") : -1]
    assert load_recipe(path, [quoted])[1].data.text == "my.txt"


def test_toml_mistake_names_its_line(tmp_path: Path) -> None:
    assert "at line 8, column" in problems(write(tmp_path, GOOD + "[train]\nmax_steps = = 2\n"))[0]


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"[model]\nbase = '\xff'\n", "not UTF-8 at byte 16; save it as UTF-8"),
        (b"\x00", "not TOML"),
        pytest.param(b"x = " + b"[" * 10_000, "nested too deep", id="deep"),
        pytest.param(b"x = " + b"{a=" * 5_000, "nested too deep", id="deep tables"),
        pytest.param(
            b"train.max_steps." + b"a." * 5_000 + b"b = 1\n" + GOOD.encode(),
            "input should be a valid integer, not ",
            id="deep dotted key",
        ),
        pytest.param(
            GOOD.encode() + b"[train]\nmax_steps = 0x" + b"f" * 9_000, "cannot be shown", id="number too long to write"
        ),
        pytest.param(b"a." * 10_000 + b"b = 1", "has 20,005 bytes, a recipe at most 16,384", id="large"),
        pytest.param(GOOD.encode() + b"[train]\nseed = " + b"1" * 5000, "not TOML", id="long"),
        (GOOD.encode() + b"[model]\n", "not TOML"),
        (b"", "model: missing"),
    ],
)
def test_useless_file_is_refused(content: bytes, wanted: str, tmp_path: Path) -> None:
    assert wanted in problems(write(tmp_path, content))[0]


def test_missing_recipe_and_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    assert "no such file" in problems(str(tmp_path / "none.toml"))[0]
    assert "cannot be read" in problems(str(tmp_path / "folder.toml"))[0]


def test_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    plain: Any = load_recipe(write(tmp_path, GOOD))
    assert load_recipe(write(tmp_path, "\ufeff" + GOOD.replace("\n", "\r\n"))) == plain
