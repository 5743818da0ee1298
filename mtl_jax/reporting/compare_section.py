"""The section on which tasks the joint training helped and hurt, against runs of each task alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from mtl_jax.core.errors import count
from mtl_jax.reporting import formatting
from mtl_jax.reporting.compared import Column, Compared
from mtl_jax.reporting.heat_maps import LETTER, LINE, heat_map
from mtl_jax.reporting.page import Cell, Section, Table, number
from mtl_jax.reporting.paired_bootstrap import HURT, UNCLEAR, UNDEFINED, Difference
from mtl_jax.reporting.render import Figure, Palette, Panel

COLOURS = {"helped": 2, "hurt": 1}  # series of the palette: green and orange; unclear is muted


def section(compared: Compared) -> Section:
    """A table of differences with intervals, their figure, and the conflicts of the tasks.

    Args:
        compared: The result of mtl_jax.compare.
    """
    resamples = count(compared.resamples, "resample")
    note = (
        f"Joint minus alone on the test metric, with 95 % intervals of a paired bootstrap ({resamples}). Helped: the interval "
        "is above 0. Hurt: it is below 0. The interval of the worst task is wider, as that task was chosen among all."
    )
    lines = [f"{name}: {column.summary}. The intervals cover {column.covers}." for name, column in compared.columns.items()]
    lines += [f"{name}: {line}." for name, column in compared.columns.items() for line in column.hurt_lines]
    figures = [_intervals(compared), *_across(compared), *_conflicts(compared)]
    return Section("compare", "Is any task hurt?", [note, _table(compared), *lines, *compared.notes, *figures])


def _table(compared: Compared) -> Table:
    rows: list[Sequence[Cell]] = []
    for task, side in compared.alone.items():
        cells = [_cell(column.differences.get(task)) for column in compared.columns.values()]
        values = [number(column.values.get(task)) for column in compared.columns.values()]
        rows.append([Cell(task, after=side.metric), number(side.value), *_alternated(values, cells)])
    blank = [Cell("", "")] * len(compared.columns)
    foot: list[Sequence[Cell]] = []
    if any(column.mean for column in compared.columns.values()):
        columns = compared.columns.values()
        foot.append([Cell("mean"), Cell("", ""), *_alternated(blank, [_cell(column.mean) for column in columns])])
        worst = [_cell(column.worst, column.worst_task) for column in columns]
        foot.append([Cell("worst"), Cell("", ""), *_alternated(blank, worst)])
    head = [("task", ""), ("alone", "test")]
    for name in compared.columns:
        head += [(name, "test"), (f"{name} - alone", "95 % interval")]
    return Table("Joint minus alone", head, rows, foot)


def _alternated(first: Sequence[Cell], second: Sequence[Cell]) -> list[Cell]:
    return [cell for pair in zip(first, second, strict=True) for cell in pair]


def _cell(difference: Difference | None, task: str = "") -> Cell:
    if difference is None or difference.verdict == UNDEFINED:
        return Cell(formatting.NOTHING, "", "n")
    kind = "n bad" if difference.verdict == HURT else "n" if difference.verdict == UNCLEAR else "n top"
    ends = " to ".join(formatting.number(end, 3, plus=True) for end in (difference.low, difference.high))
    after = f"{ends}, {difference.verdict}{f', {task}' if task else ''}"
    return Cell(formatting.number(difference.value, 3, plus=True), difference.value, kind, after)


def _intervals(compared: Compared) -> Figure:
    """A panel for each joint setting: the interval of each task as a line."""
    panels = tuple(_panel(name, column) for name, column in compared.columns.items())
    caption = "Joint minus alone for each task: a point, and its 95 % interval. Green: helped. Orange: hurt. Grey: unclear."
    return Figure("compare", "Joint minus alone", caption, panels)


def _panel(title: str, column: Column) -> Panel:
    entries = [*column.differences.items(), *([("mean", column.mean)] if column.mean else [])]
    shown = [(name, difference) for name, difference in entries if difference.verdict != UNDEFINED]

    def draw(axes: Axes, palette: Palette) -> None:
        axes.axvline(0.0, color=palette.muted, linewidth=0.8)
        for place, (_, difference) in enumerate(shown):
            colour = palette.series[COLOURS[difference.verdict]] if difference.verdict in COLOURS else palette.muted
            axes.plot([difference.low, difference.high], [place, place], color=colour)
            axes.plot([difference.value], [place], "o", color=colour, markersize=5)
        axes.set_yticks(range(len(shown)), [name for name, _ in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlabel("joint minus alone")

    left = min(2.2, 0.25 + LETTER * max((len(name) for name, _ in shown), default=0))
    return Panel(title, draw, height=max(1.4, 0.65 + LINE * len(shown)), left=left)


def _across(compared: Compared) -> list[Figure]:
    """What each joint setting did to each task, as one heat map; none for a single setting."""
    if len(compared.columns) < 2:
        return []
    tasks, names = list(compared.alone), list(compared.columns)
    values = np.full((len(tasks), len(names)), np.nan)
    for place, column in enumerate(compared.columns.values()):
        for task, difference in column.differences.items():
            values[tasks.index(task), place] = 100 * difference.value
    most = max(0.5, float(np.nanmax(np.abs(values)))) if np.isfinite(values).any() else 1.0
    panel = heat_map("x 100", tasks, names, values, (-most, most), colours="RdBu")
    return [Figure("compare_settings", "What each setting did", "Joint minus alone, x 100, for each joint setting.", (panel,))]


def _conflicts(compared: Compared) -> list[Figure]:
    panels = []
    for name, column in compared.columns.items():
        if column.cosines:
            tasks = list(column.cosines)
            values = np.array([[column.cosines[task].get(other, np.nan) for other in tasks] for task in tasks])
            most = max(0.05, float(np.nanmax(np.abs(values))))
            panels.append(heat_map(name, tasks, tasks, values, (-most, most), colours="RdBu"))
    caption = "Mean cosine of the gradients of each pair of tasks over the steps of the joint runs. Red: they are in conflict."
    return [Figure("compare_conflicts", "Who conflicts with whom", caption, tuple(panels))] if panels else []
