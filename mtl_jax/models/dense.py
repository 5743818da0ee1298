"""Products with kernels, over rows: the leading axes of what is multiplied are one axis.

The gradient of a kernel is a sum over those axes. Over one axis XLA's CPU backend computes it three times as fast as over
several, which it transposes first: on one core a step of MiniLM takes 0.42 s in place of 0.52, with 16 rows of 64 tokens.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


def times(x_xI: jax.Array, kernel_IxO: jax.Array) -> jax.Array:
    """x @ kernel, f[..., O]; kernels of more than two axes, one for each row, are multiplied as matmul does."""
    if kernel_IxO.ndim != 2:
        return jnp.matmul(x_xI, kernel_IxO)
    return jnp.matmul(x_xI.reshape(-1, x_xI.shape[-1]), kernel_IxO).reshape(*x_xI.shape[:-1], -1)


def _by_rows(x_xI: jax.Array, kernel_IxO: jax.Array, dimensions: Any, precision: Any = None) -> jax.Array:
    """lax.dot_general as nn.Dense calls it."""
    assert dimensions == (((x_xI.ndim - 1,), (0,)), ((), ()))
    y_RxO = lax.dot_general(x_xI.reshape(-1, x_xI.shape[-1]), kernel_IxO, (((1,), (0,)), ((), ())), precision=precision)
    return y_RxO.reshape(*x_xI.shape[:-1], -1)


Dense = functools.partial(nn.Dense, dot_general=_by_rows)
