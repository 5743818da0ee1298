"""Estimators that fit a simple model to the target's rows and score it on rows that it has not seen."""

from __future__ import annotations

from typing import Any

import numpy as np

from mtl_jax.affinity.estimator_inputs import Labelled, centred, factors, labelled
from mtl_jax.core.errors import UserError, count

PENALTIES = np.logspace(-6, 3, 19)  # of the ridge, over the mean squared singular value


def linear_probe(features: Any, labels: Any) -> float:
    """The leave-one-out score of ridge regression on the features: accuracy of classes, R^2 of numbers.

    Classes are regressed as 0 and 1, and the largest output is the prediction. Each row is predicted by the model of all other
    rows, which has a closed form, so the score needs no folds and no seed. The penalty with the best score is used. A class
    with one row is never predicted correctly.

    Args:
        features: f[N, H], N at least 3.
        labels: i[N], classes; or f[N], numbers.

    Raises:
        UserError: Shapes differ, a number is not finite, all labels are the same, or there are fewer than 3 rows.

    References:
        Alain and Bengio, 2016, Understanding intermediate layers using linear classifier probes,
        https://arxiv.org/abs/1610.01644; the closed form: Golub, Heath and Wahba, 1979,
        https://doi.org/10.1080/00401706.1979.10489751
    """
    data = labelled("linear_probe", features, labels, numbers=True)
    rows = len(data.labels)
    if rows < 3:
        raise UserError(f"linear_probe: {count(rows, 'row')}; at least 3 are needed to leave one out")
    svd = factors(centred(data.features))
    targets_NxC = data.targets - data.targets.mean(axis=0)
    coefficients_RxC = svd.left.T @ targets_NxC
    scores = []
    for penalty in PENALTIES * (svd.values**2).mean() if len(svd.values) else (1.0,):
        shrink_R = svd.values**2 / (svd.values**2 + penalty)
        fitted_NxC = svd.left @ (shrink_R[:, None] * coefficients_RxC)
        own_N = 1 / rows + (svd.left**2) @ shrink_R  # how much a row's own label counts in its prediction
        residual_NxC = (targets_NxC - fitted_NxC) / np.maximum(1 - own_N, np.finfo(np.float64).eps)[:, None]
        scores.append(_score(data, data.targets - residual_NxC))
    return max(scores)


def knn(features: Any, labels: Any, k: int = 5) -> float:
    """The leave-one-out score of the k nearest neighbours by Euclidean distance: accuracy of classes, R^2 of numbers.

    The most frequent class among the neighbours is the prediction; if several are, the score is that of a random choice.

    Args:
        features: f[N, H].
        labels: i[N], classes; or f[N], numbers.
        k: The number of neighbours, from 1 to N - 1.

    Raises:
        UserError: Shapes differ, a number is not finite, all labels are the same, or there are not k other rows.

    References:
        Renggli et al., 2022, Which Model to Transfer? Finding the Needle in the Growing Haystack,
        https://arxiv.org/abs/2010.06402
    """
    data = labelled("knn", features, labels, numbers=True)
    rows = len(data.labels)
    if not 1 <= k < rows:
        raise UserError(f"knn: k is {k} and there are {count(rows, 'row')}; k must be from 1 to one less than the rows")
    centred_NxH = centred(data.features)
    squares_N = (centred_NxH**2).sum(axis=1)
    distances_NxN = squares_N[:, None] + squares_N - 2 * centred_NxH @ centred_NxH.T
    np.fill_diagonal(distances_NxN, np.inf)
    nearest_Nxk = np.argpartition(distances_NxN, k - 1, axis=1)[:, :k]
    return _score(data, data.targets[nearest_Nxk].mean(axis=1))


def _score(data: Labelled, outputs_NxC: np.ndarray) -> float:
    """Accuracy of the largest output; for numbers R^2, which is 1 minus the squared error over that of the mean."""
    if not data.classes:
        errors = ((outputs_NxC[:, 0] - data.labels) ** 2).sum()
        return float(1 - errors / ((data.labels - data.labels.mean()) ** 2).sum())
    is_best_NxC = np.isclose(outputs_NxC, outputs_NxC.max(axis=1, keepdims=True), rtol=1e-9, atol=1e-12)
    right_N = is_best_NxC[np.arange(len(data.labels)), data.labels] / is_best_NxC.sum(axis=1)
    return float(right_N.mean())
