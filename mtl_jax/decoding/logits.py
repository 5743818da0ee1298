"""Logits over a vocabulary that is padded to whole blocks, and the best of them.

The output matrix is laid out once for all steps. A vocabulary has up to a hundred thousand tokens: the best are looked for in
the blocks with the highest maxima, not among all.

Shapes in names: B rows, K beams, C candidates, H hidden size, V vocabulary, W vocabulary in whole blocks, M blocks.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

BLOCK = 128  # tokens


class Vocabulary(NamedTuple):
    """The output layer of a decoder.

    Attributes:
        kernel: f[H, W], in the compute dtype.
        bias: f32[W], -inf beyond the last token.
    """

    kernel: jax.Array
    bias: jax.Array


class Generator(Protocol):
    """A linen module that generates tokens: models.encoder_decoder.Seq2Seq, or models.causal_model.CausalModel."""

    @property
    def trunk(self) -> Any: ...
    @property
    def logit_scale(self) -> float: ...
    @property
    def logit_cap(self) -> float | None: ...
    @property
    def vocabulary(self) -> int: ...
    @property
    def most_generated(self) -> int | None: ...

    def apply(self, variables: Any, *args: Any, method: str, **kwargs: Any) -> Any: ...


@functools.partial(jax.jit, static_argnames="model")
def prepare(model: Generator, params: Any) -> Vocabulary:
    """The output layer of a model, laid out for decoding; it takes as much memory as the token table.

    Args:
        model: The model.
        params: {"trunk": ..., "head": ...}.
    """
    projection: Any = model.apply({"params": params}, method="projection")
    kernel_HxV, bias_V = projection
    padding = -kernel_HxV.shape[1] % BLOCK
    return Vocabulary(jnp.pad(kernel_HxV, ((0, 0), (0, padding))), jnp.pad(bias_V, (0, padding), constant_values=-jnp.inf))


def project(hidden_BxKxH: jax.Array, vocabulary: Vocabulary, scale: float, cap: float | None = None) -> jax.Array:
    """Logits f32[B, K, W] of the decoder's last output, softly capped; -inf beyond the last token."""
    x_BxKxW = jnp.einsum("bkh,hw->bkw", hidden_BxKxH * scale, vocabulary.kernel, preferred_element_type=jnp.float32)
    x_BxKxW = x_BxKxW if cap is None else cap * jnp.tanh(x_BxKxW / cap)
    return x_BxKxW + vocabulary.bias


def top(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The largest `count` values of the last axis and their positions, the first of equal ones first, as jax.lax.top_k.

    Made for a small count out of a few hundred values.
    """

    def select_repeatedly(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        positions = jnp.arange(x.shape[-1], dtype=jnp.int32)

        def select_next(previous: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], tuple]:
            value, position = previous
            remaining = (x < value) | ((x == value) & (positions > position))
            value = jnp.where(remaining, x, -jnp.inf).max(axis=-1, keepdims=True)
            position = jnp.where(remaining & (x == value), positions, x.shape[-1] - 1).min(axis=-1, keepdims=True)
            return (value, position), (value[..., 0], position[..., 0])

        start = jnp.full_like(x[..., :1], jnp.inf), jnp.full_like(x[..., :1], -1, jnp.int32)
        _, selected = jax.lax.scan(select_next, start, None, length=count)
        values, at = (jnp.moveaxis(part, 0, -1) for part in selected)
        return values, at

    def select_by_sorting(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, at = jax.lax.top_k(x, count)
        return values, at

    return jax.lax.platform_dependent(x, cpu=select_repeatedly, default=select_by_sorting)


def best_blocks(maxima_BxM: jax.Array, count: int) -> jax.Array:
    """Indices i32[B, min(count, M)], ascending, of the blocks that contain the `count` best scores.

    The best C scores are in the C blocks with the best maxima, also where scores are equal and the first ones count.

    Args:
        maxima_BxM: f32, the best score of each block.
        count: C.
    """
    _, which_BxC = top(maxima_BxM, min(count, maxima_BxM.shape[-1]))
    return jnp.sort(which_BxC, axis=-1)


def top_of_many(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """As top(), for many scores f32[..., M * BLOCK]."""
    *batch, N = x.shape
    x_RxMxW = x.reshape(-1, N // BLOCK, BLOCK)
    which_RxC = best_blocks(x_RxMxW.max(axis=-1), count)
    few_RxCxW = jnp.take_along_axis(x_RxMxW, which_RxC[..., None], axis=1)
    values, at = top(few_RxCxW.reshape(len(x_RxMxW), -1), count)
    positions = jnp.take_along_axis(which_RxC, at // BLOCK, axis=1) * BLOCK + at % BLOCK
    return values.reshape(*batch, count), positions.reshape(*batch, count)
