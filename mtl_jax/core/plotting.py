"""Figures of one run, or of many, as PNG."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import ArrayLike

matplotlib.use("Agg", force=False)
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mtl_jax.core.files import write_bytes

DASH = 4.0  # length, in widths of the line


def curves(records: Sequence[dict[str, Any]], tasks: Sequence[tuple[str, str]], path: Path) -> None:
    """Training loss, dev metric and weight of every task over the steps.

    Args:
        records: Records of metrics.jsonl.
        tasks: (task, its metric) in order.
        path: The PNG to write.

    Raises:
        UserError: The file cannot be written.
    """
    train = [record for record in records if record["kind"] == "train"]
    dev = [record for record in records if record["kind"] == "dev"]
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    loss_axis, dev_axis, weight_axis = figure.subplots(1, 3)
    train_steps, dev_steps = [record["step"] for record in train], [record["step"] for record in dev]

    def values(records: Sequence[dict[str, Any]], name: str) -> list[float]:
        return [record.get(name, math.nan) for record in records]

    panels: tuple[tuple[Any, list[tuple[Any, Any]], dict[str, Any]], ...] = (
        (loss_axis, [(train_steps, _smooth(values(train, f"loss/{task}"))) for task, _ in tasks], {}),
        (dev_axis, [(dev_steps, values(dev, f"{task}/{metric}")) for task, metric in tasks], {"marker": "o", "markersize": 3}),
        (weight_axis, [(train_steps, values(train, f"weight/{task}")) for task, _ in tasks], {}),
    )
    for axis, lines, style in panels:
        for number, ((x, y), distinction) in enumerate(zip(lines, distinguish(lines), strict=True)):
            color = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--", "linewidth": 1.4}
            axis.plot(x, y, **(color | style | distinction))
    starts = [b["step"] for a, b in itertools.pairwise(train) if a.get("phase") != b.get("phase")]
    titles = ("training loss (running mean)", "dev metric", "loss weight")
    for axis, title in zip((loss_axis, dev_axis, weight_axis), titles, strict=True):
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        for start in starts:
            axis.axvline(start, color="0.6", linestyle=":", linewidth=1)
    weight_axis.set_ylim(bottom=0)
    handles = [Line2D([], [], color=f"C{n % 10}", linestyle="-" if n < 10 else "--") for n in range(len(tasks))]
    names = [f" {task}" for task, _ in tasks]  # matplotlib leaves out names that begin with _
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(tasks), 7), frameon=False)
    write_bytes(path, png(figure))


def png(figure: Figure, **options: Any) -> bytes:
    """A figure as the bytes of a PNG.

    Args:
        figure: The figure.
        options: Options of savefig().
    """
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110, **options)
    return data.getvalue()


def overlapping(lines: Sequence[tuple[ArrayLike, ArrayLike]]) -> list[tuple[int, ...]]:
    """Groups of lines of a panel that hide each other: the same x, and y that differ by less than the width of a line.

    Args:
        lines: (x, y) of each line.

    Returns:
        The indices of the lines of each group; lines that nothing hides are in none.
    """
    values = [np.asarray(y, np.float64) for _, y in lines]
    finite = np.concatenate([y[np.isfinite(y)] for y in values] or [np.zeros(0)])
    width = np.ptp(finite) / 150 if len(finite) else 0.0  # a line is 1.8 points wide, and a panel 165 high
    groups: list[list[int]] = []
    for i, (x, _) in enumerate(lines):
        for group in groups:
            other = lines[group[0]][0]
            if np.array_equal(x, other) and np.allclose(values[i], values[group[0]], 0.0, width + 1e-12, equal_nan=True):
                group.append(i)
                break
        else:
            groups.append([i])
    return [tuple(group) for group in groups if len(group) > 1]


def distinguish(lines: Sequence[tuple[ArrayLike, ArrayLike]]) -> list[dict[str, Any]]:
    """Styles that keep each line of a panel visible: alternating dashes where lines hide each other, points as rings.

    Args:
        lines: (x, y) of each line.

    Returns:
        Arguments for matplotlib's plot(); empty for a line of several points that nothing hides.
    """
    styles: list[dict[str, Any]] = [{"marker": "o"} if np.size(x) == 1 else {} for x, _ in lines]
    for group in overlapping(lines):
        for position, i in enumerate(group):
            rest = len(group) - 1 - position
            if styles[i]:
                styles[i]["markersize"] = 6 + 4 * rest
            else:
                styles[i]["linestyle"] = (DASH * rest, (DASH, DASH * (len(group) - 1)))
    return styles


def _smooth(values: Sequence[float], window: int = 10) -> list[float]:
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]


def bands(series: Mapping[str, Mapping[int, Sequence[float]]], path: Path, *, xlabel: str, ylabel: str) -> None:
    """A line of means for each series with a band of one standard deviation (n - 1) around it, over a logarithmic axis.

    Args:
        series: {label: {x: the values at x}}.
        path: The PNG to write.
        xlabel: Label of the horizontal axis.
        ylabel: Label of the vertical axis.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, (label, values) in enumerate(series.items()):
        x = list(values)
        means = np.array([np.mean(values[at]) for at in x])
        spread = np.array([np.std(values[at], ddof=1) if len(values[at]) > 1 else 0.0 for at in x])
        axes.plot(x, means, marker="o", markersize=3, linewidth=1.4, color=f"C{number % 10}", label=label)
        axes.fill_between(x, means - spread, means + spread, color=f"C{number % 10}", alpha=0.15, linewidth=0)
    ticks = sorted({at for values in series.values() for at in values})
    axes.set(xscale="log", xlabel=xlabel, ylabel=ylabel)
    axes.set_xticks(ticks, [f"{at:,}" for at in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=min(len(series), 4), fontsize="small", frameon=False)
    write_bytes(path, png(figure))
