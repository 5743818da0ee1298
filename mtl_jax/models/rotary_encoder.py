"""Encoders of embedding models: BERT's blocks with rotary positions and a gated feed-forward part (NomicBERT, GTE).

Shapes in names: B rows, T tokens, H hidden size, N attention heads, F feed-forward size.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_jax.models.dropout import Dropout
from mtl_jax.models.encoder import EncoderOutput
from mtl_jax.models.layers import PLAIN, Dense, Embed, Kernels, attention_mask_BxTxT
from mtl_jax.models.modernbert import ModernBertConfig, RotaryAttention, Rotation, rotation
from mtl_jax.models.norms import layer_norm


@dataclasses.dataclass(frozen=True)
class RotaryEncoderConfig:
    """Sizes and constants, read from a checkpoint's config.json.

    Attributes:
        vocab_size: Rows of the token embedding table.
        hidden_size: H, the width of the residual stream.
        num_layers: Number of transformer blocks.
        num_heads: Attention heads; divides hidden_size.
        intermediate_size: F, the width inside the feed-forward part.
        max_length: The longest example in tokens that the checkpoint was trained for.
        theta: Base of the rotary wavelengths.
        type_vocab_size: Rows of the token-type table; 0 for no such table.
        joined_gate: Whether one map makes the gated numbers and, after them, their gates; else two maps.
        attention_bias: Whether the attention's linear maps have a bias.
        output_bias: Whether the map out of the feed-forward part has one.
        activation: Of the gates; a key of ACTIVATIONS.
        layer_norm_eps: Epsilon inside every layer norm.
        dropout: Rate after embeddings and after each block's two parts.
        attention_dropout: Rate on the attention probabilities.
        feed_forward_dropout: Rate inside the feed-forward part.
        head_dropout: Rate in front of the output layer of heads over labels.
        initializer_range: Standard deviation of freshly initialised weights.
        num_labels: Outputs of heads over labels.
        tied: Whether a masked-LM head multiplies with the token table.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_length: int
    theta: float = 1000.0
    type_vocab_size: int = 2
    joined_gate: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    activation: str = "silu"
    layer_norm_eps: float = 1e-12
    dropout: float = 0.0
    attention_dropout: float = 0.0
    feed_forward_dropout: float = 0.0
    head_dropout: float = 0.0
    initializer_range: float = 0.02
    num_labels: int = 2
    tied: bool = True

    @property
    def attention(self) -> ModernBertConfig:
        """The sizes of the attention, which is ModernBERT's."""
        return ModernBertConfig(
            self.vocab_size,
            self.hidden_size,
            self.num_heads,
            self.intermediate_size,
            global_layers=(True,) * self.num_layers,
            attention_bias=self.attention_bias,
            attention_dropout=self.attention_dropout,
            initializer_range=self.initializer_range,
        )


class RotaryEncoder(nn.Module):
    """Token ids to contextual vectors.

    Attributes:
        config: Sizes and constants.
        dtype: Compute dtype; parameters, layer norms, rotations and softmax stay float32.
        kernels: How the layers are computed.
    """

    config: RotaryEncoderConfig
    dtype: Any = jnp.float32
    kernels: Kernels = PLAIN

    @nn.compact
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
        """Encodes a batch of rows.

        Args:
            input_ids: i32[B, T].
            attention_mask: [B, T], 1 at real tokens; None means that all are real.
            token_type_ids: i32[B, T]; None means type 0.
            position_ids: i32[B, T], each token's position in its example; None counts along the row. Only differences matter.
            segment_ids: i32[B, T], the example each token belongs to in a packed row; tokens attend
                inside their own segment only. None means one example a row.
            deterministic: False applies dropout and needs an rng named "dropout".

        Returns:
            EncoderOutput with hidden f[B, T, H].
        """
        cfg = self.config
        if attention_mask is None:
            attention_mask = jnp.ones_like(input_ids)
        if position_ids is None:
            position_ids = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        mask_BxTxT = attention_mask_BxTxT(attention_mask, segment_ids)
        angles = rotation(position_ids, cfg.hidden_size // cfg.num_heads, cfg.theta)
        x_BxTxH = Embeddings(cfg, self.dtype, self.kernels, name="embeddings")(input_ids, token_type_ids, deterministic)
        for i in range(cfg.num_layers):
            x_BxTxH = Block(cfg, self.dtype, self.kernels, name=f"layer_{i}")(x_BxTxH, mask_BxTxT, angles, deterministic)
        return EncoderOutput(hidden=x_BxTxH)


class Embeddings(nn.Module):
    """Sum of token and type embeddings, then layer norm and dropout."""

    config: RotaryEncoderConfig
    dtype: Any
    kernels: Kernels = PLAIN

    @nn.compact
    def __call__(self, ids_BxT: jax.Array, types_BxT: jax.Array | None, deterministic: bool) -> jax.Array:
        cfg = self.config
        init = nn.initializers.normal(cfg.initializer_range)
        embed = functools.partial(Embed, features=cfg.hidden_size, dtype=self.dtype, embedding_init=init)
        x_BxTxH = embed(cfg.vocab_size, name="word")(ids_BxT)
        if cfg.type_vocab_size:
            types_BxT = jnp.zeros_like(ids_BxT) if types_BxT is None else types_BxT
            x_BxTxH += embed(cfg.type_vocab_size, name="token_type")(types_BxT)
        x_BxTxH = layer_norm(cfg.layer_norm_eps, self.dtype, "norm", kernel=self.kernels.norm)(x_BxTxH)
        return Dropout(cfg.dropout)(x_BxTxH, deterministic=deterministic)


class Block(nn.Module):
    """Self-attention and gated feed-forward (Shazeer 2020), each with residual and layer norm after it."""

    is_layer: ClassVar[bool] = True

    config: RotaryEncoderConfig
    dtype: Any
    kernels: Kernels = PLAIN

    @nn.compact
    def __call__(self, x_BxTxH: jax.Array, mask_BxTxT: jax.Array, angles: Rotation, deterministic: bool) -> jax.Array:
        cfg = self.config
        init = nn.initializers.normal(cfg.initializer_range)
        dense = functools.partial(Dense, dtype=self.dtype, kernel_init=init)
        norm = functools.partial(layer_norm, cfg.layer_norm_eps, self.dtype, kernel=self.kernels.norm)
        drop = functools.partial(Dropout(cfg.dropout), deterministic=deterministic)

        attention = RotaryAttention(cfg.attention, self.dtype, self.kernels, name="attention")
        x_BxTxH = norm("attention_norm")(x_BxTxH + drop(attention(x_BxTxH, mask_BxTxT, angles, deterministic)))

        widths = 2 * cfg.intermediate_size if cfg.joined_gate else cfg.intermediate_size
        y_BxTxF = dense(widths, use_bias=False, name="feed_forward_in")(x_BxTxH)
        if cfg.joined_gate:
            y_BxTxF, gate_BxTxF = jnp.split(y_BxTxF, 2, axis=-1)
        else:
            gate_BxTxF = dense(cfg.intermediate_size, use_bias=False, name="feed_forward_gate")(x_BxTxH)
        y_BxTxF *= self.kernels.activation(cfg.activation)(gate_BxTxF)
        y_BxTxF = Dropout(cfg.feed_forward_dropout)(y_BxTxF, deterministic=deterministic)
        y_BxTxH = dense(cfg.hidden_size, use_bias=cfg.output_bias, name="feed_forward_out")(y_BxTxF)
        return norm("feed_forward_norm")(x_BxTxH + drop(y_BxTxH))
