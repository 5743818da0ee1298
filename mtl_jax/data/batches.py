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
from mtl_jax.data.labels import Labels
from mtl_jax.errors import UserError, unknown

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
        packed: Whether short examples share a row. Else each has a row of its own, with padding after it.
        buckets: Without packing: row lengths, ascending, to the next of which a batch is cut when all its examples are shorter
            than row_length; each is a compiled program. Empty: row_length always.
        accumulate: Parts of a training batch that are gone through one after another, for a batch whose activations do not fit
            in memory; divides rows. The step is that of the whole batch.
    """

    rows: int = 32
    row_length: int = 64
    examples_per_row: int = 12
    mixture: str = "uniform"
    packed: bool = True
    buckets: tuple[int, ...] = ()
    accumulate: int = 1

    @property
    def slots(self) -> int:
        """S, examples that a row can hold."""
        return self.examples_per_row if self.packed else 1


class Batch(NamedTuple):
    """Packed rows, on the host or on the devices.

    A label that a row does not have is the task's `missing`.

    Attributes:
        tokens: i32[R, T], 0 at padding.
        segments: i32[R, T], the example a token belongs to, counted from 1 within its row; 0 at padding.
        positions: i32[R, T], the token's place in its own example, from 0.
        index: i32[R, S], ids of the examples in the row; -1 where there is none.
        source: i32[R], the source that a row is of, by its place in the run's order; -1 for an empty row.
        labels: {task: [R, S, *label_shape], or [R, T] where labels are of tokens}.
        types: i32[R, T], token types; None where no source has any.
    """

    tokens: Any
    segments: Any
    positions: Any
    index: Any
    source: Any
    labels: dict[str, Any]
    types: Any = None


def check(batching: Batching) -> None:
    """Raises UserError where a field of Batching makes no sense."""
    if batching.mixture not in MIXTURES:
        raise unknown("mixture", batching.mixture, MIXTURES)
    for field in ("rows", "row_length", "examples_per_row", "accumulate"):
        if getattr(batching, field) < 1:
            raise UserError(f"batch.{field} must be at least 1")
    if batching.buckets and batching.packed:
        raise UserError("batch.buckets are for rows that are not packed: add --no-batch.packed, or leave them out")
    if list(batching.buckets) != sorted(set(batching.buckets)) or not all(
        0 < b <= batching.row_length for b in batching.buckets
    ):
        raise UserError(f"batch.buckets must be ascending lengths of at most batch.row_length, {batching.row_length}")
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
        packed = training_rows(examples, batching, corpus.tasks, corpus.has_types, seed * len(train) + number, rows[name])
        blocks.append(packed.batch(rows[name]))
    joined = grain_experimental.ZipIterDataset(blocks).map(_Join(tuple(train), corpus.tasks, batching))
    return iter(grain_experimental.ThreadPrefetchIterDataset(joined, prefetch_buffer_size=4))


def training_rows(
    examples: Examples, batching: Batching, tasks: Sequence[Labels], types: bool, seed: int, at_once: int
) -> grain.IterDataset:
    """Endless rows of one source, shuffled anew in every pass: dicts of arrays [T, ...] and [S, ...].

    Args:
        examples: The examples.
        batching: Shape of the rows.
        tasks: The tasks of the run; those of this source are labelled.
        types: Whether rows have token types.
        seed: Seed of the order.
        at_once: Rows of this source that a batch takes, or so.
    """
    own = [task for task in tasks if task.source == examples.source]
    order = grain.MapDataset.source(_Elements(examples, own, types)).seed(seed).shuffle().repeat()
    for task in own:
        if task.corrupts:
            order = order.random_map(_Corrupt(task))
    # Packing fills many rows at a time: the more are open, the fewer tokens stay empty at the end of each.
    return _pack(order, batching, at_once * -(-64 // at_once), own, types)


def eval_batches(examples: Sequence[Examples], batching: Batching, tasks: Sequence[Labels] = ()) -> Iterator[Batch]:
    """Every example once, in order of packing, source by source; the last batch is filled with empty rows.

    Args:
        examples: The examples of any number of sources.
        batching: Shape of the batches.
        tasks: The tasks whose labels are in the batches.
    """
    types = any(part.types is not None for part in examples)
    waiting: list[tuple[int, dict[str, np.ndarray]]] = []
    for number, part in enumerate(examples):
        own = [task for task in tasks if task.source == part.source]
        order = grain.MapDataset.source(_Elements(part, own, types, corrupt=True))
        if len(order):
            for row in _pack(order, batching, batching.rows, own, types):
                waiting.append((number, row))
                if len(waiting) == batching.rows:
                    yield join(waiting, tasks, batching, batching.rows)
                    waiting = []
    if waiting:
        yield join(waiting, tasks, batching, batching.rows)


def join(rows: Sequence[tuple[int, dict[str, np.ndarray]]], tasks: Sequence[Labels], batching: Batching, total: int) -> Batch:
    """A batch of the given rows, filled with empty ones up to `total`.

    Args:
        rows: (number of the source, a row as training_rows makes it).
        tasks: The tasks whose labels are in the batch.
        batching: Shape of the batch.
        total: R.
    """
    T, S = batching.row_length, batching.slots

    def stack(key: str, shape: tuple[int, ...], fill: float, dtype: Any = np.int32) -> np.ndarray:
        array = np.full((total, *shape), fill, dtype)
        for r, (_, row) in enumerate(rows):
            if key in row:
                array[r] = row[key]
        return array

    batch = Batch(
        tokens=stack("tokens", (T,), 0),
        segments=stack("tokens_segment_ids", (T,), 0),
        positions=stack("tokens_positions", (T,), 0),
        index=stack("index", (S,), -1),
        source=np.array([number for number, _ in rows] + [-1] * (total - len(rows)), np.int32),
        labels={
            task.name: stack(
                f"label {task.name}", (T,) if _of_tokens(task) else (S, *task.label_shape), task.missing, task.dtype
            )
            for task in tasks
        },
        types=stack("types", (T,), 0) if rows and "types" in rows[0][1] else None,
    )
    return _trim(batch, batching, tasks)


def _trim(batch: Batch, batching: Batching, tasks: Sequence[Labels]) -> Batch:
    """Cuts the padding that all rows share, down to the next of the buckets."""
    if not batching.buckets:
        return batch
    longest = int((batch.segments > 0).sum(axis=1).max(initial=0))
    T = next(length for length in (*batching.buckets, batching.row_length) if length >= longest)
    labels = {task.name: batch.labels[task.name][:, :T] if _of_tokens(task) else batch.labels[task.name] for task in tasks}
    cut = {name: getattr(batch, name)[:, :T] for name in ("tokens", "segments", "positions")}
    return batch._replace(**cut, labels=labels, types=None if batch.types is None else batch.types[:, :T])


def _label_shape(task: Labels, T: int, S: int) -> tuple[int, ...]:
    return (T,) if _of_tokens(task) else (S, *task.label_shape)


def _of_tokens(task: Labels) -> bool:
    return task.label_level == "token"


class _Elements:
    """The examples of one source as grain reads them, one by one: dicts of arrays.

    Attributes:
        corrupt: Whether tasks that change tokens do so here, for each example always in the same way.
    """

    def __init__(self, examples: Examples, tasks: Sequence[Labels], types: bool, corrupt: bool = False):
        self.examples, self.tasks, self.types = examples, tuple(tasks), types
        self.corrupt = [task for task in tasks if task.corrupts] if corrupt else []

    def __len__(self) -> int:
        return len(self.examples.tokens)

    def __getitem__(self, i: Any) -> dict[str, np.ndarray]:
        i = int(i)
        examples = self.examples
        element = {"tokens": examples.tokens[i], "index": np.array([examples.first_id + i], np.int32)}
        if self.types:
            element["types"] = np.zeros_like(examples.tokens[i]) if examples.types is None else examples.types[i]
        for task in self.tasks:
            label = examples.labels[task.name][i]
            element[f"label {task.name}"] = label if _of_tokens(task) else np.asarray(label)[None]
        for task in self.corrupt:
            element = _corrupted(task, element, np.random.default_rng(i))
        return element


def _corrupted(task: Labels, element: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    tokens, labels = task.corrupt(element["tokens"], rng)
    return {**element, "tokens": tokens, f"label {task.name}": labels}


class _Corrupt(grain.transforms.RandomMap):  # type: ignore[misc]
    """A task's change of tokens, another one at every pass."""

    def __init__(self, task: Labels):
        self.task = task

    def random_map(self, element: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        return _corrupted(self.task, element, rng)


def _pack(order: grain.MapDataset, batching: Batching, bins: int, tasks: Sequence[Labels], types: bool) -> grain.IterDataset:
    labels = {f"label {task.name}": task for task in tasks}
    T, S = batching.row_length, batching.slots
    lengths = {key: T if _of_tokens(task) else S for key, task in labels.items()}
    typed = {"types": T} if types else {}
    return grain_experimental.FirstFitPackIterDataset(
        order.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)),
        length_struct={"tokens": T, "index": S, **lengths, **typed},
        padding_struct={
            "tokens": 0,
            "index": -1,
            **{key: task.missing for key, task in labels.items()},
            **dict.fromkeys(typed, 0),
        },
        num_packing_bins=bins,
        shuffle_bins=False,
    )


class _Join(grain.transforms.Map):  # type: ignore[misc]
    """Blocks of rows, one for each source, to one Batch."""

    def __init__(self, sources: tuple[str, ...], tasks: Sequence[Labels], batching: Batching):
        self.sources, self.tasks, self.batching = sources, tuple(tasks), batching

    def map(self, element: tuple[dict[str, np.ndarray], ...]) -> Batch:
        rows = [
            (number, {key: array[r] for key, array in block.items()})
            for number, block in enumerate(element)
            for r in range(len(block["tokens"]))
        ]
        return join(rows, self.tasks, self.batching, self.batching.rows)
