"""Tasks whose weight is 0 all through a phase: they take no part in its steps.

L_target + 0 L_source is L_target to the last bit: where a source has the same rows in every step, and all of its tasks weigh
nothing, the step is that of the other rows by themselves, dropout included, and costs as much.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.data.batches import Batch
from mtl_jax.tasks import Task
from mtl_jax.training.state import TrainState
from mtl_jax.training.step import Measure, Measured


def rows_that_count(
    tasks: Sequence[Task], idle: Collection[str], rows: Mapping[str, int] | None, multiple: int
) -> tuple[slice, ...]:
    """Where the rows of the sources that count stand in a batch; () where that cannot be said, or all of them count.

    Args:
        tasks: The tasks of the run.
        idle: The names of those that weigh nothing.
        rows: {source: its rows in every batch}, in the run's order, which is that of the rows; None: they differ.
        multiple: The rows that are left must be one of this many, for devices and parts of a batch.
    """
    if rows is None:
        return ()
    counting = {task.source for task in tasks if task.name not in idle}
    if counting == set(rows) or sum(rows[source] for source in counting) % multiple:
        return ()
    found, start = [], 0
    for source, count in rows.items():
        if source in counting and count:
            found.append(slice(start, start + count))
        start += count
    return tuple(found)


def leave_out(measure: Measure, idle: Collection[str], rows: Sequence[slice]) -> Measure:
    """The measure of the tasks that count, over their rows, as one of all tasks: those that are idle are absent.

    Args:
        measure: by_losses(...) of the tasks that count.
        idle: The others.
        rows: rows_that_count(...).
    """

    def take(leaf: jax.Array) -> jax.Array:
        parts = [leaf[part] for part in rows]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

    def measure_the_others(trained: Any, frozen: Any, batch: Batch, table: jax.Array | None, state: TrainState) -> Measured:
        found = measure(trained, frozen, jax.tree.map(take, batch) if rows else batch, table, state)
        nothing = {name: jnp.zeros(()) for name in idle}
        return found._replace(losses=found.losses | nothing, counts=found.counts | nothing, weights=found.weights | nothing)

    return measure_the_others
