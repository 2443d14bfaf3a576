"""`wake2vec doctor`: whether a run can start here, one line a check, each with the mend."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from wake2vec import hub
from wake2vec.environment import StackReport, stack
from wake2vec.errors import WakeError
from wake2vec.machine import Gpus, machine, probe, problems, size, switched_on

_LEAST_FREE_BYTES = 20 * 2**30
_DATA = (Path("data/FW_TEXT.txt"), Path("data/wake_lexicon.txt"))


class Check(NamedTuple):
    """One line: `fail` keeps a run from starting, `warn` may."""

    state: Literal["ok", "warn", "fail"]
    what: str
    found: str


def checks(runs: Path, report: StackReport | None = None, gpus: Gpus | None = None) -> Iterator[Check]:
    """Yield every check; `report` and `gpus` stand for the real ones in tests."""
    report = stack() if report is None else report
    gpus = probe() if gpus is None else gpus
    yield _stack(report)
    yield from _gpu(report, gpus)
    here = machine(gpus)
    yield Check("ok", "machine", f"{here['cpu']}, {here['cores']} cores{size(here['memory_bytes'])}")
    yield _folder("runs", runs, "set WAKE2VEC_RUNS or --runs")
    yield _folder("model cache", hub.cache_folder(), "set HF_HOME")
    for path in _DATA:
        if path.is_file():
            yield Check("ok", "data", f"{path}, {path.stat().st_size / 2**20:.1f} MiB")
        else:
            yield Check("warn", "data", f"{path} is not there; put it there for the recipes that read it")
    yield _token()


def _stack(report: StackReport) -> Check:
    found = f"{report.name or 'no locked stack'}, lock {report.lock_sha256[:12]}"
    if not report.drift:
        return Check("ok", "versions", f"{found}, as locked")
    allowed = switched_on("WAKE2VEC_ALLOW_DRIFT")
    moved = "; ".join(report.drift.lines())
    return Check("warn" if allowed else "fail", "versions", f"{found}; {moved}; bring the environment back to uv.lock")


def _gpu(report: StackReport, gpus: Gpus) -> Iterator[Check]:
    found = problems(gpus, report.cuda)
    for problem in found:
        yield Check("fail" if switched_on("WAKE2VEC_REQUIRE_GPU") or gpus.cards else "warn", "GPU", problem)
    if not found:
        for card in gpus.cards:
            capability = ".".join(map(str, card.capability))
            yield Check(
                "ok", "GPU", f"{card.name}{size(card.memory_bytes)}, compute {capability}, driver {gpus.driver}"
            )


def _folder(what: str, folder: Path, mend: str) -> Check:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK):
        return Check("fail", what, f"{there} cannot be written by user {os.getuid()}; chown it, or {mend}")
    free = shutil.disk_usage(there).free
    if free < _LEAST_FREE_BYTES:
        return Check(
            "warn", what, f"{folder}: {free / 2**30:.1f} GiB free, a 14B run needs about 50; free space, or {mend}"
        )
    return Check("ok", what, f"{folder}: {free / 2**30:.1f} GiB free")


def _token() -> Check:
    from huggingface_hub import get_token

    if get_token():
        return Check("ok", "token", "there")
    return Check("warn", "token", "no Hugging Face token; gated models (Llama, Gemma) need HF_TOKEN")


def raise_if_failed(found: list[Check]) -> None:
    """Raise a WakeError that counts the failures, if there are any."""
    failed = [check.what for check in found if check.state == "fail"]
    if failed:
        raise WakeError(f"doctor: {', '.join(failed)} failed; mend what is said above")
