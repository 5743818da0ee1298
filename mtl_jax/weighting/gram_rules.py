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
from mtl_jax.weighting.base import Rule, Signals, Weights, present, share, unstack
from mtl_jax.weighting.options import number

# (Gram matrix f32[K, K] with its largest diagonal entry 1, that entry before, present bool[K], signals) -> weights f32[K]
Weigh = Callable[[jax.Array, jax.Array, jax.Array, Signals], jax.Array]


def stateless(weigh: Weigh, weighs_heads: bool = False) -> Rule:
    """A rule without state from the Gram matrix to the weights; rows of absent tasks are 0."""

    def update(state: Any, signals: Signals) -> tuple[Weights, Any]:
        return unstack(weigh(*scaled_gram(signals), signals), signals), state

    return Rule(init=lambda names: (), update=update, needs_gram=True, weighs_heads=weighs_heads)


def scaled_gram(signals: Signals) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The Gram matrix f32[K, K] divided by its largest diagonal entry, that entry, and bool[K]: present; absent rows are 0."""
    assert signals.gram is not None
    present_K = present(signals)
    gram_KxK, scale = solvers.scaled(jnp.where(present_K[:, None] & present_K[None, :], signals.gram, 0.0))
    return gram_KxK, scale, present_K


def mgda() -> Rule:
    """The shortest vector in the convex hull of the gradients (Desideri 2012; Sener and Koltun 2018).

    w = argmin over the simplex of w^T G w. It conflicts with no task. The weights sum to 1. Heads follow their plain losses, as
    in the second paper and in LibMTL.
    """
    return stateless(lambda gram_KxK, scale, present_K, signals: solvers.min_norm(gram_KxK, present_K=present_K))


def cagrad(c: float = 0.4) -> Rule:
    """The direction near the mean gradient g_0 that helps the worst task most (Liu et al. 2021).

    g = g_0 + c |g_0| g_w / |g_w|, with w = argmin over the simplex of g_w . g_0 + c |g_0| |g_w|, g_w = sum_i w_i g_i. Not
    rescaled by 1 / (1 + c^2). The weights sum to 1 + c |g_0| / |g_w|; c = 0, or a g_w of 0, is the mean. Heads follow their
    plain losses, as in LibMTL.

    Args:
        c: Radius around the mean gradient, in units of its norm; not negative, and below 1 for the paper's convergence.

    Raises:
        UserError: c is negative.
    """
    number("weighting cagrad: c", c, least=0)

    def weigh(gram_KxK: jax.Array, scale: jax.Array, present_K: jax.Array, signals: Signals) -> jax.Array:
        mean_K = share(present_K)
        with_mean_K = gram_KxK @ mean_K
        mean_norm = jnp.sqrt(jnp.maximum(mean_K @ with_mean_K, 0.0))

        def derivatives(w_K: jax.Array) -> tuple[jax.Array, jax.Array]:
            inner_K = gram_KxK @ w_K
            norm = jnp.sqrt(jnp.maximum(w_K @ inner_K, 0.0) + 1e-12)
            unit_K = inner_K / norm
            hessian_KxK = (gram_KxK - jnp.outer(unit_K, unit_K)) / norm
            return with_mean_K + c * mean_norm * unit_K, c * mean_norm * hessian_KxK

        w_K = solvers.minimize(derivatives, mean_K, jnp.ones_like(mean_K), present_K)
        norm = jnp.sqrt(jnp.maximum(w_K @ gram_KxK @ w_K, 0.0))
        return mean_K + jnp.where(norm > 1e-6, c * mean_norm / jnp.maximum(norm, 1e-6), 0.0) * w_K

    return stateless(weigh)


def sdmgrad(lam: float = 0.3) -> Rule:
    """Between the shortest vector and the mean gradient g_0 (Xiao, Ban and Ji 2023, SDMGrad).

    g = (g_w + lam g_0) / (1 + lam), with w = argmin over the simplex of |g_w + lam g_0|^2. lam = 0 is MGDA, and for a large lam
    it is the mean. The weights sum to 1. Departs from the paper: w is solved for, where the paper takes steps towards it with
    gradients of three independent batches. Heads follow their plain losses, as in LibMTL.

    Args:
        lam: The pull towards the mean; not negative.

    Raises:
        UserError: lam is negative.
    """
    number("weighting sdmgrad: lam", lam, least=0)

    def weigh(gram_KxK: jax.Array, scale: jax.Array, present_K: jax.Array, signals: Signals) -> jax.Array:
        mean_K = share(present_K)
        w_K = solvers.min_norm(gram_KxK, lam, present_K)
        return (w_K + lam * mean_K) / (1 + lam)

    return stateless(weigh)


def upgrad() -> Rule:
    """The mean of the gradients' projections onto the cone that conflicts with none (Quinton and Rey 2024).

    w = (1/K) sum_k argmin of v^T G v over v >= e_k. Without conflict every weight is 1/K. Heads follow their plain losses, as
    in the authors' TorchJD.
    """

    def weigh(gram_KxK: jax.Array, scale: jax.Array, present_K: jax.Array, signals: Signals) -> jax.Array:
        units_KxK = jnp.eye(gram_KxK.shape[0])
        projected_KxK = jax.vmap(lambda unit_K: solvers.into_dual_cone(gram_KxK, unit_K, present_K))(units_KxK)
        return share(present_K) @ projected_KxK

    return stateless(weigh)


def dualproj() -> Rule:
    """The mean gradient projected onto the cone that conflicts with no task (Lopez-Paz and Ranzato 2017, GEM).

    w = argmin of v^T G v over v >= 1/K. Without conflict every weight is 1/K. Heads follow their plain losses, as in TorchJD.
    """
    return stateless(lambda gram_KxK, scale, present_K, signals: solvers.into_dual_cone(gram_KxK, share(present_K), present_K))


def fairgrad(alpha: float = 1.0) -> Rule:
    """Alpha-fair utility of the tasks' gains (Ban and Ji 2024): G w = w^(-1/alpha), elementwise.

    alpha = 1 is the Nash bargaining solution (Navon et al. 2022). If all gradients grow by t, the weights shrink by
    t^(-2 alpha / (1 + alpha)): for alpha = 1 the combined gradient does not depend on the gradients' scale. Departs from the
    paper by 1e-6 on the diagonal of the cosines: opposite gradients would have no finite solution. A gradient of 0, which has
    none either, gets the mean of the other weights. Heads are weighted, as in the authors' program and in LibMTL.

    Args:
        alpha: Above 0; the larger, the more the worst task counts.

    Raises:
        UserError: alpha is not above 0.
    """
    number("weighting fairgrad: alpha", alpha, above=0)
    return stateless(
        lambda gram_KxK, scale, present_K, signals: _alpha_fair(gram_KxK, present_K, alpha) * scale ** (-alpha / (1 + alpha)),
        weighs_heads=True,
    )


def nash(max_norm: float = 1.0) -> Rule:
    """The Nash bargaining solution (Navon et al. 2022, Nash-MTL): G w = 1 / w, elementwise.

    That is fairgrad(alpha=1): the combined gradient does not depend on the gradients' scale, and |g|^2 = K; then, as the
    authors' program does, g is scaled down to max_norm. Theirs solves a sequence of convex problems on the host; here it is
    Newton's method on the device. Heads are weighted, as in the authors' program and in LibMTL.

    Args:
        max_norm: Largest norm of the combined gradient, above 0; inf leaves it alone.

    Raises:
        UserError: max_norm is not above 0.
    """
    number("weighting nash: max_norm", max_norm, above=0, infinite=True)

    def weigh(gram_KxK: jax.Array, scale: jax.Array, present_K: jax.Array, signals: Signals) -> jax.Array:
        w_K = _alpha_fair(gram_KxK, present_K, 1.0)
        norm = jnp.sqrt(jnp.maximum(w_K @ gram_KxK @ w_K, 0.0))  # does not depend on the scale
        return w_K * jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-12)) / jnp.sqrt(scale)

    return stateless(weigh, weighs_heads=True)


def _alpha_fair(gram_KxK: jax.Array, present_K: jax.Array, alpha: float) -> jax.Array:
    """The positive w, f32[K], with G w = w^(-1/alpha), for a scaled Gram matrix.

    In u = w |g|, with cosines C in place of G: C u = |g|^(1/alpha - 1) u^(-1/alpha), the optimality of a convex problem.
    """
    cosine_KxK, norm_K, some_K = solvers.cosines(gram_KxK)
    solved_K = present_K & some_K
    # What is not solved for is alone with itself: its equation is u = u^(-1/alpha).
    matrix_KxK = cosine_KxK + jnp.diag(jnp.where(solved_K, 1e-6, 1.0))
    log_right_K = jnp.where(solved_K, (1 / alpha - 1) * jnp.log(norm_K), 0.0)

    def iterate(_: int, v_K: jax.Array) -> jax.Array:
        """A damped Newton step; u is carried as its logarithm v, so it stays positive."""
        u_K = jnp.exp(v_K)
        utility_K = jnp.exp(log_right_K - v_K / alpha)
        # Scaled by u on both sides, as unlike lengths make unlike u.
        hessian_KxK = u_K[:, None] * matrix_KxK * u_K[None, :] + jnp.diag(u_K * utility_K / alpha)
        gradient_K = u_K * (matrix_KxK @ u_K - utility_K)
        relative_K = -jnp.linalg.solve(hessian_KxK, gradient_K)
        # Steps are cut so that nothing falls by more than half.
        length = jnp.minimum(1.0, 0.5 / jnp.maximum(jnp.max(-relative_K), 1e-12))
        new_K = v_K + jnp.log1p(length * relative_K)
        return jnp.where(jnp.isfinite(new_K).all(), new_K, v_K)

    start_K = log_right_K * alpha / (1 + alpha)  # the solution for orthogonal gradients
    w_K = jnp.exp(jax.lax.fori_loop(0, 2 * solvers.ITERATIONS, iterate, start_K)) / norm_K
    others = (share(solved_K) * w_K).sum()
    return jnp.where(solved_K, w_K, jnp.where(solved_K.any(), others, 1.0))
