"""The train state: everything a step changes."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.core import trees


class TrainState(NamedTuple):
    """One pytree; saved whole, restored whole.

    Attributes:
        step: i32[], steps done.
        params: {"trunk": ..., "heads": {task: ...}}, float32.
        opt_state: The optimizer's state over the trainable leaves of the current phase.
        rule_state: The weighting rule's state.
        key: u32[2], key data of the run; the key of a step is folded from it and the step.
        average: averaging.Average of the trainable leaves over the steps of the current phase; None: there is none.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    rule_state: Any
    key: jax.Array
    average: Any = None

    def step_key(self) -> jax.Array:
        """The PRNG key of the next step."""
        return jax.random.fold_in(jax.random.wrap_key_data(self.key), self.step)

    def measured(self) -> Any:
        """The parameters that are measured: the average of those that train, where there is one."""
        return self.params if self.average is None else trees.merge(self.average.mean, self.params)


def create(params: Any, opt_state: Any, rule_state: Any, seed: int, average: Any = None) -> TrainState:
    """The state before the first step."""
    key = jax.random.key_data(jax.random.fold_in(jax.random.key(seed), 1))
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, rule_state, key, average)


class Metrics(NamedTuple):
    """What a step reports; read by the host one step late.

    Attributes:
        losses: {task: f32[]}, mean loss over the labelled examples (or tokens) of the step; 0 where there are none.
        counts: {task: f32[]}, number of those examples, or tokens.
        weights: {task: f32[]}.
        total: f32[], the weighted sum, regularisers included.
        gradient_norm: f32[], of the trainable part, before clipping.
        gram: f32[K, K], inner products of the task gradients in sorted order; NaN where the rule did not look at them in this
            step, None if it never does.
        seen: i32[N, 3], of each source the rows, examples and tokens of the batch, over all hosts.
        held: {regulariser: f32[]}, their losses.
        held_weights: {regulariser: f32[]}.
        residual: f32[], of what the rule solved for its weights, as weighting.solve gives it; NaN where it solved nothing in
            this step, None if it never does.
    """

    losses: dict[str, jax.Array]
    counts: dict[str, jax.Array]
    weights: dict[str, jax.Array]
    total: jax.Array
    gradient_norm: jax.Array
    gram: jax.Array | None
    seen: jax.Array
    held: dict[str, jax.Array]
    held_weights: dict[str, jax.Array]
    residual: jax.Array | None = None
