"""Static rules, and rules that look at the losses only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.errors import UserError, unknown
from mtl_jax.weighting.base import Rule, Signals


def equal() -> Rule:
    """Every weight is 1: the plain sum of the losses (Caruana 1997). The weights sum to K."""

    def update(state: Any, signals: Signals) -> tuple[dict[str, jax.Array], Any]:
        return {task: jnp.ones(()) for task in signals.losses}, state

    return Rule(init=lambda names: (), update=update)


def fixed(weights: Mapping[str, float | Callable[[jax.Array], jax.Array]]) -> Rule:
    """Given weights: L_target + lambda * L_source is fixed({"target": 1, "source": lam}).

    Args:
        weights: {task: weight}; a weight is a number that is finite and not negative, or an optax schedule of the step.
            Their sum is the user's.

    Raises:
        UserError: A weight is negative or not finite; at init, a task has no weight or a weight no task.
    """
    for task, weight in weights.items():
        if not callable(weight) and not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"weights: {task} is {weight}; a weight must be finite and not negative")

    def init(names: Sequence[str]) -> Any:
        for task in weights:
            if task not in names:
                raise unknown("task in weights:", task, names)
        missing = [name for name in names if name not in weights]
        if missing:
            raise UserError(f"weights: no weight for {', '.join(missing)}; give every task one (0 leaves it out)")
        return ()

    def update(state: Any, signals: Signals) -> tuple[dict[str, jax.Array], Any]:
        def at(weight: float | Callable[[jax.Array], jax.Array]) -> jax.Array:
            return jnp.asarray(weight(signals.step) if callable(weight) else weight, jnp.float32)

        return {task: at(weights[task]) for task in signals.losses}, state

    return Rule(init=init, update=update)


def dwa(temperature: float = 2.0) -> Rule:
    """Dynamic weight averaging: tasks whose loss falls slowly get more weight (Liu, Johns and Davison 2019).

    w_k = K softmax_k(r_k / temperature), with r_k = L_k(t-1) / L_k(t-2); 1 in the first two steps. The weights sum to K.
    The paper takes epoch means of the losses; here a step stands for an epoch.

    Args:
        temperature: Above 0; the larger, the more equal the weights.

    Raises:
        UserError: The temperature is not above 0.
    """
    if not temperature > 0:
        raise UserError(f"weighting dwa: temperature is {temperature}; it must be above 0")

    def init(names: Sequence[str]) -> Any:
        zero = {name: jnp.zeros(()) for name in names}
        return {"seen": jnp.zeros((), jnp.int32), "last": zero, "before_last": zero}

    def update(state: Any, signals: Signals) -> tuple[dict[str, jax.Array], Any]:
        tasks = sorted(signals.losses)
        last_K = jnp.stack([state["last"][task] for task in tasks])
        before_K = jnp.stack([state["before_last"][task] for task in tasks])
        rate_K = last_K / jnp.maximum(before_K, jnp.finfo(jnp.float32).tiny)
        rate_K = jnp.where(state["seen"] < 2, 1.0, jnp.minimum(rate_K, 1e6))
        weights_K = len(tasks) * jax.nn.softmax(rate_K / temperature)
        new_state = {"seen": state["seen"] + 1, "last": dict(signals.losses), "before_last": state["last"]}
        return dict(zip(tasks, weights_K, strict=True)), new_state

    return Rule(init=init, update=update)
