"""Figures over the steps: learning curves, weights, and agreement of task gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from mtl_jax.core.plotting import distinguish, overlapping
from mtl_jax.reporting import formatting
from mtl_jax.reporting.render import SERIES, Figure, Palette, Panel
from mtl_jax.reporting.series import Band, band
from mtl_jax.reporting.statistics import Group, ranked
from mtl_jax.reporting.study import Study

BEST = 5  # settings that are drawn in colour where there are more than SERIES
MANY = 6  # most panels that are shown at once; of more, the reader chooses one


def learning(study: Study, groups: Sequence[Group]) -> list[Figure]:
    """Dev metric and training loss of every task over the steps."""
    kinds = [
        ("learning", "Learning curves on dev", "dev", "{task}: dev {metric}", "Metrics on dev while training"),
        (
            "loss",
            "Training loss",
            "loss",
            "{task}: training loss",
            "Losses of the training batches, each point the mean of a window",
        ),
    ]
    drawn = []
    for slug, title, kind, panel_title, caption in kinds:
        names = {f"{kind}/{task}": panel_title.format(task=task, metric=metric) for task, metric in study.tasks.items()}
        drawn += _by_setting(study, groups, slug, title, names, caption)
    return drawn


def agreement(study: Study, groups: Sequence[Group]) -> list[Figure]:
    """Mean cosine between task gradients and the share of pairs in conflict, for rules that compare gradients."""
    names = {"cosine_mean": "mean cosine of the pairs of tasks", "conflicts": "share of pairs with a cosine below 0"}
    caption = "Task gradients of the training batches, each point the mean of a window"
    return _by_setting(study, groups, "cosines", "Agreement of the task gradients", names, caption)


def weights(study: Study, groups: Sequence[Group]) -> list[Figure]:
    """The weights of rules that change them: a panel for each method, of its best setting."""
    deviations = len(study.tasks) <= 4  # those of more lines would hide each other
    order = [*ranked(groups), *(group for group in groups if group.criterion is None)]
    chosen: dict[str, tuple[Group, dict[str, Band]]] = {}
    for group in order:
        bands = {task: curve for task in study.tasks if (curve := _band(group, f"weight/{task}", False))}
        if any(np.ptp(curve.mean_N) > 1e-3 * np.abs(curve.mean_N).max() for curve in bands.values()):
            chosen.setdefault(group.method, (group, bands))
    if not chosen:
        return []
    panels = tuple(
        _panel(method, [bands.get(task) for task in study.tasks], list(study.tasks), None, _starts(group), deviations)
        for method, (group, bands) in chosen.items()
    )
    seeds = max(len(group.runs) for group, _ in chosen.values())
    caption = "The weight of each task's loss, each point the mean of a window" + _over(
        next(iter(chosen.values()))[0], seeds, deviations
    )
    if len(chosen) < len(groups):
        caption += " Each method with its setting that is best on dev; methods with constant weights are left out."
    choice = "method" if len(panels) > MANY else ""
    return [Figure("weights", "Weights over time", caption, panels, tuple(study.tasks), choice)]


def _by_setting(
    study: Study, groups: Sequence[Group], slug: str, title: str, names: dict[str, str], caption: str
) -> list[Figure]:
    """A panel for each curve, a line for each setting; of many settings the best, and the range of all behind them."""
    alone = len(groups) == 1
    bands = [(group, {name: curve for name in names if (curve := _band(group, name, alone))}) for group in groups]
    bands = [(group, curves) for group, curves in bands if curves]
    if not bands:
        return []
    shown = bands
    if len(bands) > SERIES:
        best = [id(group) for group in ranked([group for group, _ in bands])] or [id(group) for group, _ in bands]
        shown = sorted((pair for pair in bands if id(pair[0]) in best[:BEST]), key=lambda pair: best.index(id(pair[0])))
        settings = formatting.count(len(bands), "setting")
        caption += f"; colour shows the {len(shown)} of {settings} that are best on dev, grey the range of all"
    labels = formatting.labels([group for group, _ in shown], study.fields)
    panels = tuple(
        _panel(
            text,
            [curves.get(name) for _, curves in shown],
            labels,
            _range([curves[name] for _, curves in bands if name in curves]) if len(bands) > len(shown) else None,
            _starts(shown[0][0]),
        )
        for name, text in names.items()
        if any(name in curves for _, curves in bands)
    )
    legend = tuple(labels) if len(bands) > 1 else ()
    caption += _over(shown[0][0], max(len(group.runs) for group, _ in shown))
    return [Figure(slug, title, caption, panels, legend)]


def _band(group: Group, name: str, alone: bool) -> Band | None:
    """A curve over the seeds; runs that diverged count only if there is a single setting."""
    runs = [run for run in group.runs if name in run.curves and (alone or not run.diverged)]
    return band([run.curves[name] for run in runs]) if runs else None


def _starts(group: Group) -> tuple[int, ...]:
    return group.runs[0].phases


def _over(group: Group, seeds: int, deviations: bool = True) -> str:
    """The end of a caption: the mean over the seeds, and the marks of phases."""
    deviation = ", with one standard deviation" if deviations else ""
    mean = f"; mean over the seeds{deviation}" if seeds > 1 else ""
    return mean + (". A dotted line marks the start of a phase." if _starts(group) else ".")


def _range(bands: Sequence[Band]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, and the smallest and largest mean at each."""
    steps_N = np.unique(np.concatenate([curve.steps_N for curve in bands]))
    low_N, high_N = np.full(len(steps_N), np.inf), np.full(len(steps_N), -np.inf)
    for curve in bands:
        at = np.searchsorted(steps_N, curve.steps_N)
        low_N[at], high_N[at] = np.minimum(low_N[at], curve.mean_N), np.maximum(high_N[at], curve.mean_N)
    return steps_N, low_N, high_N


def _panel(title: str, bands: Sequence[Band | None], names: Sequence[str], *others: Any) -> Panel:
    """A panel of lines, with a remark below it on lines that hide each other.

    Args:
        title: Title of the panel.
        bands: The curve of each colour; None leaves a colour out.
        names: Names of the curves.
        *others: The other arguments of _Lines.
    """
    numbers = [number for number, curve in enumerate(bands) if curve is not None]
    hidden = overlapping([(curve.steps_N, curve.mean_N) for curve in bands if curve is not None])
    groups = [", ".join(names[numbers[i]] for i in group) for group in hidden]
    remark = f"On one line: {'; '.join(groups)}." if groups else ""
    return Panel(title, _Lines(list(enumerate(bands)), *others), remark=remark)


class _Lines:
    """Draws lines with their deviations, the range of all settings behind them, and the starts of phases.

    Args:
        bands: (number of the colour, curve); None leaves a colour out. Lines that hide each other get alternating dashes.
        behind: Steps, low and high values of a shaded range; None: no range.
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
        drawn = [(number, curve) for number, curve in self.bands if curve is not None]
        styles = distinguish([(curve.steps_N, curve.mean_N) for _, curve in drawn])
        for (number, curve), style in zip(drawn, styles, strict=True):
            color, dash = palette.series[number % SERIES], "--" if number // SERIES % 2 else "-"
            if self.deviations and curve.sd_N.any():
                low_N, high_N = curve.mean_N - curve.sd_N, curve.mean_N + curve.sd_N
                axes.fill_between(curve.steps_N, low_N, high_N, color=color, alpha=0.16, linewidth=0)
            axes.plot(curve.steps_N, curve.mean_N, **({"color": color, "linestyle": dash} | style))
        if self.behind is not None:
            limits = axes.get_ylim()  # those of the lines, because some of hundreds of settings are far away
            axes.fill_between(*self.behind, color=palette.muted, alpha=0.18, linewidth=0, zorder=0.5)
            axes.set_ylim(*limits)
        for start in self.starts:
            axes.axvline(start, color=palette.muted, linestyle=":", linewidth=1)
        axes.set_xlabel("step")
