"""The shape of a weighting rule: pure functions, like an optax transformation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax


class Signals(NamedTuple):
    """What a rule may look at.

    Attributes:
        losses: {task: f32[]}, this step's mean losses.
        gram: f32[K, K], inner products of the task gradients, rows in the order of the losses' sorted keys; None where the
            rule does not need it.
        step: i32[], steps done before this one.
        key: PRNG key of this step, for rules that draw.
    """

    losses: dict[str, jax.Array]
    gram: jax.Array | None
    step: jax.Array
    key: jax.Array


class Rule(NamedTuple):
    """A weighting rule.

    Attributes:
        init: Task names, in order, to the rule's state: any pytree of arrays; it lives in the train state.
        update: (state, Signals) to (weights, new state); weights is {task: f32[]} and carries no gradient.
        needs_gram: Whether Signals.gram must be computed.
    """

    init: Callable[[Sequence[str]], Any]
    update: Callable[[Any, Signals], tuple[dict[str, jax.Array], Any]]
    needs_gram: bool = False


def weighted_sum(weights: dict[str, jax.Array], losses: dict[str, jax.Array]) -> jax.Array:
    """The objective, f32[]: sum over tasks of weight times loss."""
    return jax.tree.reduce(lambda total, term: total + term, jax.tree.map(lambda w, loss: w * loss, weights, losses))
