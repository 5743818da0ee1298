"""Attention in one kernel on TPUs: scores and probabilities stay in the chip's own memory, forward and backward.

The unit that multiplies matrices has 128 lanes, and a head often has 32 or 64. A group of heads shares the lanes: the queries
of each head are stacked, with zeros in the lanes of the others, so no head is moved. The backward pass computes the
probabilities again, from queries, keys and mask (Dao et al. 2022); as all keys of a row are at hand, nothing else is kept.

Shapes in names: B rows, T queries, S keys, N heads, D size of a head, H = N * D, L lanes of a group, g heads of a group.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mtl_jax.models.over_rows import OverRows, on_one_device

LANES = 128
MOST_KEYS = 512  # of a row, whose scores stay in the chip's memory
HIDDEN = -1e30  # added to the scores of keys that a query may not see
_QUERIES = 256  # of a row, above which a step of the kernel has one group of heads
_SUBLANES = 16  # rows of a tile in bfloat16
_MEMORY = 48 * 2**20  # bytes of the chip's own memory that the kernel may use


class _Sizes(NamedTuple):
    """What a kernel is made for: queries T, size of a head D, lanes L, heads g of a group, groups and rows of a step, H."""

    queries: int
    head_size: int
    lanes: int
    heads: int
    groups: int
    rows: int
    width: int
    scale: float


def fits(queries: int, keys: int, heads: int, head_size: int) -> bool:
    """Whether the kernel computes attention of such sizes.

    >>> fits(128, 128, heads=12, head_size=32), fits(128, 128, heads=12, head_size=80)
    (True, False)
    """
    divides = LANES % head_size == 0 or head_size % LANES == 0
    whole = heads * head_size % max(LANES, head_size) == 0 and head_size % _SUBLANES == 0
    return divides and whole and all(0 < tokens <= MOST_KEYS and tokens % _SUBLANES == 0 for tokens in (queries, keys))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def attention(
    q_BxTxH: jax.Array,
    k_BxSxH: jax.Array,
    v_BxSxH: jax.Array,
    mask_BxSxT: jax.Array,
    head_size: int,
    scale: float,
    over_rows: OverRows = on_one_device,
    interpret: bool = False,
) -> jax.Array:
    """Scaled dot-product attention of all heads, as models.layers.attend without bias and dropout.

    Args:
        q_BxTxH: Queries, the heads side by side.
        k_BxSxH: Keys.
        v_BxSxH: Values.
        mask_BxSxT: i8, 1 where a query may see a key.
        head_size: D; fits() says for which sizes there is a kernel.
        scale: Factor on the queries.
        over_rows: How the kernel runs on several devices.
        interpret: Whether it runs as an ordinary program, for tests on a CPU.

    Returns:
        f[B, T, H] in the dtype of the queries; products are added up in float32.
    """
    output = functools.partial(_forward, scale=scale, head_size=head_size, interpret=interpret)
    return over_rows(output)(q_BxTxH, k_BxSxH, v_BxSxH, mask_BxSxT)


def _attention_forward(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *options: Any) -> tuple[jax.Array, Any]:
    return attention(q, k, v, mask, *options), (q, k, v, mask)


def _attention_backward(
    head_size: int, scale: float, over_rows: OverRows, interpret: bool, kept: Any, gradient: jax.Array
) -> tuple[Any, ...]:
    pull = functools.partial(_backward, scale=scale, head_size=head_size, interpret=interpret)
    return (*over_rows(pull)(*kept, gradient), None)


attention.defvjp(_attention_forward, _attention_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def self_attention(
    qkv_BxTx3H: jax.Array,
    mask_BxTxT: jax.Array,
    head_size: int,
    scale: float,
    over_rows: OverRows = on_one_device,
    interpret: bool = False,
) -> jax.Array:
    """attention() of queries, keys and values side by side, as one matrix product gives them; nothing is cut out or joined.

    Args:
        qkv_BxTx3H: Queries, keys and values, each with the heads side by side.
        mask_BxTxT: i8[B, S, T], 1 where a query of the last axis may see a key.
        head_size: As for attention(), and so are the next ones.
        scale: Factor on the queries.
        over_rows: How the kernel runs on several devices.
        interpret: Whether it runs as an ordinary program.
    """
    output = functools.partial(_forward, scale=scale, head_size=head_size, interpret=interpret)
    return over_rows(output)(qkv_BxTx3H, mask_BxTxT)


def _self_attention_forward(qkv: jax.Array, mask: jax.Array, *options: Any) -> tuple[jax.Array, Any]:
    return self_attention(qkv, mask, *options), (qkv, mask)


def _self_attention_backward(
    head_size: int, scale: float, over_rows: OverRows, interpret: bool, kept: Any, gradient: jax.Array
) -> tuple[Any, ...]:
    pull = functools.partial(_backward, scale=scale, head_size=head_size, interpret=interpret)
    return (*over_rows(pull)(*kept, gradient), None)


self_attention.defvjp(_self_attention_forward, _self_attention_backward)


def _forward(*arrays: jax.Array, head_size: int, scale: float, interpret: bool) -> jax.Array:
    return _call(_forward_kernel, "attention_forward", arrays, None, 2, head_size, scale, interpret)[0]


def _backward(*arrays: jax.Array, head_size: int, scale: float, interpret: bool) -> Sequence[jax.Array]:
    *_, gradient = arrays
    return _call(_backward_kernel, "attention_backward", arrays[:-1], gradient, 5, head_size, scale, interpret)


def _call(
    kernel: Any,
    name: str,
    arrays: Sequence[jax.Array],
    gradient: jax.Array | None,
    products: int,
    D: int,
    scale: float,
    interpret: bool,
) -> Any:
    """Runs a kernel over rows, and over groups of heads if a row is long.

    Args:
        kernel: The kernel.
        name: Its name.
        arrays: Queries, keys, values and mask; or the first three in one, and mask.
        gradient: That of the output, and the results are gradients like the arrays; None: the result is the output.
        products: How many products the kernel has.
        D: Size of a head.
        scale: Factor on the queries.
        interpret: As for attention().
    """
    *inputs, mask = arrays
    joined = len(inputs) == 1
    q, k = inputs[0], inputs[0] if joined else inputs[1]
    B, T, S, H = len(q), q.shape[1], k.shape[1], q.shape[2] // (3 if joined else 1)
    L = max(LANES, D)
    groups = H // L if max(T, S) <= _QUERIES else 1
    # Short rows go together: while one waits for a product, another can be worked on.
    rows = max(n for n in (1, 2, 4) if B % n == 0 and (n == 1 or n * max(T, S) <= _QUERIES))
    sizes = _Sizes(T, D, L, L // D, groups, rows, H, scale)
    steps = H // L // groups

    def block(tokens: int, part: int = 0) -> pl.BlockSpec:
        return pl.BlockSpec((rows, tokens, groups * L), lambda row, group: (row, 0, part * steps + group))

    whole = pl.BlockSpec((rows, T, 3 * H), lambda row, group: (row, 0, 0))
    parts = [q, q, q] if joined else inputs
    in_specs = [block(array.shape[1], part if joined else 0) for part, array in enumerate(parts)]
    in_specs.append(pl.BlockSpec((rows, S, T), lambda row, group: (row, 0, 0)))
    out_specs = [block(T)]
    like = [jax.ShapeDtypeStruct((B, T, H), q.dtype)]
    if gradient is not None:
        in_specs.append(block(T))
        out_specs = [whole] if joined else [block(array.shape[1]) for array in inputs]
        like = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in inputs]
    given = [*parts, mask] if gradient is None else [*parts, mask, gradient]
    tokens = 2 * T + 2 * S if gradient is None else 3 * T + 4 * S  # of all arrays with H numbers a token
    numbers = B * tokens * H * q.dtype.itemsize + mask.size
    return pl.pallas_call(
        functools.partial(kernel, sizes=sizes),
        grid=(B // rows, steps),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=like,
        interpret=interpret,
        name=f"{name}_of_{sizes.heads}_heads",  # which plans read
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_MEMORY),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * B * T * S * H, bytes_accessed=numbers, transcendentals=B * T * S * H // D
        ),
    )(*given)


def _forward_kernel(q_ref: Any, k_ref: Any, v_ref: Any, mask_ref: Any, out_ref: Any, *, sizes: _Sizes) -> None:
    hidden, lanes = _hidden_keys(mask_ref, sizes), _lanes_of_heads(sizes)

    def scores(row: int, at: slice) -> jax.Array:
        return _scores(q_ref[row, :, at], k_ref[row, :, at], lanes, sizes)

    def probabilities(scores_SxgT: jax.Array, row: int) -> tuple[jax.Array, jax.Array]:
        exps_SxgT, inverse_1xgT, _ = _softmax(scores_SxgT + hidden[row])
        return exps_SxgT.astype(v_ref.dtype), inverse_1xgT

    def output(exps_SxgT: jax.Array, inverse_1xgT: jax.Array, row: int, at: slice) -> None:
        out_LxgT = _product(v_ref[row, :, at], exps_SxgT, 0, 0) * inverse_1xgT
        out_ref[row, :, at] = _heads_side_by_side(out_LxgT, sizes).astype(out_ref.dtype)

    _in_turn(sizes, scores, probabilities, output)


def _backward_kernel(q_ref: Any, k_ref: Any, v_ref: Any, mask_ref: Any, grad_ref: Any, *out_refs: Any, sizes: _Sizes) -> None:
    hidden, lanes = _hidden_keys(mask_ref, sizes), _lanes_of_heads(sizes)

    def store(part: int, row: int, at: slice, value: jax.Array) -> None:
        if len(out_refs) > 1:
            out_refs[part][row, :, at] = value.astype(out_refs[part].dtype)
            return
        start = part * sizes.width + at.start
        if sizes.groups * sizes.lanes < sizes.width:  # a place that is not known now keeps other parts waiting
            start = pl.multiple_of(start + pl.program_id(1) * sizes.lanes, sizes.lanes)
        out_refs[0][row, :, pl.ds(start, sizes.lanes)] = value.astype(out_refs[0].dtype)

    def scores(row: int, at: slice) -> tuple[jax.Array, ...]:
        queries_gTxL = _stacked(q_ref[row, :, at].astype(jnp.float32) * _in_base_2(sizes), lanes, q_ref.dtype)
        grad_gTxL = _stacked(grad_ref[row, :, at].astype(jnp.float32), lanes, grad_ref.dtype)
        scores_SxgT = _product(k_ref[row, :, at], queries_gTxL, 1, 1)
        return scores_SxgT, _product(v_ref[row, :, at], grad_gTxL, 1, 1), queries_gTxL, grad_gTxL

    def gradients(value: tuple[jax.Array, ...], row: int) -> tuple[jax.Array, ...]:
        scores_SxgT, dprobs_SxgT, queries_gTxL, grad_gTxL = value
        exps_SxgT, inverse_1xgT, largest_1xgT = _softmax(scores_SxgT + hidden[row])
        probs_SxgT = exps_SxgT * inverse_1xgT
        mean_1xgT = jnp.sum(probs_SxgT * dprobs_SxgT, axis=0, keepdims=True)
        # A query that sees no key has equal probabilities whatever its scores are: they get no gradient.
        sees_1xgT = (largest_1xgT > HIDDEN / 2).astype(jnp.float32)
        dscores_SxgT = probs_SxgT * ((dprobs_SxgT - mean_1xgT) * sees_1xgT)
        return probs_SxgT.astype(v_ref.dtype), dscores_SxgT.astype(k_ref.dtype), queries_gTxL, grad_gTxL

    def output(
        probs_SxgT: jax.Array, dscores_SxgT: jax.Array, queries_gTxL: jax.Array, grad_gTxL: jax.Array, row: int, at: slice
    ) -> None:
        store(2, row, at, _product(probs_SxgT, grad_gTxL, 1, 0))
        # The queries have a factor log2(e) that is not theirs.
        store(1, row, at, _product(dscores_SxgT, queries_gTxL, 1, 0) * math.log(2))
        store(0, row, at, _heads_side_by_side(_product(k_ref[row, :, at], dscores_SxgT, 0, 0) * sizes.scale, sizes))

    _in_turn(sizes, scores, gradients, output)


def _in_turn(sizes: _Sizes, scores: Any, weigh: Any, output: Any) -> None:
    """The three parts of every row and group; the products of the next one come before the softmax of this one."""
    places = [(row, slice(n * sizes.lanes, (n + 1) * sizes.lanes)) for row in range(sizes.rows) for n in range(sizes.groups)]
    waiting = scores(*places[0])
    weighed: Any = None
    for number, place in enumerate(places):
        value, waiting = waiting, scores(*places[number + 1]) if number + 1 < len(places) else None
        before, weighed = weighed, weigh(value, place[0])
        if before is not None:
            output(*before, *places[number - 1])
    output(*weighed, *places[-1])


def _product(a: jax.Array, b: jax.Array, axis_of_a: int, axis_of_b: int) -> jax.Array:
    """The product over one axis of each, in float32."""
    return jax.lax.dot_general(a, b, (((axis_of_a,), (axis_of_b,)), ((), ())), preferred_element_type=jnp.float32)


def _in_base_2(sizes: _Sizes) -> float:
    return sizes.scale * math.log2(math.e)


def _scores(q_TxL: jax.Array, k_SxL: jax.Array, lanes: Sequence[jax.Array], sizes: _Sizes) -> jax.Array:
    """Scores f32[S, gT] in base 2, the queries of each head side by side."""
    queries_gTxL = _stacked(q_TxL.astype(jnp.float32) * _in_base_2(sizes), lanes, q_TxL.dtype)
    return _product(k_SxL, queries_gTxL, 1, 1)


def _softmax(scores_SxgT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """2 ** (scores - the largest of a query), the inverse of their sum, and the largest."""
    largest_1xgT = jnp.max(scores_SxgT, axis=0, keepdims=True)
    exps_SxgT = jnp.exp2(scores_SxgT - largest_1xgT)
    return exps_SxgT, 1.0 / jnp.sum(exps_SxgT, axis=0, keepdims=True), largest_1xgT


def _hidden_keys(mask_ref: Any, sizes: _Sizes) -> list[jax.Array]:
    """Of every row f32[S, gT]: 0 at keys that a query may see, and HIDDEN at the others."""
    masks = [(mask_ref[row].astype(jnp.float32) - 1.0) * -HIDDEN for row in range(sizes.rows)]
    return [jnp.concatenate([mask_SxT] * sizes.heads, axis=1) for mask_SxT in masks]


def _lanes_of_heads(sizes: _Sizes) -> list[jax.Array]:
    """f32[1, L] of every head of a group: 1 in its lanes."""
    lane_1xL = jax.lax.broadcasted_iota(jnp.int32, (1, sizes.lanes), 1)
    starts = [head * sizes.head_size for head in range(sizes.heads)]
    return [((lane_1xL >= start) & (lane_1xL < start + sizes.head_size)).astype(jnp.float32) for start in starts]


def _stacked(x_TxL: jax.Array, lanes: Sequence[jax.Array], dtype: Any) -> jax.Array:
    """[gT, L]: x for each head, with zeros in the lanes of the others."""
    return jnp.concatenate([x_TxL * lanes_1xL for lanes_1xL in lanes], axis=0).astype(dtype)


def _heads_side_by_side(x_LxgT: jax.Array, sizes: _Sizes) -> jax.Array:
    """f32[T, L] of each head's lanes for its own queries."""
    D, T = sizes.head_size, sizes.queries
    own_LxT = [x_LxgT[head * D : (head + 1) * D, head * T : (head + 1) * T] for head in range(sizes.heads)]
    return jnp.concatenate(own_LxT, axis=0).T
