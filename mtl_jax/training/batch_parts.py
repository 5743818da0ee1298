"""Parts of a batch: for gradient accumulation, the rows of a source for a large head, the rows of tasks with a weight.

A head may read every row of a batch: rows without a label for it change only the cost. Small heads do, because to select rows
costs more; two decoders over a whole batch would cost twice as much as each over its half. The rows of a source differ by step,
but their largest number does not, so it is the shape.

Shapes in names: R rows, r rows of a source at most.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mtl_jax.data.batches import Batch
from mtl_jax.models.trunk_output import Encoded, token_table
from mtl_jax.tasks import Task
from mtl_jax.training import mesh as meshes
from mtl_jax.training.forward import Encode, HeadInputs


def in_parts(batch: Any, parts: int, axis: int = 0) -> Any:
    """Leaves [..., R, ...] become [parts, ..., R / parts, ...].

    Every parts-th row belongs to a part, so that each device has the same number of rows of every part, if it has enough.

    Args:
        batch: A pytree of arrays.
        parts: The number of parts; divides R.
        axis: The axis of R.
    """

    def cut(leaf: jax.Array) -> jax.Array:
        shape = (*leaf.shape[:axis], leaf.shape[axis] // parts, parts, *leaf.shape[axis + 1 :])
        return jnp.moveaxis(leaf.reshape(shape), axis + 1, 0)

    return jax.tree.map(cut, batch)


def part_key(key: jax.Array, number: jax.Array | int, parts: int) -> jax.Array:
    """The PRNG key of a part; with one part, the key itself."""
    return key if parts == 1 else jax.random.fold_in(key, number)


def sum_over_parts(function: Callable[[Any, jax.Array], Any], parts: Any) -> Any:
    """The sum of function(part, its number) over the parts, leaf by leaf: one compiled body, a loop on the device."""
    return sum_and_keep(lambda part, number: (function(part, number), None), parts)[0]


def sum_and_keep(function: Callable[[Any, jax.Array], tuple[Any, Any]], parts: Any) -> tuple[Any, Any]:
    """Of function(part, its number), a pair of trees, the sum of the first over the parts, and the second of every part.

    Args:
        function: To be applied to each part.
        parts: Leaves [P, ...].

    Returns:
        A tree like the first, and one like the second with leaves [P, ...].
    """
    count = len(jax.tree.leaves(parts)[0])
    first = jax.tree.map(lambda leaf: leaf[0], parts)
    shapes, _ = jax.eval_shape(function, first, jnp.zeros((), jnp.int32))
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def body(total: Any, part: tuple[Any, jax.Array]) -> tuple[Any, Any]:
        summand, kept = function(*part)
        return jax.tree.map(jnp.add, total, summand), kept

    return jax.lax.scan(body, zero, (parts, jnp.arange(count)))


def recomputed(encode: Encode, parts: int, reads_table: bool = False) -> Encode:
    """The Encode that reads a batch in parts, one after another, and computes each anew in the backward pass.

    Only the results are kept in between, so that the trunk's activations are those of one part; losses see the whole batch
    (Gao et al., 2021, Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup).

    Args:
        encode: From a batch to the inputs of the heads.
        parts: The number of parts; a batch that it does not divide gets empty rows. 1: `encode` itself.
        reads_table: Whether the heads read the trunk's token table.
    """
    if parts == 1:
        return encode

    def encode_parts(params: Any, batch: Batch, key: jax.Array | None, features: jax.Array | None) -> Encoded:
        rows = len(batch.source)
        padding = -rows % parts
        rows_only = batch._replace(labels={})  # the trunk reads no labels

        def padded(leaf_Rx: jax.Array) -> jax.Array:
            return jnp.pad(leaf_Rx, ((0, padding), *((0, 0),) * (leaf_Rx.ndim - 1)))

        @jax.checkpoint
        def of_part(params: Any, part: Batch, number: jax.Array) -> Encoded:
            part_of_key = None if key is None else jax.random.fold_in(key, number)
            return encode(params, part, part_of_key, features)._replace(table=None)

        def body(_: None, part_and_number: tuple[Batch, jax.Array]) -> tuple[None, Encoded]:
            return None, of_part(params, *part_and_number)

        _, encoded = jax.lax.scan(body, None, (in_parts(jax.tree.map(padded, rows_only), parts), jnp.arange(parts)))

        def joined(leaf: jax.Array) -> jax.Array:
            leaf = jnp.moveaxis(leaf, 0, 1)
            return leaf.reshape(-1, *leaf.shape[2:])[:rows]

        by_row: Encoded = jax.tree.map(joined, encoded)
        return by_row._replace(table=token_table(params) if reads_table else None)

    return encode_parts


def weighted_rows(
    tasks: Sequence[Task],
    idle: Collection[str],
    rows: Mapping[str, int] | None,
    multiple: int,
    others: Collection[str] = (),
) -> tuple[slice, ...]:
    """The slices of a batch that are rows of tasks with a weight; () where they differ by step, or all rows are needed.

    Args:
        tasks: The tasks of the run.
        idle: The names of the tasks with weight 0.
        rows: {source: its rows in every batch}, in the run's order, which is that of the rows; None: they differ.
        multiple: The number of rows in the slices must be a multiple of this, for devices and parts of a batch.
        others: Sources whose rows a regulariser reads.
    """
    weighted = {task.source for task in tasks if task.name not in idle} | set(others)
    if rows is None or not weighted:
        return ()
    if weighted == set(rows) or sum(rows[source] for source in weighted) % multiple:
        return ()
    slices, start = [], 0
    for source, count in rows.items():
        if source in weighted and count:
            slices.append(slice(start, start + count))
        start += count
    return tuple(slices)


def rows_of_source(most: Mapping[str, int], mesh: Mesh) -> HeadInputs:
    """The rows that each head reads: all rows for a small head; for a large one r rows, which include its source's.

    Args:
        most: {source: the most rows that it has in a batch}, in the run's order.
        mesh: The devices; each gets the same number of the r rows.
    """
    places = {source: place for place, source in enumerate(most)}
    shards = meshes.shards(mesh)

    def head_inputs(task: Task, encoded: Encoded, batch: Batch) -> tuple[Encoded, Batch]:
        rows = -(-max(most[task.source], 1) // shards) * shards  # at least one: a head cannot read 0 rows
        if not task.large or rows >= len(batch.source):
            return encoded, batch
        # The rows of the source come first, in their order; the other rows have no label for the task.
        at_r = jnp.argsort(batch.source != places[task.source], stable=True)[:rows]

        def take(leaf_Rx: jax.Array) -> Any:
            leaf_rx = leaf_Rx.at[at_r].get(unique_indices=True, mode="promise_in_bounds")
            if shards == 1:
                return leaf_rx
            return jax.lax.with_sharding_constraint(leaf_rx, meshes.by_rows(mesh))

        by_row = jax.tree.map(take, encoded._replace(table=None))
        return by_row._replace(table=encoded.table), jax.tree.map(take, batch)

    return head_inputs


def rows_in_part(most: Mapping[str, int], parts: int, runs: int = 1) -> dict[str, int]:
    """The most rows of each source in a part of a batch, see in_parts().

    Args:
        most: {source: the most rows that it has in a batch}.
        parts: Every parts-th row belongs to a part.
        runs: The number of pieces in which a source's rows may be; of a piece of n rows a part has n / parts, rounded up.
    """
    return {source: min(rows, (rows + runs * (parts - 1)) // parts) for source, rows in most.items()}
