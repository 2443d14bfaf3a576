"""Docker and Compose as a user types them, for the tests of the image."""

import json
import os
import shutil
import subprocess
import uuid
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TF4, TF5 = "torch2.9-tf4.57", "torch2.10-tf5.0"
STACKS = (TF4, TF5)


def docker(
    *arguments: str, check: bool = True, timeout_s: float = 600, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run docker and return what it printed, both streams in stdout."""
    done = subprocess.run(
        ["docker", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        **options,
    )
    if check and done.returncode:
        pytest.fail(f"docker {' '.join(arguments)} -> {done.returncode}\n{done.stdout}", pytrace=False)
    return done


def run_image(image: str, *command: str, options: tuple[str, ...] = (), check: bool = True, **more: Any) -> str:
    """Run a command in an image without its entrypoint, and return what it printed."""
    return docker("run", "--rm", *options, "--entrypoint", command[0], image, *command[1:], check=check, **more).stdout


class Clone:
    """A fresh clone of the repository with a Compose project of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.project = f"w2vtest-{uuid.uuid4().hex[:8]}"
        subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(folder)], check=True)
        self.environment = {
            **os.environ,
            "COMPOSE_PROJECT_NAME": self.project,
            "BASE_IMAGE": os.environ.get("BASE_IMAGE", "wake2vec-standin:latest"),
        }

    def shorten_demo(self, cache: str, *overrides: str) -> None:
        """Change recipe keys of the demo, as a user's own override file would; its base model lies in `cache`.

        One thread: the machine may be busy.
        """
        command = ["wake2vec", "train", "demo", *(word for pair in overrides for word in ("--set", pair))]
        demo = {"command": command, "environment": {"OMP_NUM_THREADS": "1"}}
        override = {"services": {"demo": demo}, "volumes": {"cache": {"name": cache, "external": True}}}
        (self.folder / "docker-compose.override.yml").write_text(json.dumps(override))

    def compose(
        self, *arguments: str, stack: str = TF4, check: bool = True, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run docker compose in the clone."""
        environment = {**self.environment, "WAKE2VEC_STACK": stack, **variables}
        return docker(
            "compose", "--ansi=never", "--progress=plain", *arguments, check=check, cwd=self.folder, env=environment
        )

    def container(self, service: str = "demo") -> str:
        """Return the id of a service's container, running or not."""
        return self.compose("ps", "--all", "--quiet", service).stdout.split()[-1]

    def state(self, service: str = "demo") -> dict[str, Any]:
        """Return the state of a service's container."""
        state: dict[str, Any] = json.loads(
            docker("inspect", "--format", "{{json .State}}", self.container(service)).stdout
        )
        return state

    def wait(self, service: str = "demo", timeout_s: float = 900) -> int:
        """Wait for the container's end and return its exit code."""
        return int(docker("wait", self.container(service), timeout_s=timeout_s).stdout)

    def read(self, file: str) -> bytes:
        """Return a file of the runs volume."""
        command = ["docker", "run", "--rm", "--volume", f"{self.project}_runs:/runs:ro", "--entrypoint", "cat"]
        return subprocess.run([*command, f"wake2vec:{TF4}", f"/runs/{file}"], check=True, capture_output=True).stdout

    def records(self, run: str = "demo") -> list[dict[str, Any]]:
        """Return the lines of a run's metrics; none before there is a file."""
        try:
            lines = self.read(f"{run}/metrics.jsonl").decode().splitlines()
        except subprocess.CalledProcessError:
            return []
        records = [json.loads(line) for line in lines if line.endswith("}")]
        return [{key: value for key, value in record.items() if key != "crc32"} for record in records]

    def close(self) -> None:
        """Remove containers, volumes and the clone."""
        self.compose("down", "--volumes", "--timeout", "1", check=False)
        shutil.rmtree(self.folder, ignore_errors=True)
