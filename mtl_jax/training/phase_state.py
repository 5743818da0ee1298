"""The states of a run at the starts of its phases: the first, those that follow, and their shapes for a checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.core import trees
from mtl_jax.core.errors import UserError
from mtl_jax.training import gram_gradient, phase_plan, privacy, sharding
from mtl_jax.training.phase_plan import PhasePlan
from mtl_jax.training.prepared import Prepared
from mtl_jax.training.sharding import Placement
from mtl_jax.training.train_state import TrainState, create
from mtl_jax.transfer import averaging, optax_rules


def initial_state(prepared: Prepared) -> TrainState:
    """The state before the first step, on the devices."""
    plan, placement = prepared.plans[0], prepared.placement
    make = functools.partial(_state, prepared, plan, prepared.experiment.seed)
    # Moments of a state that is cut are made on the devices: no device, and no host, need have all of them.
    params = jax.tree.map(np.array, prepared.params)  # copies, as a step gives the memory of its state away
    params = placement.place(params) if prepared.cut else params
    state = _made(make, params, placement=placement) if prepared.cut else _place(make(params), prepared)
    if prepared.experiment.optimizer.private.secret:
        state = state._replace(key=_place(privacy.noise_key(prepared.experiment), prepared))
    return state


def start_phase(plan: PhasePlan, state: TrainState, prepared: Prepared) -> TrainState:
    """The state at the start of a phase: new optimizer state and average, and rule state where the rule changes.

    The optimizer's moments of leaves that trained in the phase before are kept.
    """
    trained, _ = trees.split(state.params, plan.mask)

    def make(trained: Any) -> dict[str, Any]:
        average = averaging.make(prepared.experiment.averaging).init(trained)
        changed: dict[str, Any] = {"opt_state": plan.optimizer.init(trained), "average": average}
        if plan.resets_rule:
            names = [task.name for task in prepared.corpus.tasks]
            changed["rule_state"] = gram_gradient.init_rule(plan.rule, names, trained["trunk"], plan.own)
        return changed

    fresh = _made(make, trained, placement=prepared.placement) if prepared.cut else make(prepared.placement.on_host(trained))
    changed = fresh | {"opt_state": optax_rules.carry(state.opt_state, fresh["opt_state"])}
    return state._replace(**(prepared.placement.moved(changed) if prepared.cut else _place(changed, prepared)))


def template(prepared: Prepared, number: int, step: int) -> TrainState:
    """Shapes and shardings of the state after `step` steps, in phase `number`, to restore a checkpoint.

    Raises:
        UserError: The checkpoint was made with other phases.
    """
    if number >= len(prepared.plans) or not prepared.plans[number].start <= step <= prepared.plans[number].end:
        spans = ", ".join(f"{plan.phase.name} {plan.start + 1}..{plan.end}" for plan in prepared.plans)
        raise UserError(
            f"the checkpoint of step {step} was made in phase {number}, which does not fit the phases {spans}; "
            "choose another --workdir"
        )
    state: TrainState = prepared.placement.shapes(_shapes(prepared, prepared.plans[number]))
    return state


def bytes_if_replicated(prepared: Prepared) -> int:
    """Bytes of state, gradients and references on a device that has all of them, in the phase that needs most."""

    def of_plan(plan: PhasePlan) -> int:
        state = _shapes(prepared, plan)
        trained, _ = trees.split(prepared.params, plan.mask)
        gradients = 1 + (len(prepared.corpus.tasks) if phase_plan.needs_task_gradients(plan.rule) else 0)
        starts = any(part.level == "parameters" and part.reads_start for part in plan.regularisers)
        copies = gradients + bool(starts or plan.mixout_paths)
        return sharding.bytes_of(state) + copies * sharding.bytes_of(trained)

    teachers = [teacher.params for teacher in prepared.teachers.values()]
    return max(map(of_plan, prepared.plans)) + sharding.bytes_of(teachers)


def _place(tree: Any, prepared: Prepared) -> Any:
    """A copy on the devices: the step donates its state, and a buffer can be donated only once."""
    return prepared.placement.place(jax.tree.map(np.array, tree))


def _made(make: Callable[..., Any], *trees_on_devices: Any, placement: Placement) -> Any:
    """The result of a function of trees on the devices, laid out as they are; no buffer of theirs is in it."""

    def copied(*arguments: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.asarray(leaf).dtype, copy=True), make(*arguments))

    shardings = placement.of(jax.eval_shape(copied, *trees_on_devices))
    return jax.jit(copied, out_shardings=shardings)(*trees_on_devices)


def _shapes(prepared: Prepared, plan: PhasePlan) -> TrainState:
    """Shapes of the state of a phase."""
    state: TrainState = jax.eval_shape(functools.partial(_state, prepared, plan, 0), prepared.params)
    return state


def _state(prepared: Prepared, plan: PhasePlan, seed: int, params: Any) -> TrainState:
    """The state before the first step of a phase, if it was the first."""
    trained, _ = trees.split(params, plan.mask)
    names = [task.name for task in prepared.corpus.tasks]
    rule_state = gram_gradient.init_rule(plan.rule, names, trained["trunk"], plan.own)
    average = averaging.make(prepared.experiment.averaging).init(trained)
    return create(params, plan.optimizer.init(trained), rule_state, seed, average)
