"""Rules whose weights solve a convex problem in the Gram matrix of the task gradients.

G[i, j] is the inner product of the gradients g_i and g_j of tasks i and j; the combined gradient is sum_i w_i g_i. Everything
below is written in G and w alone, so it costs K x K arithmetic however large the model is. Tasks stand in sorted order; in
the formulas K counts the tasks that are present.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.weighting import solvers
from mtl_jax.weighting.base import Rule, Signals, Weights, named, present, share, unstack
from mtl_jax.weighting.options import number

# (Gram matrix f32[K, K] with its largest diagonal entry 1, that entry before, present bool[K]) -> (weights f32[K], residual)
Weigh = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def stateless(weigh: Weigh, weighs_heads: bool = False) -> Rule:
    """A rule without state from the Gram matrix to the weights and their residual; rows of absent tasks are 0."""

    def solve(state: Any, signals: Signals) -> tuple[Weights, Any, jax.Array]:
        with jax.default_matmul_precision("highest"):  # on GPU else not float32
            weights_K, residual = weigh(*scaled_gram(signals))
        return unstack(weights_K, signals), state, residual

    def update(state: Any, signals: Signals) -> tuple[Weights, Any]:
        weights, state, _ = solve(state, signals)
        return weights, state

    return Rule(init=lambda names: (), update=update, needs_gram=True, weighs_heads=weighs_heads, solve=solve)


def scaled_gram(signals: Signals) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The Gram matrix f32[K, K] divided by its largest diagonal entry, that entry, and bool[K]: present; absent rows are 0."""
    assert signals.gram is not None  # the rule has asked for it
    present_K = present(signals)
    gram_KxK, scale = solvers.scaled(jnp.where(present_K[:, None] & present_K[None, :], signals.gram, 0.0))
    return gram_KxK, scale, present_K


@named
def mgda() -> Rule:
    """The shortest vector in the convex hull of the gradients (Desideri 2012; Sener and Koltun 2018).

    w = argmin over the simplex of w^T G w. It conflicts with no task. The weights sum to 1. Heads follow their plain losses, as
    in the second paper and in LibMTL.
    """
    return stateless(lambda gram_KxK, scale, present_K: shortest(gram_KxK, present_K))


@named
def cagrad(c: float = 0.4) -> Rule:
    """The direction near the mean gradient g_0 that helps the worst task most (Liu et al. 2021).

    g = argmax of min_i g_i . g over |g - g_0| <= c |g_0|; that is g_0 + c |g_0| g_w / |g_w|, with w = argmin over the simplex
    of g_w . g_0 + c |g_0| |g_w|, g_w = sum_i w_i g_i. Not rescaled by 1 / (1 + c^2). The weights sum to 1 + c |g_0| / |g_w|;
    c = 0 is the mean. Heads follow their plain losses, as in LibMTL.

    The more gradients oppose each other, the larger are their weights: 1/K and at most 1000 c |g_0| / |g_i|. Where a pair's
    cosine is below -1 + 1e-5, or three and more are as dependent, the worst task therefore loses up to 1e-3 c |g_0| |g_i|. A
    gradient of 0 has no gain to raise and keeps 1/K. A Gram matrix has squared lengths, and weights are float32, so the worst
    gain is exact to about 1e-6 of |g_0| times the longest gradient.

    Args:
        c: Radius around the mean gradient, in units of its norm; not negative, and below 1 for the paper's convergence.

    Raises:
        UserError: c is negative.
    """
    number("weighting cagrad: c", c, least=0)

    def weigh(gram_KxK: jax.Array, scale: jax.Array, present_K: jax.Array) -> tuple[jax.Array, jax.Array]:
        added_K, residual = solvers.within_ball(gram_KxK, c, present_K)
        return share(present_K) + added_K, residual

    return stateless(weigh)


@named
def upgrad() -> Rule:
    """The mean of the gradients' projections onto the cone that conflicts with none (Quinton and Rey 2024).

    w = (1/K) sum_k argmin of v^T G v over v >= e_k. Without conflict every weight is 1/K. Weights of opposite gradients are
    bounded as in solvers.into_dual_cone. Heads follow their plain losses, as in the authors' TorchJD.
    """

    def weigh(gram_KxK: jax.Array, scale: jax.Array, present_K: jax.Array) -> tuple[jax.Array, jax.Array]:
        units_KxK = jnp.eye(gram_KxK.shape[0])
        project = jax.vmap(lambda unit_K: _projected(gram_KxK, unit_K, present_K))
        projected_KxK, residual_K = project(units_KxK)
        return share(present_K) @ projected_KxK, jnp.max(residual_K)

    return stateless(weigh)


@named
def dualproj() -> Rule:
    """The mean gradient projected onto the cone that conflicts with no task (Lopez-Paz and Ranzato 2017, GEM).

    w = argmin of v^T G v over v >= 1/K. Without conflict every weight is 1/K. Weights of opposite gradients are bounded as in
    solvers.into_dual_cone. Heads follow their plain losses, as in TorchJD.
    """
    return stateless(lambda gram_KxK, scale, present_K: _projected(gram_KxK, share(present_K), present_K))


@named
def fairgrad(alpha: float = 1.0) -> Rule:
    """Alpha-fair utility of the tasks' gains (Ban and Ji 2024): G w = w^(-1/alpha), elementwise.

    alpha = 1 is the Nash bargaining solution (Navon et al. 2022). If all gradients grow by t, the weights shrink by
    t^(-2 alpha / (1 + alpha)): for alpha = 1 the combined gradient does not depend on the gradients' scale. Departs from the
    paper by a smallest eigenvalue of the cosines of 1e-6: opposite gradients would have no finite solution, and the weights
    of nearly opposite ones grow no further than 1000 sqrt(K) / |g_i| for alpha = 1. A gradient of 0, which has no finite
    solution either, gets the mean of the other weights. Tested for lengths 10^-3 to 10^3; the residual is relative to the sum
    of the absolute terms of a row of G w. Heads are weighted, as in the authors' program and in LibMTL.

    Args:
        alpha: 0.1 to 5; the larger, the more the worst task counts. Beyond, weights of unlike gradients leave float32.

    Raises:
        UserError: alpha is out of range.
    """
    number("weighting fairgrad: alpha", alpha, least=0.1, most=5)

    def weigh(gram_KxK: jax.Array, scale: jax.Array, present_K: jax.Array) -> tuple[jax.Array, jax.Array]:
        w_K, residual = _alpha_fair(gram_KxK, present_K, alpha)
        return w_K * scale ** (-alpha / (1 + alpha)), residual

    return stateless(weigh, weighs_heads=True)


@named
def nash(max_norm: float = 1.0) -> Rule:
    """The Nash bargaining solution (Navon et al. 2022, Nash-MTL): G w = 1 / w, elementwise.

    That is fairgrad(alpha=1): the combined gradient does not depend on the gradients' scale, and |g|^2 = K; then, as the
    authors' program does, g is scaled down to max_norm. As in fairgrad a weight is at most 1000 sqrt(K) / |g_i|: below
    a cosine of about -1 + 1e-6 the weights of opposite gradients stop growing, and |g| goes to 0 with the remaining angle. The
    authors' program solves a sequence of convex problems on the host; here it is Newton's method on the device. Heads are
    weighted, as there and in LibMTL.

    Args:
        max_norm: Largest norm of the combined gradient, above 0; inf leaves it alone.

    Raises:
        UserError: max_norm is not above 0.
    """
    number("weighting nash: max_norm", max_norm, above=0, infinite=True)

    def weigh(gram_KxK: jax.Array, scale: jax.Array, present_K: jax.Array) -> tuple[jax.Array, jax.Array]:
        w_K, residual = _alpha_fair(gram_KxK, present_K, 1.0)
        norm = jnp.sqrt(jnp.maximum(w_K @ gram_KxK @ w_K, 0.0))  # does not depend on the scale
        return w_K * jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-12)) / jnp.sqrt(scale), residual

    return stateless(weigh, weighs_heads=True)


def shortest(gram_KxK: jax.Array, present_K: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The weights of the shortest vector in the hull of the gradients, f32[K], and their residual, for a scaled Gram matrix."""
    weights_K = solvers.min_norm(gram_KxK, present_K)
    return weights_K, solvers.off_min_norm(gram_KxK, weights_K, present_K)


def _projected(gram_KxK: jax.Array, lower_K: jax.Array, present_K: jax.Array) -> tuple[jax.Array, jax.Array]:
    weights_K = solvers.into_dual_cone(gram_KxK, lower_K, present_K)
    return weights_K, solvers.off_dual_cone(gram_KxK, lower_K, weights_K, present_K)


def _alpha_fair(gram_KxK: jax.Array, present_K: jax.Array, alpha: float) -> tuple[jax.Array, jax.Array]:
    """The positive w, f32[K], with G w = w^(-1/alpha), for a scaled Gram matrix, and its residual f32[].

    In u = w |g|, with cosines C in place of G: C u = |g|^(1/alpha - 1) u^(-1/alpha), the optimality of a convex problem.
    """
    cosine_KxK, norm_K, nonzero_K = solvers.cosines(gram_KxK)
    solved_K = present_K & nonzero_K
    # A gradient that is not solved for gets an equation of its own, u = u^(-1/alpha).
    firm_KxK, _ = solvers.firm(cosine_KxK)
    both_KxK = solved_K[:, None] & solved_K[None, :]
    matrix_KxK = jnp.where(both_KxK, firm_KxK, jnp.eye(len(norm_K)))
    log_right_K = jnp.where(solved_K, (1 / alpha - 1) * jnp.log(norm_K), 0.0)

    def iterate(_: int, v_K: jax.Array) -> jax.Array:
        """A damped Newton step; u is carried as its logarithm v, so it stays positive."""
        u_K = jnp.exp(v_K)
        utility_K = jnp.exp(log_right_K - v_K / alpha)
        # Scaled by u on both sides, as unlike lengths make unlike u.
        hessian_KxK = u_K[:, None] * matrix_KxK * u_K[None, :] + jnp.diag(u_K * utility_K / alpha)
        gradient_K = u_K * (matrix_KxK @ u_K - utility_K)
        scale_K = jnp.sqrt(jnp.diagonal(hessian_KxK))
        scaled_KxK = hessian_KxK / scale_K[:, None] / scale_K[None, :]
        relative_K = -jnp.linalg.solve(scaled_KxK, gradient_K / scale_K) / scale_K
        # A step leaves at least a tenth of every weight; a large alpha takes weights down by many powers of ten.
        length = jnp.minimum(1.0, 0.9 / jnp.maximum(jnp.max(-relative_K), 1e-12))
        new_K = v_K + jnp.log1p(length * relative_K)
        return jnp.where(jnp.isfinite(new_K).all(), new_K, v_K)

    start_K = log_right_K * alpha / (1 + alpha)  # the solution for orthogonal gradients
    v_K = jax.lax.fori_loop(0, 2 * solvers.ITERATIONS, iterate, start_K)
    u_K, utility_K = jnp.exp(v_K), jnp.exp(log_right_K - v_K / alpha)
    off_K = jnp.abs(matrix_KxK @ u_K - utility_K) / (jnp.abs(matrix_KxK) @ u_K + utility_K)
    w_K = u_K / norm_K
    others = (share(solved_K) * w_K).sum()
    return jnp.where(solved_K, w_K, jnp.where(solved_K.any(), others, 1.0)), jnp.max(jnp.where(solved_K, off_K, 0.0))
