"""Rules that construct a direction from the angles and lengths of the task gradients, without state or with one of K x K.

Written in the Gram matrix alone, as in gram_rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.core.errors import UserError, there_are
from mtl_jax.weighting import base
from mtl_jax.weighting.base import Rule, Signals, Weights, named, share, stack, unstack
from mtl_jax.weighting.gram_rules import scaled_gram, stateless
from mtl_jax.weighting.loss_rules import imtl_l
from mtl_jax.weighting.options import choice, number
from mtl_jax.weighting.solvers import cosines, firm

ORDERS = ("random", "sorted")
DEPENDENT = 3e-5  # an eigenvalue of cosines below this may be rounding


@named
def pcgrad(order: str = "random") -> Rule:
    """Each gradient minus its components against the others, summed (Yu et al. 2020).

    For each task i in turn over the other tasks j: if g_i' . g_j < 0, g_i' -= (g_i' . g_j / |g_j|^2) g_j. The gradient is
    sum_i g_i'. Without conflict all weights are 1. Heads follow their plain losses, as in LibMTL.

    Args:
        order: The order of j: random (drawn from the step's key for each task, as in the paper) or sorted.

    Raises:
        UserError: Another order.
    """
    choice("weighting pcgrad: order", order, ORDERS)

    def update(state: Any, signals: Signals) -> tuple[Weights, Any]:
        goals_KxK = jnp.zeros((len(signals.losses), len(signals.losses)))
        weights_K, _ = _turn_apart(signals, order, goals_KxK, beta=0.0)
        return unstack(weights_K, signals), state

    return Rule(init=lambda names: (), update=update, needs_gram=True, weighs_heads=False)


@named
def gradvac(beta: float = 1e-2, order: str = "random") -> Rule:
    """Each gradient turned until its cosines with the others reach their running means (Wang et al. 2021, Gradient Vaccine).

    For each task i in turn over the other tasks j, with c the cosine of g_i' and g_j and t_ij its running mean, 0 at the start:
    if c < t_ij, g_i' += |g_i'| (t sqrt(1 - c^2) - c sqrt(1 - t^2)) / (|g_j| sqrt(1 - t^2)) g_j; then
    t_ij <- (1 - beta) t_ij + beta c. The gradient is sum_i g_i'. In the first step it is the same as pcgrad's. Heads follow
    their plain losses, as in LibMTL.

    Args:
        beta: Share of the new cosine in the running mean, 0 to 1.
        order: The order of j: random (drawn from the step's key for each task) or sorted.

    Raises:
        UserError: An option is out of range.
    """
    choice("weighting gradvac: order", order, ORDERS)
    number("weighting gradvac: beta", beta, least=0, most=1)

    def update(goals_KxK: jax.Array, signals: Signals) -> tuple[Weights, jax.Array]:
        weights_K, goals_KxK = _turn_apart(signals, order, goals_KxK, beta)
        return unstack(weights_K, signals), goals_KxK

    return Rule(init=lambda names: jnp.zeros((len(names), len(names))), update=update, needs_gram=True, weighs_heads=False)


def _turn_apart(signals: Signals, order: str, goals_KxK: jax.Array, beta: float) -> tuple[jax.Array, jax.Array]:
    """Every gradient turned until its cosines with the others reach the goals: weights f32[K], new goals f32[K, K]."""
    gram_KxK, _, present_K = scaled_gram(signals)
    K = gram_KxK.shape[0]
    rows_K = jnp.arange(K)
    if order == "sorted":
        orders_KxK = jnp.broadcast_to(rows_K, (K, K))
    else:
        orders_KxK = jax.vmap(lambda key: jax.random.permutation(key, K))(jax.random.split(signals.key, K))

    def turn(place: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Row i of the parts is g_i' as weights of the original gradients; all rows turn at once, each from its own g_j."""
        parts_KxK, goals_KxK = carry
        j_K = orders_KxK[:, place]
        inner_K = (parts_KxK * gram_KxK[j_K]).sum(axis=1)
        length_K = jnp.sqrt(jnp.maximum(jnp.einsum("ij,jk,ik->i", parts_KxK, gram_KxK, parts_KxK), 0.0))
        other_K = jnp.sqrt(jnp.diagonal(gram_KxK)[j_K])
        comparable_K = (j_K != rows_K) & (length_K > 0) & (other_K > 0)
        safe_K = jnp.where(comparable_K, other_K, 1.0)
        cosine_K = jnp.clip(inner_K / safe_K / jnp.where(comparable_K, length_K, 1.0), -1.0, 1.0)
        goal_K = goals_KxK[rows_K, j_K]
        sine_K = jnp.sqrt(jnp.maximum(1 - goal_K**2, 1e-6))
        along_K = length_K * (goal_K * jnp.sqrt(1 - cosine_K**2) - cosine_K * sine_K) / (safe_K * sine_K)
        parts_KxK = parts_KxK.at[rows_K, j_K].add(jnp.where(comparable_K & (cosine_K < goal_K), along_K, 0.0))
        new_K = jnp.where(comparable_K, (1 - beta) * goal_K + beta * cosine_K, goal_K)
        return parts_KxK, goals_KxK.at[rows_K, j_K].set(new_K)

    start = (jnp.diag(present_K.astype(jnp.float32)), goals_KxK)
    parts_KxK, goals_KxK = jax.lax.fori_loop(0, K, turn, start)
    return parts_KxK.sum(axis=0), goals_KxK


@named
def imtl_g() -> Rule:
    """The combination whose projections onto all unit gradients are equal (Liu et al. 2021, IMTL-G).

    (G w)_i / |g_i| is the same for all i, and the weights sum to 1; they may be negative. If gradients are dependent, or
    zero, it is the least-squares solution in unit gradients; zero gradients then have weight 0. Gradients begin to count as
    dependent, or opposite, where an eigenvalue of the cosines is below 3e-5, and the transition is smooth. Weights that nearly
    sum to 0 have no multiple that sums to 1: none is above 600, and instead they become 1 / |g_i| over its sum, the weights of
    gradients at equal length. Heads follow their plain losses: the paper uses it for the shared parameters, with imtl_l for
    the heads.
    """

    def weigh(gram_KxK: jax.Array, scale: jax.Array, present_K: jax.Array) -> tuple[jax.Array, jax.Array]:
        cosine_KxK, norm_K, nonzero_K = cosines(gram_KxK)
        shortest = jnp.min(jnp.where(nonzero_K, norm_K, 1.0))
        inverse_K = jnp.where(nonzero_K, shortest / norm_K, 0.0)
        equal_K = jnp.where(nonzero_K.any(), inverse_K / jnp.maximum(inverse_K.sum(), 1e-30), share(present_K))
        # The solution is G^-1 |g| up to scale.
        part_K, _, residual = _equal_angles(cosine_KxK, nonzero_K)
        w_K = part_K * inverse_K
        size = jnp.abs(w_K).sum()
        w_K = w_K / jnp.where(size > 0, size, 1.0)
        total = w_K.sum()
        sums = (total / 1e-3) ** 4 / (1 + (total / 1e-3) ** 4)
        return sums * w_K / jnp.where(total == 0, 1.0, total) + (1 - sums) * equal_K, residual

    return stateless(weigh)


@named
def imtl(learning_rate: float = 1e-2) -> Rule:
    """Both halves of impartial multi-task learning (Liu et al. 2021, IMTL): equal projections, and losses of equal size.

    Losses have learned scales exp(s_k), as in imtl_l, and the gradients of the scaled losses are combined as in imtl_g: with
    weights a_k that sum to 1, the weights are a_k exp(s_k), and may be negative. Departs from the paper: s has an Adam of its
    own. Heads are weighted: by the scales exp(s_k) alone, as in the paper, whose task parameters follow the scaled losses.

    Args:
        learning_rate: The rate of s, above 0.

    Raises:
        UserError: The rate is not above 0.
    """
    number("weighting imtl: learning_rate", learning_rate, above=0)
    scales, projections = imtl_l(learning_rate), imtl_g()

    def solve(state: Any, signals: Signals) -> tuple[Weights, Any, jax.Array]:
        assert signals.gram is not None  # the rule has asked for it
        scale, state = scales.update(state, signals)
        scale_K = stack(scale)
        scaled = signals._replace(gram=signals.gram * scale_K[:, None] * scale_K[None, :])
        weights, _, residual = base.solve(projections, (), scaled)
        return unstack(stack(weights) * scale_K, signals), state, residual

    def update(state: Any, signals: Signals) -> tuple[Weights, Any]:
        weights, state, _ = solve(state, signals)
        return weights, state

    return Rule(init=scales.init, update=update, needs_gram=True, solve=solve, head_weights=lambda state: jnp.exp(state["s"]))


@named
def config() -> Rule:
    """The direction with equal cosine to every gradient, as long as the gradients' projections on it (Liu et al. 2025, ConFIG).

    With unit gradients U: d = U^+ 1, u = d / |d|, g = (sum_i g_i . u) u. U^+ leaves out, smoothly, the directions in which an
    eigenvalue of the cosines is below 3e-5: |d| is then below 130 sqrt(K). As two gradients become opposite, g goes to 0 and
    their weights to mean(|g|) / |g_i|; among more gradients, a nearly opposite pair leaves the direction to the others. The
    weights may be negative. Heads follow their plain losses, as in TorchJD.
    """

    def weigh(gram_KxK: jax.Array, scale: jax.Array, present_K: jax.Array) -> tuple[jax.Array, jax.Array]:
        cosine_KxK, norm_K, nonzero_K = cosines(gram_KxK)
        part_K, projected_K, residual = _equal_angles(cosine_KxK, nonzero_K)
        square = jnp.maximum(part_K @ projected_K, 0.0)  # |d|^2, at least 1 where the angles can be equal
        length = jnp.where(nonzero_K, norm_K * projected_K, 0.0).sum()
        weights_K = length * square * part_K + 1e-6 * (share(nonzero_K) * norm_K).sum()
        return jnp.where(nonzero_K, weights_K / (square**2 + 1e-6) / norm_K, 0.0), residual

    return stateless(weigh)


def _equal_angles(cosine_KxK: jax.Array, nonzero_K: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weights of unit gradients whose sum has the inner product 1 with each, these products, and the residual.

    Eigenvalues s far below DEPENDENT are left out, as in a pseudo-inverse, but smoothly: 1 / s becomes s^3 / (s^4 +
    DEPENDENT^4), nowhere above 0.6 / DEPENDENT. The residual is the most that a product is off 1, over the terms that make it.
    """
    values_K, vectors_KxK = jnp.linalg.eigh(cosine_KxK)
    relative_K = jnp.maximum(values_K, 0.0) / DEPENDENT
    inverse_K = relative_K**3 / (1 + relative_K**4) / DEPENDENT
    along_K = vectors_KxK.T @ nonzero_K.astype(jnp.float32)
    part_K = jnp.where(nonzero_K, vectors_KxK @ (inverse_K * along_K), 0.0)
    projected_K = vectors_KxK @ (values_K * inverse_K * along_K)
    off_K = jnp.abs(projected_K - 1) / (1 + jnp.abs(cosine_KxK) @ jnp.abs(part_K))
    return part_K, projected_K, jnp.max(jnp.where(nonzero_K, off_K, 0.0))


@named
def aligned() -> Rule:
    """The mean gradient after all singular values of J are set to the smallest (Senushkin et al. 2023, Aligned-MTL).

    With G = V S V^T: w = sqrt(s_min) V S^(-1/2) V^T 1/K over the eigenvalues that are not zero. An eigenvalue counts as
    zero, and is left out smoothly, if it is below 3e-5 of its value for orthogonal gradients: unlike lengths alone are not
    dependence. Gradients shorter than 1e-6 of the longest count as about that long, and g is never shorter than that. The
    weights may be negative. Heads follow their plain losses, as in LibMTL.
    """

    def weigh(gram_KxK: jax.Array, scale: jax.Array, present_K: jax.Array) -> tuple[jax.Array, jax.Array]:
        cosine_KxK, norm_K, nonzero_K = cosines(gram_KxK)
        # An absent or zero gradient counts as orthogonal to all others and as long as the longest: never the smallest value.
        _, root_KxK = firm(cosine_KxK + jnp.diag(jnp.where(nonzero_K, 0.0, 1.0)))
        # Singular values of a root of G: they have twice the digits of the eigenvalues. `norm_K` is 1 where it was 0.
        vectors_KxK, values_K, _ = jnp.linalg.svd(norm_K[:, None] * root_KxK)
        floored_K = jnp.sqrt(values_K**2 + (1e-7 * values_K.max()) ** 2)
        orthogonal_K = jnp.square(vectors_KxK.T) @ jnp.square(norm_K)
        # Very short gradients that are orthogonal to the others have a huge ratio, and its power is not finite.
        kept_K = jnp.minimum(floored_K**2 / orthogonal_K / DEPENDENT, 1e3) ** 6
        kept_K = kept_K / (1 + kept_K)
        inverse_K = jnp.sqrt(kept_K) / floored_K
        shrink_K = inverse_K / inverse_K.max()
        mean_K = jnp.where(nonzero_K, share(present_K), 0.0)
        weights_K = jnp.where(nonzero_K, vectors_KxK @ (shrink_K * (vectors_KxK.T @ mean_K)), 0.0)
        # After the change every singular value that counts is the same.
        off_K = kept_K * jnp.abs(values_K * shrink_K * inverse_K.max() - 1)
        return jnp.where(nonzero_K.any(), weights_K, share(present_K)), jnp.max(off_K)

    return stateless(weigh)


@named
def krum(n_byzantine: int = 1, n_selected: int = 1) -> Rule:
    """The mean of the gradients that lie closest to their neighbours (Blanchard et al. 2017, Multi-Krum).

    A task's score is the sum of |g_i - g_j|^2 over its K - n_byzantine - 2 nearest other tasks; the n_selected tasks with the
    lowest scores have weight 1 / n_selected, the others 0. The weights sum to 1. Departs from the paper, which asks for
    K >= n_byzantine + 3: with fewer tasks only the nearest one is counted. Tasks that tie for the last place share it.
    Heads follow their plain losses, as in TorchJD, so those of the other tasks train, too.

    Args:
        n_byzantine: Number of tasks that may be wrong; not negative.
        n_selected: Number of tasks that are kept, at least 1.

    Raises:
        UserError: An option is out of range; at init, more tasks are to be kept than there are.
    """
    n_byzantine = int(number("weighting krum: n_byzantine", n_byzantine, least=0, whole=True))
    n_selected = int(number("weighting krum: n_selected", n_selected, least=1, whole=True))

    def init(names: Sequence[str]) -> Any:
        if n_selected > len(names):
            raise UserError(f"weighting krum: n_selected is {n_selected}, but {there_are(len(names), 'task')}")
        return ()

    def update(state: Any, signals: Signals) -> tuple[Weights, Any]:
        gram_KxK, _, present_K = scaled_gram(signals)
        square_K = jnp.diagonal(gram_KxK)
        distance_KxK = jnp.maximum(square_K[:, None] + square_K[None, :] - 2 * gram_KxK, 0.0)
        other_KxK = present_K[:, None] & present_K[None, :] & ~jnp.eye(len(square_K), dtype=bool)
        nearest_KxK = jnp.sort(jnp.where(other_KxK, distance_KxK, jnp.inf), axis=1)
        neighbours = jnp.maximum(present_K.sum() - n_byzantine - 2, 1)
        counted_KxK = (jnp.arange(len(square_K)) < neighbours) & jnp.isfinite(nearest_KxK)
        score_K = jnp.where(present_K, jnp.where(counted_KxK, nearest_KxK, 0.0).sum(axis=1), jnp.inf)
        selected = jnp.minimum(n_selected, jnp.maximum(present_K.sum(), 1))
        last = jnp.sort(score_K)[selected - 1]
        below_K, tied_K = score_K < last * (1 - 1e-6), jnp.abs(score_K - last) <= last * 1e-6
        weights_K = below_K + tied_K * (selected - below_K.sum()) / jnp.maximum(tied_K.sum(), 1)
        return unstack(weights_K / selected, signals), state

    return Rule(init=init, update=update, needs_gram=True, weighs_heads=False)
