"""From the decoder's output to logits, with a matrix that is laid out for it once and not at every step.

Shapes in names: B rows, K beams, H hidden size, V vocabulary, W the same in whole blocks.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.decoding.best import BLOCK
from mtl_jax.models.seq2seq import Seq2Seq


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
    """The vocabulary of a model with the parameters {"trunk": ..., "head": ...}."""
    found: Any = model.apply({"params": params}, method="projection")
    kernel_HxV, bias_V = found
    spare = -kernel_HxV.shape[1] % BLOCK
    return Vocabulary(jnp.pad(kernel_HxV, ((0, 0), (0, spare))), jnp.pad(bias_V, (0, spare), constant_values=-jnp.inf))


class _Kept:
    """The vocabulary that was prepared last, for as long as the parameters that it was made of are there."""

    def __init__(self) -> None:
        self.key: tuple = ()
        self.vocabulary: Vocabulary | None = None

    def get(self, model: Seq2Seq, params: Any) -> Vocabulary:
        leaves = jax.tree.leaves(params)
        if not all(isinstance(leaf, jax.Array) for leaf in leaves):  # numpy arrays may change in place
            return prepare(model, params)
        if (
            self.vocabulary is None
            or self.key[0] != model
            or any(kept() is not leaf for kept, leaf in zip(self.key[1], leaves, strict=True))
        ):
            self.vocabulary = prepare(model, params)
            self.key = model, [weakref.ref(leaf, self.forget) for leaf in leaves]
        return self.vocabulary

    def forget(self, _: Any) -> None:
        self.key, self.vocabulary = (), None


_kept = _Kept()


def vocabulary_of(model: Seq2Seq, params: Any) -> Vocabulary:
    """As prepare(), which need not run again for the parameters that it last ran for."""
    return _kept.get(model, params)


def logits(hidden_BxKxH: jax.Array, vocabulary: Vocabulary, scale: float) -> jax.Array:
    """f32[B, K, W] of the decoder's last output; -inf at places that are no token."""
    x_BxKxW = jnp.einsum("bkh,hw->bkw", hidden_BxKxH * scale, vocabulary.kernel, preferred_element_type=jnp.float32)
    return x_BxKxW + vocabulary.bias
