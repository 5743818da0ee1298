"""Regularisers around the measure of a step: losses of parameters, passes of their own, and Mixout."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.core.trees import Leaves, leaves_of, matching, put
from mtl_jax.data.batches import Batch
from mtl_jax.training.gradient import Measure, Measured
from mtl_jax.training.train_state import TrainState
from mtl_jax.transfer.penalties import ewc, l2sp, mixout
from mtl_jax.transfer.regularisers import EWC, L2SP, Distillation
from mtl_jax.weighting import schedules
from mtl_jax.weighting.schedules import Schedule

Weights = Mapping[str, float | Schedule]
# (leaves that train, references) -> f32[]
Penalty = Callable[[Leaves, Any], jax.Array]


def start_of(phase: str) -> str:
    """The reference's name: what parameters were when a phase began."""
    return f"start-{phase}"


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
