"""Examples that stay together in a row of a batch: the texts of a pair, the choices of a question, a list to be ordered.

A loss that compares examples needs all of them in one batch. So a batch is packed from units in place of examples: a row of a
batch has the examples of a unit in consecutive places, and whatever divides a batch by rows (devices, parts, blocks of a
source) leaves a unit whole. Shapes stay static: a unit has n places at most, and each of its texts 1/n of a row's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mtl_jax.core.errors import UserError, count
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.labels import Labels
from mtl_jax.data.ragged import Ragged
from mtl_jax.data.source import Source


def size(tasks: Sequence[Labels]) -> int:
    """n, the most examples of a unit; 1: every example is a unit.

    Args:
        tasks: The tasks of one source.
    """
    return max((task.unit_size for task in tasks), default=1)


def reader(tasks: Sequence[Labels]) -> Labels | None:
    """The task that reads a row as several texts, each an example; None: a row is one text, or one pair.

    Args:
        tasks: The tasks of one source.
    """
    return next((task for task in tasks if task.several_texts), None)


def texts_of(reader: Labels, source: Source, rows: Sequence[Row]) -> tuple[list[str], list[str] | None, np.ndarray]:
    """The texts of rows that are read as several examples, their second texts or None, and the row of each, i32[N]."""
    by_row = [reader.texts_of(row, source) for row in rows]
    texts = [text for of_row in by_row for text in of_row]
    row_of = np.repeat(np.arange(len(rows)), [len(of_row) for of_row in by_row]).astype(np.int32)
    if all(isinstance(text, str) for text in texts):
        return [str(text) for text in texts], None, row_of
    return [text[0] for text in texts], [text[1] for text in texts], row_of


def units_of(row_of: np.ndarray, rows: Sequence[Row], tasks: Sequence[Labels]) -> Ragged | None:
    """The units of examples: for each i32[length], the places of its examples; None: every example is a unit.

    The examples of a row are a unit, or those of up to n rows with the same unit_key of a task, in the order of the rows.

    Args:
        row_of: i32[N], the index in rows of the row of each example of a source; ascending.
        rows: The rows.
        tasks: The tasks of that source.
    """
    most = size(tasks)
    if most == 1:
        return None
    if reader(tasks) is not None:
        edges = np.flatnonzero(np.diff(row_of, prepend=-1))
        return Ragged(np.arange(len(row_of), dtype=np.int32), np.append(edges, len(row_of)))
    by_key = next(task for task in tasks if task.unit_size > 1)
    members: dict[str, list[int]] = {}
    for number, row in enumerate(row_of.tolist()):
        members.setdefault(by_key.unit_key(rows[row]), []).append(number)
    return Ragged.of([group[i : i + most] for group in members.values() for i in range(0, len(group), most)], np.int32)


class Shape(NamedTuple):
    """The fields of a Batching that decide whether units fit; they are explained there."""

    packed: bool
    sampling: str
    slots: int
    row_length: int
    accumulate: int


def check(sources: Sequence[Source], tasks: Sequence[Labels], shape: Shape, private: bool) -> None:
    """Checks that the units of every source fit the batches, and its tasks each other.

    Args:
        sources: The sources.
        tasks: The tasks.
        shape: Of the batches.
        private: Whether the gradient of each row is clipped.

    Raises:
        UserError: One line that names the task and what to change.
    """
    for task in tasks:
        if task.whole_batch and shape.accumulate > 1:
            raise UserError(
                f"task {task.name!r} compares all texts of a batch, and batch.accumulate divides it: set batch.recompute in "
                "its place, which needs as little memory"
            )
        if (task.whole_batch or task.unit_size > 1) and private:
            raise UserError(f"task {task.name!r} compares examples, and private training is of single ones: leave it out")
    for source in sources:
        of_source = [task for task in tasks if task.source == source.name]
        first = next((task for task in of_source if task.unit_size > 1), None)
        if first is None:
            continue
        n, name = first.unit_size, f"task {first.name!r}"
        if not shape.packed:
            raise UserError(f"{name}: {count(n, 'text')} stay together in a row, which needs packed rows: set batch.packed")
        if shape.sampling != "shuffled":
            raise UserError(f"{name}: {count(n, 'text')} stay together, but batch.sampling {shape.sampling} draws them alone")
        if n > shape.slots:
            raise UserError(f"{name}: {n} texts stay together, but batch.examples_per_row is {shape.slots}; raise it to {n}")
        if shape.row_length // n < 3:
            raise UserError(f"{name}: {n} texts stay together in batch.row_length {shape.row_length}; make it longer")
        for other in of_source:
            if other is first:
                continue
            problem = ""
            if other.unit_size > 1:
                problem = "both keep texts together"
            elif other.label_level != "example" or other.corrupts:
                problem = f"{other.name!r} labels tokens or writes texts"
            elif first.several_texts and source.pair:
                problem = f"the first reads the texts one by one, {other.name!r} as a pair"
            if problem:
                raise UserError(
                    f"tasks {first.name!r} and {other.name!r} of source {source.name!r}: {problem}; declare the same file as a "
                    "second source"
                )
