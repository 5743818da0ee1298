"""What T5 adds to the sequence-to-sequence model: positions that are relative, a learned bias on attention scores.

Shapes in names: B rows, T queries, S keys, N attention heads.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def bucket_of_distance(num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of every distance 0 .. max_distance: i32[max_distance + 1].

    The first half of the buckets holds one distance each; the others grow as the logarithm of the distance, and the last
    holds all from max_distance on (Raffel et al. 2020, section 2.1). A table, so that no rounding of a compiled logarithm can
    move a distance to another bucket.

    Args:
        num_buckets: How many buckets there are, on one side of the query.
        max_distance: Above num_buckets / 2.
    """
    exact = num_buckets // 2
    distance = np.arange(exact, max_distance + 1, dtype=np.float32)
    share = np.log(distance / np.float32(exact)) / np.float32(np.log(max_distance / exact))
    grown = exact + (share * np.float32(num_buckets - exact)).astype(np.int32)
    return np.concatenate([np.arange(exact), np.minimum(grown, num_buckets - 1)]).astype(np.int32)


def relative_buckets(relative_positions: jax.Array, bidirectional: bool, num_buckets: int, max_distance: int) -> jax.Array:
    """Bucket of each relative position, key minus query: i32 of the same shape.

    Args:
        relative_positions: i32, any shape.
        bidirectional: True gives keys before and after a query half of the buckets each; False (decoders) puts all keys
            after the query, which it does not see, into bucket 0.
        num_buckets: How many buckets there are.
        max_distance: From this distance on all share one bucket.
    """
    if bidirectional:
        num_buckets //= 2
        after = jnp.where(relative_positions > 0, num_buckets, 0)
        distance = jnp.abs(relative_positions)
    else:
        after = jnp.zeros_like(relative_positions)
        distance = jnp.maximum(-relative_positions, 0)
    return after + jnp.asarray(bucket_of_distance(num_buckets, max_distance))[jnp.minimum(distance, max_distance)]


class RelativeBias(nn.Module):
    """A learned number per head and bucket of relative positions, added to attention scores.

    Attributes:
        num_heads: N.
        num_buckets: Rows of the table.
        max_distance: See relative_buckets.
        bidirectional: True in encoders.
        embedding_init: Initialiser of the table.
    """

    num_heads: int
    num_buckets: int
    max_distance: int
    bidirectional: bool
    embedding_init: Any = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, query_positions_BxT: jax.Array, key_positions_BxS: jax.Array) -> jax.Array:
        """The bias f32[B, N, T, S] between positions i32[B, T] and i32[B, S]."""
        relative_BxTxS = key_positions_BxS[:, None, :] - query_positions_BxT[:, :, None]
        buckets_BxTxS = relative_buckets(relative_BxTxS, self.bidirectional, self.num_buckets, self.max_distance)
        table = nn.Embed(self.num_buckets, self.num_heads, embedding_init=self.embedding_init, name="table")
        return jnp.moveaxis(table(buckets_BxTxS), -1, 1)
