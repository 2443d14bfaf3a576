"""Promises: a hostile sentry or recipe does nothing; NaN or Inf stops the run and keeps the last good sentry."""

import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from faults import hooks
from faults.lab import DONE, KILL, STEPS, Lab, as_json, newest_step, no_traceback, refused
from safetensors.torch import load_file, save_file

from wake2vec import sentry
from wake2vec.rundir import RunDir

_AT = 20


class _Touches:
    """Pickles to a call that leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.mark}'",)


def hostile_files(lab: Lab, count: int) -> str:
    """Put files of every kind of malice into a run and resume it; nothing runs, nothing outside is touched."""
    runs = lab.fresh()
    done = lab.train(runs, prepare=[(hooks.kill_after_step, (_AT,))]).wait()
    assert done.code == -KILL, done
    for _ in range(count):
        lab.each(len(_PLANTS), lambda index, _: _planted(lab, runs, sorted(_PLANTS)[index]))
        for name, text in _RECIPES.items():
            _hostile_recipe(lab, name, text)
    return f"{count} times {len(_PLANTS)} hostile files and {len(_RECIPES)} recipes"


def _planted(lab: Lab, runs: Path, name: str) -> None:
    copy, outside = lab.fresh() / "runs", lab.fresh()
    shutil.copytree(runs, copy)
    (outside / "precious").write_text("mine")
    shutil.copytree(runs / "tiny" / "sentries", outside / "sentries")
    run = RunDir(copy / "tiny")
    before = _content(outside)
    _PLANTS[name](run, outside)
    for arguments in (["sentries", "tiny", "--runs", copy], ["train", lab.recipe, "--runs", copy]):
        done = lab.run(*arguments, timeout_s=60)
        no_traceback(done)
        assert _content(outside) == before, f"{name}: something outside the run changed: {done}"
    if done.code == DONE:
        lab.check_end(run)
        assert "is damaged" in done.err or name in _HARMLESS, f"{name} was not named: {done}"


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _newer(run: RunDir) -> Path:
    return run.sentry(STEPS - 1)


def _forge(run: RunDir, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> None:
    """Plant a newer sentry whose hash is right: whoever can write into a run can compute it."""
    good = sentry.read(run.sentry(newest_step(run)))
    header, tensors = {**good.header, "step": STEPS - 1}, dict(good.tensors)
    change(header, tensors)
    sentry.write(run.sentry(STEPS - 1), tensors, header)


def _raw(run: RunDir, entries: Any, data: bytes = b"") -> None:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    _newer(run).write_bytes(struct.pack("<Q", len(text)) + text + data)


def _link(path: Path, target: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


_META = {"sha256": "0" * 64, "wake2vec": json.dumps({"format": 1, "step": STEPS - 1, "identity": "x"})}
_HUGE = {"__metadata__": _META, "rows/input": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}}
_DEEP = b'{"__metadata__":{"sha256":"' + b"0" * 64 + b'","wake2vec":"' + b"[" * 400_000 + b'"}}'
_PLANTS: dict[str, Callable[[RunDir, Path], Any]] = {
    "pickle with code": lambda run, out: _newer(run).write_bytes(pickle.dumps(_Touches(out / "mark"))),
    "torch file with code": lambda run, out: torch.save(_Touches(out / "mark"), _newer(run)),
    "enormous shape": lambda run, _: _raw(run, _HUGE),
    "enormous header": lambda run, _: _newer(run).write_bytes(struct.pack("<Q", 2**63 - 1) + b"{" * 100),
    "deep header": lambda run, _: _raw(run, _DEEP),
    "NaN rows": lambda run, _: _forge(run, lambda _, tensors: tensors["rows/input"].fill_(float("nan"))),
    "Inf in the optimizer": lambda run, _: _forge(
        run, lambda _, tensors: [t.fill_(float("inf")) for name, t in tensors.items() if name.startswith("optim")]
    ),
    "rows of another shape": lambda run, _: _forge(
        run, lambda _, tensors: tensors.update({"rows/input": torch.zeros(3, 5)})
    ),
    "rows missing": lambda run, _: _forge(run, lambda _, tensors: [tensors.pop("rows/head")]),
    "rows named like a path": lambda run, _: _forge(
        run, lambda _, tensors: tensors.update({"rows/../../../precious": torch.zeros(3)})
    ),
    "plan of text": lambda run, _: _forge(run, lambda header, _: header["plan"].update(micro_batch_size="../x")),
    "plan of zero": lambda run, _: _forge(run, lambda header, _: header["plan"].update(micro_batch_size=0)),
    "no counters": lambda run, _: _forge(run, lambda header, _: [header.pop("window"), header.pop("optimizer_step")]),
    "window of text": lambda run, _: _forge(run, lambda header, _: header.update(window="x")),
    "negative step": lambda run, _: _forge(run, lambda header, _: header.update(step=-5)),
    "enormous step": lambda run, _: _forge(run, lambda header, _: header.update(step=10**30)),
    "link to a file": lambda run, out: _link(_newer(run), out / "precious"),
    "link to a device": lambda run, _: _link(_newer(run), Path("/dev/zero")),
    "pipe": lambda run, _: os.mkfifo(_newer(run)),
    "folder": lambda run, _: _newer(run).mkdir(),
    "sentries elsewhere": lambda run, out: _link(run.sentries, out / "sentries"),
    "snapshots elsewhere": lambda run, out: _link(run.snapshots, out / "sentries"),
    "lock elsewhere": lambda run, out: _link(run.lock, out / "precious"),
    "metrics elsewhere": lambda run, out: _link(run.metrics, out / "precious"),
    "heartbeat elsewhere": lambda run, out: _link(run.heartbeat, out / "precious"),
    "temporary elsewhere": lambda run, out: [
        _link(run.path / f".{name}.{pid}.tmp", out / "precious")
        for name in ("metrics.jsonl", "heartbeat.json", "run.json")
        for pid in range(1, 50)
    ],
}
_HARMLESS = {"temporary elsewhere"}
"""Swept away before anything is written."""
_RECIPES = {
    "huge": "a = " + "[" * 10**6,
    "deep": "a = " + "[" * 10_000,
    "deep tables": "a." * 5000 + "b = 1",
    "deep tables of a known key": "[train]\nmax_steps." + "a." * 5000 + "b = 1",
    "path as a name": '[model]\nbase = "../../../etc"\n[tokens]\nlexicon = "/etc/shadow"\n[data]\ntext = "/dev/zero"\n',
    "code": '__import__ = "os"\n[model]\nbase = "$(touch mark)"\n',
    "huge hexadecimal number": "[train]\nmax_steps = 0x" + "f" * 10_000,
    "huge number": "[train]\nmax_steps = " + "9" * 10_000,
}


def _hostile_recipe(lab: Lab, name: str, text: str) -> None:
    folder = lab.fresh()
    (folder / "r.toml").write_text(text)
    done = lab.run("train", "r.toml", "--runs", "runs", cwd=folder, timeout_s=60)
    refused(done, "r.toml" if name != "path as a name" else "/dev/zero: not a plain file")
    left = sorted(path.name for path in folder.rglob("*"))
    assert left in (["r.toml"], ["r.toml", "runs"]), f"{name} left {left}"


def not_finite(lab: Lab, count: int) -> str:
    """Poison a row of the base, the rows in a run, and the learning rate; the message names step, blocks and sentry."""
    for index in range(count):
        rng = random.Random(f"{lab.seed} poison {index}")
        _poisoned_text(lab, rng)
        _poisoned_rows(lab, rng)
        _overflow(lab)
    return f"{count} times a poisoned text block, poisoned rows, an overflow"


def _poisoned_text(lab: Lab, rng: random.Random) -> None:
    """A block of the text makes NaN: the base's row of a token that stands in few blocks is NaN."""
    inputs = lab.fresh() / "inputs"
    shutil.copytree(lab.inputs, inputs)
    word = rng.choice(["xylophone", "quetzal", "zyzzyva"])
    (inputs / "text.txt").write_text((inputs / "text.txt").read_text() + f" {word}{word}")
    file = inputs / "base" / "model.safetensors"
    tensors = load_file(file)
    vocabulary = as_json(inputs / "base" / "tokenizer.json")["model"]["vocab"]
    used = {char for path in ("text.txt", "lexicon.txt") for char in (lab.inputs / path).read_text()}
    rare = [char for char in word if char not in used]
    assert rare, "the word has no letter of its own"
    tensors["model.embed_tokens.weight"][vocabulary[rare[0]]] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    recipe = Path(str(lab.recipe).replace("tiny.toml", f"poison-{rng.random()}.toml"))
    recipe.write_text(lab.recipe.read_text().replace(str(lab.inputs), str(inputs)))
    runs = lab.fresh()
    done = lab.run("train", recipe, "--runs", runs)
    refused(done, "step ", "loss nan")
    assert "blocks [" in done.err or "held-out" in done.err, done
    run = RunDir(runs / recipe.stem)
    _kept_is_named(run, done.err)
    again = lab.run("train", recipe, "--runs", runs)
    refused(again, "loss nan")
    _kept_is_named(run, again.err)


def _kept_is_named(run: RunDir, said: str) -> None:
    newest = newest_step(run)
    kept = "no sentry is there yet" if newest == -1 else f"the sentry of step {newest} is whole and kept"
    assert kept in said, f"the newest is {newest}: {said}"


def _poisoned_rows(lab: Lab, rng: random.Random) -> None:
    runs = lab.fresh()
    step = rng.randrange(3, STEPS)
    done = lab.train(runs, prepare=[(hooks.poison_rows, (step,))]).wait()
    refused(done, f"step {step}: loss nan", "blocks [", "whole and kept")
    _kept_is_named(RunDir(runs / "tiny"), done.err)
    lab.train_to_end(runs)


def _overflow(lab: Lab) -> None:
    """A learning rate that makes the rows themselves overflow: they are never saved."""
    runs = lab.fresh()
    done = lab.train(runs, "--set", "train.learning_rate=1e38").wait()
    refused(done, "step ")
    run = RunDir(runs / "tiny")
    _kept_is_named(run, done.err)
