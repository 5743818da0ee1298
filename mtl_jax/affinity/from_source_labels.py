"""Estimators that read the source model's predictions on the target's rows: how well they predict the target's labels."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from mtl_jax.affinity.estimator_inputs import centred, check_rows, class_numbers, factors, labelled, matrix
from mtl_jax.core.errors import UserError

TOLERANCE = 1e-3  # of a sum of probabilities that must be 1


def leep(probabilities: Any, labels: Any) -> float:
    """LEEP: the mean log-likelihood, in nats, of the target's labels given only the source's probabilities; at most 0.

    The source's class z is drawn from its probabilities, and the target's label from P(y | z), counted over all rows.

    Args:
        probabilities: f[N, Z], the source's probabilities on the target's rows; each row sums to 1.
        labels: i[N], the target's classes.

    Raises:
        UserError: Shapes differ, a row is not a distribution, or the labels are not integers or all the same.

    References:
        Nguyen et al., 2020, LEEP: A New Measure to Evaluate Transferability of Learned Representations,
        https://arxiv.org/abs/2002.12462

    Examples:
        >>> round(mtl_jax.affinity.leep([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.3, 0.7]], [0, 0, 1, 1]), 4)
        -0.3426
    """
    data = labelled("leep", matrix("leep", "probabilities", probabilities), labels)
    sums_N = data.features.sum(axis=1)
    wrong_N = (data.features < 0).any(axis=1) | (np.abs(sums_N - 1) > TOLERANCE)
    if wrong_N.any():
        row = int(np.flatnonzero(wrong_N)[0])
        raise UserError(f"leep: row {row} of probabilities is not a distribution: its numbers must be at least 0 and sum to 1")
    return _leep(data.features / sums_N[:, None], data.targets)


def _leep(probabilities_NxZ: np.ndarray, targets_NxC: np.ndarray) -> float:
    joint_CxZ = targets_NxC.T @ probabilities_NxZ
    totals_Z = joint_CxZ.sum(axis=0)
    conditional_CxZ = np.divide(joint_CxZ, totals_Z, out=np.zeros_like(joint_CxZ), where=totals_Z > 0)
    likelihood_N = (probabilities_NxZ @ conditional_CxZ.T)[targets_NxC > 0]
    return float(np.log(likelihood_N).mean())


def nce(source_labels: Any, labels: Any) -> float:
    """Minus the conditional entropy H(Y | Z) of the target's labels given the source's, in nats; at most 0.

    Args:
        source_labels: i[N], the source's labels of the target's rows, from the data or predicted.
        labels: i[N], the target's classes.

    Raises:
        UserError: Shapes differ, labels are not integers, or those of the target are all the same.

    References:
        Tran, Nguyen and Hassner, 2019, Transferability and Hardness of Supervised Classification Tasks,
        https://arxiv.org/abs/1908.08142
    """
    source_N, sources = class_numbers("nce", "source_labels", source_labels)
    target_N, targets = class_numbers("nce", "labels", labels)
    check_rows("nce", source_labels=source_N, labels=target_N)
    if targets < 2:
        raise UserError(f"nce: all rows have label {np.asarray(labels)[0]}; two classes are needed")
    return _leep(np.eye(sources)[source_N], np.eye(targets)[target_N])


def n_leep(features: Any, labels: Any, components: int = 0, variance: float = 0.8, seed: int = 0) -> float:
    """N-LEEP: LEEP with the clusters of a Gaussian mixture over the features in place of a source's classes.

    The features are first reduced to their principal components.

    Args:
        features: f[N, H].
        labels: i[N], C classes.
        components: The number of clusters; 0: 5 C as in the paper, and at most a third of the rows.
        variance: The share of the variance that the principal components keep, above 0 and at most 1.
        seed: Seed of the mixture's initial values.

    Raises:
        UserError: As in logme; the labels are not integers; an option is refused, or there are more clusters than rows.

    References:
        Li et al., 2021, Ranking Neural Checkpoints, https://arxiv.org/abs/2011.11200
    """
    from sklearn.mixture import GaussianMixture

    data = labelled("n_leep", features, labels)
    rows = len(data.labels)
    clusters = components or max(1, min(5 * data.classes, rows // 3))
    if not 1 <= clusters <= rows:
        raise UserError(f"n_leep: components is {components}; it must be from 1 to the number of rows, {rows}, or 0")
    if not 0 < variance <= 1:
        raise UserError(f"n_leep: variance is {variance}; it must be above 0 and at most 1")
    svd = factors(centred(data.features))
    if not len(svd.values):
        return _leep(np.ones((rows, 1)), data.targets)
    share_R = np.cumsum(svd.values**2) / (svd.values**2).sum()
    kept = int(np.searchsorted(share_R, variance * (1 - 1e-12))) + 1
    reduced_NxR = svd.left[:, :kept] * svd.values[:kept]
    reduced_NxR *= np.sqrt(rows / (svd.values[:kept] ** 2).mean())  # the mixture's floor of variance is relative to 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="sklearn")  # a mixture that has not converged is used as it is
        mixture = GaussianMixture(clusters, covariance_type="diag", reg_covar=1e-3, random_state=seed).fit(reduced_NxR)
        probabilities_NxZ = mixture.predict_proba(reduced_NxR)
    return _leep(probabilities_NxZ / probabilities_NxZ.sum(axis=1, keepdims=True), data.targets)
