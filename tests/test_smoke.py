"""`doctor --gpu`, on the CPU: what each check says when it passes, and that each can fail."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from wake2vec import cli, smoke
from wake2vec.doctor import Check
from wake2vec.errors import WakeError
from wake2vec.optimizer import Adafactor
from wake2vec.train import train

CPU = torch.device("cpu")


def plain(function: Callable[..., Any], *, fullgraph: bool) -> Callable[..., Any]:
    """Stand for torch.compile, which takes half a minute here."""
    assert fullgraph
    return function


def test_every_check_passes_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke.tempfile, "tempdir", str(tmp_path))
    cache = os.environ["WAKE2VEC_CACHE"]
    found = list(smoke.checks(CPU, plain))
    assert [(check.state, check.what) for check in found] == [
        ("ok", what) for what in ("matmul", "NF4", "training", "resume", "compile")
    ]
    assert "stopped after step 7, started again: rows and optimizer the same to the bit" in found[3].found
    assert list(tmp_path.glob("wake2vec*")) == []
    assert os.environ["WAKE2VEC_CACHE"] == cache
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_card_passes() -> None:
    assert [check for check in smoke.checks(torch.device("cuda")) if check.state == "fail"] == []


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workshop after its first run."""
    folder = tmp_path_factory.mktemp("workshop")
    smoke.check_training(folder)
    torch.use_deterministic_algorithms(False)
    return folder


@pytest.fixture(autouse=True)
def _any_algorithm() -> Any:
    yield
    torch.use_deterministic_algorithms(False)


def test_resume_that_differs_is_seen(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke, "RunDir", lambda path: RUN_DIR(path.with_name(path.name.replace("stopped", "other"))))

    def differing(recipe: Any, run: Any, console: Any) -> Any:
        return train(recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": 1})}), run, console)

    monkeypatch.setattr(smoke, "train", differing)
    with pytest.raises(WakeError, match=r"resume: .*rows/input.* apart from an uninterrupted run's"):
        smoke.check_resume(trained)


RUN_DIR = smoke.RunDir


def test_resume_without_a_run_to_compare_with_is_seen(tmp_path: Path) -> None:
    with pytest.raises(WakeError, match="no whole run to compare with"):
        smoke.check_resume(tmp_path)


def test_loss_that_does_not_fall_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Adafactor, "step", lambda *_: None)
    with pytest.raises(WakeError, match=r"the held-out loss goes from (\d+\.\d+) to \1, it should fall"):
        smoke.check_training(tmp_path)


def test_wrong_products_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = smoke._random
    monkeypatch.setattr(smoke, "_random", lambda size, seed: right(size, seed) * (1e30 if seed == 2 else 1))
    with pytest.raises(WakeError, match="float16 matmul: off by nan of the largest value"):
        smoke.check_matmul(CPU)


def test_slow_bfloat16_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke, "_time_matmul", lambda _, dtype: 0.003 if dtype == torch.bfloat16 else 0.001)
    state, found = smoke.check_matmul(torch.device("cuda"))
    assert state == "warn"
    assert "bfloat16 3 ms, float16 1 ms; bfloat16 is slow here, new runs are faster with model.compute_dtype" in found


def test_wrong_quantisation_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = smoke.dequantize_4bit
    monkeypatch.setattr(smoke, "dequantize_4bit", lambda *args: right(*args).roll(1))
    with pytest.raises(WakeError, match="NF4: its mean error on normal numbers is 1"):
        smoke.check_nf4(CPU)


def test_compiler_that_is_missing_or_wrong_is_seen() -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("\nFailed to find C compiler. Please specify via CC\nmore lines")

    check = smoke._try("compile", lambda: smoke.check_compile(CPU, broken), "install gcc")
    assert check == Check("fail", "compile", "Failed to find C compiler. Please specify via CC; install gcc")

    def wrong(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        return lambda *args: function(*args) * 1.001

    with pytest.raises(WakeError, match=r"compiled function: off by 0\.001"):
        smoke.check_compile(CPU, wrong)


def test_bug_of_ours_is_not_taken_for_the_cards() -> None:
    with pytest.raises(ZeroDivisionError):
        smoke._try("compile", lambda: ("ok", str(1 / 0)), "install gcc")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_no_card_is_one_clear_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["wake2vec", "doctor", "--gpu", "--json", "--runs", str(tmp_path)])
    assert cli._run() == 1
    out = capsys.readouterr()
    failed = [check for check in json.loads(out.out) if check["state"] == "fail" and check["what"] == "GPU"]
    assert [check["found"].split(";")[0] for check in failed] == ["torch sees none to try"]
    assert out.err.startswith("wake2vec: doctor: ")
    assert "GPU" in out.err
