"""What is in the built images: the lock and nothing else, the tools Triton needs, no secret, no root."""

import json
import os
import re
import subprocess

import pytest
from image.driver import ROOT, STACKS, TF4, Clone, docker, run_image

LIST = """
import importlib.metadata, json
print(json.dumps(sorted([d.metadata["Name"].lower().replace("_", "-").replace(".", "-"), d.version]
                        for d in importlib.metadata.distributions() if d.metadata["Name"] != "wake2vec")))
"""
COMPILE = """
cd /tmp && cat >probe.c <<'C'
#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "probe", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_probe(void) { return PyModule_Create(&module); }
C
include=$(python -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
gcc -O3 -shared -fPIC -I"$include" probe.c -o probe.so && python -c 'import sys; sys.path.append("/tmp"); import probe'
mkdir -p "$TRITON_CACHE_DIR" "$TORCHINDUCTOR_CACHE_DIR" && touch "$TRITON_CACHE_DIR/x" && echo compiled
"""


@pytest.mark.parametrize("stack", STACKS)
def test_the_environment_is_exactly_the_lock(stack: str) -> None:
    installed = json.loads(run_image(f"wake2vec:{stack}", "python", "-c", LIST))
    text = (ROOT / f"wake2vec/locks/{stack}.txt").read_text()
    locked = re.findall(r"^([a-z0-9-]+)==(\S+)", text, re.MULTILINE)  # the image's Python is 3.12 or newer: all apply
    assert installed == sorted([name, version] for name, version in locked)


@pytest.mark.parametrize("stack", STACKS)
def test_the_labels_name_the_versions(stack: str) -> None:
    labels = json.loads(docker("inspect", "--format", "{{json .Config.Labels}}", f"wake2vec:{stack}").stdout)
    assert labels["wake2vec.torch"].startswith(stack.removeprefix("torch").split("-")[0])
    assert labels["org.opencontainers.image.version"].endswith(f"+{stack}")
    sha256 = subprocess.run(
        ["sha256sum", ROOT / f"wake2vec/locks/{stack}.txt"], capture_output=True, text=True, check=True
    )
    assert labels["wake2vec.lock-sha256"] == sha256.stdout.split()[0]


@pytest.mark.parametrize("stack", STACKS)
def test_what_triton_needs_is_there_for_any_user(stack: str) -> None:
    options = ("--read-only", "--tmpfs", "/tmp:exec", "--volume", "/cache/wake2vec", "--user", "4242:4242")
    assert "compiled" in run_image(f"wake2vec:{stack}", "sh", "-c", COMPILE, options=options)


def test_the_user_is_not_root_and_cannot_change_the_environment() -> None:
    script = "id -u; touch /opt/wake2vec/x; touch /usr/local/bin/x; true"
    said = run_image(f"wake2vec:{TF4}", "sh", "-c", script)
    assert "10001" in said.splitlines()  # the two streams come in any order
    assert said.count("Permission denied") == 2


@pytest.mark.parametrize("tool", ["uv", "pip", "pip3"])
def test_nothing_that_could_move_a_version_is_there(tool: str) -> None:
    assert run_image(f"wake2vec:{TF4}", "sh", "-c", f"command -v {tool} || echo none") == "none\n"


def test_no_cache_and_no_source_is_left_behind() -> None:
    script = "find /tmp /root /var/lib/apt/lists -type f -size +0 -not -path '/root/.*'"
    assert run_image(f"wake2vec:{TF4}", "sh", "-c", script, options=("--user", "0:0")) == ""


def test_a_change_of_code_keeps_the_environments_layers(clone: Clone) -> None:
    before = json.loads(docker("inspect", "--format", "{{json .RootFS.Layers}}", f"wake2vec:{TF4}").stdout)
    module = clone.folder / "wake2vec" / "__init__.py"
    module.write_text(module.read_text() + "# changed\n")
    tag = f"wake2vec-changed:{clone.project}"
    arguments = ("--build-arg", f"BASE_IMAGE={clone.environment['BASE_IMAGE']}", "--build-arg", f"STACK={TF4}")
    try:
        docker("build", "--target", "final", "--tag", tag, *arguments, ".", cwd=clone.folder, env=clone.environment)
        after = json.loads(docker("inspect", "--format", "{{json .RootFS.Layers}}", tag).stdout)
    finally:
        docker("image", "rm", tag, check=False)
    changed = [layer for layer in after if layer not in before]
    assert after[:-2] == before[:-2]
    assert len(changed) == 1


def test_no_layer_holds_what_must_not_leave_the_host() -> None:
    """`.ci/image build` sets this token in the variable, in .env and in data/ of the folder it builds from.

    The test image stands on the other one, so that its layers are the other's and more.
    """
    canary = os.environ["WAKE2VEC_CANARY"]
    script = (
        f'docker save wake2vec:{TF4}-test | grep --text --count --fixed-strings "{canary}"; exit "${{PIPESTATUS[0]}}"'
    )
    found = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "0"
    for image in (f"wake2vec:{TF4}", f"wake2vec:{TF4}-test"):
        assert canary not in docker("history", "--no-trunc", image).stdout + docker("inspect", image).stdout
