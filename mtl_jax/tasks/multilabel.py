"""Multilabel classification: any number of a set of labels for each text; sigmoid cross-entropy, F1."""

from __future__ import annotations

import dataclasses
from collections import Counter
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
from mtl_jax.tasks.base import PerExample
from mtl_jax.tasks.label_names import LabelNames, named
from mtl_jax.tasks.reading import column, known, known_rows, labelled, text_of
from mtl_jax.tasks.row_statistics import RowStatistics, by_row, shares
from mtl_jax.tasks.text_head import TextTask

YES_NO = {"1": 1, "0": 0, "true": 1, "false": 0, "yes": 1, "no": 0, "1.0": 1, "0.0": 0}
INDICATORS = "where a row says yes or no for each label, give each label its own column and name these in columns"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Multilabel(TextTask):
    """Any number of a set of labels, none included, for each text or pair of texts.

    The labels of a row are in one column, or each label has a column with yes or no.

    Attributes:
        name: The task's name: its key in losses, weights, metrics and params["heads"].
        source: The source whose rows it labels.
        column: The column of that source with the labels, each once: a list, or text. An empty value means that no label
            applies. A list of yes and no for each label, such as [1, 0, 1], is refused: see columns.
        separator: The text between labels that are given as text; spaces around labels are removed.
        columns: In place of `column`, a column for each label with the label's name: 1, true or yes where the label applies,
            0, false or no where it does not, empty where that is not known.
        labels: The label set in order; empty: all labels of the training file, sorted.
        label_names: The names of labels that people read, {label: name}, in predictions, logs, reports and exports; or the
            path of a file with them: a JSON object, or lines with a label, a tab and its name.
        unlabelled: The values, in `column` or in one of `columns`, that mean "not known which labels apply". They count neither
            in loss nor metrics.
        hidden: Width of a hidden ReLU layer in the head; 0 for a linear head.
        dropout: Dropout rate in front of the head.
        head: family: the text classifier of the checkpoint's family, as transformers has it, so that the exported run opens in
            pipeline("text-classification"). Empty: linear layers on the mean of the token vectors.
        metric: The main metric: micro_f1, macro_f1 or exact_match.

    Examples:
        >>> mtl_jax.Multilabel(name="topics", source="news", columns=("sport", "politics")).columns
        ('sport', 'politics')
    """

    column: str = "labels"
    separator: str = ","
    columns: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    label_names: LabelNames = dataclasses.field(default_factory=dict, metadata=ONLY_IF_SET)
    unlabelled: tuple[str, ...] = ()
    metric: str = "micro_f1"

    metric_names: ClassVar[tuple[str, ...]] = ("micro_f1", "macro_f1", "exact_match")
    compared_as: ClassVar[str] = "sigmoid"
    conflict_advice: ClassVar[str] = "only the first row of a text is learned from; put all labels of a text in one row"

    @property
    def outputs(self) -> int:
        return len(self.labels)

    @property
    def label_shape(self) -> tuple[int, ...]:
        return (len(self.labels),)

    def check(self) -> None:
        super().check()
        for field, names in (("label", self.labels), ("column", self.columns)):
            if len(set(names)) != len(names):
                raise UserError(f"task {self.name!r}: its {field}s have a {field} twice")
        if self.columns and self.labels not in ((), self.columns):
            raise UserError(f"task {self.name!r}: its columns are its labels; leave labels empty")
        if not self.separator:
            raise UserError(f"task {self.name!r}: separator is empty; give the text between two labels")

    def filled(self, rows: Iterable[Row], tokenizer: Any) -> Self:
        if self.labels:
            return named(self)
        if self.columns:
            return named(dataclasses.replace(self, labels=self.columns))
        label_lists = [labels for row in rows if (labels := self.raw_label(row)) is not None]
        label_set = sorted({label for labels in label_lists for label in labels})
        if not label_set:
            raise UserError(f"task {self.name!r}: no row of source {self.source!r} has a label in column {self.column!r}")
        if {label.lower() for label in label_set} <= YES_NO.keys() and {len(labels) for labels in label_lists} == {2}:
            what = f"every row has two labels in column {self.column!r}, and the labels are {listed(label_set)}"
            raise UserError(f"task {self.name!r}: {what}; {INDICATORS}")
        return named(dataclasses.replace(self, labels=tuple(label_set)))

    def parse(self, row: Row) -> np.ndarray | None:
        """i32[O]: 1 where a label applies, 0 where not, -1 where that is not known."""
        if self.columns:
            label_O = np.array([self._yes_no(name, text_of(row, name, self)) for name in self.columns], self.dtype)
            return label_O if (label_O != self.missing).any() else None
        labels = self.raw_label(row)
        if labels is None:
            return None
        label_O = np.zeros(len(self.labels), self.dtype)
        for label in labels:
            if label not in self.index_of:
                hint = f"; {INDICATORS}" if label.lower() in YES_NO else ""
                raise ValueError(f"label {quoted(label)} is not in the label set ({listed(self.labels)}){hint}")
            label_O[self.index_of[label]] = 1
        return label_O

    def loss(self, outputs: jax.Array, labels: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Sigmoid cross-entropy in nats, mean over an example's known labels: sum over examples with any, and their number.

        Args:
            outputs: Logits f[R, S, O].
            labels: i32[R, S, O].
            batch: Not used.
        """
        known_RxSxO = labels != self.missing
        loss_RxSxO = optax.sigmoid_binary_cross_entropy(outputs.astype(jnp.float32), (labels == 1).astype(jnp.float32))
        count_RxS = known_RxSxO.sum(axis=-1)
        loss_RxS = jnp.where(known_RxSxO, loss_RxSxO, 0.0).sum(axis=-1) / jnp.maximum(count_RxS, 1)
        return loss_RxS.sum(), (count_RxS > 0).sum().astype(jnp.float32)

    def metrics(self, outputs: PerExample, examples: Examples) -> dict[str, float]:
        return self.scores(*labelled(self, outputs, examples))

    def row_statistics(self, outputs: PerExample, examples: Examples) -> RowStatistics:
        outputs_MxO, labels_MxO = labelled(self, outputs, examples)
        known_MxO, predicted_MxO, gold_MxO = labels_MxO != self.missing, outputs_MxO > 0, labels_MxO == 1
        if self.metric == "exact_match":
            statistics = RowStatistics(shares(((gold_MxO == predicted_MxO) | ~known_MxO).all(axis=1)), "mean")
        else:
            counts = [part & known_MxO for part in (predicted_MxO & gold_MxO, predicted_MxO, gold_MxO)]
            if self.metric == "micro_f1":
                counts = [part.sum(axis=1, keepdims=True) for part in counts]
            statistics = RowStatistics(np.concatenate(counts, axis=1).astype(np.float64), "f1_of_all")
        return by_row(statistics, examples.row_of[known_rows(self, examples)], len(examples.data))

    def scores(self, outputs_NxO: np.ndarray, labels_NxO: np.ndarray) -> dict[str, float]:
        """F1 over all decisions together, mean of the labels' F1, and the share of examples with every decision right.

        A label is predicted where its probability is above 0.5. Unknown labels count in none of them. A label that neither
        occurs nor is predicted has F1 0.
        """
        from sklearn.metrics import f1_score

        known_NxO, predicted_NxO = labels_NxO != self.missing, (outputs_NxO > 0).astype(self.dtype)

        def f1(labels: np.ndarray, predicted: np.ndarray, known: np.ndarray) -> float:
            return float(f1_score(labels[known], predicted[known], zero_division=0)) if known.any() else 0.0

        by_label = [f1(*columns) for columns in zip(labels_NxO.T, predicted_NxO.T, known_NxO.T, strict=True)]
        return {
            "micro_f1": f1(labels_NxO, predicted_NxO, known_NxO),
            "macro_f1": float(np.mean(by_label)),
            "exact_match": float(((labels_NxO == predicted_NxO) | ~known_NxO).all(axis=1).mean()),
        }

    def constant(self, train: Examples, test: Examples) -> PerExample:
        labels_NxO = known(self, train)
        # Half an example is added to each, so that a label without any is unlikely, not impossible.
        yes_O, no_O = (labels_NxO == 1).sum(axis=0) + 0.5, (labels_NxO == 0).sum(axis=0) + 0.5
        return np.tile(np.log(yes_O / no_O).astype(np.float32), (len(test.tokens), 1))

    def probabilities(self, output: np.ndarray) -> dict[str, float]:
        return dict(zip(self.labels, np.asarray(jax.nn.sigmoid(output)).tolist(), strict=True))

    def describe(self, outputs: Sequence[np.ndarray], windows: Sequence[Window], row: Row) -> dict[str, Any]:
        probabilities = {
            label: round(float(probability), 6)
            for label, probability in zip(self.shown_labels, np.asarray(jax.nn.sigmoid(outputs[0])), strict=True)
        }
        predicted = [label for label, output in zip(self.shown_labels, outputs[0], strict=True) if output > 0]
        return {"labels": predicted, "probabilities": probabilities}

    def raw_label(self, row: Row) -> list[str] | None:
        """The labels in `column`; None where the row has none, or where each label has a column."""
        if self.columns:
            return None
        value = column(row, self.column, self)
        if value is None or (isinstance(value, str) and value in self.unlabelled):
            return None
        parts = value.split(self.separator) if isinstance(value, str) else value
        if not all(isinstance(part, str) for part in parts):
            what = f"{quoted(value)} in column {self.column!r}"
            raise UserError(f"{row.where}: task {self.name!r}: {what} is a list with values other than text")
        labels = [part.strip() for part in parts if part.strip()]
        twice = next((label for label, count in Counter(labels).items() if count > 1), None)
        if twice is not None:
            what = f"label {quoted(twice)} occurs twice in column {self.column!r}, {quoted(value)}"
            raise UserError(f"{row.where}: task {self.name!r}: {what}; write it once, or: {INDICATORS}")
        return labels

    def _yes_no(self, name: str, value: str | None) -> int:
        if not value or value in self.unlabelled:
            return -1
        if value.lower() not in YES_NO:
            raise ValueError(f"{quoted(value)} in column {name!r} is neither yes (1, true, yes) nor no (0, false, no)")
        return YES_NO[value.lower()]
