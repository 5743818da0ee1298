"""Pseudo-labels: which predictions on unlabelled rows are good enough to learn from, and how much each counts.

A choice is a function of arrays that is registered by name; `choose` makes targets and weights from it. Plain numpy.

Shapes in names: P passes with dropout, N rows, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mtl_jax.core.parts import Registry

TINY = 1e-12  # a probability in a logarithm


class Predicted(NamedTuple):
    """Predictions on unlabelled rows.

    Attributes:
        probabilities: f64[N, O], the mean over the passes.
        classes: i64[N], equal numbers for equal predictions.
        confidence: f64[N], the probability of the prediction: of the label, or of the least certain yes or no.
        gain: f64[N], in nats: how much a label would tell about the model (Houlsby et al., 2011, BALD); 0 with one pass.
        variance: f64[N], of the predicted label's probability over the passes; 0 with one pass.
    """

    probabilities: np.ndarray
    classes: np.ndarray
    confidence: np.ndarray
    gain: np.ndarray
    variance: np.ndarray


class PseudoLabels(NamedTuple):
    """Labels for unlabelled rows.

    Attributes:
        targets: f32[N, O], probabilities.
        weights: f32[N], the weight of each row, with mean 1 over the chosen rows; 0: it is not chosen.
        predicted: What they were chosen from.
    """

    targets: np.ndarray
    weights: np.ndarray
    predicted: Predicted


# (predictions, bool[N] of those with the least confidence, most rows of a class or 0) -> weights f[N], 0: not chosen
Choice = Callable[[Predicted, np.ndarray, int], np.ndarray]


def confident(predicted: Predicted, enough: np.ndarray, per_class: int) -> np.ndarray:
    """Every row with enough confidence; the most confident ones of a class, where per_class limits them."""
    return _best_of_class(predicted, enough, -predicted.confidence, per_class or len(enough)).astype(np.float64)


def balanced(predicted: Predicted, enough: np.ndarray, per_class: int) -> np.ndarray:
    """As many rows of each class, the most confident ones; as many as the rarest class has if per_class is 0."""
    return _best_of_class(predicted, enough, -predicted.confidence, per_class or _rarest(predicted, enough)).astype(np.float64)


def uncertainty(predicted: Predicted, enough: np.ndarray, per_class: int) -> np.ndarray:
    """As many rows of each class, those on which passes with dropout agree most (Mukherjee and Awadallah, 2020, UST).

    A row counts by -log of the variance of its label's probability: the more the passes agree, the more.
    """
    chosen = _best_of_class(predicted, enough, predicted.gain, per_class or _rarest(predicted, enough))
    # A probability has a variance of 1/4 at most, so the logarithm is positive.
    return np.where(chosen, -np.log(np.clip(predicted.variance, TINY, 0.25)), 0.0)


CHOICES: Registry[Choice] = Registry(
    "choice of pseudo-labels", {"confidence": confident, "balanced": balanced, "uncertainty": uncertainty}
)


def register_choice(name: str) -> Callable[[Choice], Choice]:
    """A decorator for a function that chooses pseudo-labels: SelfTraining(choose=NAME) then uses it.

    Examples:
        >>> import mtl_jax
        >>> @mtl_jax.transfer.register_choice("all_rows")
        ... def all_rows(predicted, enough, per_class):
        ...     return predicted.confidence
        >>> mtl_jax.SelfTraining(source="texts", choose="all_rows").choose
        'all_rows'

    Args:
        name: The name: letters, digits and "_".

    Raises:
        UserError: The name is taken.
    """
    return CHOICES.register(name)


def predicted_from(probabilities_PxNxO: np.ndarray, kind: str) -> Predicted:
    """The mean of several passes, and how far they agree.

    Args:
        probabilities_PxNxO: Of the labels in each pass.
        kind: softmax: the O probabilities of a row sum to 1. sigmoid: each is that of a yes.
    """
    passes_PxNxO = probabilities_PxNxO.astype(np.float64)
    mean_NxO = passes_PxNxO.mean(axis=0)
    if kind == "softmax":
        classes_N = mean_NxO.argmax(axis=1)
        confidence_N = mean_NxO.max(axis=1)
        of_class_PxN = np.take_along_axis(passes_PxNxO, classes_N[None, :, None], axis=2)[..., 0]
        gain_N = _entropy(mean_NxO) - _entropy(passes_PxNxO).mean(axis=0)
    else:
        yes_NxO = mean_NxO > 0.5
        _, classes_N = np.unique(yes_NxO, axis=0, return_inverse=True)
        certain_NxO = np.maximum(mean_NxO, 1 - mean_NxO)
        confidence_N, least_N = certain_NxO.min(axis=1), certain_NxO.argmin(axis=1)
        of_class_PxN = np.take_along_axis(passes_PxNxO, least_N[None, :, None], axis=2)[..., 0]
        pairs_NxOx2, pairs_PxNxOx2 = (np.stack([p, 1 - p], axis=-1) for p in (mean_NxO, passes_PxNxO))
        gain_N = (_entropy(pairs_NxOx2) - _entropy(pairs_PxNxOx2).mean(axis=0)).sum(axis=1)
    return Predicted(mean_NxO, classes_N.reshape(-1), confidence_N, np.maximum(gain_N, 0.0), of_class_PxN.var(axis=0))


def choose(
    probabilities_PxNxO: np.ndarray, kind: str, choice: str, *, threshold: float, per_class: int = 0, soft: bool = False
) -> PseudoLabels:
    """Pseudo-labels from predictions.

    Args:
        probabilities_PxNxO: As for predicted_from(); so is kind.
        kind: softmax or sigmoid.
        choice: The name of a choice.
        threshold: The least confidence.
        per_class: The most rows of a class; 0: as the choice says.
        soft: Whether targets are the probabilities; else the predicted labels.

    Raises:
        UserError: There is no such choice.

    Examples:
        >>> passes = np.array([[[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]])
        >>> choose(passes, "softmax", "confidence", threshold=0.75).weights.tolist()
        [1.0, 0.0, 1.0]
    """
    predicted = predicted_from(probabilities_PxNxO, kind)
    weights_N = CHOICES.find(choice)(predicted, predicted.confidence >= threshold, per_class)
    chosen = weights_N > 0
    weights_N = weights_N / (weights_N[chosen].mean() if chosen.any() else 1.0)
    targets_NxO = predicted.probabilities
    if not soft:
        targets_NxO = np.eye(targets_NxO.shape[1])[predicted.classes] if kind == "softmax" else targets_NxO > 0.5
    return PseudoLabels(targets_NxO.astype(np.float32), weights_N.astype(np.float32), predicted)


def _best_of_class(predicted: Predicted, enough: np.ndarray, order: np.ndarray, most: int) -> np.ndarray:
    """bool[N]: of each class the rows with the lowest `order`; of equal ones the first."""
    chosen = np.zeros(len(enough), bool)
    for label in np.unique(predicted.classes[enough]):
        places = np.flatnonzero(enough & (predicted.classes == label))
        chosen[places[np.argsort(order[places], kind="stable")[:most]]] = True
    return chosen


def _rarest(predicted: Predicted, enough: np.ndarray) -> int:
    counts = np.unique(predicted.classes[enough], return_counts=True)[1]
    return int(counts.min(initial=len(enough)))


def _entropy(probabilities: np.ndarray) -> np.ndarray:
    return -(probabilities * np.log(np.maximum(probabilities, TINY))).sum(axis=-1)
