"""Estimators measured against scores: by hand, with seeds and settings, missing estimates, bootstraps, and combinations."""

import dataclasses
import math

import numpy as np
import pytest

from mtl_jax import UserError, affinity
from mtl_jax.affinity import trials as trials_module


def trial(target, seed, scores, setting="", **estimates):
    return affinity.Trial(target, setting, seed, scores, estimates)


def test_measures_are_means_over_seeds_settings_and_targets():
    """The truth is the mean score over seeds: 0.7, 0.8 and 0.5 of the first target, where b is first."""
    trials = [
        trial("x", 0, {"a": 0.9, "b": 0.7, "c": 0.5}, e={"a": 3.0, "b": 2.0, "c": 1.0}),
        trial("x", 1, {"a": 0.5, "b": 0.9, "c": 0.5}, e={"b": 3.0, "a": 2.0}),
        trial("y", 0, {"a": 0.5, "b": 1.0}, e={"a": 2.0, "b": 1.0}),
        trial("y", 1, {"a": 0.5, "b": 1.0}, e={"a": 2.0, "b": 1.0}),
    ]
    measured = affinity.measure(trials, resamples=40)["e"]
    of_x = (0.125 + 0) / 2  # the first seed chooses a
    assert measured["regret@1"].value == pytest.approx((of_x + 0.5) / 2)
    assert measured["regret@3"].value == 0
    assert measured["Spearman"].value == pytest.approx(((0.5 + 1) / 2 - 1) / 2)
    assert measured["regret@1"].targets == 2
    assert measured["regret@1"].low <= measured["regret@1"].value <= measured["regret@1"].high
    # A bootstrap may draw y twice, and x never.
    assert measured["regret@1"].high == pytest.approx(0.5)
    again = affinity.measure(trials, resamples=40)["e"]
    assert again == measured
    assert math.isnan(affinity.measure(trials, resamples=0)["e"]["nDCG"].low)


def test_a_target_without_estimates_does_not_count():
    trials = [
        trial("x", 0, {"a": 0.9, "b": 0.7}, e={}, f={"a": 0.0, "b": 1.0}),
        trial("y", 0, {"a": -0.1, "b": -0.2}, e={"a": 1.0, "b": math.nan}, f={"a": 1.0, "b": 0.0}),
    ]
    measured = affinity.measure(trials, resamples=5)
    assert (measured["e"]["nDCG"].targets, measured["e"]["nDCG"].value) == (1, 1.0)
    assert math.isnan(measured["e"]["regret@1"].value)  # a share of a score that is not above 0
    assert measured["f"]["regret@1"].value == pytest.approx(0.2 / 0.9)
    assert measured["f"]["regret@1"].targets == 1


def made(targets=5, sources=6, seeds=2, noise=0.0):
    """Scores are 2 p - q + noise, of the estimators p and q; r says nothing, and each target has a scale of its own."""
    random = np.random.default_rng(1)
    names = [f"s{n}" for n in range(sources)]
    result = []
    for target in range(targets):
        for seed in range(seeds):
            p, q, r, rest = random.normal(size=(4, sources))
            scores = 0.5 + 0.01 * (target + 1) * (2 * p - q + noise * rest)
            estimates = {key: dict(zip(names, values, strict=True)) for key, values in {"p": p, "q": 7 * q, "r": r}.items()}
            result.append(trial(f"t{target}", seed, dict(zip(names, scores, strict=True)), "64", **estimates))
    return result


def test_a_combination_finds_the_weights_on_the_other_targets():
    trials = made(sources=60, seeds=1)  # standardised over so many sources, the true weights hardly differ between targets
    combined = affinity.combined(trials)
    measured = affinity.measure(combined, resamples=0)
    assert measured["combination"]["Spearman"].value > 0.99
    assert measured["combination"]["regret@1"].value == 0
    assert measured["p"]["Spearman"].value < 0.97
    # The target's own scores are not read.
    changed = [dataclasses.replace(trials[0], scores={name: 1.0 - value for name, value in trials[0].scores.items()})]
    other = affinity.combined([*changed, *trials[1:]])
    assert other[0].estimates["combination"] == combined[0].estimates["combination"]
    few = affinity.combined(trials, "two", ["q", "r"])
    assert affinity.measure(few, resamples=0)["two"]["Spearman"].value < 0.9


def test_other_targets_are_the_mean_of_standardised_scores():
    trials = [
        trial("x", 0, {"a": 1.0, "b": 0.0}),
        trial("y", 0, {"a": 0.2, "b": 0.6}),
        trial("z", 0, {"a": 0.3, "b": 0.1, "c": 0.2}),
    ]
    prior = affinity.other_targets(trials)
    of_z = prior[2].estimates[trials_module.PRIOR]
    assert (of_z["a"], of_z["b"]) == pytest.approx((0.0, 0.0))
    assert math.isnan(of_z["c"])
    root = math.sqrt(1.5)
    assert prior[0].estimates[trials_module.PRIOR] == pytest.approx({"a": (root - 1) / 2, "b": (1 - root) / 2})


@pytest.mark.parametrize(
    ("function", "trials", "message"),
    [
        (affinity.measure, [], "there are no trials to measure"),
        (affinity.measure, made()[:-1], "target 't4': setting '64' has no trial with seed 1, as others have"),
        (affinity.combined, made(2), "there are trials of 2 targets; at least 3 are needed to leave one out"),
        (affinity.other_targets, made(1), "there are trials of 1 target; at least 2 are needed to leave one out"),
    ],
)
def test_refused(function, trials, message):
    with pytest.raises(UserError, match=message):
        function(trials)
