"""A large head sees the rows of its own source only.

The other rows of a batch have no labels for it, so they change nothing but the price: two decoders over a whole batch cost
twice what each over its half does. Which rows a source has differs from step to step, how many at most does not, so that is the
shape. Small heads see the whole batch, which is cheaper than picking rows.

Shapes in names: R rows, r rows of a source at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mtl_jax.data.batches import Batch
from mtl_jax.models.encoded import Encoded
from mtl_jax.tasks import Task
from mtl_jax.training import mesh as meshes
from mtl_jax.training.step import Look


def of_source(most: Mapping[str, int], mesh: Mesh) -> Look:
    """What a task's head sees of a batch: all of it, or of a large head's task r rows, those of its source among them.

    Args:
        most: {source: the most rows that it has in a batch}, in the run's order.
        mesh: The devices; each gets as many of the r rows.
    """
    places = {source: place for place, source in enumerate(most)}
    shards = meshes.shards(mesh)

    def look(task: Task, encoded: Encoded, batch: Batch) -> tuple[Encoded, Batch]:
        rows = -(-max(most[task.source], 1) // shards) * shards  # one at least: a head has no shape for none
        if not task.large or rows >= len(batch.source):
            return encoded, batch
        # The rows of the source come first, in their order; what stands behind them has no label for the task.
        at_r = jnp.argsort(batch.source != places[task.source], stable=True)[:rows]

        def take(leaf_Rx: jax.Array) -> Any:
            leaf_rx = leaf_Rx.at[at_r].get(unique_indices=True, mode="promise_in_bounds")
            if shards == 1:
                return leaf_rx
            return jax.lax.with_sharding_constraint(leaf_rx, meshes.by_rows(mesh))

        by_row = jax.tree.map(take, encoded._replace(table=None))
        return by_row._replace(table=encoded.table), jax.tree.map(take, batch)

    return look


def in_part(most: Mapping[str, int], parts: int, runs: int = 1) -> dict[str, int]:
    """The most rows of each source in a part of a batch, see parts.in_parts().

    Args:
        most: {source: the most rows that it has in a batch}.
        parts: Every parts-th row belongs to a part.
        runs: In so many pieces a source's rows may stand in a batch: of n rows in a piece a part has n / parts, rounded up.
    """
    return {source: min(rows, (rows + runs * (parts - 1)) // parts) for source, rows in most.items()}
