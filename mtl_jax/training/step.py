"""The train step: losses, weights, gradient, update. Pure; the whole program on one screen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mtl_jax.core import trees
from mtl_jax.training.forward import count_made, count_rows
from mtl_jax.training.gradient import BackwardFn, GradientFn, StepGradients
from mtl_jax.training.task_gradients import gram_of_rows
from mtl_jax.training.train_state import StepInputs, StepMetrics, TrainState
from mtl_jax.transfer import averaging
from mtl_jax.weighting import Rule, Signals, head_weights, weigh, weighted_sum


def make_train_step(
    gradient_fn: GradientFn,
    optimizer: optax.GradientTransformation,
    mask: Any,
    sources: int = 0,
    follow: Callable[[Any, Any], Any] = averaging.as_it_is,
) -> Callable[[TrainState, StepInputs], tuple[TrainState, StepMetrics]]:
    """The step function of a phase, to be jitted by the caller: (state, inputs) -> (new state, metrics).

    Args:
        gradient_fn: make_gradient_fn(...), or one with transforms around it (build_step.py).
        optimizer: An optax transformation over the trainable leaves.
        mask: freezing.trainable(params, rules).
        sources: N, for StepMetrics.seen.
        follow: How the average of the trainable leaves follows them.
    """

    def train_step(state: TrainState, inputs: StepInputs) -> tuple[TrainState, StepMetrics]:
        trained, frozen = trees.split(state.params, mask)
        step = gradient_fn(trained, frozen, inputs, state)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(step.gradient, state.opt_state, trained)
            trained = optax.apply_updates(trained, updates)
        params, average = trees.merge(trained, frozen), follow(state.average, trained)
        total, norm = weighted_sum(step.weights, step.losses), trees.norm(step.gradient)
        seen, made = count_rows(inputs.batch, sources), count_made(inputs.batch, sources)
        metrics = StepMetrics(step.losses, step.counts, step.weights, total, norm, seen, step.gram, step.residual, made)
        return TrainState(state.step + 1, params, opt_state, step.rule_state, state.key, average), metrics

    return train_step


def make_gradient_fn(
    backward: BackwardFn,
    rule: Rule,
    regulariser_weights: Callable[[jax.Array], Mapping[str, jax.Array]] = lambda step: {},
    without_gram: BackwardFn | None = None,
) -> GradientFn:
    """From losses to weights to the gradient of their weighted sum.

    Args:
        backward: gradient.make_backward(...), or gram_gradient.make_backward(...) for a rule that compares task gradients.
        rule: The weighting rule, for the tasks.
        regulariser_weights: Step -> {regulariser: f32[]}, from their schedules.
        without_gram: The pass of the steps in which the rule is not due to compare gradients; None: it is due in every step.
    """

    def weighted(
        backward: BackwardFn, trained: Any, frozen: Any, inputs: StepInputs, state: TrainState, not_due: tuple[()] | None = None
    ) -> StepGradients:
        trunk_key, head_key, rule_key = jax.random.split(state.step_key(), 3)
        losses, counts, pull, gram, rows, cross, held_out, _ = backward(trained, frozen, inputs, (trunk_key, head_key))
        signals = Signals(losses, gram, state.step, rule_key, counts, None, cross, held_out, not_due)
        weights, rule_state, residual, rows = weigh(rule, state.rule_state, signals, rows, gram_of_rows)
        of_heads = head_weights(rule, state.rule_state, weights)
        weights = {**weights, **regulariser_weights(state.step)}
        gradient, losses = pull(weights, rows, of_heads)
        return StepGradients(gradient, losses, counts, weights, rule_state, gram, None if rule.solve is None else residual)

    def gradient_fn(trained: Any, frozen: Any, inputs: StepInputs, state: TrainState) -> StepGradients:
        arguments = trained, frozen, inputs, state
        if rule.due is None or without_gram is None:
            return weighted(backward, *arguments)

        def not_due() -> StepGradients:
            step = weighted(without_gram, *arguments, not_due=())
            return step._replace(gram=jnp.full((len(step.counts),) * 2, jnp.nan))

        return jax.lax.cond(rule.due(state.rule_state), lambda: weighted(backward, *arguments), not_due)

    return gradient_fn
