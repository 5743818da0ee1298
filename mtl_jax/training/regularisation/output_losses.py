"""The losses of regularisers that compare outputs: distillation and R-Drop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.data.batches import Batch
from mtl_jax.models.layers import times
from mtl_jax.models.trunk_output import Encoded
from mtl_jax.tasks import Task
from mtl_jax.training.gradient import OutputRegularisers
from mtl_jax.training.regularisation.teachers import Teacher
from mtl_jax.training.regularisation.transforms import teacher_of
from mtl_jax.transfer import distill, distill_hidden, r_drop
from mtl_jax.transfer.regularisers import Distillation, RDrop, Regulariser


class OutputLoss(NamedTuple):
    """One regulariser of outputs; the fields are those of OutputRegularisers, with one divisor and one loss."""

    count: Callable[[Batch], Any]
    loss: Callable[[Any, Encoded, dict[str, jax.Array], Batch, Any, Any], jax.Array]


def combine(regularisers: Mapping[str, OutputLoss]) -> OutputRegularisers:
    """The regularisers of outputs of a phase, from {name: its loss}."""

    def losses(heads: Any, encoded: Encoded, outputs: Any, batch: Batch, counts: Any, references: Any) -> dict[str, Any]:
        return {
            name: regulariser.loss(heads, encoded, outputs, batch, counts[name], references)
            for name, regulariser in regularisers.items()
        }

    return OutputRegularisers(
        counts=lambda batch: {name: regulariser.count(batch) for name, regulariser in regularisers.items()}, losses=losses
    )


def output_loss(
    regulariser: Regulariser, tasks: Sequence[Task], places: Mapping[str, int], teacher: Teacher | None
) -> OutputLoss:
    """The loss of a regulariser that compares outputs.

    Args:
        regulariser: One with the level "outputs".
        tasks: The tasks whose outputs it compares.
        places: {source: its place in the run's order}.
        teacher: The model that a Distillation imitates; None for others.
    """
    if isinstance(regulariser, RDrop):
        return _r_drop(tasks, places)
    if not isinstance(regulariser, Distillation):
        return _of_outputs(regulariser, tasks, places)
    assert teacher is not None
    if regulariser.of == "hidden":
        return _distil_hidden(regulariser, teacher)
    return _distil(regulariser, teacher, tasks, places)


def _of_outputs(regulariser: Regulariser, tasks: Sequence[Task], places: Mapping[str, int]) -> OutputLoss:
    """The sum over tasks of the mean of regulariser.output_loss()."""

    def count(batch: Batch) -> dict[str, jax.Array]:
        return {task.name: jnp.maximum(_compared(task, batch, places).sum(), 1) for task in tasks}

    def loss(heads: Any, encoded: Encoded, outputs: Any, batch: Batch, counts: Any, references: Any) -> jax.Array:
        total = jnp.zeros(())
        for task in tasks:
            values = regulariser.output_loss(outputs[task.name], task)
            total += _masked_sum(values, _compared(task, batch, places)) / counts[task.name]
        return total

    return OutputLoss(count, loss)


def _compared(task: Task, batch: Batch, places: Mapping[str, int]) -> jax.Array:
    """Which outputs are compared: bool[R, S], all examples of the task's source; or bool[R, T], labelled words."""
    if task.level == "example":
        return (batch.index >= 0) & (batch.source == places[task.source])[:, None]
    labelled: jax.Array = batch.labels[task.name] != task.missing
    return labelled


def _masked_sum(values: jax.Array, compared: jax.Array) -> jax.Array:
    # Outputs at empty places are finite, so the gradients of their masked values are 0 and not NaN.
    return jnp.where(compared, values, 0.0).sum()


def _r_drop(tasks: Sequence[Task], places: Mapping[str, int]) -> OutputLoss:
    def halves(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
        return leaf[: len(leaf) // 2], leaf[len(leaf) // 2 :]

    def count(batch: Batch) -> dict[str, jax.Array]:
        return {task.name: jnp.maximum(_compared(task, batch, places).sum() / 2, 1) for task in tasks}

    def loss(heads: Any, encoded: Encoded, outputs: Any, batch: Batch, counts: Any, references: Any) -> jax.Array:
        total = jnp.zeros(())
        for task in tasks:
            first, second = halves(outputs[task.name])
            compared, _ = halves(_compared(task, batch, places))
            total += _masked_sum(r_drop(first, second, task.compared_as), compared) / counts[task.name]
        return total

    return OutputLoss(count, loss)


def _distil(regulariser: Distillation, teacher: Teacher, tasks: Sequence[Task], places: Mapping[str, int]) -> OutputLoss:
    def count(batch: Batch) -> dict[str, jax.Array]:
        return {task.name: jnp.maximum(_compared(task, batch, places).sum(), 1) for task in tasks}

    def loss(heads: Any, encoded: Encoded, outputs: Any, batch: Batch, counts: Any, references: Any) -> jax.Array:
        targets = teacher.outputs(references[teacher_of(regulariser)], batch, [task.name for task in tasks])
        total = jnp.zeros(())
        for task in tasks:
            values = distill(outputs[task.name], targets[task.name], regulariser.temperature, task.compared_as)
            total += _masked_sum(values, _compared(task, batch, places)) / counts[task.name]
        return total

    return OutputLoss(count, loss)


def _distil_hidden(regulariser: Distillation, teacher: Teacher) -> OutputLoss:
    def count(batch: Batch) -> jax.Array:
        return jnp.maximum((batch.segments > 0).sum(), 1)

    def loss(heads: Any, encoded: Encoded, outputs: Any, batch: Batch, counts: Any, references: Any) -> jax.Array:
        target, hidden = teacher.hidden(references[teacher_of(regulariser)], batch), encoded.tokens
        assert hidden is not None
        if regulariser.name in heads:
            hidden = times(hidden, heads[regulariser.name]["projection"]["kernel"])
        values = distill_hidden(hidden, target, regulariser.distance)
        return _masked_sum(values, batch.segments > 0) / counts

    return OutputLoss(count, loss)
