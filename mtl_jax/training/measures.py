"""The measure of a phase's steps, put together: tasks, rule, regularisers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax

from mtl_jax.experiment import weighs_heads
from mtl_jax.tasks import Task
from mtl_jax.training import gradients, gram_step, holding, idle, own_rows, token_rows, watching
from mtl_jax.training import mesh as meshes
from mtl_jax.training.planning import PhasePlan, per_task
from mtl_jax.training.step import Measure, by_losses, encode_tokens, look_up, needs
from mtl_jax.transfer.regularisers import EWC, L2SP, Distillation, RDrop
from mtl_jax.weighting import fixed, schedules

if TYPE_CHECKING:  # prepare imports this module
    from mtl_jax.training.prepare import Prepared


def measure(prepared: Prepared, plan: PhasePlan) -> Measure:
    """How a phase's steps come from losses to a gradient."""
    experiment, tasks = prepared.experiment, prepared.corpus.tasks
    counting = tuple(task for task in tasks if task.name not in plan.idle)
    weights = {each.name: schedules.parse(each.weight, each.name) for each in plan.held}
    watched = _watched(prepared, plan, counting)
    held = watching.held(watched, weights)
    vectors = ("tokens",) if any(isinstance(each, Distillation) and each.of == "hidden" for each in plan.held) else ()
    encode = look_up if plan.cached else encode_tokens(prepared.trunk.module, (*needs(tasks), *vectors))
    doubled = any(isinstance(each, RDrop) for each in plan.held)
    weigh_heads, accumulate = weighs_heads(experiment, plan.rule), experiment.batch.accumulate
    most = prepared.schedule.capacity(range(plan.start, plan.end))
    rows = {source: count * (2 if doubled else 1) for source, count in most.items()}
    pieces = jax.process_count() * (2 if doubled else 1)
    look = own_rows.of_source(own_rows.in_part(rows, accumulate, pieces), prepared.mesh)
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
        found = gram_step.by_gram(
            encode,
            tasks,
            plan.rule,
            gradients.layout(tasks, rows, same),
            gram_step.check(prepared.params, plan.mask, experiment.gram_over),
            gram_over=experiment.gram_over,
            dtype=meshes.compute_dtype(experiment.gram_dtype),
            weigh_heads=weigh_heads,
            accumulate=accumulate,
            mesh=prepared.mesh if meshes.shards(prepared.mesh) > 1 else None,
            look=look,
        )
        if plan.rule.transform is None and not any("table" in task.needs for task in tasks):
            found = token_rows.only_read(found)
        if watched:
            nothing = fixed({task.name: 0.0 for task in tasks})
            alone = by_losses(encode, tasks, nothing, trains_trunk=True, accumulate=accumulate, held=held, look=look)
            found = holding.beside(found, alone)
    if doubled:
        found = holding.twice(found)
    if plan.idle:
        # On several hosts the rows of a source are not in one piece.
        rows_of = prepared.schedule.same(range(plan.start, plan.end)) if jax.process_count() == 1 else None
        left = idle.rows_that_count(tasks, plan.idle, rows_of, accumulate * meshes.shards(prepared.mesh))
        found = idle.leave_out(found, plan.idle, left)
    first = prepared.plans[0].phase.name
    if plan.mixed:
        found = holding.mix(found, experiment.mixout.p, plan.mixed, holding.start_of(first))
    penalties = {each.name: holding.penalty_of(each, each.phase or first) for each in plan.held if isinstance(each, L2SP | EWC)}
    return holding.penalise(found, penalties, weights) if penalties else found


def _watched(prepared: Prepared, plan: PhasePlan, counting: Sequence[Task]) -> dict[str, watching.OnOutputs]:
    """The regularisers of a phase that look at what the model makes of a batch."""
    places = {source: number for number, source in enumerate(prepared.corpus.splits["train"])}
    found = {}
    for each in plan.held:
        if isinstance(each, Distillation | RDrop):
            names = prepared.watched.get(each.name) or [task.name for task in counting if task.compared_as]
            tasks = [task for task in counting if task.name in names]
            found[each.name] = watching.on_outputs(each, tasks, places, prepared.teachers.get(each.name))
    return found
