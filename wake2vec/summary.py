"""A run in numbers, from its folder alone: what `summary.json`, the plots and the page are made of.

Shapes: N new words, V base tokens, D hidden size, n sampled rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from wake2vec import analysis, sentry
from wake2vec.analysis import Cosines
from wake2vec.errors import WakeError
from wake2vec.metrics import Record, read_records
from wake2vec.record import read_run
from wake2vec.rundir import RunDir
from wake2vec.tables import StoredTable, decode_json

FORMAT = 1
ISOTROPY_ROWS = 5000
COSINE_ROWS = 2000
DRIFT_ROWS = 2000
"""Rows that drift over time is measured on, in every sentry."""
_MOST_MOVED = 20
_SHOWN_NEIGHBOURS = 20
_LOSS_FILES = {"before": "word_losses_start", "after": "word_losses"}


@dataclass(frozen=True)
class Geometry:
    """One table's measurements; `numbers` is what goes into summary.json, the rest is drawn.

    Attributes:
        drift: cosine_N and l2_N since the start, or None where the first sentry is not there any more.
    """

    base_norms: Tensor
    new_norms: Tensor
    cosines: dict[str, Cosines]
    variances: dict[str, Tensor]
    drift: tuple[Tensor, Tensor] | None
    numbers: dict[str, Any]


@dataclass(frozen=True)
class Words:
    """What the explorer shows of every new word; lists are in the words' order, None where it is not known."""

    words: list[str]
    counts: dict[str, list[int]]
    losses: dict[str, list[float | None]]
    losses_step: int | None
    neighbours: dict[str, Any] | None


@dataclass(frozen=True)
class Analysis:
    """All that takes time: geometry of each table, drift along the run, the words."""

    step: int
    checkpoint: str
    geometry: dict[str, Geometry]
    drift_over_time: dict[str, list[dict[str, Any]]]
    words: Words
    machine: dict[str, Any]


def analyse(run: RunDir) -> Analysis:
    """Measure the newest whole sentry of a run.

    Raises:
        WakeError: the run has no whole sentry, or `train` has not stored yet what this needs.
    """
    record = read_run(run)
    assert record is not None
    base = _read_reference(run, record, "base")
    if base is None:
        raise WakeError(
            f"run {run.name}: reference/base.safetensors is not there or damaged; continue the run with "
            "`wake2vec train`, which writes it at its start"
        )
    sentries = dict(sentry.whole(run, record["identity_sha256"]))
    if not sentries:
        raise WakeError(f"run {run.name}: no whole sentry in {run.sentries}; continue the run with `wake2vec train`")
    newest = max(sentries)
    now = sentry.row_tables(sentries[newest])
    start = sentry.row_tables(sentries[0]) if 0 in sentries and newest > 0 else {}
    dim, num_new = now["input"].shape[1], now["input"].shape[0]
    even = min(ISOTROPY_ROWS, num_new, len(base.tensors["input/sample"]))
    baseline = analysis.isotropy_baseline(even, dim, seed=0)
    words = decode_json(base.tensors["words"])
    geometry = {
        name: _geometry(name, base, now[name], start.get(name), baseline, words) for name in base.header["tables"]
    }
    return Analysis(
        newest,
        f"sentries/{sentries[newest].name}",
        geometry,
        _drift_over_time(run, record, sentries),
        _words(run, record, base, words),
        base.header["machine"],
    )


def _read_reference(run: RunDir, record: Mapping[str, Any], name: str) -> sentry.Sentry | None:
    try:
        found = sentry.read(run.reference / f"{name}.safetensors")
    except sentry.DamagedError:
        return None
    return found if found.header.get("identity") == record["identity_sha256"] else None


def _geometry(
    name: str,
    base: sentry.Sentry,
    now: StoredTable,
    start: StoredTable | None,
    baseline: dict[str, Any],
    words: list[str],
) -> Geometry:
    num_new, dim = now.shape
    base_norms, sample = base.tensors[f"{name}/norms"], base.tensors[f"{name}/sample"].float()
    new_norms = analysis.row_norms(now)
    even = min(ISOTROPY_ROWS, num_new, len(sample))
    new_rows = analysis.take_rows(now, analysis.sample_ids(num_new, even, 0, "new rows"))
    base_rows = sample[analysis.sample_ids(len(sample), even, 0, "even")]
    isotropy = {"base": analysis.isotropy(base_rows), "new": analysis.isotropy(new_rows)}
    base_n, new_n = _few(sample), _few(new_rows)
    cosines = {
        "base_base": analysis.cosines_within(base_n, len(base_norms)),
        "new_new": analysis.cosines_within(new_n, num_new),
        "base_new": analysis.cosines_between(base_n, new_n, (len(base_norms), num_new)),
    }
    pca_rows: int = base.header["pca_rows"]
    variances = {
        "base": base.tensors[f"{name}/variances"].double(),
        "new": analysis.principal_variances(now, analysis.sample_ids(num_new, pca_rows, 0, "new variances")),
    }
    drift = analysis.drift(start, now) if start is not None else None
    numbers = {
        "norms": {
            "base": analysis.describe(base_norms),
            "new": analysis.describe(new_norms),
            **analysis.compare_norms(base_norms, new_norms),
        },
        "isotropy": {**isotropy, "random": baseline, "rows": even},
        "pairwise_cosine": {
            **{pair: found.as_json() for pair, found in cosines.items()},
            "kolmogorov_smirnov": analysis.kolmogorov_smirnov(base_n, new_n),
            "rows": [len(base_n), len(new_n)],
        },
        "intrinsic_dim": {kind: analysis.dimension(found, pca_rows) for kind, found in variances.items()},
        "drift": None if drift is None else _drift_numbers(*drift, words),
    }
    assert dim == sample.shape[1]
    return Geometry(base_norms, new_norms, cosines, variances, drift, numbers)


def _few(rows_nD: Tensor) -> Tensor:
    return rows_nD[analysis.sample_ids(len(rows_nD), COSINE_ROWS, 0, "pairs")]


def _drift_numbers(cosine_N: Tensor, l2_N: Tensor, words: list[str]) -> dict[str, Any]:
    order = l2_N.argsort(descending=True, stable=True).tolist()

    def named(ids: list[int]) -> list[dict[str, Any]]:
        return [{"word": words[i], "cosine": float(cosine_N[i]), "l2": float(l2_N[i])} for i in ids]

    return {
        "cosine": analysis.describe(cosine_N),
        "l2": analysis.describe(l2_N),
        "most_moved": named(order[:_MOST_MOVED]),
        "least_moved": named(order[::-1][:_MOST_MOVED]),
    }


def _drift_over_time(
    run: RunDir, record: Mapping[str, Any], sentries: Mapping[int, Path]
) -> dict[str, list[dict[str, Any]]]:
    """Return mean drift since the start, with 95 % intervals, in every sentry and snapshot kept."""
    if 0 not in sentries:
        return {}
    files = {**_snapshots(run, record), **sentries}
    first = sentry.row_tables(sentries[0])
    ids = analysis.sample_ids(first["input"].shape[0], DRIFT_ROWS, 0, "drift")
    begin = {name: table.take(ids) for name, table in first.items()}
    curves: dict[str, list[dict[str, Any]]] = {name: [] for name in first}
    for step in sorted(files):
        tables = sentry.row_tables(files[step])
        for name, table in first.items():
            cosine, l2 = analysis.drift(begin[name], tables[name].take(ids).float())
            curves[name].append(
                {
                    "step": step,
                    "cosine": float(cosine.mean()),
                    "cosine_ci95": analysis.mean_interval(cosine, table.shape[0]),
                    "l2": float(l2.mean()),
                    "l2_ci95": analysis.mean_interval(l2, table.shape[0]),
                }
            )
    return curves


def _snapshots(run: RunDir, record: Mapping[str, Any]) -> dict[int, Path]:
    found = {}
    for path in sorted(run.snapshots.glob("rows_step_*.safetensors")):
        try:
            sentry.verify(path)
            header = sentry.read_header(path)
        except sentry.DamagedError:
            continue
        if header.get("identity") == record["identity_sha256"]:
            found[header["step"]] = path
    return found


def _words(run: RunDir, record: Mapping[str, Any], base: sentry.Sentry, words: list[str]) -> Words:
    losses: dict[str, list[float | None]] = {}
    losses_step = None
    for when, name in _LOSS_FILES.items():
        found = _read_reference(run, record, name)
        if found is not None:
            losses_step = found.step
            pairs = zip(found.tensors["nats"].tolist(), found.tensors["counts"].tolist(), strict=True)
            losses[when] = [nats / count if count else None for nats, count in pairs]
    counts = {part: base.tensors[f"{part}_counts"].tolist() for part in ("train", "val")}
    near = _read_reference(run, record, "neighbours")
    neighbours = None
    if near is not None:
        neighbours = {
            "step": near.step,
            "base_tokens": decode_json(near.tensors["base_tokens"]),
            **{key: near.tensors[key].tolist() for key in ("base_ids", "base_cosines", "new_ids", "new_cosines")},
        }
    return Words(words, counts, losses, losses_step, neighbours)


def summarise(run: RunDir, found: Analysis) -> dict[str, Any]:
    """Return the content of summary.json; the keys of the input table stand at the top, as people parse them."""
    record = read_run(run)
    assert record is not None
    fixed = record["identity"]
    recipe = fixed["recipe"]
    tables = {name: geometry.numbers for name, geometry in found.geometry.items()}
    return {
        "format": FORMAT,
        "run": run.name,
        "model": fixed["base"]["name"],
        "base_commit": fixed["base"]["commit"],
        "phase": recipe["phase"],
        "checkpoint": found.checkpoint,
        "step": found.step,
        "vocab_size": fixed["base_vocab_size"] + fixed["num_new_tokens"],
        "dim": len(found.geometry["input"].variances["base"]),
        "base_vocab": fixed["base_vocab_size"],
        "new_tokens": fixed["num_new_tokens"],
        "tied": "head" not in tables,
        "training_data": {
            "text": recipe["data"]["text"],
            "text_sha256": fixed["text_sha256"],
            "lexicon": recipe["tokens"]["lexicon"],
            "lexicon_sha256": fixed["lexicon_sha256"],
            "train_chars": fixed["split"]["train_chars"],
            "val_chars": fixed["split"]["val_chars"],
            "train_blocks": fixed["num_train_blocks"],
        },
        "hyperparameters": {**recipe["train"], "seq_len": recipe["data"]["seq_len"], **recipe["tokens"]},
        **tables["input"],
        "head": tables.get("head"),
        "loss": loss_numbers(read_records(run.metrics)),
        "drift_over_time": found.drift_over_time,
        "neighbours": _some_neighbours(found.words),
        "stack": record["stack"],
        "machine": found.machine,
        "identity_sha256": record["identity_sha256"],
    }


def loss_numbers(records: list[Record]) -> dict[str, Any]:
    """Return the last and the best of what metrics.jsonl holds, None where nothing was logged."""

    def last(key: str) -> float | None:
        found = [record[key] for record in records if key in record]
        return found[-1] if found else None

    evaluations = [record for record in records if "val/loss_nats" in record]
    best = min(evaluations, key=lambda record: (record["val/loss_nats"], record["step"]), default=None)
    return {
        "train_nats": last("train/loss_nats"),
        "val_nats": last("val/loss_nats"),
        "val_new_nats": last("val/loss_new_nats"),
        "val_old_nats": last("val/loss_old_nats"),
        "val_bits_per_char": last("val/bits_per_char"),
        "start_bits_per_char": evaluations[0]["val/bits_per_char"] if evaluations else None,
        "base_bits_per_char": last("base/bits_per_char"),
        "shuffled_bits_per_char": last("control/bits_per_char"),
        "best_step": None if best is None else best["step"],
        "best_val_nats": None if best is None else best["val/loss_nats"],
    }


def _some_neighbours(words: Words) -> list[dict[str, Any]]:
    """Return the nearest base tokens of a seeded sample of the new words."""
    if words.neighbours is None:
        return []
    near = words.neighbours
    ids = analysis.sample_ids(len(words.words), _SHOWN_NEIGHBOURS, 0, "neighbours").tolist()
    return [
        {
            "word": words.words[i],
            "base_tokens": [
                {"id": token, "text": near["base_tokens"][str(token)], "cosine": cosine}
                for token, cosine in zip(near["base_ids"][i], near["base_cosines"][i], strict=True)
            ],
        }
        for i in ids
    ]
