"""The tasks of an experiment ranked as sources for each other by every estimator that applies, with costs and advice."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from mtl_jax.affinity import copied_rows, task_features
from mtl_jax.affinity.advice import Advice, advise, starting_points
from mtl_jax.affinity.copied_rows import SourceCopies
from mtl_jax.affinity.estimators import ESTIMATORS, Estimator, reads
from mtl_jax.affinity.pair_tables import NotApplicable, Tables, input_of, tables, timed
from mtl_jax.affinity.ranking import Estimate, check_options, mean_places, ranked
from mtl_jax.affinity.task_features import TaskFeatures
from mtl_jax.affinity.task_groups import Group, Grouping, groups
from mtl_jax.core import log_lines
from mtl_jax.core.errors import UserError, count, listed
from mtl_jax.experiment import Experiment
from mtl_jax.training.setup import prepare

log = logging.getLogger(__name__)

OF_ROWS = ("features", "labels", "probabilities", "source_labels", "base_features")  # with an entry for each row
OF_TEXTS = ("texts", "tokens")  # with an entry for each text
RESAMPLES = 20
GAINS = "grad_tag"  # the estimator whose numbers are gains over training alone


class Affinity(NamedTuple):
    """Estimates of which tasks help which.

    Attributes:
        rankings: {target: {estimator: its sources, best first}}.
        places: {target: {source: its mean place over the estimators, from 0, first, to 1, last}}, best first.
        untrained: {target: {estimator: the estimate on the trunk before training}}, for estimators of features and labels: how
            well the trunk suits the target before training.
        advice: {target: how to train it with the source that is first by mean place}.
        notes: Lines on estimators that do not apply to tasks, and why.
        seconds: {estimator: seconds, intervals included}, after the seconds of the inputs.
        rows: {task: how many labelled rows were used, texts or words; or texts, if labels are neither classes nor numbers}.
        groups: The best groups of tasks for a budget of models, by the gains of grad_tag; None if none were asked for.
        copies: {target: {source: how many of its training rows have a text of the target}}, if there are any.
    """

    rankings: dict[str, dict[str, list[Estimate]]]
    places: dict[str, dict[str, float]]
    untrained: dict[str, dict[str, float]]
    advice: dict[str, Advice]
    notes: list[str]
    seconds: dict[str, float]
    rows: dict[str, int]
    copies: Mapping[str, Mapping[str, SourceCopies]] = MappingProxyType({})
    groups: Grouping | None = None

    def as_json(self) -> dict[str, Any]:
        """The same as nested dicts and lists."""
        rankings = {
            target: {name: [estimate._asdict() for estimate in estimates] for name, estimates in ranking.items()}
            for target, ranking in self.rankings.items()
        }
        advice = {target: advice._asdict() for target, advice in self.advice.items()}
        copies = {
            target: {source: copied._asdict() for source, copied in by_source.items()}
            for target, by_source in self.copies.items()
        }
        groups = None if self.groups is None else self.groups._asdict() | {"groups": [g._asdict() for g in self.groups.groups]}
        return {**self._asdict(), "rankings": rankings, "advice": advice, "copies": copies, "groups": groups}


def of_experiment(
    experiment: Experiment,
    target: str = "",
    estimators: Sequence[str] = (),
    *,
    rows: int = task_features.ROWS,
    layer: int = 0,
    runs: Sequence[str | Path] = (),
    models: int = 0,
    resamples: int = RESAMPLES,
    level: float = 0.9,
    seed: int = 0,
) -> Affinity:
    """Estimates how much each task of an experiment helps each other task, before they are trained together.

    The trunk is that of the experiment before training. A source's probabilities come from its finished run, if `runs` has one,
    else from a head that is fitted to its rows on this trunk. Estimators of a source's features need such runs, because
    features are the same for every source before training.

    Args:
        experiment: The experiment; its `only` chooses among its tasks.
        target: The task to be helped; empty: each task in turn.
        estimators: Names of ESTIMATORS; empty: all of them, including your own.
        rows: The most training rows of a task, chosen at random.
        layer: The layer whose features are read, from 1; 0: the trunk's output.
        runs: Workdirs of finished runs of tasks of the experiment, with its tokenizer.
        models: The most models to divide the tasks among, by the gains of grad_tag; 0: no groups.
        resamples: Half-samples of the target's texts for the intervals; 0: no intervals.
        level: The share of the half-samples inside an interval.
        seed: Seed of rows, half-samples and heads.

    Raises:
        UserError: The experiment, a name or a number is refused, or there are fewer than two tasks.

    Examples:
        >>> result = mtl_jax.affinity.of_experiment(EXPERIMENT, "fine", ["text_similarity", "leep"], rows=32)
        >>> [estimate.source for estimate in result.rankings["fine"]["leep"]]
        ['coarse']
    """
    log_lines.show()
    _check_models(models, target, runs, estimators)
    functions = {name: ESTIMATORS.find(name, "estimator") for name in dict.fromkeys(estimators or ESTIMATORS)}
    needs = {name: reads(name, function) for name, function in functions.items()}
    check_options(resamples, level)
    prepared = prepare(experiment)
    names = [task.name for task in prepared.corpus.tasks]
    targets = [task_features.task_of(prepared, target).name] if target else names
    if len(names) < 2:
        raise UserError(f"the experiment has one task, {names[0]}; a source and a target are needed")
    seconds: dict[str, float] = {}
    with timed(seconds, "copies"):
        source_of = {task.name: task.source for task in prepared.corpus.tasks}
        copies = copied_rows.source_copies(prepared.experiment.sources, source_of, prepared.corpus.splits, targets)
    inputs = {name for needed in needs.values() for name in needed}
    data = tables(prepared, inputs, targets, rows=rows, layer=layer, runs=runs, seed=seed)
    seconds |= data.seconds
    problems: list[Problem] = []
    rankings: dict[str, dict[str, list[Estimate]]] = {name: {} for name in targets}
    untrained: dict[str, dict[str, float]] = {name: {} for name in targets}
    for name in targets:
        for estimator, function in functions.items():
            with timed(seconds, estimator):
                value, refused = _untrained(estimator, function, needs[estimator], data.arrays[name], name)
                untrained[name] |= {} if value is None else {estimator: value}
                usable, missing = _usable(estimator, function, needs[estimator], name, data)
                problems += [*refused, *missing]
                if usable:
                    number = resamples if set(needs[estimator]) & {*OF_ROWS, *OF_TEXTS} else 0
                    texts = len(data.arrays[name].texts)
                    rankings[name][estimator] = ranked(usable, texts, resamples=number, level=level, seed=seed)
        log.info("sources of %s ranked by %s", name, count(len(rankings[name]), "estimator"))
    places = {name: mean_places(list(ranking.values())) for name, ranking in rankings.items() if ranking}
    sizes = {task.name: len(prepared.corpus.splits["train"][task.source].data) for task in prepared.corpus.tasks}
    advice = {}
    for name, place in places.items():
        first = next(iter(place))
        starts = starting_points(name, place, source_of)
        advice[name] = advise(name, first, sizes[name], sizes[first])._replace(starts=starts)
    used = {name: len(arrays.features) for name, arrays in data.arrays.items()}
    notes = [*_lines(problems), *([] if copies is not None else [copied_rows.TOO_MANY])]
    grouping, lines = _groups(rankings, models) if models else (None, [])
    return Affinity(rankings, places, untrained, advice, notes + lines, seconds, used, copies or {}, grouping)


def _check_models(models: int, target: str, runs: Sequence[str | Path], estimators: Sequence[str]) -> None:
    """Raises UserError, before any work, if groups are asked for but cannot be made."""
    if models < 0:
        raise UserError(f"models is {models}; it must be at least 1, or 0 for no groups")
    if models and (target or not runs or (estimators and GAINS not in estimators)):
        raise UserError(
            f"models is {models}: groups need the gains of {GAINS} for every target; give a finished run of all tasks in runs, "
            "and neither a target nor other estimators alone"
        )


def _groups(rankings: Mapping[str, Mapping[str, Sequence[Estimate]]], models: int) -> tuple[Grouping | None, list[str]]:
    """The groups, and lines on what they lack. A task without gains is a group by itself, one of the models."""
    names = list(rankings)
    gains = np.full((len(names), len(names)), np.nan)
    for column, target in enumerate(names):
        for estimate in rankings[target].get(GAINS, ()):
            gains[names.index(estimate.source), column] = estimate.value
    np.fill_diagonal(gains, 0.0)
    kept, lines = list(range(len(names))), []
    while np.isnan(among := gains[np.ix_(kept, kept)]).any():
        missing = np.isnan(among)
        worst = kept.pop(int((missing.sum(axis=0) + missing.sum(axis=1)).argmax()))
        lines.append(f"groups: {GAINS} lacks gains of {names[worst]} or from it, so it is a group by itself")
    budget = models - (len(names) - len(kept))
    if len(kept) < 2 or budget < 1:
        return None, [*lines, f"groups: none are made of {count(len(kept), 'task')} in {count(max(budget, 0), 'model')}"]
    grouping = groups(gains[np.ix_(kept, kept)], [names[number] for number in kept], budget)
    alone = [Group((name,), (name,)) for number, name in enumerate(names) if number not in kept]
    return grouping._replace(groups=(*grouping.groups, *alone)), lines


class Problem(NamedTuple):
    """An estimator that does not apply to tasks, and why."""

    estimator: str
    tasks: str
    reason: str


def _untrained(
    estimator: str, function: Estimator, needed: Sequence[str], arrays: TaskFeatures, target: str
) -> tuple[float | None, list[Problem]]:
    """The estimate of an estimator of features and labels on the trunk before training; None if there is none."""
    if not set(needed) <= {"features", "labels"} or arrays.labels is None:
        return None, []
    inputs = {"features": arrays.features, "labels": arrays.labels}
    try:
        return _number(estimator, function(**{name: inputs[name] for name in needed})), []
    except UserError as error:
        return None, [Problem(estimator, target, _reason(estimator, error))]


def _usable(
    estimator: str, function: Estimator, needed: Sequence[str], target: str, data: Tables
) -> tuple[dict[str, Callable[[np.ndarray], float]], list[Problem]]:
    """{source: a function from indices of the target's texts to the estimate}; sources that it refuses become problems."""
    usable: dict[str, Callable[[np.ndarray], float]] = {}
    problems: list[Problem] = []
    for source in data.tasks:
        if source == target:
            continue
        try:
            inputs = {name: input_of(name, source, target, data) for name in needed}
            whole = _number(estimator, function(**inputs))
        except NotApplicable as error:
            problems.append(Problem(estimator, error.tasks, error.reason))
        except UserError as error:
            problems.append(Problem(estimator, target, _reason(estimator, error)))
        else:
            usable[source] = functools.partial(_on_texts, function, inputs, data.arrays[target], whole)
    return usable, problems


def _on_texts(function: Estimator, inputs: Mapping[str, Any], arrays: TaskFeatures, whole: float, texts: np.ndarray) -> float:
    """The estimate on some texts of the target and their rows; `whole`, which is known, on all of them."""
    if len(texts) == len(arrays.texts):
        return whole
    rows = np.flatnonzero(np.isin(arrays.text_of_row, texts))
    chosen = {
        name: value[rows] if name in OF_ROWS else _picked(value, texts) if name in OF_TEXTS else value
        for name, value in inputs.items()
    }
    return float(function(**chosen))


def _picked(values: Any, texts: np.ndarray) -> Any:
    return values[texts] if isinstance(values, np.ndarray) else [values[text] for text in texts]


def _number(estimator: str, value: Any) -> float:
    """The result of an estimator as a float; raises UserError if it is not a number."""
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{estimator}: it returned a {type(value).__name__}; an estimator must return one number") from error


def _reason(estimator: str, error: UserError) -> str:
    return str(error).removeprefix(f"{estimator}: ")


def _lines(problems: Sequence[Problem]) -> list[str]:
    """A line for each reason: the estimators, the tasks, and why."""
    by_reason: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for problem in problems:
        estimators, tasks = by_reason.setdefault(problem.reason, ({}, {}))
        estimators[problem.estimator] = tasks[problem.tasks] = None
    return [f"{', '.join(estimators)}: {listed(tasks)}: {reason}" for reason, (estimators, tasks) in by_reason.items()]


def table(result: Affinity, shown: int = 3) -> str:
    """The rankings as text: copies, a table for each target with a row for each estimator, advice and notes.

    Args:
        result: The result of of_experiment().
        shown: The number of sources in a row.
    """
    import tabulate

    copied = copied_rows.lines(result.copies)
    parts = ["\n".join(copied)] if copied else []
    for target, ranking in result.rankings.items():
        rows = [
            [name, *(_cell(estimate) for estimate in estimates[:shown]), *[""] * (shown - len(estimates))]
            for name, estimates in ranking.items()
        ]
        places = result.places.get(target, {})
        cells = [f"{source} {place:.2f}" for source, place in list(places.items())[:shown]]
        rows += [["mean place", *cells, *[""] * (shown - len(cells))]] if places else []
        headers = [f"target {target}", *(f"source {number}" for number in range(1, shown + 1))]
        parts += [tabulate.tabulate(rows, headers, tablefmt="github", disable_numparse=True)] if rows else []
        if untrained := result.untrained[target]:
            values = ", ".join(f"{name} {value:.4g}" for name, value in untrained.items())
            parts.append(f"{target} on the trunk before training: {values}")
        if target in result.advice:
            advice = result.advice[target]
            lines = [f"{target} with {advice.source}, {advice.way}:", *(f"  {flags}" for flags in advice.flags)]
            if advice.starts:
                lines += [f"{target} with the sources of the first half, by weights or by shares of rows:"]
                lines += [f"  {flags}" for flags in advice.starts]
            parts.append("\n".join(lines))
    if result.groups is not None:
        lines = ["groups of tasks by the gains of grad_tag, a training each:"]
        lines += [f"  --only {' '.join(group.trained)}  (for {', '.join(group.served)})" for group in result.groups.groups]
        parts.append("\n".join([*lines, *([result.groups.note] if result.groups.note else [])]))
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in result.seconds.items())
    return "\n\n".join([*parts, *(["\n".join(result.notes)] if result.notes else []), f"seconds: {seconds}"])


def _cell(estimate: Estimate) -> str:
    interval = f" [{estimate.low:.3g}, {estimate.high:.3g}]" if np.isfinite(estimate.low) else ""
    return f"{estimate.source} {estimate.value:.3g}{interval}"
