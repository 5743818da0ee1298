"""Sentence embeddings: a vector for each text, near those of texts with the same meaning or label.

Shapes in names: R rows, S examples a row, G groups of N texts in a batch, O outputs (the width of the vectors), M texts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.core.errors import UserError, unknown
from mtl_jax.core.row_texts import quoted
from mtl_jax.data.batches import Batch
from mtl_jax.data.examples import Examples
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.labels import Window
from mtl_jax.data.source import Source
from mtl_jax.models.trunk_output import Encoded, TrunkFacts
from mtl_jax.tasks import cosine_losses, ranks
from mtl_jax.tasks.base import PerExample, Task
from mtl_jax.tasks.reading import key_numbers, known_rows, text_of
from mtl_jax.tasks.row_statistics import RowStatistics, by_row, shares

# The arguments of ranks.of_search().
Search = tuple[np.ndarray, np.ndarray, Callable[[slice], np.ndarray], Callable[[slice], np.ndarray]]

COMPARE = ("pairs", "labels")
OBJECTIVES = ("in_batch", "cosent", "cosine")
# In a label, f32[4]: the row's score, or the index of its class; whether the row has the text; the text's key.
VALUE, PRESENT, KEY = 0, 1, slice(2, 4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contrastive(Task):
    """A vector for each text, learned from pairs of texts, from pairs with a score, or from texts with a label.

    The vector is the mean of the trunk's token vectors, or a projection of it. A row with a pair is read as two texts, each an
    example of its own, which share a row of a batch. Negatives are the other texts of the whole batch, on all devices, without
    texts that are equal.

    Attributes:
        name: The task's name: its key in losses, weights, metrics and params["heads"].
        source: The source whose texts are read; for pairs its `pair` names the second text.
        compare: pairs: the two texts of a row. labels: texts of different rows, by their label.
        column: The column with the score of a pair, or with the label of a text. Empty: the texts of all pairs mean the same.
        negatives: Columns with further texts, which do not mean the same as the first one; a row may lack some.
        objective: in_batch: cross-entropy of finding a text's partner among all texts (van den Oord et al., 2018; with labels
            Khosla et al., 2020). cosent: the order of pairs by score (Su, 2022). cosine: squared error of the cosine.
        scale: The number that multiplies cosines, the inverse of the temperature; not for the objective cosine.
        minimum: For the objective cosine: the score of pairs whose cosine is to be 0.
        maximum: For the objective cosine: the score of pairs whose cosine is to be 1.
        width: Width of a projection of the trunk's mean vector; 0: that vector itself.
        widths: The loss is the mean over vectors cut to these widths and the whole one (Kusupati et al., 2022, Matryoshka).
        unlabelled: The values of `column` that mean "no score" or "no label".
        hidden: Width of a hidden ReLU layer in the projection.
        dropout: Dropout rate in front of the projection.
        metric: The main metric. Of pairs with a score: spearman or pearson of the cosines. Else, of the search for a text's
            partners: mrr, ndcg (at 10), or accuracy (the share with a partner first). Empty: the first of these.
        classes: For compare labels, the labels; filled in from the data.
        size: The width of the trunk's vectors; filled in.

    Examples:
        >>> task = mtl_jax.Contrastive(name="similar", source="pairs", column="score")
    """

    compare: str = "pairs"
    column: str = ""
    negatives: tuple[str, ...] = ()
    objective: str = "in_batch"
    scale: float = 20.0
    minimum: float = 0.0
    maximum: float = 1.0
    width: int = 0
    widths: tuple[int, ...] = ()
    unlabelled: tuple[str, ...] = ("",)
    metric: str = ""
    classes: tuple[str, ...] = ()
    size: int = 0

    dtype: ClassVar[type[np.generic]] = np.float32
    label_shape: ClassVar[tuple[int, ...]] = (4,)

    def __post_init__(self) -> None:
        if not self.metric:
            object.__setattr__(self, "metric", self.metric_names[0])

    @property
    def scored(self) -> bool:
        """Whether pairs have a score."""
        return self.compare == "pairs" and bool(self.column)

    @property
    def metric_names(self) -> tuple[str, ...]:
        return ("spearman", "pearson") if self.scored else ("mrr", "ndcg", "accuracy")

    @property
    def outputs(self) -> int:
        return self.width or self.size

    @property
    def unit_size(self) -> int:
        return 2 + len(self.negatives) if self.compare == "pairs" else 1

    @property
    def several_texts(self) -> bool:
        return self.compare == "pairs"

    @property
    def whole_batch(self) -> bool:
        return not (self.scored and self.objective == "cosine")

    @property
    def text_columns(self) -> tuple[str, ...]:
        return self.negatives

    def check(self) -> None:
        super().check()
        where = f"task {self.name!r}"
        for field, value, choices in (
            ("compare", self.compare, COMPARE),
            ("objective", self.objective, OBJECTIVES),
        ):
            if value not in choices:
                raise unknown(f"{field} of {where}:", value, choices)
        if self.compare == "labels" and not self.column:
            raise UserError(f"{where}: compare is labels, so column must name the column with the label")
        if self.compare == "labels" and self.negatives:
            raise UserError(f"{where}: negatives are for compare pairs; with labels the texts of other labels are negatives")
        if self.scored and self.objective == "in_batch":
            raise UserError(
                f"{where}: pairs have a score in {self.column!r}, which in_batch does not read; use cosent or cosine"
            )
        if self.compare == "pairs" and not self.column and self.objective != "in_batch":
            raise UserError(f"{where}: objective {self.objective} needs the score of a pair; name its column, or use in_batch")
        if self.scored and self.negatives:
            raise UserError(f"{where}: negatives are for pairs that mean the same; leave out negatives, or column")
        if not self.minimum < self.maximum:
            raise UserError(f"{where}: minimum is {self.minimum:g}; it must be below maximum, {self.maximum:g}")
        if not self.scale > 0:
            raise UserError(f"{where}: scale is {self.scale}; it must be above 0")
        if not self.width and (self.hidden or self.dropout):
            raise UserError(f"{where}: hidden and dropout are those of a projection; give it a width, or leave them at 0")
        if any(width < 1 for width in self.widths):
            raise UserError(f"{where}: widths must be numbers above 0")

    def check_source(self, source: Source) -> None:
        if self.compare == "pairs" and not source.pair:
            raise UserError(
                f"task {self.name!r} compares pairs, and source {source.name!r} names no second text: set its pair, or "
                "compare labels"
            )

    def on(self, trunk: TrunkFacts) -> Self:
        """The task with the width of the trunk's vectors.

        Raises:
            UserError: A width of `widths` is not below that of the vectors.
        """
        task = dataclasses.replace(self, size=trunk.width)
        if wrong := [width for width in self.widths if width >= task.outputs]:
            raise UserError(f"task {self.name!r}: widths has {wrong[0]}, but its vectors have {task.outputs}; use a lower one")
        return task

    def raw_label(self, row: Row) -> str | None:
        text = text_of(row, self.column, self) if self.column else ""
        return None if text is None or (self.column and text in self.unlabelled) else text

    def filled(self, rows: Iterable[Row], tokenizer: Any) -> Self:
        if self.compare != "labels" or self.classes:
            return self
        classes = {text for row in rows if (text := self.raw_label(row)) is not None}
        return dataclasses.replace(self, classes=tuple(sorted(classes)))

    def texts_of(self, row: Row, source: Source) -> list[str]:
        names = [name for name in (source.text, source.pair) if name]
        texts = [row.columns[name] for name in names]
        if source.pair:
            texts += [row.columns.get(name) or "" for name in self.negatives]
        return [text if isinstance(text, str) else " ".join(text) for text in texts]

    def parse(self, row: Row) -> tuple[float, tuple[bool, ...]] | None:
        """The score or class of a row, and which of its texts it has; None without a score or label."""
        text = self.raw_label(row)
        if text is None:
            return None
        present = (True, True, *(bool(text_of(row, name, self)) for name in self.negatives))
        if not self.column:
            return 1.0, present
        if self.compare == "labels":
            if text not in self.classes:
                raise ValueError(f"label {quoted(text)} is on no training row")
            return float(self.classes.index(text)), present
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"score {quoted(text)} is not a finite number")
        if self.objective == "cosine" and not self.minimum <= value <= self.maximum:
            raise ValueError(f"score {quoted(text)} is outside {self.minimum:g}..{self.maximum:g}; set minimum and maximum")
        return value, present

    def window_label(self, label: Any, window: Window) -> np.ndarray:
        """f32[4]: value, whether the text is there, and two numbers of 24 bits that are equal for equal texts."""
        if label is None or (self.compare == "labels" and window.number):
            return np.full(4, self.missing, self.dtype)
        value, present = label
        keys = key_numbers(np.ascontiguousarray(window.tokens).tobytes())
        return np.array([value, present[window.number], *keys], self.dtype)

    def init(self, key: jax.Array, width: int) -> Any:
        return super().init(key, width) if self.width else {}

    def apply(self, params: Any, encoded: Encoded, batch: Batch, key: jax.Array | None) -> jax.Array:
        """The vectors f32[R, S, O], of any length."""
        if self.width:
            return super().apply(params, encoded, batch, key)
        assert encoded.pooled is not None
        return encoded.pooled

    def loss(self, outputs: jax.Array, labels: jax.Array, batch: Batch | None = None) -> tuple[jax.Array, jax.Array]:
        """The objective of the whole batch: sum over its texts, rows or pairs, and their number."""
        losses = [self._loss(outputs[..., :width], labels) for width in (*self.widths, self.outputs)]
        return jnp.stack([total for total, _ in losses]).mean(), losses[0][1]

    def _loss(self, outputs_RxSxO: jax.Array, labels_RxSx4: jax.Array) -> tuple[jax.Array, jax.Array]:
        R, S, width = outputs_RxSxO.shape
        N = self.unit_size
        G = R * (S // N)
        # The texts of a row of data are in consecutive places, from 0, so a unit begins at every Nth place.
        vectors_GxNxO = outputs_RxSxO[:, : S // N * N].reshape(G, N, width)
        labels_GxNx4 = labels_RxSx4[:, : S // N * N].reshape(G, N, 4)
        value_G, keys_GxNx2 = labels_GxNx4[:, 0, VALUE], labels_GxNx4[..., KEY]
        known_GxN = labels_GxNx4[..., PRESENT] == 1
        if self.compare == "labels":
            of_texts = vectors_GxNxO[:, 0], value_G, known_GxN[:, 0], keys_GxNx2[:, 0]
            if self.objective == "cosine":
                return cosine_losses.squared_classes(*of_texts)
            function = cosine_losses.same_class if self.objective == "in_batch" else cosine_losses.ordered_classes
            return function(*of_texts, self.scale)
        if self.objective == "in_batch":
            return cosine_losses.in_batch(vectors_GxNxO, known_GxN, keys_GxNx2, self.scale)
        unit_GxNxO = cosine_losses.normalised(vectors_GxNxO)
        cosine_G = (unit_GxNxO[:, 0] * unit_GxNxO[:, 1]).sum(axis=-1)
        if self.objective == "cosent":
            return cosine_losses.ordered(cosine_G, value_G, known_GxN[:, 0], self.scale)
        target_G = (value_G - self.minimum) / (self.maximum - self.minimum)
        return cosine_losses.squared(cosine_G, target_G, known_GxN[:, 0])

    def metrics(self, outputs: PerExample, examples: Examples) -> dict[str, float]:
        """The metrics of whole vectors, and with `widths` the main one of each width, such as spearman_64."""
        vectors_MxO, labels_Mx4 = np.asarray(outputs), examples.labels[self.name]
        known_M = known_rows(self, examples)
        groups = [group for group in examples.groups() if known_M[group[0]]]
        scores = self._metrics(vectors_MxO, labels_Mx4, groups)
        main = self.metric if self.metric in self.metric_names else self.metric_names[0]
        for width in self.widths:
            scores[f"{main}_{width}"] = self._metrics(vectors_MxO[:, :width], labels_Mx4, groups)[main]
        return scores

    def _metrics(self, vectors_MxO: np.ndarray, labels_Mx4: np.ndarray, groups: Sequence[range]) -> dict[str, float]:
        vectors_MxO = unit_length(vectors_MxO)
        if self.scored:
            return ranks.correlations(*_scored_pairs(vectors_MxO, labels_Mx4, groups))
        return ranks.of_search(*self._search(vectors_MxO, labels_Mx4, groups)[1])

    def row_statistics(self, outputs: PerExample, examples: Examples) -> RowStatistics:
        """A text that several rows have is one query, and counts with the first of them; all texts stay candidates."""
        vectors_MxO, labels_Mx4 = unit_length(np.asarray(outputs)), examples.labels[self.name]
        known_M, rows = known_rows(self, examples), len(examples.data)
        groups = [group for group in examples.groups() if known_M[group[0]]]
        if self.scored:
            pairs_Gx2 = np.stack(_scored_pairs(vectors_MxO, labels_Mx4, groups), axis=1).astype(np.float64)
            return by_row(RowStatistics(pairs_Gx2, self.metric), examples.row_of[[group[0] for group in groups]], rows)
        queries, search = self._search(vectors_MxO, labels_Mx4, groups)
        column = ("mrr", "ndcg", "accuracy").index(self.metric)
        parts = [(numbers, scores[column]) for numbers, scores in ranks.search_scores(*search)]
        counted = np.concatenate([np.zeros(0, np.int64), *(numbers for numbers, _ in parts)])
        scores = np.concatenate([np.zeros(0), *(score_q for _, score_q in parts)])
        return by_row(RowStatistics(shares(scores), "mean"), examples.row_of[queries[counted]], rows)

    def _search(self, vectors_MxO: np.ndarray, labels_Mx4: np.ndarray, groups: Sequence[range]) -> tuple[np.ndarray, Search]:
        """The place of each query, and the arguments of ranks.of_search()."""
        first = np.array([group[0] for group in groups], np.int64)
        key_M = _numbers(labels_Mx4[:, KEY])
        if self.compare == "labels":
            class_F = labels_Mx4[first, VALUE]
            return first, (
                vectors_MxO[first],
                vectors_MxO[first],
                lambda part: class_F[part, None] == class_F,
                lambda part: key_M[first][part, None] == key_M[first],
            )
        # Each distinct text once; the partners of a text are those of all rows with it.
        place_of = {
            key: int(place) for place, key in reversed(list(enumerate(key_M.tolist()))) if labels_Mx4[place, PRESENT] == 1
        }
        texts = sorted({place_of[int(key_M[i])] for group in groups for i in group[1:] if labels_Mx4[i, PRESENT] == 1})
        column_of = {int(key_M[place]): column for column, place in enumerate(texts)}
        partners: dict[int, list[int]] = {}
        for group in groups:
            partners.setdefault(int(key_M[group[0]]), []).append(column_of[int(key_M[group[1]])])
        queries = np.array([place_of[key] for key in partners], np.int64)
        lists = list(partners.values())

        def relevant(part: slice) -> np.ndarray:
            result = np.zeros((len(lists[part]), len(texts)), bool)
            for row, columns in enumerate(lists[part]):
                result[row, columns] = True
            return result

        def equal(part: slice) -> np.ndarray:
            return np.asarray(key_M[queries][part, None] == key_M[texts])

        return queries, (vectors_MxO[queries], vectors_MxO[texts], relevant, equal)

    def describe(self, outputs: Sequence[np.ndarray], windows: Sequence[Window], row: Row) -> dict[str, Any]:
        """The cosine of a pair, and those of negatives that are given; of a single text its vector, of length 1."""
        vectors = unit_length(np.stack(outputs))
        if len(outputs) == 1 or self.compare == "labels":
            return {"vector": vectors[0].round(6).tolist()}
        cosines = (vectors[1:] @ vectors[0]).round(6).tolist()
        present = [bool(row.columns.get(name)) for name in self.negatives]
        others = [cosine for cosine, is_present in zip(cosines[1:], present, strict=False) if is_present]
        return {"cosine": cosines[0], **({"negatives": others} if others else {})}


def unit_length(vectors_MxO: np.ndarray) -> np.ndarray:
    """f32[M, O], the vectors with length 1; zeros stay zeros."""
    vectors_MxO = np.asarray(vectors_MxO, np.float32)
    return vectors_MxO / np.maximum(np.linalg.norm(vectors_MxO, axis=1, keepdims=True), np.sqrt(cosine_losses.EPSILON))


def _scored_pairs(vectors_MxO: np.ndarray, labels_Mx4: np.ndarray, groups: Sequence[range]) -> tuple[np.ndarray, np.ndarray]:
    """The cosine of each pair, and its score."""
    first = np.array([group[0] for group in groups], np.int64)
    return (vectors_MxO[first] * vectors_MxO[first + 1]).sum(axis=1), labels_Mx4[first, VALUE]


def _numbers(keys_Mx2: np.ndarray) -> np.ndarray:
    """i64[M], both halves of a key as one number; -1 for a text without a label."""
    known_M = ~np.isnan(keys_Mx2[:, 0])
    keys_Mx2 = np.where(known_M[:, None], keys_Mx2, 0).astype(np.int64)
    return np.where(known_M, keys_Mx2[:, 0] << 24 | keys_Mx2[:, 1], -1)
