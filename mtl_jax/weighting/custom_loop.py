"""Weighting rules in a custom training loop: from task gradients to the gradient that an optimizer follows.

    loss_of = lambda params, task: ...                                # f32[]
    gradients = {task: jax.grad(loss_of)(params, task) for task in tasks}
    gradient, weights, state = gradient(rule, state, gradients, losses, step=step, key=key)

The train step does the same with fewer backward passes, as it knows which rows belong to which task.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.core.errors import UserError, listed
from mtl_jax.weighting.base import Rule, Signals, Weights, head_weights, weigh


def gram(task_gradients: Mapping[str, Any]) -> jax.Array:
    """Inner products of task gradients: f32[K, K], rows in the sorted order of the tasks.

    Args:
        task_gradients: {task: a tree of arrays}, all of one structure and with the same shapes.

    Raises:
        UserError: There are none, or two of them differ in structure or shapes.
    """
    return _gram(_stacked(task_gradients))


def cross(first: Mapping[str, Any], second: Mapping[str, Any]) -> jax.Array:
    """Signals.cross, inner products of task gradients of two independent batches, or halves of one: f32[K, K].

    Args:
        first: {task: a tree of arrays}, the gradient of its mean loss on one half; the rows, in sorted order.
        second: The same tasks' gradients on the other half; the columns.

    Raises:
        UserError: There are none, or two of them differ in structure or shapes.
    """
    if sorted(first) != sorted(second):
        raise UserError(f"the two halves are of the tasks {listed(sorted(first))} and of {listed(sorted(second))}")
    rows = _stacked({f"{half}{task}": tree for half, by_task in enumerate((first, second)) for task, tree in by_task.items()})
    return _gram(rows)[: len(first), len(first) :]


def look_ahead(loss: Callable[[Any], jax.Array], params: Any, task_gradients: Mapping[str, Any]) -> jax.tree_util.Partial:
    """Signals.held_out from a loss on held-out rows; it may be an argument of a jitted function.

    Args:
        loss: Parameters to f32[], the loss on rows that are not trained on. A jitted function that gets the result is compiled
            once for each loss, so give it the same function in every step.
        params: The parameters of this step that the task gradients are by.
        task_gradients: {task: gradient of its loss}, trees like the parameters.

    Raises:
        UserError: There are none, or two of them differ in structure or shapes.
    """
    return jax.tree_util.Partial(_Derivative(loss), params, _stacked(task_gradients))


@dataclasses.dataclass(frozen=True)
class _Derivative:
    """The function of look_ahead(); two are equal if their losses are, so jax.jit does not compile for every new one."""

    loss: Callable[[Any], jax.Array]

    def __call__(self, params: Any, rows: Any, weights: Weights, rate: float) -> jax.Array:
        move = _combined(rows, weights)
        ahead = jax.grad(self.loss)(jax.tree.map(lambda leaf, change: leaf - rate * change, params, move))
        products = jax.tree.map(lambda row, slope: jnp.tensordot(row, slope, axes=slope.ndim), rows, ahead)
        return -jax.tree.reduce(jnp.add, products)


def gradient(
    rule: Rule,
    state: Any,
    task_gradients: Mapping[str, Any],
    losses: Mapping[str, jax.Array],
    *,
    step: jax.Array | int,
    key: jax.Array,
    counts: Mapping[str, jax.Array] | None = None,
    cross: jax.Array | None = None,
    held_out: Callable[[Weights, float], jax.Array] | None = None,
) -> tuple[Any, Weights, Any]:
    """The gradient of the shared parameters under any rule, also under a rule that changes the task gradients.

    Pure, and the same as in the train step; it may be jitted, with the rule closed over. A head belongs to one task and follows
    its own gradient; multiply that by the weight that for_heads() gives.

    Args:
        rule: The rule, which may be inside combinators.
        state: rule.init(names) or init() before the first step, then the state that the last step returned. For a rule with a
            transform that is {"rule": ..., "transform": ...}, which init() makes from the start.
        task_gradients: {task: gradient of its loss by the shared parameters}, trees of one structure.
        losses: {task: f32[]}, the losses of this step.
        step: Steps done before this one.
        key: PRNG key of this step.
        counts: {task: f32[]}, labelled examples; a task with none is absent. None: all are present.
        cross: cross(...), for a rule with needs_cross.
        held_out: look_ahead(...), for a rule with held_out.

    Returns:
        The combined gradient, a tree like each of the task gradients, float32; {task: f32[]}, the weights; the new state.

    Raises:
        UserError: Gradients and losses are not of the same tasks, or gradients differ in structure or shapes.
    """
    names = sorted(task_gradients)
    for argument, by_name in (("losses", losses), ("counts", counts)):
        if by_name is not None and sorted(by_name) != names:
            raise UserError(f"{argument} are of the tasks {listed(sorted(by_name))}, and task_gradients of {listed(names)}")
    rows = _stacked(task_gradients)
    by_task = {name: jnp.asarray(losses[name], jnp.float32) for name in names}
    present = None if counts is None else {name: jnp.asarray(counts[name], jnp.float32) for name in names}
    signals = Signals(by_task, None, jnp.asarray(step, jnp.int32), key, present, cross=cross, held_out=held_out)
    if rule.transform is None:
        signals = signals._replace(gram=_gram(rows) if rule.needs_gram else None)
    elif not _has_transform(state):
        state = {"rule": state, "transform": rule.transform.init(rows)}
    weights, state, _, rows = weigh(rule, state, signals, rows, _gram)
    return _combined(rows, weights), weights, state


def for_heads(rule: Rule, state: Any, weights: Weights) -> Weights:
    """{task: f32[]}: the weight of each head's own gradient, as the train step has it: never below 0, and 1 for plain losses.

    Args:
        rule: The rule.
        state: Its state before the step, as given to gradient().
        weights: The weights that gradient() returned.
    """
    if not rule.weighs_heads:
        return {task: jnp.ones(()) for task in weights}
    of_heads = head_weights(rule, state if rule.transform is None or _has_transform(state) else {"rule": state}, weights)
    return {task: jnp.maximum(weight, 0.0) for task, weight in (of_heads or weights).items()}


def init(rule: Rule, task_gradients: Mapping[str, Any]) -> Any:
    """The state for gradient(), with the same structure in all steps, as jax.lax.scan and checkpoints need it.

    Args:
        rule: The rule.
        task_gradients: As for gradient(); shapes are enough.

    Raises:
        UserError: As rule.init.
    """
    names = sorted(task_gradients)
    if rule.transform is None:
        return rule.init(names)
    rows = jax.eval_shape(_stacked, dict(task_gradients))
    return {"rule": rule.init(names), "transform": rule.transform.init(rows)}


def _has_transform(state: Any) -> bool:
    return isinstance(state, Mapping) and set(state) == {"rule", "transform"}


def _stacked(task_gradients: Mapping[str, Any]) -> Any:
    """One tree, leaves f32[K, ...] in the sorted order of the tasks."""
    if not task_gradients:
        raise UserError("task_gradients is empty; give the gradient of each task's loss")
    names = sorted(task_gradients)
    trees = [task_gradients[name] for name in names]
    shapes = [(jax.tree.structure(tree), [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]) for tree in trees]
    for name, shape in zip(names, shapes, strict=True):
        if shape != shapes[0]:
            raise UserError(f"the gradients of the tasks {names[0]!r} and {name!r} are not by the same parameters")
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf, jnp.float32) for leaf in leaves]), *trees)


def _gram(rows: Any) -> jax.Array:
    def inner(leaf: jax.Array) -> jax.Array:
        flat_KxP = leaf.reshape(len(leaf), -1)
        return jnp.matmul(flat_KxP, flat_KxP.T, precision="highest")

    leaves = jax.tree.leaves(rows)
    return sum((inner(leaf) for leaf in leaves[1:]), inner(leaves[0]))


def _combined(rows: Any, weights: Weights) -> Any:
    weights_K = jnp.stack([weights[name] for name in sorted(weights)])
    return jax.tree.map(lambda leaf: jnp.tensordot(weights_K, leaf, axes=1), rows)
