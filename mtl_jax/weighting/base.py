"""The shape of a weighting rule: pure functions, like an optax transformation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.core.errors import UserError

Weights = dict[str, jax.Array]

SMALLEST = 1e-6  # of the largest loss: what a loss counts for at least, where a weight is one over it
TINY = 1e-30  # in place of a number of zero, where a logarithm or a quotient is taken


class Signals(NamedTuple):
    """What a rule may look at.

    Attributes:
        losses: {task: f32[]}, this step's mean losses; 0 for a task that is absent.
        gram: f32[K, K], inner products of the task gradients, rows in the order of the losses' sorted keys; None where the
            rule does not need it.
        step: i32[], steps done before this one.
        key: PRNG key of this step, for rules that draw.
        counts: {task: f32[]}, labelled examples in this step; a task with none is absent, and the rule is that of the others.
            None: all tasks are present.
        transformed: () where the gradients have gone through the rule's transform; else None. No array, so that a program
            knows it when it is traced.
    """

    losses: dict[str, jax.Array]
    gram: jax.Array | None
    step: jax.Array
    key: jax.Array
    counts: dict[str, jax.Array] | None = None
    transformed: tuple[()] | None = None


class Transform(NamedTuple):
    """What a rule does to the task gradients themselves, before they are compared and summed.

    The narrow door for the few methods that are no weighted sum of this step's gradients. A state may be as large as they are.

    Attributes:
        init: Task gradients (arrays or shapes), leaves [K, ...] in sorted order, to a state.
        update: (state, Signals without gram, task gradients) to (changed task gradients, new state).
    """

    init: Callable[[Any], Any]
    update: Callable[[Any, Signals, Any], tuple[Any, Any]]


class Rule(NamedTuple):
    """A weighting rule.

    Attributes:
        init: Task names, in order, to the rule's state: any pytree of arrays; it lives in the train state.
        update: (state, Signals) to (weights, new state); weights is {task: f32[]}, 0 for absent tasks, and carries no gradient.
        needs_gram: Whether Signals.gram must be computed.
        objective: (state, Signals) to f32[], where the weights are the derivative of one number by the losses; else None.
        transform: Set where the rule changes the task gradients; Signals.gram is then that of the changed ones. Its weights
            alone are not the rule, so its update() asks for Signals.transformed: own_loop.gradient and the train step do both.
        due: (state) to bool[], where the rule looks at the Gram matrix in some steps only; else None.
        weighs_heads: Whether a head's own gradient is multiplied by its task's weight, as in the weighted sum of losses. False:
            the weights are for what the tasks share, and every head follows its plain loss. Where it is True, a head whose
            weight is below 0 stands still: it never climbs its own loss.
        solve: As update, and the relative residual of what was solved, where the rule solves something; else None. See solve().
    """

    init: Callable[[Sequence[str]], Any]
    update: Callable[[Any, Signals], tuple[Weights, Any]]
    needs_gram: bool = False
    objective: Callable[[Any, Signals], jax.Array] | None = None
    transform: Transform | None = None
    due: Callable[[Any], jax.Array] | None = None
    weighs_heads: bool = True
    solve: Callable[[Any, Signals], tuple[Weights, Any, jax.Array]] | None = None


def after_transform(name: str, update: Callable[[Any, Signals], tuple[Weights, Any]]) -> Callable[..., tuple[Weights, Any]]:
    """The update of a rule with a transform, which is refused to those who have not applied it.

    Args:
        name: The rule.
        update: Its weights, from the changed gradients.
    """

    def checked(state: Any, signals: Signals) -> tuple[Weights, Any]:
        if signals.transformed is None:
            raise UserError(
                f"weighting {name} changes the task gradients, and its weights alone are not the rule; in a loop of your own "
                "call mtl_jax.weighting.gradient(rule, state, task_gradients, losses, step=step, key=key)"
            )
        return update(state, signals)

    return checked


def solve(rule: Rule, state: Any, signals: Signals) -> tuple[Weights, Any, jax.Array]:
    """What rule.update returns, and how far the weights are from the solution of the rule's problem.

    Returns:
        Weights and new state; the residual, f32[]: relative, 0 where the problem is solved, of the order of 1 where it is not
        at all. NaN where the rule solves nothing, or did not in this step.
    """
    if rule.solve is not None:
        return rule.solve(state, signals)
    weights, state = rule.update(state, signals)
    return weights, state, jnp.full((), jnp.nan)


def weigh(
    rule: Rule, state: Any, signals: Signals, rows: Any, gram: Callable[[Any], jax.Array]
) -> tuple[Weights, Any, jax.Array, Any]:
    """The weights by any rule, also one that changes the task gradients before it weighs them.

    Args:
        rule: The rule.
        state: Its state; with a transform {"rule": ..., "transform": ...}.
        signals: Of the step, with the Gram matrix where the rule needs it.
        rows: For a rule with a transform the task gradients, one tree, leaves f32[K, ...] in sorted order; others ignore it.
        gram: Rows to f32[K, K], their inner products.

    Returns:
        As solve(), and the rows, changed where the rule changes them.
    """
    if rule.transform is None:
        return (*solve(rule, state, signals), rows)
    drawing = signals._replace(gram=None, key=jax.random.fold_in(signals.key, 1))  # the rule may draw, too
    rows, transform_state = rule.transform.update(state["transform"], drawing, rows)
    signals = signals._replace(gram=gram(rows) if rule.needs_gram else None, transformed=())
    weights, rule_state, residual = solve(rule, state["rule"], signals)
    return weights, {"rule": rule_state, "transform": transform_state}, residual, rows


def around(rule: Rule, solve: Callable[[Any, Signals], tuple[Weights, Any, jax.Array]], **fields: Any) -> Rule:
    """A rule made from another: these fields, and for update this solve, which hands on the inner rule's residual."""

    def update(state: Any, signals: Signals) -> tuple[Weights, Any]:
        weights, state, _ = solve(state, signals)
        return weights, state

    return rule._replace(update=update, solve=None if rule.solve is None else solve, **fields)


def weighted_sum(weights: Weights, losses: dict[str, jax.Array]) -> jax.Array:
    """The objective, f32[]: sum over tasks of weight times loss."""
    return jax.tree.reduce(lambda total, term: total + term, jax.tree.map(lambda w, loss: w * loss, weights, losses))


def stack(by_task: Mapping[str, jax.Array | float]) -> jax.Array:
    """{task: f32[]} to f32[K], in sorted order."""
    return jnp.stack([jnp.asarray(by_task[task], jnp.float32) for task in sorted(by_task)])


def unstack(values_K: jax.Array, signals: Signals) -> Weights:
    """f32[K] in sorted order to {task: f32[]}; 0 where the task is absent."""
    return dict(zip(sorted(signals.losses), jnp.where(present(signals), values_K, 0.0), strict=True))


def present(signals: Signals) -> jax.Array:
    """bool[K]: which tasks have labelled examples in this step."""
    return jnp.ones(len(signals.losses), bool) if signals.counts is None else stack(signals.counts) > 0


def share(present_K: jax.Array) -> jax.Array:
    """f32[K]: one over the number of present tasks, 0 for absent ones."""
    return present_K / jnp.maximum(present_K.sum(), 1)


def above_zero(losses_K: jax.Array, present_K: jax.Array) -> jax.Array:
    """f32[K]: losses to be divided by: none below SMALLEST of the largest of the present ones; all alike where all are 0.

    A loss of exactly 0 is one that float32 cannot tell from 0; its gradient is noise, which must not be blown up.
    """
    largest = jnp.max(jnp.where(present_K, losses_K, 0.0))
    return jnp.maximum(losses_K, jnp.maximum(SMALLEST * largest, TINY))


def number(
    where: str,
    value: float,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    infinite: bool = False,
    whole: bool = False,
) -> float:
    """The value, if it is a number within its bounds. A traced value passes: inside a program nothing can be refused.

    Args:
        where: Rule and option, for the error: "weighting cagrad: c".
        value: The option.
        above: It must be larger than this.
        least: It must not be smaller.
        below: It must be smaller.
        most: It must not be larger.
        infinite: Whether it may be inf.
        whole: Whether it must be a whole number.

    Raises:
        UserError: It is not.
    """
    if isinstance(value, jax.core.Tracer):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{where} is {value!r}; it must be a number")
    sound = not math.isnan(value) and (infinite or math.isfinite(value)) and (not whole or int(value) == value)
    sound = sound and (above is None or value > above) and (least is None or value >= least)
    sound = sound and (below is None or value < below) and (most is None or value <= most)
    if not sound:
        kind = "a whole number" if whole else "a number" if infinite else "a finite number"
        bounds = [
            f"{word} {bound:g}"
            for word, bound in (("above", above), ("of at least", least), ("below", below), ("of at most", most))
            if bound is not None
        ]
        raise UserError(f"{where} is {value}; it must be {' '.join([kind, ' and '.join(bounds)]).strip()}")
    return int(value) if whole else value


def choice(where: str, value: str, choices: tuple[str, ...]) -> str:
    """The value, if it is one of the choices.

    Raises:
        UserError: It is not.
    """
    if value not in choices:
        raise UserError(f"{where} is {value!r}; it must be {' or '.join(choices)}")
    return value
