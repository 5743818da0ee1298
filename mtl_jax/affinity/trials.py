"""How good estimators are: their rankings of sources, compared with the scores that the targets really reached.

A trial is a target with a seed: its measured score with each source, and the estimates from before training. Regrets, nDCG and
rank correlations are averaged over targets, with bootstrap intervals over targets and seeds.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mtl_jax.affinity.ranking import ndcg, regret, spearman
from mtl_jax.core.errors import UserError, count

REGRETS = ("regret@1", "regret@3")
MEASURES: Mapping[str, Callable[[Mapping[str, float], Mapping[str, float]], float]] = {
    "regret@1": functools.partial(regret, k=1),
    "regret@3": functools.partial(regret, k=3),
    "nDCG": ndcg,
    "Spearman": spearman,
}
PENALTIES = np.logspace(-4, 1, 11)  # of the combination, over the number of scores that it is fitted to
PRIOR = "other targets"  # the estimator that reads no row of the target: see other_targets()


@dataclasses.dataclass(frozen=True)
class Trial:
    """A target with one seed.

    Attributes:
        target: The target.
        setting: Another property that distinguishes trials of a target, such as its number of rows.
        seed: The seed.
        scores: {source: the target's score with it}.
        estimates: {estimator: {source: its estimate}}; a source may be missing.
    """

    target: str
    setting: str
    seed: int
    scores: Mapping[str, float]
    estimates: Mapping[str, Mapping[str, float]]


class Measured(NamedTuple):
    """A measure of an estimator.

    Attributes:
        value: Its mean over targets.
        low: The lower end of the bootstrap interval.
        high: The upper end.
        targets: The number of targets for which there are estimates.
    """

    value: float
    low: float
    high: float
    targets: int


def measure(
    trials: Sequence[Trial], *, resamples: int = 1000, level: float = 0.9, seed: int = 0
) -> dict[str, dict[str, Measured]]:
    """{estimator: {measure: its mean over targets}}, for the measures regret@1, regret@3, nDCG and Spearman.

    The truth is the mean of a target's scores over seeds. Every seed's estimates are compared with it, and the measures are
    averaged over seeds, settings and targets. A source without an estimate comes last. A target without any estimate of an
    estimator does not count for it; nor do regrets if no score is above 0.

    Args:
        trials: Trials of targets, all with the same seeds.
        resamples: Bootstraps over targets and over seeds, both drawn with replacement; 0: no intervals.
        level: The share of bootstraps inside an interval.
        seed: Seed of the bootstraps.

    Raises:
        UserError: There is no trial, a target lacks a seed, or as regret().

    References:
        Poth et al., 2021, What to Pre-Train on? Efficient Intermediate Task Selection, https://arxiv.org/abs/2104.08247

    Examples:
        >>> trial = mtl_jax.affinity.Trial("a", "", 0, {"b": 0.9, "c": 0.6}, {"leep": {"b": -1.0, "c": -0.5}})
        >>> round(mtl_jax.affinity.measure([trial])["leep"]["regret@1"].value, 3)
        0.333
    """
    by_target, seeds = _grouped(trials)
    names = list(dict.fromkeys(name for trial in trials for name in trial.estimates))
    values: dict[tuple[int, ...], np.ndarray] = {}

    def table(drawn: Iterable[int]) -> np.ndarray:
        """f64[estimators, measures, targets] for the seeds that a bootstrap has drawn, in any order."""
        key = tuple(sorted(drawn))
        if key not in values:
            values[key] = np.stack([_of_target(cases, key, names) for cases in by_target.values()], axis=-1)
        return values[key]

    whole = table(seeds)
    random = np.random.default_rng(seed)
    draws = np.full((resamples, *whole.shape[:2]), math.nan)
    for number in range(resamples):
        chosen = table(random.choice(seeds, len(seeds)).tolist())[..., random.integers(len(by_target), size=len(by_target))]
        draws[number] = _mean(chosen)
    result: dict[str, dict[str, Measured]] = {}
    for row, name in enumerate(names):
        for column, what in enumerate(MEASURES):
            known = draws[np.isfinite(draws[:, row, column]), row, column]
            ends = np.quantile(known, [(1 - level) / 2, (1 + level) / 2]) if len(known) else (math.nan, math.nan)
            targets = int(np.isfinite(whole[row, column]).sum())
            measured = Measured(float(_mean(whole[row, column])), float(ends[0]), float(ends[1]), targets)
            result.setdefault(name, {})[what] = measured
    return result


def _grouped(trials: Sequence[Trial]) -> tuple[dict[str, list[Trial]], list[int]]:
    """{target: its trials}, and the seeds.

    Raises:
        UserError: There is no trial, or a target lacks a seed.
    """
    if not trials:
        raise UserError("there are no trials to measure")
    seeds = sorted({trial.seed for trial in trials})
    by_target: dict[str, list[Trial]] = {}
    for trial in trials:
        by_target.setdefault(trial.target, []).append(trial)
    for target, cases in by_target.items():
        for setting in {trial.setting for trial in cases}:
            missing = set(seeds) - {trial.seed for trial in cases if trial.setting == setting}
            if missing:
                raise UserError(f"target {target!r}: setting {setting!r} has no trial with seed {min(missing)}, as others have")
    return by_target, seeds


def _truth(cases: Iterable[Trial], seeds: Sequence[int]) -> dict[str, float]:
    """{source: the mean score over seeds, a seed counted as often as it was drawn}, of trials in one setting."""
    by_seed = {trial.seed: trial.scores for trial in cases}
    return {source: float(np.mean([by_seed[seed][source] for seed in seeds])) for source in by_seed[seeds[0]]}


def _of_target(cases: Sequence[Trial], seeds: Sequence[int], names: Sequence[str]) -> np.ndarray:
    """f64[estimators, measures], averaged over a target's settings and the seeds."""
    parts = []
    for setting in dict.fromkeys(trial.setting for trial in cases):
        trial_of_seed = {trial.seed: trial for trial in cases if trial.setting == setting}
        truth = _truth(trial_of_seed.values(), seeds)
        by_seed = {
            seed: [_measures(trial_of_seed[seed].estimates.get(name, {}), truth) for name in names] for seed in set(seeds)
        }
        parts += [by_seed[seed] for seed in seeds]
    return np.asarray(_mean(np.moveaxis(np.array(parts), 0, -1)))


def _measures(estimates: Mapping[str, float], truth: Mapping[str, float]) -> list[float]:
    if not any(math.isfinite(value) for value in estimates.values()):
        return [math.nan] * len(MEASURES)
    complete = {source: estimates.get(source, math.nan) for source in truth}
    shares = max(truth.values()) > 0
    return [function(complete, truth) if shares or what not in REGRETS else math.nan for what, function in MEASURES.items()]


def _mean(values: np.ndarray) -> np.ndarray:
    """The mean of the finite numbers of the last axis; NaN where there are none."""
    known = np.isfinite(values)
    total, number = np.where(known, values, 0).sum(axis=-1), known.sum(axis=-1)
    return np.divide(total, number, out=np.full(total.shape, math.nan), where=number > 0)


def other_targets(trials: Sequence[Trial]) -> list[Trial]:
    """The trials with the estimator "other targets": how much a source helped the other targets, on average.

    A target's scores are standardised over its sources first. It reads no row of the target, so every other estimator should
    be better.

    Args:
        trials: As for measure(); at least two targets.

    Raises:
        UserError: As measure(), or there is one target.
    """
    by_target, seeds = _grouped(trials)
    _check_targets(by_target)
    result = []
    for trial in trials:
        prior = _prior({name: cases for name, cases in by_target.items() if name != trial.target}, seeds)
        known = {source: prior.get(source, math.nan) for source in trial.scores}
        result.append(dataclasses.replace(trial, estimates={**trial.estimates, PRIOR: known}))
    return result


def _prior(by_target: Mapping[str, Sequence[Trial]], seeds: Sequence[int]) -> dict[str, float]:
    parts: dict[str, list[float]] = {}
    for cases in by_target.values():
        for setting in dict.fromkeys(trial.setting for trial in cases):
            truth = _truth([trial for trial in cases if trial.setting == setting], seeds)
            for source, value in zip(truth, _standardised(truth.values()), strict=True):
                parts.setdefault(source, []).append(float(value))
    return {source: float(np.mean(values)) for source, values in parts.items()}


def combined(trials: Sequence[Trial], name: str = "combination", estimators: Sequence[str] = ()) -> list[Trial]:
    """The trials with one more estimator: a linear combination of the others, fitted on the other targets.

    Within a trial, estimates and scores are standardised over its sources, and a missing estimate counts as the mean. The
    weights are those of ridge regression from estimates to scores on all trials of all other targets. The penalty is the one
    that predicts best when each of these targets is left out in turn. So only the estimates of a target are read.

    Args:
        trials: As for measure(); at least three targets.
        name: The name of the combination.
        estimators: The estimators that are combined; empty: all.

    Raises:
        UserError: As measure(), or there are fewer than three targets.
    """
    by_target, seeds = _grouped(trials)
    _check_targets(by_target, 3)
    names = list(estimators or dict.fromkeys(key for trial in trials for key in trial.estimates))
    truths = {
        (target, setting): _truth([trial for trial in cases if trial.setting == setting], seeds)
        for target, cases in by_target.items()
        for setting in {trial.setting for trial in cases}
    }
    inputs = [_features(trial, names) for trial in trials]
    outputs = [_standardised(truths[trial.target, trial.setting][source] for source in trial.scores) for trial in trials]
    # Sums over trials of one target: those of any set of targets are then at hand.
    moments = {
        target: [
            np.sum([a.T @ b for a, b, trial in zip(inputs, values, trials, strict=True) if trial.target == target], axis=0)
            for values in (inputs, [output[:, None] for output in outputs])
        ]
        for target in by_target
    }
    sizes = {target: sum(len(trial.scores) for trial in cases) for target, cases in by_target.items()}

    def weights(targets: Sequence[str], penalty: float) -> np.ndarray:
        square, product = (np.sum([moments[target][part] for target in targets], axis=0) for part in (0, 1))
        scores = sum(sizes[target] for target in targets)
        return np.linalg.solve(square + penalty * scores * np.eye(len(names)), product)[:, 0]

    def error(targets: Sequence[str], penalty: float) -> float:
        total = 0.0
        for left_out in targets:
            fitted = weights([target for target in targets if target != left_out], penalty)
            total += float(fitted @ moments[left_out][0] @ fitted - 2 * fitted @ moments[left_out][1][:, 0]) / sizes[left_out]
        return total

    fitted = {}
    for target in by_target:
        others = [other for other in by_target if other != target]
        fitted[target] = weights(others, min(PENALTIES, key=functools.partial(error, others)))
    return [
        dataclasses.replace(
            trial,
            estimates={
                **trial.estimates,
                name: dict(zip(trial.scores, (features @ fitted[trial.target]).tolist(), strict=True)),
            },
        )
        for trial, features in zip(trials, inputs, strict=True)
    ]


def _features(trial: Trial, names: Sequence[str]) -> np.ndarray:
    """f64[sources, estimators], standardised over sources."""
    columns = [_standardised(trial.estimates.get(name, {}).get(source, math.nan) for source in trial.scores) for name in names]
    return np.stack(columns, axis=1)


def _standardised(values: Iterable[float]) -> np.ndarray:
    """Values standardised by the mean and standard deviation of the finite ones; 0 for others, and if all are equal."""
    array = np.array(list(values), np.float64)
    known = np.isfinite(array)
    spread = array[known].std() if known.any() else 0.0
    if spread <= 1e-12 * np.abs(array[known]).max(initial=0.0):
        return np.zeros_like(array)
    return np.where(known, (array - array[known].mean()) / spread, 0.0)


def _check_targets(by_target: Mapping[str, Sequence[Trial]], least: int = 2) -> None:
    if len(by_target) < least:
        raise UserError(f"there are trials of {count(len(by_target), 'target')}; at least {least} are needed to leave one out")
