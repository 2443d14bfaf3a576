"""Exports loaded as users load them: without this package, on this stack and, where it is given, on the other."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny import make_inputs, make_recipe, run_to_end
from transformers import AutoTokenizer

from wake2vec import base, cli, export, sentry, shards, tokens
from wake2vec.errors import WakeError
from wake2vec.identity import read_inputs
from wake2vec.loss import logits
from wake2vec.overlay import WakeOverlay
from wake2vec.rundir import RunDir
from wake2vec.tables import open_tables

# .ci/run sets it: the other stack's Python. Without it only this stack is tried.
OTHER = os.environ.get("WAKE2VEC_OTHER_PYTHON")
PYTHONS = [sys.executable] + ([OTHER] if OTHER else [])
TEXT = "the riverrun runs past the millwheel, éternité and a swan-song o'erflow."
EXPORT = "import sys; from wake2vec.cli import _run; sys.exit(_run())"


@pytest.fixture(scope="module", params=["inputs", "tied_inputs"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunDir]:
    inputs = request.getfixturevalue(request.param)
    return inputs, run_to_end(inputs, tmp_path_factory.mktemp("export") / "run")


def trainer_logits(inputs: Path, run: RunDir, ids: list[int]) -> torch.Tensor:
    """Return what training computes with the last rows."""
    read = read_inputs(make_recipe(inputs), None, lambda _: None)
    frozen = base.load(
        read.base, read.base_vocab_size, quantization="none", compute_dtype="float32", device=torch.device("cpu")
    )
    rows = sentry.read(run.sentry(12)).tensors
    overlay = WakeOverlay(frozen.table_VD, torch.nn.Parameter(rows["rows/input"]), read.base_vocab_size)
    hidden = frozen.hidden(overlay(torch.tensor([ids]))).flatten(0, 1)
    return logits(hidden, frozen.head_VD, rows["rows/input" if frozen.tied else "rows/head"])


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return inputs whose base both stacks can load: transformers 5 saves a tokenizer that 4 cannot."""
    folder = tmp_path_factory.mktemp("common")
    found = {"untied": make_inputs(folder / "untied"), "tied": make_inputs(folder / "tied", tied=True)}
    for inputs in found.values():
        tokens.save(AutoTokenizer.from_pretrained(inputs / "base"), inputs / "base")
    return found


@pytest.fixture(scope="module")
def answers(
    common: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str, int, int], dict[str, Any]]:
    """Return what every reader finds in every writer's exports, by (inputs, kind, writer, reader)."""
    folder = tmp_path_factory.mktemp("crossed")
    jobs: list[list[dict[str, str]]] = [[] for _ in PYTHONS]
    where = {}
    for name, inputs in common.items():
        run = run_to_end(inputs, folder / name)
        for kind in export.FORMATS:
            for writer, python in enumerate(PYTHONS):
                out = folder / f"{name}-{kind}-{writer}"
                _export(python, run, kind, out)
                for reader in range(len(PYTHONS)):
                    answer = folder / f"{out.name}-{reader}.json"
                    job = {"kind": kind, "folder": str(out), "base": str(inputs / "base"), "text": TEXT}
                    jobs[reader].append({**job, "out": str(answer)})
                    where[name, kind, writer, reader] = answer
    for reader, python in enumerate(PYTHONS):
        listed = folder / f"jobs-{reader}.json"
        listed.write_text(json.dumps(jobs[reader]))
        script = Path(__file__).with_name("loading.py")
        environment = {**os.environ, "PYTHONPATH": ""}
        done = subprocess.run(
            [python, "-W", "ignore", script, listed], capture_output=True, text=True, cwd=folder, env=environment
        )
        assert done.returncode == 0, done.stderr[-2000:]
    return {key: json.loads(path.read_text()) for key, path in where.items()}


def _export(python: str, run: RunDir, kind: str, out: Path) -> None:
    if python == sys.executable:
        export.export(run, kind, out, lambda _: None)
        return
    command = [python, "-W", "ignore", "-c", EXPORT, "export", run.path, "--format", kind, "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", ["untied", "tied"])
@pytest.mark.parametrize("kind", export.FORMATS)
@pytest.mark.parametrize("writer", range(len(PYTHONS)))
@pytest.mark.parametrize("reader", range(len(PYTHONS)))
def test_a_loaded_export_has_the_trainers_logits(
    name: str,
    kind: str,
    writer: int,
    reader: int,
    answers: dict[tuple[str, str, int, int], dict[str, Any]],
    common: dict[str, Path],
    tmp_path: Path,
) -> None:
    inputs = common[name]
    found = answers[name, kind, writer, reader]
    assert not found["wake2vec"]
    assert found["back"] == TEXT
    assert sum(i >= 484 for i in found["ids"]) == 5  # "swan-song" and "o'erflow" are one token each
    expected = trainer_logits(inputs, run_to_end(inputs, tmp_path / "run"), found["ids"])
    # float32 sums in another order
    torch.testing.assert_close(torch.tensor(found["logits"])[:, : expected.shape[1]], expected, rtol=1e-4, atol=1e-4)
    assert max(found["said"]) < expected.shape[1]


def test_model_export_leaves_everything_else_as_it_was(made: tuple[Path, RunDir], tmp_path: Path) -> None:
    inputs, run = made
    out = export.export(run, "model", tmp_path / "out", lambda _: None)
    before, after = open_tables(inputs / "base" / "model.safetensors"), open_tables(out / "model.safetensors")
    assert set(before) == set(after)
    grown = {name for name in before if before[name].shape != after[name].shape}
    rows = sentry.read(run.sentry(12)).tensors
    tied = "rows/head" not in rows
    assert grown == {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    for name in set(before) - grown:
        assert torch.equal(before[name][0:], after[name][0:])
    for name, key in (("model.embed_tokens.weight", "rows/input"), ("lm_head.weight", "rows/head"))[: 1 if tied else 2]:
        table = after[name][0:]
        assert table.shape[0] % 64 == 0
        assert torch.equal(table[:484], before[name][0:484])
        assert torch.equal(table[484:494], rows[key])
    config = json.loads((out / "config.json").read_text())
    assert config["vocab_size"] == after["model.embed_tokens.weight"].shape[0] == 512
    assert config["tie_word_embeddings"] == tied


def test_padding_rows_never_win(made: tuple[Path, RunDir], tmp_path: Path) -> None:
    _, run = made
    out = export.export(run, "model", tmp_path / "out", lambda _: None)
    tables = open_tables(out / "model.safetensors")
    head = tables.get("lm_head.weight", tables["model.embed_tokens.weight"])[0:].double()
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(4000, head.shape[1], generator=generator, dtype=torch.float64)
    states = torch.cat([states, 50 * states, -head, -50 * head.mean(0, keepdim=True), 50 * head.mean(0, keepdim=True)])
    scores = states @ head.T
    assert (scores[:, 494:].amax(1) < scores[:, :494].amax(1)).all()
    assert float(scores.softmax(1)[:, 494:].sum(1).max()) <= 18 / 512 + 1e-9
    assert json.loads((out / "generation_config.json").read_text())["suppress_tokens"] == list(range(494, 512))


def test_shards_stay_shards(inputs: Path, tmp_path: Path) -> None:
    copy = tmp_path / "inputs"
    shutil.copytree(inputs, copy)
    whole = {}
    with safe_open(copy / "base" / "model.safetensors", framework="pt") as file:
        whole = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    (copy / "base" / "model.safetensors").unlink()
    names = sorted(whole)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file_name, inside in halves.items():
        new = {
            name: shards.NewTensor("F32", tuple(whole[name].shape), lambda name=name: iter([shards.raw(whole[name])]))  # type: ignore[misc]
            for name in inside
        }
        shards.write(copy / "base" / file_name, new)
    weight_map = {name: file_name for file_name, inside in halves.items() for name in inside}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (copy / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    run = run_to_end(copy, tmp_path / "run", {"train": {"max_steps": 3}})
    heard: list[str] = []
    out = export.export(run, "model", None, heard.append)
    assert out == run.path / "export" / "model"
    assert {path.name for path in out.glob("*.safetensors")} == set(halves)
    assert json.loads((out / "model.safetensors.index.json").read_text())["weight_map"] == weight_map
    assert any(line.startswith("logits checked") for line in heard)


def test_an_export_replaces_an_earlier_one_and_nothing_else(made: tuple[Path, RunDir], tmp_path: Path) -> None:
    _, run = made
    out = export.export(run, "rows", tmp_path / "out", lambda _: None)
    first = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}
    export.export(run, "rows", tmp_path / "out", lambda _: None)
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()} == first
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("mine")
    with pytest.raises(WakeError, match="holds other files"):
        export.export(run, "rows", other, lambda _: None)
    assert [path.name for path in other.iterdir()] == ["letter.txt"]


def test_a_failed_check_leaves_nothing(
    made: tuple[Path, RunDir], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run = made
    plain = shards.write

    def damaged(path: Path, tensors: dict[str, shards.NewTensor]) -> dict[str, str]:
        digests = plain(path, tensors)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        return digests

    monkeypatch.setattr(shards, "write", damaged)
    with pytest.raises(WakeError, match="read back other than written"):
        export.export(run, "rows", tmp_path / "out", lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_wrong_rows_are_noticed_by_their_logits(
    made: tuple[Path, RunDir], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run = made
    plain = shards.extended

    def shifted(table: Any, num_base: int, rows: Any, num_rows: int) -> shards.NewTensor:
        return plain(table, num_base - 1, rows, num_rows)  # every new word one id too early

    monkeypatch.setattr(shards, "extended", shifted)
    with pytest.raises(WakeError, match=r"logits differ from the trainer's|a padding row wins"):
        export.export(run, "model", tmp_path / "out", lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_named(made: tuple[Path, RunDir], tmp_path: Path) -> None:
    _, run = made
    shutil.copytree(run.path, tmp_path / "run")
    copy = RunDir(tmp_path / "run")
    (copy.reference / "base.safetensors").unlink()
    with pytest.raises(WakeError, match=r"reference/base.safetensors: .*continue the run"):
        export.export(copy, "rows", None, lambda _: None)
    shutil.rmtree(copy.sentries)
    with pytest.raises(WakeError, match="no whole sentry"):
        export.export(copy, "rows", None, lambda _: None)
    assert not copy.export.exists()


def test_push_makes_a_private_repository_and_uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[tuple[str, dict[str, Any]]] = []

    class Api:
        def create_repo(self, name: str, **options: Any) -> str:
            asked.append((name, options))
            return "address"

        def upload_folder(self, **options: Any) -> None:
            asked.append(("upload", options))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert export.push(tmp_path, "org/name", public=False, say=lambda _: None) == "address"
    assert asked[0] == ("org/name", {"private": True, "exist_ok": True})
    assert asked[1][1]["folder_path"] == tmp_path


def test_push_without_the_hub_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(WakeError, match="push a b c: no name of a repository"):
        export.push(tmp_path, "a b c", public=False, say=lambda _: None)


def test_command_refuses_an_unknown_format(
    made: tuple[Path, RunDir], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["wake2vec", "export", str(made[1].path), "--format", "gguf"])
    assert cli._run() == 1
    assert "--format gguf: no such format; use rows or model" in capsys.readouterr().err
