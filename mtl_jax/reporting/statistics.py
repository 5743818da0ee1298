"""Statistics over runs: groups over seeds, Pareto fronts, methods by average relative change and rank."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import rankdata

from mtl_jax.reporting.study import SPLITS, Run, Study
from mtl_jax.training import results_table
from mtl_jax.training.run_settings import key


class Spread(NamedTuple):
    """Mean and standard deviation of n values (n - 1; None for a single value)."""

    mean: float
    sd: float | None
    n: int


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ only in the seed.

    Attributes:
        values: {varied field: value}.
        runs: The runs, in order.
        scores: {split: {task: {metric: Spread}}} over the finished runs; a run that diverged does not count.
        criterion: The dev criterion by which the experiment chooses checkpoints; None where one of its tasks was not trained.
    """

    values: Mapping[str, Any]
    runs: tuple[Run, ...]
    scores: Mapping[str, Mapping[str, Mapping[str, Spread]]]
    criterion: Spread | None

    @property
    def method(self) -> str:
        """The weighting rule."""
        return self.runs[0].method

    @property
    def weights(self) -> Mapping[str, float]:
        """{task: weight} if they are constant numbers, else empty."""
        return self.runs[0].weights

    def done(self) -> list[Run]:
        """The finished runs."""
        return [run for run in self.runs if run.done]

    def mean(self, task: str, metric: str, split: str = "test") -> float | None:
        """The mean of a metric over the seeds; None where no run has it."""
        scores = self.scores[split].get(task, {}).get(metric)
        return None if scores is None else scores.mean


@dataclasses.dataclass(frozen=True)
class Method:
    """A weighting rule in comparison with the others.

    Attributes:
        name: The rule.
        group: The runs of its setting that is best on dev.
        changes: {task: relative change of the mean test metric against the reference, in percent}.
        change: Mean over the tasks, with its spread over the seeds.
        ranks: {task: rank among the methods by the mean test metric}; 1 is the best, equal methods share the mean rank.
        rank: Mean of the ranks over the tasks.
    """

    name: str
    group: Group
    changes: Mapping[str, float]
    change: Spread | None
    ranks: Mapping[str, float]
    rank: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Methods, the best average relative change first.

    Attributes:
        methods: The methods.
        reference: A phrase that names the reference of the changes.
        left_out: Tasks without a relative change, because their reference is not above 0.
    """

    methods: tuple[Method, ...]
    reference: str
    left_out: tuple[str, ...]


def spread(values: Sequence[float]) -> Spread:
    """The spread of at least one value."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def ties(first: Spread, second: Spread) -> bool:
    """Whether two means cannot be told apart; see results_table.ties()."""
    return results_table.ties(first.mean - second.mean, first.sd, second.sd)


def leading(spreads: Iterable[Spread]) -> Spread | None:
    """The spread with the highest mean; None if there is none."""
    return max(spreads, key=lambda spread: spread.mean, default=None)


def groups(study: Study) -> tuple[Group, ...]:
    """The runs by the values of the varied fields, in the order in which these first occur."""
    by_values: dict[str, list[Run]] = {}
    for run in study.runs:
        by_values.setdefault(key(dict(run.values)), []).append(run)
    return tuple(_group(study, tuple(runs)) for runs in by_values.values())


def _group(study: Study, runs: tuple[Run, ...]) -> Group:
    done = [run for run in runs if run.done and run.scores]
    scores = {
        split: {
            task: {
                metric: spread(values)
                for metric in dict.fromkeys(metric for run in done for metric in run.scores[split].get(task, {}))
                if (values := _finite(run.scores[split].get(task, {}).get(metric) for run in done))
            }
            for task in study.tasks
            if any(task in run.scores[split] for run in done)
        }
        for split in SPLITS
    }
    values = _finite(criterion(study, run) for run in done)
    return Group(runs[0].values, runs, scores, spread(values) if values else None)


def _finite(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and np.isfinite(value)]


def criterion(study: Study, run: Run) -> float | None:
    """The dev criterion of a run's best checkpoint; None where it is not known."""
    dev = run.scores.get("dev", {})
    name, _, metric = study.criterion.partition("/")
    metrics = study.tasks if name == "mean" else {name: metric or study.tasks.get(name, "")}
    values = [dev.get(task, {}).get(metric) for task, metric in metrics.items()]
    present = [value for value in values if value is not None]
    complete = present and len(present) == len(values) and np.isfinite(present).all()
    return statistics.fmean(present) if complete else None


def ranked(groups: Sequence[Group]) -> list[Group]:
    """The groups with a criterion, the best first."""
    pairs = [(group.criterion.mean, group) for group in groups if group.criterion is not None]
    return [group for _, group in sorted(pairs, key=lambda pair: -pair[0])]


def pareto(points_NxD: np.ndarray) -> np.ndarray:
    """The points bool[N] on the Pareto front, where higher is better.

    A point is dominated if another is at least as high in all D coordinates and higher in one. Equal points do not
    dominate each other.
    """
    no_worse_NxN = (points_NxD[:, None] >= points_NxD[None]).all(axis=-1)
    better_NxN = (points_NxD[:, None] > points_NxD[None]).any(axis=-1)
    return np.logical_not((no_worse_NxN & better_NxN).any(axis=0))


def relative_change(scores: Mapping[str, float], reference: Mapping[str, float]) -> float:
    """The mean over tasks of the relative change, in percent (Delta_m of Maninis et al. 2019).

    Args:
        scores: {task: metric}, higher is better.
        reference: {task: the metric of the reference}, above 0; the mean is over these tasks.
    """
    return statistics.fmean(100 * (scores[task] / value - 1) for task, value in reference.items())


def compare(study: Study, groups: Sequence[Group]) -> Comparison | None:
    """Compares the methods, each with its setting that is best on dev; None for fewer than two methods.

    The reference is the first of these that is available: each task trained alone; the method equal; the linear probe, then the
    constant prediction, where they are above 0 for all tasks; the mean over the methods.
    """
    best: dict[str, Group] = {}
    for group in ranked(groups):
        if len(group.scores["test"]) == len(study.tasks):
            best.setdefault(group.method, group)
    if len(best) < 2:
        return None
    tests = {name: {task: group.mean(task, metric) for task, metric in study.tasks.items()} for name, group in best.items()}
    complete = {name: {task: value for task, value in test.items() if value is not None} for name, test in tests.items()}
    complete = {name: test for name, test in complete.items() if len(test) == len(study.tasks)}
    if not complete:  # every method has a metric that is not defined in any of its runs
        return None
    reference_name, reference = _reference(study, groups, complete)
    positive = {task: value for task, value in reference.items() if value > 0}
    ranks = {
        task: dict(zip(complete, rankdata([-test[task] for test in complete.values()]).tolist(), strict=True))
        for task in study.tasks
    }
    methods = [
        Method(
            name=name,
            group=best[name],
            changes={task: relative_change(test, {task: value}) for task, value in positive.items()},
            change=_change(study, best[name], positive),
            ranks={task: ranks[task][name] for task in study.tasks},
            rank=statistics.fmean(ranks[task][name] for task in study.tasks),
        )
        for name, test in complete.items()
    ]
    methods.sort(key=lambda method: (-method.change.mean if method.change else 0.0, method.rank, method.name))
    return Comparison(tuple(methods), reference_name, tuple(task for task in study.tasks if task not in positive))


def _change(study: Study, group: Group, reference: Mapping[str, float]) -> Spread | None:
    """The spread over the seeds of each run's average relative change against the reference."""
    scores = [{task: run.scores["test"][task][study.tasks[task]] for task in reference} for run in group.done()]
    changes = _finite(relative_change(run_scores, reference) for run_scores in scores if reference)
    return spread(changes) if changes else None


def _reference(
    study: Study, groups: Sequence[Group], methods: Mapping[str, Mapping[str, float]]
) -> tuple[str, dict[str, float]]:
    alone: dict[str, tuple[float, float]] = {}  # {task: (dev, test)} of the group that is best on dev
    for group in groups:
        (task, *others) = group.scores["test"] or ("",)
        if task and not others:
            dev, test = (group.mean(task, study.tasks[task], split) for split in SPLITS)
            if dev is not None and test is not None:
                alone[task] = max((dev, test), alone.get(task, (dev, test)), key=lambda pair: pair[0])
    if len(study.tasks) > 1 and alone.keys() == study.tasks.keys():
        return "each task trained alone", {task: alone[task][1] for task in study.tasks}
    if "equal" in methods:
        return "the method equal", dict(methods["equal"])
    baselines = next((run.baselines for run in study.runs if run.baselines.keys() == study.tasks.keys()), {})
    for kind, name in (("probe", "the linear probe"), ("constant", "the majority class or mean rating")):
        values = {task: baselines.get(task, {}).get(kind, {}).get(metric, 0.0) for task, metric in study.tasks.items()}
        if all(value > 0 for value in values.values()):
            return name, values
    return "the mean over the methods", {
        task: statistics.fmean(test[task] for test in methods.values()) for task in study.tasks
    }
