"""What docker-compose.yml says, as Compose itself resolves it; nothing is started."""

import json
import os
import re
import subprocess
from typing import Any

import pytest
from image.driver import ROOT, STACKS, TF4, TF5

RECIPES = ("qwen14b", "llama1b", "llama3b", "llama8b", "mistral7b", "tinyllama", "phi35", "gemma9b")
TRAIN = {f"train-{recipe}" for recipe in RECIPES}
SERVICES = TRAIN | {"fetch", "demo", "test", "doctor", "report", "shell"}
WITH_GPU = TRAIN | {"doctor"}


def resolve(**variables: str) -> dict[str, Any]:
    inherited = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    command = ["docker", "compose", "config", "--format", "json"]
    done = subprocess.run(command, cwd=ROOT, env={**inherited, **variables}, check=True, capture_output=True, text=True)
    services: dict[str, Any] = json.loads(done.stdout)["services"]
    return services


def defaults(text: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, default in re.findall(r"\$\{(\w+):-((?:[^{}]|\{[^}]*\})*)\}", text):
        found.setdefault(name, set()).add(default)
    return found


def test_every_service_is_there() -> None:
    assert set(resolve()) == SERVICES


def test_gpus_are_reserved_where_they_are_needed_and_nowhere_else() -> None:
    wanted = [{"capabilities": ["gpu"], "driver": "nvidia", "count": 1}]
    for name, service in resolve().items():
        devices = service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices")
        assert devices == (wanted if name in WITH_GPU else None), name
        assert service["environment"]["WAKE2VEC_REQUIRE_GPU"] == ("1" if name in TRAIN else "0"), name


def test_every_service_is_locked_down() -> None:
    for name, service in resolve().items():
        assert service["read_only"] is True, name
        assert service["user"] == "10001:10001", name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["stop_grace_period"] == "2m0s", name
        assert service.get("ulimits") == ({"memlock": -1} if name in WITH_GPU else None), name
        assert "init" not in service, name
        assert all(volume.get("read_only") for volume in service.get("volumes", []) if volume["target"] == "/data"), (
            name
        )


def test_a_crash_is_retried_only_where_something_trains() -> None:
    retried = {name for name, service in resolve().items() if service.get("restart") == "on-failure:3"}
    assert retried == TRAIN
    assert {service.get("restart") for service in resolve(WAKE2VEC_RESTART="no").values()} == {None, "no"}


def test_each_recipe_is_trained_by_its_service() -> None:
    services = resolve()
    assert {name: services[name]["command"] for name in TRAIN} == {
        f"train-{recipe}": ["wake2vec", "train", recipe] for recipe in RECIPES
    }


def test_the_stack_switches_tag_and_build_together() -> None:
    on_tf5 = {"train-llama3b", "train-llama8b"}
    for name, service in resolve().items():
        stack = TF5 if name in on_tf5 else TF4
        assert service["image"].removesuffix("-test") == f"wake2vec:{stack}", name
        assert service["build"]["args"]["STACK"] == stack, name
    for stack in STACKS:
        for name, service in resolve(WAKE2VEC_STACK=stack).items():
            assert service["image"].removesuffix("-test") == f"wake2vec:{stack}", name
            assert service["build"]["args"]["STACK"] == stack, name


def test_a_published_image_takes_the_place_of_a_built_one() -> None:
    image = "registry.example/wake2vec@sha256:" + "0" * 64
    assert {service["image"] for name, service in resolve(WAKE2VEC_IMAGE=image).items() if name != "test"} == {image}


@pytest.mark.parametrize(
    "name",
    ["WAKE2VEC_RUN", "WAKE2VEC_ALLOW_DRIFT", "WAKE2VEC_ALLOW_STACK_CHANGE", "WAKE2VEC_GPU_MEMORY", "HF_HUB_OFFLINE"],
)
def test_a_variable_reaches_the_container(name: str) -> None:
    assert {service["environment"][name] for service in resolve(**{name: "x1"}).values()} == {"x1"}


def test_the_example_file_lists_every_variable_with_its_default_commented_out() -> None:
    wanted = defaults((ROOT / "docker-compose.yml").read_text())
    lines = (ROOT / ".env.example").read_text().splitlines()
    listed = dict(line[1:].split("=", 1) for line in lines if re.match(r"#\w+=", line))
    assert all(line.startswith("#") or not line for line in lines)
    assert set(listed) == set(wanted)
    assert [name for name in listed if listed[name] not in wanted[name] and name != "WAKE2VEC_IMAGE"] == []
