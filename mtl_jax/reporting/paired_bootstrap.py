"""Intervals for the difference of two groups of runs on the same test rows, over rows and seeds. Plain numpy.

Rows: each resample draws as many rows as there are, the same for all runs (Efron and Tibshirani, 1993; Koehn, 2004), so that a
row that is hard for all of them widens no interval. Rows of one document or list are drawn together.

Seeds: each resample weighs the seeds of a group at random around their mean. Drawing two or three seeds with replacement would
give intervals that are far too short: with three seeds a side, 82 % of nominal 95 % intervals held the truth in a simulation
where seeds made most of the noise. Weights with the spread of Student's t have the right one: 94 %.

Shapes in names: N rows, U units, B resamples, S seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
AT_ONCE = 4_000_000  # counts of rows that are in memory together
HELPED, UNCLEAR, HURT, UNDEFINED = "helped", "unclear", "hurt", "undefined"


class Difference(NamedTuple):
    """A difference with its interval.

    Attributes:
        value: The difference of all rows and seeds; NaN where a metric is not defined.
        low: The lower end of its interval.
        high: The upper end.
    """

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """helped: the interval is above 0; hurt: below 0; unclear: it holds 0; undefined: there is no difference."""
        if not math.isfinite(self.value + self.low + self.high):
            return UNDEFINED
        return HELPED if self.low > 0 else HURT if self.high < 0 else UNCLEAR


def row_counts(units_N: np.ndarray, resamples: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """How often each resample has each row, f64[b, N], in parts of all the resamples that fit into memory.

    Args:
        units_N: The unit of each row, which is drawn as a whole, numbered from 0.
        resamples: B.
        rng: A generator.
    """
    rows, units = len(units_N), int(units_N.max(initial=-1)) + 1
    at_once = max(1, AT_ONCE // max(rows, 1))
    for start in range(0, resamples, at_once):
        part = min(at_once, resamples - start)
        drawn_bxU = rng.integers(units, size=(part, units)) + units * np.arange(part)[:, None]
        counts_bxU = np.bincount(drawn_bxU.ravel(), minlength=part * units).reshape(part, units)
        yield counts_bxU[:, units_N].astype(np.float64)


def seed_weights(seeds: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Random weights f64[B, S] of the seeds, each row with the sum 1; 1 where there is one seed.

    A weighted mean of numbers varies around their mean with the variance of that mean, s^2 / S. tails() adds the tails of
    Student's t.

    Args:
        seeds: S.
        resamples: B.
        rng: A generator.
    """
    if seeds == 1:
        return np.ones((resamples, 1))
    noise_BxS = rng.normal(size=(resamples, seeds))
    return (noise_BxS - noise_BxS.mean(axis=1, keepdims=True)) / math.sqrt(seeds * (seeds - 1)) + 1 / seeds


def tails(weights_BxS: np.ndarray, freedom: int, uniform_B: np.ndarray) -> np.ndarray:
    """Weights of seeds whose deviations from the mean have the tails of Student's t.

    Args:
        weights_BxS: As seed_weights() has them.
        freedom: Degrees of freedom: the seeds of both groups, less one for each group.
        uniform_B: A number from 0 to 1 for each resample, as of even(), which the groups and tasks share.
    """
    if not freedom:
        return weights_BxS
    factor_B = np.sqrt(freedom / stats.chi2.ppf(uniform_B, freedom))
    return 1 / weights_BxS.shape[1] + (weights_BxS - 1 / weights_BxS.shape[1]) * factor_B[:, None]


def even(resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Numbers from 0 to 1, f64[B], in random order and evenly spread, so that few resamples have steady tails."""
    return (rng.permutation(resamples) + 0.5) / resamples


def interval(value: float, resampled_B: np.ndarray, compared: int = 1) -> Difference:
    """A difference with its percentile interval; resamples in which it is not defined are left out.

    Args:
        value: The difference of all rows and seeds.
        resampled_B: That of each resample.
        compared: How many differences one was chosen from: the interval of the lowest of K is one of 1 - 0.05 / K (Bonferroni).
    """
    known = resampled_B[np.isfinite(resampled_B)]
    if not math.isfinite(value) or not len(known):
        return Difference(math.nan, math.nan, math.nan)
    tail = (1 - CONFIDENCE) / compared / 2
    low, high = np.quantile(known, [tail, 1 - tail])
    return Difference(value, float(low), float(high))


def differences(
    joint_SxB: np.ndarray, alone_SxB: np.ndarray, joint_weights_BxS: np.ndarray, alone_weights_BxS: np.ndarray
) -> np.ndarray:
    """The difference in each resample, f64[B].

    Args:
        joint_SxB: The metric of each joint run on each resample of the rows.
        alone_SxB: That of each run alone, on the same resamples.
        joint_weights_BxS: The weights of the joint runs in each resample.
        alone_weights_BxS: Those of the runs alone.
    """
    joint_B, alone_B = (
        (values_SxB * weights_BxS.T).sum(axis=0)
        for values_SxB, weights_BxS in ((joint_SxB, joint_weights_BxS), (alone_SxB, alone_weights_BxS))
    )
    return np.asarray(joint_B - alone_B)


def covered(joint: int, alone: Sequence[int]) -> str:
    """What the intervals cover, for the line below a table.

    Args:
        joint: Number of joint runs.
        alone: Numbers of runs alone, of each task.
    """
    if joint > 1 and min(alone) > 1:
        return "rows and seeds"
    if joint == 1 and max(alone) == 1:
        return "rows only: one seed on each side"
    side = "the joint run" if joint == 1 else "the runs alone"
    return f"rows and seeds, but for {side} with one seed: how much its seed matters is not in them"
