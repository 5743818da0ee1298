"""Rules that depend on the step alone: equal, fixed and scheduled weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.core.errors import UserError, listed, unknown
from mtl_jax.weighting.base import Rule, Signals, Weights, named, stack, unstack
from mtl_jax.weighting.schedules import Schedule, at, parse


@named
def equal() -> Rule:
    """Every weight is 1: the plain sum of the losses (Caruana 1997). The weights sum to K.

    Heads are weighted, as in one sum of losses; with weights of 1 they follow their plain losses.
    """

    def update(state: Any, signals: Signals) -> tuple[Weights, Any]:
        return unstack(jnp.ones(len(signals.losses)), signals), state

    return Rule(init=lambda names: (), update=update)


@named
def fixed(weights: Mapping[str, float | Schedule]) -> Rule:
    """Given weights: L_target + lambda L_source is fixed({"target": 1, "source": lam}).

    Heads are weighted, as in one sum of losses.

    Args:
        weights: {task: weight}; a weight is a number that is finite and not negative, or an optax schedule of the step.
            Nothing scales their sum.

    Raises:
        UserError: A weight is negative or not finite; at init, a task has no weight or a weight no task.
    """
    for task, weight in weights.items():
        if isinstance(weight, str):
            raise UserError(f"weights: {task} is {weight!r}; a schedule as text is for the weighting scheduled")
        if callable(weight) or isinstance(weight, jax.core.Tracer):  # inside a program nothing can be refused
            continue
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"weights: {task} is {weight}; a weight must be finite and not negative")

    def init(names: Sequence[str]) -> Any:
        for task in weights:
            if task not in names:
                raise unknown("task in weights:", task, names)
        missing = [name for name in names if name not in weights]
        if missing:
            raise UserError(f"weights: no weight for {listed(missing)}; give every task one (0 leaves it out)")
        return ()

    def update(state: Any, signals: Signals) -> tuple[Weights, Any]:
        values_K = stack({task: at(weights[task], signals.step) for task in signals.losses})
        return unstack(values_K, signals), state

    return Rule(init=init, update=update)


@named
def scheduled(weights: Mapping[str, float | str | Schedule]) -> Rule:
    """Weights that change with the step: an optax schedule for each task. Nothing scales their sum.

    Heads are weighted, as in one sum of losses.

    Args:
        weights: {task: weight}; a number, an optax schedule, or the call that makes one as text, so that it can stand in a
            configuration: "linear_schedule(1.0, 0.0, 1000)", "dann_schedule(0.0, 1.0, 1000)". The step counts from the start
            of the run, through all phases.

    Raises:
        UserError: A text is neither a number nor a schedule; at init, a task has no weight or a weight no task.
    """
    return fixed({task: parse(weight, task) for task, weight in weights.items()})
