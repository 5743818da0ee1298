"""The losses of regularisers that compare outputs: distillation, R-Drop, consistency, pseudo-labels."""

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
from mtl_jax.training.regularisation.pseudo_rows import TARGETS, WEIGHTS, leaf, reference_of
from mtl_jax.training.regularisation.teachers import Teacher
from mtl_jax.transfer import distill, distill_hidden, divergence, r_drop
from mtl_jax.transfer.regularisers import Distillation, RDrop, Regulariser
from mtl_jax.transfer.unlabelled import Consistency, SelfTraining


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


class LossContext(NamedTuple):
    """What the losses of a phase's regularisers may know of the run.

    Attributes:
        places: {source: its place in the run's order}.
        first_ids: {source: the id of its first training example}.
        teachers: {regulariser: the model that it imitates}.
        phase: The phase.
    """

    places: Mapping[str, int]
    first_ids: Mapping[str, int]
    teachers: Mapping[str, Teacher]
    phase: str


def of_outputs(regulariser: Regulariser, tasks: Sequence[Task], context: LossContext) -> OutputLoss:
    """The sum over tasks of the mean of regulariser.output_loss(); the tasks are those whose outputs it compares."""
    places = context.places

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


def halves(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first and the second pass of every row, where every row is twice in a batch."""
    return leaf[: len(leaf) // 2], leaf[len(leaf) // 2 :]


def of_consistency(regulariser: Consistency, tasks: Sequence[Task], context: LossContext) -> OutputLoss:
    """The divergence of a changed copy's outputs from those of the row itself."""
    places = context.places

    def compared(task: Task, batch: Batch) -> jax.Array:
        first, _ = halves((batch.index >= 0) & (batch.source == places[regulariser.source or task.source])[:, None])
        return first

    def count(batch: Batch) -> dict[str, jax.Array]:
        return {task.name: jnp.maximum(compared(task, batch).sum(), 1) for task in tasks}

    def loss(heads: Any, encoded: Encoded, outputs: Any, batch: Batch, counts: Any, references: Any) -> jax.Array:
        total = jnp.zeros(())
        for task in tasks:
            first, second = halves(outputs[task.name])
            target = jax.lax.stop_gradient(first)
            certain = confidence(target, task.compared_as) >= regulariser.threshold
            sharp = target if task.compared_as == "number" else target / regulariser.temperature
            values = divergence(task.compared_as, sharp, second)
            total += _masked_sum(values, compared(task, batch) & certain) / counts[task.name]
        return total

    return OutputLoss(count, loss)


def confidence(outputs: jax.Array, kind: str) -> jax.Array:
    """The probability of the answer in outputs f[..., O]: of the label, or of the least certain yes or no; 1 for a number."""
    if kind == "softmax":
        return jax.nn.softmax(outputs).max(axis=-1)
    if kind == "sigmoid":
        return jax.nn.sigmoid(jnp.abs(outputs)).min(axis=-1)
    return jnp.ones(outputs.shape[:-1])


def of_pseudo_labels(regulariser: SelfTraining, tasks: Sequence[Task], context: LossContext) -> OutputLoss:
    """The cross-entropy of tasks with pseudo-labels: the sum over tasks of the mean over a batch's unlabelled rows.

    The labels were made at the phase's first step.
    """
    place, first_id = context.places[regulariser.source], context.first_ids[regulariser.source]
    reference = reference_of(regulariser, context.phase)

    def unlabelled(batch: Batch) -> jax.Array:
        return (batch.index >= 0) & (batch.source == place)[:, None]

    def count(batch: Batch) -> jax.Array:
        return jnp.maximum(unlabelled(batch).sum(), 1)

    def loss(heads: Any, encoded: Encoded, outputs: Any, batch: Batch, counts: Any, references: Any) -> jax.Array:
        labels, rows_RxS = references[reference], unlabelled(batch)
        place_RxS = jnp.where(rows_RxS, batch.index - first_id, 0)
        total = jnp.zeros(())
        for task in tasks:
            target_RxSxO, weight_RxS = (labels[leaf(task.name, what)][place_RxS] for what in (TARGETS, WEIGHTS))
            values = _cross_entropy(outputs[task.name].astype(jnp.float32), target_RxSxO, task.compared_as)
            total += _masked_sum(weight_RxS * values, rows_RxS) / counts
        return total

    return OutputLoss(count, loss)


def _cross_entropy(outputs: jax.Array, targets: jax.Array, kind: str) -> jax.Array:
    if kind == "softmax":
        return -(targets * jax.nn.log_softmax(outputs)).sum(axis=-1)
    return -(targets * jax.nn.log_sigmoid(outputs) + (1 - targets) * jax.nn.log_sigmoid(-outputs)).mean(axis=-1)


def of_r_drop(regulariser: RDrop, tasks: Sequence[Task], context: LossContext) -> OutputLoss:
    """The divergence of the two passes of every row."""
    places = context.places

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


def of_teacher(regulariser: Distillation, tasks: Sequence[Task], context: LossContext) -> OutputLoss:
    """The distance of outputs, or of token vectors, from the teacher's."""
    teacher, reference = context.teachers[regulariser.name], regulariser.references(context.phase)["teacher"]
    if regulariser.of == "hidden":
        return _distil_hidden(regulariser, teacher, reference)
    places = context.places

    def count(batch: Batch) -> dict[str, jax.Array]:
        return {task.name: jnp.maximum(_compared(task, batch, places).sum(), 1) for task in tasks}

    def loss(heads: Any, encoded: Encoded, outputs: Any, batch: Batch, counts: Any, references: Any) -> jax.Array:
        targets = teacher.outputs(references[reference], batch, [task.name for task in tasks])
        total = jnp.zeros(())
        for task in tasks:
            values = distill(outputs[task.name], targets[task.name], regulariser.temperature, task.compared_as)
            total += _masked_sum(values, _compared(task, batch, places)) / counts[task.name]
        return total

    return OutputLoss(count, loss)


def _distil_hidden(regulariser: Distillation, teacher: Teacher, reference: str) -> OutputLoss:
    def count(batch: Batch) -> jax.Array:
        return jnp.maximum((batch.segments > 0).sum(), 1)

    def loss(heads: Any, encoded: Encoded, outputs: Any, batch: Batch, counts: Any, references: Any) -> jax.Array:
        target, hidden = teacher.hidden(references[reference], batch), encoded.tokens
        assert hidden is not None
        if regulariser.name in heads:
            hidden = times(hidden, heads[regulariser.name]["projection"]["kernel"])
        values = distill_hidden(hidden, target, regulariser.distance)
        return _masked_sum(values, batch.segments > 0) / counts

    return OutputLoss(count, loss)
