"""Calls of several copies of a layer: of one copy for each row, or of all copies side by side.

Shapes in names: n rows with their copies, C copies of a layer, M blocks of R rows, B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.models.layers import PLAIN, Kernels
from mtl_jax.transfer.adapters.base import Call


def apply_by_number(call: Call, stacks: Any, number_n: jax.Array, copies: int) -> Any:
    """The output of a layer that has several copies of its parameters, each row with its own copy.

    The rows are sorted by their copy and cut into blocks of rows of one copy, so that each row passes only its own copy. At
    most half as many more rows are computed, to fill the last block of each copy.

    Args:
        call: The call of the layer; its arguments by row are [n, ...].
        stacks: Parameters of the copies as stacks.py keeps them: matrices [C, ...], vectors [C *].
        number_n: i32[n], the copy of each row.
        copies: C.
    """
    if call.rows is not None and call.rows.one_source:
        return _of_one_source(call, stacks, number_n, copies)
    n = len(number_n)
    R = max(1, n // (2 * copies))
    M = n if R == 1 else n // R + copies  # blocks, whatever the rows
    count_C = (number_n[:, None] == jnp.arange(copies)).sum(axis=0)
    blocks_C = -(-count_C // R)
    end_C, start_C = jnp.cumsum(blocks_C), jnp.cumsum(count_C) - count_C
    order_n = jnp.argsort(number_n, stable=True)
    copy_M = jnp.minimum(jnp.searchsorted(end_C, jnp.arange(M), side="right"), copies - 1)
    within_M = jnp.arange(M) - (end_C - blocks_C)[copy_M]
    place_MxR = start_C[copy_M][:, None] + within_M[:, None] * R + jnp.arange(R)
    row_MxR = order_n[jnp.clip(place_MxR, 0, n - 1)]  # a place past the last row of its copy computes another row, unused

    def of_blocks(leaf: jax.Array) -> jax.Array:
        return leaf[row_MxR]

    params = jax.tree.map(lambda leaf: _unstacked(leaf, copies)[copy_M], stacks)
    y_MxRx = _apply(call, params, of_blocks, M)
    rank_n = jnp.argsort(order_n) - start_C[number_n]
    block_n = (end_C - blocks_C)[number_n] + rank_n // R
    return jax.tree.map(lambda leaf: leaf[block_n, rank_n % R], y_MxRx)


def _of_one_source(call: Call, stacks: Any, number_n: jax.Array, copies: int) -> Any:
    """As apply_by_number(), for rows of one source: copy c of every row passes the same copy of the layer."""
    assert call.rows is not None
    C = call.rows.routes.copies
    chosen = jax.tree.map(lambda leaf: _unstacked(leaf, copies)[number_n[:C]], stacks)
    return joined(jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), _apply(call, chosen, _by_copy(C), C)))


def _by_copy(copies: int) -> Callable[[jax.Array], jax.Array]:
    """From rows [B C, ...], the copies of a row one after another, to [C, B, ...]."""
    return lambda leaf: leaf.reshape(-1, copies, *leaf.shape[1:]).swapaxes(0, 1)


def apply_side_by_side(call: Call, stacks: Any, copies: int) -> Any:
    """The outputs of all copies of a layer, each for its copy of every row: leaves [B, C, ...].

    Args:
        call: The call of the layer; its arguments by row are [B C, ...], the copies of a row one after another.
        stacks: As for apply_by_number().
        copies: C.
    """
    params = jax.tree.map(lambda leaf: _unstacked(leaf, copies), stacks)
    return jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), _apply(call, params, _by_copy(copies), copies))


def vectors(output: Any) -> jax.Array:
    """The vectors in the output of a layer, which may be the first of several results."""
    x: jax.Array = output[0] if isinstance(output, tuple) else output
    return x


def with_vectors(output: Any, changed: jax.Array) -> Any:
    """The output of a layer with other vectors."""
    return (changed, *output[1:]) if isinstance(output, tuple) else changed


def joined(output: Any) -> Any:
    """Leaves [B, C, ...] as rows [B C, ...]."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), output)


def _apply(call: Call, params: Any, cut: Any, parts: int) -> Any:
    """The layer's outputs for several sets of parameters, leaves [parts, ...], and of rows as cut() makes them."""
    leaves, structure = jax.tree.flatten((call.args, dict(call.kwargs)))
    assert call.rows is not None
    by_row = call.rows.by_row[call.layer.path]
    cut_leaves = [cut(leaf) for leaf, is_cut in zip(leaves, by_row, strict=True) if is_cut]
    keys = None if call.key is None else jax.random.split(call.key, parts)
    module = call.module.clone(parent=None)
    if isinstance(getattr(module, "kernels", None), Kernels):
        module = module.clone(kernels=PLAIN)

    def apply(params: Any, key: jax.Array | None, part: list[jax.Array]) -> Any:
        parts_in_order = iter(part)
        values = [next(parts_in_order) if is_cut else leaf for leaf, is_cut in zip(leaves, by_row, strict=True)]
        args, kwargs = jax.tree.unflatten(structure, values)
        return module.apply({"params": params}, *args, **kwargs, rngs=None if key is None else {"dropout": key})

    return jax.vmap(apply, in_axes=(0, None if keys is None else 0, 0))(params, keys, cut_leaves)


def _unstacked(leaf: jax.Array, copies: int) -> jax.Array:
    return leaf.reshape(copies, -1) if leaf.ndim == 1 else leaf
