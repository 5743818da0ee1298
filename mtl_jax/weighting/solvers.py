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
    along_K: jax.Array | None = None,
    present_K: jax.Array | None = None,
) -> jax.Array:
    """The x >= 0, with along^T x = 1 if that is set, that minimises a convex function: f32[K].

    Newton steps on the perturbed optimality conditions (Boyd and Vandenberghe 2004, section 11.7), the barrier falling tenfold
    an iteration; a step that float32 cannot carry any further is not taken.

    Args:
        derivatives: Gradient and Hessian of the function, of order 1 where x is.
        start_K: Above 0, and with along^T start = 1.
        along_K: Not negative, the largest of order 1; None: x is free.
        present_K: bool; where False, x is fixed at 0 and bounds and derivatives do not count. None: all True.
    """
    K = start_K.shape[0]
    if present_K is None:
        present_K = jnp.ones(K, bool)
    both_KxK = present_K[:, None] & present_K[None, :]
    count = jnp.maximum(present_K.sum(), 1)
    fixed_K = jnp.zeros(K) if along_K is None else jnp.where(present_K, along_K, 0.0)

    def longest(value_K: jax.Array, step_K: jax.Array) -> jax.Array:
        """The share of a step that keeps 5 % of the distance to zero."""
        falls = step_K < 0
        return jnp.min(jnp.where(falls, -0.95 * value_K / jnp.where(falls, step_K, -1.0), 1.0))

    def iterate(_: int, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        slack_K, dual_K, multiplier = carry  # where absent, both stay at 1 and count nowhere
        x_K = jnp.where(present_K, slack_K, 0.0)
        gradient_K, hessian_KxK = derivatives(x_K)
        barrier = 0.1 * jnp.where(present_K, slack_K * dual_K, 0.0).sum() / count
        # Where along^T x is given, a step does not change it, so a multiple of along along^T changes no step; it keeps the
        # matrix regular where the function is flat along x itself, as a norm is.
        curved_KxK = hessian_KxK + jnp.outer(fixed_K, fixed_K) + jnp.diag(dual_K / slack_K)
        matrix_KxK = jnp.where(both_KxK, curved_KxK, jnp.eye(K))
        scale_K = jnp.sqrt(jnp.diagonal(matrix_KxK))  # near the bounds the diagonal spans all of float32
        scaled_KxK = matrix_KxK / scale_K[:, None] / scale_K[None, :]
        right_Kx2 = jnp.stack([barrier / slack_K + multiplier * fixed_K - gradient_K, fixed_K], axis=1)
        right_Kx2 = jnp.where(present_K[:, None], right_Kx2, 0.0)
        solved_Kx2 = jnp.linalg.solve(scaled_KxK, right_Kx2 / scale_K[:, None]) / scale_K[:, None]
        if along_K is None:
            step_K, multiplier_step = solved_Kx2[:, 0], jnp.zeros(())
        else:
            multiplier_step = (1 - fixed_K @ x_K - fixed_K @ solved_Kx2[:, 0]) / (fixed_K @ solved_Kx2[:, 1])
            step_K = solved_Kx2[:, 0] + multiplier_step * solved_Kx2[:, 1]
        dual_step_K = jnp.where(present_K, (barrier - dual_K * step_K) / slack_K - dual_K, 0.0)
        length = jnp.minimum(1.0, jnp.minimum(longest(slack_K, step_K), longest(dual_K, dual_step_K)))
        new = (slack_K + length * step_K, dual_K + length * dual_step_K, multiplier + length * multiplier_step)
        sound = jnp.isfinite(new[0]).all() & jnp.isfinite(new[1]).all() & (new[0] > 0).all() & (new[1] > 0).all()
        if along_K is not None:
            sound &= jnp.abs(fixed_K @ new[0] - 1) < 1e-4  # along is 0 where absent
        return jax.tree.map(lambda a, b: jnp.where(sound, a, b), new, carry)

    start = (jnp.where(present_K, jnp.asarray(start_K, jnp.float32), 1.0), jnp.ones(K), jnp.zeros(()))
    return jnp.where(present_K, jax.lax.fori_loop(0, ITERATIONS, iterate, start)[0], 0.0)


def scaled(gram_KxK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The Gram matrix divided by its largest diagonal entry, and that entry; a zero matrix stays zero, with 1."""
    largest = jnp.max(jnp.diagonal(gram_KxK))
    largest = jnp.where(largest > 0, largest, 1.0)
    return gram_KxK / largest, largest


def cosines(gram_KxK: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The Gram matrix taken apart, so that gradients of very unlike lengths do not drown in float32.

    Args:
        gram_KxK: Scaled: its largest diagonal entry is 1, or all are 0.

    Returns:
        Cosines f32[K, K], 0 beside a gradient of 0; lengths f32[K], 1 in place of 0; bool[K], which gradients are not 0.
    """
    norm_K = jnp.sqrt(jnp.maximum(jnp.diagonal(gram_KxK), 0.0))
    some_K = norm_K > 1e-15
    norm_K = jnp.where(some_K, norm_K, 1.0)
    both_KxK = some_K[:, None] & some_K[None, :]
    cosine_KxK = jnp.where(both_KxK, gram_KxK / norm_K[:, None] / norm_K[None, :], 0.0)
    return jnp.clip(cosine_KxK, -1.0, 1.0), norm_K, some_K


def min_norm(gram_KxK: jax.Array, pull: float = 0.0, present_K: jax.Array | None = None) -> jax.Array:
    """Weights f32[K] on the simplex that minimise |g_w + pull g_0|^2, g_0 the mean gradient, for a scaled Gram matrix.

    Without a pull: the shortest vector in the gradients' convex hull, which is 0 where one of them is.
    """
    K = gram_KxK.shape[0]
    present_K = jnp.ones(K, bool) if present_K is None else present_K
    cosine_KxK, norm_K, some_K = cosines(gram_KxK)
    # In z = w |g| / shortest the problem has the same curvature in every direction; w sums to 1 where z . shortest / |g| does.
    solved_K = some_K & present_K
    shortest = jnp.min(jnp.where(solved_K, norm_K, 1.0))
    along_K = jnp.where(solved_K, shortest / norm_K, 0.0)
    mean_K = cosine_KxK @ (norm_K * share(present_K)) / shortest

    def derivatives(z_K: jax.Array) -> tuple[jax.Array, jax.Array]:
        return cosine_KxK @ z_K + pull * mean_K, cosine_KxK

    start_K = jnp.full(K, 1.0) / jnp.maximum(along_K.sum(), 1e-30)
    z_K = minimize(derivatives, start_K, along_K, solved_K)
    zero_K = present_K & ~some_K
    at_zero = zero_K.any() & (jnp.asarray(pull) == 0)
    return jnp.where(at_zero | ~solved_K.any(), share(jnp.where(at_zero, zero_K, present_K)), z_K * along_K)


def into_dual_cone(gram_KxK: jax.Array, weights_K: jax.Array, present_K: jax.Array | None = None) -> jax.Array:
    """The v >= weights, f32[K], that minimises v^T G v, for a scaled Gram matrix.

    J^T v is the projection of J^T weights onto the cone of the directions that conflict with no row of J. A gradient of 0
    keeps its weight.
    """
    K = gram_KxK.shape[0]
    present_K = jnp.ones(K, bool) if present_K is None else present_K
    cosine_KxK, norm_K, some_K = cosines(gram_KxK)
    lower_K = jnp.where(present_K, weights_K * norm_K, 0.0)
    # What is added to the bounds is solved for, not the sum: it may be far smaller, and must be as exact.
    added_K = minimize(lambda s_K: (cosine_KxK @ (lower_K + s_K), cosine_KxK), jnp.full(K, 1 / K), present_K=present_K & some_K)
    return jnp.where(present_K, weights_K + jnp.where(some_K, added_K / norm_K, 0.0), 0.0)


def onto_simplex(values_K: jax.Array, present_K: jax.Array) -> jax.Array:
    """The point of the simplex that is nearest to the values, f32[K] (Duchi et al. 2008); 0 where absent."""
    values_K = jnp.where(present_K, values_K, -jnp.inf)
    # Only differences count, and near 0 they keep their digits.
    values_K = values_K - jnp.where(present_K.any(), values_K.max(), 0.0)
    ordered_K = jnp.sort(jnp.maximum(values_K, -1.0))[::-1]  # more than 1 below the largest is out
    thresholds_K = (jnp.cumsum(ordered_K) - 1) / jnp.arange(1, len(values_K) + 1)
    last = jnp.sum(ordered_K > thresholds_K) - 1
    return jnp.where(present_K, jnp.maximum(values_K - thresholds_K[last], 0.0), 0.0)
