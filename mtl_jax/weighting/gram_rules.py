"""Rules whose weights follow from the Gram matrix of the task gradients.

G[i, j] is the inner product of the gradients g_i and g_j of tasks i and j; the combined gradient is sum_i w_i g_i. Everything
below is written in G and w alone, so it costs K x K arithmetic however large the model is. Tasks stand in sorted order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.errors import UserError
from mtl_jax.weighting import solvers
from mtl_jax.weighting.base import Rule, Signals


def stateless(weigh: Callable[[jax.Array, Signals], jax.Array]) -> Rule:
    """A rule without state from (Gram matrix f32[K, K], signals) to weights f32[K]."""

    def update(state: Any, signals: Signals) -> tuple[dict[str, jax.Array], Any]:
        assert signals.gram is not None
        return dict(zip(sorted(signals.losses), weigh(signals.gram, signals), strict=True)), state

    return Rule(init=lambda names: (), update=update, needs_gram=True)


def mgda() -> Rule:
    """The shortest vector in the convex hull of the gradients (Desideri 2012; Sener and Koltun 2018).

    w = argmin over the simplex of w^T G w. It conflicts with no task. The weights sum to 1.
    """
    return stateless(lambda gram, signals: solvers.min_norm(gram))


def pcgrad(order: str = "random") -> Rule:
    """Each gradient minus its components against the others, summed (Yu et al. 2020).

    For each task i in turn over the other tasks j: if g_i' . g_j < 0, g_i' -= (g_i' . g_j / |g_j|^2) g_j. The gradient is
    sum_i g_i'. Without conflict all weights are 1.

    Args:
        order: The order of j: random (drawn at each step for each task, as in the paper) or sorted.

    Raises:
        UserError: Another order.
    """
    if order not in ("random", "sorted"):
        raise UserError(f"weighting pcgrad: order is {order!r}; it must be random or sorted")

    def weigh(gram_KxK: jax.Array, signals: Signals) -> jax.Array:
        gram_KxK, _ = solvers.scaled(gram_KxK)
        K = gram_KxK.shape[0]
        if order == "sorted":
            orders_KxK = jnp.broadcast_to(jnp.arange(K), (K, K))
        else:
            orders_KxK = jax.vmap(lambda key: jax.random.permutation(key, K))(jax.random.split(signals.key, K))

        def project(place: int, parts_KxK: jax.Array) -> jax.Array:
            """Row i holds g_i' as weights of the original gradients; all rows at once, each against its own j."""
            j_K = orders_KxK[:, place]
            inner_K = (parts_KxK * gram_KxK[j_K]).sum(axis=1)
            square_K = jnp.diagonal(gram_KxK)[j_K]
            conflict_K = (inner_K < 0) & (j_K != jnp.arange(K)) & (square_K > 0)
            share_K = jnp.where(conflict_K, inner_K / jnp.where(square_K > 0, square_K, 1.0), 0.0)
            return parts_KxK.at[jnp.arange(K), j_K].add(-share_K)

        return jax.lax.fori_loop(0, K, project, jnp.eye(K)).sum(axis=0)

    return stateless(weigh)


def cagrad(c: float = 0.4) -> Rule:
    """The direction near the mean gradient g_0 that helps the worst task most (Liu et al. 2021).

    g = g_0 + c |g_0| g_w / |g_w|, with w = argmin over the simplex of g_w . g_0 + c |g_0| |g_w|, g_w = sum_i w_i g_i. Not
    rescaled by 1 / (1 + c^2). The weights sum to 1 + c |g_0| / |g_w|; c = 0 is the mean.

    Args:
        c: Radius around the mean gradient, in units of its norm; not negative, and below 1 for the paper's convergence.

    Raises:
        UserError: c is negative.
    """
    if not c >= 0:
        raise UserError(f"weighting cagrad: c is {c}; it must not be negative")

    def weigh(gram_KxK: jax.Array, signals: Signals) -> jax.Array:
        gram_KxK, _ = solvers.scaled(gram_KxK)
        K = gram_KxK.shape[0]
        with_mean_K = gram_KxK.mean(axis=1)
        mean_norm = jnp.sqrt(jnp.maximum(with_mean_K.mean(), 0.0))

        def derivatives(w_K: jax.Array) -> tuple[jax.Array, jax.Array]:
            inner_K = gram_KxK @ w_K
            norm = jnp.sqrt(jnp.maximum(w_K @ inner_K, 0.0) + 1e-12)
            unit_K = inner_K / norm
            hessian_KxK = (gram_KxK - jnp.outer(unit_K, unit_K)) / norm
            return with_mean_K + c * mean_norm * unit_K, c * mean_norm * hessian_KxK

        w_K = solvers.minimize(derivatives, jnp.full(K, 1 / K), jnp.zeros(K), total=1.0)
        norm = jnp.sqrt(jnp.maximum(w_K @ gram_KxK @ w_K, 0.0))
        return 1 / K + jnp.where(norm > 1e-6, c * mean_norm / jnp.maximum(norm, 1e-6), 0.0) * w_K

    return stateless(weigh)


def upgrad() -> Rule:
    """The mean of the gradients' projections onto the cone that conflicts with none (Quinton and Rey 2024).

    w = (1/K) sum_k argmin of v^T G v over v >= e_k. Without conflict every weight is 1/K.
    """

    def weigh(gram_KxK: jax.Array, signals: Signals) -> jax.Array:
        K = gram_KxK.shape[0]
        return jax.vmap(lambda unit_K: solvers.into_dual_cone(gram_KxK, unit_K))(jnp.eye(K)).mean(axis=0)

    return stateless(weigh)


def dualproj() -> Rule:
    """The mean gradient projected onto the cone that conflicts with no task (Lopez-Paz and Ranzato 2017, GEM).

    w = argmin of v^T G v over v >= 1/K. Without conflict every weight is 1/K.
    """

    def weigh(gram_KxK: jax.Array, signals: Signals) -> jax.Array:
        K = gram_KxK.shape[0]
        return solvers.into_dual_cone(gram_KxK, jnp.full(K, 1 / K))

    return stateless(weigh)


def fairgrad(alpha: float = 1.0) -> Rule:
    """Alpha-fair utility of the tasks' gains (Ban and Ji 2024): G w = w^(-1/alpha), elementwise.

    alpha = 1 is the Nash bargaining solution (Navon et al. 2022). If all gradients grow by t, the weights shrink by
    t^(-2 alpha / (1 + alpha)): for alpha = 1 the combined gradient does not depend on the gradients' scale. Departs from the
    paper by a ridge on G, 1e-6 of its largest diagonal entry: opposite or zero gradients would have no finite solution.

    Args:
        alpha: Above 0; the larger, the more the worst task counts.

    Raises:
        UserError: alpha is not above 0.
    """
    if not alpha > 0:
        raise UserError(f"weighting fairgrad: alpha is {alpha}; it must be above 0")

    def weigh(gram_KxK: jax.Array, signals: Signals) -> jax.Array:
        gram_KxK, scale = solvers.scaled(gram_KxK)
        K = gram_KxK.shape[0]
        gram_KxK = gram_KxK + 1e-6 * jnp.eye(K)

        def iterate(_: int, u_K: jax.Array) -> jax.Array:
            """A damped Newton step on G w - w^(-1/alpha) = 0; w is carried as its logarithm, so it stays positive."""
            w_K = jnp.exp(u_K)
            gain_K = gram_KxK @ w_K
            gradient_K = gain_K - w_K ** (-1 / alpha)
            hessian_KxK = gram_KxK + jnp.diag(w_K ** (-1 / alpha - 1) / alpha)
            step_K = -jnp.linalg.solve(hessian_KxK, gradient_K)
            # In w the problem is convex; steps are cut so that no weight falls by more than half.
            relative_K = step_K / w_K
            share = jnp.minimum(1.0, 0.5 / jnp.maximum(jnp.max(-relative_K), 1e-12))
            new_K = jnp.log(w_K + share * step_K)
            return jnp.where(jnp.isfinite(new_K).all(), new_K, u_K)

        start_K = jnp.full(K, -jnp.log(K) * alpha / (1 + alpha))
        w_K = jnp.exp(jax.lax.fori_loop(0, solvers.ITERATIONS, iterate, start_K))
        return w_K * scale ** (-alpha / (1 + alpha))

    return stateless(weigh)


def imtl_g() -> Rule:
    """The combination whose projections onto all unit gradients are equal (Liu et al. 2021, IMTL-G).

    (G w)_i / |g_i| is the same for all i, and the weights sum to 1; they may be negative.
    """

    def weigh(gram_KxK: jax.Array, signals: Signals) -> jax.Array:
        gram_KxK, _ = solvers.scaled(gram_KxK)
        K = gram_KxK.shape[0]
        norm_K = jnp.sqrt(jnp.maximum(jnp.diagonal(gram_KxK), 1e-12))
        # The solution is G^-1 |g| up to scale; a ridge keeps it finite where gradients are dependent.
        cosine_KxK = gram_KxK / norm_K[:, None] / norm_K[None, :] + 1e-6 * jnp.eye(K)
        w_K = jnp.linalg.solve(cosine_KxK, jnp.ones(K)) / norm_K
        total = w_K.sum()
        return jnp.where(jnp.abs(total) > 1e-6, w_K / jnp.where(jnp.abs(total) > 1e-6, total, 1.0), 1 / K)

    return stateless(weigh)


def aligned() -> Rule:
    """The mean of the gradients after all singular values of J became the smallest one (Senushkin et al. 2023, Aligned-MTL).

    With G = V S V^T: w = sqrt(s_min) V S^(-1/2) V^T 1/K over the eigenvalues that are not zero.
    """

    def weigh(gram_KxK: jax.Array, signals: Signals) -> jax.Array:
        gram_KxK, _ = solvers.scaled(gram_KxK)
        K = gram_KxK.shape[0]
        values_K, vectors_KxK = jnp.linalg.eigh(gram_KxK)
        kept_K = values_K > values_K.max() * K * jnp.finfo(jnp.float32).eps
        smallest = jnp.min(jnp.where(kept_K, values_K, jnp.inf))
        shrink_K = jnp.where(kept_K, jnp.sqrt(smallest / jnp.where(kept_K, values_K, 1.0)), 0.0)
        mean_K = jnp.full(K, 1 / K)
        return jnp.where(kept_K.any(), vectors_KxK @ (shrink_K * (vectors_KxK.T @ mean_K)), mean_K)

    return stateless(weigh)


def config() -> Rule:
    """The direction with equal cosine to every gradient, as long as the gradients' projections on it (Liu et al. 2025, ConFIG).

    With unit gradients U: d = U^+ 1, u = d / |d|, g = (sum_i g_i . u) u.
    """

    def weigh(gram_KxK: jax.Array, signals: Signals) -> jax.Array:
        gram_KxK, _ = solvers.scaled(gram_KxK)
        norm_K = jnp.sqrt(jnp.maximum(jnp.diagonal(gram_KxK), 0.0))
        safe_K = jnp.where(norm_K > 0, norm_K, 1.0)
        cosine_KxK = gram_KxK / safe_K[:, None] / safe_K[None, :]
        part_K = jnp.linalg.pinv(cosine_KxK, hermitian=True, rtol=1e-5) @ (norm_K > 0).astype(jnp.float32)
        length = jnp.sqrt(jnp.maximum(part_K @ cosine_KxK @ part_K, 1e-12))
        magnitude = (norm_K * (cosine_KxK @ part_K)).sum() / length
        return magnitude / length * part_K / safe_K

    return stateless(weigh)
