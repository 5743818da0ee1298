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
from mtl_jax.core.files import shown
from mtl_jax.data.batches import Batch
from mtl_jax.data.examples import Examples
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.labels import Window
from mtl_jax.tasks.base import PerExample, Task, column, known, labelled, text_of

YES_NO = {"1": 1, "0": 0, "true": 1, "false": 0, "yes": 1, "no": 0, "1.0": 1, "0.0": 0}
INDICATORS = "where a row says yes or no for each label, give every label a column of its own and name them in columns"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Multilabel(Task):
    """Any number of a set of labels, or none of them, for each text or pair of texts.

    The labels of a row stand in one column, or there is a column for each label that says whether it applies.

    Attributes:
        name: The task's name: its key in losses, weights, metrics and params["heads"].
        source: The source whose rows it labels.
        column: The column of that source that holds the labels, each once: a list, or text. An empty one says that no label
            applies. A list of yes and no for each label, such as [1, 0, 1], is refused: see columns.
        separator: What stands between labels that are given as text; spaces around labels are left out.
        columns: In place of `column`, a column for each label, which is named like it: 1, true or yes where the label applies,
            0, false or no where it does not, empty where that is not known.
        labels: The label set in order; empty means every label found in the training file, sorted.
        unlabelled: What is written where it is not known which labels apply: in `column`, or in one of `columns`. It counts
            neither in loss nor metrics.
        hidden: Width of a hidden ReLU layer in the head; 0 for a linear head.
        dropout: Dropout rate in front of the head.
        metric: The metric that stands for the task: micro_f1, macro_f1 or exact_match.
    """

    column: str = "labels"
    separator: str = ","
    columns: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    unlabelled: tuple[str, ...] = ()
    metric: str = "micro_f1"

    metric_names: ClassVar[tuple[str, ...]] = ("micro_f1", "macro_f1", "exact_match")
    compared_as: ClassVar[str] = "sigmoid"
    several: ClassVar[str] = "only the first row of a text is learned from; put all labels of a text in one row"

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
                raise UserError(f"task {self.name!r}: a {field} stands twice in its {field}s")
        if self.columns and self.labels not in ((), self.columns):
            raise UserError(f"task {self.name!r}: its columns are its labels; leave labels empty")
        if not self.separator:
            raise UserError(f"task {self.name!r}: separator is empty; give the text that stands between two labels")

    def filled(self, rows: Iterable[Row], tokenizer: Any) -> Self:
        if self.labels:
            return self
        if self.columns:
            return dataclasses.replace(self, labels=self.columns)
        written = [labels for row in rows if (labels := self.written(row)) is not None]
        found = sorted({label for labels in written for label in labels})
        if not found:
            raise UserError(f"task {self.name!r}: no row of source {self.source!r} has a label in column {self.column!r}")
        if {label.lower() for label in found} <= YES_NO.keys() and {len(labels) for labels in written} == {2}:
            what = f"every row has two labels in column {self.column!r}, and the labels are {listed(found)}"
            raise UserError(f"task {self.name!r}: {what}; {INDICATORS}")
        return dataclasses.replace(self, labels=tuple(found))

    def parse(self, row: Row) -> np.ndarray | None:
        """i32[O]: 1 where a label applies, 0 where not, -1 where that is not known."""
        if self.columns:
            label_O = np.array([self._yes_no(name, text_of(row, name, self)) for name in self.columns], self.dtype)
            return label_O if (label_O != self.missing).any() else None
        written = self.written(row)
        if written is None:
            return None
        label_O = np.zeros(len(self.labels), self.dtype)
        for label in written:
            if label not in self.place_of:
                hint = f"; {INDICATORS}" if label.lower() in YES_NO else ""
                raise ValueError(f"label {shown(label)!r} is not in the label set ({listed(self.labels)}){hint}")
            label_O[self.place_of[label]] = 1
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
        number_RxS = known_RxSxO.sum(axis=-1)
        loss_RxS = jnp.where(known_RxSxO, loss_RxSxO, 0.0).sum(axis=-1) / jnp.maximum(number_RxS, 1)
        return loss_RxS.sum(), (number_RxS > 0).sum().astype(jnp.float32)

    def metrics(self, outputs: PerExample, examples: Examples) -> dict[str, float]:
        return self.scores(*labelled(self, outputs, examples))

    def scores(self, outputs_NxO: np.ndarray, labels_NxO: np.ndarray) -> dict[str, float]:
        """F1 over all decisions together, mean of the labels' F1, and the share of examples with every decision right.

        A label is predicted where its probability is above 0.5. What is not known counts in none of them. A label that neither
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
        # Half an example more of each, so that a label that train lacks is unlikely, not impossible.
        yes_O, no_O = (labels_NxO == 1).sum(axis=0) + 0.5, (labels_NxO == 0).sum(axis=0) + 0.5
        return np.tile(np.log(yes_O / no_O).astype(np.float32), (len(test.tokens), 1))

    def describe(self, outputs: Sequence[np.ndarray], windows: Sequence[Window], row: Row) -> dict[str, Any]:
        probabilities = {
            label: round(float(probability), 6)
            for label, probability in zip(self.labels, np.asarray(jax.nn.sigmoid(outputs[0])), strict=True)
        }
        predicted = [label for label, output in zip(self.labels, outputs[0], strict=True) if output > 0]
        return {"labels": predicted, "probabilities": probabilities}

    def written(self, row: Row) -> list[str] | None:
        """The labels that stand in `column`; None where the row has none, or labels have columns of their own."""
        if self.columns:
            return None
        written = column(row, self.column, self)
        if written is None or (isinstance(written, str) and written in self.unlabelled):
            return None
        parts = written.split(self.separator) if isinstance(written, str) else written
        if not all(isinstance(part, str) for part in parts):
            what = f"{shown(repr(written))} in column {self.column!r}"
            raise UserError(f"{row.where}: task {self.name!r}: {what} holds something else than text")
        labels = [part.strip() for part in parts if part.strip()]
        twice = next((label for label, count in Counter(labels).items() if count > 1), None)
        if twice is not None:
            what = f"label {shown(twice)!r} stands twice in column {self.column!r}, {shown(repr(written))}"
            raise UserError(f"{row.where}: task {self.name!r}: {what}; write it once, or: {INDICATORS}")
        return labels

    def _yes_no(self, name: str, written: str | None) -> int:
        if not written or written in self.unlabelled:
            return -1
        if written.lower() not in YES_NO:
            raise ValueError(f"{shown(written)!r} in column {name!r} says neither yes (1, true, yes) nor no (0, false, no)")
        return YES_NO[written.lower()]
