"""Keys and values of attention: masks of those that a query may see, and a cache for decoding token by token.

Shapes in names: B rows, T queries, S keys, N attention heads, D size of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class KeyValue(NamedTuple):
    """The keys and values that queries attend to: those of a sequence, or a cache.

    Attributes:
        key: f[B, N, S, D], so that each head is a matrix.
        value: f[B, N, S, D].
    """

    key: jax.Array
    value: jax.Array


def visible_keys(
    real_BxS: jax.Array, query_segments_BxT: jax.Array | None = None, key_segments_BxS: jax.Array | None = None
) -> jax.Array:
    """The keys that each query may see: bool[B, T, S], or bool[B, 1, S] if all queries of a row see the same.

    Args:
        real_BxS: 1 at real keys, 0 at padding.
        query_segments_BxT: Example number of each query inside a packed row, or None: one example a row.
        key_segments_BxS: The same for each key; a query sees only the keys of its example.

    Raises:
        ValueError: Only one side has segments.
    """
    if (query_segments_BxT is None) != (key_segments_BxS is None):
        raise ValueError("packed rows need segment ids on both sides, source and target")
    real_Bx1xS = real_BxS[:, None, :].astype(bool)
    if query_segments_BxT is None or key_segments_BxS is None:
        return real_Bx1xS
    return real_Bx1xS & (query_segments_BxT[:, :, None] == key_segments_BxS[:, None, :])


def visible_past(queries: int, keys: int, step: jax.Array | int = 0) -> jax.Array:
    """The keys that are not in a query's future: bool[1, T, S]; query t has position step + t among the keys."""
    return (jnp.arange(keys)[None, :] <= step + jnp.arange(queries)[:, None])[None]


def visible_ancestors(ancestry_BxKxL: jax.Array, step: jax.Array | int) -> jax.Array:
    """The entries that each beam may see in a cache with K entries a position, its own included: bool[B, K, L * K].

    Entries are never moved: entry k of position l was written by beam k at step l, and a beam that continues another beam reads
    the other beam's entries.

    Args:
        ancestry_BxKxL: The beam whose entry each beam reads at each position.
        step: i32[], the position that is written now.
    """
    B, K, L = ancestry_BxKxL.shape
    ancestor_BxKxLxK = ancestry_BxKxL[..., None] == jnp.arange(K)
    past_Lx1 = (jnp.arange(L) <= step)[:, None]
    return (ancestor_BxKxLxK & past_Lx1).reshape(B, K, L * K)


def write_cache(cache: KeyValue, new: KeyValue, step: jax.Array | int) -> KeyValue:
    """The cache f[B, N, S, D] with new f[B, N, T, D] at positions step to step + T; step may be traced."""

    def write(old: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), step, axis=2)

    return KeyValue(write(cache.key, new.key), write(cache.value, new.value))
