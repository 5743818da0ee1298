"""Small convex problems over K task weights: fixed iteration counts, no host, vmap-able, float32.

A primal-dual interior point method: one K x K solve an iteration, and so few iterations that nothing needs to be tuned or
stopped early. Gram matrices are scaled inside, so that gradients of any magnitude that float32 holds work alike. A task that is
absent has no variable: its weight stays 0, and the others' problem is the smaller one.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mtl_jax.weighting.base import share

ITERATIONS = 40

# x [K] -> gradient [K] and Hessian [K, K] of a convex function
Derivatives = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def minimize(
    derivatives: Derivatives,
    start_K: jax.Array,
    lower_K: jax.Array,
    total: float | None = None,
    present_K: jax.Array | None = None,
) -> jax.Array:
    """The x >= lower, with a given sum if `total` is set, that minimises a convex function: f32[K].

    Newton steps on the perturbed optimality conditions (Boyd and Vandenberghe 2004, section 11.7), the barrier falling tenfold
    an iteration; a step that float32 cannot carry any further is not taken.

    Args:
        derivatives: Gradient and Hessian of the function, of order 1 where x is.
        start_K: Strictly above lower, and with the given sum.
        lower_K: Lower bounds.
        total: The sum of x, or None where it is free.
        present_K: bool; where False, x is fixed at 0 and bounds and derivatives do not count. None: all True.
    """
    K = lower_K.shape[0]
    if present_K is None:
        present_K = jnp.ones(K, bool)
    start_K = jnp.where(present_K, start_K, 0.0)
    lower_K = jnp.where(present_K, lower_K, -1.0)
    both_KxK = present_K[:, None] & present_K[None, :]
    count = jnp.maximum(present_K.sum(), 1)

    def longest(value_K: jax.Array, step_K: jax.Array) -> jax.Array:
        """The share of a step that keeps 5 % of the distance to zero."""
        falls = step_K < 0
        return jnp.min(jnp.where(falls, -0.95 * value_K / jnp.where(falls, step_K, -1.0), 1.0))

    def iterate(_: int, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        x_K, dual_K, multiplier = carry
        gradient_K, hessian_KxK = derivatives(x_K)
        slack_K = x_K - lower_K
        barrier = 0.1 * jnp.where(present_K, slack_K * dual_K, 0.0).sum() / count
        # Where the sum is given, a step does not change it, so a multiple of 11^T changes no step; it keeps the matrix
        # regular where the function is flat along x itself, as a norm is.
        along = 0.0 if total is None else 1.0
        matrix_KxK = jnp.where(both_KxK, hessian_KxK + along + jnp.diag(dual_K / slack_K), jnp.eye(K))
        scale_K = jnp.sqrt(jnp.diagonal(matrix_KxK))  # near the bounds the diagonal spans all of float32
        scaled_KxK = matrix_KxK / scale_K[:, None] / scale_K[None, :]
        right_Kx2 = jnp.stack([barrier / slack_K + multiplier - gradient_K, jnp.ones(K)], axis=1)
        right_Kx2 = jnp.where(present_K[:, None], right_Kx2, 0.0)
        solved_Kx2 = jnp.linalg.solve(scaled_KxK, right_Kx2 / scale_K[:, None]) / scale_K[:, None]
        if total is None:
            step_K, multiplier_step = solved_Kx2[:, 0], jnp.zeros(())
        else:
            multiplier_step = (total - x_K.sum() - solved_Kx2[:, 0].sum()) / solved_Kx2[:, 1].sum()
            step_K = solved_Kx2[:, 0] + multiplier_step * solved_Kx2[:, 1]
        dual_step_K = jnp.where(present_K, (barrier - dual_K * step_K) / slack_K - dual_K, 0.0)
        length = jnp.minimum(1.0, jnp.minimum(longest(slack_K, step_K), longest(dual_K, dual_step_K)))
        new = (x_K + length * step_K, dual_K + length * dual_step_K, multiplier + length * multiplier_step)
        sound = jnp.isfinite(new[0]).all() & jnp.isfinite(new[1]).all() & (new[0] > lower_K).all() & (new[1] > 0).all()
        if total is not None:
            sound &= jnp.abs(new[0].sum() - total) < 1e-4
        return jax.tree.map(lambda a, b: jnp.where(sound, a, b), new, carry)

    start = (jnp.asarray(start_K, jnp.float32), jnp.ones(K), jnp.zeros(()))
    return jax.lax.fori_loop(0, ITERATIONS, iterate, start)[0]


def scaled(gram_KxK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The Gram matrix divided by its largest diagonal entry, and that entry; a zero matrix stays zero, with 1."""
    largest = jnp.max(jnp.diagonal(gram_KxK))
    largest = jnp.where(largest > 0, largest, 1.0)
    return gram_KxK / largest, largest


def min_norm(gram_KxK: jax.Array, linear_K: jax.Array | float = 0.0, present_K: jax.Array | None = None) -> jax.Array:
    """Weights f32[K] on the simplex that minimise w^T G w / 2 + linear^T w, for a scaled Gram matrix.

    Without the linear part: the shortest vector in the gradients' convex hull.
    """
    K = gram_KxK.shape[0]
    present_K = jnp.ones(K, bool) if present_K is None else present_K

    def derivatives(x_K: jax.Array) -> tuple[jax.Array, jax.Array]:
        return gram_KxK @ x_K + linear_K, gram_KxK

    return minimize(derivatives, share(present_K), jnp.zeros(K), total=1.0, present_K=present_K)


def into_dual_cone(gram_KxK: jax.Array, weights_K: jax.Array, present_K: jax.Array | None = None) -> jax.Array:
    """The v >= weights, f32[K], that minimises v^T G v, for a scaled Gram matrix.

    J^T v is the projection of J^T weights onto the cone of the directions that conflict with no row of J.
    """
    K = gram_KxK.shape[0]
    return minimize(lambda x: (gram_KxK @ x, gram_KxK), weights_K + 1 / K, weights_K, present_K=present_K)


def onto_simplex(values_K: jax.Array, present_K: jax.Array) -> jax.Array:
    """The point of the simplex that is nearest to the values, f32[K] (Duchi et al. 2008); 0 where absent."""
    values_K = jnp.where(present_K, values_K, -jnp.inf)
    # Only differences count, and near 0 they keep their digits.
    values_K = values_K - jnp.where(present_K.any(), values_K.max(), 0.0)
    ordered_K = jnp.sort(jnp.maximum(values_K, -1.0))[::-1]  # more than 1 below the largest is out
    thresholds_K = (jnp.cumsum(ordered_K) - 1) / jnp.arange(1, len(values_K) + 1)
    last = jnp.sum(ordered_K > thresholds_K) - 1
    return jnp.where(present_K, jnp.maximum(values_K - thresholds_K[last], 0.0), 0.0)
