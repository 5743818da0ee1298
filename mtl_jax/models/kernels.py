"""Which kernels a trunk's layers run: ordinary operations, or fused kernels where the devices have them.

A kernel computes the same numbers as the plain form, to rounding. It is chosen when a run is prepared, for the devices of its
mesh, so that a plan for a TPU has the TPU's kernels on any machine. What a kernel does not compute stays plain: other sizes,
dropout on attention probabilities, a bias on scores.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mtl_jax.core.errors import UserError, listed
from mtl_jax.core.parts import Registry
from mtl_jax.models import layers
from mtl_jax.models.layers import PLAIN, Kernels
from mtl_jax.models.over_rows import OverRows, on_one_device, over_rows_of

# The mesh of a run -> the kernels for its devices.
KERNELS: Registry[Callable[[Mesh], Kernels]] = Registry("kernels", {})
register = KERNELS.register

# x sigmoid(x (a + b x^2 + c x^4)) is x Phi(x) to 2.6e-5, which bfloat16 rounds away; beyond 6 it grows as it does there.
_GELU = (1.59501317, 7.40136542e-02, -7.03417275e-04)
_GELU_END = 36.0


@register("plain")
def plain(mesh: Mesh) -> Kernels:
    """Ordinary operations, which XLA fuses as it can."""
    return PLAIN


@register("fused")
def fused(mesh: Mesh) -> Kernels:
    """The fused kernels of the mesh's devices.

    Raises:
        UserError: There are none for them.
    """
    platform = _platform(mesh)
    if platform not in _OF_PLATFORM:
        known = listed(sorted(_OF_PLATFORM))
        raise UserError(f"kernels is fused, but there are none for {platform}; they are for {known}: set kernels to auto")
    return _OF_PLATFORM[platform](mesh)


@register("auto")
def auto(mesh: Mesh) -> Kernels:
    """Fused kernels where there are some for the mesh's devices, else plain."""
    return _OF_PLATFORM.get(_platform(mesh), plain)(mesh)


def with_kernels(module: Any, name: str, mesh: Mesh) -> Any:
    """A trunk's module with the kernels of a name for the devices of a mesh; a user's module without the field is unchanged.

    Args:
        module: A linen module, or one with adapters.
        name: auto, plain, fused, or one that register() added.
        mesh: The devices.

    Raises:
        UserError: There are no such kernels, or none for these devices.

    >>> import jax
    >>> from mtl_jax.models.encoder import EmbeddingConfig, SharedEmbedding
    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> with_kernels(SharedEmbedding(EmbeddingConfig(10, 4)), "auto", mesh).config.dimension
    4
    """
    if not isinstance(module, nn.Module):  # with adapters, which change the projections one by one
        base = with_kernels(module.base, name, mesh)
        if not _has_kernels(base):
            return module
        apart = dataclasses.replace(base.kernels, attend_joined=None)
        return dataclasses.replace(module, base=base.clone(kernels=apart))
    rate: float = getattr(getattr(module, "config", None), "attention_dropout", 0.0)
    if name == "fused" and rate > 0:
        raise UserError(
            "kernels is fused, and fused attention has no dropout on attention probabilities, which the trunk has: set "
            "trunk.dropout to 0 (of a trunk from scratch attention_dropout), or kernels to auto"
        )
    return module.clone(kernels=chosen(name, mesh)) if _has_kernels(module) else module


def _has_kernels(module: Any) -> bool:
    return isinstance(getattr(module, "kernels", None), Kernels)


def chosen(name: str, mesh: Mesh) -> Kernels:
    """The kernels of a name for the devices of a mesh.

    Raises:
        UserError: There are no such kernels, or none for these devices.
    """
    return KERNELS.find(name, "kernels")(mesh)


def _platform(mesh: Mesh) -> str:
    platform = mesh.devices.flat[0].platform
    return "gpu" if platform in ("cuda", "rocm") else str(platform)


def _for_tpus(mesh: Mesh) -> Kernels:
    over_rows = over_rows_of(mesh)
    return Kernels(
        attend=functools.partial(attend_on_tpus, over_rows=over_rows),
        norm=functools.partial(norm_on_tpus, over_rows=over_rows),
        gelu=gelu_in_bfloat16,
        attend_joined=functools.partial(self_attend_on_tpus, over_rows=over_rows),
    )


def _for_gpus(mesh: Mesh) -> Kernels:
    return Kernels(attend=attend_with_cudnn)


_OF_PLATFORM: dict[str, Callable[[Mesh], Kernels]] = {"tpu": _for_tpus, "gpu": _for_gpus}


def attend_on_tpus(
    q_BxTxNxD: jax.Array,
    k_BxNxSxD: jax.Array,
    v_BxNxSxD: jax.Array,
    mask_BxTxS: jax.Array,
    *,
    scale: float,
    bias_BxNxTxS: jax.Array | None = None,
    dropout: Callable[[jax.Array], jax.Array] | None = None,
    over_rows: OverRows = on_one_device,
    interpret: bool = False,
) -> jax.Array:
    """layers.attend as a kernel for TPUs; plain with a bias, with dropout, and for sizes that the kernel does not compute.

    Args:
        q_BxTxNxD: As for layers.attend, and so are the next ones.
        k_BxNxSxD: Keys.
        v_BxNxSxD: Values.
        mask_BxTxS: The keys that each query may see.
        scale: Factor on the queries.
        bias_BxNxTxS: Added to the scores, or None.
        dropout: A function of the probabilities, or None.
        over_rows: How the kernel runs on several devices.
        interpret: As for tpu_attention.attention.
    """
    from mtl_jax.models import tpu_attention  # takes a while to import

    (B, T, N, D), S = q_BxTxNxD.shape, k_BxNxSxD.shape[2]
    if bias_BxNxTxS is not None or dropout is not None or not tpu_attention.fits(T, S, N, D):
        return layers.attend(
            q_BxTxNxD, k_BxNxSxD, v_BxNxSxD, mask_BxTxS, scale=scale, bias_BxNxTxS=bias_BxNxTxS, dropout=dropout
        )
    k_BxSxH, v_BxSxH = (array.swapaxes(1, 2).reshape(B, S, N * D) for array in (k_BxNxSxD, v_BxNxSxD))
    mask_BxSxT = jnp.broadcast_to(mask_BxTxS, (B, T, S)).swapaxes(1, 2).astype(jnp.int8)
    q_BxTxH = q_BxTxNxD.reshape(B, T, N * D)
    return tpu_attention.attention(q_BxTxH, k_BxSxH, v_BxSxH, mask_BxSxT, D, scale, over_rows, interpret).reshape(B, T, N, D)


def self_attend_on_tpus(
    project: Callable[[], jax.Array],
    mask_BxTxT: jax.Array,
    tokens: int,
    heads: int,
    head_size: int,
    scale: float,
    over_rows: OverRows = on_one_device,
    interpret: bool = False,
) -> jax.Array | None:
    """Self-attention f[B, T, H] as a kernel for TPUs; None for sizes that the kernel does not compute.

    Args:
        project: Gives queries, keys and values side by side, f[B, T, 3 H], from one product.
        mask_BxTxT: The keys that each query may see; a middle axis of size 1 is for all queries.
        tokens: T.
        heads: N.
        head_size: D.
        scale: Factor on the queries.
        over_rows: How the kernel runs on several devices.
        interpret: As for tpu_attention.attention.
    """
    from mtl_jax.models import tpu_attention  # takes a while to import

    if not tpu_attention.fits(tokens, tokens, heads, head_size):
        return None
    qkv_BxTx3H = project()
    mask_i8 = jnp.broadcast_to(mask_BxTxT, (len(qkv_BxTx3H), tokens, tokens)).swapaxes(1, 2).astype(jnp.int8)
    return tpu_attention.self_attention(qkv_BxTx3H, mask_i8, head_size, scale, over_rows, interpret)


def attend_with_cudnn(
    q_BxTxNxD: jax.Array,
    k_BxNxSxD: jax.Array,
    v_BxNxSxD: jax.Array,
    mask_BxTxS: jax.Array,
    *,
    scale: float,
    bias_BxNxTxS: jax.Array | None = None,
    dropout: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """layers.attend by cuDNN's fused attention; plain with dropout, in float32, and for sizes that cuDNN does not compute.

    Args:
        q_BxTxNxD: As for layers.attend, and so are the next ones.
        k_BxNxSxD: Keys.
        v_BxNxSxD: Values.
        mask_BxTxS: The keys that each query may see.
        scale: Factor on the queries.
        bias_BxNxTxS: Added to the scores, or None.
        dropout: A function of the probabilities, or None.
    """
    (_, T, _, D), S = q_BxTxNxD.shape, k_BxNxSxD.shape[2]
    half = q_BxTxNxD.dtype in (jnp.bfloat16, jnp.float16)
    if dropout is not None or not half or D % 8 or D > 128 or T % 2 or S % 2:
        return layers.attend(
            q_BxTxNxD, k_BxNxSxD, v_BxNxSxD, mask_BxTxS, scale=scale, bias_BxNxTxS=bias_BxNxTxS, dropout=dropout
        )
    bias = None if bias_BxNxTxS is None else bias_BxNxTxS.astype(q_BxTxNxD.dtype)
    return jax.nn.dot_product_attention(
        q_BxTxNxD,
        k_BxNxSxD.swapaxes(1, 2),
        v_BxNxSxD.swapaxes(1, 2),
        bias,
        jnp.broadcast_to(mask_BxTxS, (len(q_BxTxNxD), T, S))[:, None],
        scale=scale,
        implementation="cudnn",
    )


def norm_on_tpus(
    x_BxTxH: jax.Array,
    scale_H: jax.Array,
    bias_H: jax.Array,
    epsilon: float,
    over_rows: OverRows = on_one_device,
    interpret: bool = False,
) -> jax.Array | None:
    """A layer norm as a kernel for TPUs; None for sizes that the kernel does not compute.

    Args:
        x_BxTxH: As for tpu_norm.layer_norm, and so are the next ones.
        scale_H: f32.
        bias_H: f32.
        epsilon: Added to the variance.
        over_rows: How the kernel runs on several devices.
        interpret: As for tpu_norm.layer_norm.
    """
    from mtl_jax.models import tpu_norm  # takes a while to import

    if x_BxTxH.ndim != 3 or not tpu_norm.fits(x_BxTxH.shape[0] * x_BxTxH.shape[1], x_BxTxH.shape[-1]):
        return None
    return tpu_norm.layer_norm(x_BxTxH, scale_H, bias_H, epsilon, over_rows, interpret)


def gelu_in_bfloat16(x: jax.Array) -> jax.Array:
    """The erf form of GELU, for arrays in bfloat16 by a logistic function that differs from it by less than 2.6e-5.

    On a TPU the erf costs more than the matrix product before it. Other dtypes get the erf itself.
    """
    return _logistic_gelu(x) if x.dtype == jnp.bfloat16 else layers.ACTIVATIONS["gelu"](x)


@jax.custom_vjp
def _logistic_gelu(x: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    return (y * jax.nn.sigmoid(y * _slope(jnp.minimum(y * y, _GELU_END)))).astype(x.dtype)


def _slope(square: jax.Array) -> jax.Array:
    a, b, c = _GELU
    return a + square * (b + square * c)


def _logistic_gelu_backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    a, b, c = _GELU
    y = x.astype(jnp.float32)
    square = jnp.minimum(y * y, _GELU_END)
    share = jax.nn.sigmoid(y * _slope(square))
    derivative = share * (1.0 + y * (1.0 - share) * (a + square * (3 * b + square * (5 * c))))
    return ((gradient.astype(jnp.float32) * derivative).astype(x.dtype),)


# Only x is kept: the derivative costs less than to write it out.
_logistic_gelu.defvjp(lambda x: (_logistic_gelu(x), x), _logistic_gelu_backward)
