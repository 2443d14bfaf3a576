"""The machine, the GPUs a container was given, and whether torch's CUDA can run on them. Imports no torch.

Three mistakes are cheap here and expensive later: no GPU where one was asked for (the run would crawl along on the
CPU), a driver older than the wheels' CUDA, a card the wheels hold no code for.
"""

import os
import platform
import re
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wake2vec.errors import WakeError

CUDA_DRIVERS = {"12.6": 560, "12.8": 570, "12.9": 575, "13.0": 580}  # first driver branch of each CUDA release
LOWEST, HIGHEST = (7, 5), (12, 9)  # compute capabilities of the cu128 wheels: sm_75 (T4) .. sm_120 and its minors
QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,compute_cap,driver_version", "--format=csv,noheader,nounits")
MENDS = "README, 'Docker sees no GPU'"
MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Card:
    """One GPU."""

    name: str
    memory_bytes: int | None
    capability: tuple[int, int]


@dataclass(frozen=True)
class Gpus:
    """What the driver says: its cards, its version, or why it says nothing."""

    cards: tuple[Card, ...] = ()
    driver: str | None = None
    trouble: str | None = None


def probe(run: Callable[[tuple[str, ...]], str] | None = None) -> Gpus:
    """Ask nvidia-smi, which the container toolkit mounts together with the driver."""
    try:
        answer = (run or _ask)(QUERY)
    except FileNotFoundError:
        return Gpus()
    except subprocess.TimeoutExpired:
        return Gpus(driver=_kernel_driver(), trouble="nvidia-smi does not answer")
    except subprocess.CalledProcessError as error:
        said = " ".join(f"{error.stdout or ''} {error.stderr or ''}".split())
        return Gpus(driver=_kernel_driver(), trouble=f"nvidia-smi failed: {said or error.returncode}")
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines() if line.strip()]
    broken = [",".join(row) for row in rows if len(row) != 4 or not re.fullmatch(r"\d+\.\d+", row[2])]
    if broken:
        return Gpus(driver=_kernel_driver(), trouble=f"nvidia-smi answers {broken[0]!r}")
    return Gpus(tuple(_card(*row[:3]) for row in rows), rows[0][3] if rows else None)


def problems(gpus: Gpus, cuda: str | None) -> list[str]:
    """Return why torch's `cuda` release cannot run here: what is wrong, both values, and the mend."""
    if gpus.trouble:
        return [f"GPU: {gpus.trouble}; restart the container, then the host's driver ({MENDS})"]
    if not gpus.cards:
        return [f"GPU: none is visible; give the container one, or run a recipe that needs none ({MENDS})"]
    if cuda is None:
        return ["GPU: the installed torch is built without CUDA; install the locked one"]
    found = []
    wanted, driver = CUDA_DRIVERS.get(cuda), gpus.driver or "unknown"
    if wanted is None:
        found.append(f"driver: torch has CUDA {cuda}, known are {', '.join(CUDA_DRIVERS)}; install the locked torch")
    elif not re.match(r"\d+\.", driver) or int(driver.split(".")[0]) < wanted:
        found.append(f"driver: {driver} is installed, CUDA {cuda} needs {wanted} or newer; update the host's driver")
    for card in gpus.cards:
        if not LOWEST <= card.capability <= HIGHEST:
            here, low, high = (f"{major}.{minor}" for major, minor in (card.capability, LOWEST, HIGHEST))
            found.append(f"GPU: {card.name} is compute {here}, torch's wheel covers {low} to {high}; use another card")
    return found


def check_gpu(cuda: str | None, *, required: bool, gpus: Gpus | None = None) -> list[str]:
    """Refuse to start without a usable GPU where one is `required`; otherwise return what speaks against using it."""
    gpus = probe() if gpus is None else gpus
    found = problems(gpus, cuda)
    if required and found:
        raise WakeError("\n".join(found))
    return found if gpus.cards or gpus.trouble else []


def switched_on(variable: str) -> bool:
    """Read a yes/no variable of the environment; compose passes unset ones as empty."""
    value = os.environ.get(variable, "").strip().lower()
    if value in ("", "0", "no", "false"):
        return False
    if value in ("1", "yes", "true"):
        return True
    raise WakeError(f"{variable}: {value!r} is neither 1 nor 0; set it to 1, or leave it unset")


def machine(gpus: Gpus | None = None) -> dict[str, Any]:
    """Describe this machine for reports, without its name."""
    gpus = probe() if gpus is None else gpus
    models = re.findall(r"^model name\s*: (.*)$", _text("/proc/cpuinfo"), re.MULTILINE)
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": _cores(),
        "memory_bytes": _memory_bytes(),
        "gpus": [asdict(card) for card in gpus.cards],
        "driver": gpus.driver,
        "kernel": platform.release(),
    }


def size(size_bytes: int | None) -> str:
    """Write a size behind what has it; nothing where it is unknown."""
    return "" if size_bytes is None else f", {size_bytes / GIB:.1f} GiB"


def _ask(command: tuple[str, ...]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def _card(name: str, memory_mib: str, capability: str) -> Card:
    major, minor = capability.split(".")
    return Card(name, int(memory_mib) * MIB if memory_mib.isdigit() else None, (int(major), int(minor)))


def _kernel_driver() -> str | None:
    """Read the loaded driver's version where nvidia-smi cannot tell it."""
    match = re.search(r"Module.*?\s(\d+\.\d+[.\d]*)", _text("/proc/driver/nvidia/version"))
    return match[1] if match else None


def _text(file: str) -> str:
    return Path(file).read_text() if Path(file).is_file() else ""


def _cores() -> int:
    """Count the cores this process may use: the container's share, not the host's."""
    quota, period = (_text("/sys/fs/cgroup/cpu.max") or "max 100000").split()
    allowed = len(os.sched_getaffinity(0))
    return allowed if quota == "max" else max(1, min(allowed, round(int(quota) / int(period))))


def _memory_bytes() -> int:
    """Return the memory this process may use: the container's limit where it is lower than the machine's."""
    limit = _text("/sys/fs/cgroup/memory.max").strip()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(total, int(limit)) if limit.isdigit() else total
