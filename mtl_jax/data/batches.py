"""Examples to batches, on grain: several short examples packed in one row, a fixed number of rows of every source.

Shapes in names: R rows, T tokens a row, S examples a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from grain import experimental as grain_experimental

from mtl_jax.data.examples import Corpus, Examples
from mtl_jax.errors import UserError, unknown
from mtl_jax.tasks import Task

MIXTURES = ("uniform", "proportional")


@dataclasses.dataclass(frozen=True)
class Batching:
    """Shape of a batch. It is the same for every step of a run, so one program serves them all.

    Attributes:
        rows: R, rows in a global batch, over all sources and devices.
        row_length: T, tokens in a row, and so the longest example; longer texts are cut and counted.
        examples_per_row: S, at most so many examples are packed in one row.
        mixture: How often each source is seen. uniform: the same number of rows a step for every source. proportional: rows
            by the number of training tokens, at least one.
        accumulate: Parts of a training batch that are gone through one after another, for a batch whose activations do not fit
            in memory; divides rows. The step is that of the whole batch.
    """

    rows: int = 32
    row_length: int = 64
    examples_per_row: int = 12
    mixture: str = "uniform"
    accumulate: int = 1


class Batch(NamedTuple):
    """Packed rows, on the host or on the devices.

    Rows stand in blocks by source, in the experiment's order. A label that a row does not have is the task's `missing`.

    Attributes:
        tokens: i32[R, T], 0 at padding.
        segments: i32[R, T], the example a token belongs to, counted from 1 within its row; 0 at padding.
        positions: i32[R, T], the token's place in its own example, from 0.
        index: i32[R, S], ids of the examples in the row; -1 where there is none.
        labels: {task: [R, S]}.
    """

    tokens: Any
    segments: Any
    positions: Any
    index: Any
    labels: dict[str, Any]


def check(batching: Batching) -> None:
    """Raises UserError where a field of Batching makes no sense."""
    if batching.mixture not in MIXTURES:
        raise unknown("mixture", batching.mixture, MIXTURES)
    for field in ("rows", "row_length", "examples_per_row", "accumulate"):
        if getattr(batching, field) < 1:
            raise UserError(f"batch.{field} must be at least 1")
    if batching.rows % batching.accumulate:
        raise UserError(f"batch.accumulate is {batching.accumulate}; it must divide batch.rows, {batching.rows}")


def rows_per_source(batching: Batching, train: dict[str, Examples]) -> dict[str, int]:
    """How many of a step's rows each source gets: shares of batching.rows by largest remainder, at least one each.

    Raises:
        UserError: There are fewer rows than sources.
    """
    if batching.rows < len(train):
        raise UserError(f"batch.rows is {batching.rows}, but each of the {len(train)} sources needs at least one row")
    if batching.mixture == "uniform":
        size = dict.fromkeys(train, 1.0)
    else:
        size = {name: float(sum(len(t) for t in examples.tokens)) for name, examples in train.items()}
    total = sum(size.values())
    ideal = {name: s / total * batching.rows for name, s in size.items()}
    rows = {name: max(1, int(ideal[name])) for name in train}
    while sum(rows.values()) != batching.rows:
        short = sum(rows.values()) < batching.rows
        candidates = [name for name in train if short or rows[name] > 1]
        pick = max(candidates, key=lambda name: (ideal[name] - rows[name]) * (1 if short else -1))
        rows[pick] += 1 if short else -1
    return rows


def train_batches(corpus: Corpus, batching: Batching, seed: int) -> grain.DatasetIterator[Batch]:
    """Endless shuffled training batches.

    Each source is shuffled anew in every pass and repeats by itself, so that a small source does not wait for a large one.
    The iterator's get_state() and set_state() make the position: a restored iterator goes on with the same batches.

    Args:
        corpus: The data; its train split is used.
        batching: Shape and mixture.
        seed: Seed of the order.
    """
    train = corpus.splits["train"]
    rows = rows_per_source(batching, train)
    blocks = []
    for number, (name, examples) in enumerate(train.items()):
        order = grain.MapDataset.source(_elements(examples)).seed(seed * len(train) + number).shuffle().repeat()
        # Packing fills many rows at a time: the more are open, the fewer tokens stay empty at the end of each.
        bins = rows[name] * -(-64 // rows[name])
        blocks.append(_pack(order, batching, bins, corpus.tasks, name).batch(rows[name]))
    joined = grain_experimental.ZipIterDataset(blocks).map(_Join(tuple(train), corpus.tasks))
    return iter(grain_experimental.ThreadPrefetchIterDataset(joined, prefetch_buffer_size=4))


def eval_batches(examples: Sequence[Examples], batching: Batching) -> Iterator[Batch]:
    """Every example once, in order of packing, sources side by side in a row; the last batch is filled with empty rows.

    Labels are not part of these batches: outputs are matched with labels on the host, by Batch.index.
    """
    elements = [
        {"tokens": tokens, "index": np.array([part.first_id + i], np.int32)}
        for part in examples
        for i, tokens in enumerate(part.tokens)
    ]
    if not elements:
        return
    for block in _pack(grain.MapDataset.source(elements), batching, batching.rows, (), "").batch(batching.rows):
        empty = batching.rows - len(block["tokens"])
        yield Batch(
            tokens=_fill(block["tokens"], empty, 0),
            segments=_fill(block["tokens_segment_ids"], empty, 0),
            positions=_fill(block["tokens_positions"], empty, 0),
            index=_fill(block["index"], empty, -1),
            labels={},
        )


def _elements(examples: Examples) -> list[dict[str, np.ndarray]]:
    return [
        {
            "tokens": tokens,
            "index": np.array([examples.first_id + i], np.int32),
            **{f"label {task}": labels[i : i + 1] for task, labels in examples.labels.items()},
        }
        for i, tokens in enumerate(examples.tokens)
    ]


def _pack(order: grain.MapDataset, batching: Batching, bins: int, tasks: Sequence[Task], source: str) -> grain.IterDataset:
    labels = {f"label {task.name}": task.missing for task in tasks if task.source == source}
    return grain_experimental.FirstFitPackIterDataset(
        order.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)),
        length_struct={
            "tokens": batching.row_length,
            "index": batching.examples_per_row,
            **dict.fromkeys(labels, batching.examples_per_row),
        },
        padding_struct={"tokens": 0, "index": -1, **labels},
        num_packing_bins=bins,
        shuffle_bins=False,
    )


class _Join(grain.transforms.Map):  # type: ignore[misc]
    """Blocks of rows, one for each source, to one Batch."""

    def __init__(self, sources: tuple[str, ...], tasks: Sequence[Task]):
        self.sources = sources
        self.tasks = tuple(tasks)

    def map(self, element: tuple[dict[str, np.ndarray], ...]) -> Batch:
        def stack(key: str) -> np.ndarray:
            return np.concatenate([block[key] for block in element])

        return Batch(
            tokens=stack("tokens"),
            segments=stack("tokens_segment_ids"),
            positions=stack("tokens_positions"),
            index=stack("index"),
            labels={task.name: self._labels(task, element) for task in self.tasks},
        )

    def _labels(self, task: Task, element: tuple[dict[str, np.ndarray], ...]) -> np.ndarray:
        return np.concatenate(
            [
                block[f"label {task.name}"] if source == task.source else np.full_like(block["index"], task.missing, task.dtype)
                for source, block in zip(self.sources, element, strict=True)
            ]
        )


def _fill(array: np.ndarray, rows: int, value: int) -> np.ndarray:
    """Appends `rows` rows of one value."""
    return np.pad(array, ((0, rows), (0, 0)), constant_values=value)
