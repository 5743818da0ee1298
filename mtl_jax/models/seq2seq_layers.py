"""Sizes, embeddings and blocks of the encoder-decoder families: Marian, BART, mBART, M2M100, Pegasus, T5, UMT5.

Shapes in names: B rows, T tokens of a row, S tokens that these attend to, H hidden size, F feed-forward size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.core.errors import UserError, count
from mtl_jax.models.dropout import Dropout
from mtl_jax.models.kv_cache import KeyValue, write_cache
from mtl_jax.models.layers import PLAIN, Attention, Dense, Embed, Kernels, RelativeBias, look_up


@dataclasses.dataclass(frozen=True)
class Seq2SeqConfig:
    """Sizes and constants of an encoder-decoder; a family is a choice of these. The defaults are those of BART.

    Attributes:
        vocab_size: Rows of the encoder's token table.
        decoder_vocab_size: V, tokens that the decoder reads and predicts.
        hidden_size: H, the width of the residual stream.
        encoder_layers: Blocks of the encoder.
        decoder_layers: Blocks of the decoder.
        encoder_heads: Attention heads of the encoder.
        decoder_heads: Attention heads of the decoder.
        encoder_feed_forward: Width inside the encoder's feed-forward part.
        decoder_feed_forward: Width inside the decoder's feed-forward part.
        max_positions: The longest example in tokens; None: any length.
        head_size: Width of one attention head; None: hidden_size over the number of heads.
        positions: "learned", "sinusoidal" or "fairseq" (sinusoidal, too) vectors that are added to token vectors; or a bias on
            attention scores: "relative", one for all blocks, or "block_relative", one for each block.
        position_offset: Rows at the start of a learned or fairseq table that no token uses. Of a fairseq table it is the number
            of the padding token plus 1, and these rows are zero.
        num_buckets: Relative positions: rows of the table.
        max_distance: Relative positions: all distances from this one on are the same.
        activation: A key of ACTIVATIONS.
        gated: Whether the feed-forward part is act(in x) * (gate x) (Shazeer 2020), not act(in x).
        use_bias: Whether linear maps have a bias.
        norm: "layer" or "rms" (no mean, no bias).
        layer_norm_eps: Epsilon inside every norm.
        pre_norm: Whether norms are before each part, and one at the end of the stack; else after each part.
        embedding_norm: Whether there is a norm after the embeddings.
        attention_scale: Factor on queries; None for the size of a head ** -0.5.
        embedding_scale: Factor on the embedded tokens.
        logit_scale: Factor on the decoder's output before the logits.
        logit_bias: Whether a bias is added to the logits.
        tied: Whether logits are products with the table that the decoder reads from; else they have their own matrix.
        shared_table: Whether the decoder reads tokens from the encoder's table; else it has its own.
        shared_if_untied: Whether shared_table also counts if not tied.
        dropout: Rate after embeddings and after each part of a block.
        attention_dropout: Rate on the attention probabilities.
        activation_dropout: Rate inside the feed-forward part.
        drop_output: Whether dropout also follows the norm at the end of the stack.
        initializer_range: Standard deviation of freshly initialised weights, times fan_in ** -0.5 if scaled_init.
        scaled_init: As in initializer_range.
        embedding_range: The same of token tables; None: initializer_range.
        num_labels: Outputs of a checkpoint's own head over labels.
        head_dropout: Rate inside that head.
        decoder_start_token_id: The token that the decoder reads first.
        eos_token_id: The token that ends a sentence.
    """

    vocab_size: int
    decoder_vocab_size: int
    hidden_size: int
    encoder_layers: int
    decoder_layers: int
    encoder_heads: int
    decoder_heads: int
    encoder_feed_forward: int
    decoder_feed_forward: int
    max_positions: int | None
    head_size: int | None = None
    positions: str = "learned"
    position_offset: int = 2
    num_buckets: int = 32
    max_distance: int = 128
    activation: str = "gelu"
    gated: bool = False
    use_bias: bool = True
    norm: str = "layer"
    layer_norm_eps: float = 1e-5
    pre_norm: bool = False
    embedding_norm: bool = True
    attention_scale: float | None = None
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_bias: bool = True
    tied: bool = True
    shared_table: bool = True
    shared_if_untied: bool = False
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    drop_output: bool = False
    initializer_range: float = 0.02
    scaled_init: bool = False
    embedding_range: float | None = None
    num_labels: int = 2
    head_dropout: float = 0.0
    decoder_start_token_id: int = 0
    eos_token_id: int = 0

    @property
    def max_length(self) -> int | None:
        """The longest example in tokens; None: any length."""
        return self.max_positions

    @property
    def reads_trunk_table(self) -> bool:
        """Whether the decoder reads tokens from the encoder's table."""
        return self.shared_table and (self.tied or self.shared_if_untied)

    def size_of_head(self, heads: int) -> int:
        """Width of a head, if there are so many."""
        return self.hidden_size // heads if self.head_size is None else self.head_size


def kernel_init(cfg: Seq2SeqConfig) -> Any:
    """Initialiser of linear maps."""
    if cfg.scaled_init:
        return nn.initializers.variance_scaling(cfg.initializer_range**2, "fan_in", "normal")
    return nn.initializers.normal(cfg.initializer_range)


def make_norm(cfg: Seq2SeqConfig) -> nn.Module:
    """A norm over H, in float32."""
    # flax's fast variance, E[x^2] - E[x]^2, loses all digits on near-constant rows.
    norm = nn.RMSNorm if cfg.norm == "rms" else nn.LayerNorm
    return norm(epsilon=cfg.layer_norm_eps, use_fast_variance=False, dtype=jnp.float32)


@functools.lru_cache(maxsize=4)
def sinusoidal_table(positions: int, width: int) -> np.ndarray:
    """f32[positions, width], all sines before all cosines (Vaswani et al. 2017 interleave them)."""
    angle = np.arange(positions)[:, None] / 10000.0 ** (2 * np.arange((width + 1) // 2) / width)
    return np.concatenate([np.sin(angle), np.cos(angle)[:, : width // 2]], axis=1).astype(np.float32)


@functools.lru_cache(maxsize=4)
def fairseq_table(positions: int, width: int) -> np.ndarray:
    """f32[positions, width] as fairseq computes it: the sines before the cosines, and the last frequency is 1/10000.

    All steps are in float32, as in fairseq and transformers: at position 1000 float64 differs in the fourth digit.
    """
    half = width // 2
    frequency_h = np.exp(np.arange(half, dtype=np.float32) * np.float32(-np.log(10000.0) / max(half - 1, 1)))
    angle_Pxh = np.arange(positions, dtype=np.float32)[:, None] * frequency_h
    odd_Px1 = np.zeros((positions, width % 2), np.float32)
    return np.concatenate([np.sin(angle_Pxh), np.cos(angle_Pxh), odd_Px1], axis=1)


class Embeddings(nn.Module):
    """Token and position vectors, norm and dropout.

    Attributes:
        config: Sizes and constants.
        vocab_size: Rows of the token table; None: the table is given in the call.
        dtype: Compute dtype.
    """

    config: Seq2SeqConfig
    vocab_size: int | None
    dtype: Any

    def setup(self) -> None:
        cfg = self.config
        init = nn.initializers.normal(cfg.initializer_range)
        if self.vocab_size is not None:
            table_init = init if cfg.embedding_range is None else nn.initializers.normal(cfg.embedding_range)
            self.word = Embed(self.vocab_size, cfg.hidden_size, embedding_init=table_init)
        if cfg.positions == "learned":
            rows = (cfg.max_positions or 0) + cfg.position_offset
            self.position = nn.Embed(rows, cfg.hidden_size, dtype=self.dtype, embedding_init=init)
        if cfg.embedding_norm:
            self.norm = make_norm(cfg)
        self.drop = Dropout(cfg.dropout)

    def table(self) -> jax.Array:
        """The token table f32[V, H]."""
        return self.word.embedding

    def __call__(self, ids_BxT: jax.Array, table_VxH: jax.Array, positions_BxT: jax.Array, deterministic: bool) -> jax.Array:
        """Vectors f[B, T, H] of tokens i32[B, T] at positions i32[B, T] or i32[1, T]."""
        cfg = self.config
        x_BxTxH = look_up(table_VxH, ids_BxT).astype(self.dtype) * cfg.embedding_scale
        if cfg.positions == "learned":
            x_BxTxH += self.position(positions_BxT + cfg.position_offset)
        elif cfg.positions == "sinusoidal":
            table_PxH = jnp.asarray(sinusoidal_table(cfg.max_positions or 0, cfg.hidden_size), self.dtype)
            x_BxTxH += jnp.take(table_PxH, positions_BxT, axis=0)
        elif cfg.positions == "fairseq":
            rows = (cfg.max_positions or 0) + cfg.position_offset
            table_PxH = jnp.asarray(fairseq_table(rows, cfg.hidden_size), self.dtype)
            table_PxH = table_PxH.at[: cfg.position_offset].set(0)
            x_BxTxH += jnp.take(table_PxH, positions_BxT + cfg.position_offset, axis=0)
        if cfg.embedding_norm:
            x_BxTxH = self.norm(x_BxTxH).astype(self.dtype)
        return self.drop(x_BxTxH, deterministic=deterministic)


def default_positions(cfg: Seq2SeqConfig, length: int) -> jax.Array:
    """0, 1, 2 ... as i32[1, length].

    Raises:
        UserError: The model has fewer positions.
    """
    if cfg.max_positions is not None and length > cfg.max_positions:
        raise UserError(
            f"a row of {count(length, 'token')} is too long for this model; it has {count(cfg.max_positions, 'position')}"
        )
    return jnp.arange(length)[None]


def token_positions(cfg: Seq2SeqConfig, ids_BxT: jax.Array) -> jax.Array:
    """Positions of rows of one example: 0, 1, 2 ... as i32[1, T]; fairseq's count no padding, as i32[B, T].

    Raises:
        UserError: The model has fewer positions.
    """
    positions_1xT = default_positions(cfg, ids_BxT.shape[1])
    if cfg.positions != "fairseq":
        return positions_1xT
    counted_BxT = (ids_BxT != cfg.position_offset - 1).astype(jnp.int32)
    return jnp.cumsum(counted_BxT, axis=1) * counted_BxT - 1  # padding is at -1, whose vector is zero


class Block(nn.Module):
    """Self-attention, in decoders cross-attention, and feed-forward, each with residual and norm.

    Attributes:
        config: Sizes and constants.
        decoder: Whether this is a block of the decoder.
        dtype: Compute dtype.
        kernels: How the layers are computed.
    """

    is_layer: ClassVar[bool] = True

    config: Seq2SeqConfig
    decoder: bool
    dtype: Any
    kernels: Kernels = PLAIN

    def setup(self) -> None:
        cfg = self.config
        init = kernel_init(cfg)
        heads = cfg.decoder_heads if self.decoder else cfg.encoder_heads
        attention = functools.partial(
            Attention,
            heads,
            cfg.size_of_head(heads),
            self.dtype,
            init,
            cfg.attention_dropout,
            cfg.use_bias,
            cfg.attention_scale,
            cfg.hidden_size,
            # If scores are not scaled (T5), the initial queries are.
            None if cfg.attention_scale is None else _scaled(init, cfg.size_of_head(heads) ** -0.5),
            self.kernels,
        )
        if cfg.positions == "block_relative":
            self.relative_bias = relative_bias(cfg, heads, bidirectional=not self.decoder)
        self.attention = attention()
        self.attention_norm = make_norm(cfg)
        if self.decoder:
            self.cross_attention = attention()
            self.cross_attention_norm = make_norm(cfg)
        dense = functools.partial(Dense, use_bias=cfg.use_bias, dtype=self.dtype, kernel_init=init)
        width = cfg.decoder_feed_forward if self.decoder else cfg.encoder_feed_forward
        self.feed_forward_in = dense(width)
        if cfg.gated:
            self.feed_forward_gate = dense(width)
        self.feed_forward_out = dense(cfg.hidden_size)
        self.feed_forward_norm = make_norm(cfg)
        self.drop = Dropout(cfg.dropout)
        self.drop_inside = Dropout(cfg.activation_dropout)

    def source(self, hidden_BxSxH: jax.Array) -> KeyValue:
        """Keys and values of the encoder's output, for cross-attention."""
        return self.cross_attention.keys_values(hidden_BxSxH)

    def position_bias(self, query_positions_BxT: jax.Array, key_positions_BxS: jax.Array) -> jax.Array | None:
        """The block's own bias f32[B, N, T, S] on the scores of self-attention, if it has one."""
        if self.config.positions != "block_relative":
            return None
        return self.relative_bias(query_positions_BxT, key_positions_BxS)

    def __call__(
        self,
        x_BxTxH: jax.Array,
        mask_BxTxS: jax.Array,
        bias_BxNxTxS: jax.Array | None,
        deterministic: bool,
        source: KeyValue | None = None,
        source_mask_BxTxS: jax.Array | None = None,
        cache: KeyValue | None = None,
        step: jax.Array | int = 0,
    ) -> tuple[jax.Array, KeyValue]:
        """The new x f[B, T, H], and self-attention's keys and values: those of x, or the cache with these added at step."""

        def before(norm: nn.Module, x: jax.Array) -> jax.Array:
            return norm(x).astype(self.dtype) if self.config.pre_norm else x

        def after(norm: nn.Module, x: jax.Array, y: jax.Array) -> jax.Array:
            x = x + self.drop(y, deterministic=deterministic)
            return x if self.config.pre_norm else norm(x).astype(self.dtype)

        y = before(self.attention_norm, x_BxTxH)
        keys_values = self.attention.keys_values(y)
        if cache is not None:
            keys_values = write_cache(cache, keys_values, step)
        y = self.attention(y, mask_BxTxS, deterministic, source=keys_values, bias_BxNxTxS=bias_BxNxTxS)
        x = after(self.attention_norm, x_BxTxH, y)
        if source is not None and source_mask_BxTxS is not None:
            y = before(self.cross_attention_norm, x)
            y = self.cross_attention(y, source_mask_BxTxS, deterministic, source=source)
            x = after(self.cross_attention_norm, x, y)
        y = self._feed_forward(before(self.feed_forward_norm, x), deterministic)
        return after(self.feed_forward_norm, x, y), keys_values

    def _feed_forward(self, x_BxTxH: jax.Array, deterministic: bool) -> jax.Array:
        y_BxTxF = self.kernels.activation(self.config.activation)(self.feed_forward_in(x_BxTxH))
        if self.config.gated:
            y_BxTxF *= self.feed_forward_gate(x_BxTxH)
        return self.feed_forward_out(self.drop_inside(y_BxTxF, deterministic=deterministic))


def relative_bias(cfg: Seq2SeqConfig, heads: int, bidirectional: bool) -> RelativeBias:
    """The module of T5's relative positions, for so many heads."""
    init = nn.initializers.normal(cfg.initializer_range * (cfg.hidden_size**-0.5 if cfg.scaled_init else 1.0))
    return RelativeBias(heads, cfg.num_buckets, cfg.max_distance, bidirectional, init)


def _scaled(init: Any, factor: float) -> Any:
    return lambda *args: factor * init(*args)
