"""What this run stands on: the installed versions against the stack's lock, the machine, the GPU and its driver.

`python -m wake2vec.environment` prints it in one block and exits 1 with the reason where a run must not start: the
image's entrypoint is that line and an `exec`. Nothing here imports torch: the guard must work, and fast, in an
environment where torch itself is what moved.

    wake2vec/locks/<stack>.txt     the golden list of a stack: `name==version ; marker`, and the hashes of its files
    <sys.prefix>/wake2vec-stack    only in the image: the stack's name; the environment is then exactly the lock
    <sys.prefix>/wake2vec-lock.txt only in the image's test stage: the stack's list plus the test tools
"""

import hashlib
import importlib.metadata
import importlib.util
import platform
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import eq, ge, lt, ne
from pathlib import Path
from typing import Any

from wake2vec.errors import WakeError
from wake2vec.machine import Gpus, check_gpu, machine, probe, size, switched_on

LOCKS = Path(__file__).parent / "locks"
NAMED_BY = ("torch", "transformers")  # what a stack's name says
REPORTED = (*NAMED_BY, "huggingface-hub", "tokenizers", "accelerate", "bitsandbytes", "peft", "safetensors", "numpy")


@dataclass(frozen=True)
class Drift:
    """What differs between the installed distributions and the lock; empty when nothing does."""

    moved: tuple[tuple[str, str, str], ...] = ()  # name, locked version, installed version
    missing: tuple[tuple[str, str], ...] = ()  # name, locked version
    extra: tuple[tuple[str, str], ...] = ()  # name, installed version

    def __bool__(self) -> bool:
        return bool(self.moved or self.missing or self.extra)

    def lines(self) -> list[str]:
        """Say it, one distribution a line."""
        return [
            *(f"{name}: the lock has {locked}, installed is {found}" for name, locked, found in self.moved),
            *(f"{name}: the lock has {locked}, not installed" for name, locked in self.missing),
            *(f"{name}: not in the lock, installed is {found}" for name, found in self.extra),
        ]

    def as_dict(self) -> dict[str, list[list[str]]]:
        """Return it for a run's record."""
        return {kind: [list(entry) for entry in getattr(self, kind)] for kind in ("moved", "missing", "extra")}


@dataclass(frozen=True)
class StackReport:
    """The installed stack, and the locked one it was compared with."""

    name: str | None  # None: torch and transformers match no locked stack
    locked: str  # the stack compared with: `name`, or the nearest one
    image: bool  # inside the image, where the environment is exactly the lock
    versions: dict[str, str]  # python and REPORTED, as installed
    cuda: str | None  # of the torch wheel
    lock_sha256: str  # of locks/<locked>.txt
    drift: Drift

    def as_dict(self) -> dict[str, Any]:
        """Return it for a run's record."""
        return {
            "name": self.name,
            "locked": self.locked,
            "versions": dict(self.versions),
            "cuda": self.cuda,
            "lock_sha256": self.lock_sha256,
            "drift": self.drift.as_dict(),
        }


def stack(prefix: Path | None = None, path: list[str] | None = None, locks: Path = LOCKS) -> StackReport:
    """Compare the installed distributions with the golden list of their stack."""
    prefix = Path(sys.prefix) if prefix is None else prefix
    found = installed(path)
    versions = {name: " and ".join(sorted(found.get(name, {"none"}))) for name in REPORTED}
    lists = {file.stem: read_lock(file) for file in sorted(locks.glob("*.txt"))}
    assert lists, f"no golden lists in {locks}"
    baked, manifest = prefix / "wake2vec-stack", prefix / "wake2vec-lock.txt"
    image = baked.is_file()
    locked = baked.read_text().strip() if image else _nearest(versions, lists)
    named = image or all(versions[name] == lists[locked].get(name) for name in NAMED_BY)
    return StackReport(
        name=locked if named else None,
        locked=locked,
        image=image,
        versions={"python": platform.python_version(), **versions},
        cuda=torch_cuda(),
        lock_sha256=hashlib.sha256((locks / f"{locked}.txt").read_bytes()).hexdigest(),
        drift=compare(read_lock(manifest) if manifest.is_file() else lists[locked], found, exact=image),
    )


def check_stack(report: StackReport | None = None, *, allow: bool | None = None) -> StackReport:
    """Refuse versions that moved; `allow` (default: WAKE2VEC_ALLOW_DRIFT) returns them for the run's record."""
    report = stack() if report is None else report
    allow = switched_on("WAKE2VEC_ALLOW_DRIFT") if allow is None else allow
    if not report.drift or allow:
        return report
    mend = (
        f"use the image wake2vec:{report.locked} as it is (docker compose pull, or build)"
        if report.image
        else "bring the environment back to uv.lock (uv sync)"
    )
    raise WakeError(
        f"versions: the environment is not the locked stack {report.locked}; {mend}, "
        "or set WAKE2VEC_ALLOW_DRIFT=1 to go on, on record\n  " + "\n  ".join(report.drift.lines())
    )


def check_same_stack(recorded: Mapping[str, str], report: StackReport, *, allow: bool | None = None) -> list[str]:
    """Refuse to continue a run under other versions than `recorded` (a report's `versions`).

    Python's own version may change. `allow` (default: WAKE2VEC_ALLOW_STACK_CHANGE) goes on and returns what changed.
    """
    allow = switched_on("WAKE2VEC_ALLOW_STACK_CHANGE") if allow is None else allow
    changed = [
        f"{name}: {recorded[name]} -> {report.versions[name]}"
        for name in REPORTED
        if name in recorded and recorded[name] != report.versions[name]
    ]
    if changed and not allow:
        raise WakeError(
            f"versions: this run was last trained on other ones than {report.locked} installs; continue it with its "
            "own image (WAKE2VEC_STACK), or pass --allow-stack-change (WAKE2VEC_ALLOW_STACK_CHANGE=1), on record\n  "
            + "\n  ".join(changed)
        )
    return changed


def normal_name(name: str) -> str:
    """Return a distribution's name as the lock spells it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed(path: list[str] | None = None) -> dict[str, set[str]]:
    """Return the versions of every distribution on `path`, this package left out.

    More than one version of a name means one was laid over another. A rebuilt wheel's build tag is part of the
    version here: two different torch 2.10.0 exist, and only that tag tells them apart.
    """
    found: dict[str, set[str]] = {}
    for distribution in importlib.metadata.distributions(path=sys.path if path is None else path):
        # not distribution.metadata: it would parse the whole description, for most of a start's time
        head = (distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or "").partition("\n\n")[0]
        fields = dict(re.findall(r"^(Name|Version): *(\S+)", head, re.MULTILINE))
        name = normal_name(fields.get("Name", "?"))
        build = re.search(r"^Build: *(\S+)", distribution.read_text("WHEEL") or "", re.MULTILINE)
        found.setdefault(name, set()).add(fields.get("Version", "?") + (f" (build {build[1]})" if build else ""))
    found.pop("wake2vec", None)
    return found


def read_lock(file: Path) -> dict[str, str]:
    """Return name -> version of a golden list, for this Python."""
    lines = [line for line in file.read_text().splitlines() if re.match(r"[A-Za-z0-9]", line)]
    parsed = [re.fullmatch(r"([^= ]+)==(\S+)(?: ; (.*?))?(?: \\)?", line) for line in lines]
    assert all(parsed), f"{file.name}: not an exported list"
    return {normal_name(match[1]): match[2] for match in parsed if match and _applies(match[3] or "")}


def compare(locked: Mapping[str, str], found: Mapping[str, Iterable[str]], *, exact: bool) -> Drift:
    """Return what differs; `exact` counts distributions that the lock does not have."""
    present = {name: " and ".join(sorted(versions)) for name, versions in found.items()}
    return Drift(
        moved=tuple((n, v, present[n]) for n, v in sorted(locked.items()) if n in present and present[n] != v),
        missing=tuple((n, v) for n, v in sorted(locked.items()) if n not in present),
        extra=tuple((n, v) for n, v in sorted(present.items()) if exact and n not in locked),
    )


def torch_cuda() -> str | None:
    """Return the CUDA release of the installed torch wheel, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    match = re.search(r"^cuda\b[^=]*= *'([\d.]+)'", (Path(spec.origin).parent / "version.py").read_text(), re.MULTILINE)
    return match[1] if match else None


def summary_block(report: StackReport | None = None, gpus: Gpus | None = None) -> str:
    """Return machine and stack in one block."""
    report = stack() if report is None else report
    gpus = probe() if gpus is None else gpus
    here, versions = machine(gpus), report.versions
    cards = [
        f"{card.name}{size(card.memory_bytes)}, compute {card.capability[0]}.{card.capability[1]}"
        for card in gpus.cards
    ]
    drift = f"{len(report.drift.lines())} distributions differ" if report.drift else "as locked"
    rows = {
        "machine": f"{here['cpu']}, {here['cores']} cores{size(here['memory_bytes'])}",
        "gpu": "; ".join(cards) or gpus.trouble or "none",
        "driver": f"{gpus.driver or 'none'} (torch's CUDA: {report.cuda or 'none'})",
        "stack": f"{report.name or 'none'}, {drift}, lock {report.lock_sha256[:12]}",
        "versions": ", ".join(f"{name} {versions[name]}" for name in ("python", *REPORTED)),
    }
    return "\n".join(f"{name:9}{value}" for name, value in rows.items())


def main() -> int:
    """Check and print everything; 1 where a run must not start."""
    try:
        report, gpus = stack(), probe()
        print(summary_block(report, gpus), file=sys.stderr)
        check_stack(report)
        for problem in check_gpu(report.cuda, required=switched_on("WAKE2VEC_REQUIRE_GPU"), gpus=gpus):
            print(f"warning: {problem}", file=sys.stderr)
    except WakeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _applies(marker: str) -> bool:
    """Evaluate an exported list's marker: conjunctions of comparisons with a literal."""
    here = {
        "implementation_name": sys.implementation.name,
        "platform_machine": platform.machine(),
        "platform_python_implementation": platform.python_implementation(),
        "python_full_version": list(sys.version_info[:3]),
        "sys_platform": sys.platform,
    }
    compared: dict[str, Callable[[Any, Any], bool]] = {"==": eq, "!=": ne, ">=": ge, "<": lt}
    for clause in filter(None, marker.split(" and ")):
        match = re.fullmatch(rf"({'|'.join(here)}) (==|!=|>=|<) '(.*)'", clause)
        assert match, f"unknown marker: {clause}"
        wanted = [int(part) for part in match[3].split(".")] if match[1] == "python_full_version" else match[3]
        if not compared[match[2]](here[match[1]], wanted):
            return False
    return True


def _nearest(versions: Mapping[str, str], lists: Mapping[str, Mapping[str, str]]) -> str:
    """Return the locked stack that shares most reported versions, those in its name first."""

    def shared(locked: str) -> list[int]:
        return [sum(versions[n] == lists[locked].get(n) for n in names) for names in (NAMED_BY, REPORTED)]

    return max(lists, key=shared)


if __name__ == "__main__":
    sys.exit(main())
