"""Layer norms of the encoders: flax's, or the same by a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


def layer_norm(
    epsilon: float, dtype: Any, name: str, use_bias: bool = True, kernel: Callable[..., jax.Array | None] | None = None
) -> nn.Module:
    """A layer norm with the two-pass variance, by a kernel if one is given."""
    if kernel is not None:
        return LayerNorm(epsilon, dtype, use_bias, kernel, name=name)
    # flax's fast variance, E[x^2] - E[x]^2, loses all digits on near-constant rows.
    return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, use_bias=use_bias, dtype=dtype, name=name)


class LayerNorm(nn.Module):
    """nn.LayerNorm by a kernel, with the same parameters; plain where the kernel returns None.

    Attributes:
        epsilon: Added to the variance.
        dtype: Of the output.
        use_bias: Whether there is a bias.
        kernel: (x f[B, T, H], scale f32[H], bias f32[H], epsilon) -> f[B, T, H] or None.
    """

    epsilon: float
    dtype: Any
    use_bias: bool
    kernel: Callable[..., jax.Array | None]

    @nn.compact
    def __call__(self, x_BxTxH: jax.Array) -> jax.Array:
        shape = (x_BxTxH.shape[-1],)
        scale_H = self.param("scale", nn.initializers.ones, shape)
        bias_H = self.param("bias", nn.initializers.zeros, shape) if self.use_bias else None
        zeros_H = jnp.zeros(shape)
        normed = self.kernel(x_BxTxH, scale_H, zeros_H if bias_H is None else bias_H, self.epsilon)
        if normed is not None:
            return normed.astype(self.dtype)
        x = x_BxTxH.astype(jnp.float32)
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        inverse = lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.epsilon)
        return (centred * (inverse * scale_H) + (zeros_H if bias_H is None else bias_H)).astype(self.dtype)
