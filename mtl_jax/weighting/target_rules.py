"""Rules that know their target: one task counts, and the others are there to help it.

A source task has a say only as far as its gradient agrees with the target's. Tasks stand in sorted order; g_1 is the target's
gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mtl_jax.core.errors import UserError, unknown
from mtl_jax.weighting import solvers
from mtl_jax.weighting.base import SMALLEST, HeldOut, Rule, Signals, Weights, named, present, unstack
from mtl_jax.weighting.gram_rules import scaled_gram
from mtl_jax.weighting.options import number

BIG = 1e15  # a derivative beyond this would overflow when it is squared
SATISFIED = 1e-3  # a constraint of pcd counts as met up to this, in units of the squared lengths


@named
def gcs(target: str, weighted: bool = False) -> Rule:
    """A source counts only while its gradient agrees with the target's (Du et al. 2018, gradient cosine similarity).

    The target's weight is 1. That of a source is 1 where its cosine with the target's gradient is above 0, else 0; or,
    weighted, the cosine itself where that is above 0. Where the target has no labelled row in a step, no task counts. Heads
    follow their plain losses: a source's own head learns also while the source does not count.

    Args:
        target: The name of the target task.
        weighted: Whether the weight is the cosine.

    Raises:
        UserError: The target is not a task of the run.
    """

    def update(state: jax.Array, signals: Signals) -> tuple[Weights, jax.Array]:
        gram_KxK, _, present_K = scaled_gram(signals)
        norm_K = jnp.sqrt(jnp.maximum(jnp.diagonal(gram_KxK), 0.0))
        product_K = norm_K * norm_K[state]
        cosine_K = jnp.where(product_K > 0, gram_KxK[state] / jnp.where(product_K > 0, product_K, 1.0), 0.0)
        agrees_K = jnp.clip(cosine_K, 0.0, 1.0) if weighted else (cosine_K > 0).astype(jnp.float32)
        weights_K = jnp.where(jnp.arange(len(agrees_K)) == state, 1.0, agrees_K)
        return unstack(jnp.where(present_K[state], weights_K, 0.0), signals), state

    return Rule(init=lambda names: _place("gcs", target, names), update=update, needs_gram=True, weighs_heads=False)


@named
def pcd(target: str, tau: float = 0.02, beta: float = 0.999, eps: float = 1e-8) -> Rule:
    """Priority-constrained descent: the target's gradient, bent as little as the others need (arXiv 2606.29521).

    With u_i = g_i / sqrt(v_i + eps), where v_i is the debiased moving average of |g_i|^2: d = argmin of |d - u_1|^2 such that
    u_j . d >= tau |u_j|^2 for every other task, and the gradient is d at the length of g_1. For two tasks
    d = u_1 + max(0, tau - u_2 . u_1 / |u_2|^2) u_2. Where the constraints contradict each other, which takes two sources, they
    are dropped; where d is 0, or g_1, the gradient is 0. Averages move in the steps in which a task has labelled rows. Heads
    follow their plain losses.

    Args:
        target: The name of the target task.
        tau: The share of its own progress that every other task keeps, from 0 to 1.
        beta: The decay of the average of squared lengths, from 0 to below 1.
        eps: Added to that average; not negative.

    Raises:
        UserError: The target is not a task of the run, or an option is out of range.
    """
    number("weighting pcd: tau", tau, least=0, most=1)
    number("weighting pcd: beta", beta, least=0, below=1)
    number("weighting pcd: eps", eps, least=0)

    def init(names: Sequence[str]) -> dict[str, jax.Array]:
        zeros = jnp.zeros(len(names))
        return {"target": _place("pcd", target, names), "mean": zeros, "steps": zeros}

    def solve(state: dict[str, jax.Array], signals: Signals) -> tuple[Weights, dict[str, jax.Array], jax.Array]:
        assert signals.gram is not None
        present_K, first = present(signals), state["target"]
        squared_K = jnp.where(present_K, jnp.diagonal(signals.gram), 0.0)
        steps_K = state["steps"] + present_K
        mean_K = jnp.where(present_K, beta * state["mean"] + (1 - beta) * squared_K, state["mean"])
        debiased_K = mean_K / jnp.maximum(1 - beta**steps_K, 1e-30)
        inverse_K = jnp.where(present_K, jax.lax.rsqrt(jnp.maximum(debiased_K + eps, 1e-30)), 0.0)
        gram_KxK = signals.gram * inverse_K[:, None] * inverse_K[None, :]
        gram_KxK = jnp.where(present_K[:, None] & present_K[None, :], gram_KxK, 0.0)
        share_K, residual, possible = _bent(gram_KxK, first, present_K, tau)
        unit_K = jnp.zeros(len(share_K)).at[first].set(1.0)
        share_K = jnp.where(possible, share_K, unit_K)
        length = jnp.sqrt(jnp.maximum(share_K @ gram_KxK @ share_K, 0.0))
        vanishes = length < 1e-4 * jnp.sqrt(jnp.maximum(gram_KxK[first, first], 0.0))  # rounding of the Gram matrix
        scale = jnp.where(vanishes, 0.0, jnp.sqrt(squared_K[first]) / jnp.where(length > 0, length, 1.0))
        weights_K = jnp.where(present_K[first], share_K * inverse_K * scale, 0.0)
        return unstack(weights_K, signals), state | {"mean": mean_K, "steps": steps_K}, residual

    def update(state: dict[str, jax.Array], signals: Signals) -> tuple[Weights, dict[str, jax.Array]]:
        with jax.default_matmul_precision("highest"):  # on GPU else not float32
            weights, state, _ = solve(state, signals)
        return weights, state

    return Rule(init=init, update=update, needs_gram=True, weighs_heads=False)


@named
def auto_lambda(target: str, share: float = 0.2, learning_rate: float = 1e-2, start: float = 0.1, rate: float = 1e-3) -> Rule:
    """Learned weights that lower the target's loss on held-out rows after a step (Liu et al. 2022, Auto-Lambda).

    With L the target's loss on held-out rows: w follows the gradient of L(theta - rate sum_i w_i g_i) by Adam; it is never
    below 0. The derivative by w_k is -rate <grad L, g_k>: exact, from one gradient on held-out rows and one forward derivative
    of all losses along it. It is divided by the rate, which Adam does not notice. The held-out rows are a share of the
    target's training rows, drawn once, the same for every seed; they are not trained on, and are neither dev, which chooses
    the checkpoint, nor test. Of several batches of them every step draws one; there is no dropout. Heads are weighted: they
    follow the weighted sum, as in the paper.

    Departs from the paper: there the derivative is a finite difference, the held-out rows are training rows, and the weights
    of a step have been changed in it; here in the steps before, so that a step's gradient is also that of the look-ahead.

    Args:
        target: The name of the target task.
        share: The share of the training rows of the target's source that is held out, above 0 and below 1.
        learning_rate: The rate of w, above 0.
        start: The weight of every task at the start, above 0.
        rate: The rate of the look-ahead step, that of gradient descent; not negative. 0 looks at the present parameters.

    Raises:
        UserError: The target is not a task of the run, or an option is out of range; before training, fewer than two rows
            would be held out.
    """
    share = float(number("weighting auto_lambda: share", share, above=0, below=1))  # decides the rows: never traced
    number("weighting auto_lambda: learning_rate", learning_rate, above=0)
    number("weighting auto_lambda: start", start, above=0)
    number("weighting auto_lambda: rate", rate, least=0)
    adam = optax.adam(learning_rate)

    def init(names: Sequence[str]) -> dict[str, Any]:
        _place("auto_lambda", target, names)
        weights_K = jnp.full(len(names), start, jnp.float32)
        return {"weights": weights_K, "adam": adam.init(weights_K)}

    def update(state: dict[str, Any], signals: Signals) -> tuple[Weights, dict[str, Any]]:
        assert signals.held_out is not None
        weights = unstack(state["weights"], signals)
        derivative_K = jnp.where(present(signals), signals.held_out(weights, rate), 0.0)
        updates_K, adam_state = adam.update(jnp.clip(derivative_K, -BIG, BIG), state["adam"])
        moved_K = jnp.clip(state["weights"] + updates_K, 0.0, 1 / SMALLEST)
        weights_K = jnp.where(present(signals), moved_K, state["weights"])
        return weights, {"weights": weights_K, "adam": adam_state}

    return Rule(init=init, update=update, held_out=HeldOut((target,), share))


def _bent(gram_KxK: jax.Array, first: jax.Array, present_K: jax.Array, tau: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The d of pcd as weights of the scaled gradients, f32[K]; the worst violation; whether the constraints can be met.

    d = u_1 + sum of x_j u_j, where x minimises x^T G x / 2 + x^T c over x >= 0 with c_j = u_j . u_1 - tau |u_j|^2.
    """
    squared_K = jnp.diagonal(gram_KxK)
    others_K = present_K & (jnp.arange(len(squared_K)) != first) & (squared_K > 0)
    both_KxK = others_K[:, None] & others_K[None, :]
    length_K = jnp.sqrt(jnp.where(others_K, squared_K, 1.0))
    cosine_KxK = jnp.where(both_KxK, gram_KxK / (length_K[:, None] * length_K[None, :]), 0.0)
    slope_K = jnp.where(others_K, gram_KxK[first] / length_K - tau * length_K, 0.0)  # for unit vectors
    size = jnp.maximum(jnp.abs(slope_K).max(), 1e-30)
    bounded_KxK = cosine_KxK + solvers.FLOOR * jnp.eye(len(squared_K))

    def derivatives(x_K: jax.Array) -> tuple[jax.Array, jax.Array]:
        return bounded_KxK @ x_K + slope_K / size, bounded_KxK

    x_K = solvers.minimize(derivatives, jnp.ones(len(squared_K)), present_K=others_K)
    x_K = jnp.where(others_K, x_K, 0.0) * size
    gain_K = slope_K + cosine_KxK @ x_K  # u_j . d - tau |u_j|^2, over |u_j|
    worst = jnp.maximum(jnp.max(jnp.where(others_K, -gain_K, 0.0)), 0.0)
    unit_K = jnp.zeros(len(squared_K)).at[first].set(1.0)
    return unit_K + x_K / length_K, worst / size, worst <= SATISFIED * jnp.maximum(size, tau)


def _place(rule: str, target: str, names: Sequence[str]) -> jax.Array:
    """The target's place among the sorted tasks, i32[], which is part of the rule's state.

    Raises:
        UserError: It is not a task of the run.
    """
    if not isinstance(target, str):
        raise UserError(f"weighting {rule}: target is {target!r}; it must be the name of a task")
    if target not in names:
        raise unknown(f"target of weighting {rule}:", target, sorted(names))
    return jnp.asarray(sorted(names).index(target), jnp.int32)
