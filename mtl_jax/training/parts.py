"""A batch in parts, gone through one after another: the activations of one part at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def in_parts(batch: Any, parts: int, axis: int = 0) -> Any:
    """Leaves [..., R, ...] become [parts, ..., R / parts, ...].

    Every parts-th row belongs to a part, so that each device has as many rows of every part, if it has enough.

    Args:
        batch: A pytree of arrays.
        parts: How many; divides R.
        axis: Which axis is R.
    """

    def cut(leaf: jax.Array) -> jax.Array:
        shape = (*leaf.shape[:axis], leaf.shape[axis] // parts, parts, *leaf.shape[axis + 1 :])
        return jnp.moveaxis(leaf.reshape(shape), axis + 1, 0)

    return jax.tree.map(cut, batch)


def part_key(key: jax.Array, number: jax.Array | int, parts: int) -> jax.Array:
    """The PRNG key of a part; with one part, the key itself."""
    return key if parts == 1 else jax.random.fold_in(key, number)


def add_up(function: Callable[[Any, jax.Array], Any], parts: Any) -> Any:
    """The sum of function(part, its number) over the parts, leaf by leaf: one compiled body, a loop on the device."""
    count = len(jax.tree.leaves(parts)[0])
    first = jax.tree.map(lambda leaf: leaf[0], parts)
    zero = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, first, jnp.zeros((), jnp.int32))
    )

    def body(total: Any, part: tuple[Any, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(*part)), None

    return jax.lax.scan(body, zero, (parts, jnp.arange(count)))[0]
