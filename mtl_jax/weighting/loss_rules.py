"""Rules that depend on the losses only; they cost K numbers per step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mtl_jax.core.errors import UserError, listed, unknown
from mtl_jax.weighting.base import SMALLEST, Rule, Signals, Weights, above_zero, named, present, share, stack, unstack
from mtl_jax.weighting.options import choice, number

LOWEST, HIGHEST = -69.0, -math.log(SMALLEST)  # bounds of the logarithm of a learned weight: 1e-30 and 1e6
BIG = 3e38  # the largest float32, nearly


@named
def uncertainty(learning_rate: float = 1e-2) -> Rule:
    """Weights from learned task uncertainties (Kendall, Gal and Cipolla 2018).

    The objective is sum_k exp(-s_k) L_k / 2 + s_k / 2 with s_k = log sigma_k^2, 0 at the start, so the weights are
    exp(-s_k) / 2: 1/2 each at the start, 1 / (2 L_k) at the optimum, never above 5e5. Departs from the paper: s has an Adam of
    its own. Heads are weighted, as in the paper: they follow the objective, like all parameters.

    Args:
        learning_rate: The rate of s, above 0.

    Raises:
        UserError: The rate is not above 0.
    """
    return _learned(
        "uncertainty",
        learning_rate,
        objective=lambda s_K, losses_K: 0.5 * jnp.exp(-s_K) * losses_K + 0.5 * s_K,
        weights=lambda s_K: 0.5 * jnp.exp(-s_K),
        bounds=(-HIGHEST, -LOWEST),
    )


@named
def imtl_l(learning_rate: float = 1e-2) -> Rule:
    """Learned scales that bring all losses to the same size (Liu et al. 2021, IMTL-L).

    The objective is sum_k exp(s_k) L_k - s_k with s = 0 at the start, so the weights are exp(s_k): 1 each at the start,
    1 / L_k at the optimum, never above 1e6. Departs from the paper: s has an Adam of its own. Heads are weighted, as in the
    paper, whose task parameters follow the scaled losses.

    Args:
        learning_rate: The rate of s, above 0.

    Raises:
        UserError: The rate is not above 0.
    """
    return _learned(
        "imtl_l",
        learning_rate,
        objective=lambda s_K, losses_K: jnp.exp(s_K) * losses_K - s_K,
        weights=lambda s_K: jnp.exp(s_K),
        bounds=(LOWEST, HIGHEST),
    )


def _learned(
    name: str,
    learning_rate: float,
    objective: Callable[[jax.Array, jax.Array], jax.Array],
    weights: Callable[[jax.Array], jax.Array],
    bounds: tuple[float, float],
) -> Rule:
    """A rule with a learned number s for each task.

    Args:
        name: The rule's name, for errors.
        learning_rate: The rate of s.
        objective: (s, losses) to the terms of the objective, f32[K].
        weights: s to the derivatives of the terms by the losses, f32[K].
        bounds: The least and the largest s.
    """
    number(f"weighting {name}: learning_rate", learning_rate, above=0)
    adam = optax.adam(learning_rate)

    def init(names: Sequence[str]) -> Any:
        s_K = jnp.zeros(len(names))
        return {"s": s_K, "adam": adam.init(s_K)}

    def total(state: Any, signals: Signals) -> jax.Array:
        return jnp.where(present(signals), objective(state["s"], stack(signals.losses)), 0.0).sum()

    def update(state: Any, signals: Signals) -> tuple[Weights, Any]:
        gradient_K = jax.grad(lambda s_K: total({"s": s_K}, signals))(state["s"])
        updates_K, adam_state = adam.update(jnp.clip(gradient_K, -1e15, 1e15), state["adam"])
        s_K = jnp.where(present(signals), state["s"] + updates_K, state["s"])
        return unstack(weights(state["s"]), signals), {"s": jnp.clip(s_K, *bounds), "adam": adam_state}

    return Rule(init=init, update=update, objective=total)


@named
def dwa(temperature: float = 2.0) -> Rule:
    """Dynamic weight averaging: tasks whose loss falls slowly get more weight (Liu, Johns and Davison 2019).

    w_k = K softmax_k(r_k / temperature), with r_k = L_k(t-1) / L_k(t-2); 1 for a task that has been present less than twice.
    The weights sum to K. The paper takes means of the losses over epochs; here a step takes the place of an epoch. Heads are
    weighted, as in the paper and in LibMTL.

    Args:
        temperature: Above 0; the larger, the more equal the weights.

    Raises:
        UserError: The temperature is not above 0.
    """
    number("weighting dwa: temperature", temperature, above=0, infinite=True)

    def init(names: Sequence[str]) -> Any:
        zeros_K = jnp.zeros(len(names))
        return {"seen": jnp.zeros(len(names), jnp.int32), "last": zeros_K, "before_last": zeros_K}

    def update(state: Any, signals: Signals) -> tuple[Weights, Any]:
        present_K = present(signals)
        rate_K = state["last"] / jnp.maximum(state["before_last"], jnp.finfo(jnp.float32).tiny)
        rate_K = jnp.where(state["seen"] < 2, 1.0, jnp.minimum(rate_K, 1e6))
        weights_K = present_K.sum() * jax.nn.softmax(jnp.minimum(rate_K / temperature, BIG), where=present_K)
        new_state = {
            "seen": state["seen"] + present_K,
            "last": jnp.where(present_K, stack(signals.losses), state["last"]),
            "before_last": jnp.where(present_K, state["last"], state["before_last"]),
        }
        return unstack(weights_K, signals), new_state

    return Rule(init=init, update=update)


@named
def rlw(distribution: str = "normal") -> Rule:
    """Random loss weighting: weights drawn at each step (Lin et al. 2022).

    The weights sum to 1; so does their mean over steps, 1/K each. Heads are weighted: the paper draws weights of the losses.

    Args:
        distribution: normal (softmax of standard normal draws, the paper's main choice) or dirichlet (uniform on the simplex).

    Raises:
        UserError: Another distribution.
    """
    choice("weighting rlw: distribution", distribution, ("normal", "dirichlet"))

    def update(state: Any, signals: Signals) -> tuple[Weights, Any]:
        shape = (len(signals.losses),)
        # The softmax of the logarithms of gamma draws with shape 1 is uniform on the simplex.
        normal = distribution == "normal"
        draws_K = jax.random.normal(signals.key, shape) if normal else jax.random.loggamma(signals.key, 1.0, shape)
        return unstack(jax.nn.softmax(draws_K, where=present(signals)), signals), state

    return Rule(init=lambda names: (), update=update)


@named
def gls() -> Rule:
    """Geometric loss strategy: the geometric mean of the losses (Chennupati et al. 2019).

    The objective is (prod_k L_k)^(1/K), so a weight is the objective over K L_k. Weights times losses sum to the objective. A
    loss counts as at least a millionth of the largest, so that no weight is above 1e6 / K. Heads are weighted: they follow the
    objective, like all parameters.
    """

    def log_mean(signals: Signals) -> tuple[jax.Array, jax.Array]:
        logs_K = jnp.log(above_zero(stack(signals.losses), present(signals)))
        return logs_K, (share(present(signals)) * logs_K).sum()

    def update(state: Any, signals: Signals) -> tuple[Weights, Any]:
        logs_K, mean = log_mean(signals)
        return unstack(share(present(signals)) * jnp.exp(mean - logs_K), signals), state

    return Rule(init=lambda names: (), update=update, objective=lambda state, signals: jnp.exp(log_mean(signals)[1]))


@named
def stch(mu: float = 1.0, ideal: float = 0.0) -> Rule:
    """Smooth Tchebycheff scalarization: a smooth form of the largest loss (Lin et al. 2024).

    The objective is mu log sum_k exp((L_k - ideal) / mu), so the weights are softmax_k(L_k / mu) and sum to 1. All
    preferences are equal, and the losses are taken as they are, as in the paper's definition; its program for multi-task
    training takes their logarithms relative to the losses of a warm-up. Heads are weighted: they follow the objective, like
    all parameters.

    Args:
        mu: Above 0; towards 0 the largest loss alone counts, towards infinity all losses count the same.
        ideal: The loss that is aimed at; it only changes the objective by a constant.

    Raises:
        UserError: mu is not above 0.
    """
    number("weighting stch: mu", mu, above=0)
    number("weighting stch: ideal", ideal)

    def objective(state: Any, signals: Signals) -> jax.Array:
        return mu * jax.nn.logsumexp((stack(signals.losses) - ideal) / mu, where=present(signals))

    def update(state: Any, signals: Signals) -> tuple[Weights, Any]:
        scaled_K = jnp.clip((stack(signals.losses) - ideal) / mu, -BIG, BIG)
        return unstack(jax.nn.softmax(scaled_K, where=present(signals)), signals), state

    return Rule(init=lambda names: (), update=update, objective=objective)


@named
def famo(learning_rate: float = 0.025, decay: float = 0.01, lowest: float = 0.0) -> Rule:
    """Fast adaptive multitask optimization: all logarithms of losses fall at the same speed (Liu et al. 2023).

    With z = softmax(xi) and D_k = L_k - lowest: weights z_k / D_k, scaled to sum to 1. xi follows, by Adam with decay, the
    change of log D from one step to the next through the softmax. Departs from the paper: the loss after a step is that of
    the next step's batch, not of the same batch evaluated again, which would cost another forward pass; and D counts as at
    least a millionth of the largest D, and at least 1e-8. Heads are weighted, as in the authors' program and in LibMTL.

    Args:
        learning_rate: The rate of xi, above 0.
        decay: Weight decay of xi, added to its gradient; not negative.
        lowest: A lower bound of the losses.

    Raises:
        UserError: An option is out of range.
    """
    number("weighting famo: learning_rate", learning_rate, above=0)
    number("weighting famo: decay", decay, least=0)
    number("weighting famo: lowest", lowest)
    adam = optax.chain(optax.add_decayed_weights(decay), optax.adam(learning_rate))

    def init(names: Sequence[str]) -> Any:
        zeros_K = jnp.zeros(len(names))
        return {"xi": zeros_K, "adam": adam.init(zeros_K), "last": zeros_K, "seen": jnp.zeros(len(names), bool)}

    def update(state: Any, signals: Signals) -> tuple[Weights, Any]:
        present_K = present(signals)
        logs_K = jnp.log(jnp.maximum(above_zero(stack(signals.losses) - lowest, present_K), 1e-8))
        both_K = present_K & state["seen"]
        fall_K = jnp.where(both_K, state["last"] - logs_K, 0.0)
        _, pull = jax.vjp(lambda xi_K: jax.nn.softmax(xi_K, where=both_K), state["xi"])
        updates_K, adam_state = adam.update(pull(fall_K)[0], state["adam"], state["xi"])
        # A change of the losses is known from the second step on; before it, nothing moves, not even by decay.
        xi_K = jnp.where(both_K, state["xi"] + updates_K, state["xi"])
        adam_state = jax.tree.map(lambda new, old: jnp.where(both_K.any(), new, old), adam_state, state["adam"])
        weights_K = jax.nn.softmax(jax.nn.log_softmax(xi_K) - logs_K, where=present_K)
        last_K = jnp.where(present_K, logs_K, state["last"])
        return unstack(weights_K, signals), {"xi": xi_K, "adam": adam_state, "last": last_K, "seen": state["seen"] | present_K}

    return Rule(init=init, update=update)


@named
def excess(learning_rate: float = 1e-2, reference: float | Mapping[str, float] = 0.0) -> Rule:
    """Weights grow with the excess of a loss over its lowest possible value (after He et al. 2024, ExcessMTL).

    w_k <- w_k exp(rate E_k / E_k(first)), scaled to sum to 1, with E_k = max(L_k - reference_k, 0), the first one at least 1 %
    of the first loss. If the lowest losses are given, for example those of single-task training, noisy tasks, whose losses
    stay high in any case, take no weight from the others; with the default of 0 the loss itself counts. Departs from the paper,
    which estimates E_k from the curvature of every task. Heads are weighted, as in LibMTL.

    Args:
        learning_rate: The rate of the logarithms of the weights, above 0.
        reference: The lowest loss, one number for all or {task: number}.

    Raises:
        UserError: A number is out of range; at init, a task has no reference or a reference no task.
    """
    number("weighting excess: learning_rate", learning_rate, above=0)
    for lowest in reference.values() if isinstance(reference, Mapping) else (reference,):
        number("weighting excess: reference", lowest)

    def init(names: Sequence[str]) -> Any:
        if isinstance(reference, Mapping):
            for task in reference:
                if task not in names:
                    raise unknown("task in reference of weighting 'excess':", task, names)
            missing = [name for name in names if name not in reference]
            if missing:
                raise UserError(f"weighting excess: no reference for {listed(missing)}")
        zeros_K = jnp.zeros(len(names))
        return {"log_weights": zeros_K, "first": zeros_K, "seen": jnp.zeros(len(names), bool)}

    def update(state: Any, signals: Signals) -> tuple[Weights, Any]:
        present_K = present(signals)
        low_K = stack({task: reference[task] if isinstance(reference, Mapping) else reference for task in signals.losses})
        losses_K = stack(signals.losses)
        excess_K = jnp.maximum(losses_K - low_K, 0.0)
        # A first loss that happens to be at the reference must not make all later losses infinitely worse.
        first_K = jnp.where(state["seen"], state["first"], jnp.maximum(excess_K, 0.01 * jnp.abs(losses_K)))
        growth_K = jnp.where(first_K > 0, jnp.minimum(excess_K / jnp.where(first_K > 0, first_K, 1.0), 1e6), 0.0)
        logs_K = jnp.where(present_K, state["log_weights"] + learning_rate * growth_K, state["log_weights"])
        logs_K = logs_K - logs_K.max()
        weights_K = jax.nn.softmax(logs_K, where=present_K)
        ever_present_K = state["seen"] | present_K
        first_K = jnp.where(present_K, first_K, state["first"])
        return unstack(weights_K, signals), {"log_weights": logs_K, "first": first_K, "seen": ever_present_K}

    return Rule(init=init, update=update)
