"""The best of very many scores. XLA's top_k sorts on CPU, which takes longer than the decoder that made the scores.

Shapes in names: N scores, M blocks of them, W scores of a block, C that are asked for.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

BLOCK = 128  # W


def top(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """What jax.lax.top_k gives, the largest of the last axis and their places, of equal ones the first: few of some hundred."""

    def one_by_one(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        places = jnp.arange(x.shape[-1], dtype=jnp.int32)

        def following(before: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], tuple]:
            value, place = before
            left = (x < value) | ((x == value) & (places > place))
            value = jnp.where(left, x, -jnp.inf).max(axis=-1, keepdims=True)
            place = jnp.where(left & (x == value), places, x.shape[-1] - 1).min(axis=-1, keepdims=True)
            return (value, place), (value[..., 0], place[..., 0])

        start = jnp.full_like(x[..., :1], jnp.inf), jnp.full_like(x[..., :1], -1, jnp.int32)
        _, found = jax.lax.scan(following, start, None, length=count)
        values, at = (jnp.moveaxis(part, 0, -1) for part in found)
        return values, at

    def sorting(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, at = jax.lax.top_k(x, count)
        return values, at

    return jax.lax.platform_dependent(x, cpu=one_by_one, default=sorting)


def best_blocks(maxima_BxM: jax.Array, count: int) -> jax.Array:
    """Numbers i32[B, min(count, M)], ascending, of the blocks that hold the `count` best scores, given each block's best.

    The best C scores stand in the C blocks with the best maxima, also where scores are equal and the first ones count.
    """
    _, which_BxC = top(maxima_BxM, min(count, maxima_BxM.shape[-1]))
    return jnp.sort(which_BxC, axis=-1)


def top_of_many(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """As top(), of many scores f32[..., M * BLOCK]."""
    *batch, N = x.shape
    x_RxMxW = x.reshape(-1, N // BLOCK, BLOCK)
    which_RxC = best_blocks(x_RxMxW.max(axis=-1), count)
    few_RxCxW = jnp.take_along_axis(x_RxMxW, which_RxC[..., None], axis=1)
    values, at = top(few_RxCxW.reshape(len(x_RxMxW), -1), count)
    places = jnp.take_along_axis(which_RxC, at // BLOCK, axis=1) * BLOCK + at % BLOCK
    return values.reshape(*batch, count), places.reshape(*batch, count)
