"""Examples to batches: several short ones packed in one row, or each padded in a row of its own.

Shapes in names: R rows, T tokens a row, S examples a row.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mtl_jax.core.configuration import Configuration
from mtl_jax.core.errors import UserError
from mtl_jax.data import mixture
from mtl_jax.data.examples import Examples
from mtl_jax.data.labels import TOKEN_LEVELS, Labels
from mtl_jax.data.packing import best_fit
from mtl_jax.data.tokenize import Ragged, starts_of

AT_ONCE = 8192  # examples that are packed together for evaluation


@dataclasses.dataclass(frozen=True)
class Batching(Configuration):
    """Shape of a batch. It is the same for every step of a run, so one program serves them all.

    Attributes:
        rows: R, rows in a global batch, over all sources and devices.
        row_length: T, tokens in a row, and so the longest example; longer texts are cut and counted.
        target_length: U, tokens in a row of target texts, for tasks that have such; 0: as many as row_length. Examples share a
            row where both their texts fit.
        examples_per_row: S, at most so many examples are packed in one row.
        mixture: How often each source is seen, by rows: uniform; proportional to its training tokens; temperature:t=T, by
            size^(1/T); capped:cap=C, by at most C tokens; or fixed. Kept to exactly over the run, not in every step.
        mixture_end: Over the run's steps the shares go from mixture to this one; empty: they stay.
        shares: For the mixture fixed: a number for each source.
        packed: Whether short examples share a row. Else each has a row of its own, with padding after it.
        buckets: Without packing: row lengths, ascending, to the next of which a batch is cut when all its examples are shorter
            than row_length; each is a compiled program. Empty: row_length always.
        accumulate: Parts of a training batch that are gone through one after another, for a batch whose activations do not fit
            in memory; divides rows. The step is that of the whole batch.
        workers: Processes that make training batches; 0: a thread. The batches are the same.
    """

    rows: int = 32
    row_length: int = 64
    target_length: int = 0
    examples_per_row: int = 12
    mixture: str = "uniform"
    mixture_end: str = ""
    shares: dict[str, float] = dataclasses.field(default_factory=dict)
    packed: bool = True
    buckets: tuple[int, ...] = ()
    accumulate: int = 1
    workers: int = 0

    @property
    def slots(self) -> int:
        """S, examples that a row can hold."""
        return self.examples_per_row if self.packed else 1

    @property
    def target_places(self) -> int:
        """U, tokens in a row of target texts."""
        return self.target_length or self.row_length


class Batch(NamedTuple):
    """Packed rows, on the host or on the devices.

    A label that a row does not have is the task's `missing`.

    Attributes:
        tokens: i32[R, T], 0 at padding.
        segments: i32[R, T], the example a token belongs to, counted from 1 within its row; 0 at padding.
        positions: i32[R, T], the token's place in its own example, from 0.
        index: i32[R, S], ids of the examples in the row; -1 where there is none.
        source: i32[R], the source that a row is of, by its place in the run's order; -1 for an empty row.
        labels: {task: [R, S, *label_shape]; [R, T] where labels are of tokens; i32[R, U, 2] where they are target texts: the
            tokens, and which of the row's examples each belongs to, from 1 on as in segments}.
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
    mixture.check(batching.mixture, batching.mixture_end, batching.shares)
    if batching.workers < 0:
        raise UserError(f"batch.workers is {batching.workers}; it must not be negative")
    for field in ("rows", "row_length", "examples_per_row", "accumulate"):
        if getattr(batching, field) < 1:
            raise UserError(f"batch.{field} must be at least 1")
    if batching.target_length < 0:
        raise UserError(f"batch.target_length is {batching.target_length}; it must be a number of tokens, or 0 for row_length")
    if batching.buckets and batching.packed:
        raise UserError("batch.buckets are for rows that are not packed: add --no-batch.packed, or leave them out")
    if list(batching.buckets) != sorted(set(batching.buckets)) or not all(
        0 < b <= batching.row_length for b in batching.buckets
    ):
        raise UserError(f"batch.buckets must be ascending lengths of at most batch.row_length, {batching.row_length}")
    if batching.rows % batching.accumulate:
        raise UserError(f"batch.accumulate is {batching.accumulate}; it must divide batch.rows, {batching.rows}")


@dataclasses.dataclass(frozen=True)
class Part:
    """What batches need of the examples of one source; what a worker process is sent.

    Attributes:
        source: The source's name.
        first_id: Id of the first example.
        tokens: N arrays i32[len].
        types: N arrays i32[len]; None where all are 0.
        labels: {task: [N, *label_shape], or N arrays [len] where labels are of tokens or are target texts}.
        targets: The tasks whose labels are target texts.
    """

    source: str
    first_id: int
    tokens: Ragged
    types: Ragged | None
    labels: dict[str, np.ndarray | Ragged]
    targets: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """i64[N], tokens of each example."""
        return self.tokens.lengths

    def room(self, batching: Batching) -> np.ndarray:
        """i64[N]: what each example takes of a row's T places, so that examples whose sum is at most T fit with both texts."""
        room = self.lengths
        for name in self.targets:
            targets: Any = self.labels[name]
            room = np.maximum(room, -(-targets.lengths * batching.row_length // batching.target_places))
        return room


def part_of(examples: Examples, tasks: Sequence[Labels]) -> Part:
    """The examples of a source with the labels of the given tasks, of those that are the source's own."""

    def flat(arrays: Sequence[np.ndarray], dtype: Any) -> Ragged:
        return arrays if isinstance(arrays, Ragged) else Ragged.of(arrays, dtype)

    labels: dict[str, np.ndarray | Ragged] = {}
    for task in tasks:
        if task.source == examples.source:
            values = examples.labels[task.name]
            labels[task.name] = flat(values, task.dtype) if task.label_level != "example" else values
    types = None if examples.types is None else flat(examples.types, np.int32)
    targets = tuple(task.name for task in tasks if task.name in labels and task.label_level == "target")
    return Part(examples.source, examples.first_id, flat(examples.tokens, np.int32), types, labels, targets)


def eval_batches(examples: Sequence[Examples], batching: Batching, tasks: Sequence[Labels] = ()) -> Iterator[Batch]:
    """Every example once, source by source; the last batch is filled with empty rows.

    Args:
        examples: The examples of any number of sources.
        batching: Shape of the batches.
        tasks: The tasks whose labels are in the batches.
    """
    parts = [part_of(each, tasks) for each in examples]
    places = np.array([each.place for each in examples], np.int32)
    types = any(part.types is not None for part in parts)

    def made(rows: list[tuple[int, np.ndarray]]) -> Batch:
        batch = fill(parts, rows, tasks, batching, batching.rows, types, _always_the_same)
        return batch._replace(source=np.where(batch.source < 0, -1, places[batch.source]).astype(np.int32))

    waiting: list[tuple[int, np.ndarray]] = []
    for number, part in enumerate(parts):
        for first in range(0, len(part), AT_ONCE):
            lengths = part.room(batching)[first : first + AT_ONCE]
            waiting += [(number, first + row) for row in best_fit(lengths, batching.row_length, batching.slots)]
            while len(waiting) >= batching.rows:
                yield made(waiting[: batching.rows])
                waiting = waiting[batching.rows :]
    if waiting:
        yield made(waiting)


def _always_the_same(part: Part, ticket: int) -> np.random.Generator:
    return np.random.default_rng(ticket)


def fill(
    parts: Sequence[Part],
    rows: Sequence[tuple[int, np.ndarray]],
    tasks: Sequence[Labels],
    batching: Batching,
    total: int,
    types: bool,
    draw: Callable[[Part, int], np.random.Generator],
) -> Batch:
    """A batch of the given rows, then empty ones.

    Args:
        parts: The sources, in the run's order.
        rows: (number of the source, tickets of the row's examples): a ticket modulo the number of examples is the example's
            place in the source; what is left over says which pass it belongs to.
        tasks: The tasks whose labels are in the batch.
        batching: Shape of the batch.
        total: R.
        types: Whether the batch has token types.
        draw: (part, ticket) -> generator for tasks that change tokens.
    """
    T, S = batching.row_length, batching.slots
    batch = Batch(
        tokens=np.zeros((total, T), np.int32),
        segments=np.zeros((total, T), np.int32),
        positions=np.zeros((total, T), np.int32),
        index=np.full((total, S), -1, np.int32),
        source=np.array([number for number, _ in rows] + [-1] * (total - len(rows)), np.int32),
        labels={task.name: np.full((total, *_shape(task, batching)), task.missing, task.dtype) for task in tasks},
        types=np.zeros((total, T), np.int32) if types else None,
    )
    for number in {number for number, _ in rows}:
        part, here = parts[number], [(r, tickets) for r, (of, tickets) in enumerate(rows) if of == number]
        # E examples, one after another; then t, their tokens, one after another.
        counts = [len(tickets) for _, tickets in here]
        ticket_E = np.concatenate([tickets for _, tickets in here])
        row_E = np.repeat([r for r, _ in here], counts)
        first_E = np.repeat(starts_of(counts)[:-1], counts)  # the first example of the same row
        slot_E = np.arange(len(row_E)) - first_E
        example_E = ticket_E % len(part)
        begins = starts_of(part.lengths[example_E])
        length_E = np.diff(begins)
        at_t, within_t = _end_to_end(row_E, first_E, length_E)
        gather = functools.partial(_gather, example_E=example_E, length_E=length_E, within_t=within_t)
        token_t = gather(part.tokens)
        for task in (task for task in tasks if task.name in part.labels):
            labels = part.labels[task.name]
            if task.corrupts:
                label_t = np.empty(len(token_t), task.dtype)
                for ticket, a, b in zip(ticket_E.tolist(), begins, begins[1:], strict=False):
                    token_t[a:b], label_t[a:b] = task.corrupt(token_t[a:b], draw(part, ticket))
                batch.labels[task.name][at_t] = label_t
            elif isinstance(labels, Ragged) and task.label_level == "target":
                target_E = labels.lengths[example_E]
                at_u, within_u = _end_to_end(row_E, first_E, target_E)
                batch.labels[task.name][(*at_u, 0)] = _gather(labels, example_E, target_E, within_u)
                batch.labels[task.name][(*at_u, 1)] = np.repeat(slot_E + 1, target_E)
            elif isinstance(labels, Ragged):
                batch.labels[task.name][at_t] = gather(labels)
            else:
                batch.labels[task.name][row_E, slot_E] = labels[example_E]
        batch.tokens[at_t] = token_t
        batch.segments[at_t] = np.repeat(slot_E + 1, length_E)
        batch.positions[at_t] = within_t
        batch.index[row_E, slot_E] = part.first_id + example_E
        if part.types is not None:
            batch.types[at_t] = gather(part.types)
    return _trim(batch, batching, tasks)


def _end_to_end(
    row_E: np.ndarray, first_E: np.ndarray, length_E: np.ndarray
) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Row and column of every token where texts stand end to end in their rows; and its place in its own text.

    Args:
        row_E: The row of each example; ascending.
        first_E: The first example of the same row.
        length_E: Tokens of its text.
    """
    begin_E = starts_of(length_E)[:-1]
    within_t = np.arange(length_E.sum()) - np.repeat(begin_E, length_E)
    return (np.repeat(row_E, length_E), np.repeat(begin_E - begin_E[first_E], length_E) + within_t), within_t


def _gather(values: Ragged, example_E: np.ndarray, length_E: np.ndarray, within_t: np.ndarray) -> np.ndarray:
    """The arrays of the examples, one after another."""
    return values.values[np.repeat(values.starts[example_E], length_E) + within_t]


def _trim(batch: Batch, batching: Batching, tasks: Sequence[Labels]) -> Batch:
    """Cuts the padding that all rows share, down to the next of the buckets."""
    if not batching.buckets:
        return batch
    longest = int((batch.segments > 0).sum(axis=1).max(initial=0))
    whole_T, whole_U = batching.row_length, batching.target_places
    for task in tasks:
        if task.label_level == "target":
            target = int((batch.labels[task.name][..., 1] > 0).sum(axis=1).max(initial=0))
            longest = max(longest, -(-target * whole_T // whole_U))
    T = next(length for length in (*batching.buckets, whole_T) if length >= longest)
    places = {**dict.fromkeys(TOKEN_LEVELS, T), "target": -(-T * whole_U // whole_T), "example": None}
    labels = {task.name: batch.labels[task.name][:, : places[task.label_level]] for task in tasks}
    cut = {name: getattr(batch, name)[:, :T] for name in ("tokens", "segments", "positions")}
    return batch._replace(**cut, labels=labels, types=None if batch.types is None else batch.types[:, :T])


def _shape(task: Labels, batching: Batching) -> tuple[int, ...]:
    """Shape of a task's labels in one row."""
    if task.label_level in TOKEN_LEVELS:
        return (batching.row_length,)
    if task.label_level == "target":
        return (batching.target_places, 2)
    return (batching.slots, *task.label_shape)
