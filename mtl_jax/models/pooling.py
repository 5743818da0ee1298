"""One vector for each example of a packed row."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def segment_mean(hidden_RxTxH: jax.Array, segments_RxT: jax.Array, num_segments: int) -> jax.Array:
    """Mean of the token vectors of every segment, in float32.

    Args:
        hidden_RxTxH: Token vectors of R rows.
        segments_RxT: Segment of each token, counted from 1; 0 is padding.
        num_segments: S, how many segments a row can hold.

    Returns:
        f32[R, S, H]; zeros for segments that have no token.
    """
    member_RxSxT = segments_RxT[:, None, :] == jnp.arange(1, num_segments + 1)[None, :, None]
    member_RxSxT = member_RxSxT.astype(jnp.float32)
    total_RxSxH = jnp.einsum("rst,rth->rsh", member_RxSxT, hidden_RxTxH.astype(jnp.float32))
    return total_RxSxH / jnp.maximum(member_RxSxT.sum(axis=-1, keepdims=True), 1.0)
