"""What `wake2vec sentries` does: list, prune, and carry rows over from and to the earlier scripts' files."""

import os
from pathlib import Path
from typing import Any

from wake2vec import identity, seed_format, sentry
from wake2vec.errors import WakeError
from wake2vec.rundir import RunDir, hold


def list_sentries(run: RunDir) -> list[dict[str, Any]]:
    """Return every sentry of a run, newest first, read back against its hash; damaged ones with the reason."""
    listed = []
    for path, header, reason in sentry.listing(run):
        state = f"damaged: {reason}" if reason else "verified"
        if header is not None:
            try:
                sentry.verify(path)
            except sentry.DamagedError as error:
                state = f"damaged: {error}"
        listed += _entry(path, header or {}, state)
    for path in sorted(run.sentries.glob("*.damaged")):
        listed += _entry(path, {}, "damaged: put aside")
    return listed


def _entry(path: Path, header: dict[str, Any], state: str) -> list[dict[str, Any]]:
    """Return a sentry's line, or none where the trainer has just removed it."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return []
    return [_line(path, header, state, status)]


def _line(path: Path, header: dict[str, Any], state: str, status: os.stat_result) -> dict[str, Any]:
    return {
        "file": path.name,
        "step": header.get("step"),
        "val_loss_nats": header.get("val_loss_nats"),
        "size_bytes": status.st_size,
        "saved_unix_s": status.st_mtime,
        "state": state,
    }


def prune(run: RunDir) -> str:
    """Remove what the recipe would not keep; the newest whole sentry always stays. Return what was done."""
    record = _record(run)
    messages: list[str] = []
    with hold(run):
        newest = sentry.newest(run, record["identity_sha256"], messages.append)
        if newest is None:
            raise WakeError("\n".join([*messages, f"run {run.name}: has no whole sentry; nothing is removed"]))
        section = record["identity"]["recipe"]["run"]
        gone = sentry.retire(
            run,
            keep_last=section["keep_last"],
            keep_every=section["keep_every"],
            best_step=newest.header["best_step"],
        )
    return "\n".join(
        [*messages, f"removed {len(gone)}: {', '.join(path.name for path in gone) or 'nothing to remove'}"]
    )


def export_pt(run: RunDir, step: int) -> str:
    """Write the sentry of a step as the seed's fp16 `.pt`, beside the sentries folder."""
    record = _record(run)
    source = run.sentry(step)
    if not source.exists():
        steps = [str(header["step"]) for _, header, _ in sentry.listing(run) if header]
        raise WakeError(f"run {run.name}: no sentry of step {step}; there are {', '.join(steps) or 'none'}")
    try:
        found = sentry.read(source)
    except sentry.DamagedError as error:
        raise WakeError(f"{source}: damaged: {error}; choose another step") from None
    target = run.path / f"sentry_step_{step:04d}.pt"
    fixed = record["identity"]
    seed_format.write_pt(
        target,
        {name.removeprefix("rows/"): rows for name, rows in found.tensors.items() if name.startswith("rows/")},
        step=step,
        epoch=step * fixed["recipe"]["train"]["batch_size"] / fixed["num_train_blocks"],
        first_new_id=fixed["base_vocab_size"],
    )
    return f"wrote {target}"


def import_pt(run: RunDir, path: Path) -> str:
    """Make a sentry of a seed's file, its rows put on the words that have those ids; return what was done.

    Rows it does not hold (of words in the padding gap, of the head) start fresh, as in the run's first sentry.
    """
    record = _record(run)
    payload = seed_format.read_pt(path)
    with hold(run):
        try:
            start = sentry.read(run.sentry(0))
        except sentry.DamagedError as error:
            raise WakeError(
                f"run {run.name}: its first sentry, which fills what {path.name} lacks, is no use ({error}); "
                "begin another run, stop it after its first steps, and import there"
            ) from None
        first = _check_import(run, record, path, payload, start)
        rows_ND = start.tensors["rows/input"]
        rows_ND[first:] = payload["embeddings"]
        fresh = [f"{first} input rows"] if first else []
        if "rows/head" in start.tensors:
            if "head_embeddings" in payload:
                start.tensors["rows/head"][first:] = payload["head_embeddings"]
            else:
                fresh.append("all head rows")
        header = {
            **start.header,
            "step": payload["step"],
            "optimizer_step": 0,
            "window": {"loss_sum": 0.0, "num_steps": 0},
            "best_step": None,
            "val_loss_nats": None,
        }
        sentry.write(run.sentry(payload["step"]), start.tensors, header)
        identity.note(run, record, {"imported": path.name, "from_step": payload["step"], "fresh": fresh})
    return (
        f"imported {path.name} as step {payload['step']}; fresh: {', '.join(fresh) or 'none'}; optimizer state: fresh"
    )


def _check_import(
    run: RunDir, record: dict[str, Any], path: Path, payload: dict[str, Any], start: sentry.Sentry
) -> int:
    """Return the index of the first row that the file holds."""
    fixed = record["identity"]
    first_id: int = payload["wake_start"]
    end_id = first_id + payload["num_wake"]
    base_end: int = fixed["base_vocab_size"]
    run_end = base_end + fixed["num_new_tokens"]
    problems = []
    if first_id < base_end or end_id != run_end:
        problems.append(
            f"its rows are of ids {first_id} to {end_id - 1}, the run's new words are {base_end} to {run_end - 1}: "
            "another lexicon or another base; start a run with the lexicon it was trained on"
        )
    sizes = (payload["embeddings"].shape[1], start.tensors["rows/input"].shape[1])
    if sizes[0] != sizes[1]:
        problems.append(f"its rows have {sizes[0]} values, the run's {sizes[1]}: another base; choose the right run")
    if "head_embeddings" in payload and "rows/head" not in start.tensors:
        problems.append("it holds head rows, the run's head is tied to its input: another base; choose the right run")
    if payload["step"] > fixed["recipe"]["train"]["max_steps"]:
        problems.append(
            f"it is of step {payload['step']}, the run ends at {fixed['recipe']['train']['max_steps']}; "
            "start a run with a higher train.max_steps"
        )
    newer = [header["step"] for _, header, _ in sentry.listing(run) if header and header["step"] >= payload["step"]]
    if newer:
        problems.append(f"it is of step {payload['step']}, the run is at {newer[0]} already; import into a new run")
    if problems:
        raise WakeError("\n".join(f"{path}: {problem}" for problem in problems))
    return first_id - base_end


def _record(run: RunDir) -> dict[str, Any]:
    record = identity.read_run(run)
    assert record is not None
    return record
