"""Single-label classification: softmax cross-entropy, accuracy, F1, Matthews correlation."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Self

import jax
import numpy as np

from mtl_jax.core.errors import UserError, listed
from mtl_jax.core.parts import ONLY_IF_SET
from mtl_jax.core.row_texts import quoted
from mtl_jax.data.batches import Batch
from mtl_jax.data.examples import Examples
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.labels import Window
from mtl_jax.tasks import metrics
from mtl_jax.tasks.base import PerExample
from mtl_jax.tasks.label_names import LabelNames, named
from mtl_jax.tasks.losses import balanced_weights, check_weights, cross_entropy
from mtl_jax.tasks.reading import known, known_rows, labelled, text_of
from mtl_jax.tasks.row_statistics import RowStatistics, by_row, of_labels
from mtl_jax.tasks.text_head import TextTask


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification(TextTask):
    """One of a set of labels for each text, or pair of texts.

    Attributes:
        name: The task's name: its key in losses, weights, metrics and params["heads"].
        source: The source whose rows it labels.
        column: The column of that source with the label.
        labels: The label set in order; empty: all labels of the training file, sorted.
        label_names: The names of labels that people read, {label: name}, in predictions, logs, reports and exports; or the
            path of a file with them: a JSON object, or lines with a label, a tab and its name.
        threshold: For columns of numbers and two labels: a number above it is the second label, any other the first. None: the
            column has the label itself.
        unlabelled: The values that mean "no label". Such rows count neither in loss nor metrics.
        hidden: Width of a hidden ReLU layer in the head; 0 for a linear head.
        dropout: Dropout rate in front of the head.
        head: family: the text classifier of the checkpoint's family, as transformers has it, so that the exported run opens in
            pipeline("text-classification"). Empty: linear layers on the mean of the token vectors.
        label_smoothing: Share of the target probability spread evenly over the labels.
        balanced: Whether an example's loss counts n / (K n_c): n_c of n training examples have its label, K labels occur there.
        class_weights: How much an example's loss counts, by its label; 1 for labels that are not named.
        metric: The main metric: accuracy, macro_f1, macro_recall, matthews; f1:LABEL, the F1 of one label;
            f1:LABEL+LABEL, the mean F1 of several. tasks/metrics.py lists those of TweetEval.

    Examples:
        >>> task = mtl_jax.Classification(name="emotion", source="tweets", column="label", label_names={"0": "anger"})
    """

    column: str = "label"
    labels: tuple[str, ...] = ()
    label_names: LabelNames = dataclasses.field(default_factory=dict, metadata=ONLY_IF_SET)
    threshold: float | None = None
    unlabelled: tuple[str, ...] = ("",)
    label_smoothing: float = 0.0
    balanced: bool = False
    class_weights: dict[str, float] = dataclasses.field(default_factory=dict)
    metric: str = "accuracy"

    compared_as: ClassVar[str] = "softmax"
    conflict_advice: ClassVar[str] = (
        "for several labels of a text, put them in one row and declare a Multilabel; else correct them"
    )

    @property
    def metric_names(self) -> tuple[str, ...]:
        return metrics.names(self.metric)

    @property
    def outputs(self) -> int:
        return len(self.labels)

    def check(self) -> None:
        super().check()
        if self.threshold is not None and len(self.labels) != 2:
            raise UserError(f"task {self.name!r}: a threshold needs two labels, not {len(self.labels)}")
        if len(set(self.labels)) != len(self.labels):
            raise UserError(f"task {self.name!r}: its label set has a label twice")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"task {self.name!r}: label_smoothing is {self.label_smoothing}; it must be at least 0 and below 1")
        if self.labels:
            metrics.f1_labels(self.metric, self.labels)
        check_weights(self.name, self.balanced, self.class_weights, self.labels)

    def raw_label(self, row: Row) -> str | None:
        text = text_of(row, self.column, self)
        return None if text in self.unlabelled else text

    def filled(self, rows: Iterable[Row], tokenizer: Any) -> Self:
        if self.labels:
            return named(self)
        labels = {text for row in rows if (text := self.raw_label(row)) is not None}
        task = dataclasses.replace(self, labels=tuple(sorted(labels)))
        task.check()
        return named(task)

    def fitted(self, train: Examples) -> Self:
        if not self.balanced:
            return self
        return dataclasses.replace(self, class_weights=balanced_weights(train.labels[self.name], self.labels))

    def parse(self, row: Row) -> int | None:
        text = self.raw_label(row)
        if text is None:
            return None
        if self.threshold is not None:
            try:
                number = float(text)
            except ValueError:
                number = math.nan
            if math.isnan(number):
                raise ValueError(f"{quoted(text)} is not a number, and the task has a threshold")
            return int(number > self.threshold)
        if text not in self.index_of:
            raise ValueError(f"label {quoted(text)} is not in the label set ({listed(self.labels)})")
        return self.index_of[text]

    def loss(self, outputs_RxSxO: jax.Array, labels_RxS: jax.Array, batch: Batch | None = None) -> tuple[jax.Array, jax.Array]:
        """Cross-entropy in nats: sum over labelled examples, and their number."""
        return cross_entropy(outputs_RxSxO, labels_RxS, self.labels, self.class_weights, self.label_smoothing)

    def metrics(self, outputs: PerExample, examples: Examples) -> dict[str, float]:
        return self.scores(*labelled(self, outputs, examples))

    def row_statistics(self, outputs: PerExample, examples: Examples) -> RowStatistics:
        outputs_MxO, labels_M = labelled(self, outputs, examples)
        statistics = of_labels(self.metric, labels_M, outputs_MxO.argmax(axis=-1), self.labels)
        return by_row(statistics, examples.row_of[known_rows(self, examples)], len(examples.data))

    def scores(self, outputs_NxO: np.ndarray, labels_N: np.ndarray) -> dict[str, float]:
        """The metrics of metrics.scores."""
        return metrics.scores(labels_N, outputs_NxO.argmax(axis=-1), self.metric, self.labels)

    def constant(self, train: Examples, test: Examples) -> np.ndarray:
        return np.tile(self.prior(known(self, train)), (len(test.tokens), 1))

    def prior(self, labels_N: np.ndarray) -> np.ndarray:
        """f32[O], log frequencies; half an example is added to each, so that a label without any is not impossible."""
        return np.log(np.bincount(labels_N, minlength=self.outputs) + 0.5).astype(np.float32)

    def probe(self, features: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> np.ndarray:
        """Logistic regression on standardised features; the penalty is chosen by dev accuracy."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        if len(set(labels["train"].tolist())) < 2:
            return np.tile(self.prior(labels["train"]), (len(features["test"]), 1))
        models = []
        with warnings.catch_warnings():
            # With the weakest penalty the fit may not converge; it is compared on dev all the same.
            warnings.filterwarnings("ignore", module="sklearn")
            for penalty in (0.001, 0.01, 0.1, 1.0):
                model = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=300))
                model.fit(features["train"], labels["train"])
                models.append((model.score(features["dev"], labels["dev"]), model))
            best = max(models, key=lambda pair: pair[0])[1]
            log_probs_NxC = best.predict_log_proba(features["test"])
        floor = -30.0  # a log probability: losses are finite even where a test label never occurs in train
        outputs_NxO = np.full((len(log_probs_NxC), self.outputs), floor, np.float32)
        outputs_NxO[:, best[-1].classes_] = np.maximum(log_probs_NxC, floor)
        return outputs_NxO

    def probabilities(self, output: np.ndarray) -> dict[str, float]:
        return dict(zip(self.labels, np.asarray(jax.nn.softmax(output)).tolist(), strict=True))

    def describe(self, outputs: Sequence[np.ndarray], windows: Sequence[Window], row: Row) -> dict[str, Any]:
        probabilities_O = np.asarray(jax.nn.softmax(outputs[0]))
        best = int(probabilities_O.argmax())
        return {"label": self.shown_labels[best], "probability": round(float(probabilities_O[best]), 6)}
