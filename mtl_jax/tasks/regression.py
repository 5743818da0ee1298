"""Regression to one number: squared error, Pearson and Spearman correlation."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Regression:
    """One number for each text.

    The head outputs label / scale, and the loss is its squared error: with `scale` near the labels' standard deviation a
    regression loss starts near 1, beside cross-entropies of the same order.

    Attributes:
        name: The task's name: its key in losses, weights, metrics and params["heads"].
        source: The source whose rows it labels.
        column: The column of that source that holds the number.
        minimum: Smallest label that is allowed.
        maximum: Largest label that is allowed.
        scale: Label units per unit of head output.
        hidden: Width of a hidden ReLU layer in the head; 0 for a linear head.
        dropout: Dropout rate in front of the head.
        metric: The metric that stands for the task: pearson or spearman.
    """

    name: str
    source: str
    column: str = "label"
    minimum: float = -math.inf
    maximum: float = math.inf
    scale: float = 1.0
    hidden: int = 0
    dropout: float = 0.0
    metric: str = "pearson"

    metric_names = ("pearson", "spearman")
    labels = ()
    missing = math.nan
    dtype = np.float32
    outputs = 1

    def parse(self, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"label {text!r} is not a number") from None
        if not self.minimum <= value <= self.maximum:  # also false for nan
            raise ValueError(f"label {text!r} is outside {self.minimum:g}..{self.maximum:g}")
        return value

    def loss(self, outputs_RxSxO: jax.Array, labels_RxS: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Squared error in units of scale: sum over labelled examples, and their number."""
        known_RxS = ~jnp.isnan(labels_RxS)
        # The inner where keeps NaN out of the gradient: 0 * NaN is NaN.
        target_RxS = jnp.where(known_RxS, labels_RxS, 0.0) / self.scale
        error_RxS = outputs_RxSxO[..., 0].astype(jnp.float32) - target_RxS
        return jnp.where(known_RxS, error_RxS**2, 0.0).sum(), known_RxS.sum().astype(jnp.float32)

    def metrics(self, outputs_NxO: np.ndarray, labels_N: np.ndarray) -> dict[str, float]:
        """Pearson and Spearman correlation (0 where predictions or labels are constant); mean absolute error in label units."""
        from scipy import stats

        predicted_N = outputs_NxO[:, 0].astype(np.float64) * self.scale
        labels_N = labels_N.astype(np.float64)
        varies = len(labels_N) > 1 and np.ptp(predicted_N) > 0 and np.ptp(labels_N) > 0
        return {
            "pearson": float(stats.pearsonr(predicted_N, labels_N).statistic) if varies else 0.0,
            "spearman": float(stats.spearmanr(predicted_N, labels_N).statistic) if varies else 0.0,
            "mean_absolute_error": float(np.abs(predicted_N - labels_N).mean()),
        }

    def constant(self, labels_N: np.ndarray) -> np.ndarray:
        return np.array([labels_N.mean() / self.scale], np.float32)

    def probe(self, features: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> np.ndarray:
        """Ridge regression on standardised features; the penalty is chosen by dev squared error."""
        from sklearn.linear_model import Ridge
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        fitted = []
        for penalty in (1.0, 10.0, 100.0, 1000.0, 10000.0):
            model = make_pipeline(StandardScaler(), Ridge(alpha=penalty))
            model.fit(features["train"], labels["train"])
            fitted.append((model.score(features["dev"], labels["dev"]), model))
        best = max(fitted, key=lambda pair: pair[0])[1]
        return (best.predict(features["test"])[:, None] / self.scale).astype(np.float32)

    def describe(self, outputs_O: np.ndarray) -> dict[str, Any]:
        return {"value": round(float(outputs_O[0]) * self.scale, 6)}
