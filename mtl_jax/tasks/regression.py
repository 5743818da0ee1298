"""Regression to one number: squared error, Pearson and Spearman correlation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.core.errors import UserError
from mtl_jax.core.row_texts import quoted
from mtl_jax.data.batches import Batch
from mtl_jax.data.examples import Examples
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.labels import Window
from mtl_jax.tasks.base import PerExample
from mtl_jax.tasks.ranks import correlations
from mtl_jax.tasks.reading import known, known_rows, labelled, text_of
from mtl_jax.tasks.row_statistics import RowStatistics, by_row
from mtl_jax.tasks.text_head import TextTask


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regression(TextTask):
    """One number for each text, or pair of texts.

    The head outputs label / scale, and the loss is its squared error: with `scale` near the labels' standard deviation a
    regression loss starts near 1, the order of the cross-entropies of other tasks.

    Attributes:
        name: The task's name: its key in losses, weights, metrics and params["heads"].
        source: The source whose rows it labels.
        column: The column of that source with the number.
        minimum: Smallest label allowed.
        maximum: Largest label allowed.
        scale: Label units per unit of head output.
        unlabelled: The values that mean "no label". Such rows count neither in loss nor metrics.
        hidden: Width of a hidden ReLU layer in the head; 0 for a linear head.
        dropout: Dropout rate in front of the head.
        head: family: the text classifier of the checkpoint's family, as transformers has it, so that the exported run opens in
            pipeline("text-classification"). Empty: linear layers on the mean of the token vectors.
        metric: The main metric: pearson or spearman.

    Examples:
        >>> mtl_jax.Regression(name="stars", source="reviews", column="stars", minimum=1, maximum=5).maximum
        5
    """

    column: str = "label"
    minimum: float = -math.inf
    maximum: float = math.inf
    scale: float = 1.0
    unlabelled: tuple[str, ...] = ("",)
    metric: str = "pearson"

    metric_names: ClassVar[tuple[str, ...]] = ("pearson", "spearman")
    dtype: ClassVar[type[np.generic]] = np.float32
    outputs: ClassVar[int] = 1
    compared_as: ClassVar[str] = "number"

    def check(self) -> None:
        super().check()
        if not self.scale > 0:
            raise UserError(f"task {self.name!r}: scale is {self.scale}; it must be above 0")

    @property
    def output_scale(self) -> float:
        return self.scale

    def parse(self, row: Row) -> float | None:
        text = text_of(row, self.column, self)
        if text is None or text in self.unlabelled:
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if math.isnan(value):
            raise ValueError(f"label {quoted(text)} is not a number")
        if math.isinf(value):
            raise ValueError(f"label {quoted(text)} is not a finite number")
        if not self.minimum <= value <= self.maximum:
            raise ValueError(f"label {quoted(text)} is outside {self.minimum:g}..{self.maximum:g}")
        return value

    def loss(self, outputs_RxSxO: jax.Array, labels_RxS: jax.Array, batch: Batch | None = None) -> tuple[jax.Array, jax.Array]:
        """Squared error in units of scale: sum over labelled examples, and their number."""
        known_RxS = ~jnp.isnan(labels_RxS)
        # The inner where keeps NaN out of the gradient: 0 * NaN is NaN.
        target_RxS = jnp.where(known_RxS, labels_RxS, 0.0) / self.scale
        error_RxS = outputs_RxSxO[..., 0].astype(jnp.float32) - target_RxS
        return jnp.where(known_RxS, error_RxS**2, 0.0).sum(), known_RxS.sum().astype(jnp.float32)

    def metrics(self, outputs: PerExample, examples: Examples) -> dict[str, float]:
        return self.scores(*labelled(self, outputs, examples))

    def row_statistics(self, outputs: PerExample, examples: Examples) -> RowStatistics:
        outputs_MxO, labels_M = labelled(self, outputs, examples)
        predicted_M = outputs_MxO[:, 0].astype(np.float64) * self.scale
        statistics = RowStatistics(np.stack([predicted_M, labels_M.astype(np.float64)], axis=1), self.metric)
        return by_row(statistics, examples.row_of[known_rows(self, examples)], len(examples.data))

    def scores(self, outputs_NxO: np.ndarray, labels_N: np.ndarray) -> dict[str, float]:
        """Pearson and Spearman correlation, NaN where they are not defined; mean absolute error in label units."""
        predicted_N = outputs_NxO[:, 0].astype(np.float64) * self.scale
        labels_N = labels_N.astype(np.float64)
        error = float(np.abs(predicted_N - labels_N).mean())
        return {**correlations(predicted_N, labels_N), "mean_absolute_error": error}

    def constant(self, train: Examples, test: Examples) -> np.ndarray:
        return np.full((len(test.tokens), 1), known(self, train).mean() / self.scale, np.float32)

    def probe(self, features: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> np.ndarray:
        """Ridge regression on standardised features; the penalty is chosen by dev squared error."""
        from sklearn.linear_model import Ridge
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        models = []
        for penalty in (1.0, 10.0, 100.0, 1000.0, 10000.0):
            model = make_pipeline(StandardScaler(), Ridge(alpha=penalty))
            model.fit(features["train"], labels["train"])
            models.append((model.score(features["dev"], labels["dev"]), model))
        best = max(models, key=lambda pair: pair[0])[1]
        return (best.predict(features["test"])[:, None] / self.scale).astype(np.float32)

    def describe(self, outputs: Sequence[np.ndarray], windows: Sequence[Window], row: Row) -> dict[str, Any]:
        return {"value": round(float(outputs[0][0]) * self.scale, 6)}
