"""Layer norm in one kernel on TPUs: a row is read once, forward and backward, and its statistics are never written.

XLA reads a row three times forward and four times backward, as every sum over a row ends a loop over the array.

Shapes in names: B rows, T tokens, H hidden size, R = B * T.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mtl_jax.models.over_rows import OverRows, on_one_device
from mtl_jax.models.tpu_attention import LANES

_TILE = 16  # rows of a tile in bfloat16
_NUMBERS = 2**18  # of a block


def fits(tokens: int, hidden: int) -> bool:
    """Whether the kernel computes the norm of arrays with so many tokens, over all rows, and such a size.

    >>> fits(8192, 384), fits(8192, 312)
    (True, False)
    """
    return hidden % LANES == 0 and tokens % _TILE == 0 and _TILE * hidden <= _NUMBERS


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def layer_norm(
    x_BxTxH: jax.Array,
    scale_H: jax.Array,
    bias_H: jax.Array,
    epsilon: float,
    over_rows: OverRows = on_one_device,
    interpret: bool = False,
) -> jax.Array:
    """Layer norm (Ba et al. 2016) over the last axis, with the two-pass variance, in float32.

    Args:
        x_BxTxH: The input; fits() says for which sizes there is a kernel.
        scale_H: f32.
        bias_H: f32.
        epsilon: Added to the variance.
        over_rows: How the kernel runs on several devices.
        interpret: Whether it runs as an ordinary program, for tests on a CPU.

    Returns:
        f[B, T, H] in the dtype of the input.
    """

    def normed(x_BxTxH: jax.Array, scale_H: jax.Array, bias_H: jax.Array) -> jax.Array:
        kernel = functools.partial(_forward_kernel, epsilon=epsilon)
        (y_RxH,) = _call(kernel, "norm_forward", x_BxTxH, [], [scale_H, bias_H], 0, interpret)
        return y_RxH.reshape(x_BxTxH.shape)

    return over_rows(normed, same=2)(x_BxTxH, scale_H, bias_H)


def _layer_norm_forward(x: jax.Array, scale: jax.Array, bias: jax.Array, *options: Any) -> tuple[jax.Array, Any]:
    return layer_norm(x, scale, bias, *options), (x, scale)


def _layer_norm_backward(epsilon: float, over_rows: OverRows, interpret: bool, kept: Any, gradient: jax.Array) -> Any:
    x_BxTxH, scale_H = kept

    def pull(x_BxTxH: jax.Array, gradient: jax.Array, scale_H: jax.Array) -> tuple[jax.Array, ...]:
        kernel = functools.partial(_backward_kernel, epsilon=epsilon)
        dx, dscale, dbias = _call(kernel, "norm_backward", x_BxTxH, [gradient], [scale_H], 2, interpret)
        return dx.reshape(x_BxTxH.shape), dscale, dbias

    # Every device has the sums over its own rows.
    dx_BxTxH, dscale_Dx1xH, dbias_Dx1xH = over_rows(pull, same=1)(x_BxTxH, gradient, scale_H)
    return dx_BxTxH, dscale_Dx1xH.sum((0, 1)), dbias_Dx1xH.sum((0, 1))


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def _call(
    kernel: Any,
    name: str,
    x_BxTxH: jax.Array,
    others: Sequence[jax.Array],
    vectors: Sequence[jax.Array],
    sums: int,
    interpret: bool,
) -> Sequence[jax.Array]:
    """Runs a kernel over blocks of rows: the rows of its first result, and sums f32[1, 1, H] over all rows."""
    arrays = [array.reshape(-1, array.shape[-1]) for array in (x_BxTxH, *others)]
    R, H = arrays[0].shape
    rows = max(n for n in (16, 32, 64, 128, 256, 512) if R % n == 0 and n * H <= _NUMBERS)
    block = pl.BlockSpec((rows, H), lambda number: (number, 0))
    vector = pl.BlockSpec((1, H), lambda number: (0, 0))
    total = pl.BlockSpec((1, 1, H), lambda number: (0, 0, 0))
    outputs = [jax.ShapeDtypeStruct((R, H), x_BxTxH.dtype), *[jax.ShapeDtypeStruct((1, 1, H), jnp.float32)] * sums]
    return pl.pallas_call(
        kernel,
        grid=(R // rows,),
        in_specs=[*[block] * len(arrays), *[vector] * len(vectors)],
        out_specs=[block, *[total] * sums],
        out_shape=outputs,
        interpret=interpret,
        name=name,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=pl.CostEstimate(
            flops=10 * (1 + sums) * R * H, bytes_accessed=(len(arrays) + 1) * R * H * x_BxTxH.dtype.itemsize, transcendentals=R
        ),
    )(*arrays, *(array.astype(jnp.float32)[None] for array in vectors))


def _forward_kernel(x_ref: Any, scale_ref: Any, bias_ref: Any, out_ref: Any, *, epsilon: float) -> None:
    centred, inverse = _statistics(x_ref, epsilon)
    out_ref[...] = (centred * (inverse * scale_ref[...]) + bias_ref[...]).astype(out_ref.dtype)


def _backward_kernel(
    x_ref: Any, grad_ref: Any, scale_ref: Any, dx_ref: Any, dscale_ref: Any, dbias_ref: Any, *, epsilon: float
) -> None:
    centred, inverse = _statistics(x_ref, epsilon)
    normed, grad = centred * inverse, grad_ref[...].astype(jnp.float32)
    scaled = grad * scale_ref[...]
    means = jnp.mean(scaled, axis=1, keepdims=True), jnp.mean(scaled * normed, axis=1, keepdims=True)
    dx_ref[...] = (inverse * (scaled - means[0] - normed * means[1])).astype(dx_ref.dtype)

    @pl.when(pl.program_id(0) == 0)
    def _() -> None:
        dscale_ref[...] = jnp.zeros_like(dscale_ref)
        dbias_ref[...] = jnp.zeros_like(dbias_ref)

    dscale_ref[0] += jnp.sum(grad * normed, axis=0, keepdims=True)
    dbias_ref[0] += jnp.sum(grad, axis=0, keepdims=True)


def _statistics(x_ref: Any, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """x without its mean, f32[rows, H], and the inverse of its standard deviation, f32[rows, 1]."""
    x = x_ref[...].astype(jnp.float32)
    centred = x - jnp.mean(x, axis=1, keepdims=True)
    return centred, jax.lax.rsqrt(jnp.mean(centred * centred, axis=1, keepdims=True) + epsilon)
