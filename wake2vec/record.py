"""run.json: what a run is, and the hash that its files carry."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from wake2vec.errors import WakeError
from wake2vec.rundir import RunDir, read_json

FORMAT = 1


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
    return record
