"""Figures over the steps: learning curves, weights, agreement of the task gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from mtl_jax.core.plotting import distinguish, overlapping
from mtl_jax.report import formatting
from mtl_jax.report.render import SERIES, Figure, Palette, Panel
from mtl_jax.report.series import Band, band
from mtl_jax.report.statistics import Group, ranked
from mtl_jax.report.study import Study

BEST = 5  # so many settings are drawn by themselves where there are more than SERIES
MANY = 6  # panels; where there are more, a reader chooses one


def learning(study: Study, groups: Sequence[Group]) -> list[Figure]:
    """Dev metric and training loss of every task over the steps."""
    wanted = [
        ("learning", "Learning curves on dev", "dev", "{task}: dev {metric}", "Metrics on dev while training"),
        (
            "loss",
            "Training loss",
            "loss",
            "{task}: training loss",
            "Losses of the training batches, a point the mean of a window",
        ),
    ]
    found = []
    for slug, title, kind, words_of_panel, caption in wanted:
        names = {f"{kind}/{task}": words_of_panel.format(task=task, metric=metric) for task, metric in study.tasks.items()}
        found += _by_setting(study, groups, slug, title, names, caption)
    return found


def agreement(study: Study, groups: Sequence[Group]) -> list[Figure]:
    """Mean cosine between task gradients, and the share of pairs in conflict, of the rules that compare gradients."""
    names = {"cosine_mean": "mean cosine of the pairs of tasks", "conflicts": "share of pairs with a cosine below 0"}
    caption = "Task gradients of the training batches, a point the mean of a window"
    return _by_setting(study, groups, "cosines", "Agreement of the task gradients", names, caption)


def weights(study: Study, groups: Sequence[Group]) -> list[Figure]:
    """The weights that the rules chose, where they change: a panel for each method, of its best setting."""
    deviations = len(study.tasks) <= 4  # of more lines they would hide each other
    order = [*ranked(groups), *(group for group in groups if group.criterion is None)]
    chosen: dict[str, tuple[Group, dict[str, Band]]] = {}
    for group in order:
        bands = {task: found for task in study.tasks if (found := _band(group, f"weight/{task}", False))}
        if any(np.ptp(found.mean_N) > 1e-3 * np.abs(found.mean_N).max() for found in bands.values()):
            chosen.setdefault(group.method, (group, bands))
    if not chosen:
        return []
    panels = tuple(
        _panel(method, [bands.get(task) for task in study.tasks], list(study.tasks), None, _starts(group), deviations)
        for method, (group, bands) in chosen.items()
    )
    seeds = max(len(group.runs) for group, _ in chosen.values())
    caption = "The weight of each task's loss, a point the mean of a window" + _over(
        next(iter(chosen.values()))[0], seeds, deviations
    )
    if len(chosen) < len(groups):
        caption += " Of each method the setting that is best on dev; methods whose weights do not change are left out."
    choice = "method" if len(panels) > MANY else ""
    return [Figure("weights", "Weights over time", caption, panels, tuple(study.tasks), choice)]


def _by_setting(
    study: Study, groups: Sequence[Group], slug: str, title: str, names: dict[str, str], caption: str
) -> list[Figure]:
    """A panel for each curve, a line for each setting; of many, the best, and the range of all behind them."""
    alone = len(groups) == 1
    bands = [(group, {name: found for name in names if (found := _band(group, name, alone))}) for group in groups]
    bands = [(group, found) for group, found in bands if found]
    if not bands:
        return []
    shown = bands
    if len(bands) > SERIES:
        best = [id(group) for group in ranked([group for group, _ in bands])] or [id(group) for group, _ in bands]
        shown = sorted((pair for pair in bands if id(pair[0]) in best[:BEST]), key=lambda pair: best.index(id(pair[0])))
        settings = formatting.count(len(bands), "setting")
        caption += f"; in colour the {len(shown)} of {settings} that are best on dev, grey the range of all"
    labels = formatting.labels([group for group, _ in shown], study.fields)
    panels = tuple(
        _panel(
            text,
            [found.get(name) for _, found in shown],
            labels,
            _range([found[name] for _, found in bands if name in found]) if len(bands) > len(shown) else None,
            _starts(shown[0][0]),
        )
        for name, text in names.items()
        if any(name in found for _, found in bands)
    )
    legend = tuple(labels) if len(bands) > 1 else ()
    caption += _over(shown[0][0], max(len(group.runs) for group, _ in shown))
    return [Figure(slug, title, caption, panels, legend)]


def _band(group: Group, name: str, alone: bool) -> Band | None:
    """A curve over the seeds; runs that diverged count only where there is nothing else to see."""
    runs = [run for run in group.runs if name in run.curves and (alone or not run.diverged)]
    return band([run.curves[name] for run in runs]) if runs else None


def _starts(group: Group) -> tuple[int, ...]:
    return group.runs[0].phases


def _over(group: Group, seeds: int, deviations: bool = True) -> str:
    """The end of a caption."""
    deviation = ", with one standard deviation" if deviations else ""
    mean = f"; mean over the seeds{deviation}" if seeds > 1 else ""
    return mean + (". A dotted line: a phase starts." if _starts(group) else ".")


def _range(bands: Sequence[Band]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, smallest and largest mean."""
    steps_N = np.unique(np.concatenate([found.steps_N for found in bands]))
    low_N, high_N = np.full(len(steps_N), np.inf), np.full(len(steps_N), -np.inf)
    for found in bands:
        at = np.searchsorted(steps_N, found.steps_N)
        low_N[at], high_N[at] = np.minimum(low_N[at], found.mean_N), np.maximum(high_N[at], found.mean_N)
    return steps_N, low_N, high_N


def _panel(title: str, bands: Sequence[Band | None], names: Sequence[str], *others: Any) -> Panel:
    """A panel of lines; says below it which of them lie on each other.

    Args:
        title: Of the panel.
        bands: As for _lines.
        names: Of the bands.
        *others: As for _lines.
    """
    numbers = [number for number, found in enumerate(bands) if found is not None]
    hidden = overlapping([(found.steps_N, found.mean_N) for found in bands if found is not None])
    told = [", ".join(names[numbers[place]] for place in members) for members in hidden]
    remark = f"On one line: {'; '.join(told)}." if told else ""
    return Panel(title, _lines(list(enumerate(bands)), *others), remark=remark)


class _lines:
    """Draws lines with their deviations, over the range of all, with the starts of phases.

    Args:
        bands: (number of the colour, curve); None leaves a colour out. Lines that lie on each other are dashed in turns.
        behind: Steps, low and high of what is shaded.
        starts: Steps at which a phase starts.
        deviations: Whether deviations are drawn.
    """

    def __init__(
        self,
        bands: Sequence[tuple[int, Band | None]],
        behind: tuple[np.ndarray, np.ndarray, np.ndarray] | None,
        starts: Sequence[int],
        deviations: bool = True,
    ):
        self.bands, self.behind, self.starts, self.deviations = bands, behind, starts, deviations

    def __call__(self, axes: Axes, palette: Palette) -> None:
        drawn = [(number, found) for number, found in self.bands if found is not None]
        turns = distinguish([(found.steps_N, found.mean_N) for _, found in drawn])
        for (number, found), turn in zip(drawn, turns, strict=True):
            color, dash = palette.series[number % SERIES], "--" if number // SERIES % 2 else "-"
            if self.deviations and found.sd_N.any():
                low_N, high_N = found.mean_N - found.sd_N, found.mean_N + found.sd_N
                axes.fill_between(found.steps_N, low_N, high_N, color=color, alpha=0.16, linewidth=0)
            axes.plot(found.steps_N, found.mean_N, **({"color": color, "linestyle": dash} | turn))
        if self.behind is not None:
            limits = axes.get_ylim()  # of the lines: among hundreds of settings some are far from everything
            axes.fill_between(*self.behind, color=palette.muted, alpha=0.18, linewidth=0, zorder=0.5)
            axes.set_ylim(*limits)
        for start in self.starts:
            axes.axvline(start, color=palette.muted, linestyle=":", linewidth=1)
        axes.set_xlabel("step")
