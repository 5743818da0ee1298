"""A function of every task, such as its head and its loss: one call for all tasks that compute the same."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from mtl_jax.tasks import Task

OfTask = Callable[[Task, Any], Any]  # (task, its inputs, a pytree of arrays) -> a pytree of arrays


def each_task(function: OfTask, tasks: Sequence[Task], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """{task: function(task, inputs[task])}, with one vmapped call for all tasks that compute the same.

    Two tasks compute the same if the function has the same jaxpr for both, so any kind of task takes part, a user's own, too;
    one that calls Python (jax.pure_callback), or has a backward pass of its own (jax.custom_vjp), is computed by itself. A
    hundred tasks of a kind then have one large product in place of a hundred small ones. An array that all of them read, such
    as the batch, is read as it is; their own arrays are stacked.

    Args:
        function: Must be pure. It gets arrays in its second argument only: those of other tasks may stand for the task's own.
        tasks: The tasks.
        inputs: {task: a pytree of arrays}.

    Examples:
        >>> tasks = [mtl_jax.Classification(name=name, source="s", labels=("a", "b")) for name in ("x", "y")]
        >>> outputs = each_task(lambda task, x: x * task.outputs, tasks, {"x": jnp.array(1.0), "y": jnp.array(2.5)})
        >>> jax.tree.map(float, outputs)
        {'x': 2.0, 'y': 5.0}
    """
    results: dict[str, Any] = {}
    for group in _alike(function, tasks, inputs):
        if len(group) == 1:
            results[group[0].name] = function(group[0], inputs[group[0].name])
            continue
        columns = zip(*(jax.tree.leaves(inputs[task.name]) for task in group), strict=True)
        structure = jax.tree.structure(inputs[group[0].name])
        axes, stacked = [], []
        for column in columns:
            is_shared = all(leaf is column[0] for leaf in column)
            axes.append(None if is_shared else 0)
            stacked.append(column[0] if is_shared else jnp.stack(column))

        if all(axis is None for axis in axes):  # the same program of the same arrays
            results |= dict.fromkeys([task.name for task in group], function(group[0], inputs[group[0].name]))
            continue

        def of_one(*leaves: Any, task: Task = group[0], structure: Any = structure) -> Any:
            return function(task, jax.tree.unflatten(structure, leaves))

        together = jax.vmap(of_one, in_axes=axes, axis_size=len(group))(*stacked)
        results |= {task.name: jax.tree.map(lambda leaf, n=n: leaf[n], together) for n, task in enumerate(group)}
    return {task.name: results[task.name] for task in tasks}


def _alike(function: OfTask, tasks: Sequence[Task], inputs: Mapping[str, Any]) -> list[list[Task]]:
    """The tasks in groups that compute the same; large heads, whose parameters are too many to be copied, are alone."""
    by_shape: dict[Hashable, list[Task]] = {}
    for number, task in enumerate(tasks):
        leaves, structure = jax.tree.flatten(inputs[task.name])
        shapes = tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
        key = number if task.large else (type(task), task.outputs, structure, shapes)
        by_shape.setdefault(key, []).append(task)
    groups: list[list[Task]] = []
    for of_shape in by_shape.values():
        programs: list[tuple[str, list[Any], list[Task]]] = []
        for task in of_shape if len(of_shape) > 1 else ():
            program = _program(functools.partial(function, task), inputs[task.name])
            if program is None:
                groups.append([task])
                continue
            text, consts = program
            same = next((known for name, others, known in programs if name == text and _equal(others, consts)), None)
            if same is None:
                programs.append((text, consts, [task]))
            else:
                same.append(task)
        groups += [of_shape] if len(of_shape) == 1 else [group for _, _, group in programs]
    return groups


def _program(function: Callable[[Any], Any], inputs: Any) -> tuple[str, list[Any]] | None:
    """The text and constants that tell what a function computes; None where its jaxpr does not show all of it.

    A jaxpr shows neither the functions of callbacks nor the rules of jax.custom_vjp. Those of jax.custom_jvp, which many of
    jax's own functions have, show in the jaxpr of the derivative.
    """
    closed = jax.make_jaxpr(function)(inputs)
    has_rules, is_shown = _rules(closed.jaxpr)
    if not is_shown:
        return None
    if not has_rules:
        return str(closed.jaxpr), closed.consts
    leaves, structure = jax.tree.flatten(inputs)
    places = [place for place, leaf in enumerate(leaves) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]

    def derivative(leaves: list[Any]) -> Any:
        def of_floats(floats: list[Any]) -> Any:
            given = dict(zip(places, floats, strict=True))
            return function(jax.tree.unflatten(structure, [given.get(place, leaf) for place, leaf in enumerate(leaves)]))

        floats = [leaves[place] for place in places]
        return jax.jvp(of_floats, (floats,), (floats,))

    closed = jax.make_jaxpr(derivative)(leaves)
    return (str(closed.jaxpr), closed.consts) if _rules(closed.jaxpr)[1] else None


def _rules(jaxpr: Any) -> tuple[bool, bool]:
    """Whether a jaxpr has rules of jax.custom_jvp, and whether it shows everything else."""
    has_rules, is_shown = False, True
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        is_rule = name.startswith("custom_jvp_call")
        is_shown &= not (name.startswith("custom_vjp_call") or "callback" in name)
        has_rules |= is_rule
        for value in jax.tree.leaves(list(equation.params.values())):
            if isinstance(value, ClosedJaxpr | Jaxpr):
                inner_rules, inner_shown = _rules(value.jaxpr if isinstance(value, ClosedJaxpr) else value)
                has_rules, is_shown = has_rules | inner_rules, is_shown & inner_shown
            elif inspect.isroutine(value) or isinstance(value, functools.partial):
                is_shown &= is_rule
    return has_rules, is_shown


def _equal(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether two functions have the same constants: the same object, as a tracer must be, or the same numbers."""

    def same(one: Any, other: Any) -> bool:
        if one is other or isinstance(one, jax.core.Tracer) or isinstance(other, jax.core.Tracer):
            return one is other
        return np.shape(one) == np.shape(other) and bool(np.array_equal(one, other))

    return len(some) == len(others) and all(map(same, some, others))
