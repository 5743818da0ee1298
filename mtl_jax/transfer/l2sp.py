"""L2-SP: parameters are held near where they started."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def l2sp(params: Any, start: Any, new: Any = (), *, alpha: float = 0.1, beta: float = 0.01) -> jax.Array:
    """alpha / 2 ||params - start||^2 + beta / 2 ||new||^2, f32[] (Li et al., 2018, https://arxiv.org/abs/1802.01483).

    Args:
        params: A tree of the parameters that were there before.
        start: The same tree at the start.
        new: A tree of the parameters that are new, such as those of heads; may be empty.
        alpha: How strongly the former are drawn to their start.
        beta: How strongly the latter are drawn to 0.
    """
    moved = jax.tree.map(lambda leaf, then: leaf - then, params, start)
    return alpha / 2 * squared_norm(moved) + beta / 2 * squared_norm(new)


def squared_norm(tree: Any) -> jax.Array:
    """f32[]: the sum of the squares of all numbers of a tree."""
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return sum(squares, jnp.zeros(()))
