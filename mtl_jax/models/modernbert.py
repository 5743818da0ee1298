"""ModernBERT (Warner et al. 2024): rotary positions, local and global attention in turn, gated feed-forward, pre-norm.

Shapes in names: B rows, T tokens, H hidden size, N attention heads, D = H / N, F feed-forward size.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.models.dropout import Dropout
from mtl_jax.models.encoder import EncoderOutput
from mtl_jax.models.layers import ACTIVATIONS, PLAIN, Dense, Embed, Kernels, attention_mask_BxTxT
from mtl_jax.models.norms import layer_norm
from mtl_jax.models.trunk_output import segment_mean


@dataclasses.dataclass(frozen=True)
class ModernBertConfig:
    """Sizes and constants, read from a checkpoint's config.json.

    Attributes:
        vocab_size: Rows of the token embedding table.
        hidden_size: H, the width of the residual stream.
        num_heads: Attention heads; divides hidden_size.
        intermediate_size: F, the width inside the feed-forward part.
        global_layers: One entry a layer: True if a token sees its whole example, False if it sees its neighbours only.
        window: Number of neighbours that a token sees on either side in local layers.
        global_theta: Base of the rotary wavelengths in global layers.
        local_theta: The same in local layers.
        max_length: The longest example in tokens that the checkpoint was trained for.
        activation: A key of ACTIVATIONS.
        layer_norm_eps: Epsilon inside every layer norm.
        norm_bias: Whether layer norms have a bias.
        attention_bias: Whether the attention's linear maps have one.
        feed_forward_bias: Whether the feed-forward part's linear maps have one.
        embedding_dropout: Rate after the embeddings.
        attention_dropout: Rate on the attention probabilities and on the attention's output.
        feed_forward_dropout: Rate inside the feed-forward part.
        initializer_range: Standard deviation of freshly initialised weights, cut off at twice that.
        mean_pooling: Whether the head over whole rows reads the mean of the tokens; else their first.
        head_activation: Of the heads' dense layer; a key of ACTIVATIONS.
        head_bias: Whether that layer has a bias.
        head_dropout: Rate in front of the output layer of heads over labels.
        decoder_bias: Whether the masked-LM head's output has a bias.
        num_labels: Outputs of heads over labels.
        tied: Whether a masked-LM head multiplies with the token table.
    """

    vocab_size: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    global_layers: tuple[bool, ...]
    window: int = 64
    global_theta: float = 160_000.0
    local_theta: float = 10_000.0
    max_length: int = 8192
    activation: str = "gelu"
    layer_norm_eps: float = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    feed_forward_bias: bool = False
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    feed_forward_dropout: float = 0.0
    initializer_range: float = 0.02
    mean_pooling: bool = False
    head_activation: str = "gelu"
    head_bias: bool = False
    head_dropout: float = 0.0
    decoder_bias: bool = True
    num_labels: int = 2
    tied: bool = True

    @property
    def head_size(self) -> int:
        """D."""
        return self.hidden_size // self.num_heads


class Rotation(NamedTuple):
    """Cosines and sines f32[B, T, 1, D / 2] of the angles by which queries and keys are rotated."""

    cos: jax.Array
    sin: jax.Array


def rotation(positions_BxT: jax.Array, head_size: int, theta: float) -> Rotation:
    """Angles of rotary position embeddings (Su et al. 2021): position times theta ** (-2 i / D) for the i-th pair.

    Args:
        positions_BxT: Position of each token in its example.
        head_size: D.
        theta: Base of the wavelengths.
    """
    # Rounded where torch rounds: at position 8000 the last digit of a frequency near 1 changes the angle by 5e-4.
    exponents = np.arange(0, head_size, 2, dtype=np.float32) / np.float32(head_size)
    frequencies = np.float32(1) / np.power(theta, exponents, dtype=np.float64).astype(np.float32)
    angle_BxTx1xd = (positions_BxT[..., None].astype(jnp.float32) * frequencies)[:, :, None]
    return Rotation(jnp.cos(angle_BxTx1xd), jnp.sin(angle_BxTx1xd))


def rotate(x_BxTxNxD: jax.Array, angles: Rotation) -> jax.Array:
    """Rotates each pair (x[i], x[i + D / 2]) by its angle, in float32."""
    first, second = jnp.split(x_BxTxNxD.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * angles.cos - second * angles.sin, second * angles.cos + first * angles.sin], axis=-1)
    return rotated.astype(x_BxTxNxD.dtype)


def local_mask_TxT(length: int, window: int) -> jax.Array:
    """bool[T, T]: whether two tokens of a row are at most `window` apart."""
    index_T = jnp.arange(length)
    return jnp.abs(index_T[:, None] - index_T[None, :]) <= window


class ModernBert(nn.Module):
    """Token ids to contextual vectors.

    Attributes:
        config: Sizes and constants.
        dtype: Compute dtype; parameters, layer norms, rotations and softmax stay float32.
        kernels: How the layers are computed.
    """

    config: ModernBertConfig
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
            token_type_ids: Not read: ModernBERT has no types.
            position_ids: i32[B, T], each token's position in its example; None counts along the row. Only differences
                matter. Neighbours are counted along the row, as examples are not interleaved.
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
        global_mask_BxTxT = attention_mask_BxTxT(attention_mask, segment_ids)
        local_mask_BxTxT = global_mask_BxTxT & local_mask_TxT(input_ids.shape[1], cfg.window)
        global_rotation = rotation(position_ids, cfg.head_size, cfg.global_theta)
        local_rotation = rotation(position_ids, cfg.head_size, cfg.local_theta)

        x_BxTxH = Embeddings(cfg, self.dtype, self.kernels, name="embeddings")(input_ids, deterministic)
        for i, is_global in enumerate(cfg.global_layers):
            mask_BxTxT, angles = (global_mask_BxTxT, global_rotation) if is_global else (local_mask_BxTxT, local_rotation)
            # The embeddings end with a norm, so the first block needs none.
            block = Block(cfg, self.dtype, attention_norm=i > 0, kernels=self.kernels, name=f"layer_{i}")
            x_BxTxH = block(x_BxTxH, mask_BxTxT, angles, deterministic)
        norm = layer_norm(cfg.layer_norm_eps, self.dtype, "final_norm", cfg.norm_bias, self.kernels.norm)
        return EncoderOutput(norm(x_BxTxH))


class Embeddings(nn.Module):
    """Token embeddings, layer norm and dropout."""

    config: ModernBertConfig
    dtype: Any
    kernels: Kernels = PLAIN

    @nn.compact
    def __call__(self, ids_BxT: jax.Array, deterministic: bool) -> jax.Array:
        cfg = self.config
        embed = Embed(cfg.vocab_size, cfg.hidden_size, dtype=self.dtype, embedding_init=_init(cfg), name="word")
        norm = layer_norm(cfg.layer_norm_eps, self.dtype, "norm", cfg.norm_bias, self.kernels.norm)
        x_BxTxH = norm(embed(ids_BxT))
        return Dropout(cfg.embedding_dropout)(x_BxTxH, deterministic=deterministic)


class Block(nn.Module):
    """Self-attention and gated feed-forward (Shazeer 2020), each with a layer norm in front and a residual around."""

    is_layer: ClassVar[bool] = True

    config: ModernBertConfig
    dtype: Any
    attention_norm: bool
    kernels: Kernels = PLAIN

    @nn.compact
    def __call__(self, x_BxTxH: jax.Array, mask_BxTxT: jax.Array, angles: Rotation, deterministic: bool) -> jax.Array:
        cfg = self.config
        norm = functools.partial(layer_norm, cfg.layer_norm_eps, self.dtype, use_bias=cfg.norm_bias, kernel=self.kernels.norm)
        dense = functools.partial(Dense, use_bias=cfg.feed_forward_bias, dtype=self.dtype)

        y_BxTxH = norm("attention_norm")(x_BxTxH) if self.attention_norm else x_BxTxH
        y_BxTxH = RotaryAttention(cfg, self.dtype, self.kernels, name="attention")(y_BxTxH, mask_BxTxT, angles, deterministic)
        x_BxTxH += Dropout(cfg.attention_dropout)(y_BxTxH, deterministic=deterministic)

        y_BxTxH = norm("feed_forward_norm")(x_BxTxH)
        y_BxTx2F = dense(2 * cfg.intermediate_size, kernel_init=_init(cfg), name="feed_forward_in")(y_BxTxH)
        y_BxTxF, gate_BxTxF = jnp.split(y_BxTx2F, 2, axis=-1)
        y_BxTxF = self.kernels.activation(cfg.activation)(y_BxTxF) * gate_BxTxF
        y_BxTxF = Dropout(cfg.feed_forward_dropout)(y_BxTxF, deterministic=deterministic)
        return x_BxTxH + dense(cfg.hidden_size, kernel_init=output_init(cfg), name="feed_forward_out")(y_BxTxF)


class RotaryAttention(nn.Module):
    """Multi-head self-attention with rotary positions; one linear map computes queries, keys and values."""

    config: ModernBertConfig
    dtype: Any
    kernels: Kernels = PLAIN

    @nn.compact
    def __call__(self, x_BxTxH: jax.Array, mask_BxTxT: jax.Array, angles: Rotation, deterministic: bool) -> jax.Array:
        cfg = self.config
        dense = functools.partial(Dense, use_bias=cfg.attention_bias, dtype=self.dtype)
        drop = Dropout(cfg.attention_dropout)

        qkv_BxTx3H = dense(3 * cfg.hidden_size, kernel_init=_init(cfg), name="query_key_value")(x_BxTxH)
        q_BxTxNxD, k_BxTxNxD, v_BxTxNxD = (
            part.reshape(*x_BxTxH.shape[:-1], cfg.num_heads, cfg.head_size) for part in jnp.split(qkv_BxTx3H, 3, axis=-1)
        )
        drops = cfg.attention_dropout > 0.0 and not deterministic
        out_BxTxNxD = self.kernels.attend(
            rotate(q_BxTxNxD, angles),
            rotate(k_BxTxNxD, angles).swapaxes(1, 2),
            v_BxTxNxD.swapaxes(1, 2),
            mask_BxTxT,
            scale=cfg.head_size**-0.5,
            dropout=functools.partial(drop, deterministic=False) if drops else None,
        )
        return dense(cfg.hidden_size, kernel_init=output_init(cfg), name="output")(out_BxTxNxD.reshape(x_BxTxH.shape))


class MeanPooler(nn.Module):
    """The mean of a row's real tokens, f[B, H], without parameters."""

    def __call__(self, hidden_BxTxH: jax.Array, attention_mask_BxT: jax.Array) -> jax.Array:
        return segment_mean(hidden_BxTxH, attention_mask_BxT.astype(bool), 1)[:, 0].astype(hidden_BxTxH.dtype)


class LabelHead(nn.Module):
    """Logits over labels: f[B, num_labels] of a row, or f[B, T, num_labels] of every token.

    Attributes:
        config: Sizes and constants.
        dtype: Compute dtype.
        per_token: Whether every token gets logits; else the row, from the pooler's output or else its first token.
    """

    config: ModernBertConfig
    dtype: Any
    per_token: bool

    @nn.compact
    def __call__(
        self, hidden_BxTxH: jax.Array, pooled_BxH: jax.Array | None, table_VxH: jax.Array | None, deterministic: bool
    ) -> jax.Array:
        cfg = self.config
        row_BxH = hidden_BxTxH[:, 0] if pooled_BxH is None else pooled_BxH
        x = hidden_BxTxH if self.per_token else row_BxH
        x = Dense(cfg.hidden_size, use_bias=cfg.head_bias, dtype=self.dtype, kernel_init=output_init(cfg), name="transform")(x)
        x = layer_norm(cfg.layer_norm_eps, self.dtype, "norm", cfg.norm_bias)(ACTIVATIONS[cfg.head_activation](x))
        x = Dropout(cfg.head_dropout)(x, deterministic=deterministic)
        init = _truncated_normal(cfg.hidden_size**-0.5)
        return Dense(cfg.num_labels, dtype=self.dtype, kernel_init=init, name="classifier")(x)


def _truncated_normal(deviation: float) -> Any:
    return nn.initializers.truncated_normal(deviation, lower=-2.0, upper=2.0)


def _init(cfg: ModernBertConfig) -> Any:
    return _truncated_normal(cfg.initializer_range)


def output_init(cfg: ModernBertConfig) -> Any:
    """Initialiser of the maps out of each part, and of the heads' dense layer."""
    # Smaller, because each part adds to the stream, which must not grow with depth.
    return _truncated_normal(cfg.initializer_range / (2 * len(cfg.global_layers)) ** 0.5)
