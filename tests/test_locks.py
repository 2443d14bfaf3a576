"""The golden lists: what uv.lock installs per stack, and what the Dockerfile says of it. `.ci/lock` writes both."""

import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from wake2vec.environment import LOCKS, NAMED_BY, read_lock

ROOT = Path(__file__).parents[1]
GROUPS = {"torch2.9-tf4.57": "tf4", "torch2.10-tf5.0": "tf5"}


def test_there_is_one_list_for_each_stack() -> None:
    assert {file.stem for file in LOCKS.glob("*.txt")} == set(GROUPS)


@pytest.mark.parametrize("stack", GROUPS)
def test_a_list_holds_what_the_stacks_name_says(stack: str) -> None:
    locked = read_lock(LOCKS / f"{stack}.txt")
    short = [locked[name].split(".")[:2] for name in NAMED_BY]
    assert stack == "torch{}-tf{}".format(*(".".join(parts) for parts in short))


@pytest.mark.parametrize("stack", GROUPS)
def test_every_distribution_has_hashes_and_no_address(stack: str) -> None:
    text = (LOCKS / f"{stack}.txt").read_text()
    entries = re.split(r"\n(?=\S)", text)
    assert all("--hash=sha256:" in entry for entry in entries)
    assert "://" not in text


@pytest.mark.skipif(shutil.which("uv") is None, reason="needs uv")
@pytest.mark.parametrize("stack", GROUPS)
def test_a_list_is_what_the_lock_installs(stack: str, tmp_path: Path) -> None:
    fresh = tmp_path / "list.txt"
    script = ["bash", "-c", '. "$1" && export_list "$2" "$3"', "-", str(ROOT / ".ci/lock"), str(fresh), stack]
    subprocess.run(script, cwd=ROOT, check=True, timeout=120)
    assert fresh.read_text() == (LOCKS / f"{stack}.txt").read_text(), "run .ci/lock and look at what moved"


@pytest.mark.parametrize("stack", GROUPS)
def test_the_images_labels_say_the_same(stack: str) -> None:
    part = re.search(
        rf"^FROM os AS stack-{re.escape(stack)}\n(.*?)\n\n", (ROOT / "Dockerfile").read_text(), re.M | re.S
    )
    assert part is not None
    locked = read_lock(LOCKS / f"{stack}.txt")
    said = dict(re.findall(r'wake2vec\.([a-z0-9-]+)="([^"]*)"', part[1]))
    sha256 = hashlib.sha256((LOCKS / f"{stack}.txt").read_bytes()).hexdigest()
    assert said == {name: locked[name] for name in (*NAMED_BY, "huggingface-hub")} | {"lock-sha256": sha256}
    assert f"WAKE2VEC_GROUP={GROUPS[stack]}\n" in part[1]
