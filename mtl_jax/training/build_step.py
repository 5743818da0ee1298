"""The steps of a phase, put together: which backward pass, which weights, which transforms."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from mtl_jax.augment.mixes import Mix, NeighbourSmoothing
from mtl_jax.data.poisson import PoissonSchedule
from mtl_jax.experiment import weighs_heads
from mtl_jax.tasks import Task
from mtl_jax.training import batch_parts, gradient, gram_gradient, held_out, phase_state, task_gradients
from mtl_jax.training import mesh as meshes
from mtl_jax.training.forward import Encode, HeadInputs, cached_for, encode_tokens, needed_fields
from mtl_jax.training.gradient import NO_REGULARISERS, BackwardFn, GradientFn, OutputRegularisers
from mtl_jax.training.phase_plan import PhasePlan, needs_task_gradients
from mtl_jax.training.prepared import Prepared
from mtl_jax.training.private_gradient import row_by_row
from mtl_jax.training.regularisation import mixing, output_losses, transforms
from mtl_jax.training.step import make_gradient_fn, make_train_step
from mtl_jax.transfer import averaging
from mtl_jax.transfer.regularisers import Distillation, RDrop, Regulariser, start_of
from mtl_jax.transfer.unlabelled import Consistency, SelfTraining
from mtl_jax.weighting import schedules

Transform = Callable[[GradientFn], GradientFn]

# How the loss of a regulariser of outputs is made, by its class: (regulariser, the tasks that it compares, LossContext).
OUTPUT_LOSSES: dict[type[Regulariser], Callable[..., output_losses.OutputLoss]] = {
    Regulariser: output_losses.of_outputs,
    Distillation: output_losses.of_teacher,
    RDrop: output_losses.of_r_drop,
    Consistency: output_losses.of_consistency,
    SelfTraining: output_losses.of_pseudo_labels,
    Mix: mixing.pooled_loss,
    NeighbourSmoothing: mixing.neighbour_loss,
}


def gradient_fn(prepared: Prepared, plan: PhasePlan) -> GradientFn:
    """From a phase's inputs to its gradient, for step.make_train_step().

    Args:
        prepared: The run.
        plan: The phase.
    """
    weights = {item.name: schedules.parse(item.weight, item.name) for item in plan.regularisers}
    backward, without_gram = _backward(prepared, plan)
    for passed in _mixing_passes(prepared, plan):
        backward = gradient.beside(backward, passed)
        without_gram = None if without_gram is None else gradient.beside(without_gram, passed)
    step = make_gradient_fn(
        backward,
        plan.rule if prepared.experiment.weigh_heads == "rule" else plan.rule._replace(head_weights=None),
        lambda step: {name: schedules.at(weight, step) for name, weight in weights.items()},
        without_gram,
    )
    for transform in _transforms(prepared, plan):
        step = transform(step)
    return step


def jitted_step(prepared: Prepared, plan: PhasePlan) -> Any:
    """The jitted train step of a phase: (state, StepInputs) -> new state and metrics. It donates the state.

    Args:
        prepared: The run.
        plan: The phase.
    """
    follow = averaging.make(prepared.experiment.averaging).follow
    sources = len(prepared.corpus.splits["train"])
    step = make_train_step(gradient_fn(prepared, plan), plan.optimizer, plan.mask, sources, follow)
    whole = meshes.replicated(prepared.mesh)
    if not prepared.cut:
        return jax.jit(step, donate_argnums=0, out_shardings=whole)
    shapes = phase_state.template(prepared, plan.number, plan.start)
    return jax.jit(step, donate_argnums=0, out_shardings=(prepared.placement.of(shapes), whole))


def _transforms(prepared: Prepared, plan: PhasePlan) -> tuple[Transform, ...]:
    """The transforms of a phase, innermost first.

    The key of mixing is innermost: it only adds to what the step reads.
    Tasks without weight are around R-Drop: their rows leave the batch, and R-Drop doubles the other rows. Mixout is around both
    and changes the parameters of all passes. Penalties are outermost: they are losses of the parameters, not of mixed ones.
    """
    experiment, tasks = prepared.experiment, prepared.corpus.tasks
    first_phase = prepared.plans[0].phase.name
    chosen: list[Transform] = []
    if any(isinstance(regulariser, Mix) for regulariser in plan.regularisers):
        chosen.append(mixing.with_key)
    noisy = next((regulariser for regulariser in plan.regularisers if isinstance(regulariser, Consistency)), None)
    if noisy is not None:
        hide = transforms.hidden_tokens(prepared.trunk.tokenizer, noisy.drop)
        chosen.append(functools.partial(transforms.with_changed_copies, change=hide, tasks=tasks))
    elif _doubles(plan):
        chosen.append(transforms.every_row_twice)
    if plan.zero_weight_tasks:
        # On several hosts the rows of a source are not in one piece.
        counts = prepared.schedule.constant_counts(range(plan.start, plan.end)) if jax.process_count() == 1 else None
        multiple = experiment.batch.accumulate * meshes.shards(prepared.mesh)
        others = {source for regulariser in plan.regularisers for source in regulariser.sources}
        rows = batch_parts.weighted_rows(tasks, plan.zero_weight_tasks, counts, multiple, others)
        chosen.append(functools.partial(transforms.without_tasks, tasks=plan.zero_weight_tasks, rows=rows))
    if plan.mixout_paths:
        start = start_of(first_phase)
        mixout = functools.partial(transforms.at_mixed_parameters, p=experiment.mixout.p, paths=plan.mixout_paths, start=start)
        chosen.append(mixout)
    penalties = {
        regulariser.name: transforms.penalty_of(regulariser, regulariser.phase or first_phase)
        for regulariser in plan.regularisers
        if regulariser.level == "parameters"
    }
    if penalties:
        chosen.append(functools.partial(transforms.with_penalties, penalties=penalties))
    return tuple(chosen)


def _backward(prepared: Prepared, plan: PhasePlan) -> tuple[BackwardFn, BackwardFn | None]:
    """The backward pass of a phase, and that of the steps in which its rule is not due to compare gradients."""
    experiment, tasks = prepared.experiment, prepared.corpus.tasks
    weighted = tuple(task for task in tasks if task.name not in plan.zero_weight_tasks)
    regularisers = _output_regularisers(prepared, plan, weighted)
    encode, head_inputs = _encode(prepared, plan), _head_inputs(prepared, plan)
    weigh_heads, accumulate = weighs_heads(experiment, plan.rule), experiment.batch.accumulate
    savings = prepared.savings
    needs, evaluate = plan.rule.held_out, encode_tokens(prepared.trunk.module, needed_fields(tasks), savings)
    common = functools.partial(
        gradient.make_backward, encode, accumulate=accumulate, head_inputs=head_inputs, savings=savings, own=plan.own
    )
    trains_trunk = any(jax.tree.leaves(plan.mask["trunk"]))
    if experiment.optimizer.private.clip:
        assert isinstance(prepared.schedule, PoissonSchedule)
        of_row = gradient.make_backward(
            encode, weighted, trains_trunk=trains_trunk, weigh_heads=weigh_heads, savings=savings, own=plan.own
        )
        expected = prepared.schedule.expected(plan.start)
        return row_by_row(of_row, weighted, experiment.optimizer.private, expected, prepared.mesh), None
    if not needs_task_gradients(plan.rule):
        of_losses = common(weighted, trains_trunk=trains_trunk, weigh_heads=weigh_heads, regularisers=regularisers)
        if needs is None:
            return of_losses, None
        plain = of_losses if regularisers is NO_REGULARISERS else common(tasks, trains_trunk=True, weigh_heads=weigh_heads)
        return held_out.with_look_ahead(of_losses, plain, evaluate, tasks, needs, weigh_heads, savings), None
    same_rows = prepared.schedule.constant() and jax.process_count() == 1 and not _doubles(plan)
    compared = gram_gradient.make_backward(
        _encode(prepared, plan, one_source=True),
        tasks,
        plan.rule,
        task_gradients.layout(tasks, _most_rows(prepared, plan), same_rows),
        gram_gradient.check(prepared.params, plan.mask, experiment.gram_over, plan.own),
        gram_over=experiment.gram_over,
        dtype=meshes.compute_dtype(experiment.gram_dtype),
        weigh_heads=weigh_heads,
        accumulate=accumulate,
        mesh=prepared.mesh if meshes.shards(prepared.mesh) > 1 else None,
        # A user's trunk may use its tokens for more.
        only_looks_up=not prepared.trunk.is_users and not any("table" in task.needs for task in tasks),
        savings=savings,
        own=plan.own,
    )
    without_gram = common(tasks, trains_trunk=True, weigh_heads=weigh_heads)
    if needs is not None:
        plain = common(tasks, trains_trunk=True, weigh_heads=weigh_heads)
        compared = held_out.with_look_ahead(compared, plain, evaluate, tasks, needs, weigh_heads, savings)
    if regularisers is not NO_REGULARISERS:
        # In a separate backward pass: the rule must not see their gradients among those of the tasks.
        regularised = common(tasks, trains_trunk=True, regularisers=regularisers)
        compared, without_gram = gradient.beside(compared, regularised), gradient.beside(without_gram, regularised)
    return compared, without_gram


def _mixing_passes(prepared: Prepared, plan: PhasePlan) -> list[BackwardFn]:
    """The passes through the trunk of a phase in which token vectors are mixed."""
    tasks = [task for task in prepared.corpus.tasks if task.name not in plan.zero_weight_tasks]
    trains_trunk, accumulate = any(jax.tree.leaves(plan.mask["trunk"])), prepared.experiment.batch.accumulate
    passes = []
    for regulariser in plan.regularisers:
        if isinstance(regulariser, Mix) and regulariser.own_pass:
            chosen = mixing.tasks_of(regulariser, tasks)
            encode = encode_tokens(prepared.trunk.module, needed_fields(tuple(chosen)), prepared.savings)
            passes.append(mixing.within_trunk(regulariser, chosen, encode, trains_trunk=trains_trunk, accumulate=accumulate))
    return passes


def _doubles(plan: PhasePlan) -> bool:
    """Whether every row goes through the model twice."""
    return any(regulariser.doubles_rows for regulariser in plan.regularisers)


def _most_rows(prepared: Prepared, plan: PhasePlan) -> dict[str, int]:
    """{source: the most rows that it has in a batch of the phase}, R-Drop's second ones included."""
    most = prepared.schedule.capacity(range(plan.start, plan.end))
    return {source: count * (2 if _doubles(plan) else 1) for source, count in most.items()}


def _head_inputs(prepared: Prepared, plan: PhasePlan) -> HeadInputs:
    pieces = jax.process_count() * (2 if _doubles(plan) else 1)
    most = batch_parts.rows_in_part(_most_rows(prepared, plan), prepared.experiment.batch.accumulate, pieces)
    return batch_parts.rows_of_source(most, prepared.mesh)


def _encode(prepared: Prepared, plan: PhasePlan, one_source: bool = False) -> Encode:
    if plan.cached_features:
        return cached_for(prepared.corpus.tasks)
    reads_tokens = any(regulariser.reads_tokens for regulariser in plan.regularisers)
    needs = (*needed_fields(prepared.corpus.tasks), *(("tokens",) if reads_tokens else ()))
    encode = encode_tokens(prepared.trunk.module, needs, prepared.savings, one_source)
    return batch_parts.recomputed(encode, prepared.experiment.batch.recompute, "table" in needs)


def _output_regularisers(prepared: Prepared, plan: PhasePlan, weighted: Sequence[Task]) -> OutputRegularisers:
    """The regularisers of a phase that compare outputs."""
    train = prepared.corpus.splits["train"]
    context = output_losses.LossContext(
        places={source: number for number, source in enumerate(train)},
        first_ids={source: examples.first_id for source, examples in train.items()},
        teachers={
            name: teacher._replace(savings=prepared.savings._replace(remat="none"))
            for name, teacher in prepared.teachers.items()
        },
        phase=plan.phase.name,
    )
    losses = {}
    for regulariser in plan.regularisers:
        if regulariser.level == "outputs" and not regulariser.own_pass:
            name = regulariser.name
            names = prepared.compared_tasks.get(name) or [task.name for task in weighted if task.compared_as]
            make = next(OUTPUT_LOSSES[kind] for kind in type(regulariser).__mro__ if kind in OUTPUT_LOSSES)
            losses[name] = make(regulariser, [task for task in weighted if task.name in names], context)
    return output_losses.combine(losses) if losses else NO_REGULARISERS
