"""Rules that balance the lengths of the task gradients, or track the gradients over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mtl_jax.weighting import solvers
from mtl_jax.weighting.base import (
    SMALLEST,
    TINY,
    Rule,
    Signals,
    Transform,
    Weights,
    above_zero,
    after_transform,
    by_rows,
    named,
    present,
    share,
    stack,
    unstack,
)
from mtl_jax.weighting.gram_rules import scaled_gram
from mtl_jax.weighting.options import number


@named
def gradnorm(alpha: float = 1.5, learning_rate: float = 0.025) -> Rule:
    """Weights under which tasks that learn slowly have the longer gradients (Chen et al. 2018, GradNorm).

    With n_k = |g_k|, the relative inverse training rate r_k = (L_k / L_k(first)) over its mean, and the target
    t_k = mean(w n) r_k^alpha, held constant: w follows the gradient of sum_k |w_k n_k - t_k|, is kept above 0 and rescaled to
    sum to K. A task's first loss is that of the first step in which it is present. The paper compares gradients in the last
    shared layer: set gram_over to it. Departs from the paper by Adam on w, and by scaling the lengths in each step so that the
    longest is 1 and the gradients' scale does not matter; if the scale changes from step to step, Adam's averages, and so the
    weights, differ by a few percent from those of unscaled lengths. Heads follow their plain losses, as in LibMTL; the paper
    differentiates the weighted sum by all parameters.

    Args:
        alpha: How much longer the gradients of slow tasks become; not negative.
        learning_rate: The rate of w, above 0.

    Raises:
        UserError: An option is out of range.
    """
    number("weighting gradnorm: alpha", alpha, least=0)
    number("weighting gradnorm: learning_rate", learning_rate, above=0)
    adam = optax.adam(learning_rate)

    def init(names: Sequence[str]) -> Any:
        ones_K = jnp.ones(len(names))
        return {"weights": ones_K, "adam": adam.init(ones_K), "first": ones_K, "seen": jnp.zeros(len(names), bool)}

    def update(state: Any, signals: Signals) -> tuple[Weights, Any]:
        gram_KxK, _, present_K = scaled_gram(signals)
        losses_K = stack(signals.losses)
        first_K = jnp.where(present_K & ~state["seen"], jnp.maximum(losses_K, TINY), state["first"])
        ratio_K = jnp.clip(losses_K / first_K, 0.0, 1e6)
        mean_K = share(present_K)
        rate_K = ratio_K / jnp.maximum((mean_K * ratio_K).sum(), TINY)
        norm_K = jnp.sqrt(jnp.maximum(jnp.diagonal(gram_KxK), 0.0))
        target_K = (mean_K * state["weights"] * norm_K).sum() * jnp.minimum(rate_K**alpha, 1e6)
        gradient_K = jnp.where(present_K, jnp.sign(state["weights"] * norm_K - target_K) * norm_K, 0.0)
        updates_K, adam_state = adam.update(gradient_K, state["adam"])
        moved_K = jnp.where(present_K, jnp.maximum(state["weights"] + updates_K, 1e-3), state["weights"])
        # The weights of the present tasks keep their sum, so that all weights still sum to K.
        old_sum, new_sum = (mean_K > 0) @ state["weights"], (mean_K > 0) @ moved_K
        moved_K = jnp.where(present_K, moved_K * old_sum / jnp.where(new_sum > 0, new_sum, 1.0), moved_K)
        new = {"weights": moved_K, "adam": adam_state, "first": first_K, "seen": state["seen"] | present_K}
        return unstack(state["weights"], signals), new

    return Rule(init=init, update=update, needs_gram=True, weighs_heads=False)


@named
def db_mtl(beta: float = 0.9, sigma: float = 0.5) -> Rule:
    """Logarithms of the losses, whose gradients are all scaled to the length of the longest (Lin et al. 2023, DB-MTL).

    With h_k the gradient of log(L_k + 1e-8), averaged over steps: h <- h + b_t (h(before) - h), b_t = beta / t^sigma, from the
    first step on: the combined gradient is max_i |h_i| sum_k h_k / |h_k|. The weights are those of the losses, not of their
    logarithms: w_k = max_i |h_i| / (|h_k| L_k). Heads follow their plain losses: only the trunk's gradients are scaled.
    Departs from the paper and LibMTL, whose heads follow the logarithms, g / L; and by a least value of losses and of gradient
    lengths, a millionth of the largest, as the noise of a loss of 0 would else be stretched to the length of the others.

    Args:
        beta: Share of the past in the average, 0 to below 1. With 0 there is no average and no state; else the state has a
            gradient of the trunk for each task, in float32, also in every checkpoint.
        sigma: How fast that share falls with the step; not negative.

    Raises:
        UserError: An option is out of range.
    """
    number("weighting db_mtl: beta", beta, least=0, below=1)
    number("weighting db_mtl: sigma", sigma, least=0)

    def loss(signals: Signals) -> jax.Array:
        return above_zero(stack(signals.losses), present(signals)) + 1e-8

    def log_scale(signals: Signals) -> jax.Array:
        return jnp.where(present(signals), 1 / loss(signals), 0.0)

    def update(state: Any, signals: Signals) -> tuple[Weights, Any]:
        gram_KxK, _, _ = scaled_gram(signals)
        norm_K = jnp.sqrt(jnp.maximum(jnp.diagonal(gram_KxK), 0.0))
        longest = jnp.max(norm_K * log_scale(signals))  # |h| = |g| / L
        # A gradient that is negligible beside the others is noise, and is not stretched to their length.
        weights_K = longest / jnp.maximum(norm_K, jnp.maximum(SMALLEST * norm_K.max(), TINY))
        weights_K = jnp.where(norm_K > 0, weights_K, 0.0)
        return unstack(weights_K, signals), state

    def init_average(gradients: Any) -> Any:
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), gradients)
        return {"average": zeros, "seen": jnp.zeros(len(jax.tree.leaves(gradients)[0]), jnp.int32)}

    def average(state: Any, signals: Signals, gradients: Any) -> tuple[Any, Any]:
        present_K, scale_K = present(signals), log_scale(signals)
        times_K = state["seen"] + present_K
        past_K = jnp.where(state["seen"] > 0, beta / jnp.maximum(times_K, 1) ** sigma, 0.0)
        past_K = jnp.where(present_K, past_K, 1.0)
        averaged = jax.tree.map(
            lambda old, new: by_rows(past_K, old) * old + by_rows((1 - past_K) * scale_K, new) * new,
            state["average"],
            gradients,
        )
        # Returned as gradients of the losses, L h, so that the weights have the units of any rule's, also for heads.
        back_K = jnp.where(present_K, loss(signals), 0.0)
        changed = jax.tree.map(lambda leaf: by_rows(back_K, leaf) * leaf, averaged)
        return changed, {"average": averaged, "seen": times_K}

    transform = Transform(init_average, average) if beta > 0 else None
    update = update if transform is None else after_transform("db_mtl", update)
    return Rule(init=lambda names: (), update=update, needs_gram=True, transform=transform, weighs_heads=False)


@named
def moco(beta: float = 0.5, sigma: float = 0.5, gamma: float = 0.1, rho: float = 0.0) -> Rule:
    """The shortest vector in the convex hull of tracked gradients, approached over the steps (Fernando et al. 2023, MoCo).

    y_k <- y_k - b_t (y_k - g_k) with y = 0 before the first step and b_t = beta / t^sigma; then, with G of y,
    w <- projection of w - gamma_t (G + rho 1) w onto the simplex, gamma_t = gamma / t^sigma, starting at 1/K each. The combined
    gradient is sum_k w_k y_k. The weights sum to 1. Tracking removes the bias that one batch's gradients give the weights;
    its state is a gradient of the trunk for each task, in float32, also in every checkpoint. This is the paper's algorithm;
    the authors' program scales every gradient to the length of its loss first, and takes a softmax for the projection. Heads
    follow their plain losses, as in LibMTL.

    Args:
        beta: Share of the new gradient in the tracked one, above 0, to 1.
        sigma: How fast both rates fall with the step; not negative.
        gamma: Rate of the weights, above 0.
        rho: Added to the diagonal, not negative.

    Raises:
        UserError: An option is out of range.
    """
    number("weighting moco: beta", beta, above=0, most=1)
    number("weighting moco: sigma", sigma, least=0)
    number("weighting moco: gamma", gamma, above=0)
    number("weighting moco: rho", rho, least=0)

    def rate(start: float, done: jax.Array) -> jax.Array:
        return start / (done + 1.0) ** sigma

    def init(names: Sequence[str]) -> Any:
        return {"weights": jnp.full(len(names), 1 / len(names), jnp.float32), "done": jnp.zeros((), jnp.int32)}

    def update(state: Any, signals: Signals) -> tuple[Weights, Any]:
        gram_KxK, scale, present_K = scaled_gram(signals)
        gram_KxK = gram_KxK * scale + rho * jnp.eye(gram_KxK.shape[0])
        # Absent tasks keep their weights; the present tasks move on a simplex of their own, scaled to the rest of the sum.
        absent_K, w_K = jnp.where(present_K, 0.0, state["weights"]), jnp.where(present_K, state["weights"], 0.0)
        w_K = jnp.where(w_K.sum() > 0, w_K / jnp.maximum(w_K.sum(), TINY), share(present_K))
        weights_K = solvers.onto_simplex(w_K - rate(gamma, state["done"]) * (gram_KxK @ w_K), present_K)
        new_K = jnp.where(present_K, weights_K * (1 - absent_K.sum()), absent_K)
        return unstack(weights_K, signals), {"weights": new_K, "done": state["done"] + 1}

    def init_tracked(gradients: Any) -> Any:
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), gradients)
        return {"tracked": zeros, "done": jnp.zeros((), jnp.int32)}

    def track(state: Any, signals: Signals, gradients: Any) -> tuple[Any, Any]:
        new_K = jnp.where(present(signals), rate(beta, state["done"]), 0.0)
        tracked = jax.tree.map(lambda old, new: old + by_rows(new_K, old) * (new - old), state["tracked"], gradients)
        return tracked, {"tracked": tracked, "done": state["done"] + 1}

    return Rule(
        init=init,
        update=after_transform("moco", update),
        needs_gram=True,
        transform=Transform(init_tracked, track),
        weighs_heads=False,
    )
