"""The stacked state of a chunk of runs: before the first step, at the start of a later phase, and its shapes.

As the states of training.phase_state, with an axis over runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.ablation import stacking
from mtl_jax.ablation.fields import Numbers
from mtl_jax.ablation.programs import Machine
from mtl_jax.ablation.stacking import Together
from mtl_jax.training import mesh as meshes
from mtl_jax.training.phase_plan import PhasePlan
from mtl_jax.training.train_state import TrainState
from mtl_jax.transfer import optax_rules


def initial_state(machine: Machine, values: Numbers, params_of: Mapping[int, Any], seeds: Sequence[int]) -> Together:
    """The state before the first step.

    Args:
        machine: The compiled functions of the runs.
        values: The numbers of each run, leaves [N, ...].
        params_of: {seed: initial parameters}.
        seeds: The seed of each of the N runs.
    """
    plan, per_run = machine.prepared.plans[0], machine.per_run[0]
    params = stacking.stack([params_of[seed] for seed in seeds], per_run, machine.mesh)
    initial = machine.begin(plan, values, params)
    step = meshes.place(np.zeros((), np.int32), meshes.replicated(machine.mesh))
    key, best = stacking.keys(seeds, machine.mesh), _copied(stacking.per_run_part(params, per_run))
    return Together(step, params, initial.opt_state, initial.rule_state, key, _copied(initial.average), best)


def start_phase(machine: Machine, values: Numbers, plan: PhasePlan, state: Together) -> Together:
    """The state at the start of a later phase; see training.phase_state.start_phase().

    Args:
        machine: As for initial_state; so are values.
        plan: The phase.
        state: The state at the end of the phase before.
    """
    was_per_run, per_run = machine.per_run[plan.number - 1], machine.per_run[plan.number]
    params = stacking.widen(state.params, was_per_run, per_run, machine.size, machine.mesh)

    def best_leaf(was_stacked: bool, stacked: bool, best: Any, leaf: Any) -> Any:
        return best if was_stacked else jnp.copy(leaf) if stacked else None

    best = jax.tree.map(best_leaf, was_per_run, per_run, state.best, params)
    initial = machine.begin(plan, values, params)
    moments = jax.device_put(optax_rules.carry(state.opt_state, initial.opt_state), meshes.by_runs(machine.mesh))
    rule_state = initial.rule_state if plan.resets_rule else state.rule_state
    average = _copied(initial.average)
    return state._replace(params=params, opt_state=moments, rule_state=rule_state, average=average, best=best)


def template(machine: Machine, values: Numbers, plan: PhasePlan, params: Any) -> Together:
    """Shapes and shardings of the state in a phase, to restore a checkpoint.

    Args:
        machine: As for initial_state; so are values.
        plan: The phase.
        params: The parameters of one run, or their shapes.
    """
    per_run, size = machine.per_run[plan.number], machine.size

    def shape(stacked: bool, leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size, *leaf.shape) if stacked else leaf.shape, leaf.dtype)

    stacked_params = jax.tree.map(shape, per_run, params)
    initial = machine.begin_shapes(plan, values, stacked_params)
    step, key = jax.ShapeDtypeStruct((), np.int32), jax.ShapeDtypeStruct((size, 2), np.uint32)
    best = stacking.per_run_part(stacked_params, per_run)
    shapes: Any = (step, stacked_params, initial.opt_state, initial.rule_state, key, initial.average, best)
    shardings = (*stacking.shardings(per_run, machine.mesh), meshes.by_runs(machine.mesh))
    return Together(*stacking.placed(shapes, shardings))


def with_best(state: TrainState, best: Any) -> Together:
    """A state together with the best parameters."""
    return Together(*state, best)


def _copied(tree: Any) -> Any:
    """A copy: the step donates its state, and a buffer can be donated only once."""
    return jax.tree.map(jnp.copy, tree)
