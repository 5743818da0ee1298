"""From the decoder's output to logits, with a matrix that is laid out for it once and not at every step.

Shapes in names: B rows, K beams, H hidden size, V vocabulary, W the same in whole blocks.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.decoding.steps import BLOCK
from mtl_jax.models.encoder_decoder import Seq2Seq


class Vocabulary(NamedTuple):
    """What logits are made with.

    Attributes:
        kernel: f[H, W], in the compute dtype.
        bias: f32[W], -inf at places that are no token.
    """

    kernel: jax.Array
    bias: jax.Array


@functools.partial(jax.jit, static_argnames="model")
def prepare(model: Seq2Seq, params: Any) -> Vocabulary:
    """What logits of a model are made with, laid out for it; it takes as much memory as the table of tokens.

    Args:
        model: Encoder and decoder.
        params: {"trunk": ..., "head": ...}.
    """
    found: Any = model.apply({"params": params}, method="projection")
    kernel_HxV, bias_V = found
    spare = -kernel_HxV.shape[1] % BLOCK
    return Vocabulary(jnp.pad(kernel_HxV, ((0, 0), (0, spare))), jnp.pad(bias_V, (0, spare), constant_values=-jnp.inf))


def logits(hidden_BxKxH: jax.Array, vocabulary: Vocabulary, scale: float) -> jax.Array:
    """f32[B, K, W] of the decoder's last output; -inf at places that are no token."""
    x_BxKxW = jnp.einsum("bkh,hw->bkw", hidden_BxKxH * scale, vocabulary.kernel, preferred_element_type=jnp.float32)
    return x_BxKxW + vocabulary.bias
