"""Figures of tables: which tasks help which, how far estimators agree, and the conflicts of task gradients over time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from mtl_jax.reporting import formatting
from mtl_jax.reporting.render import Figure, Palette, Panel
from mtl_jax.reporting.series import band, cosine_name
from mtl_jax.reporting.statistics import Group, ranked
from mtl_jax.reporting.study import Study

PAIRS = 21  # most pairs of tasks in a panel: those whose gradients agree least
SETTINGS = 8  # most settings with a panel: those that are best on dev
SHOWN_TOGETHER = 2  # of more panels, the reader chooses one
LETTER, LINE = 0.085, 0.24  # inches of a letter of a label, and of a row


def heat_map(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: np.ndarray,
    span: tuple[float, float],
    *,
    colours: str,
    remark: str = "",
    numbers: bool = True,
) -> Panel:
    """A panel with a coloured cell for each row and column, and its number; a value that is not finite has an empty cell.

    Args:
        title: The panel's title.
        rows: Names of the rows, from top to bottom.
        columns: Names of the columns.
        values: f64[rows, columns].
        span: The values of the first and of the last colour.
        colours: A colour map of matplotlib.
        remark: A line below the panel.
        numbers: Whether the cells have their numbers.
    """

    def draw(axes: Axes, palette: Palette) -> None:
        _cells(axes, values, np.arange(len(columns) + 1.0), span, colours)
        for row, column in np.argwhere(np.isfinite(values)).tolist() if numbers else ():
            place = (values[row, column] - span[0]) / (span[1] - span[0])
            dark = abs(place - 0.5) > 0.3 if colours == "RdBu" else place < 0.55
            ink = "#ffffff" if dark else "#1c2430"
            text = f"{values[row, column]:.2f}"
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=ink, fontsize=7.5)
        axes.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=35, ha="right", rotation_mode="anchor")
        _row_names(axes, rows)

    below = 0.2 + 0.7 * LETTER * max(map(len, columns))
    return Panel(title, draw, remark=remark, height=0.12 + LINE * len(rows) + below, left=_left(rows), below=below)


def conflicts(study: Study, groups: Sequence[Group]) -> list[Figure]:
    """The cosine of each pair of task gradients over the steps, for rules that compare gradients; the best settings on dev."""
    order = [*ranked(groups), *(group for group in groups if group.criterion is None)]
    labels = dict(zip(map(id, groups), formatting.labels(groups, study.fields), strict=True))
    panels: list[Panel] = []
    for group in order:
        curves = {
            pair: band(known)
            for pair in itertools.combinations(sorted(study.tasks), 2)
            if (known := [run.curves[name] for run in group.runs if (name := cosine_name(*pair)) in run.curves])
        }
        if len(curves) and len(panels) < SETTINGS:
            means = {pair: float(curve.mean_N.mean()) for pair, curve in curves.items()}
            pairs = sorted(curves, key=means.__getitem__)[:PAIRS]
            steps_M = np.unique(np.concatenate([curves[pair].steps_N for pair in pairs]))
            table_PxM = np.full((len(pairs), len(steps_M)), np.nan)
            for row, pair in enumerate(pairs):
                table_PxM[row, np.searchsorted(steps_M, curves[pair].steps_N)] = curves[pair].mean_N
            remark = f"The {len(pairs)} of {len(curves)} pairs that agree least." if len(pairs) < len(curves) else ""
            names = [f"{first} - {second}" for first, second in pairs]
            title = labels[id(group)] if len(groups) > 1 else group.method
            most = max(0.05, float(np.nanmax(np.abs(table_PxM))))
            remark = f"The strongest colour is {most:.2f}. {remark}".strip()
            panels.append(over_time(title, names, steps_M, table_PxM, (-most, most), colours="RdBu", remark=remark))
    caption = (
        "Cosine of the gradients of each pair of tasks, each cell the mean of a window of steps and over the seeds, pairs that "
        "agree least first. Red: a step for one task raises the loss of the other. Blue: it lowers it."
    )
    choice = "setting" if len(panels) > SHOWN_TOGETHER else ""
    figure = Figure("conflicts", "Conflicts of task gradients over time", caption, tuple(panels), choice=choice)
    return [figure] if panels else []


def over_time(
    title: str,
    names: Sequence[str],
    steps_M: np.ndarray,
    table_PxM: np.ndarray,
    span: tuple[float, float],
    *,
    colours: str,
    remark: str = "",
) -> Panel:
    """A panel with a row for each of P names and a coloured cell for each of M steps.

    Args:
        title: The panel's title.
        names: The names of the rows, from top to bottom.
        steps_M: The steps, rising; a cell ends at its step.
        table_PxM: The values; one that is not finite has an empty cell.
        span: The values of the first and of the last colour.
        colours: A colour map of matplotlib.
        remark: A line below the panel.
    """
    edges = np.concatenate([[max(0.0, 2 * steps_M[0] - steps_M[1]) if len(steps_M) > 1 else 0.0], steps_M.astype(float)])

    def draw(axes: Axes, palette: Palette) -> None:
        _cells(axes, table_PxM, edges, span, colours)
        _row_names(axes, names)
        axes.set_xlabel("step")

    return Panel(title, draw, remark=remark, height=max(1.4, 0.65 + LINE * len(names)), left=_left(names))


def _cells(axes: Axes, values: np.ndarray, edges: np.ndarray, span: tuple[float, float], colours: str) -> None:
    rows = np.arange(len(values) + 1.0)
    axes.pcolormesh(edges, rows, np.ma.masked_invalid(values), cmap=colours, vmin=span[0], vmax=span[1], linewidth=0)
    axes.set_ylim(len(values), 0)
    axes.grid(visible=False)


def _row_names(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(np.arange(len(names)) + 0.5, names, fontsize=8.5 if len(names) > 8 else 9.5)


def _left(names: Sequence[str]) -> float:
    return min(2.2, 0.25 + LETTER * max(map(len, names)))
