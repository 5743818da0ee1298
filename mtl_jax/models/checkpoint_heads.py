"""The heads of published encoder checkpoints, and an encoder with one of them on top.

As in the checkpoints a row is one example, and "first" means the row's first token; rows are not packed. Layers that have
different names in checkpoints have different names here, too, so that a parameter's name alone determines its name in a file.

Shapes in names: B rows, T tokens, H hidden size, E embedding size, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_jax.models.dropout import Dropout
from mtl_jax.models.encoder import EncoderOutput
from mtl_jax.models.layers import ACTIVATIONS, Dense
from mtl_jax.models.norms import layer_norm


class Pooler(nn.Module):
    """BERT's pooler: a tanh layer on the first token."""

    dtype: Any
    init: Any

    @nn.compact
    def __call__(self, hidden_BxTxH: jax.Array, attention_mask_BxT: jax.Array) -> jax.Array:
        H = hidden_BxTxH.shape[-1]
        return nn.tanh(Dense(H, dtype=self.dtype, kernel_init=self.init, name="dense")(hidden_BxTxH[:, 0]))


class SequenceHead(nn.Module):
    """Logits f[B, num_labels] of a row: from the pooler's output if there is one, else from its first token.

    Attributes:
        num_labels: Outputs.
        dtype: Compute dtype.
        init: Initialiser of the kernels.
        dropout: Rate in front of the output layer.
        activation: Activation of a dense layer before it; None for no such layer.
        drop_input: Whether dropout is in front of that layer as well.
        input_dropout: Its rate there, if drop_input is False.
    """

    num_labels: int
    dtype: Any
    init: Any
    dropout: float = 0.0
    activation: str | None = None
    drop_input: bool = False
    input_dropout: float = 0.0

    @nn.compact
    def __call__(
        self, hidden_BxTxH: jax.Array, pooled_BxH: jax.Array | None, table_VxE: jax.Array | None, deterministic: bool
    ) -> jax.Array:
        dense = functools.partial(Dense, dtype=self.dtype, kernel_init=self.init)
        drop = Dropout(self.dropout)
        x_BxH = hidden_BxTxH[:, 0] if pooled_BxH is None else pooled_BxH
        if self.activation is not None:
            drop_input = drop if self.drop_input else Dropout(self.input_dropout)
            x_BxH = drop_input(x_BxH, deterministic=deterministic)
            x_BxH = ACTIVATIONS[self.activation](dense(x_BxH.shape[-1], name="dense")(x_BxH))
        return dense(self.num_labels, name="classifier")(drop(x_BxH, deterministic=deterministic))


class TokenHead(nn.Module):
    """Logits f[B, T, num_labels] of every token: tagging, and start and end of an answer.

    Attributes:
        num_labels: Outputs.
        dtype: Compute dtype.
        init: Initialiser of the kernel.
        dropout: Rate in front.
        layer: Name of the layer: "tags" or "answers".
    """

    num_labels: int
    dtype: Any
    init: Any
    dropout: float = 0.0
    layer: str = "tags"

    @nn.compact
    def __call__(
        self, hidden_BxTxH: jax.Array, pooled_BxH: jax.Array | None, table_VxE: jax.Array | None, deterministic: bool
    ) -> jax.Array:
        x_BxTxH = Dropout(self.dropout)(hidden_BxTxH, deterministic=deterministic)
        return Dense(self.num_labels, dtype=self.dtype, kernel_init=self.init, name=self.layer)(x_BxTxH)


class MaskedLMHead(nn.Module):
    """Logits f[B, T, V] of every token over the vocabulary (Devlin et al. 2019).

    Attributes:
        vocab_size: V.
        width: E, the width of the token table.
        activation: Activation of the transform.
        layer_norm_eps: Epsilon of the transform's norm.
        dtype: Compute dtype.
        init: Initialiser of the kernels.
        tied: Whether the token table is the output weight; else the head has its own, "decoder".
        use_bias: Whether the output has a bias.
        transform_bias: Whether the transform's dense layer has a bias.
        norm_bias: Whether the transform's norm has a bias.
    """

    vocab_size: int
    width: int
    activation: str
    layer_norm_eps: float
    dtype: Any
    init: Any
    tied: bool = True
    use_bias: bool = True
    transform_bias: bool = True
    norm_bias: bool = True

    @nn.compact
    def __call__(
        self, hidden_BxTxH: jax.Array, pooled_BxH: jax.Array | None, table_VxE: jax.Array | None, deterministic: bool
    ) -> jax.Array:
        dense = functools.partial(Dense, dtype=self.dtype, kernel_init=self.init)
        x_BxTxE = dense(self.width, use_bias=self.transform_bias, name="transform")(hidden_BxTxH)
        x_BxTxE = ACTIVATIONS[self.activation](x_BxTxE)
        x_BxTxE = layer_norm(self.layer_norm_eps, self.dtype, "norm", self.norm_bias)(x_BxTxE)
        if self.tied:
            assert table_VxE is not None
            logits_BxTxV = jnp.einsum("bte,ve->btv", x_BxTxE, table_VxE.astype(self.dtype))
        else:
            logits_BxTxV = dense(self.vocab_size, use_bias=False, name="decoder")(x_BxTxE)
        if not self.use_bias:
            return logits_BxTxV
        return logits_BxTxV + self.param("bias", nn.initializers.zeros, (self.vocab_size,)).astype(self.dtype)


class ReplacedTokenHead(nn.Module):
    """ELECTRA's discriminator (Clark et al. 2020): f[B, T], above 0 where a token was replaced."""

    activation: str
    dtype: Any
    init: Any

    @nn.compact
    def __call__(
        self, hidden_BxTxH: jax.Array, pooled_BxH: jax.Array | None, table_VxE: jax.Array | None, deterministic: bool
    ) -> jax.Array:
        dense = functools.partial(Dense, dtype=self.dtype, kernel_init=self.init)
        x_BxTxH = ACTIVATIONS[self.activation](dense(hidden_BxTxH.shape[-1], name="replaced_dense")(hidden_BxTxH))
        return dense(1, name="replaced")(x_BxTxH)[..., 0]


class EncoderModel(nn.Module):
    """An encoder with the pooler and the head of its checkpoint; parameters {"trunk"[, "pooler"][, "head"]}.

    Attributes:
        trunk: A module with the call signature of models.encoder.Encoder whose token table is embeddings/word/embedding.
        pooler: Called as pooler(hidden, attention_mask), or None.
        head: Called as head(hidden, pooled, table, deterministic), or None; one with reads_mask gets attention_mask=, too.
    """

    trunk: nn.Module
    pooler: nn.Module | None = None
    head: nn.Module | None = None

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        *,
        token_type_ids: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        deterministic: bool = True,
    ) -> EncoderOutput:
        """The trunk's hidden states f[B, T, H], pooled f[B, H] and logits; arguments as for models.encoder.Encoder."""
        hidden_BxTxH = self.trunk(
            input_ids,
            attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            segment_ids=segment_ids,
            deterministic=deterministic,
        ).hidden
        if attention_mask is None:
            attention_mask = jnp.ones_like(input_ids)
        pooled_BxH = None if self.pooler is None else self.pooler(hidden_BxTxH, attention_mask)
        if self.head is None:
            return EncoderOutput(hidden_BxTxH, pooled_BxH)
        table_VxE = self.trunk.variables["params"]["embeddings"]["word"]["embedding"]
        mask = {"attention_mask": attention_mask} if getattr(self.head, "reads_mask", False) else {}
        logits = self.head(hidden_BxTxH, pooled_BxH, table_VxE, deterministic, **mask)
        return EncoderOutput(hidden_BxTxH, pooled_BxH, logits)
