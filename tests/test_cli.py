"""The command as a user types it: exit codes, messages, what is left behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import killing
import pytest
from tiny import make_recipe, write_recipe

from wake2vec import cli, preflight, sentry
from wake2vec.rundir import RunDir


@pytest.fixture
def wake2vec(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Return a function that runs the command in this process and returns its exit code."""
    monkeypatch.setenv("WAKE2VEC_RUNS", str(tmp_path / "runs"))

    def run(*arguments: str | Path) -> int:
        monkeypatch.setattr(sys, "argv", ["wake2vec", *map(str, arguments)])
        return cli._run()

    return run


@pytest.fixture
def recipe(inputs: Path, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "tiny.toml", make_recipe(inputs))


COMMAND = "import sys; from wake2vec.cli import _run; sys.exit(_run())"
Command = Callable[..., int]
Capture = pytest.CaptureFixture[str]


def test_train_then_again_says_done(wake2vec: Command, recipe: Path, tmp_path: Path, capsys: Capture) -> None:
    assert wake2vec("train", recipe) == 0
    out = capsys.readouterr()
    assert "new rows as trained" in out.out
    assert "step 12: " in out.err
    assert wake2vec("train", recipe, "--json") == 0
    out = capsys.readouterr()
    assert "run tiny is done: 12 steps" in out.err
    result = json.loads(out.out)
    assert result["run"] == str(tmp_path / "runs" / "tiny")
    assert set(result["val/bits_per_char"]) == {"before", "after", "base", "shuffled"}
    assert (tmp_path / "runs" / "tiny" / "loss_table.md").read_text().count("\n") == 6


def test_run_folder_holds_what_the_design_lists(wake2vec: Command, recipe: Path, tmp_path: Path) -> None:
    assert wake2vec("train", recipe) == 0
    assert {path.name for path in (tmp_path / "runs" / "tiny").iterdir()} == {
        *("run.json", "sentries", "heartbeat.json", "metrics.jsonl", "loss_table.md", "lock", "reference", "report")
    }


def test_report_command_writes_what_train_wrote(
    wake2vec: Command, recipe: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert wake2vec("train", recipe) == 0
    folder = tmp_path / "runs" / "tiny" / "report"
    assert f"report: {folder / 'index.html'}" in capsys.readouterr().err
    summary = (folder / "summary.json").read_bytes()
    shutil.rmtree(folder)
    assert wake2vec("report", "tiny", "--json") == 0
    written = json.loads(capsys.readouterr().out)["files"]
    assert written[0] == str(folder / "index.html")
    assert {Path(path).name for path in written} == {path.name for path in folder.iterdir()}
    assert (folder / "summary.json").read_bytes() == summary
    assert wake2vec("report", "nowhere") == 1


def test_plan_says_what_a_run_would_take(wake2vec: Command, recipe: Path, tmp_path: Path, capsys: Capture) -> None:
    assert wake2vec("plan", recipe) == 0
    out = capsys.readouterr().out
    for said in ("10 new words", "12 steps of 64 tokens", "micro_batch_size 4", "peak", "part", "optimizer"):
        assert said in out
    assert wake2vec("plan", recipe, "--json", "--gpu-memory", "2GiB") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["limit_bytes"] == 2 * 2**30
    assert found["plan"]["fused"]
    assert found["least_bytes"] <= found["bytes"]["peak"] <= found["limit_bytes"]
    assert found["epochs"] == 12 * 4 / found["train_blocks"]
    assert wake2vec("plan", recipe, "--gpu-memory", "100KB") == 0
    assert "it does not fit" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", ["plan", "train"])
def test_size_that_is_none_is_refused(command: str, wake2vec: Command, recipe: Path, capsys: Capture) -> None:
    assert wake2vec(command, recipe, "--gpu-memory", "much") == 1
    assert "--gpu-memory: 'much' is no size; write for example 15GiB" in capsys.readouterr().err


BAD_INPUTS = {
    "missing text": (["--set", 'data.text="nowhere.txt"'], "text nowhere.txt: no such file"),
    "missing lexicon": (["--set", 'tokens.lexicon="nowhere.txt"'], "nowhere.txt: no such file"),
    "missing base": (["--set", 'model.base="./nowhere"'], "base model ./nowhere: no such folder"),
    "unknown key": (["--set", "train.max_stepz=3"], 'train.max_stepz: unknown key, did you mean "max_steps"?'),
    "mistyped key": (["--set", 'train.max_steps="3"'], "train.max_steps: "),
    "two at once": (["--set", "train.max_stepz=3", "--set", "run.log_every=0"], "run.log_every: "),
    "no space": ([], "GiB free, the run's sentries need"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_one_message_and_leaves_no_run(
    case: str, wake2vec: Command, recipe: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, message = BAD_INPUTS[case]
    if case == "no space":
        usage = type("Usage", (), {"free": 1000})
        monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage)
    assert wake2vec("train", recipe, *arguments) == 1
    out = capsys.readouterr()
    assert message in out.err
    assert "Traceback" not in out.err
    assert out.out == ""
    assert not (tmp_path / "runs" / "tiny").exists()


FILES = {
    "not UTF-8 text": ("text", b"caf\xe9 noir", "not UTF-8 at byte 3"),
    "empty text": ("text", b"  \n", "empty"),
    "text shorter than a block": ("text", b"the river runs past", "less than one block of 16"),
    "not UTF-8 lexicon": ("lexicon", b"caf\xe9\n", "not UTF-8"),
    "empty lexicon": ("lexicon", b"", "empty"),
    "bad lines": ("lexicon", b"one\n\ntwo words\none\n", "line 4"),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_files_are_one_message_and_leave_no_run(
    case: str, wake2vec: Command, recipe: Path, tmp_path: Path, capsys: Capture
) -> None:
    kind, content, message = FILES[case]
    path = tmp_path / "given.txt"
    path.write_bytes(content)
    key = {"text": "data.text", "lexicon": "tokens.lexicon"}[kind]
    assert wake2vec("train", recipe, "--set", f'{key}="{path}"') == 1
    error = capsys.readouterr().err
    assert message in error
    assert str(path) in error
    assert "Traceback" not in error
    assert not (tmp_path / "runs" / "tiny").exists()


def test_unknown_recipe_suggests_one(wake2vec: Command, tmp_path: Path, capsys: Capture) -> None:
    assert wake2vec("train", "qwen14") == 1
    assert 'did you mean "qwen14b"?' in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_changed_recipe_is_refused_with_both_values(
    wake2vec: Command, recipe: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert wake2vec("train", recipe) == 0
    before = (tmp_path / "runs" / "tiny" / "run.json").read_bytes()
    capsys.readouterr()
    assert wake2vec("train", recipe, "--set", "train.max_steps=20", "--set", "train.seed=6") == 1
    error = capsys.readouterr().err
    assert "train.max_steps: the run has 12, the recipe has 20" in error
    assert "train.seed: the run has 5, the recipe has 6" in error
    assert (tmp_path / "runs" / "tiny" / "run.json").read_bytes() == before


def test_a_changed_text_is_refused(wake2vec: Command, inputs: Path, tmp_path: Path, capsys: Capture) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes((inputs / "text.txt").read_bytes())
    recipe = write_recipe(tmp_path / "tiny.toml", make_recipe(inputs, {"run": {}}))
    recipe.write_text(recipe.read_text().replace(str(inputs / "text.txt"), str(text)))
    arguments = (recipe, "--set", "train.max_steps=3", "--set", "train.warmup_steps=1")
    assert wake2vec("train", *arguments) == 0
    (tmp_path / "runs" / "tiny" / "metrics.jsonl").write_text("")  # as if it had been stopped before its end
    text.write_text(text.read_text().replace("river", "brook"))
    assert wake2vec("train", *arguments) == 1
    assert "text_sha256: the run has " in capsys.readouterr().err


def test_a_second_process_is_refused_naming_the_holder(recipe: Path, tmp_path: Path) -> None:
    from wake2vec.rundir import hold

    command = [sys.executable, "-c", COMMAND, "train", str(recipe), "--runs", str(tmp_path / "runs")]
    with hold(RunDir(tmp_path / "runs" / "tiny")):
        second = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert second.returncode == 1
    assert f"held by process {os.getpid()} on " in second.stderr
    assert "Traceback" not in second.stderr


def test_usage_is_2_and_help_is_0(wake2vec: Command, capsys: Capture) -> None:
    assert wake2vec("train") == 2
    assert wake2vec("trian", "demo") == 2
    assert wake2vec("train", "demo", "--frobnicate") == 2
    assert wake2vec("--help") == 0
    assert wake2vec("train", "--help") == 0
    assert "RECIPE" in capsys.readouterr().out


def test_a_bug_is_70_with_its_traceback(
    wake2vec: Command, recipe: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wake2vec.cli.config.load_recipe", lambda *_: 1 / 0)
    assert wake2vec("train", recipe) == 70
    error = capsys.readouterr().err
    assert "ZeroDivisionError" in error
    assert "this is a bug" in error


@pytest.mark.slow
def test_sigterm_to_the_command_is_75_and_the_same_command_goes_on(recipe: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "WAKE2VEC_RUNS": str(tmp_path / "runs"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COMMAND, "train", str(recipe), "--set", "train.max_steps=100000"]
    run = RunDir(tmp_path / "runs" / "tiny")
    first = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while not run.sentry(0).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    first.send_signal(signal.SIGTERM)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 75, errors
    assert "stopped after step " in errors
    step = next(header["step"] for _, header, _ in sentry.listing(run) if header)
    assert f"stopped after step {step}, saved" in errors


@pytest.mark.parametrize(("short", "code"), [(True, 1), (False, 70)])
def test_any_error_while_memory_is_short_is_a_lack_of_memory(
    short: bool, code: int, wake2vec: Command, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def load(*_: object) -> None:
        raise SystemError("NULL result without an error")

    monkeypatch.setattr(cli.config, "load_recipe", load)
    monkeypatch.setattr(cli, "_SPARE_BYTES", 1 << 62 if short else 1)
    assert wake2vec("train", "demo") == code
    said = capsys.readouterr().err
    assert said.startswith("wake2vec: memory: this machine") == short
    assert ("Traceback" in said) == (not short)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("where", ["config.load_recipe", "rundir.new_run"])
def test_signal_outside_of_training_is_75_without_a_word(
    where: str, number: signal.Signals, recipe: Path, tmp_path: Path
) -> None:
    program = (
        f"import os, signal, sys; from wake2vec import cli, {where.split('.')[0]};"
        "signal.signal(signal.SIGINT, signal.default_int_handler);"  # a shell's background jobs ignore it
        f"{where} = lambda *_: [os.kill(os.getpid(), {number.value}) for _ in range(2)];"
        f"sys.argv = ['wake2vec', 'train', {str(recipe)!r}, '--runs', {str(tmp_path / 'runs')!r}]; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (75, "", "")
    assert not (tmp_path / "runs").exists()


def test_sentries_lists_verifies_converts_and_prunes(
    wake2vec: Command, recipe: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert wake2vec("train", recipe) == 0
    run = RunDir(tmp_path / "runs" / "tiny")
    capsys.readouterr()
    assert wake2vec("sentries", "tiny", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["step"] for entry in listed] == sorted((entry["step"] for entry in listed), reverse=True)
    assert {entry["state"] for entry in listed} == {"verified"}

    newest = run.sentry(12)
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    assert wake2vec("sentries", run.path) == 0
    assert "damaged: its content does not match its sha256" in capsys.readouterr().out

    step = listed[1]["step"]
    assert wake2vec("sentries", "tiny", "--to-pt", str(step)) == 0
    assert (run.path / f"sentry_step_{step:04d}.pt").exists()
    assert wake2vec("sentries", "tiny", "--to-pt", "999") == 1
    assert "no sentry of step 999; there are 12, " in capsys.readouterr().err
    assert wake2vec("sentries", "tiny", "--prune") == 0
    assert run.sentry(step).exists()
    assert wake2vec("sentries", "nowhere") == 1
    assert "it holds tiny; check the name" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_is_stopped_while_it_loads_leaves_nothing(
    inputs: Path, tmp_path: Path, in_child: Callable[..., int]
) -> None:
    folder = tmp_path / "run"
    assert in_child(killing.run, inputs, folder, {}, "in load", 0, signal.SIGTERM) == 75
    assert not folder.exists()
