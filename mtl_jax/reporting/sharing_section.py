"""The section on who uses which expert: the weights that a sharing shows, by layer, and how they came about.

Shapes in names: K tasks, E experts or whatever else is weighed, N evaluations, M of them that are drawn, P rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mtl_jax.reporting import formatting
from mtl_jax.reporting.curves import MANY
from mtl_jax.reporting.heat_maps import heat_map, over_time
from mtl_jax.reporting.page import Section, Table
from mtl_jax.reporting.render import Figure, Panel
from mtl_jax.reporting.series import Series
from mtl_jax.reporting.statistics import Group, criterion, ranked
from mtl_jax.reporting.study import Run, Study
from mtl_jax.training.metrics_log import USAGE_EXAMPLES

TITLE, SLUG = "Who uses which expert", "experts"
SETTINGS = 3  # most settings that are shown: those that are best on dev
PLACES = 12  # most places of a setting: those where the tasks differ most
ROWS, STEPS = 16, 16  # most rows and steps of a panel over time
NUMBERED = 12  # most columns whose cells have room for their numbers


class Place(NamedTuple):
    """The weights at a place of a run.

    Attributes:
        title: The layer, and the name of its weights.
        tasks: The tasks, in the study's order.
        columns: What is weighed.
        steps_N: i64[N], the steps of the evaluations.
        weights_NxKxE: f64, NaN where a weight is not known.
    """

    title: str
    tasks: tuple[str, ...]
    columns: tuple[str, ...]
    steps_N: np.ndarray
    weights_NxKxE: np.ndarray

    @property
    def last_KxE(self) -> np.ndarray:
        """f64[K, E], the weights of the last evaluation."""
        last: np.ndarray = self.weights_NxKxE[-1]
        return last

    @property
    def difference(self) -> float:
        """How far the tasks are apart: between the largest and the smallest weight of a column, the mean over the columns."""
        known = np.isfinite(self.last_KxE).all(axis=1)
        return float(np.ptp(self.last_KxE[known], axis=0).mean()) if known.any() else 0.0


def usage_sections(study: Study, groups: Sequence[Group]) -> list[Section]:
    """The section, if the sharing of some run shows weights.

    Args:
        study: The study.
        groups: Its settings.
    """
    order = [*ranked(groups), *(group for group in groups if group.criterion is None)]
    shown = [(group, run) for group in order if (run := _run(study, group)) is not None]
    if not shown:
        return []
    parts: list[str | Table | Figure] = []
    if len(shown) > SETTINGS:
        parts.append(f"The {SETTINGS} of {formatting.count(len(shown), 'setting')} that are best on dev.")
    if any(len(group.runs) > 1 for group, _ in shown):
        parts.append("Experts have other numbers with every seed, so a setting is shown by its run that is best on dev.")
    labels = formatting.labels([group for group, _ in shown], study.fields)
    for number, (label, (_, run)) in enumerate(zip(labels[:SETTINGS], shown[:SETTINGS], strict=True)):
        slug = f"{SLUG}-{number + 1}" if number else SLUG
        setting = f" ({label})" if len(shown) > 1 else ""
        about = f"Run {run.name}{setting}. " if len(study.runs) > 1 else ""
        all_places = places(run.curves, study.tasks)
        most_apart = sorted(all_places, key=lambda place: -place.difference)[:PLACES]
        titles = {place.title for place in most_apart}
        drawn = [place for place in all_places if place.title in titles]
        of_all = (
            f" The {PLACES} of {len(all_places)} places where the tasks differ most." if len(drawn) < len(all_places) else ""
        )
        parts.append(_last(slug, about, drawn, of_all))
        if not number and len(drawn[0].steps_N) > 1:
            parts.append(_history(f"{slug}-over-time", about, drawn, of_all))
    return [Section(SLUG, TITLE, parts)]


def places(curves: Mapping[str, Series], tasks: Sequence[str] | Mapping[str, str]) -> list[Place]:
    """The weights of a run, place by place in the order of its records.

    Args:
        curves: The run's curves; those of weights are sharing/LAYER/NAME/TASK/COLUMN.
        tasks: The study's tasks.
    """
    by_title: dict[str, dict[tuple[str, str], Series]] = {}
    for name, curve in curves.items():
        if name.startswith("sharing/") and name.count("/") > 3:
            layer, weights, task, column = name.removeprefix("sharing/").rsplit("/", 3)
            by_title.setdefault(f"{layer}: {weights}", {})[task, column] = curve
    return [_place(title, cells, tuple(tasks)) for title, cells in by_title.items()]


def _place(title: str, cells: Mapping[tuple[str, str], Series], tasks: tuple[str, ...]) -> Place:
    present = tuple(task for task in tasks if any(task == other for other, _ in cells))
    columns = tuple(dict.fromkeys(column for _, column in cells))
    steps_N = np.unique(np.concatenate([curve.steps_N for curve in cells.values()]))
    weights_NxKxE = np.full((len(steps_N), len(present), len(columns)), np.nan)
    for (task, column), curve in cells.items():
        if task in present:
            at_N = np.searchsorted(steps_N, curve.steps_N)
            weights_NxKxE[at_N, present.index(task), columns.index(column)] = curve.values_N
    return Place(title, present, columns, steps_N, weights_NxKxE)


def _run(study: Study, group: Group) -> Run | None:
    """The run of a setting that is best on dev; of runs that are not finished, the first."""
    shown = [run for run in group.runs if any(name.startswith("sharing/") for name in run.curves)]
    values = [criterion(study, run) for run in shown]
    return shown[int(np.argmax([-np.inf if value is None else value for value in values]))] if shown else None


def _last(slug: str, about: str, drawn: Sequence[Place], of_all: str) -> Figure:
    span, colours = _colours([place.last_KxE for place in drawn])
    panels = tuple(
        heat_map(
            place.title,
            place.tasks,
            place.columns,
            place.last_KxE,
            span,
            colours=colours,
            remark=_largest(place),
            numbers=len(place.columns) <= NUMBERED,
        )
        for place in drawn
    )
    caption = (
        f"{about}The weights that each task (row) gives to each expert, part or column of layers (column) at step "
        f"{drawn[0].steps_N[-1]}, by layer: the mean over the tokens of at most {USAGE_EXAMPLES} dev examples of its source. "
        f"{_scale(span)}{of_all}"
    )
    return Figure(slug, TITLE, caption, panels, choice=_choice(panels))


def _history(slug: str, about: str, drawn: Sequence[Place], of_all: str) -> Figure:
    span, colours = _colours([place.weights_NxKxE for place in drawn])
    panels = []
    for place in drawn:
        steps = np.unique(np.linspace(0, len(place.steps_N) - 1, STEPS).round().astype(int))
        names = [f"{task} - {column}" for task in place.tasks for column in place.columns]
        table_PxM = place.weights_NxKxE[steps].reshape(len(steps), -1).T
        known_PxM = np.isfinite(table_PxM)
        moved_P = np.where(known_PxM, table_PxM, -np.inf).max(axis=1) - np.where(known_PxM, table_PxM, np.inf).min(axis=1)
        rows = np.sort(np.argsort(-moved_P, kind="stable")[:ROWS])
        remark = f"The {ROWS} of {len(names)} weights that changed most." if len(names) > ROWS else ""
        row_names = [names[row] for row in rows]
        panel = over_time(place.title, row_names, place.steps_N[steps], table_PxM[rows], span, colours=colours, remark=remark)
        panels.append(panel)
    caption = f"{about}The same weights at every evaluation, or at {STEPS} of more. {_scale(span)}{of_all}"
    return Figure(slug, f"{TITLE}, over time", caption, tuple(panels), choice=_choice(panels))


def _colours(weights: Sequence[np.ndarray]) -> tuple[tuple[float, float], str]:
    """The values of the first and last colour, and the colour map: from 0 on, or around 0 where some weight is negative."""
    finite = np.concatenate([part[np.isfinite(part)] for part in weights])
    most = max(1.0, float(np.abs(finite).max(initial=0.0)))
    return ((-most, most), "RdBu") if (finite < 0).any() else ((0.0, most), "viridis")


def _scale(span: tuple[float, float]) -> str:
    return f"Colours go from {span[0]:.2f} to {span[1]:.2f}."


def _choice(panels: Sequence[Panel]) -> str:
    return "layer" if len(panels) > MANY else ""


def _largest(place: Place) -> str:
    """A sentence with the largest weight of each task; among columns of tasks, that of another task."""
    weights_KxE = place.last_KxE.copy()
    others = place.tasks == place.columns and len(place.tasks) > 1
    if others:
        np.fill_diagonal(weights_KxE, np.nan)
    texts = []
    for task, weights_E in zip(place.tasks, weights_KxE, strict=True):
        if np.isfinite(weights_E).any():
            column = int(np.nanargmax(weights_E))
            texts.append(f"{task} {place.columns[column]} ({weights_E[column]:.2f})")
    return f"Largest{' of another task' if others else ''}: {', '.join(texts)}." if texts else ""
