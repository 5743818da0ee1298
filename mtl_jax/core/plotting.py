"""Figures of a run, or of many, as PNG."""

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

DASH = 4.0  # widths of a line


def curves(records: Sequence[dict[str, Any]], tasks: Sequence[tuple[str, str]], path: Path) -> None:
    """Training loss, dev metric and weight of every task over the steps.

    Args:
        records: Records of metrics.jsonl.
        tasks: (task, its metric) in order.
        path: The PNG to write.

    Raises:
        UserError: It cannot be written.
    """
    train = [record for record in records if record["kind"] == "train"]
    dev = [record for record in records if record["kind"] == "dev"]
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    loss_axis, dev_axis, weight_axis = figure.subplots(1, 3)
    steps, measured = [record["step"] for record in train], [record["step"] for record in dev]

    def values(records: Sequence[dict[str, Any]], name: str) -> list[float]:
        return [record.get(name, math.nan) for record in records]

    drawn: tuple[tuple[Any, list[tuple[Any, Any]], dict[str, Any]], ...] = (
        (loss_axis, [(steps, _smooth(values(train, f"loss/{task}"))) for task, _ in tasks], {}),
        (dev_axis, [(measured, values(dev, f"{task}/{metric}")) for task, metric in tasks], {"marker": "o", "markersize": 3}),
        (weight_axis, [(steps, values(train, f"weight/{task}")) for task, _ in tasks], {}),
    )
    for axis, lines, style in drawn:
        for number, ((x, y), turn) in enumerate(zip(lines, in_turns(lines), strict=True)):
            color = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--", "linewidth": 1.4}
            axis.plot(x, y, **(color | style | turn))
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
    names = [f" {task}" for task, _ in tasks]  # one that began with _ would be left out
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(tasks), 7), frameon=False)
    write_bytes(path, png(figure))


def png(figure: Figure, **options: Any) -> bytes:
    """A figure as the bytes of a PNG.

    Args:
        figure: The figure.
        options: As savefig() takes them.
    """
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110, **options)
    return data.getvalue()


def lying_together(lines: Sequence[tuple[ArrayLike, ArrayLike]]) -> list[tuple[int, ...]]:
    """The lines of a panel that hide each other: by place, those with the same x and y that differ by less than a line is wide.

    Args:
        lines: (x, y) of each.
    """
    values = [np.asarray(y, np.float64) for _, y in lines]
    finite = np.concatenate([y[np.isfinite(y)] for y in values] or [np.zeros(0)])
    width = np.ptp(finite) / 150 if len(finite) else 0.0  # a line is 1.8 points wide, and a panel 165 high
    found: list[list[int]] = []
    for place, (x, _) in enumerate(lines):
        for members in found:
            other = lines[members[0]][0]
            if np.array_equal(x, other) and np.allclose(values[place], values[members[0]], 0.0, width + 1e-12, equal_nan=True):
                members.append(place)
                break
        else:
            found.append([place])
    return [tuple(members) for members in found if len(members) > 1]


def in_turns(lines: Sequence[tuple[ArrayLike, ArrayLike]]) -> list[dict[str, Any]]:
    """How each line of a panel is drawn so that it is seen: dashes in turns where lines hide each other, points in rings.

    Args:
        lines: (x, y) of each.

    Returns:
        Arguments for matplotlib's plot(); empty for a line of two points or more that nothing hides.
    """
    styles: list[dict[str, Any]] = [{"marker": "o"} if np.size(x) == 1 else {} for x, _ in lines]
    for members in lying_together(lines):
        for turn, place in enumerate(members):
            rest = len(members) - 1 - turn
            if styles[place]:
                styles[place]["markersize"] = 6 + 4 * rest
            else:
                styles[place]["linestyle"] = (DASH * rest, (DASH, DASH * (len(members) - 1)))
    return styles


def _smooth(values: Sequence[float], window: int = 10) -> list[float]:
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]


def bands(series: Mapping[str, Mapping[int, Sequence[float]]], path: Path, *, across: str, up: str) -> None:
    """A line of means for each series with a band of one standard deviation (n - 1) around it, over a logarithmic axis.

    Args:
        series: {label: {place on the axis: the values there}}.
        path: The PNG to write.
        across: What the horizontal axis shows.
        up: What the vertical axis shows.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, (label, values) in enumerate(series.items()):
        places = list(values)
        means = np.array([np.mean(values[place]) for place in places])
        spread = np.array([np.std(values[place], ddof=1) if len(values[place]) > 1 else 0.0 for place in places])
        axes.plot(places, means, marker="o", markersize=3, linewidth=1.4, color=f"C{number % 10}", label=label)
        axes.fill_between(places, means - spread, means + spread, color=f"C{number % 10}", alpha=0.15, linewidth=0)
    places = sorted({place for values in series.values() for place in values})
    axes.set(xscale="log", xlabel=across, ylabel=up)
    axes.set_xticks(places, [f"{place:,}" for place in places])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=min(len(series), 4), fontsize="small", frameon=False)
    write_bytes(path, png(figure))
