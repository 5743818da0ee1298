"""The measure of a phase's steps, put together: tasks, rule, regularisers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from mtl_jax.data.batches import Batch
from mtl_jax.experiment import weighs_heads
from mtl_jax.tasks import Task
from mtl_jax.training import batch_parts, gram_gradient, task_gradients
from mtl_jax.training import mesh as meshes
from mtl_jax.training.forward import encode_tokens, look_up, needs
from mtl_jax.training.gradient import Measure, Measured, by_losses
from mtl_jax.training.phase_plan import PhasePlan, per_task
from mtl_jax.training.regularisation import output_losses, transforms
from mtl_jax.training.train_state import TrainState
from mtl_jax.transfer.regularisers import EWC, L2SP, Distillation, RDrop
from mtl_jax.weighting import fixed, schedules

if TYPE_CHECKING:  # prepare imports this module
    from mtl_jax.training.setup import Prepared


def measure(prepared: Prepared, plan: PhasePlan) -> Measure:
    """How a phase's steps come from losses to a gradient."""
    experiment, tasks = prepared.experiment, prepared.corpus.tasks
    counting = tuple(task for task in tasks if task.name not in plan.idle)
    weights = {each.name: schedules.parse(each.weight, each.name) for each in plan.held}
    watched = _watched(prepared, plan, counting)
    held = output_losses.held(watched, weights)
    vectors = ("tokens",) if any(isinstance(each, Distillation) and each.of == "hidden" for each in plan.held) else ()
    encode = look_up if plan.cached else encode_tokens(prepared.trunk.module, (*needs(tasks), *vectors))
    doubled = any(isinstance(each, RDrop) for each in plan.held)
    weigh_heads, accumulate = weighs_heads(experiment, plan.rule), experiment.batch.accumulate
    most = prepared.schedule.capacity(range(plan.start, plan.end))
    rows = {source: count * (2 if doubled else 1) for source, count in most.items()}
    pieces = jax.process_count() * (2 if doubled else 1)
    look = batch_parts.of_source(batch_parts.in_part(rows, accumulate, pieces), prepared.mesh)
    if not per_task(plan.rule):
        trains_trunk = any(jax.tree.leaves(plan.mask["trunk"]))
        found = by_losses(
            encode,
            counting,
            plan.rule,
            trains_trunk=trains_trunk,
            weigh_heads=weigh_heads,
            accumulate=accumulate,
            held=held,
            look=look,
        )
    else:
        same = prepared.schedule.constant() and jax.process_count() == 1 and not doubled
        found = gram_gradient.by_gram(
            encode,
            tasks,
            plan.rule,
            task_gradients.layout(tasks, rows, same),
            gram_gradient.check(prepared.params, plan.mask, experiment.gram_over),
            gram_over=experiment.gram_over,
            dtype=meshes.compute_dtype(experiment.gram_dtype),
            weigh_heads=weigh_heads,
            accumulate=accumulate,
            mesh=prepared.mesh if meshes.shards(prepared.mesh) > 1 else None,
            look=look,
        )
        if plan.rule.transform is None and not any("table" in task.needs for task in tasks):
            found = gram_gradient.only_read(found)
        if watched:
            nothing = fixed({task.name: 0.0 for task in tasks})
            alone = by_losses(encode, tasks, nothing, trains_trunk=True, accumulate=accumulate, held=held, look=look)
            found = transforms.beside(found, alone)
    if doubled:
        found = transforms.twice(found)
    if plan.idle:
        # On several hosts the rows of a source are not in one piece.
        rows_of = prepared.schedule.constant_counts(range(plan.start, plan.end)) if jax.process_count() == 1 else None
        left = batch_parts.rows_that_count(tasks, plan.idle, rows_of, accumulate * meshes.shards(prepared.mesh))
        found = leave_out(found, plan.idle, left)
    first = prepared.plans[0].phase.name
    if plan.mixed:
        found = transforms.mix(found, experiment.mixout.p, plan.mixed, transforms.start_of(first))
    penalties = {
        each.name: transforms.penalty_of(each, each.phase or first) for each in plan.held if isinstance(each, L2SP | EWC)
    }
    return transforms.penalise(found, penalties, weights) if penalties else found


def _watched(prepared: Prepared, plan: PhasePlan, counting: Sequence[Task]) -> dict[str, output_losses.OnOutputs]:
    """The regularisers of a phase that look at what the model makes of a batch."""
    places = {source: number for number, source in enumerate(prepared.corpus.splits["train"])}
    found = {}
    for each in plan.held:
        if isinstance(each, Distillation | RDrop):
            names = prepared.watched.get(each.name) or [task.name for task in counting if task.compared_as]
            tasks = [task for task in counting if task.name in names]
            found[each.name] = output_losses.on_outputs(each, tasks, places, prepared.teachers.get(each.name))
    return found


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

    def measure_the_others(
        trained: Any, frozen: Any, batch: Batch, table: jax.Array | None, state: TrainState, references: Any = None
    ) -> Measured:
        found = measure(trained, frozen, jax.tree.map(take, batch) if rows else batch, table, state, references)
        nothing = {name: jnp.zeros(()) for name in idle}
        return found._replace(losses=found.losses | nothing, counts=found.counts | nothing, weights=found.weights | nothing)

    return measure_the_others
