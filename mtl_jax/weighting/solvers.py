"""Solvers of small convex problems over K task weights, on the device in float32, with a fixed number of iterations.

All of them can be jitted and vmapped. Quadratic problems are solved by a primal-dual interior point method with one K x K solve
per iteration, and so few iterations that nothing needs to be tuned or stopped early. Gram matrices are scaled first, so that
gradients of any magnitude in float32 give the same weights. An absent task has no variable: its weight is 0, and the problem
is that of the others.

A Gram matrix in float32 is exact to 1e-7 of the product of two lengths, so gradients whose cosine is below -1 + 1e-6 may as
well be opposite: where weights would grow without bound, firm() bounds them by a thousand over a gradient's length.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mtl_jax.weighting.base import share

ITERATIONS = 40
FLOOR = 1e-6  # of eigenvalues of cosines: far above rounding in float32, far below those of gradients that merely conflict
TOLERANCE = 1e-2  # a residual above this is worth a warning; unless float32 lacks the digits, it is below 1e-4

# x [K] -> gradient [K] and Hessian [K, K] of a convex function
Derivatives = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def minimize(
    derivatives: Derivatives,
    start_K: jax.Array,
    along_K: jax.Array | None = None,
    present_K: jax.Array | None = None,
) -> jax.Array:
    """The x >= 0, with along^T x = 1 if that is set, that minimises a convex function: f32[K].

    Newton steps on the perturbed optimality conditions (Boyd and Vandenberghe 2004, section 11.7); the barrier falls tenfold
    in each iteration, and a step that is no longer accurate in float32 is not taken.

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
        slack_K, dual_K, multiplier = carry  # of an absent task both stay at 1 and are never used
        x_K = jnp.where(present_K, slack_K, 0.0)
        gradient_K, hessian_KxK = derivatives(x_K)
        barrier = 0.1 * jnp.where(present_K, slack_K * dual_K, 0.0).sum() / count
        # A step does not change along^T x, so a multiple of along along^T does not change the step; it keeps the matrix
        # regular if the function is flat along x itself, as a norm is.
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
        valid = jnp.isfinite(new[0]).all() & jnp.isfinite(new[1]).all() & (new[0] > 0).all() & (new[1] > 0).all()
        if along_K is not None:
            valid &= jnp.abs(fixed_K @ new[0] - 1) < 1e-4  # along is 0 where absent
        return jax.tree.map(lambda a, b: jnp.where(valid, a, b), new, carry)

    start = (jnp.where(present_K, jnp.asarray(start_K, jnp.float32), 1.0), jnp.ones(K), jnp.zeros(()))
    return jnp.where(present_K, jax.lax.fori_loop(0, ITERATIONS, iterate, start)[0], 0.0)


def scaled(gram_KxK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The Gram matrix divided by its largest diagonal entry, and that entry; a zero matrix stays zero, with 1."""
    largest = jnp.max(jnp.diagonal(gram_KxK))
    largest = jnp.where(largest > 0, largest, 1.0)
    return gram_KxK / largest, largest


def cosines(gram_KxK: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The Gram matrix as cosines and lengths, so that gradients of very unlike lengths keep their digits in float32.

    Args:
        gram_KxK: Scaled: its largest diagonal entry is 1, or all are 0.

    Returns:
        Cosines f32[K, K], 0 for a gradient of 0; lengths f32[K], 1 in place of 0; bool[K], which gradients are not 0.
    """
    norm_K = jnp.sqrt(jnp.maximum(jnp.diagonal(gram_KxK), 0.0))
    nonzero_K = norm_K > 1e-15
    norm_K = jnp.where(nonzero_K, norm_K, 1.0)
    both_KxK = nonzero_K[:, None] & nonzero_K[None, :]
    cosine_KxK = jnp.where(both_KxK, gram_KxK / norm_K[:, None] / norm_K[None, :], 0.0)
    return jnp.clip(cosine_KxK, -1.0, 1.0), norm_K, nonzero_K


def firm(cosine_KxK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines changed so that all eigenvalues are above 0, and their root: both f32[K, K], with root root^T = cosines.

    An eigenvalue s becomes (s + sqrt(s^2 + 4 FLOOR^2)) / 2: FLOOR at 0, unchanged to 1e-6 of it from 1e-3 on, and smooth.
    """
    values_K, vectors_KxK = jnp.linalg.eigh(cosine_KxK)
    root_KxK = vectors_KxK * jnp.sqrt(0.5 * (values_K + jnp.sqrt(values_K**2 + 4 * FLOOR**2)))
    return root_KxK @ root_KxK.T, root_KxK


def min_norm(gram_KxK: jax.Array, present_K: jax.Array | None = None) -> jax.Array:
    """Weights f32[K] on the simplex that minimise |g_w|, for a scaled Gram matrix.

    It is the shortest vector in the gradients' convex hull, which is 0 where one of them is.
    """
    K = gram_KxK.shape[0]
    present_K = jnp.ones(K, bool) if present_K is None else present_K
    cosine_KxK, norm_K, nonzero_K = cosines(gram_KxK)
    # In z = w |g| / shortest the problem has the same curvature in every direction; w sums to 1 where z . shortest / |g| does.
    solved_K = nonzero_K & present_K
    shortest = jnp.min(jnp.where(solved_K, norm_K, 1.0))
    along_K = jnp.where(solved_K, shortest / norm_K, 0.0)
    start_K = jnp.full(K, 1.0) / jnp.maximum(along_K.sum(), 1e-30)
    z_K = minimize(lambda z_K: (cosine_KxK @ z_K, cosine_KxK), start_K, along_K, solved_K)
    zero_K = present_K & ~nonzero_K
    return jnp.where(zero_K.any() | ~solved_K.any(), share(jnp.where(zero_K.any(), zero_K, present_K)), z_K * along_K)


def off_min_norm(gram_KxK: jax.Array, weights_K: jax.Array, present_K: jax.Array) -> jax.Array:
    """The residual of min_norm, f32[]: the most by which a gradient is shorter along g_w than g_w is, in units of lengths."""
    cosine_KxK, norm_K, nonzero_K = cosines(gram_KxK)
    z_K = jnp.where(nonzero_K, weights_K * norm_K, 0.0)
    inner_K = cosine_KxK @ z_K
    short_K = jnp.where(nonzero_K & present_K, z_K @ inner_K / norm_K - inner_K, 0.0)
    return jnp.maximum(short_K.max(), 0.0) / jnp.maximum(z_K.sum(), 1e-30)


def into_dual_cone(gram_KxK: jax.Array, weights_K: jax.Array, present_K: jax.Array | None = None) -> jax.Array:
    """The v >= weights, f32[K], that minimises v^T G v, for a scaled Gram matrix.

    J^T v is the projection of J^T weights onto the cone of the directions that conflict with no row of J. A gradient of 0
    keeps its weight. Cosines are firm: what is added to a weight stays below a thousand lengths of J^T weights over its own.
    """
    K = gram_KxK.shape[0]
    present_K = jnp.ones(K, bool) if present_K is None else present_K
    cosine_KxK, norm_K, nonzero_K = cosines(gram_KxK)
    firm_KxK, root_KxK = firm(cosine_KxK)
    lower_K = jnp.where(present_K & nonzero_K, weights_K * norm_K, 0.0)

    def derivatives(s_K: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Through the root: for nearly opposite gradients the matrix itself has lost the digits that the product needs.
        return root_KxK @ (root_KxK.T @ (lower_K + s_K)), firm_KxK

    # The variable is what is added to the bounds: it may be far smaller than the sum, and must be as exact.
    added_K = minimize(derivatives, jnp.full(K, 1 / K), present_K=present_K & nonzero_K)
    return jnp.where(present_K, weights_K + jnp.where(nonzero_K, added_K / norm_K, 0.0), 0.0)


def off_dual_cone(gram_KxK: jax.Array, lower_K: jax.Array, weights_K: jax.Array, present_K: jax.Array) -> jax.Array:
    """The residual of into_dual_cone, f32[]: the largest conflict, or addition without a conflict, in units of lengths."""
    cosine_KxK, norm_K, nonzero_K = cosines(gram_KxK)
    z_K = jnp.where(nonzero_K & present_K, weights_K * norm_K, 0.0)
    off_K = jnp.minimum(z_K - lower_K * norm_K, cosine_KxK @ z_K)
    any_nonzero = (
        jnp.where(nonzero_K & present_K, lower_K, 0.0) > 0
    ).any()  # else the projected vector is 0, and z is only rounding
    off = jnp.max(jnp.where(nonzero_K & present_K, jnp.abs(off_K), 0.0))
    return jnp.where(any_nonzero, off / jnp.maximum(jnp.abs(z_K).sum(), 1e-30), 0.0)


def within_ball(gram_KxK: jax.Array, radius: float, present_K: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The weights to add to the mean's so that the worst task gains most within a distance from the mean gradient g_0.

    For a scaled Gram matrix: the v >= 0, f32[K], that maximises min_i g_i . (g_0 + g_v) over |g_v| <= radius |g_0|, and its
    residual f32[]. The point nearest to g_0 that gives every task at least the gain t moves along a path of straight pieces as
    t grows: tasks that gain exactly t have weights, linear in t, and the others gain more. The path is followed until it leaves
    the ball, with one K x K solve per piece; nothing has to converge. Gradients of 0 have no gain to raise, and v = 0.

    Cosines are firm: v_i |g_i| stays below a thousand times radius |g_0|, and for opposite gradients the worst task loses less
    than 1e-3 radius |g_0| |g_i|. The residual is the largest amount by which a task falls short of the gain, or weighs although
    it gains more, over (1 + radius) |g_0| and its length.
    """
    K = gram_KxK.shape[0]
    cosine_KxK, norm_K, nonzero_K = cosines(gram_KxK)
    solved_K = nonzero_K & present_K
    firm_KxK, root_KxK = firm(cosine_KxK)
    # In u = v |g| / |g_0|, with gains over |g| |g_0|: task i gains t shortest / |g_i| and what it gains more.
    along_K = jnp.where(solved_K, jnp.min(jnp.where(solved_K, norm_K, 1.0)) / norm_K, 0.0)
    mean_K = root_KxK.T @ jnp.where(solved_K, norm_K * share(present_K), 0.0)
    mean_norm = jnp.sqrt(jnp.maximum(mean_K @ mean_K, 1e-30))
    before_K = root_KxK @ (mean_K / mean_norm)
    never = jnp.float32(3e38)

    def piece(active_K: jax.Array) -> tuple[jax.Array, jax.Array]:
        """u = t slope - offset where these tasks gain t."""
        matrix_KxK = jnp.where(active_K[:, None] & active_K[None, :], firm_KxK, jnp.eye(K))
        right_Kx2 = jnp.where(active_K[:, None], jnp.stack([along_K, before_K], axis=1), 0.0)
        solved_Kx2 = jnp.linalg.solve(matrix_KxK, right_Kx2)
        return solved_Kx2[:, 0], solved_Kx2[:, 1]

    def follow(_: int, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        active_K, gain, last, done = carry
        slope_K, offset_K = piece(active_K)
        toward_K, back_K = root_KxK.T @ slope_K, root_KxK.T @ offset_K
        falls_K = along_K - root_KxK @ toward_K  # how fast t catches up with the others' gains
        rounding_K = 2e-6 * (along_K + jnp.abs(firm_KxK) @ jnp.abs(slope_K))
        enters_K, leaves_K = solved_K & ~active_K & (falls_K > rounding_K), active_K & (slope_K < 0)
        at_K = jnp.where(enters_K, (before_K - root_KxK @ back_K) / jnp.where(enters_K, falls_K, 1.0), never)
        at_K = jnp.where(leaves_K, offset_K / jnp.where(leaves_K, slope_K, 1.0), at_K)
        at_K = jnp.where(jnp.arange(K) == last, never, jnp.maximum(at_K, gain))  # a task cannot enter and leave again at once
        turning = jnp.argmin(at_K)
        # |t toward - back| is the radius; measured from the point nearest to 0, so that no digits cancel.
        square = jnp.maximum(toward_K @ toward_K, 1e-38)
        nearest = toward_K @ back_K / square
        rest_K = back_K - nearest * toward_K
        out = jnp.maximum(nearest + jnp.sqrt(jnp.maximum(radius**2 - rest_K @ rest_K, 0.0) / square), gain)
        ends = done | (out <= at_K[turning])
        turned_K = active_K ^ (jnp.arange(K) == turning)
        gain = jnp.where(done, gain, jnp.minimum(out, at_K[turning]))
        return jnp.where(ends, active_K, turned_K), gain, jnp.where(ends, last, turning), ends

    lowest_K = jnp.where(solved_K, before_K / jnp.where(solved_K, along_K, 1.0), never)
    first = jnp.argmin(lowest_K)
    start = (solved_K & (jnp.arange(K) == first), lowest_K[first], jnp.asarray(-1, first.dtype), ~solved_K.any())
    active_K, gain, _, _ = jax.lax.fori_loop(0, max(ITERATIONS, 3 * K), follow, start)
    slope_K, offset_K = piece(active_K)
    u_K = jnp.where(active_K, jnp.maximum(gain * slope_K - offset_K, 0.0), 0.0)
    length = jnp.sqrt(jnp.square(root_KxK.T @ u_K).sum())
    u_K = u_K * jnp.where(length > 0, radius / jnp.where(length > 0, length, 1.0), 0.0)
    gains_K = before_K + root_KxK @ (root_KxK.T @ u_K)
    reached = jnp.where(radius > 0, (u_K @ gains_K) / jnp.maximum(u_K @ along_K, 1e-30), gain)
    off_K = jnp.minimum(u_K, gains_K - reached * along_K)
    residual = jnp.max(jnp.where(solved_K, jnp.abs(off_K), 0.0)) / (1 + radius)
    return jnp.where(solved_K, mean_norm * u_K / norm_K, 0.0), residual


def onto_simplex(values_K: jax.Array, present_K: jax.Array) -> jax.Array:
    """The point of the simplex that is nearest to the values, f32[K] (Duchi et al. 2008); 0 where absent."""
    values_K = jnp.where(present_K, values_K, -jnp.inf)
    # Only differences count, and near 0 they keep their digits.
    values_K = values_K - jnp.where(present_K.any(), values_K.max(), 0.0)
    ordered_K = jnp.sort(jnp.maximum(values_K, -1.0))[::-1]  # more than 1 below the largest is out
    thresholds_K = (jnp.cumsum(ordered_K) - 1) / jnp.arange(1, len(values_K) + 1)
    last = jnp.sum(ordered_K > thresholds_K) - 1
    return jnp.where(present_K, jnp.maximum(values_K - thresholds_K[last], 0.0), 0.0)
