"""Multiple choice: which of a few texts goes with a text, such as the answer to a question or the end of a story.

Shapes in names: R rows, S examples a row, Q questions of a batch, N choices of a question, M examples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.core.errors import UserError, listed
from mtl_jax.core.row_texts import quoted
from mtl_jax.data.batches import Batch
from mtl_jax.data.examples import Examples
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.labels import Window
from mtl_jax.data.source import Source
from mtl_jax.tasks import ranks
from mtl_jax.tasks.base import PerExample, Task
from mtl_jax.tasks.reading import column, text_of
from mtl_jax.tasks.row_statistics import RowStatistics, by_row

PRESENT, RIGHT = 0, 1  # in a label, i32[2]: whether there is such a choice, and whether it is the right one
NEVER = -1e9  # the logit of a choice that the row does not have


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultipleChoice(Task):
    """One of a row's choices; the text and each choice are read as a pair, and a softmax compares the choices' scores.

    The choices of a row are examples that share a row of a batch. Each has 1 / n of batch.row_length for text and choice.

    Attributes:
        name: The task's name: its key in losses, weights, metrics and params["heads"].
        source: The source whose `text` is the question. Rows with the same text count as repeated: name a column of a choice as
            the source's `pair` where questions repeat.
        choices: The columns with the choices; or the one column with the list of them, of any length up to `most`.
        most: Where `choices` is one column: the most choices of a row.
        column: The column with the right choice.
        answers: The values of that column for the first choice, the second one, ...; empty: 0, 1, ...
        unlabelled: The values that mean "no label". Such rows count neither in loss nor metrics.
        hidden: Width of a hidden ReLU layer in the head; 0 for a linear head.
        dropout: Dropout rate in front of the head.
        metric: The main metric: accuracy, or mrr, the mean reciprocal rank of the right choice.

    Examples:
        >>> task = mtl_jax.MultipleChoice(name="ending", source="stories", choices=("first", "second"), column="right")
    """

    choices: tuple[str, ...]
    most: int = 0
    column: str = "label"
    answers: tuple[str, ...] = ()
    unlabelled: tuple[str, ...] = ("",)
    metric: str = "accuracy"

    metric_names: ClassVar[tuple[str, ...]] = ("accuracy", "mrr")
    outputs: ClassVar[int] = 1
    several_texts: ClassVar[bool] = True
    label_shape: ClassVar[tuple[int, ...]] = (2,)

    @property
    def unit_size(self) -> int:
        return self.most if len(self.choices) == 1 else len(self.choices)

    @property
    def text_columns(self) -> tuple[str, ...]:
        return self.choices

    def check(self) -> None:
        super().check()
        where = f"task {self.name!r}"
        if not self.choices:
            raise UserError(f"{where}: choices is empty; name the columns of the choices, or the column with their list")
        if len(self.choices) == 1 and self.most < 2:
            raise UserError(f"{where}: choices is one column with a list; set most to the most choices of a row, at least 2")
        if len(self.choices) > 1 and self.most:
            raise UserError(f"{where}: most is for choices in one column, but there are {len(self.choices)}: leave it at 0")
        if self.answers and len(self.answers) != self.unit_size:
            raise UserError(f"{where}: answers has {len(self.answers)} values for {self.unit_size} choices")

    def check_source(self, source: Source) -> None:
        if source.pair and source.pair not in self.choices:
            raise UserError(
                f"task {self.name!r}: source {source.name!r} has pairs, and choices are the second texts; leave its pair out"
            )

    def texts_of(self, row: Row, source: Source) -> list[tuple[str, str]]:
        text = row.columns[source.text]
        question = text if isinstance(text, str) else " ".join(text)
        choices = self.choices_of(row)
        return [(question, choice) for choice in (*choices, *[""] * (self.unit_size - len(choices)))]

    def choices_of(self, row: Row) -> list[str]:
        """The choices of a row; "" for a column that is empty.

        Raises:
            UserError: A column is missing, or has something else than text; or there are more than `most`.
        """
        if len(self.choices) > 1:
            return [text_of(row, name, self) or "" for name in self.choices]
        values = column(row, self.choices[0], self)
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise UserError(f"{row.where}: task {self.name!r}: column {self.choices[0]!r} is no list of texts")
        if len(values) > self.most:
            raise UserError(f"{row.where}: task {self.name!r}: the row has {len(values)} choices, and most is {self.most}")
        return list(values)

    def raw_label(self, row: Row) -> str | None:
        text = text_of(row, self.column, self)
        return None if text in self.unlabelled else text

    def parse(self, row: Row) -> tuple[int, tuple[bool, ...]] | None:
        """The index of the right choice, and which choices there are; None where the row has no label."""
        text = self.raw_label(row)
        if text is None:
            return None
        answers = self.answers or tuple(map(str, range(self.unit_size)))
        if text not in answers:
            raise ValueError(f"label {quoted(text)} is none of the answers ({listed(answers)})")
        choices, index = self.choices_of(row), answers.index(text)
        present = tuple(bool(choice.strip()) for choice in choices) + (False,) * (self.unit_size - len(choices))
        if not present[index]:
            raise ValueError(f"label {quoted(text)} is that of a choice that the row does not have")
        return index, present

    def window_label(self, label: Any, window: Window) -> np.ndarray:
        if label is None:
            return np.full(2, self.missing, self.dtype)
        index, present = label
        return np.array([present[window.number], window.number == index], self.dtype)

    def loss(self, outputs: jax.Array, labels: jax.Array, batch: Batch | None = None) -> tuple[jax.Array, jax.Array]:
        """Softmax cross-entropy in nats over a row's choices: sum over labelled rows, and their number."""
        R, S, _ = outputs.shape
        N = self.unit_size
        score_QxN = outputs[:, : S // N * N, 0].reshape(R * (S // N), N).astype(jnp.float32)
        label_QxNx2 = labels[:, : S // N * N].reshape(R * (S // N), N, 2)
        right_QxN = label_QxNx2[..., RIGHT] == 1
        score_QxN = jnp.where(label_QxNx2[..., PRESENT] == 1, score_QxN, NEVER)
        known_Q = right_QxN.any(axis=1)
        loss_Q = jax.nn.logsumexp(score_QxN, axis=1) - jnp.where(right_QxN, score_QxN, 0.0).sum(axis=1)
        return jnp.where(known_Q, loss_Q, 0.0).sum(), known_Q.sum().astype(jnp.float32)

    def metrics(self, outputs: PerExample, examples: Examples) -> dict[str, float]:
        scores = ranks.of_lists(list(self._lists(outputs, examples).values()))
        return {name: scores[name] for name in self.metric_names}

    def row_statistics(self, outputs: PerExample, examples: Examples) -> RowStatistics:
        lists = self._lists(outputs, examples)
        statistics = ranks.statistics(self.metric, list(lists.values()))
        return by_row(statistics, list(lists), len(examples.data))

    def _lists(self, outputs: PerExample, examples: Examples) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """{row: (score of each choice, whether it is the right one)} of the rows with a label."""
        score_M, labels_Mx2 = np.asarray(outputs)[:, 0], examples.labels[self.name]
        lists = {}
        for group in examples.groups():
            places = np.array([i for i in group if labels_Mx2[i, PRESENT] == 1], np.int64)
            if len(places):
                lists[int(examples.row_of[group[0]])] = (score_M[places], labels_Mx2[places, RIGHT])
        return lists

    def describe(self, outputs: Sequence[np.ndarray], windows: Sequence[Window], row: Row) -> dict[str, Any]:
        """The index and the text of the likeliest choice, its probability, and those of all choices that the row has."""
        choices = self.choices_of(row)
        pairs = zip(outputs, choices, strict=False)
        score_N = np.array([float(output[0]) if choice.strip() else -np.inf for output, choice in pairs])
        if not np.isfinite(score_N).any():
            return {"error": "the row has no choice"}
        share_N = np.exp(score_N - score_N.max())
        share_N /= share_N.sum()
        best = int(share_N.argmax())
        probabilities = [round(float(share), 6) for share in share_N]
        answer = {"choice": best, "text": choices[best], "probability": probabilities[best], "probabilities": probabilities}
        return answer | ({"answer": self.answers[best]} if self.answers else {})
