"""A function of every task, such as its head and its loss: one call for all tasks that compute the same."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.tasks import Task

OfTask = Callable[[Task, Any], Any]  # (task, its inputs, a pytree of arrays) -> a pytree of arrays


def each_task(function: OfTask, tasks: Sequence[Task], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """{task: function(task, inputs[task])}, with one vmapped call for all tasks that compute the same.

    Two tasks compute the same if the function has the same jaxpr for both, so any kind of task takes part, a user's own, too. A
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
            closed = jax.make_jaxpr(lambda given, task=task: function(task, given))(inputs[task.name])
            text = str(closed.jaxpr)
            same = next((known for name, consts, known in programs if name == text and _equal(consts, closed.consts)), None)
            if same is None:
                programs.append((text, closed.consts, [task]))
            else:
                same.append(task)
        groups += [of_shape] if len(of_shape) == 1 else [group for _, _, group in programs]
    return groups


def _equal(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether two functions have the same constants: the same object, as a tracer must be, or the same numbers."""

    def same(one: Any, other: Any) -> bool:
        if one is other or isinstance(one, jax.core.Tracer) or isinstance(other, jax.core.Tracer):
            return one is other
        return np.shape(one) == np.shape(other) and bool(np.array_equal(one, other))

    return len(some) == len(others) and all(map(same, some, others))
