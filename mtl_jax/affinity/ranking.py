"""Sources in the order of an estimator, with intervals over the target's rows, and measures of how good such an order is.

The intervals come from half-samples: random halves of the rows, each row at most once. The variance of a mean over halves is
that of the bootstrap, but no row occurs twice: a copy would be its own nearest neighbour and count as more information.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mtl_jax.core.errors import UserError, unknown


class Estimate(NamedTuple):
    """A source's place in a ranking.

    Attributes:
        source: The source.
        value: The estimate on all rows; higher is better.
        low: The lower end of its interval; NaN without resampling.
        high: The upper end.
        first: The share of half-samples in which this source is the best one; NaN without resampling.
    """

    source: str
    value: float
    low: float
    high: float
    first: float


def ranked(
    estimators: Mapping[str, Callable[[np.ndarray], float]],
    rows: int,
    *,
    resamples: int = 100,
    level: float = 0.9,
    seed: int = 0,
) -> list[Estimate]:
    """Sources by their estimates, best first, with bootstrap intervals over the target's rows.

    All sources have the same half-samples. An interval is the estimate plus the quantiles of the half-samples' estimates around
    their mean, because the level of an estimate depends on the number of rows. A half-sample that an estimator refuses, such as
    one with a single class, is left out for that source; if more than half are left out, there is no interval.

    Args:
        estimators: {source: a function from the indices of rows, i[M], to the estimate}.
        rows: N, the target's rows.
        resamples: The number of half-samples; 0: no intervals.
        level: The share of the half-samples inside an interval, above 0 and below 1.
        seed: Seed of the half-samples.

    Raises:
        UserError: There is no source, an option is refused, or an estimator refuses all rows.

    References:
        Politis and Romano, 1994, Large Sample Confidence Regions Based on Subsamples under Minimal Assumptions,
        https://doi.org/10.1214/aos/1176325770
    """
    if not estimators:
        raise UserError("there is no source to rank")
    check_options(resamples, level)
    everything = np.arange(rows)
    values = {source: float(estimate(everything)) for source, estimate in estimators.items()}
    halves = half_samples(rows, resamples, seed)
    table_SxB = np.array([[_value(estimate, half) for half in halves] for estimate in estimators.values()])
    table_SxB = table_SxB.reshape(len(values), len(halves))
    first_S = _first(table_SxB)
    estimates = [
        Estimate(source, value, *_interval(value, table_SxB[number], level), float(first_S[number]))
        for number, (source, value) in enumerate(values.items())
    ]
    return sorted(estimates, key=lambda estimate: -estimate.value if math.isfinite(estimate.value) else math.inf)


def check_options(resamples: int, level: float) -> None:
    """Raises UserError if an option of ranked() is refused."""
    if resamples < 0:
        raise UserError(f"resamples is {resamples}; it must not be negative")
    if not 0 < level < 1:
        raise UserError(f"level is {level}; it must be above 0 and below 1")


def half_samples(rows: int, resamples: int, seed: int) -> list[np.ndarray]:
    """Random halves of N rows, ascending indices i64[(N + 1) // 2]; none if there are fewer than 4 rows."""
    random = np.random.default_rng(seed)
    return [np.sort(random.permutation(rows)[: (rows + 1) // 2]) for _ in range(resamples if rows >= 4 else 0)]


def _value(estimate: Callable[[np.ndarray], float], half: np.ndarray) -> float:
    try:
        return float(estimate(half))
    except UserError:
        return math.nan


def _interval(value: float, halves_B: np.ndarray, level: float) -> tuple[float, float]:
    known = halves_B[np.isfinite(halves_B)]
    if not len(known) or 2 * len(known) < len(halves_B) or not math.isfinite(value):
        return math.nan, math.nan
    low, high = np.quantile(known - known.mean(), [(1 - level) / 2, (1 + level) / 2])
    return value + float(low), value + float(high)


def _first(table_SxB: np.ndarray) -> np.ndarray:
    """f64[S], the share of half-samples that each source wins; sources that tie share one."""
    known = np.where(np.isfinite(table_SxB), table_SxB, -np.inf)
    known = known[:, np.isfinite(known).any(axis=0)]
    if not known.shape[1]:
        return np.full(len(table_SxB), math.nan)
    wins = known == known.max(axis=0)
    return (wins / wins.sum(axis=0)).mean(axis=1)


def order(estimates: Mapping[str, float], truth: Mapping[str, float]) -> list[str]:
    """Sources by estimate, best first; among equal estimates the source that helps least is first.

    So an estimator that cannot tell sources apart gets no credit for their accidental order.

    Args:
        estimates: {source: the estimate}; NaN comes last.
        truth: {source: the target's score with it}, of all these sources.

    Raises:
        UserError: A source has no truth, a truth is not finite, or there are none.
    """
    if not estimates:
        raise UserError("there are no estimates")
    for source in estimates:
        if source not in truth:
            raise unknown("source of an estimate:", source, truth)
        if not math.isfinite(truth[source]):
            raise UserError(f"the true score with source {source!r} is {truth[source]}; it must be a finite number")

    def key(source: str) -> tuple[float, float]:
        value = estimates[source]
        return (math.inf if math.isnan(value) else -value), truth[source]

    return sorted(estimates, key=key)


def regret(estimates: Mapping[str, float], truth: Mapping[str, float], k: int = 1) -> float:
    """Regret@k: how far the best of the first k sources is below the best of all, as a share of that; 0 is best.

    Args:
        estimates: {source: the estimate}.
        truth: {source: the target's score with it}; the best one above 0.
        k: How many sources are tried, at least 1.

    Raises:
        UserError: As order(); k is below 1, or the best score is not above 0.

    References:
        Renggli et al., 2022, https://arxiv.org/abs/2010.06402; Poth et al., 2021, https://arxiv.org/abs/2104.08247

    Examples:
        >>> mtl_jax.affinity.regret({"a": 3.0, "b": 2.0, "c": 1.0}, {"a": 0.75, "b": 1.0, "c": 0.5})
        0.25
    """
    if k < 1:
        raise UserError(f"k is {k}; it must be at least 1")
    names = order(estimates, truth)
    best = max(truth[name] for name in names)
    if best <= 0:
        raise UserError(f"the best true score is {best:g}; regret is a share of it, so it must be above 0")
    return float((best - max(truth[name] for name in names[:k])) / best)


def ndcg(estimates: Mapping[str, float], truth: Mapping[str, float], *, scaled: bool = True) -> float:
    """nDCG of a ranking, from 0 to 1: the sum of (2^relevance - 1) / log2(1 + rank), over that of the best order.

    Args:
        estimates: {source: the estimate}.
        truth: {source: the target's score with it}; at least 0 if it is not scaled.
        scaled: Whether the relevance is the score scaled to 0..1 over the sources. Else it is the score itself; scores of
            sources are often so close that any order is then near 1.

    Raises:
        UserError: As order(); or a score is negative and not scaled.

    References:
        Järvelin and Kekäläinen, 2002, https://doi.org/10.1145/582415.582418; for tasks: Vu et al., 2020,
        https://arxiv.org/abs/2005.00770
    """
    relevance = np.array([truth[name] for name in order(estimates, truth)], np.float64)
    if scaled:
        spread = np.ptp(relevance)
        relevance = (relevance - relevance.min()) / spread if spread > 0 else np.ones_like(relevance)
    elif relevance.min() < 0:
        raise UserError(f"a true score is {relevance.min():g}; without scaling it must be at least 0")
    discount = 1 / np.log2(np.arange(len(relevance)) + 2)
    gains = np.exp2(relevance) - 1
    ideal = float(np.sort(gains)[::-1] @ discount)
    return min(float(gains @ discount) / ideal, 1.0) if ideal > 0 else 1.0  # min: sums in another order


def spearman(estimates: Mapping[str, float], truth: Mapping[str, float]) -> float:
    """Spearman's rank correlation of estimates and truth; NaN if one of them is constant or there are fewer than 2 sources.

    Args:
        estimates: {source: the estimate}; NaN counts as the lowest.
        truth: {source: the target's score with it}.

    Raises:
        UserError: As order().
    """
    from scipy import stats

    names = order(estimates, truth)
    values = [-math.inf if math.isnan(estimates[name]) else estimates[name] for name in names]
    scores = [truth[name] for name in names]
    if len(set(values)) < 2 or len(set(scores)) < 2:
        return math.nan
    ranks = [stats.rankdata(numbers) for numbers in (values, scores)]
    return float(np.corrcoef(*ranks)[0, 1])


def mean_places(rankings: Sequence[Sequence[Estimate]]) -> dict[str, float]:
    """{source: its mean place over rankings, from 0, the first, to 1, the last}, best first; equal values share their places.

    A ranking of a single source says nothing, and counts only if there is no other.

    Args:
        rankings: For each estimator the result of ranked(); a source may be missing in some.

    Raises:
        UserError: There is no ranking.
    """
    from scipy import stats

    if not rankings:
        raise UserError("there are no rankings to average")
    places: dict[str, list[float]] = {}
    for ranking in [ranking for ranking in rankings if len(ranking) > 1] or rankings:
        values = [-estimate.value if math.isfinite(estimate.value) else math.inf for estimate in ranking]
        for estimate, rank in zip(ranking, stats.rankdata(values), strict=True):
            places.setdefault(estimate.source, []).append((float(rank) - 1) / max(len(ranking) - 1, 1))
    means = {source: float(np.mean(numbers)) for source, numbers in places.items()}
    return dict(sorted(means.items(), key=lambda item: item[1]))
