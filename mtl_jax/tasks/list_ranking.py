"""Ranking: the order of the texts of a group, such as the passages that a search brought for a query.

Shapes in names: R rows, S examples a row, M examples.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.core.errors import UserError, unknown
from mtl_jax.core.row_texts import quoted
from mtl_jax.data.batches import Batch
from mtl_jax.data.examples import Examples
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.labels import Window
from mtl_jax.data.source import SPLITS, Source
from mtl_jax.tasks import ranks
from mtl_jax.tasks.base import PerExample, Task
from mtl_jax.tasks.reading import key_numbers, known_rows, text_of
from mtl_jax.tasks.row_statistics import RowStatistics, by_row

OBJECTIVES = ("listwise", "pairwise")
GRADE, KEY = 0, slice(1, 3)  # in a label, f32[3]: the grade, and two numbers that are equal within a group
NEVER = -1e9  # the score of a text of another group
HIGHEST = 30.0  # of the grades: their gains are 2^grade


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranking(Task):
    """A score for each text, or pair of a query and a text; the loss compares the scores of a group.

    A row is one text of a group. Up to `together` rows of a group are read together and share a row of a batch, each with
    1 / together of batch.row_length; larger groups are divided, in the order of the file. Metrics are those of whole groups.

    Attributes:
        name: The task's name: its key in losses, weights, metrics and params["heads"].
        source: The source whose rows it orders; its `group` must be the same column, so that groups stay in one split.
        group: The column that names a row's group, such as the query or its id.
        column: The column with the grade, 0 or more; a higher one comes first.
        together: The most rows of a group that are compared with each other in training.
        objective: listwise: cross-entropy between the shares of the grades and the softmax of the scores (Cao et al., 2007,
            ListNet). pairwise: logistic loss of each pair of unequal grades (Burges et al., 2005, RankNet).
        unlabelled: The values that mean "no grade". Such rows count neither in loss nor metrics.
        hidden: Width of a hidden ReLU layer in the head; 0 for a linear head.
        dropout: Dropout rate in front of the head.
        metric: The main metric: ndcg (at 10), mrr, or accuracy, the share of groups with one of the best texts first.

    Examples:
        >>> task = mtl_jax.Ranking(name="relevance", source="queries", group="query", column="grade")
    """

    group: str
    column: str = "label"
    together: int = 8
    objective: str = "listwise"
    unlabelled: tuple[str, ...] = ("",)
    metric: str = "ndcg"

    metric_names: ClassVar[tuple[str, ...]] = ("ndcg", "mrr", "accuracy")
    outputs: ClassVar[int] = 1
    dtype: ClassVar[type[np.generic]] = np.float32
    label_shape: ClassVar[tuple[int, ...]] = (3,)

    @property
    def unit_size(self) -> int:
        return self.together

    def check(self) -> None:
        super().check()
        if self.together < 2:
            raise UserError(f"task {self.name!r}: together is {self.together}; it must be at least 2")
        if self.objective not in OBJECTIVES:
            raise unknown(f"objective of task {self.name!r}:", self.objective, OBJECTIVES)

    def check_source(self, source: Source) -> None:
        if source.group != self.group and not all(source.place(split) for split in SPLITS):
            raise UserError(
                f"task {self.name!r}: set group={self.group!r} in source {source.name!r} too, so that no group is in "
                "train and test"
            )

    def unit_key(self, row: Row) -> str:
        value = text_of(row, self.group, self)
        if not value:
            raise UserError(f"{row.where}: task {self.name!r}: column {self.group!r} names no group")
        return value

    def parse(self, row: Row) -> tuple[float, str] | None:
        """The grade of a row, and its group."""
        text = text_of(row, self.column, self)
        if text is None or text in self.unlabelled:
            return None
        try:
            grade = float(text)
        except ValueError:
            grade = math.nan
        if not 0 <= grade <= HIGHEST:
            raise ValueError(f"grade {quoted(text)} is not a number from 0 to {HIGHEST:g}")
        return grade, self.unit_key(row)

    def window_label(self, label: Any, window: Window) -> np.ndarray:
        if label is None or window.number:
            return np.full(3, self.missing, self.dtype)
        grade, group = label
        return np.array([grade, *key_numbers(group.encode())], self.dtype)

    def loss(self, outputs: jax.Array, labels: jax.Array, batch: Batch | None = None) -> tuple[jax.Array, jax.Array]:
        """Mean over a group's grades, or pairs, in nats: sum over groups with unequal grades, and their number."""
        grade_RxS, key_RxSx2 = labels[..., GRADE], labels[..., KEY]
        known_RxS = ~jnp.isnan(grade_RxS)
        grade_RxS = jnp.where(known_RxS, grade_RxS, 0.0)
        score_RxS = jnp.where(known_RxS, outputs[..., 0].astype(jnp.float32), 0.0)
        # Keys of empty places are NaN, and equal to none.
        same_RxSxS = (key_RxSx2[:, :, None] == key_RxSx2[:, None]).all(axis=-1)
        higher_RxSxS = same_RxSxS & (grade_RxS[:, :, None] > grade_RxS[:, None])
        pairs_RxS = higher_RxSxS.sum(axis=2)
        group_pairs_RxS = jnp.where(same_RxSxS, pairs_RxS[:, None], 0).sum(axis=2)
        counted_RxS = group_pairs_RxS > 0
        size_RxS = jnp.maximum(same_RxSxS.sum(axis=2), 1)
        count = jnp.where(counted_RxS, 1 / size_RxS, 0.0).sum()
        if self.objective == "pairwise":
            loss_RxSxS = jax.nn.softplus(score_RxS[:, None] - score_RxS[:, :, None])
            per_pair_RxS = jnp.where(higher_RxSxS, loss_RxSxS, 0.0).sum(axis=2)
            return (per_pair_RxS / jnp.maximum(group_pairs_RxS, 1)).sum(), count
        log_sum_RxS = jax.nn.logsumexp(jnp.where(same_RxSxS, score_RxS[:, None], NEVER), axis=2)
        group_grade_RxS = jnp.where(same_RxSxS, grade_RxS[:, None], 0.0).sum(axis=2)
        share_RxS = grade_RxS / jnp.where(group_grade_RxS > 0, group_grade_RxS, 1.0)
        return jnp.where(counted_RxS, share_RxS * (log_sum_RxS - score_RxS), 0.0).sum(), count

    def metrics(self, outputs: PerExample, examples: Examples) -> dict[str, float]:
        return ranks.of_lists(list(self._lists(outputs, examples).values()))

    def row_statistics(self, outputs: PerExample, examples: Examples) -> RowStatistics:
        """A list counts with its first row."""
        lists = self._lists(outputs, examples)
        statistics = ranks.statistics(self.metric, list(lists.values()))
        return by_row(statistics, list(lists), len(examples.data))

    def _lists(self, outputs: PerExample, examples: Examples) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """{first row: (scores, grades)} of the lists."""
        score_M, grade_M = np.asarray(outputs)[:, 0], examples.labels[self.name][:, GRADE]
        members: dict[str, list[int]] = {}
        for place in np.flatnonzero(known_rows(self, examples)).tolist():
            members.setdefault(self.unit_key(examples.data[examples.row_of[place]]), []).append(place)
        return {int(examples.row_of[places[0]]): (score_M[places], grade_M[places]) for places in members.values()}

    def remarks(self, parts: Sequence[Examples]) -> list[str]:
        """A line on groups that are divided, or that have one row only."""
        sizes = [count for part in parts[:1] for count in self._sizes(part)]
        divided, single = sum(size > self.together for size in sizes), sum(size == 1 for size in sizes)
        of_all = f"of {len(sizes)} training groups have"
        lines = [f"{divided} {of_all} more than {self.together} rows and are divided"] if divided else []
        return lines + ([f"{single} {of_all} one row, and no order"] if single else [])

    def _sizes(self, part: Examples) -> list[int]:
        counts: dict[str, int] = {}
        for row in part.data:
            key = self.unit_key(row)
            counts[key] = counts.get(key, 0) + 1
        return list(counts.values())

    def describe(self, outputs: Sequence[np.ndarray], windows: Sequence[Window], row: Row) -> dict[str, Any]:
        """The score of the row; rows of a group are ordered by it, the highest first."""
        return {"score": round(float(outputs[0][0]), 6)}
