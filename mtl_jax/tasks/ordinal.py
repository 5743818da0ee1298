"""Ordinal regression: labels whose order matters, such as stars; one yes-no question between each two neighbours.

Shapes in names: R rows, S examples a row, K labels, O = K - 1 outputs, N examples.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtl_jax.core.errors import UserError, listed
from mtl_jax.core.parts import ONLY_IF_SET
from mtl_jax.core.row_texts import quoted
from mtl_jax.data.batches import Batch
from mtl_jax.data.examples import Examples
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.labels import Window
from mtl_jax.tasks.base import PerExample, Task
from mtl_jax.tasks.label_names import LabelNames, named
from mtl_jax.tasks.ranks import correlations
from mtl_jax.tasks.reading import known, known_rows, labelled, text_of
from mtl_jax.tasks.row_statistics import RowStatistics, by_row, shares


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ordinal(Task):
    """One of a list of labels in an order, for each text or pair of texts (Frank and Hall, 2001; Cheng et al., 2008).

    Output i is the logit of "above label i". The predicted label is above as many as have a probability of more than half.

    Attributes:
        name: The task's name: its key in losses, weights, metrics and params["heads"].
        source: The source whose rows it labels.
        column: The column of that source with the label.
        labels: The labels, the lowest first; empty: those of the training file, which must then be finite
            numbers, each written in one way.
        label_names: As in Classification.
        unlabelled: The values that mean "no label". Such rows count neither in loss nor metrics.
        hidden: Width of a hidden ReLU layer in the head; 0 for a linear head.
        dropout: Dropout rate in front of the head.
        metric: The main metric: kappa (Cohen's, with quadratic weights), spearman, accuracy, or within_one, the share that is
            off by one label at most.

    Examples:
        >>> mtl_jax.Ordinal(name="stars", source="reviews", column="stars", labels=("1", "2", "3")).labels
        ('1', '2', '3')
    """

    column: str = "label"
    labels: tuple[str, ...] = ()
    label_names: LabelNames = dataclasses.field(default_factory=dict, metadata=ONLY_IF_SET)
    unlabelled: tuple[str, ...] = ("",)
    metric: str = "kappa"

    metric_names: ClassVar[tuple[str, ...]] = ("kappa", "spearman", "accuracy", "within_one")
    compared_as: ClassVar[str] = "sigmoid"

    @property
    def outputs(self) -> int:
        return len(self.labels) - 1

    def check(self) -> None:
        super().check()
        if len(set(self.labels)) != len(self.labels):
            raise UserError(f"task {self.name!r}: its label set has a label twice")
        if len(self.labels) == 1:
            raise UserError(f"task {self.name!r}: labels has {self.labels[0]!r} only; an order needs two")

    def raw_label(self, row: Row) -> str | None:
        text = text_of(row, self.column, self)
        return None if text in self.unlabelled else text

    def filled(self, rows: Iterable[Row], tokenizer: Any) -> Self:
        if self.labels:
            return named(self)
        labels = sorted({text for row in rows if (text := self.raw_label(row)) is not None})
        advice = "so their order is not known; give labels, the lowest first"
        try:
            number_of = {label: float(label) for label in labels}
        except ValueError:
            raise UserError(f"task {self.name!r}: its labels ({listed(labels)}) are not numbers, {advice}") from None
        if infinite := [label for label, number in number_of.items() if not math.isfinite(number)]:
            raise UserError(f"task {self.name!r}: its labels {listed(infinite)} are not finite numbers, {advice}")
        order = sorted(labels, key=number_of.__getitem__)
        for label, other in itertools.pairwise(order):
            if number_of[label] == number_of[other]:
                problem = f"its labels {label!r} and {other!r} are one number"
                raise UserError(f"task {self.name!r}: {problem}, {advice}, or write the number in one way")
        task = dataclasses.replace(self, labels=tuple(order))
        task.check()
        return named(task)

    def parse(self, row: Row) -> int | None:
        text = self.raw_label(row)
        if text is None:
            return None
        if text not in self.index_of:
            raise ValueError(f"label {quoted(text)} is not in the label set ({listed(self.labels)})")
        return self.index_of[text]

    def loss(self, outputs_RxSxO: jax.Array, labels_RxS: jax.Array, batch: Batch | None = None) -> tuple[jax.Array, jax.Array]:
        """Mean of the K - 1 sigmoid cross-entropies in nats: sum over labelled examples, and their number."""
        known_RxS = labels_RxS != self.missing
        above_RxSxO = (labels_RxS[..., None] > jnp.arange(self.outputs)).astype(jnp.float32)
        loss_RxS = optax.sigmoid_binary_cross_entropy(outputs_RxSxO.astype(jnp.float32), above_RxSxO).mean(axis=-1)
        return jnp.where(known_RxS, loss_RxS, 0.0).sum(), known_RxS.sum().astype(jnp.float32)

    def metrics(self, outputs: PerExample, examples: Examples) -> dict[str, float]:
        return self.scores(*labelled(self, outputs, examples))

    def row_statistics(self, outputs: PerExample, examples: Examples) -> RowStatistics:
        outputs_MxO, labels_M = labelled(self, outputs, examples)
        predicted_M = (outputs_MxO > 0).sum(axis=1)
        error_M = np.abs(predicted_M - labels_M)
        if self.metric == "kappa":
            each_MxK = [numbers_M[:, None] == np.arange(len(self.labels)) for numbers_M in (predicted_M, labels_M)]
            statistics = RowStatistics(
                np.concatenate([np.square(error_M)[:, None], *each_MxK], axis=1).astype(np.float64), "kappa"
            )
        elif self.metric == "spearman":
            statistics = RowStatistics(np.stack([predicted_M, labels_M], axis=1).astype(np.float64), "spearman")
        else:
            statistics = RowStatistics(shares(error_M <= (self.metric == "within_one")), "mean")
        return by_row(statistics, examples.row_of[known_rows(self, examples)], len(examples.data))

    def scores(self, outputs_NxO: np.ndarray, labels_N: np.ndarray) -> dict[str, float]:
        """The metrics, and the mean absolute error in labels; kappa and spearman are NaN where they are not defined."""
        predicted_N = (outputs_NxO > 0).sum(axis=1)
        error_N = np.abs(predicted_N - labels_N)
        chance = _chance(predicted_N, labels_N, len(self.labels))
        finite = np.isfinite(outputs_NxO).all()
        return {
            "kappa": float(1 - np.square(error_N).mean() / chance) if chance else math.nan,
            "spearman": correlations(predicted_N, labels_N)["spearman"] if finite else math.nan,
            "accuracy": float((error_N == 0).mean()),
            "within_one": float((error_N <= 1).mean()),
            "mean_absolute_error": float(error_N.mean()),
        }

    def constant(self, train: Examples, test: Examples) -> np.ndarray:
        labels_N = known(self, train)
        above_O = (labels_N[:, None] > np.arange(self.outputs)).sum(axis=0)
        logits_O = np.log((above_O + 0.5) / (len(labels_N) - above_O + 0.5)).astype(np.float32)
        return np.tile(logits_O, (len(test.tokens), 1))

    def probabilities(self, output: np.ndarray) -> dict[str, float]:
        """{label: probability}, from the probabilities of being above each label, made descending."""
        above_O = np.minimum.accumulate(1 / (1 + np.exp(-np.asarray(output, np.float64))))
        shares_K = -np.diff(np.concatenate([[1.0], above_O, [0.0]]))
        return dict(zip(self.labels, shares_K.tolist(), strict=True))

    def describe(self, outputs: Sequence[np.ndarray], windows: Sequence[Window], row: Row) -> dict[str, Any]:
        best = int((np.asarray(outputs[0]) > 0).sum())
        probability = self.probabilities(outputs[0])[self.labels[best]]
        return {"label": self.shown_labels[best], "probability": round(probability, 6)}


def _chance(predicted_N: np.ndarray, labels_N: np.ndarray, labels: int) -> float:
    """The expected squared error of predictions that have their distribution, and no regard to the text."""
    shares = [np.bincount(values, minlength=labels) / len(values) for values in (predicted_N, labels_N)]
    squares_KxK = np.square(np.subtract.outer(np.arange(labels), np.arange(labels)))
    return float(shares[0] @ squares_KxK @ shares[1])
