"""From examples to batches: several short examples packed in a row, or each in its own padded row.

Shapes in names: R rows, T tokens a row, S examples a row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mtl_jax.data.batch_shape import Batching
from mtl_jax.data.examples import Examples
from mtl_jax.data.labels import TOKEN_LEVELS, Labels
from mtl_jax.data.packing import best_fit
from mtl_jax.data.redraw import Redrawn, Room
from mtl_jax.data.source_arrays import SourceArrays, source_arrays
from mtl_jax.data.tokenize import Ragged, starts_of

PACKED_TOGETHER = 8192  # examples, in evaluation


class Batch(NamedTuple):
    """Packed rows, on the host or on the devices.

    A label that a row does not have is the task's `missing`.

    Attributes:
        tokens: i32[R, T], 0 at padding.
        segments: i32[R, T], the example a token belongs to, counted from 1 within its row; 0 at padding.
        positions: i32[R, T], the token's place in its own example, from 0.
        index: i32[R, S], ids of the examples in the row; -1 where there is none.
        source: i32[R], the number of each row's source in the run's order; -1 for an empty row.
        labels: {task: [R, S, *label_shape]; [R, T] for labels of words or tokens; i32[R, U, 2] for target texts: the token, and
            the number of its example in the row, from 1 as in segments}.
        types: i32[R, T], token types; None where no source has any.
        made: i32[R, A + 1], how many examples of each row each augmentation of its source changed, and last of how many one
            should have and could not; None where no source has augmentations that draw in every pass.
    """

    tokens: Any
    segments: Any
    positions: Any
    index: Any
    source: Any
    labels: dict[str, Any]
    types: Any = None
    made: Any = None


def eval_batches(examples: Sequence[Examples], batching: Batching, tasks: Sequence[Labels] = ()) -> Iterator[Batch]:
    """Batches with every example once, source by source; the last batch is filled up with empty rows.

    Args:
        examples: The examples of any number of sources.
        batching: Shape of the batches.
        tasks: The tasks whose labels are in the batches.
    """
    sources = [source_arrays(part, tasks) for part in examples]
    numbers = np.array([part.place for part in examples], np.int32)
    types = any(source.types is not None for source in sources)

    def batch_of(rows: list[tuple[int, np.ndarray]]) -> Batch:
        batch = fill(sources, rows, tasks, batching, batching.rows, types, _fixed_generator)
        return batch._replace(source=np.where(batch.source < 0, -1, numbers[batch.source]).astype(np.int32))

    pending: list[tuple[int, np.ndarray]] = []
    for number, source in enumerate(sources):
        for first in range(0, len(source), PACKED_TOGETHER):
            lengths = source.packing_lengths(batching)[first : first + PACKED_TOGETHER]
            pending += [(number, first + row) for row in best_fit(lengths, batching.row_length, source.slots(batching))]
            while len(pending) >= batching.rows:
                yield batch_of(pending[: batching.rows])
                pending = pending[batching.rows :]
    if pending:
        yield batch_of(pending)


def _fixed_generator(source: SourceArrays, ticket: int) -> np.random.Generator:
    return np.random.default_rng(ticket)


def fill(
    sources: Sequence[SourceArrays],
    rows: Sequence[tuple[int, np.ndarray]],
    tasks: Sequence[Labels],
    batching: Batching,
    total: int,
    types: bool,
    generator: Callable[[SourceArrays, int], np.random.Generator],
    seed: int = 0,
) -> Batch:
    """A batch of the given rows, filled up with empty rows.

    Args:
        sources: The sources, in the run's order.
        rows: (number of the source, tickets of the row's units). A ticket is pass * N + unit, in a source of N units.
        tasks: The tasks whose labels are in the batch.
        batching: Shape of the batch.
        total: R.
        types: Whether the batch has token types.
        generator: (source, ticket) -> random numbers for tasks that change tokens.
        seed: Seed of the data order, for augmentations.
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
        made=_none_made(sources, total),
    )
    for number in {number for number, _ in rows}:
        source = sources[number]
        its_rows = [(r, source.examples(tickets)) for r, (row_source, tickets) in enumerate(rows) if row_source == number]
        # E examples, one after another; then t, their tokens, one after another.
        counts = [len(tickets) for _, tickets in its_rows]
        ticket_E = np.concatenate([tickets for _, tickets in its_rows])
        row_E = np.repeat([r for r, _ in its_rows], counts)
        first_E = np.repeat(starts_of(counts)[:-1], counts)  # the first example of the same row
        slot_E = np.arange(len(row_E)) - first_E
        example_E = ticket_E % len(source.tokens)
        arrays: SourceArrays | Redrawn = source
        place_E = example_E  # in the arrays
        if source.redraw is not None:
            arrays = source.redraw(source, ticket_E, row_E, Room(T, batching.target_row_length), seed)
            place_E = np.arange(len(ticket_E))
            np.add.at(batch.made[:, : arrays.made.shape[1]], row_E, arrays.made)
        begins = starts_of(arrays.tokens.lengths[place_E])
        length_E = np.diff(begins)
        place_t, position_t = _end_to_end(row_E, first_E, length_E)
        gather = functools.partial(_gather, example_E=place_E, length_E=length_E, position_t=position_t)
        token_t = gather(arrays.tokens)
        for task in (task for task in tasks if task.name in source.labels):
            labels = arrays.labels[task.name]
            if task.corrupts:
                label_t = np.empty(len(token_t), task.dtype)
                for ticket, a, b in zip(ticket_E.tolist(), begins, begins[1:], strict=False):
                    token_t[a:b], label_t[a:b] = task.corrupt(token_t[a:b], generator(source, ticket))
                batch.labels[task.name][place_t] = label_t
            elif isinstance(labels, Ragged) and task.label_level == "target":
                target_E = labels.lengths[place_E]
                place_u, position_u = _end_to_end(row_E, first_E, target_E)
                batch.labels[task.name][(*place_u, 0)] = _gather(labels, place_E, target_E, position_u)
                batch.labels[task.name][(*place_u, 1)] = np.repeat(slot_E + 1, target_E)
            elif isinstance(labels, Ragged):
                batch.labels[task.name][place_t] = gather(labels)
            else:
                batch.labels[task.name][row_E, slot_E] = labels[place_E]
        batch.tokens[place_t] = token_t
        batch.segments[place_t] = np.repeat(slot_E + 1, length_E)
        batch.positions[place_t] = position_t
        batch.index[row_E, slot_E] = source.first_id + example_E
        if arrays.types is not None:
            batch.types[place_t] = gather(arrays.types)
    return _trim(batch, batching, tasks)


def _none_made(sources: Sequence[SourceArrays], total: int) -> np.ndarray | None:
    """Batch.made of so many rows before any is made."""
    columns = [len(source.redraw.augmentations) + 1 for source in sources if source.redraw is not None]
    return np.zeros((total, max(columns)), np.int32) if columns else None


def _end_to_end(
    row_E: np.ndarray, first_E: np.ndarray, length_E: np.ndarray
) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Row and column of every token if texts stand end to end in their rows; and the token's position in its text.

    Args:
        row_E: The row of each example; ascending.
        first_E: The first example of the same row.
        length_E: Tokens of its text.
    """
    begin_E = starts_of(length_E)[:-1]
    position_t = np.arange(length_E.sum()) - np.repeat(begin_E, length_E)
    return (np.repeat(row_E, length_E), np.repeat(begin_E - begin_E[first_E], length_E) + position_t), position_t


def _gather(values: Ragged, example_E: np.ndarray, length_E: np.ndarray, position_t: np.ndarray) -> np.ndarray:
    """The arrays of the examples, one after another."""
    return values.values[np.repeat(values.starts[example_E], length_E) + position_t]


def _trim(batch: Batch, batching: Batching, tasks: Sequence[Labels]) -> Batch:
    """The batch without padding that all rows share, as far as the buckets allow."""
    if not batching.buckets:
        return batch
    longest = int((batch.segments > 0).sum(axis=1).max(initial=0))
    whole_T, whole_U = batching.row_length, batching.target_row_length
    for task in tasks:
        if task.label_level == "target":
            target = int((batch.labels[task.name][..., 1] > 0).sum(axis=1).max(initial=0))
            longest = max(longest, -(-target * whole_T // whole_U))
    T = next(length for length in (*batching.buckets, whole_T) if length >= longest)
    lengths = {**dict.fromkeys(TOKEN_LEVELS, T), "target": -(-T * whole_U // whole_T), "example": None}
    labels = {task.name: batch.labels[task.name][:, : lengths[task.label_level]] for task in tasks}
    trimmed = {name: getattr(batch, name)[:, :T] for name in ("tokens", "segments", "positions")}
    return batch._replace(**trimmed, labels=labels, types=None if batch.types is None else batch.types[:, :T])


def _shape(task: Labels, batching: Batching) -> tuple[int, ...]:
    """Shape of a task's labels in one row."""
    if task.label_level in TOKEN_LEVELS:
        return (batching.row_length,)
    if task.label_level == "target":
        return (batching.target_row_length, 2)
    return (batching.slots, *task.label_shape)
