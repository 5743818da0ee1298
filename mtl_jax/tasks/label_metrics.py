"""Metrics of single labels, counted by scikit-learn.

The metrics of the TweetEval benchmark (Barbieri et al. 2020) are these, with labels as the benchmark writes them:

| data set | metric |
|---|---|
| emotion, hate, offensive, emoji | macro_f1 |
| irony | f1:1, the F1 of ironic tweets |
| stance | f1:1+2, the mean F1 of against and favor, over the five targets together |
| sentiment | macro_recall |
"""

from __future__ import annotations

import numpy as np

from mtl_jax.errors import UserError, listed

NAMES = ("accuracy", "macro_f1", "macro_recall", "matthews")
F1_OF = "f1:"


def names(metric: str) -> tuple[str, ...]:
    """Those that can stand for a task whose metric is `metric`: the four, and a well-formed f1:LABEL or f1:LABEL+LABEL."""
    return (*NAMES, metric) if metric.startswith(F1_OF) and len(metric) > len(F1_OF) else NAMES


def f1_labels(metric: str, labels: tuple[str, ...]) -> list[int]:
    """Places in the label set of the labels that f1:LABEL or f1:LABEL+LABEL names; none for the other metrics.

    Raises:
        UserError: One of them is not in the label set.
    """
    if not metric.startswith(F1_OF):
        return []
    named = metric.removeprefix(F1_OF)
    parts = [named] if named in labels else named.split("+")
    for part in parts:
        if part not in labels:
            raise UserError(f"metric {metric!r}: {part!r} is not in the label set ({listed(labels)})")
    return [labels.index(part) for part in parts]


def scores(gold_N: np.ndarray, predicted_N: np.ndarray, metric: str, labels: tuple[str, ...]) -> dict[str, float]:
    """The four metrics, and `metric` where it is an F1 of labels; shares of 1, Matthews from -1 to 1.

    F1 and recall are averaged over the labels that occur in truth or prediction. What would be divided by 0 is 0.

    Args:
        gold_N: The true labels, places in the label set.
        predicted_N: The predicted ones.
        metric: The task's metric.
        labels: The label set.
    """
    from sklearn.metrics import f1_score, matthews_corrcoef, recall_score

    one_label = len(np.unique(np.concatenate([gold_N, predicted_N]))) < 2  # scikit-learn warns where nothing varies
    found = {
        "accuracy": float((predicted_N == gold_N).mean()),
        "macro_f1": float(f1_score(gold_N, predicted_N, average="macro", zero_division=0)),
        "macro_recall": float(recall_score(gold_N, predicted_N, average="macro", zero_division=0)),
        "matthews": 0.0 if one_label else float(matthews_corrcoef(gold_N, predicted_N)),
    }
    if wanted := f1_labels(metric, labels):
        found[metric] = float(f1_score(gold_N, predicted_N, labels=wanted, average="macro", zero_division=0))
    return found
