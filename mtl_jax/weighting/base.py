"""The interface of a weighting rule, pure functions like an optax transformation, and what all rules share.

Rule, Signals and Transform are the interface; then come what asks for signals, what applies a rule, and stacking by task.

Shapes in names: K tasks, in sorted order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec

import jax
import jax.numpy as jnp

from mtl_jax.core.errors import UserError

Weights = dict[str, jax.Array]

SMALLEST = 1e-6  # of the largest loss: the least that a loss counts as where a weight is its inverse
TINY = 1e-30  # stands for zero where a logarithm or a quotient is taken


class Signals(NamedTuple):
    """The inputs of a rule at one step.

    Attributes:
        losses: {task: f32[]}, this step's mean losses; 0 for a task that is absent.
        gram: f32[K, K], inner products of the task gradients, rows in the order of the losses' sorted keys; None if the rule
            does not need it.
        step: i32[], steps done before this one.
        key: PRNG key of this step, for rules that draw.
        counts: {task: f32[]}, labelled examples in this step; a task without any is absent, and the rule is applied to the
            others. None: all tasks are present.
        transformed: () if the gradients have gone through the rule's transform, or (the result of Transform.tells,); else None.
            Not an array, so that it is known while a program is traced.
        cross: f32[K, K], for Rule.needs_cross: row i and column j is the inner product of task i's mean gradient in one half
            of the batch with task j's in the other half, which is independent of it. Row and column of a task are 0 where it
            has no labelled example in one of the halves. None if the rule does not need it.
        held_out: For Rule.held_out: (weights, rate) -> f32[K], the derivative of L(theta - rate sum_i w_i g_i) by each weight,
            divided by the rate, which may be 0. theta are the parameters, g_i this step's task gradients, and L is the sum of
            the losses on the held-out rows. That is -<grad L, g_k>, the gradient of L being taken after the step. None if the
            rule does not need it. A function of one's own must be a jax.tree_util.Partial to pass jax.jit as an argument.
        not_due: () if the caller has asked Rule.due, and it is false in this step: then gram and cross need not be there. Else
            None. Not an array, as `transformed`.
        rule_key: Only for a transform: the key that the rule's weights get in this step, which is another one than `key`. What
            weights and transform draw together, as `subset` does, is drawn from it. Else None.
    """

    losses: dict[str, jax.Array]
    gram: jax.Array | None
    step: jax.Array
    key: jax.Array
    counts: dict[str, jax.Array] | None = None
    transformed: tuple[jax.Array, ...] | None = None
    cross: jax.Array | None = None
    held_out: Callable[[Weights, float], jax.Array] | None = None
    not_due: tuple[()] | None = None
    rule_key: jax.Array | None = None


class HeldOut(NamedTuple):
    """Rows that a rule measures the weights on: rows of the training split that are not trained on, never dev or test.

    Attributes:
        tasks: The tasks whose losses are summed.
        share: The share of the training rows of these tasks' sources, above 0 and below 1.
    """

    tasks: tuple[str, ...]
    share: float


class Transform(NamedTuple):
    """A change of the task gradients themselves, before they are compared and summed.

    It is for the few methods that are not a weighted sum of this step's gradients. Its state may be as large as the gradients.
    In a run it gets the gradients of the trunk's shared parameters; those of single tasks have no gradient of another task.

    Attributes:
        init: Task gradients (arrays or shapes), leaves [K, ...] in sorted order, to a state.
        update: (state, Signals without gram, task gradients) to (changed task gradients, new state).
        tells: (new state, task gradients before the change) to f32[K], what the rule's weights need to know of the gradients
            besides their Gram matrix; None: nothing.
        by_number: Whether it has no state and makes every number from the K numbers at its place, zeros from zeros. Then rows
            of a token table that no task reads are left out.
    """

    init: Callable[[Any], Any]
    update: Callable[[Any, Signals, Any], tuple[Any, Any]]
    tells: Callable[[Any, Any], jax.Array] | None = None
    by_number: bool = False


class Rule(NamedTuple):
    """A weighting rule.

    Attributes:
        init: Task names, in order, to the rule's state: any pytree of arrays, which is part of the train state.
        update: (state, Signals) to (weights, new state); weights is {task: f32[]}, 0 for absent tasks, and carries no gradient.
        needs_gram: Whether Signals.gram must be computed.
        objective: (state, Signals) to f32[], if the weights are the derivative of one number by the losses; else None.
        transform: Set if the rule changes the task gradients; Signals.gram is then of the changed gradients. The weights alone
            are not the rule, so update() asks for Signals.transformed; custom_loop.gradient and the train step apply both.
        due: (state) to bool[], if the rule needs the Gram matrix in some steps only; else None. See Signals.not_due.
        weighs_heads: Whether a head's own gradient is multiplied by its task's weight, as in the weighted sum of losses. False:
            the weights are for the shared parameters, and every head follows its plain loss. If True, a head with a negative
            weight does not move: it never climbs its own loss.
        solve: As update, with the relative residual of the solution, if the rule solves a problem; else None. See solve().
        name: Its name, for errors and files; empty for a Rule that a script puts together itself.
        needs_cross: Whether Signals.cross must be computed.
        held_out: The rows on which Signals.held_out measures weights; None: the rule needs none.
        head_weights: (state) to f32[K], the weights of the heads' own gradients in this step, if they are neither those of the
            shared parameters nor 1; else None. It needs weighs_heads.
    """

    init: Callable[[Sequence[str]], Any]
    update: Callable[[Any, Signals], tuple[Weights, Any]]
    needs_gram: bool = False
    objective: Callable[[Any, Signals], jax.Array] | None = None
    transform: Transform | None = None
    due: Callable[[Any], jax.Array] | None = None
    weighs_heads: bool = True
    solve: Callable[[Any, Signals], tuple[Weights, Any, jax.Array]] | None = None
    name: str = ""
    needs_cross: bool = False
    held_out: HeldOut | None = None
    head_weights: Callable[[Any], jax.Array] | None = None


P = ParamSpec("P")


def named(make: Callable[P, Rule]) -> Callable[P, Rule]:
    """A decorator for functions that make a rule: the rule has the function's name, and asks for the signals it needs."""

    @functools.wraps(make)
    def make_named(*args: P.args, **options: P.kwargs) -> Rule:
        return asks_for_signals(make(*args, **options)._replace(name=make.__name__))

    return make_named


def asks_for_signals(rule: Rule) -> Rule:
    """The rule; where it needs a signal that is None, it says which, and what makes it."""
    if not (rule.needs_gram or rule.needs_cross or rule.held_out):
        return rule

    def asking(function: Callable[[Any, Signals], Any]) -> Callable[[Any, Signals], Any]:
        @functools.wraps(function)
        def asked(state: Any, signals: Signals) -> Any:
            if lack := lacking(rule, signals):
                raise UserError(f"weighting {rule.name} needs Signals.{lack}, {MAKES[lack]}")
            return function(state, signals)

        return asked

    return rule._replace(update=asking(rule.update), solve=None if rule.solve is None else asking(rule.solve))


# {field of Signals: what it is, and the call that makes it}
MAKES = {
    "gram": "the inner products of the task gradients: mtl_jax.weighting.gram(task_gradients)",
    "cross": "the inner products of task gradients of two independent halves: mtl_jax.weighting.cross(first, second)",
    "held_out": "the derivative of a loss on held-out rows: mtl_jax.weighting.look_ahead(loss, params, task_gradients)",
}


def lacking(rule: Rule, signals: Signals) -> str:
    """The first field of Signals that a rule needs and that is None; "" if there is none.

    The Gram matrix of a rule with a transform is that of changed gradients: before the transform it cannot be there.
    """
    needs_gram = rule.needs_gram and (rule.transform is None or signals.transformed is not None)
    is_due = signals.not_due is None
    needed = {"gram": is_due and needs_gram, "cross": is_due and rule.needs_cross, "held_out": rule.held_out is not None}
    return next((field for field, needs in needed.items() if needs and getattr(signals, field) is None), "")


def example_signals(rule: Rule, losses: dict[str, jax.Array], gram: jax.Array | None = None) -> Signals:
    """Signals with every field that a rule needs, for looking at the program of its update.

    Args:
        rule: The rule.
        losses: {task: f32[]}, also used as counts.
        gram: f32[K, K], used as cross, too; None: the unit matrix.
    """
    if gram is None and (rule.needs_gram or rule.needs_cross or rule.held_out):
        gram = jnp.eye(len(losses))
    return Signals(
        losses,
        gram if rule.needs_gram else None,
        jnp.zeros((), jnp.int32),
        jax.random.key(0),
        losses,
        transformed=None if rule.transform is None else () if rule.transform.tells is None else (stack(losses),),
        cross=gram if rule.needs_cross else None,
        held_out=None if rule.held_out is None else lambda weights, rate: -rate * jnp.asarray(gram) @ stack(weights),
    )


def head_weights(rule: Rule, state: Any, weights: Weights) -> Weights | None:
    """The weights of the heads' own gradients in a step, for rules that do not give them those of the shared parameters.

    Args:
        rule: The rule.
        state: Its state before the step; with a transform {"rule": ..., "transform": ...}.
        weights: The rule's weights in the step: their tasks.

    Returns:
        {task: f32[]}; None: the heads' weights are as Rule.weighs_heads says.
    """
    if rule.head_weights is None:
        return None
    of_heads_K = rule.head_weights(state if rule.transform is None else state["rule"])
    return dict(zip(sorted(weights), of_heads_K, strict=True))


def after_transform(name: str, update: Callable[[Any, Signals], tuple[Weights, Any]]) -> Callable[..., tuple[Weights, Any]]:
    """The update of a rule with a transform; it refuses signals whose gradients have not gone through the transform.

    Args:
        name: The rule's name.
        update: The rule's weights, from the changed gradients.
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
    """The result of rule.update, and the distance of the weights from the solution of the rule's problem.

    Returns:
        Weights, new state, and the relative residual, f32[]: 0 if the problem is solved, of the order of 1 if it is not solved
        at all, NaN if the rule has no problem to solve in this step.
    """
    if rule.solve is not None:
        return rule.solve(state, signals)
    weights, state = rule.update(state, signals)
    return weights, state, jnp.full((), jnp.nan)


@jax.named_scope("rule")
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
    # Another key than the rule's, which may draw, too.
    transform_signals = signals._replace(gram=None, key=jax.random.fold_in(signals.key, 1), rule_key=signals.key)
    changed, transform_state = rule.transform.update(state["transform"], transform_signals, rows)
    told = () if rule.transform.tells is None else (rule.transform.tells(transform_state, rows),)
    rows = changed
    signals = signals._replace(gram=gram(rows) if rule.needs_gram else None, transformed=told)
    weights, rule_state, residual = solve(rule, state["rule"], signals)
    return weights, {"rule": rule_state, "transform": transform_state}, residual, rows


def wrap(rule: Rule, solve: Callable[[Any, Signals], tuple[Weights, Any, jax.Array]], **fields: Any) -> Rule:
    """A rule around another one.

    Args:
        rule: The inner rule.
        solve: As Rule.solve; it passes the inner rule's residual on.
        **fields: Further fields of Rule that differ from the inner rule's.
    """

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


def by_rows(values_K: jax.Array, leaf: jax.Array) -> jax.Array:
    """f32[K], one number for each task, in a shape that multiplies a leaf [K, ...]."""
    return values_K.reshape(-1, *[1] * (leaf.ndim - 1))


def present(signals: Signals) -> jax.Array:
    """bool[K]: which tasks have labelled examples in this step."""
    return jnp.ones(len(signals.losses), bool) if signals.counts is None else stack(signals.counts) > 0


def share(present_K: jax.Array) -> jax.Array:
    """f32[K]: one over the number of present tasks, 0 for absent ones."""
    return present_K / jnp.maximum(present_K.sum(), 1)


def above_zero(losses_K: jax.Array, present_K: jax.Array) -> jax.Array:
    """f32[K]: losses that can be divided by: at least SMALLEST of the largest present loss, and equal if all are 0.

    A loss of exactly 0 is one that float32 cannot tell from 0; its gradient is noise, which must not be magnified.
    """
    largest = jnp.max(jnp.where(present_K, losses_K, 0.0))
    return jnp.maximum(losses_K, jnp.maximum(SMALLEST * largest, TINY))
