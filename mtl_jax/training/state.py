"""The train state: everything a step changes."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.transfer import freezing


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
        return self.params if self.average is None else freezing.merge(self.average.mean, self.params)


def create(params: Any, opt_state: Any, rule_state: Any, seed: int, average: Any = None) -> TrainState:
    """The state before the first step."""
    key = jax.random.key_data(jax.random.fold_in(jax.random.key(seed), 1))
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, rule_state, key, average)
