"""Rules around rules; in a configuration a list such as ("ema:decay=0.9", "normalized"), the innermost first.

A combinator changes the weights of the rule inside it. So subset goes last: an ema around subset would give the tasks that were
not drawn the mean of earlier steps, and a lower bound around subset would give them that bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.core.errors import UserError, there_are
from mtl_jax.weighting import base
from mtl_jax.weighting.base import Rule, Signals, Weights, by_rows, present, share, stack, unstack, wrap
from mtl_jax.weighting.options import number


def normalized(rule: Rule, total: float | None = None) -> Rule:
    """The rule's weights, scaled to a given sum.

    Rules differ in the sum of their weights (1, K, anything), which is a change of the learning rate; with this an ablation
    compares like with like. Weights that sum to less than 1e-6 of the largest, or to less than 0, become equal ones.

    Args:
        rule: The rule.
        total: The sum, above 0; None: the number of tasks, as in the plain sum of losses.

    Raises:
        UserError: The total is not above 0, or not finite.
    """
    if total is not None:
        number("normalized: total", total, above=0)

    def solve(state: Any, signals: Signals) -> tuple[Weights, Any, jax.Array]:
        weights, state, residual = base.solve(rule, state, signals)
        weights_K, present_K = stack(weights), present(signals)
        target = jnp.maximum(present_K.sum(), 1) if total is None else total
        largest = jnp.maximum(jnp.abs(weights_K).max(), 1e-30)
        relative_K = weights_K / largest  # a sum of huge weights could overflow
        scalable = relative_K.sum() > 1e-6
        weights_K = jnp.where(scalable, relative_K / jnp.where(scalable, relative_K.sum(), 1.0), share(present_K))
        return unstack(target * weights_K, signals), state, residual

    return wrap(rule, solve, objective=None)


def every(rule: Rule, k: int) -> Rule:
    """The rule's weights, computed in every k-th step and kept in between; the steps between cost no more than fixed weights.

    A task that was absent when the weights were computed has no weight until they are computed again. In a step in which
    Rule.due is false the Gram matrix need not be there: pass Signals.not_due=() where the program is traced.

    Args:
        rule: The rule.
        k: At least 1.

    Raises:
        UserError: k is below 1, or the rule changes the gradients themselves, in every step.
    """
    k = int(number("every: k", k, least=1, whole=True))
    if rule.transform is not None:
        raise UserError("every: this rule changes the task gradients in every step; use it without every")

    def init(names: Sequence[str]) -> Any:
        return {"rule": rule.init(names), "since": jnp.zeros((), jnp.int32), "held": jnp.zeros(len(names))}

    def due(state: Any) -> jax.Array:
        return state["since"] % k == 0

    def solve(state: Any, signals: Signals) -> tuple[Weights, Any, jax.Array]:
        def renew(state: Any) -> tuple[jax.Array, Any, jax.Array]:
            weights, inner, residual = base.solve(rule, state["rule"], signals)
            return stack(weights), inner, residual

        def keep(state: Any) -> tuple[jax.Array, Any, jax.Array]:
            return state["held"], state["rule"], jnp.full((), jnp.nan)

        def known_not_due() -> bool:
            return not isinstance(state["since"], jax.core.Tracer) and not due(state)

        lacks = base.lacking(rule._replace(held_out=None), signals)
        if signals.not_due is not None or (lacks and known_not_due()):
            kept_K, inner, residual = keep(state)
        else:
            kept_K, inner, residual = jax.lax.cond(due(state), renew, keep, state)
        return unstack(kept_K, signals), {"rule": inner, "since": (state["since"] + 1) % k, "held": kept_K}, residual

    fields = {"due": due if rule.needs_gram or rule.needs_cross else None, "head_weights": _of_inner(rule.head_weights)}
    return wrap(rule, solve, init=init, objective=None, **fields)


def subset(rule: Rule, s: int, temperature: float = 1.0) -> Rule:
    """In each step the rule sees s tasks, drawn without replacement; the others have weight 0.

    A task's chance is proportional to its number of labelled examples in the step to the power 1 / temperature. A rule that
    changes the task gradients sees those of the same tasks; the others' are 0, as those of absent tasks are.

    Args:
        rule: The rule.
        s: Number of tasks that are drawn, at least 1.
        temperature: Above 0; inf draws all tasks with the same chance.

    Raises:
        UserError: An option is out of range; at init, s is above the number of tasks.
    """
    s = int(number("subset: s", s, least=1, whole=True))
    number("subset: temperature", temperature, above=0, infinite=True)

    def init(names: Sequence[str]) -> Any:
        if s > len(names):
            raise UserError(f"subset: s is {s}, but {there_are(len(names), 'task')}")
        return rule.init(names)

    def drawn(signals: Signals) -> Signals:
        """The signals with a count of 0 for every task that was not drawn, and unused keys.

        The transform and the weights draw with the same key, and so the same tasks.
        """
        present_K = present(signals)
        counts_K = present_K.astype(jnp.float32) if signals.counts is None else stack(signals.counts)
        draw_key, key = jax.random.split(signals.key)
        rule_key = signals.rule_key
        if rule_key is not None:
            draw_key, rule_key = jax.random.split(rule_key)
        chance_K = jnp.log(jnp.maximum(counts_K, 1e-30)) / temperature + jax.random.gumbel(draw_key, counts_K.shape)
        place_K = jnp.argsort(jnp.argsort(-jnp.where(present_K, chance_K, -jnp.inf)))
        drawn_K = jnp.where(place_K < s, counts_K, 0.0)
        counts = dict(zip(sorted(signals.losses), drawn_K, strict=True))
        return signals._replace(counts=counts, key=key, rule_key=rule_key)

    def solve(state: Any, signals: Signals) -> tuple[Weights, Any, jax.Array]:
        return base.solve(rule, state, drawn(signals))

    transform = rule.transform
    if transform is not None:
        inner = transform

        def change(state: Any, signals: Signals, gradients: Any) -> tuple[Any, Any]:
            of_drawn = drawn(signals)
            present_K = present(of_drawn)
            only_drawn = jax.tree.map(lambda leaf: jnp.where(by_rows(present_K, leaf), leaf, 0.0), gradients)
            return inner.update(state, of_drawn, only_drawn)

        transform = inner._replace(update=change)
    return wrap(rule, solve, init=init, objective=None, transform=transform)


def clipped(rule: Rule, low: float = 0.0, high: float = math.inf) -> Rule:
    """The rule's weights, each kept between two bounds.

    Args:
        rule: The rule.
        low: Smallest weight of a present task, also of one that a subset inside left out.
        high: Largest weight, not below low.

    Raises:
        UserError: The bounds are not in order.
    """
    number("clipped: low", low)
    number("clipped: high", high, infinite=True)
    if not low <= high:
        raise UserError(f"clipped: low is {low} and high is {high}; low must not be above high")

    def solve(state: Any, signals: Signals) -> tuple[Weights, Any, jax.Array]:
        weights, state, residual = base.solve(rule, state, signals)
        return unstack(jnp.clip(stack(weights), low, high), signals), state, residual

    return wrap(rule, solve, objective=None)


def ema(rule: Rule, decay: float = 0.9) -> Rule:
    """The rule's weights, averaged over steps: w <- decay w(before) + (1 - decay) w, from the first weights on.

    Args:
        rule: The rule.
        decay: Share of the past, at least 0 and below 1.

    Raises:
        UserError: The decay is out of range.
    """
    number("ema: decay", decay, least=0, below=1)

    def init(names: Sequence[str]) -> Any:
        return {"rule": rule.init(names), "mean": jnp.zeros(len(names)), "seen": jnp.zeros(len(names), bool)}

    def solve(state: Any, signals: Signals) -> tuple[Weights, Any, jax.Array]:
        weights, inner, residual = base.solve(rule, state["rule"], signals)
        weights_K, present_K = stack(weights), present(signals)
        past_K = jnp.where(state["seen"], decay, 0.0)
        mean_K = jnp.where(present_K, past_K * state["mean"] + (1 - past_K) * weights_K, state["mean"])
        return unstack(mean_K, signals), {"rule": inner, "mean": mean_K, "seen": state["seen"] | present_K}, residual

    return wrap(rule, solve, init=init, objective=None, due=_of_inner(rule.due), head_weights=_of_inner(rule.head_weights))


def _of_inner(function: Callable[[Any], Any] | None) -> Callable[[Any], Any] | None:
    """A function of the inner rule's state as one of the outer rule's."""
    return None if function is None else lambda state: function(state["rule"])
