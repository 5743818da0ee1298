"""Intervals over rows and seeds, against closed forms, loops and their coverage on made-up runs."""

import numpy as np
import pytest
from scipy import stats

from mtl_jax.reporting import paired_bootstrap as bootstrap
from mtl_jax.tasks.row_statistics import RowStatistics, shares

RESAMPLES = 4000


def counts_of(units, resamples, seed=0):
    return np.concatenate(list(bootstrap.row_counts(np.asarray(units), resamples, np.random.default_rng(seed))))


def means(values_SxN, counts):
    return np.stack([RowStatistics(shares(values), "mean").metric(counts) for values in values_SxN])


def test_rows_of_a_unit_are_drawn_together(monkeypatch):
    units = [0, 1, 1, 2, 3, 3, 3]
    counts = counts_of(units, 50)
    assert (counts[:, 1] == counts[:, 2]).all()
    assert (counts[:, 4] == counts[:, 6]).all()
    assert (counts[:, [0, 1, 3, 4]].sum(axis=1) == 4).all()
    monkeypatch.setattr(bootstrap, "AT_ONCE", 70)
    assert [len(part) for part in bootstrap.row_counts(np.array(units), 25, np.random.default_rng(0))] == [10, 10, 5]
    np.testing.assert_array_equal(counts_of(units, 50), counts)  # the same draws, in parts


def test_a_mean_has_the_interval_of_the_paired_differences():
    """Of one run on each side: value +- 1.96 s / sqrt(N), s of the row-wise differences; equal noise is not in it."""
    rng = np.random.default_rng(1)
    hard = rng.normal(0, 5, 400)
    joint, alone = hard + rng.normal(0.2, 1, 400), hard + rng.normal(0, 1, 400)
    counts = counts_of(np.arange(400), RESAMPLES)
    ones = np.ones((RESAMPLES, 1))
    drawn = bootstrap.differences(means([joint], counts), means([alone], counts), ones, ones)
    difference = bootstrap.interval(float((joint - alone).mean()), drawn)
    half = 1.96 * (joint - alone).std() / 20
    np.testing.assert_allclose(
        [difference.low, difference.high], [difference.value - half, difference.value + half], atol=0.012
    )
    shifted = bootstrap.differences(means([hard + 1], counts), means([hard], counts), ones, ones)
    np.testing.assert_allclose(shifted, 1.0)


def test_seeds_have_the_interval_of_students_t():
    joint, alone = np.array([0.61, 0.65, 0.60]), np.array([0.58, 0.57, 0.62])
    resamples = 40_000
    uniform = bootstrap.even(resamples, np.random.default_rng(9))
    weights = [
        bootstrap.tails(bootstrap.seed_weights(3, resamples, np.random.default_rng(seed)), 4, uniform) for seed in (1, 2)
    ]
    for part in weights:
        np.testing.assert_allclose(part.sum(axis=1), 1.0)
    values = [np.repeat(side[:, None], resamples, axis=1) for side in (joint, alone)]
    value = joint.mean() - alone.mean()
    difference = bootstrap.interval(value, bootstrap.differences(*values, *weights))
    half = stats.t.ppf(0.975, 4) * np.sqrt((joint.var(ddof=1) + alone.var(ddof=1)) / 3)
    np.testing.assert_allclose([difference.low, difference.high], [value - half, value + half], atol=0.004)
    assert (bootstrap.seed_weights(1, 5, np.random.default_rng(0)) == 1).all()


def test_a_difference_is_that_of_weighted_seeds():
    rng = np.random.default_rng(2)
    joint, alone, weights, others = (rng.random(shape) for shape in ((3, 6), (2, 6), (6, 3), (6, 2)))
    expected = [
        sum(weights[b, s] * joint[s, b] for s in range(3)) - sum(others[b, s] * alone[s, b] for s in range(2)) for b in range(6)
    ]
    np.testing.assert_allclose(bootstrap.differences(joint, alone, weights, others), expected)


@pytest.mark.parametrize(("joint", "alone", "seed_noise"), [(1, 1, 0.0), (3, 3, 0.3), (2, 2, 0.1), (3, 3, 0.05)])
def test_intervals_hold_the_truth(joint, alone, seed_noise):
    """Made-up runs whose true difference is 0: of 300, the intervals of about 95 % hold it, and never far fewer."""
    rng, rows, trials, resamples = np.random.default_rng(4), 150, 300, 300
    counts = counts_of(np.arange(rows), resamples) / rows
    uniform = bootstrap.even(resamples, rng)
    hits = 0
    for _ in range(trials):
        gain = rng.normal(0, 1, rows)  # of each row, from joint training, with mean 0 over all rows that there could be
        sides = [
            (sign * gain / 2 + rng.normal(0, seed_noise, (seeds, 1))) @ counts.T for sign, seeds in ((1, joint), (-1, alone))
        ]
        weights = [
            bootstrap.tails(bootstrap.seed_weights(seeds, resamples, rng), joint + alone - 2, uniform)
            for seeds in (joint, alone)
        ]
        difference = bootstrap.interval(0.0, bootstrap.differences(*sides, *weights))
        hits += difference.low <= 0 <= difference.high
    assert 0.9 <= hits / trials <= 0.995


def test_intervals_and_verdicts():
    drawn = np.append(np.linspace(0.0, 1.0, 1001), np.nan)
    assert bootstrap.interval(0.5, drawn) == pytest.approx((0.5, 0.025, 0.975))
    assert bootstrap.interval(0.5, drawn, compared=5) == pytest.approx((0.5, 0.005, 0.995))
    verdicts = [bootstrap.Difference(0.1, *ends).verdict for ends in ((0.01, 0.2), (-0.01, 0.2), (-0.3, -0.01), (0.0, 0.2))]
    assert verdicts == ["helped", "unclear", "hurt", "unclear"]
    assert bootstrap.interval(float("nan"), drawn).verdict == "undefined"
    assert bootstrap.interval(0.5, np.full(3, np.nan)).verdict == "undefined"
    assert bootstrap.covered(1, [1, 1]) == "rows only: one seed on each side"
    assert bootstrap.covered(3, [3, 2]) == "rows and seeds"
    assert bootstrap.covered(3, [3, 1]).startswith("rows and seeds, but for the runs alone with one seed")
