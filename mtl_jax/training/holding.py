"""Regularisers in the step: losses of parameters, losses of what the model makes of a batch, and Mixout."""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.data.batches import Batch
from mtl_jax.models.encoded import Encoded
from mtl_jax.tasks import Task
from mtl_jax.training.state import TrainState
from mtl_jax.training.step import Held, Measure, Measured
from mtl_jax.training.teachers import Teacher
from mtl_jax.transfer import distillation, ewc, freezing, l2sp, mixout, r_drop
from mtl_jax.transfer.regularisers import EWC, L2SP, AnyRegulariser, Distillation, RDrop
from mtl_jax.weighting import schedules
from mtl_jax.weighting.schedules import Schedule

Leaves = dict[str, jax.Array]
Weights = Mapping[str, float | Schedule]
# (leaves that train, references) -> f32[]
Penalty = Callable[[Leaves, Any], jax.Array]


def start_of(phase: str) -> str:
    """The reference's name: what parameters were when a phase began."""
    return f"start-{phase}"


def leaves_of(tree: Any) -> Leaves:
    """{path: leaf}; a frozen one, None, is left out."""
    return {freezing.path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def put(tree: Any, leaves: Leaves) -> Any:
    """The tree with those leaves in their places."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaves.get(freezing.path_name(path), leaf), tree)


def matching(pattern: str, leaves: Mapping[str, Any]) -> list[str]:
    """The paths that a regular expression matches whole."""
    compiled = re.compile(pattern)
    return [path for path in leaves if compiled.fullmatch(path)]


def penalty_of(regulariser: L2SP | EWC, phase: str) -> Penalty:
    """A regulariser that looks at the parameters alone.

    Args:
        regulariser: The regulariser.
        phase: The phase whose start it holds on to.
    """
    if isinstance(regulariser, L2SP):
        return functools.partial(_l2sp, regulariser, start_of(phase))
    return functools.partial(_ewc, regulariser, anchor_of(regulariser, phase))


def anchor_of(regulariser: EWC, phase: str) -> str:
    """The reference's name: where its source had been learned."""
    return f"{regulariser.name}-anchor" if regulariser.run else start_of(phase)


def fisher_of(regulariser: EWC) -> str:
    """The reference's name: its Fisher information."""
    return f"{regulariser.name}-fisher"


def teacher_of(regulariser: Distillation) -> str:
    """The reference's name: its teacher's parameters."""
    return f"{regulariser.name}-teacher"


def _l2sp(regulariser: L2SP, start: str, trained: Leaves, references: Any) -> jax.Array:
    shared = matching(regulariser.shared, trained)
    new = [path for path in matching(regulariser.new, trained) if path not in shared]
    then = {path: references[start][path] for path in shared}
    return l2sp(
        {path: trained[path] for path in shared},
        then,
        {path: trained[path] for path in new},
        alpha=regulariser.alpha,
        beta=regulariser.beta,
    )


def _ewc(regulariser: EWC, anchor: str, trained: Leaves, references: Any) -> jax.Array:
    held = matching(regulariser.parameters, trained)
    params, then, fisher = (
        {path: tree[path] for path in held} for tree in (trained, references[anchor], references[fisher_of(regulariser)])
    )
    return ewc(params, then, fisher)


def penalise(measure: Measure, penalties: Mapping[str, Penalty], weights: Weights) -> Measure:
    """The measure with the gradient of weight times penalty, over the parameters that train, added to what it found.

    Args:
        measure: The measure.
        penalties: {regulariser: its loss}.
        weights: Their weights.
    """

    def measure_and_penalise(
        trained: Any, frozen: Any, batch: Batch, table: jax.Array | None, state: TrainState, references: Any = None
    ) -> Measured:
        found = measure(trained, frozen, batch, table, state, references)

        def losses_of(trained: Any) -> dict[str, jax.Array]:
            leaves = leaves_of(trained)
            return {name: penalty(leaves, references) for name, penalty in penalties.items()}

        losses, pull = jax.vjp(losses_of, trained)
        now = weights_at(weights, penalties, state.step)
        return _add(found, pull(now)[0], losses, now)

    return measure_and_penalise


def beside(measure: Measure, other: Measure) -> Measure:
    """The measure with the gradient and the regularisers of another one, which has nothing else, added.

    Args:
        measure: Of the tasks.
        other: by_losses(...) with regularisers, under a rule that gives every task a weight of 0.
    """

    def measure_both(
        trained: Any, frozen: Any, batch: Batch, table: jax.Array | None, state: TrainState, references: Any = None
    ) -> Measured:
        found = measure(trained, frozen, batch, table, state, references)
        also = other(trained, frozen, batch, table, state._replace(rule_state=()), references)
        return _add(found, also.gradient, also.held, also.held_weights)

    return measure_both


def twice(measure: Measure) -> Measure:
    """The measure with every row in the batch twice, as R-Drop wants it; counts are those of the batch as it is."""

    def measure_twice(
        trained: Any, frozen: Any, batch: Batch, table: jax.Array | None, state: TrainState, references: Any = None
    ) -> Measured:
        doubled = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), batch)
        found = measure(trained, frozen, doubled, table, state, references)
        return found._replace(counts={task: count / 2 for task, count in found.counts.items()})

    return measure_twice


def mix(measure: Measure, p: float, paths: Sequence[str], start: str) -> Measure:
    """The measure at mixed parameters, its gradient carried back to the parameters themselves.

    Args:
        measure: The measure.
        p: As in mixout().
        paths: The parameters to mix.
        start: The reference with their start.
    """

    def measure_mixed(
        trained: Any, frozen: Any, batch: Batch, table: jax.Array | None, state: TrainState, references: Any = None
    ) -> Measured:
        key = jax.random.fold_in(state.step_key(), zlib.crc32(b"mixout"))  # no small number: split() uses these

        def mixed(trained: Any) -> Any:
            leaves = leaves_of(trained)
            own = {path: leaves[path] for path in paths}
            return put(trained, mixout(key, own, {path: references[start][path] for path in paths}, p))

        at, pull = jax.vjp(mixed, trained)
        found = measure(at, frozen, batch, table, state, references)
        return found._replace(gradient=pull(found.gradient)[0])

    return measure_mixed


def weights_at(weights: Weights, names: Mapping[str, Any], step: jax.Array) -> dict[str, jax.Array]:
    """{regulariser: f32[]}, the weights of some of them at a step."""
    return {name: schedules.at(weights[name], step) for name in names}


def _add(found: Measured, gradient: Any, losses: dict[str, jax.Array], weights: dict[str, jax.Array]) -> Measured:
    return found._replace(
        gradient=jax.tree.map(jnp.add, found.gradient, gradient),
        held=found.held | losses,
        held_weights=found.held_weights | weights,
    )


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
            values = distillation.distill(outputs[task.name], said[task.name], regulariser.temperature, task.compared_as)
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
            own = own @ heads[regulariser.name]["projection"]["kernel"]
        values = distillation.distill_hidden(own, seen, regulariser.distance)
        return _masked_sum(values, batch.segments > 0) / counts

    return OnOutputs(count, loss)
