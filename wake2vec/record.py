"""run.json: what a run is, and the hash that its files carry."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from wake2vec.errors import WakeError
from wake2vec.rundir import RunDir, read_json, write_json

FORMAT = 1


class _Base(BaseModel):
    commit: str


class _Identity(BaseModel):
    recipe: dict[str, Any]
    base: _Base
    base_vocab_size: int
    num_new_tokens: int
    num_train_blocks: int


class _Stack(BaseModel):
    versions: dict[str, str]
    drift: dict[str, Any]


class _Record(BaseModel):
    """What is read again of run.json."""

    identity: _Identity
    stack: _Stack
    history: list[dict[str, Any]]


def digest(identity: Mapping[str, Any]) -> str:
    """Return the hash that every sentry of a run carries."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def read_run(run: RunDir) -> dict[str, Any] | None:
    """Return run.json, or None where the run does not exist yet.

    Raises:
        WakeError: it is damaged or of another format.
    """
    if not run.identity.exists():
        return None
    record = read_json(run.identity)
    if not isinstance(record, dict) or record.get("format") != FORMAT or not isinstance(record.get("identity"), dict):
        raise WakeError(f"{run.identity}: not of format {FORMAT}; put back a copy of it, or use another --run")
    if record.get("identity_sha256") != digest(record["identity"]):
        raise WakeError(f"{run.identity}: its identity does not match its sha256; put back a copy of it")
    if record.pop("sha256", None) not in (None, digest(record)):
        raise WakeError(f"{run.identity}: its content does not match its sha256; put back a copy of it")
    try:
        _Record.model_validate(record)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise WakeError(f"{run.identity}: {where}: {problem['msg']}; put back a copy of it") from None
    return record


def write_run(run: RunDir, record: Mapping[str, Any]) -> None:
    """Write run.json with a hash of its content."""
    content = {key: value for key, value in record.items() if key != "sha256"}
    write_json(run.identity, {**content, "sha256": digest(content)})
