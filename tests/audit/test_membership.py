"""Membership scores and exposure, in arrays."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from mtl_jax import audit
from mtl_jax.audit.membership import auc, true_positives, within_groups
from mtl_jax.core.errors import UserError


def test_auc_is_scikit_learns_with_ties():
    rng = np.random.default_rng(0)
    members, others = rng.integers(0, 20, 80) + 2.0, rng.integers(0, 20, 60).astype(float)
    labels = np.repeat([1, 0], [80, 60])
    assert auc(members, others) == pytest.approx(roc_auc_score(labels, np.concatenate([members, others])))


def test_the_interval_covers_and_the_rate_is_counted():
    rng = np.random.default_rng(1)
    members, others = rng.normal(1.0, 1.0, 400), rng.normal(0.0, 1.0, 400)
    result = audit.membership(members, others)
    assert result.low < 0.7602 < result.high  # Phi(1 / sqrt 2), the AUC of two normals
    assert result.low < result.auc < result.high
    assert result.true_positives == true_positives(members, others)
    threshold = np.sort(others)[-5]
    assert result.true_positives == (members > threshold).mean()
    assert (others > threshold).mean() <= 0.01
    assert audit.membership(members, others) == result
    assert audit.membership(members, others[:50], resamples=10).true_positives is None


def test_groups_that_are_easy_do_not_count():
    rng = np.random.default_rng(2)
    groups = rng.integers(0, 2, 300), rng.integers(0, 2, 300)
    noise = rng.normal(size=600)
    members, others = 10.0 * groups[0] + noise[:300] + 0.8, 10.0 * groups[1] + noise[300:]
    assert auc(*within_groups(members, others, groups)) > auc(members, others) + 0.03


def test_exposure_is_log2_of_candidates_less_log2_of_the_rank():
    candidates = np.arange(1.0, 256.0)
    assert audit.exposure(0.5, candidates) == 8.0
    assert audit.exposure(3.5, candidates) == 8.0 - 2.0
    assert audit.exposure(1000.0, candidates) == 0.0


def test_bad_input_is_one_line():
    with pytest.raises(UserError, match="at least 10 others, and there are 3"):
        audit.membership(np.zeros(30), np.zeros(3))
    with pytest.raises(UserError, match="a score of the members is not finite"):
        audit.membership(np.full(30, np.nan), np.zeros(30))
