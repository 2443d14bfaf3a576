"""The architecture: imports point down, in no cycle, and the command line starts light."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import wake2vec

PACKAGE = Path(wake2vec.__file__).parent

# DESIGN section 5; a new file gets its place here first.
LAYERS = {
    6: {"cli", "console"},
    5: {"doctor", "outlook", "smoke", "report", "plots", "summary", "export", "card", "sample", "trackers"},
    4: {"train", "resume"},
    3: {
        *("model", "plan", "evaluate", "sentry", "sentry_writer", "metrics", "environment", "base", "seed_format"),
        *("machine", "demo", "identity", "keeping", "hub", "preflight", "kernels", "planner", "quantized"),
        *("reference", "blocks"),
    },
    2: {
        *("tokens", "lexicon", "rows", "overlay", "data", "loss", "optimizer", "schedule", "checkpointing"),
        *("analysis", "distinct", "shards", "packed"),
    },
    1: {"config", "rundir", "scribe", "signals", "tables", "record"},
    0: {"errors"},
}
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names}
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
KNOWS_CONFIG = {"cli", "train", "model", "plan", "report", "resume", "identity", "preflight", "outlook", "smoke"}


def imports_of(source: str) -> set[str]:
    """Return the package's modules that a source imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("wake2vec.") and "__" not in name}
    return found


GRAPH = {name: imports_of((PACKAGE / f"{name}.py").read_text("utf-8")) for name in MODULES}


def test_imports_are_found() -> None:
    source = "import wake2vec.a\nfrom wake2vec import b, __version__\ndef f():\n    from wake2vec.c import d\nimport os"
    assert imports_of(source) == {"a", "b", "c"}
    assert GRAPH["train"] >= {"resume", "rundir", "errors"}


def test_every_module_has_its_place() -> None:
    assert set(MODULES) == set(LAYER_OF)
    assert sum(len(names) for names in LAYERS.values()) == len(LAYER_OF)


@pytest.mark.parametrize("name", MODULES)
def test_imports_never_point_up(name: str) -> None:
    upwards = {other for other in GRAPH[name] if LAYER_OF[other] > LAYER_OF[name]}
    assert not upwards
    assert not (name == "resume" and "train" in GRAPH[name])


def test_imports_have_no_cycle() -> None:
    assert set(TopologicalSorter(GRAPH).static_order()) >= set(MODULES)  # raises CycleError


def test_config_objects_stop_at_the_edge() -> None:
    assert {name for name in MODULES if "config" in GRAPH[name]} <= KNOWS_CONFIG


def test_command_line_starts_without_the_heavy_libraries() -> None:
    program = "import sys, wake2vec.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "wake2vec.config" in loaded
    assert not loaded & {"torch", "transformers", "bitsandbytes", "numpy", "huggingface_hub", "safetensors"}
