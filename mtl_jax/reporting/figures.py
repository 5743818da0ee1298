"""Figures over the settings: methods, metrics against a number, Pareto fronts, the simplex of three weights."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator
from matplotlib.tri import Triangulation

from mtl_jax.core.plotting import distinguish, overlapping
from mtl_jax.reporting import formatting
from mtl_jax.reporting.render import SERIES, Figure, Palette, Panel
from mtl_jax.reporting.statistics import Comparison, Group, Spread, pareto
from mtl_jax.reporting.study import Study

FAR = 6.0  # times the interquartile range; points further below the first quartile are left out
PHASE_WEIGHTS = re.compile(r"phases\.\d+\.weights")
NUMBERED = 12  # most points on a front that get numbers


def methods(comparison: Comparison) -> list[Figure]:
    """The average relative change of every method."""
    rows = [(method.name, method.change) for method in comparison.methods if method.change is not None]
    if not rows:
        return []

    low, high = _span(np.array([change.mean for _, change in rows]))
    low, high = min(low, 0.0), max(high, 0.0)

    def draw(axes: Axes, palette: Palette) -> None:
        axes.axvline(0, color=palette.muted, linewidth=1)
        for row, (_, change) in enumerate(rows):
            if change.mean < low:
                axes.plot(low - 0.04 * (high - low), row, "<", color=palette.series[0], markersize=5)
                axes.text(low, row, formatting.spread(change, 1), va="center", color=palette.ink, fontsize=9.5)
            else:
                axes.errorbar(change.mean, row, xerr=change.sd, fmt="o", color=palette.series[0], markersize=5, elinewidth=1.6)
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("average relative change, %")

    left = 0.25 + 0.085 * max(len(name) for name, _ in rows)  # inches, for the names
    panel = Panel(f"against {comparison.reference}", draw, height=max(1.4, 0.62 + 0.22 * len(rows)), left=left)
    caption = "Relative change of the test metric, averaged over the tasks; mean and standard deviation over the seeds."
    return [Figure("methods", "Average relative change", caption, (panel,))]


def against(study: Study, groups: Sequence[Group]) -> list[Figure]:
    """Test metric of every task against its weight, in the run or a phase, and against other fields of three numbers."""
    drawn = []
    for field, slug, where in _weights(study):
        shares = [(group, shares) for group in groups if (shares := _shares_of(study, group, field))]
        if len({tuple(by_task.items()) for _, by_task in shares}) > 2:
            others = [other for other in study.fields if other not in (field, "weighting")]
            drawn += _against(study, slug, f"weight{where}", shares, others, shares=True)
    for field in study.fields:
        numeric = [group for group in groups if isinstance(group.values.get(field), (int, float))]
        if len({group.values[field] for group in numeric}) > 2:
            values = [(group, dict.fromkeys(study.tasks, group.values[field])) for group in numeric]
            drawn += _against(study, field, field, values, [other for other in study.fields if other != field])
    return drawn


def _weights(study: Study) -> list[tuple[str, str, str]]:
    """(field, its name in a slug, the phase as text) of all weights: those of the run, and those of single phases."""
    phases = [field for field in study.fields if PHASE_WEIGHTS.fullmatch(field)]
    texts = [" in " + field.removesuffix(".weights").replace(".", " ") for field in phases]
    return [
        ("weights", "weights", ""),
        *((field, field.replace(".", "-"), text) for field, text in zip(phases, texts, strict=True)),
    ]


def _shares_of(study: Study, group: Group, field: str) -> dict[str, float]:
    """{task: share} of the weights in a field, if they are constant numbers and not all 0; else empty."""
    weights = group.weights if field == "weights" else group.values.get(field) or {}
    numbers = all(isinstance(weight, (int, float)) for weight in weights.values())
    if set(weights) != set(study.tasks) or not numbers or sum(weights.values()) <= 0:
        return {}
    return {task: weight / sum(weights.values()) for task, weight in weights.items()}


def _against(
    study: Study,
    slug: str,
    name: str,
    groups: Sequence[tuple[Group, Mapping[str, float]]],
    others: Sequence[str],
    shares: bool = False,
) -> list[Figure]:
    """A panel for each task over the x of each group; a colour for each value of the other fields."""
    by_other: dict[str, list[tuple[Group, Mapping[str, float]]]] = {}
    for group, x in ((group, x) for group, x in groups if group.scores["test"]):
        by_other.setdefault(formatting.setting(group.values, others), []).append((group, x))
    if len(by_other) > SERIES:  # more colours cannot be told apart
        by_other = {"": list(groups)}
    panels = []
    for task, metric in study.tasks.items():
        points = [
            [(x[task], scores) for group, x in members if (scores := group.scores["test"].get(task, {}).get(metric))]
            for members in by_other.values()
        ]
        if any(points):
            draw = _points(points, f"{name} of {task}" if shares else name, shares)
            hidden = [[list(by_other)[i] for i in lines] for lines in overlapping([_means(line) for line in points])]
            remark = f"On one line: {'; '.join(', '.join(names) for names in hidden)}." if hidden else ""
            panels.append(Panel(f"{task}: test {metric}", draw, remark=remark))
    caption = "A point is a setting, with mean and standard deviation over the seeds; the line joins the means at each value."
    if shares:
        caption = "Weights are shown as shares of their sum. " + caption
    legend = tuple(by_other) if len(by_other) > 1 else ()
    return [Figure(f"against-{slug}", f"Metric against {name}", caption, tuple(panels), legend)] if panels else []


def _means(points: Sequence[tuple[float, Spread]]) -> tuple[list[float], list[float]]:
    """The values of x in order, and the mean at each."""
    by_x: dict[float, list[float]] = {}
    for x, spread in sorted(points, key=lambda point: point[0]):
        by_x.setdefault(round(x, 9), []).append(spread.mean)
    return list(by_x), [float(np.mean(means)) for means in by_x.values()]


def _points(series: Sequence[Sequence[tuple[float, Spread]]], name: str, shares: bool) -> Callable[[Axes, Palette], None]:
    def draw(axes: Axes, palette: Palette) -> None:
        all_x = sorted({x for points in series for x, _ in points})
        lines = [_means(points) for points in series]
        for number, (points, line, style) in enumerate(zip(series, lines, distinguish(lines), strict=True)):
            color = palette.series[number]
            means, deviations = [spread.mean for _, spread in points], [spread.sd or 0.0 for _, spread in points]
            x_N = [x for x, _ in points]
            axes.errorbar(x_N, means, yerr=deviations, fmt="o", color=color, markersize=4, elinewidth=1, alpha=0.75)
            axes.plot(*line, color=color, linewidth=1.3, alpha=0.6, **style)
        if not shares and all_x[0] > 0 and all_x[-1] / all_x[0] >= 20:
            axes.set_xscale("log")
            if len(all_x) <= 5:
                axes.set_xticks(all_x, minor=False)
            axes.xaxis.set_major_formatter(lambda x, _: formatting.value(float(x)))
            axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(name)

    return draw


def fronts(study: Study, groups: Sequence[Group]) -> list[Figure]:
    """The Pareto front of every pair of tasks."""
    complete = [group for group in groups if all(group.mean(task, metric) is not None for task, metric in study.tasks.items())]
    if len(complete) < 3 or len(study.tasks) < 2:
        return []
    names = list(dict.fromkeys(group.method for group in complete))
    colors = {name: number for number, name in enumerate(names)} if 1 < len(names) <= SERIES else dict.fromkeys(names, 0)
    panels = tuple(_front(study, complete, pair, colors) for pair in itertools.combinations(study.tasks, 2))
    caption = (
        "Mean test metrics over the seeds; up and to the right is better. A numbered point is on the front: no other point "
        "is as good on both tasks and better on one."
    )
    legend = tuple(colors) if len(set(colors.values())) > 1 else ()
    return [Figure("pareto", "Pareto fronts", caption, panels, legend, "pair of tasks" if len(panels) > 3 else "")]


def _front(study: Study, groups: Sequence[Group], pair: tuple[str, str], colors: Mapping[str, int]) -> Panel:
    points_Nx2 = np.array([[group.mean(task, study.tasks[task]) for task in pair] for group in groups], np.float64)
    on_N = pareto(points_Nx2)
    order = sorted(np.flatnonzero(on_N).tolist(), key=lambda n: tuple(points_Nx2[n]))
    numbered = order if len(order) <= NUMBERED else []
    spans = [_span(points_Nx2[:, n]) for n in (0, 1)]
    outside = int(((points_Nx2[:, 0] < spans[0][0]) | (points_Nx2[:, 1] < spans[1][0])).sum())

    def draw(axes: Axes, palette: Palette) -> None:
        color_N = np.array([palette.series[colors[group.method]] for group in groups])
        for mask_N, size, alpha in ((~on_N, 20, 0.45), (on_N, 42, 1.0)):
            axes.scatter(
                points_Nx2[mask_N, 0], points_Nx2[mask_N, 1], s=size, c=color_N[mask_N], alpha=alpha, linewidths=0, zorder=3
            )
        axes.plot(*points_Nx2[order].T, color=palette.ink, linewidth=1, drawstyle="steps-pre", alpha=0.6, zorder=2)
        numbers_at: dict[tuple[float, float], list[str]] = {}  # equal points share a label
        for number, n in enumerate(numbered, 1):
            numbers_at.setdefault((points_Nx2[n, 0], points_Nx2[n, 1]), []).append(str(number))
        for point, numbers in numbers_at.items():
            axes.annotate(", ".join(numbers), point, (4, 4), textcoords="offset points", color=palette.ink, fontsize=9.5)
        for limits, span in ((axes.set_xlim, spans[0]), (axes.set_ylim, spans[1])):
            limits(span[0] - 0.08 * (span[1] - span[0]), span[1] + 0.1 * (span[1] - span[0]))
        axes.set_xlabel(f"{pair[0]} {study.tasks[pair[0]]}")

    labels = formatting.labels(groups, study.fields)
    notes = tuple(labels[n] for n in numbered)
    title = f"{pair[1]} {study.tasks[pair[1]]} over {pair[0]} {study.tasks[pair[0]]}"
    remark = f"{formatting.count(outside, 'setting')} further down or to the left not shown." if outside else ""
    return Panel(title, draw, notes, remark)


def simplex(study: Study, groups: Sequence[Group]) -> list[Figure]:
    """Test metric of every task, and the criterion, over the weights of three tasks, in the run or in a phase."""
    return [figure for field, slug, where in _weights(study) for figure in _simplex(study, groups, field, slug, where)]


def _simplex(study: Study, groups: Sequence[Group], field: str, slug: str, where: str) -> list[Figure]:
    weighted = [(group, shares) for group in groups if (shares := _shares_of(study, group, field))]
    by_weights: dict[tuple[tuple[str, float], ...], list[Group]] = {}
    for group, shares in weighted:
        by_weights.setdefault(tuple(shares.items()), []).append(group)
    if len(study.tasks) != 3 or len(by_weights) < 3:
        return []
    corners = tuple(weighted[0][1])
    panels = []
    for task, metric in study.tasks.items():
        means = {
            at: [mean for group in members if (mean := group.mean(task, metric)) is not None]
            for at, members in by_weights.items()
        }
        panels.append((f"{task}: test {metric}", means))
    criteria = {at: [g.criterion.mean for g in members if g.criterion] for at, members in by_weights.items()}
    panels.append(("dev criterion", criteria))
    drawn = tuple(
        Panel(title, _triangle(corners, {at: float(np.mean(values)) for at, values in means.items() if values}), frame=False)
        for title, means in panels
        if any(means.values())
    )
    averaged = " and over the other settings" if len(weighted) > len(by_weights) else ""
    caption = (
        f"A dot is a point that was trained, with its mean over the seeds{averaged}; values in between are linear. A corner is "
        "all weight on that task; the ring marks the best."
    )
    slug = "simplex" if field == "weights" else f"simplex-{slug}"
    return [Figure(slug, f"The simplex of weights{where}", caption, drawn)] if drawn else []


def _triangle(
    corners: tuple[str, ...], values: Mapping[tuple[tuple[str, float], ...], float]
) -> Callable[[Axes, Palette], None]:
    shares_Nx3 = np.array([[dict(at)[task] for task in corners] for at in values])
    x_N, y_N = shares_Nx3[:, 1] + shares_Nx3[:, 2] / 2, shares_Nx3[:, 2] * np.sqrt(3) / 2
    z_N = np.array(list(values.values()))

    def draw(axes: Axes, palette: Palette) -> None:
        low, high = float(z_N.min()), float(z_N.max())
        plane = np.linalg.matrix_rank(np.stack([x_N - x_N[0], y_N - y_N[0]]), tol=1e-6) == 2
        flat = high - low < 1e-9
        axes.plot([0, 1, 0.5, 0], [0, 0, np.sqrt(3) / 2, 0], color=palette.muted, linewidth=1, zorder=1)
        if plane and not flat:
            levels = np.linspace(low, high + 1e-6 * (high - low), 11)  # so that the highest point is below the last level
            axes.tricontourf(Triangulation(x_N, y_N), z_N, levels=levels, cmap="viridis", zorder=2)
        drawn = axes.scatter(
            x_N, y_N, c=z_N, cmap="viridis", vmin=low, vmax=high, s=26, edgecolors=palette.surface, linewidths=1, zorder=3
        )
        best = int(z_N.argmax())
        axes.plot(x_N[best], y_N[best], "o", markersize=11, markerfacecolor="none", markeredgecolor=palette.ink, zorder=4)
        axes.text(0, -0.05, corners[0], ha="left", va="top", color=palette.ink)
        axes.text(1, -0.05, corners[1], ha="right", va="top", color=palette.ink)
        axes.text(0.5, np.sqrt(3) / 2 + 0.05, corners[2], ha="center", va="bottom", color=palette.ink)
        axes.set_aspect("equal")
        axes.set_xlim(-0.06, 1.06)
        axes.set_ylim(-0.14, 1.0)
        if flat:
            return
        ticks = [low, (low + high) / 2, high]
        shades = np.linspace(low, high, 20)
        # The bar is a twentieth as wide as high; the rest of its fraction of the panel is for the labels.
        bar = axes.figure.colorbar(drawn, ax=axes, fraction=0.23, shrink=0.8, pad=0.02, values=shades, ticks=ticks)
        bar.ax.tick_params(color=palette.muted, labelcolor=palette.ink, length=3)
        bar.ax.set_yticklabels([f"{tick:.{3 if high - low >= 0.01 else 4}f}" for tick in ticks])
        bar.outline.set_visible(False)

    return draw


def _span(values_N: np.ndarray) -> tuple[float, float]:
    """Smallest and largest value, without a few far below, which would leave the others little room."""
    low, high = np.quantile(values_N, [0.25, 0.75])
    kept_N = values_N[values_N >= low - FAR * (high - low)]
    kept_N = values_N if len(kept_N) < 0.9 * len(values_N) else kept_N
    smallest, largest = float(kept_N.min()), float(kept_N.max())
    return (smallest, largest) if largest > smallest else (smallest - 0.01, largest + 0.01)
