"""Elastic weight consolidation: parameters are held where they matter for what was learned before.

Kirkpatrick et al., 2017, https://arxiv.org/abs/1612.00796.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def ewc(params: Any, anchor: Any, fisher: Any) -> jax.Array:
    """1/2 sum_i F_i (params_i - anchor_i)^2, f32[] (equation 3 there; its lambda is the weight of this loss).

    Args:
        params: A tree of parameters.
        anchor: The same tree where the source had been learned.
        fisher: The same tree: the diagonal of the Fisher information there.
    """
    terms = jax.tree.map(
        lambda leaf, then, f: jnp.sum(f * jnp.square((leaf - then).astype(jnp.float32))), params, anchor, fisher
    )
    return jax.tree.reduce(jnp.add, terms, jnp.zeros(())) / 2


def fisher(log_likelihood: Callable[[Any, Any], jax.Array], params: Any, examples: Any) -> Any:
    """The diagonal of the Fisher information, a tree like the parameters: the mean over examples of squared gradients.

    Args:
        log_likelihood: (params, example) -> f32[], the log-likelihood of an example's label. With labels that are drawn from
            the model itself this is the Fisher information, with those of the data the empirical one.
        params: A tree of parameters.
        examples: A tree of arrays [N, ...], N examples.
    """
    count = len(jax.tree.leaves(examples)[0])
    return jax.tree.map(lambda leaf: leaf / count, squared_gradients(log_likelihood, params, examples))


def squared_gradients(log_likelihood: Callable[[Any, Any], jax.Array], params: Any, examples: Any) -> Any:
    """The sum over examples of the squared gradient of each: one example after another, so that one gradient is held at a time.

    Args:
        log_likelihood: As in fisher().
        params: As in fisher().
        examples: As in fisher().
    """

    def add(total: Any, example: Any) -> tuple[Any, None]:
        gradient = jax.grad(log_likelihood)(params, example)
        return jax.tree.map(lambda sum_, leaf: sum_ + jnp.square(leaf.astype(jnp.float32)), total, gradient), None

    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
    return jax.lax.scan(add, zero, examples)[0]
