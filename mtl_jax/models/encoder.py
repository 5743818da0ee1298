"""BERT-family encoder as a pure linen module.

Shapes in names: B rows, T tokens, H hidden size, N attention heads, D = H / N, F feed-forward size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(nn.gelu, approximate=False),  # Hugging Face "gelu" is the erf form
    "gelu_new": functools.partial(nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(nn.gelu, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Sizes and constants of an encoder, read from a checkpoint's config.json.

    Attributes:
        vocab_size: Rows of the token embedding table.
        hidden_size: H, the width of the residual stream.
        num_layers: Number of transformer blocks.
        num_heads: Attention heads; divides hidden_size.
        intermediate_size: F, the width inside the feed-forward part.
        max_positions: Rows of the learned position table; the longest example in tokens.
        type_vocab_size: Rows of the token-type table.
        activation: A key of ACTIVATIONS.
        layer_norm_eps: Epsilon inside every layer norm.
        dropout: Rate after embeddings and after each block's two parts.
        attention_dropout: Rate on the attention probabilities.
        initializer_range: Standard deviation of freshly initialised weights.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int
    type_vocab_size: int = 2
    activation: str = "gelu"
    layer_norm_eps: float = 1e-12
    dropout: float = 0.1
    attention_dropout: float = 0.1
    initializer_range: float = 0.02


class EncoderOutput(NamedTuple):
    """What an encoder returns.

    Attributes:
        hidden: f[B, T, H], the last layer's output. Values at padding are meaningless.
    """

    hidden: jax.Array


def attention_mask_BxTxT(attention_mask_BxT: jax.Array, segments_BxT: jax.Array | None) -> jax.Array:
    """Which key each query may see: bool[B, T, T].

    A query sees the real tokens of its own segment. Without segments the row is one segment.

    Args:
        attention_mask_BxT: 1 at real tokens, 0 at padding.
        segments_BxT: Example number inside a packed row, or None.
    """
    visible_BxTxT = jnp.broadcast_to(
        attention_mask_BxT[:, None, :].astype(bool),
        (attention_mask_BxT.shape[0], attention_mask_BxT.shape[1], attention_mask_BxT.shape[1]),
    )
    if segments_BxT is None:
        return visible_BxTxT
    return visible_BxTxT & (segments_BxT[:, :, None] == segments_BxT[:, None, :])


class Encoder(nn.Module):
    """Token ids to contextual vectors (Devlin et al. 2019, post-norm transformer encoder).

    Attributes:
        config: Sizes and constants.
        dtype: Compute dtype; parameters, layer norms and softmax stay float32.
    """

    config: EncoderConfig
    dtype: Any = jnp.float32

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
            position_ids: i32[B, T]; None counts from 0 in every row.
            segment_ids: i32[B, T], the example each token belongs to in a packed row; tokens attend
                inside their own segment only. None means one example a row.
            deterministic: False applies dropout and needs an rng named "dropout".

        Returns:
            EncoderOutput with hidden f[B, T, H].
        """
        cfg = self.config
        if attention_mask is None:
            attention_mask = jnp.ones_like(input_ids)
        mask_BxTxT = attention_mask_BxTxT(attention_mask, segment_ids)
        x_BxTxH = Embeddings(cfg, self.dtype, name="embeddings")(input_ids, token_type_ids, position_ids, deterministic)
        for i in range(cfg.num_layers):
            x_BxTxH = Block(cfg, self.dtype, name=f"layer_{i}")(x_BxTxH, mask_BxTxT, deterministic)
        return EncoderOutput(hidden=x_BxTxH)


class Embeddings(nn.Module):
    """Sum of token, position and type embeddings, then layer norm and dropout."""

    config: EncoderConfig
    dtype: Any

    @nn.compact
    def __call__(
        self,
        ids_BxT: jax.Array,
        types_BxT: jax.Array | None,
        positions_BxT: jax.Array | None,
        deterministic: bool,
    ) -> jax.Array:
        cfg = self.config
        if types_BxT is None:
            types_BxT = jnp.zeros_like(ids_BxT)
        if positions_BxT is None:
            positions_BxT = jnp.broadcast_to(jnp.arange(ids_BxT.shape[1]), ids_BxT.shape)
        init = nn.initializers.normal(cfg.initializer_range)
        embed = functools.partial(nn.Embed, features=cfg.hidden_size, dtype=self.dtype, embedding_init=init)
        x_BxTxH = (
            embed(cfg.vocab_size, name="word")(ids_BxT)
            + embed(cfg.max_positions, name="position")(positions_BxT)
            + embed(cfg.type_vocab_size, name="token_type")(types_BxT)
        )
        x_BxTxH = _layer_norm(cfg, self.dtype, "norm")(x_BxTxH)
        return nn.Dropout(cfg.dropout)(x_BxTxH, deterministic=deterministic)


class Block(nn.Module):
    """Self-attention and feed-forward, each with residual and layer norm after it."""

    config: EncoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_BxTxH: jax.Array, mask_BxTxT: jax.Array, deterministic: bool) -> jax.Array:
        cfg = self.config
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=nn.initializers.normal(cfg.initializer_range))
        drop = nn.Dropout(cfg.dropout)

        attended_BxTxH = SelfAttention(cfg, self.dtype, name="attention")(x_BxTxH, mask_BxTxT, deterministic)
        x_BxTxH = _layer_norm(cfg, self.dtype, "attention_norm")(x_BxTxH + drop(attended_BxTxH, deterministic=deterministic))
        y_BxTxF = ACTIVATIONS[cfg.activation](dense(cfg.intermediate_size, name="feed_forward_in")(x_BxTxH))
        y_BxTxH = dense(cfg.hidden_size, name="feed_forward_out")(y_BxTxF)
        return _layer_norm(cfg, self.dtype, "feed_forward_norm")(x_BxTxH + drop(y_BxTxH, deterministic=deterministic))


class SelfAttention(nn.Module):
    """Multi-head scaled dot-product attention (Vaswani et al. 2017); softmax in float32."""

    config: EncoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_BxTxH: jax.Array, mask_BxTxT: jax.Array, deterministic: bool) -> jax.Array:
        cfg = self.config
        B, T, H = x_BxTxH.shape
        D = H // cfg.num_heads
        dense = functools.partial(nn.Dense, H, dtype=self.dtype, kernel_init=nn.initializers.normal(cfg.initializer_range))

        def heads(name: str) -> jax.Array:
            return dense(name=name)(x_BxTxH).reshape(B, T, cfg.num_heads, D)

        q_BxTxNxD, k_BxTxNxD, v_BxTxNxD = heads("query"), heads("key"), heads("value")
        scores_BxNxTxT = jnp.einsum("btnd,bsnd->bnts", q_BxTxNxD * D**-0.5, k_BxTxNxD).astype(jnp.float32)
        # A finite floor keeps fully masked (padding) queries free of NaN.
        scores_BxNxTxT = jnp.where(mask_BxTxT[:, None], scores_BxNxTxT, jnp.finfo(jnp.float32).min)
        probs_BxNxTxT = jax.nn.softmax(scores_BxNxTxT, axis=-1).astype(self.dtype)
        probs_BxNxTxT = nn.Dropout(cfg.attention_dropout)(probs_BxNxTxT, deterministic=deterministic)
        out_BxTxH = jnp.einsum("bnts,bsnd->btnd", probs_BxNxTxT, v_BxTxNxD).reshape(B, T, H)
        return dense(name="output")(out_BxTxH)


def _layer_norm(cfg: EncoderConfig, dtype: Any, name: str) -> nn.LayerNorm:
    # flax's fast variance, E[x^2] - E[x]^2, loses all digits on near-constant rows.
    return nn.LayerNorm(epsilon=cfg.layer_norm_eps, use_fast_variance=False, dtype=dtype, name=name)
