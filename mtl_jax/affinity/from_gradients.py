"""Signals of a training step: how much a step on one task's gradient lowers the loss of another.

All are functions of jax arrays that may be jitted. Row i, column j of a matrix is the effect of task i on task j.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

TINY = 1e-30  # below every squared norm that is not 0 in float32


def gradient_cosines(gram: jax.Array) -> jax.Array:
    """The cosines of the task gradients, f32[K, K]; 0 for a gradient that is 0.

    Args:
        gram: f32[K, K], their inner products: weighting.gram, or the Signals of a rule.

    References:
        Yu et al., 2020, Gradient Surgery for Multi-Task Learning, https://arxiv.org/abs/2001.06782

    Examples:
        >>> mtl_jax.affinity.gradient_cosines([[4.0, 0.0], [0.0, 9.0]]).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    gram = jnp.asarray(gram)
    norms_K = jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0.0))
    products_KxK = norms_K[:, None] * norms_K
    return jnp.where(products_KxK > TINY, jnp.clip(gram / jnp.maximum(products_KxK, TINY), -1.0, 1.0), 0.0)


def tag_lookahead(losses: jax.Array, losses_after: jax.Array) -> jax.Array:
    """TAG's affinity, exact, f32[K, K]: 1 - L_j(theta - eta g_i) / L_j(theta).

    Args:
        losses: f32[K], the losses at theta; all above 0.
        losses_after: f32[K, K], row i after a step on task i's gradient: lookahead_losses.

    References:
        Fifty et al., 2021, Efficiently Identifying Task Groupings for Multi-Task Learning, https://arxiv.org/abs/2109.04617
    """
    return 1.0 - jnp.asarray(losses_after) / jnp.asarray(losses)


def tag_first_order(gram: jax.Array, losses: jax.Array, learning_rate: float | jax.Array) -> jax.Array:
    """TAG's affinity to first order in the learning rate, f32[K, K]: eta <g_i, g_j> / L_j.

    Under a rule that needs the Gram matrix it costs nothing more.

    Args:
        gram: f32[K, K], inner products of the task gradients.
        losses: f32[K], in the same order; all above 0.
        learning_rate: eta, of the step that is looked ahead.

    References:
        As tag_lookahead; the expansion is ours.
    """
    return learning_rate * jnp.asarray(gram) / jnp.asarray(losses)


def lookahead_losses(
    losses_of: Callable[[Any], jax.Array], params: Any, gradients: Any, learning_rate: float | jax.Array
) -> jax.Array:
    """The losses after a step on each task's gradient, f32[K, K], all K steps at once.

    Args:
        losses_of: From parameters to the losses f32[K], of the same rows every time.
        params: A tree of the shared parameters.
        gradients: A tree like params with a leading axis over the K tasks.
        learning_rate: eta, of the steps.
    """

    def after(gradient: Any) -> jax.Array:
        return losses_of(jax.tree.map(lambda leaf, slope: leaf - learning_rate * slope, params, gradient))

    return jax.vmap(after)(gradients)
