"""Estimators that read features of the target's rows and their labels: how well the features already separate the labels.

The features come from a source's trunk. Before training, all sources have the same trunk, and the number says how well the
trunk suits the target.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mtl_jax.affinity.estimator_inputs import Factors, centred, factors, labelled

GRID = np.logspace(-12, 12, 49)  # ratios of the prior's precision to the noise's, over the mean squared singular value
REFINEMENTS = 40  # steps of the golden section: the logarithm of the ratio is then known to 1e-8


def logme(features: Any, labels: Any) -> float:
    """LogME: the largest log evidence, in nats a row, of a Bayesian linear model from features to labels.

    Labels y are X w + noise, w ~ N(0, 1/alpha), noise ~ N(0, 1/beta). The evidence is maximised over alpha and beta: the best
    beta follows from their ratio, and a search finds the ratio. Each class has a model of labels 0 and 1, and the result is
    the mean over classes. Rotating or scaling the features changes nothing.

    Args:
        features: f[N, H], on any scale; H may exceed N.
        labels: i[N], classes; or f[N], numbers.

    Raises:
        UserError: Shapes differ, a number is not finite, or all labels are the same.

    References:
        You et al., 2021, LogME: Practical Assessment of Pre-trained Models for Transfer Learning,
        https://arxiv.org/abs/2102.11005

    Examples:
        >>> from sklearn.datasets import load_iris
        >>> round(mtl_jax.affinity.logme(*load_iris(return_X_y=True)), 4)
        -0.1601
    """
    data = labelled("logme", features, labels, numbers=True)
    return float(_evidences(factors(data.features), data.targets).mean())


def _evidences(svd: Factors, targets_NxC: np.ndarray) -> np.ndarray:
    """f64[C], the largest log evidence in nats a row of each column of the targets."""
    rows = len(targets_NxC)
    squares_R = svd.values**2
    explained_RxC = (svd.left.T @ targets_NxC) ** 2
    total_C = (targets_NxC**2).sum(axis=0)
    rest_C = np.maximum(total_C - explained_RxC.sum(axis=0), 0.0)
    floor_C = np.finfo(np.float64).eps * total_C

    def evidence(log_ratio_C: np.ndarray) -> np.ndarray:
        gain_RxC = 1.0 + squares_R[:, None] * np.exp(-log_ratio_C)
        residual_C = np.maximum((explained_RxC / gain_RxC).sum(axis=0) + rest_C, floor_C)  # beta is N / residual
        return -0.5 * (np.log(2 * np.pi * residual_C / rows) + 1.0 + np.log(gain_RxC).sum(axis=0) / rows)

    if not len(squares_R):
        return evidence(np.zeros_like(total_C))
    grid = np.log(GRID * squares_R.mean())
    values = np.stack([evidence(np.full_like(total_C, log_ratio)) for log_ratio in grid])
    best = np.clip(values.argmax(axis=0), 1, len(grid) - 2)
    low_C, high_C = grid[best - 1], grid[best + 1]
    golden = (np.sqrt(5) - 1) / 2
    for _ in range(REFINEMENTS):
        left_C, right_C = high_C - golden * (high_C - low_C), low_C + golden * (high_C - low_C)
        goes_left_C = evidence(left_C) > evidence(right_C)
        low_C, high_C = np.where(goes_left_C, low_C, left_C), np.where(goes_left_C, right_C, high_C)
    return np.maximum(evidence((low_C + high_C) / 2), values.max(axis=0))


def h_score(features: Any, labels: Any) -> float:
    """H-score: tr(cov(f)^-1 cov(g)), the share of the features' variance that is between classes, summed over directions.

    g are the features with each row replaced by the mean of its class. The score lies between 0 and C - 1, and does not change
    under an invertible linear map of the features. With as many dimensions as rows it is always C - 1; then use
    regularised_h_score.

    Args:
        features: f[N, H].
        labels: i[N], C classes.

    Raises:
        UserError: As in logme; or the labels are not integers.

    References:
        Bao et al., 2019, An Information-Theoretic Approach to Transferability in Task Transfer Learning,
        https://doi.org/10.1109/ICIP.2019.8803726
    """
    data = labelled("h_score", features, labels)
    svd = factors(centred(data.features))
    return float(_between_classes(svd.left, data.targets).sum())


def regularised_h_score(features: Any, labels: Any) -> float:
    """H-score with a covariance of the features that is shrunk as by Ledoit and Wolf, for few rows or many dimensions.

    Args:
        features: f[N, H].
        labels: i[N], C classes.

    Raises:
        UserError: As in h_score.

    References:
        Ibrahim et al., 2021, Newer is not always better: Rethinking transferability metrics, their peculiarities, stability
        and performance, https://arxiv.org/abs/2110.06893
    """
    from sklearn.covariance import ledoit_wolf_shrinkage

    data = labelled("regularised_h_score", features, labels)
    rows, dimensions = data.features.shape
    centred_NxH = centred(data.features)
    svd = factors(centred_NxH)
    if not len(svd.values):
        return 0.0
    shrinkage = float(ledoit_wolf_shrinkage(centred_NxH, assume_centered=True)) if dimensions > 1 else 0.0
    variance_R = svd.values**2 / rows
    shrunk_R = (1 - shrinkage) * variance_R + shrinkage * variance_R.sum() / dimensions
    between_R = variance_R * rows / (rows - 1) * _between_classes(svd.left, data.targets)
    return float((1 - shrinkage) * (between_R / shrunk_R).sum())


def _between_classes(left_NxR: np.ndarray, targets_NxC: np.ndarray) -> np.ndarray:
    """f64[R], the part of each column's squared norm, which is 1, that lies in the class means."""
    sums_CxR = targets_NxC.T @ left_NxR
    return (sums_CxR**2 / targets_NxC.sum(axis=0)[:, None]).sum(axis=0)


def transrate(features: Any, labels: Any, epsilon: float = 1e-4) -> float:
    """TransRate: the coding rate of the features minus that within classes, in nats.

    The coding rate of Z is 1/2 log det(I + Z^T Z / (N epsilon)), of centred features. It depends on the features' scale.

    Args:
        features: f[N, H].
        labels: i[N], classes.
        epsilon: The allowed distortion.

    Raises:
        UserError: As in h_score.

    References:
        Huang et al., 2022, Frustratingly Easy Transferability Estimation, https://arxiv.org/abs/2106.09362
    """
    data = labelled("transrate", features, labels)
    centred_NxH = centred(data.features)

    def rate(rows_NxH: np.ndarray) -> float:
        values = np.linalg.svd(rows_NxH, compute_uv=False)
        return 0.5 * float(np.log1p(values**2 / (len(rows_NxH) * epsilon)).sum())

    parts = [centred_NxH[data.labels == label] for label in range(data.classes)]
    return rate(centred_NxH) - sum(len(part) / len(centred_NxH) * rate(part) for part in parts)
