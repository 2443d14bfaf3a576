"""The pictures of a run, as PNG bytes. No pyplot: nothing global, no window system.

Every run draws them at its end: margins are fixed, as finding them takes longer than drawing, and each is drawn once.

Shapes: N new words, V base tokens, D hidden size.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from wake2vec import analysis
from wake2vec.metrics import Record
from wake2vec.summary import Geometry

BASE, NEW, BETWEEN, GREY = "#3b6fb6", "#c8553d", "#5f9e6e", "#777777"
_DPI = 130
_DOTS = 20_000
"""Rows drawn of each kind in the panel of norms by index."""


def loss_curve(records: Sequence[Record], title: str) -> bytes:
    """Draw training and held-out loss in nats a token; and, below, bits a character against the base model's."""
    figure = Figure(figsize=(8, 7))
    figure.subplots_adjust(left=0.1, right=0.98, bottom=0.08, top=0.94, hspace=0.08)
    nats, bits = figure.subplots(2, 1, sharex=True)
    for key, label, colour in (("train/loss_nats", "training", BASE), ("val/loss_nats", "held out", NEW)):
        _curve(nats, records, key, label, colour)
    nats.set_ylabel("nats a token")
    nats.set_title(title)
    _curve(bits, records, "val/bits_per_char", "held out", NEW)
    for key, label, style in (
        ("base/bits_per_char", "base model, own tokenizer", "--"),
        ("control/bits_per_char", "rows shuffled among the words", ":"),
    ):
        values = [record[key] for record in records if key in record]
        if values:
            bits.axhline(values[-1], color=GREY, linestyle=style, label=f"{label}: {values[-1]:.4f}")
    bits.set_ylabel("bits a character")
    bits.set_xlabel("step")
    for axes in (nats, bits):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    return _png(figure)


def _curve(axes: Axes, records: Sequence[Record], key: str, label: str, colour: str) -> None:
    points = [(record["step"], record[key]) for record in records if key in record]
    if points:
        steps, values = zip(*points, strict=True)
        marker = "o" if len(points) <= 40 else None
        axes.plot(steps, values, color=colour, label=label, marker=marker, markersize=3.5, linewidth=1.4)


def drift_over_time(curves: Mapping[str, Sequence[Mapping[str, Any]]], title: str) -> bytes:
    """Draw mean drift since the start in every sentry kept, cosine and L2 beside each other, with 95 % intervals."""
    figure = Figure(figsize=(9, 3.8))
    figure.subplots_adjust(left=0.08, right=0.98, bottom=0.13, top=0.9, wspace=0.24)
    for axes, key, label in zip(
        figure.subplots(1, 2), ("cosine", "l2"), ("cosine with the start", "L2 distance from the start"), strict=True
    ):
        for (name, points), colour in zip(curves.items(), (BASE, NEW), strict=False):
            steps = [point["step"] for point in points]
            low, high = zip(*(point[f"{key}_ci95"] for point in points), strict=True)
            axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
            axes.plot(steps, [point[key] for point in points], color=colour, marker="o", markersize=4, label=name)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if curves:
            axes.legend(frameon=False, title="rows")
    figure.suptitle(title)
    return _png(figure)


def six_panels(geometry: Geometry, title: str) -> bytes:
    """Draw the embedding analysis: norms, cosines, variance, drift, norm by index, spectrum."""
    figure = Figure(figsize=(16, 9.5))
    grid = figure.add_gridspec(2, 3, left=0.04, right=0.985, bottom=0.055, top=0.92, wspace=0.16, hspace=0.2)
    _norm_panel(figure.add_subplot(grid[0, 0]), geometry)
    _cosine_panel(figure.add_subplot(grid[0, 1]), geometry)
    _variance_panel(figure.add_subplot(grid[0, 2]), geometry)
    cells = grid[1, 0].subgridspec(1, 2, wspace=0.3)
    _drift_panel([figure.add_subplot(cells[0, 0]), figure.add_subplot(cells[0, 1])], geometry)
    _index_panel(figure.add_subplot(grid[1, 1]), geometry)
    _spectrum_panel(figure.add_subplot(grid[1, 2]), geometry)
    figure.suptitle(title, fontsize=14)
    return _png(figure)


def _norm_panel(axes: Axes, geometry: Geometry) -> None:
    numbers = geometry.numbers["norms"]
    bins = analysis.histogram_edges([geometry.base_norms, geometry.new_norms], 80)
    for values, kind, colour in ((geometry.base_norms, "base", BASE), (geometry.new_norms, "new", NEW)):
        label = f"{kind}: {numbers[kind]['mean']:.4g} ± {numbers[kind]['std']:.2g}"
        edges = bins.tolist()
        axes.hist(values.numpy(), edges, density=True, histtype="stepfilled", color=colour, alpha=0.6, label=label)
    effect = numbers["cohens_d"]
    axes.set_title("Norms" + ("" if effect is None else f" (Cohen's d {effect:.2f})"))
    axes.set_xlabel("L2 norm of a row")
    axes.set_ylabel("density")
    axes.legend(frameon=False)


def _cosine_panel(axes: Axes, geometry: Geometry) -> None:
    bins = analysis.histogram_edges([found.values for found in geometry.cosines.values()], 100)
    for (pair, found), colour in zip(geometry.cosines.items(), (BASE, NEW, BETWEEN), strict=True):
        label = f"{pair.replace('_', '-')}: {found.mean:.4f}"
        axes.hist(found.values.numpy(), bins.tolist(), density=True, histtype="step", color=colour, label=label, lw=1.5)
    axes.set_title("Pairwise cosines")
    axes.set_xlabel("cosine")
    axes.set_ylabel("density")
    axes.legend(frameon=False)


def _variance_panel(axes: Axes, geometry: Geometry) -> None:
    for (kind, variances_D), colour in zip(geometry.variances.items(), (BASE, NEW), strict=True):
        numbers = geometry.numbers["intrinsic_dim"][kind]
        share = (variances_D.cumsum(0) / variances_D.sum().clamp(min=1e-12)).numpy()
        label = f"{kind}: 90 % in {numbers['components_90']}, 95 % in {numbers['components_95']}"
        axes.plot(np.arange(1, len(share) + 1), share, color=colour, label=label)
    random = geometry.numbers["intrinsic_dim"]["new"]["random"]
    for percent in (90, 95):
        axes.axhline(percent / 100, color=GREY, linewidth=0.7, linestyle=":")
    axes.plot(
        [random["components_90"], random["components_95"]],
        [0.9, 0.95],
        linestyle="none",
        marker="x",
        color=GREY,
        label=f"random rows: {random['components_90']}, {random['components_95']}",
    )
    axes.set_ylim(0, 1.02)
    axes.set_title(f"Cumulative variance, {geometry.numbers['intrinsic_dim']['new']['rows']:,} rows each")
    axes.set_xlabel("principal components")
    axes.set_ylabel("share of the variance")
    axes.legend(frameon=False, loc="lower right")


def _drift_panel(pair: Sequence[Axes], geometry: Geometry) -> None:
    for axes, index, label in zip(pair, (0, 1), ("cosine with the start", "L2 from the start"), strict=True):
        axes.set_xlabel(label)
        if geometry.drift is None:
            axes.text(0.5, 0.5, "no first sentry", ha="center", va="center", transform=axes.transAxes)
            continue
        values = geometry.drift[index]
        bins = analysis.histogram_edges([values], max(10, min(60, len(values) // 10)))
        axes.hist(values.numpy(), bins.tolist(), histtype="stepfilled", color=NEW, alpha=0.75)
        axes.axvline(float(values.mean()), color="black", linewidth=1)
        axes.set_title(f"Drift: mean {float(values.mean()):.4g}")
        axes.xaxis.set_major_locator(MaxNLocator(4))
    pair[0].set_ylabel("new words")


def _index_panel(axes: Axes, geometry: Geometry) -> None:
    first = len(geometry.base_norms)
    for values, start, kind, colour in (
        (geometry.base_norms, 0, "base", BASE),
        (geometry.new_norms, first, "new", NEW),
    ):
        ids = analysis.sample_ids(len(values), _DOTS, 0, "dots")
        size = 6 if len(ids) < 3000 else 1.5
        axes.scatter(
            (ids + start).numpy(), values[ids].numpy(), s=size, color=colour, alpha=0.5, linewidths=0, rasterized=True
        )
        axes.scatter([], [], s=20, color=colour, label=kind)
    axes.set_title("Norm by token id")
    axes.set_xlabel("token id")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_ylabel("L2 norm")
    axes.legend(frameon=False)


def _spectrum_panel(axes: Axes, geometry: Geometry) -> None:
    for (kind, variances_D), colour, shift in zip(geometry.variances.items(), (BASE, NEW), (-0.2, 0.2), strict=True):
        share = (variances_D / variances_D.sum().clamp(min=1e-12))[:20].numpy()
        axes.bar(np.arange(1, len(share) + 1) + shift, 100 * share, width=0.4, color=colour, label=kind)
    axes.set_ylim(0, 1.2 * axes.get_ylim()[1])  # room for the legend where the spectrum is flat
    axes.set_title("Top 20 principal components")
    axes.set_xlabel("component")
    axes.set_ylabel("% of the variance")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.set_dpi(_DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.print_png(buffer, metadata={"Software": None})  # type: ignore[no-untyped-call]
    return buffer.getvalue()
