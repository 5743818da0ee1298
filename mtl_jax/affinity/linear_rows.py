"""A trained run as a linear model of its trunk's parameters: for each row a value and its projected gradient, for Grad-TAG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.affinity.linear_losses import MARGINS, ROOTS, linear_value, project
from mtl_jax.affinity.source_models import can_fit, has_classes
from mtl_jax.affinity.task_features import TrunkFunction, is_known, kind_of_labels
from mtl_jax.core.trees import leaves_of, put
from mtl_jax.data.batches import Batch
from mtl_jax.models.trunk_output import Encoded
from mtl_jax.tasks import Task

DIMENSIONS = 128
ROWS = 128  # texts, or words, of a task


def can_be_linear(task: Task) -> bool:
    """Whether each row of a task has its own loss, a cross-entropy or a squared error."""
    return bool(kind_of_labels(task)) and can_fit(task)


def make_linear_rows(
    trunk: TrunkFunction, dimensions: int = DIMENSIONS, seed: int = 0
) -> Callable[[Task, Any, Sequence[Batch]], np.ndarray]:
    """A function from a task, its head's parameters and batches with labels to the task's linear rows f32[N, 2 + D].

    A row is a labelled text or word. The gradient is over the trunk's parameters, without its tables of embeddings. It passes
    the head first and then the trunk, whose program is the same for all tasks.

    Args:
        trunk: The trunk of a run, up to its output.
        dimensions: D, the dimensions of the projection.
        seed: Seed of the projection, and of the choice of at most 128 rows.
    """
    leaves = leaves_of(trunk.params)
    paths = [path for path in leaves if not path.endswith("embedding")] or list(leaves)

    @jax.jit
    def projected(params: Any, batch: Batch, slope: Encoded) -> jax.Array:
        def along(chosen: Any) -> jax.Array:
            output = trunk.encode(put(params, chosen), batch)
            return sum((jnp.vdot(*pair) for pair in zip(*map(jax.tree.leaves, (output, slope)), strict=True)), jnp.zeros(()))

        return project(jax.grad(along)({path: leaves_of(params)[path] for path in paths}), dimensions, seed)

    def rows(task: Task, head: Any, batches: Sequence[Batch]) -> np.ndarray:
        margins = has_classes(task)

        @jax.jit
        def value_and_slope(output: Encoded, batch: Batch) -> tuple[jax.Array, Encoded]:
            def value(output: Encoded) -> jax.Array:
                total, _ = task.loss(task.apply(head, output, batch, None), batch.labels[task.name], batch)
                return linear_value(total, margins)

            return jax.value_and_grad(value)(output)

        places = [
            (number, row, place)
            for number, batch in enumerate(batches)
            for row, place in zip(*np.nonzero(_labelled(task, batch)), strict=True)
        ]
        chosen = np.sort(np.random.default_rng([seed, 2]).permutation(len(places))[:ROWS])
        result = np.zeros((len(chosen), 2 + dimensions), np.float32)
        result[:, 0] = MARGINS if margins else ROOTS
        for entry, index in enumerate(chosen):
            number, row, place = places[index]
            single: Batch = jax.tree.map(lambda leaf, row=row: leaf[row][None], batches[number])
            labels = np.full_like(single.labels[task.name], task.missing)
            labels[0, place] = single.labels[task.name][0, place]
            unlabelled = single._replace(labels={})
            output = trunk.encode(trunk.params, unlabelled)
            value, slope = value_and_slope(output, single._replace(labels={task.name: labels}))
            result[entry, 1] = value
            result[entry, 2:] = projected(trunk.params, unlabelled, slope)
        return result

    return rows


def _labelled(task: Task, batch: Batch) -> np.ndarray:
    """bool[R, S] or bool[R, T]: where a batch has a label of the task."""
    return is_known(task, batch.labels[task.name]) & (batch.index >= 0 if task.label_level == "example" else batch.segments > 0)
