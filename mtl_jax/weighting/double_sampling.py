"""Rules that look for the shortest combined gradient by steps that are right on average: double sampling.

The square of a gradient of one batch is on average too long, by the batch's noise. The inner product of the gradients of two
independent halves is right on average; it is Signals.cross, f32[K, K]. Tasks stand in sorted order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.weighting import solvers
from mtl_jax.weighting.base import TINY, Rule, Signals, Weights, named, present, share, unstack
from mtl_jax.weighting.gram_rules import shortest, stateless
from mtl_jax.weighting.options import number


@named
def modo(gamma: float = 0.1, rho: float = 0.1) -> Rule:
    """The shortest vector in the hull of the gradients, by one unbiased step at a time (Chen et al. 2023, MoDo).

    w <- projection of w - gamma (C + rho 1) w onto the simplex, starting at 1/K each, where C[i, j] is the inner product of
    task i's gradient in one half of the batch with task j's in the other half. The combined gradient is sum_i w_i g_i with the
    new w and the gradients of the whole batch. The weights sum to 1. A task that is missing in one of the halves keeps its
    weight, relative to the others. The step is not scaled: longer gradients move the weights faster. Heads follow their plain
    losses, as in LibMTL.

    Args:
        gamma: Rate of the weights, above 0.
        rho: Added to the diagonal, not negative.

    Raises:
        UserError: An option is out of range; before training, a source has less than two rows in a step.
    """
    number("weighting modo: gamma", gamma, above=0)
    number("weighting modo: rho", rho, least=0)

    def step(w_K: jax.Array, cross_KxK: jax.Array, comparable_K: jax.Array) -> jax.Array:
        return solvers.onto_simplex(w_K - gamma * (cross_KxK @ w_K + rho * w_K), comparable_K)

    def update(state: jax.Array, signals: Signals) -> tuple[Weights, jax.Array]:
        new_K = _on_comparable(state, signals, step)
        return unstack(_of_present(new_K, signals), signals), new_K

    return Rule(init=_equal_shares, update=update, needs_cross=True, weighs_heads=False)


@named
def sdmgrad(lam: float = 0.3, iterations: int = 0, learning_rate: float = 10.0, momentum: float = 0.5) -> Rule:
    """Between the shortest vector and the mean gradient g_0 (Xiao, Ban and Ji 2023, SDMGrad).

    g = (g_w + lam g_0) / (1 + lam), with w = argmin over the simplex of |g_w + lam g_0|^2. lam = 0 is MGDA, and for a large lam
    it is the mean. The weights sum to 1. A gradient of 0 is part of the simplex like any other. Heads follow their plain
    losses, as in LibMTL.

    With 0 iterations w is solved for, from the gradients of the whole batch, which departs from the paper. With more, it is
    the paper's: so many projected steps of gradient descent in every step, w <- projection of w - learning_rate v with
    v <- momentum v + C (w + lam / K), where C[i, j] is the inner product of task i's gradient in one half of the batch with
    task j's in the other half, over the square of the mean of sqrt(C[i, i]). The paper takes the combined gradient from a
    third batch; here a step is weighted by the w of the steps before it, so that its batch is independent of them. A task that
    is missing in one of the halves keeps its weight, relative to the others.

    Args:
        lam: The pull towards the mean; not negative.
        iterations: Projected steps on halves of a batch; 0: w is solved for. TorchJD and LibMTL take 20.
        learning_rate: Of the projected steps, above 0.
        momentum: Of the projected steps, from 0 to below 1.

    Raises:
        UserError: An option is out of range; before training, with iterations, a source has less than two rows in a step.
    """
    number("weighting sdmgrad: lam", lam, least=0)
    iterations = int(number("weighting sdmgrad: iterations", iterations, least=0, whole=True))
    number("weighting sdmgrad: learning_rate", learning_rate, above=0)
    number("weighting sdmgrad: momentum", momentum, least=0, below=1)

    def weigh(gram_KxK: jax.Array, scale: jax.Array, present_K: jax.Array) -> tuple[jax.Array, jax.Array]:
        # On the simplex g_w + lam g_0 is the sum of w_i (g_i + lam g_0): the shortest vector in the hull of these.
        mean_K = share(present_K)
        with_mean_K = gram_KxK @ mean_K
        pulled_KxK = gram_KxK + lam * (with_mean_K[:, None] + with_mean_K[None, :]) + lam**2 * (mean_K @ with_mean_K)
        both_KxK = present_K[:, None] & present_K[None, :]
        pulled_KxK, _ = solvers.scaled(jnp.where(both_KxK, pulled_KxK, 0.0))
        w_K, residual = shortest(pulled_KxK, present_K)
        return (w_K + lam * mean_K) / (1 + lam), residual

    if not iterations:
        return stateless(weigh)

    def steps(w_K: jax.Array, cross_KxK: jax.Array, comparable_K: jax.Array) -> jax.Array:
        mean_K = share(comparable_K)
        length = (mean_K * jnp.sqrt(jnp.maximum(jnp.diagonal(cross_KxK), 0.0))).sum()
        scaled_KxK = cross_KxK / (length**2 + 1e-8)

        def iterate(_: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            w_K, velocity_K = carry
            velocity_K = momentum * velocity_K + scaled_KxK @ (w_K + lam * mean_K)
            return solvers.onto_simplex(w_K - learning_rate * velocity_K, comparable_K), velocity_K

        return jax.lax.fori_loop(0, iterations, iterate, (w_K, jnp.zeros_like(w_K)))[0]

    def update(state: jax.Array, signals: Signals) -> tuple[Weights, jax.Array]:
        w_K = _of_present(state, signals)
        return unstack((w_K + lam * share(present(signals))) / (1 + lam), signals), _on_comparable(state, signals, steps)

    return Rule(init=_equal_shares, update=update, needs_cross=True, weighs_heads=False)


def _equal_shares(names: Sequence[str]) -> jax.Array:
    return jnp.full(len(names), 1 / len(names), jnp.float32)


def _on_comparable(state_K: jax.Array, signals: Signals, move: Any) -> jax.Array:
    """The weights f32[K], those of the tasks in both halves moved on a simplex of their own, scaled to the rest of the sum."""
    assert signals.cross is not None
    comparable_K = present(signals) & (signals.cross != 0).any(axis=1)
    kept_K, moving_K = jnp.where(comparable_K, 0.0, state_K), jnp.where(comparable_K, state_K, 0.0)
    total = moving_K.sum()
    w_K = jnp.where(total > 0, moving_K / jnp.maximum(total, TINY), share(comparable_K))
    cross_KxK = jnp.where(comparable_K[:, None] & comparable_K[None, :], signals.cross, 0.0)
    with jax.default_matmul_precision("highest"):  # on GPU else not float32
        moved_K = move(w_K, cross_KxK, comparable_K)
    moved_K = jnp.where(jnp.isfinite(moved_K).all(), moved_K, w_K)
    return jnp.where(comparable_K, moved_K * (1 - kept_K.sum()), kept_K)


def _of_present(state_K: jax.Array, signals: Signals) -> jax.Array:
    """The weights of the present tasks, f32[K], scaled to a sum of 1."""
    present_K = present(signals)
    w_K = jnp.where(present_K, state_K, 0.0)
    return jnp.where(w_K.sum() > 0, w_K / jnp.maximum(w_K.sum(), TINY), share(present_K))
