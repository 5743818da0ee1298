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

matplotlib.use("Agg", force=False)
from matplotlib.figure import Figure

from mtl_jax.files import write_bytes


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
    for number, (task, metric) in enumerate(tasks):
        style = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--", "linewidth": 1.4}
        steps = [record["step"] for record in train]
        loss_axis.plot(steps, _smooth([record.get(f"loss/{task}", math.nan) for record in train]), label=task, **style)
        dev_axis.plot(
            [r["step"] for r in dev], [r.get(f"{task}/{metric}", math.nan) for r in dev], marker="o", markersize=3, **style
        )
        weight_axis.plot(steps, [record.get(f"weight/{task}", math.nan) for record in train], **style)
    starts = [b["step"] for a, b in itertools.pairwise(train) if a.get("phase") != b.get("phase")]
    titles = ("training loss (running mean)", "dev metric", "loss weight")
    for axis, title in zip((loss_axis, dev_axis, weight_axis), titles, strict=True):
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        for start in starts:
            axis.axvline(start, color="0.6", linestyle=":", linewidth=1)
    weight_axis.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=min(len(tasks), 7), frameon=False)
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
