"""The private backward pass: any backward pass, row by row, with each row's gradient clipped and noise added to their sum.

Rows are processed a few at a time, so that memory is bounded by their gradients; the parts of a batch that chance left empty
are skipped.

Shapes in names: R rows, m rows at a time.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mtl_jax.core.errors import UserError
from mtl_jax.data.batches import Batch
from mtl_jax.tasks import Task
from mtl_jax.training import mesh as meshes
from mtl_jax.training.batch_parts import sum_over_parts
from mtl_jax.training.forward import label_counts
from mtl_jax.training.gradient import Backward, BackwardFn, Weights
from mtl_jax.training.train_state import StepInputs
from mtl_jax.transfer.private import Private, clipped, noisy


def row_by_row(
    backward: BackwardFn, tasks: Sequence[Task], private: Private, expected: Mapping[str, float], mesh: Mesh
) -> BackwardFn:
    """A backward pass whose gradient is the private mean of the rows' gradients.

    A row's loss is the weighted sum of its tasks' losses, each a mean over the row's labels. It is multiplied by the expected
    rows of a batch over those of its source, so that without clipping and noise the gradient is, in expectation, that of the
    weighted sum of the tasks' mean losses.

    Args:
        backward: gradient.make_backward(...) of the tasks; it is applied to one row at a time.
        tasks: The tasks that it computes.
        private: Clip, noise, and the rows at a time.
        expected: {source: expected rows of a batch}.
        mesh: The devices; each has as many of the m rows.

    Returns:
        A BackwardFn. Its losses are 0, as no rule may see those of a batch; pull gives their means over the rows.
    """
    total = sum(expected.values())
    share = {task.name: total / expected[task.source] if expected[task.source] else 0.0 for task in tasks}
    size = private.micro_batch

    def private_backward(trained: Any, frozen: Any, inputs: StepInputs, keys: tuple[jax.Array, jax.Array]) -> Backward:
        def pull(weights: Weights, _: Any, of_heads: Weights | None) -> tuple[Any, dict[str, jax.Array]]:
            of_row_weights = {**weights, **{name: weights[name] * factor for name, factor in share.items()}}

            def of_row(row: Batch, number: jax.Array) -> tuple[Any, dict[str, jax.Array], dict[str, jax.Array]]:
                batch = jax.tree.map(lambda leaf: leaf[None], row)
                trunk_key, head_key = (jax.random.fold_in(key, number) for key in keys)
                result = backward(trained, frozen, inputs._replace(batch=batch), (trunk_key, head_key))
                gradient, losses = result.pull(of_row_weights, None, of_heads)
                labelled = {name: (count > 0).astype(jnp.float32) for name, count in result.counts.items()}
                return clipped(gradient, private.clip), losses, labelled

            def of_part(part: Batch, number: jax.Array) -> Any:
                def of_rows() -> Any:
                    by_row = jax.vmap(of_row)(part, number * size + jnp.arange(size))
                    return jax.tree.map(lambda leaf: leaf.sum(axis=0), by_row)

                zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(of_rows))
                return jax.lax.cond((part.source >= 0).any(), of_rows, lambda: zeros)

            summed, losses, labelled = sum_over_parts(of_part, _in_parts(inputs.batch, size, mesh))
            noise_key = jax.random.fold_in(keys[1], zlib.crc32(b"private"))  # not a number of a row or a task
            gradient = jax.tree.map(lambda leaf: leaf / total, noisy(summed, noise_key, private.noise * private.clip))
            return gradient, {name: loss / jnp.maximum(labelled[name], 1.0) for name, loss in losses.items()}

        zeros = {task.name: jnp.zeros(()) for task in tasks}
        return Backward(zeros, label_counts(tuple(tasks), inputs.batch), pull)

    return private_backward


def _in_parts(batch: Batch, size: int, mesh: Mesh) -> Any:
    """Leaves [R, ...] become [R / m, m, ...]: consecutive rows, each part over all devices."""

    def cut(leaf: jax.Array) -> jax.Array:
        parts = leaf.reshape(leaf.shape[0] // size, size, *leaf.shape[1:])
        return parts if meshes.shards(mesh) == 1 else jax.lax.with_sharding_constraint(parts, meshes.by_rows(mesh, axis=1))

    return jax.tree.map(cut, batch)


def check(private: Private, rows: int, devices: int) -> None:
    """Raises UserError where rows cannot be processed micro_batch at a time on so many devices.

    Args:
        private: Private training.
        rows: Rows of a batch.
        devices: The devices that share them.
    """
    size = private.micro_batch
    if private.clip and (rows % size or size % devices):
        raise UserError(
            f"optimizer.private.micro_batch is {size}; it must divide batch.rows, {rows}, and be a multiple of the "
            f"{devices} devices"
        )
