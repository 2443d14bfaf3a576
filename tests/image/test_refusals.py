"""What must not start does not, says why in one message, and loads nothing before that."""

import json
import subprocess
from pathlib import Path

import pytest
from image.driver import TF4, Clone, docker

OTHER_HUB = "0.35.3"
DRIFTED = "wake2vec-drifted:latest"


def start(
    *command: str, options: tuple[str, ...] = (), image: str = f"wake2vec:{TF4}"
) -> subprocess.CompletedProcess[str]:
    """Start the image as it is, without a network: nothing can be downloaded."""
    return docker("run", "--rm", "--network", "none", *options, image, *command, check=False)


@pytest.fixture(scope="module")
def drifted(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Derive an image with another huggingface-hub: there is no pip in ours, so the wheel is unpacked by hand."""
    folder = tmp_path_factory.mktemp("drifted")
    subprocess.run(
        ["pip", "download", "--quiet", "--no-deps", "--dest", str(folder), f"huggingface-hub=={OTHER_HUB}"], check=True
    )
    (folder / "Dockerfile").write_text(
        f"FROM wake2vec:{TF4}\nUSER 0:0\nCOPY *.whl /tmp/wheels/\n"
        "RUN cd /opt/wake2vec/lib/python3*/site-packages && rm -r huggingface_hub* \\\n"
        " && python -m zipfile -e /tmp/wheels/*.whl .\nUSER 10001:10001\n"
    )
    docker("build", "--tag", DRIFTED, str(folder))
    return DRIFTED


def test_another_huggingface_hub_is_refused(drifted: str) -> None:
    done = start("wake2vec", "train", "demo", image=drifted)
    assert done.returncode == 1
    assert f"huggingface-hub: the lock has 0.36.0, installed is {OTHER_HUB}" in done.stdout
    assert "WAKE2VEC_ALLOW_DRIFT=1" in done.stdout
    assert "Traceback" not in done.stdout


def test_drift_that_was_allowed_is_on_record(drifted: str, cache: str) -> None:
    options = ("--env", "WAKE2VEC_ALLOW_DRIFT=1", "--env", "OMP_NUM_THREADS=1", "--volume", f"{cache}:/cache/wake2vec")
    script = "wake2vec train demo --set train.max_steps=2 --set train.warmup_steps=1 >&2 && cat /runs/demo/run.json"
    done = start("sh", "-c", script, image=drifted, options=options)
    record = json.loads(done.stdout[done.stdout.index("\n{") :])
    assert record["stack"]["drift"]["moved"] == [["huggingface-hub", "0.36.0", OTHER_HUB]]


def test_no_gpu_fails_loudly_in_docker_itself(clone: Clone) -> None:
    done = clone.compose("up", "train-qwen14b", check=False)
    assert done.returncode != 0
    assert "could not select device driver" in done.stdout


def test_no_gpu_fails_loudly_in_the_image() -> None:
    done = start("wake2vec", "train", "qwen14b", options=("--env", "WAKE2VEC_REQUIRE_GPU=1"))
    assert done.returncode == 1
    assert "error: GPU: none is visible" in done.stdout


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Tesla T4, 15360, 7.5, 550.54.15", "driver: 550.54.15 is installed, CUDA 12.8 needs 570 or newer"),
        ("Tesla V100, 16384, 7.0, 570.86.15", "GPU: Tesla V100 is compute 7.0, torch's wheel covers 7.5 to 12.9"),
    ],
)
def test_an_unusable_driver_or_card_is_refused(answer: str, said: str, tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho '{answer}'\n")
    smi.chmod(0o755)
    options = ("--env", "WAKE2VEC_REQUIRE_GPU=1", "--volume", f"{smi}:/usr/bin/nvidia-smi:ro")
    done = start("wake2vec", "train", "qwen14b", options=options)
    assert done.returncode == 1
    assert said in done.stdout


@pytest.mark.parametrize("missing", ["FW_TEXT.txt", "wake_lexicon.txt"])
def test_a_missing_text_or_lexicon_stops_before_any_download(missing: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    for name in {"FW_TEXT.txt", "wake_lexicon.txt"} - {missing}:
        (tmp_path / name).write_text("riverrun\n")
    done = start("wake2vec", "train", "qwen14b", options=("--volume", f"{tmp_path}:/data:ro"))
    assert done.returncode == 1
    assert f"data/{missing}" in done.stdout
    assert "Traceback" not in done.stdout
    assert "huggingface" not in done.stdout.partition("versions ")[2].partition("\n")[2]  # nothing was asked of the hub


def test_a_folder_that_cannot_be_written_is_named_with_its_owner(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    done = start("wake2vec", "train", "demo", options=("--volume", f"{tmp_path}:/runs"))
    assert done.returncode == 1
    assert "/runs: user 10001:10001 cannot write there, it belongs to 0:0" in done.stdout
    assert "WAKE2VEC_UID" in done.stdout


def test_a_token_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("hf_secret")
    token.chmod(0o600)
    options = ("--volume", f"{token}:/run/secrets/hf_token:ro", "--env", "HF_TOKEN_PATH=/run/secrets/hf_token")
    done = start("wake2vec", "train", "demo", options=options)
    assert done.returncode == 1
    assert "/run/secrets/hf_token: user 10001 cannot read it" in done.stdout
