"""Regularisers that look at what the model makes of a batch: distillation and R-Drop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.data.batches import Batch
from mtl_jax.models.layers import times
from mtl_jax.models.trunk_output import Encoded
from mtl_jax.tasks import Task
from mtl_jax.training.gradient import Held
from mtl_jax.training.regularisation.teachers import Teacher
from mtl_jax.training.regularisation.transforms import Weights, teacher_of, weights_at
from mtl_jax.transfer import distill, distill_hidden, r_drop
from mtl_jax.transfer.regularisers import AnyRegulariser, Distillation, RDrop


class OnOutputs(NamedTuple):
    """A regulariser that looks at what the model makes of a batch; as in Held, of one."""

    count: Callable[[Batch], Any]
    loss: Callable[[Any, Encoded, dict[str, jax.Array], Batch, Any, Any], jax.Array]


def held(regularisers: Mapping[str, OnOutputs], weights: Weights) -> Held:
    """What by_losses() takes.

    Args:
        regularisers: By name.
        weights: Their weights.
    """

    def losses(heads: Any, encoded: Encoded, outputs: Any, batch: Batch, counts: Any, references: Any) -> dict[str, Any]:
        return {
            name: each.loss(heads, encoded, outputs, batch, counts[name], references) for name, each in regularisers.items()
        }

    return Held(
        counts=lambda batch: {name: each.count(batch) for name, each in regularisers.items()},
        losses=losses,
        weights=lambda step: weights_at(weights, regularisers, step),
    )


def on_outputs(
    regulariser: AnyRegulariser, tasks: Sequence[Task], places: Mapping[str, int], teacher: Teacher | None
) -> OnOutputs:
    """A regulariser that looks at what the model makes of a batch.

    Args:
        regulariser: Distillation or RDrop.
        tasks: The tasks that it looks at.
        places: {source: its place in the run's order}.
        teacher: For Distillation.
    """
    if isinstance(regulariser, RDrop):
        return _r_drop(tasks, places)
    assert isinstance(regulariser, Distillation)
    assert teacher is not None
    if regulariser.of == "hidden":
        return _distil_hidden(regulariser, teacher)
    return _distil(regulariser, teacher, tasks, places)


def _there(task: Task, batch: Batch, places: Mapping[str, int]) -> jax.Array:
    """bool[R, S], examples of the task's source, labelled or not; or bool[R, T], labelled words."""
    if task.level == "example":
        return (batch.index >= 0) & (batch.source == places[task.source])[:, None]
    there: jax.Array = batch.labels[task.name] != task.missing
    return there


def _masked_sum(values: jax.Array, there: jax.Array) -> jax.Array:
    # Where nothing is, outputs are finite: no NaN that a product with 0 would keep.
    return jnp.where(there, values, 0.0).sum()


def _r_drop(tasks: Sequence[Task], places: Mapping[str, int]) -> OnOutputs:
    def halves(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
        return leaf[: len(leaf) // 2], leaf[len(leaf) // 2 :]

    def count(batch: Batch) -> dict[str, jax.Array]:
        return {task.name: jnp.maximum(_there(task, batch, places).sum() / 2, 1) for task in tasks}

    def loss(heads: Any, encoded: Encoded, outputs: Any, batch: Batch, counts: Any, references: Any) -> jax.Array:
        total = jnp.zeros(())
        for task in tasks:
            first, second = halves(outputs[task.name])
            there, _ = halves(_there(task, batch, places))
            total += _masked_sum(r_drop(first, second, task.compared_as), there) / counts[task.name]
        return total

    return OnOutputs(count, loss)


def _distil(regulariser: Distillation, teacher: Teacher, tasks: Sequence[Task], places: Mapping[str, int]) -> OnOutputs:
    def count(batch: Batch) -> dict[str, jax.Array]:
        return {task.name: jnp.maximum(_there(task, batch, places).sum(), 1) for task in tasks}

    def loss(heads: Any, encoded: Encoded, outputs: Any, batch: Batch, counts: Any, references: Any) -> jax.Array:
        said = teacher.outputs(references[teacher_of(regulariser)], batch, [task.name for task in tasks])
        total = jnp.zeros(())
        for task in tasks:
            values = distill(outputs[task.name], said[task.name], regulariser.temperature, task.compared_as)
            total += _masked_sum(values, _there(task, batch, places)) / counts[task.name]
        return total

    return OnOutputs(count, loss)


def _distil_hidden(regulariser: Distillation, teacher: Teacher) -> OnOutputs:
    def count(batch: Batch) -> jax.Array:
        return jnp.maximum((batch.segments > 0).sum(), 1)

    def loss(heads: Any, encoded: Encoded, outputs: Any, batch: Batch, counts: Any, references: Any) -> jax.Array:
        seen, own = teacher.hidden(references[teacher_of(regulariser)], batch), encoded.tokens
        assert own is not None
        if regulariser.name in heads:
            own = times(own, heads[regulariser.name]["projection"]["kernel"])
        values = distill_hidden(own, seen, regulariser.distance)
        return _masked_sum(values, batch.segments > 0) / counts

    return OnOutputs(count, loss)
