"""`wake2vec report`: pictures, tables, numbers and one self-contained page, from a run's folder alone.

Needs neither GPU nor base model nor transformers. `write_light` is the part that takes milliseconds: a page with the
curves, written at every evaluation, so that a browser left open on the folder shows a live run.
"""

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import Tensor

from wake2vec import analysis
from wake2vec.errors import WakeError
from wake2vec.metrics import Record, loss_table, read_records
from wake2vec.record import read_run
from wake2vec.rundir import RunDir, make_folder, read_json, sweep, write_file, write_json
from wake2vec.scribe import Scribe
from wake2vec.summary import Analysis, Geometry, Words, analyse, loss_numbers, summarise

_RELOAD_S = 20
_HISTOGRAM_BINS = 80
_SPECTRUM = 20

Chart = dict[str, Any]


def write(run: RunDir) -> list[Path]:
    """Write the whole report into `report/` and return its files, the page first.

    Raises:
        WakeError: the run has no whole sentry, or nothing stored to compare it with.
    """
    from wake2vec import plots  # matplotlib: not before training starts

    found = analyse(run)
    summary = summarise(run, found)
    records = read_records(run.metrics)
    folder = _folder(run)
    title = f"{run.name}: {summary['model']}, step {found.step}"
    pictures = {
        "loss_curve.png": plots.loss_curve(records, title),
        "drift.png": plots.drift_over_time(found.drift_over_time, title),
    }
    for name, geometry in found.geometry.items():
        pictures[f"embedding_{name}.png"] = plots.six_panels(geometry, f"{title}, {name} rows")
    write_json(folder / "summary.json", summary)
    write_file(folder / "loss_table.md", [loss_table(records).encode()])
    for file, content in pictures.items():
        write_file(folder / file, [content])
    page = render(run, records, summary, found)
    write_file(folder / "index.html", [page.encode()])
    return [folder / name for name in ("index.html", "summary.json", "loss_table.md", *pictures)]


def write_light(run: RunDir, newest: Sequence[Record] = ()) -> Path:
    """Write the page with what metrics and run.json hold; statistics and words come with the whole report.

    Args:
        newest: lines that may not be on the disk yet.
    """
    path = _folder(run) / "index.html"
    records = read_records(run.metrics)
    records += [record for record in newest if record not in records]
    write_file(path, [render(run, records).encode()], durable=False)
    return path


class LivePage:
    """Writes the light page after every evaluation, beside the loop; training goes on where that fails."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._seen: list[Record] = []  # the lines themselves may not be on the disk yet
        self.scribe = Scribe(lambda _: None)  # a full disk: the next sentry says so

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """Take a line of the metrics log."""
        self._seen.append({"step": step, **values})
        if "val/loss_nats" in values:
            seen = list(self._seen)
            self.scribe.put("index.html", lambda: self._write(seen))

    def close(self) -> None:
        """Finish writing."""
        self.scribe.close()

    def _write(self, seen: list[Record]) -> None:
        with contextlib.suppress(WakeError):
            write_light(self._run, seen)


def is_current(run: RunDir) -> bool:
    """Say whether the whole report is of the run's last line."""
    summary = run.report / "summary.json"
    return summary.exists() and summary.stat().st_mtime >= run.metrics.stat().st_mtime


def _folder(run: RunDir) -> Path:
    make_folder(run.report)
    sweep(run.report)
    return run.report


def render(
    run: RunDir, records: Sequence[Record], summary: Mapping[str, Any] | None = None, found: Analysis | None = None
) -> str:
    """Return the page; without a summary the light one."""
    record = read_run(run)
    assert record is not None
    recipe = record["identity"]["recipe"]
    step = max((entry["step"] for entry in records), default=0)
    done = any("control/bits_per_char" in entry for entry in records)
    charts = _metric_charts(records)
    if found is not None:
        charts += _analysis_charts(found)
    data = {
        "run": run.name,
        "reload_s": 0 if done else _RELOAD_S,
        "beat_unix_s": _last_beat(run),
        "charts": charts,
        "words": None if found is None else _word_data(found),
    }
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["number"] = _number
    parts = {
        name: (files("wake2vec") / "page" / name).read_text("utf-8") for name in ("index.html", "page.css", "page.js")
    }
    return environment.from_string(parts["index.html"]).render(
        run=run.name,
        identity=record,
        recipe=recipe,
        step=step,
        max_steps=recipe["train"]["max_steps"],
        done=done,
        written=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        loss=loss_numbers(list(records)),
        table=_evaluations(records),
        summary=summary,
        sections=sorted({chart["section"] for chart in charts}, key=[c["section"] for c in charts].index),
        charts=charts,
        words=None if found is None else len(found.words.words),
        css=parts["page.css"],
        js=parts["page.js"],
        data=_script_json(data),
    )


def _script_json(data: Any) -> str:
    """Return JSON that cannot end the script element it stands in."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _last_beat(run: RunDir) -> float | None:
    if not run.heartbeat.exists():
        return None
    beat = read_json(run.heartbeat)
    return float(beat["time"]) if isinstance(beat, dict) and "time" in beat else None


def _number(value: float | int | None, digits: int = 4) -> str:
    """Write a number for people."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.{digits}f}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.3g}"


def _evaluations(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return the loss table's rows for the page."""
    lines = loss_table(records).splitlines()[2:]
    keys = ("step", "train", "val", "notes")
    return [dict(zip(keys, (cell.strip() for cell in line.strip("|").split("|")), strict=True)) for line in lines]


def _metric_charts(records: Sequence[Record]) -> list[Chart]:
    """Return the charts of what metrics.jsonl holds; those without a point are left out."""
    charts = [
        _metric_chart(
            records,
            "loss",
            "Loss",
            "nats a token",
            {
                "train/loss_nats": ("training", "base"),
                "val/loss_nats": ("held out", "new"),
                "val/loss_new_nats": ("held out, new words", "between"),
                "val/loss_old_nats": ("held out, old words", "grey"),
            },
        ),
        _bits_chart(records),
        _metric_chart(records, "rate", "Learning rate", "rate", {"optim/learning_rate": ("learning rate", "base")}),
        _metric_chart(
            records, "norm", "Gradient norm", "norm of the mean gradient", {"optim/grad_norm": ("norm", "new")}
        ),
        _metric_chart(records, "time", "Time a step", "seconds", {"time/step_s": ("a step", "between")}),
        _metric_chart(records, "memory", "Peak memory", "GiB", {"memory/peak_gib": ("peak so far", "grey")}),
    ]
    return [{**chart, "section": "Training"} for chart in charts if chart["series"]]


def _metric_chart(
    records: Sequence[Record], id_: str, title: str, unit: str, names: Mapping[str, tuple[str, str]]
) -> Chart:
    series = []
    for key, (name, role) in names.items():
        points = [(entry["step"], entry[key]) for entry in records if key in entry]
        if points:
            series.append({"name": name, "role": role, "x": [p[0] for p in points], "y": [p[1] for p in points]})
    return {"id": id_, "title": title, "x": "step", "y": unit, "series": series}


def _bits_chart(records: Sequence[Record]) -> Chart:
    chart = _metric_chart(records, "bits", "Bits a character", "bits", {"val/bits_per_char": ("held out", "new")})
    for key, name, role in (
        ("base/bits_per_char", "base model, own tokenizer", "base"),
        ("control/bits_per_char", "rows shuffled", "grey"),
    ):
        values = [entry[key] for entry in records if key in entry]
        if values and chart["series"]:
            steps = chart["series"][0]["x"]
            ends = [steps[0], max(steps[-1], steps[0] + 1)]
            chart["series"].append({"name": name, "role": role, "x": ends, "y": [values[-1]] * 2, "dash": True})
    return chart


def _analysis_charts(found: Analysis) -> list[Chart]:
    charts = []
    for key, unit, title in (("cosine", "cosine", "Cosine with the start"), ("l2", "L2", "L2 distance from the start")):
        series = [
            {
                "name": f"{name} rows",
                "role": role,
                "x": [point["step"] for point in points],
                "y": [point[key] for point in points],
                "lo": [point[f"{key}_ci95"][0] for point in points],
                "hi": [point[f"{key}_ci95"][1] for point in points],
            }
            for (name, points), role in zip(found.drift_over_time.items(), ("base", "new"), strict=False)
        ]
        if series:
            charts.append(
                {"id": f"drift-{key}", "section": "Drift", "title": title, "x": "step", "y": unit, "series": series}
            )
    for name, geometry in found.geometry.items():
        charts += [{**chart, "section": f"Geometry of the {name} rows"} for chart in _geometry_charts(name, geometry)]
    return charts


def _geometry_charts(name: str, geometry: Geometry) -> list[Chart]:
    norms = {"base": geometry.base_norms, "new": geometry.new_norms}
    cosines = {pair.replace("_", "-"): found.values for pair, found in geometry.cosines.items()}
    charts = [
        _histogram_chart(f"{name}-norms", "Norms", "L2 norm of a row", norms),
        _histogram_chart(f"{name}-cosines", "Pairwise cosines", "cosine", cosines),
        _variance_chart(name, geometry),
        _spectrum_chart(name, geometry),
    ]
    if geometry.drift is not None:
        for values, key, label in zip(geometry.drift, ("cosine", "l2"), ("cosine", "L2 distance"), strict=True):
            chart = _histogram_chart(f"{name}-drift-{key}", f"Drift: {label}", label, {"new words": values})
            charts.append(chart)
    return charts


def _histogram_chart(id_: str, title: str, unit: str, values: Mapping[str, Tensor]) -> Chart:
    """Return densities over common bins, so that groups of different sizes compare."""
    bins = max(10, min(_HISTOGRAM_BINS, min(len(found) for found in values.values()) // 5))
    edges = analysis.histogram_edges(list(values.values()), bins)
    width = float(edges[1] - edges[0])
    middles = [round(float(edge) + width / 2, 6) for edge in edges[:-1]]
    series = []
    for (kind, found), role in zip(values.items(), ("base", "new", "between"), strict=False):
        counts = torch.histc(found.float(), bins, float(edges[0]), float(edges[-1]))
        density = [round(float(count) / (len(found) * width), 6) for count in counts]
        role = "new" if len(values) == 1 else role
        series.append({"name": kind, "role": role, "x": middles, "y": density, "step": True})
    return {"id": id_, "title": title, "x": unit, "y": "density", "series": series, "zero": True}


def _variance_chart(name: str, geometry: Geometry) -> Chart:
    series: list[dict[str, Any]] = []
    for (kind, variances_D), role in zip(geometry.variances.items(), ("base", "new"), strict=True):
        share = (variances_D.cumsum(0) / variances_D.sum().clamp(min=1e-12)).tolist()
        at = sorted({*range(0, len(share), max(1, len(share) // 200)), len(share) - 1})
        points = [(i + 1, round(share[i], 5)) for i in at]
        series.append({"name": kind, "role": role, "x": [p[0] for p in points], "y": [p[1] for p in points]})
    random = geometry.numbers["intrinsic_dim"]["new"]["random"]
    crossings = {"x": [random["components_90"], random["components_95"]], "y": [0.9, 0.95]}
    series.append({"name": "random rows", "role": "grey", "dots": True} | crossings)
    return {
        "id": f"{name}-variance",
        "title": "Cumulative variance",
        "x": "principal components",
        "y": "share",
        "series": series,
        "zero": True,
    }


def _spectrum_chart(name: str, geometry: Geometry) -> Chart:
    series = []
    for (kind, variances_D), role in zip(geometry.variances.items(), ("base", "new"), strict=True):
        share = (100 * variances_D / variances_D.sum().clamp(min=1e-12))[:_SPECTRUM].tolist()
        series.append(
            {"name": kind, "role": role, "x": list(range(1, len(share) + 1)), "y": [round(v, 4) for v in share]}
        )
    return {
        "id": f"{name}-spectrum",
        "title": f"Top {_SPECTRUM} components",
        "x": "component",
        "y": "% of the variance",
        "series": series,
        "zero": True,
    }


def _word_data(found: Analysis) -> dict[str, Any]:
    """Return the explorer's columns, one entry a word, rounded to what is shown."""
    words: Words = found.words
    columns: dict[str, Any] = {
        "words": words.words,
        "train": words.counts["train"],
        "val": words.counts["val"],
        "losses": {when: [_rounded(v) for v in values] for when, values in words.losses.items()},
        "losses_step": words.losses_step,
        "drift": None,
        "near": None,
    }
    drift = found.geometry["input"].drift
    if drift is not None:
        columns["drift"] = {
            "cosine": [_rounded(v) for v in drift[0].tolist()],
            "l2": [_rounded(v) for v in drift[1].tolist()],
        }
    if words.neighbours is not None:
        near = words.neighbours
        columns["near"] = {
            "step": near["step"],
            "base_tokens": near["base_tokens"],
            "base_ids": near["base_ids"],
            "new_ids": near["new_ids"],
            "base_cosines": [[_rounded(v, 3) for v in row] for row in near["base_cosines"]],
            "new_cosines": [[_rounded(v, 3) for v in row] for row in near["new_cosines"]],
        }
    return columns


def _rounded(value: float | None, digits: int = 4) -> float | None:
    return None if value is None else round(value, digits)
