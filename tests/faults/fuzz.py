"""Promise: what a user types is answered: never a traceback, never a half-made run."""

import contextlib
import io
import multiprocessing.connection
import multiprocessing.pool
import os
import random
import sys
from pathlib import Path

from faults.lab import Lab

from wake2vec import cli

_BATCH = 500
_COMMANDS = ("train", "sentries", "fetch", "plan", "doctor", "--version", "--help", "tarin", "")
_OPTIONS = (
    "--set",
    "--run",
    "--runs",
    "--json",
    "--import",
    "--to-pt",
    "--prune",
    "--help",
    "--",
    "-h",
    "--gpu-memory",
)
_KEYS = (
    *("train.max_steps", "train.seed", "model.base", "run.log_every", "data.text", "tokens.match", "train", "x.y", ""),
    *("train.learning_rate", "data.seq_len", "run", "phase", "model.quantization", "train.max_steps.x", "a" * 300),
)
_VALUES = (
    *("1", "-1", "0", '"x"', "nan", "inf", "1e999", "[]", "{}", "true", "''", '"\\u0000"', "9" * 5000, "2026-01-01"),
    *("[" * 3000, "{a = 1}", '"""', "0x1F", "1_000", "\u00e9", "\udcff", "", "=", "\n", "#", "1979-05-27T07:32:00Z"),
)
_TEXTS = (
    *(
        "",
        " ",
        "\x00",
        "\ufeffriver",
        "e\u0301",
        "\u202e",
        "\u200b",
        "\U0001f4a7" * 50,
        "a" * 5000,
        "\r",
        "\x85",
        "\u2028",
    ),
    *(
        "riverrun\nriverrun",
        "\udc80",
        "<|endoftext|>",
        "\ufffd",
        "\u0378",
        "river",
        "two words",
        "\t",
        "'",
        "\\n",
        "\x7f",
    ),
)


def fuzz(lab: Lab, count: int) -> str:
    """Type nonsense: arguments, recipes, lexicons and texts, most of it nearly right."""
    seen: dict[int, int] = {}
    with multiprocessing.pool.ThreadPool(lab.workers) as pool:
        starts = range(0, count, _BATCH)
        for codes in pool.imap_unordered(lambda start: _batch(lab, start, min(_BATCH, count - start)), starts):
            for code, number in codes.items():
                seen[code] = seen.get(code, 0) + number
    return f"{count} inputs; exit codes {dict(sorted(seen.items()))}"


def _batch(lab: Lab, start: int, count: int) -> dict[int, int]:
    folder = lab.fresh()
    ours, theirs = multiprocessing.Pipe(duplex=False)
    lab.fork(_type, folder, lab.inputs, f"{lab.seed} {start}", count, theirs)
    theirs.close()
    assert ours.poll(600), f"batch {start} of seed {lab.seed} hangs; its input lies in {folder}"
    result = ours.recv()
    assert isinstance(result, dict), f"batch {start} of seed {lab.seed}: {result}"
    return result


def _type(folder: Path, inputs: Path, seed: str, count: int, results: multiprocessing.connection.Connection) -> None:
    """Type so many inputs in this process; send how they ended, or the first that ended badly."""
    os.chdir(folder)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["WAKE2VEC_RUNS"] = str(folder / "runs")
    rng = random.Random(seed)
    codes: dict[int, int] = {}
    for _ in range(count):
        arguments = rng.choice(_KINDS)(rng, folder, inputs)
        (folder / "input").write_text(repr(arguments))
        code, said = _answer(arguments)
        codes[code] = codes.get(code, 0) + 1
        left = sorted(path.name for path in folder.iterdir()) if (folder / "runs").exists() else []
        if code not in (0, 1, 2) or "Traceback" in said or (left and list((folder / "runs").iterdir())):
            results.send(f"{arguments!r} ended with {code}, left {left}\n{said[-3000:]}")
            return
    results.send(codes)


def _answer(arguments: list[str]) -> tuple[int, str]:
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["wake2vec", *arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli._run()
        except SystemExit as error:
            code = int(str(error.code or 0))
    return code, out.getvalue() + err.getvalue()


def _arguments(rng: random.Random, _folder: Path, inputs: Path) -> list[str]:
    words = [rng.choice(_COMMANDS)]
    for _ in range(rng.randrange(6)):
        word = rng.choice([_OPTIONS, _VALUES, _TEXTS, ("demo", "qwen14b", "nowhere.toml", "/", "..", str(inputs))])
        words.append(rng.choice(word))
    if words[0] == "train":  # nothing that would begin to train, or to download
        words.append("--set=run.keep_last=-1")
    elif words[0] in ("fetch", "plan"):
        words.append("--set=x=1")
    return [word.replace("\x00", "") for word in words]


def _overrides(rng: random.Random, _folder: Path, _inputs: Path) -> list[str]:
    words = ["train", rng.choice(["demo", "qwen14b", "llama1b"])]
    for _ in range(rng.randrange(1, 4)):
        words += ["--set", f"{rng.choice(_KEYS)}={rng.choice(_VALUES)}".replace("\x00", "")]
    return [*words, "--set", "data.text='nowhere.txt'", "--set", f"train.seed={rng.choice(['-1', '1'])}"]


def _recipe(rng: random.Random, folder: Path, inputs: Path) -> list[str]:
    """Mutate a recipe that is right but for its text, which is not there."""
    text = _toml(inputs, inputs / "lexicon.txt", "nowhere.txt").encode("utf-8", "surrogateescape")
    (folder / "r.toml").write_bytes(_mutated(text, rng))
    return ["train", "r.toml"]


def _toml(inputs: Path, lexicon: Path | str, text: Path | str) -> str:
    return (
        f'[model]\nbase = "{inputs}/base"\nquantization = "none"\n[tokens]\nlexicon = "{lexicon}"\n'
        f'[data]\ntext = "{text}"\nseq_len = 16\n[train]\nmax_steps = 0\nwarmup_steps = 2\n'
    )


def _mutated(content: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(content) + 1)
        size = rng.randrange(8)
        piece = rng.choice([*_TEXTS, *_VALUES]).encode("utf-8", "surrogateescape" if rng.random() < 0.5 else "replace")
        content = rng.choice(
            [
                content[:at] + piece + content[at:],
                content[:at] + content[at + size :],
                content[:at] + rng.randbytes(size) + content[at + size :],
            ]
        )
    return content


def _lexicon(rng: random.Random, folder: Path, inputs: Path) -> list[str]:
    """Mutate a lexicon; the text has one character, so that no run begins."""
    (folder / "lexicon.txt").write_bytes(_mutated((inputs / "lexicon.txt").read_bytes(), rng))
    (folder / "text.txt").write_text("a")
    return _typed(folder, inputs)


def _text(rng: random.Random, folder: Path, inputs: Path) -> list[str]:
    """Mutate a text that is too short for a block."""
    (folder / "lexicon.txt").write_text("riverrun\n")
    (folder / "text.txt").write_bytes(_mutated(b"past Eve and Adam's", rng)[:30])
    return _typed(folder, inputs)


def _typed(folder: Path, inputs: Path) -> list[str]:
    recipe = _toml(inputs, "lexicon.txt", "text.txt").replace("max_steps = 0", "max_steps = 3")
    (folder / "r.toml").write_text(recipe.replace("seq_len = 16", "seq_len = 1000"))
    return ["train", "r.toml"]


_KINDS = (_arguments, _overrides, _recipe, _lexicon, _text)
