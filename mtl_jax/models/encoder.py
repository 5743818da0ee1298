"""Encoders: one module for BERT and the families that differ from it in configuration only, and a bag of words.

Those are RoBERTa, DistilBERT, ELECTRA, MPNet and ALBERT. Shapes in names: B rows, T tokens, E embedding size, H hidden size,
F feed-forward size, N attention heads.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_jax.models.dropout import Dropout
from mtl_jax.models.layers import PLAIN, Attention, Dense, Embed, Kernels, RelativeBias, attention_mask_BxTxT
from mtl_jax.models.norms import layer_norm

LONGEST_DISTANCE = 128  # of relative positions with a bucket of their own, in MPNet


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Sizes and constants of an encoder, read from a checkpoint's config.json.

    Attributes:
        vocab_size: Rows of the token embedding table.
        hidden_size: H, the width of the residual stream.
        num_layers: Number of transformer blocks; in ALBERT of runs of a group of blocks.
        num_heads: Attention heads; divides hidden_size.
        intermediate_size: F, the width inside the feed-forward part.
        max_positions: Rows of the learned position table.
        type_vocab_size: Rows of the token-type table; 0 for no such table (DistilBERT).
        embedding_size: E, the width of the embeddings if a projection to H follows (ELECTRA); None is H.
        first_position: Row of an example's first token in the position table: pad_token_id + 1 in RoBERTa, else 0.
        pad_token_id: If first_position is not 0: the id that is skipped when positions are counted.
        activation: A key of ACTIVATIONS.
        layer_norm_eps: Epsilon inside every layer norm.
        dropout: Rate after embeddings and after each block's two parts.
        attention_dropout: Rate on the attention probabilities.
        head_dropout: Rate inside the checkpoint's own head over labels.
        answer_dropout: Rate in front of its head for extractive answers.
        initializer_range: Standard deviation of freshly initialised weights.
        num_labels: Outputs of the checkpoint's own head, if it has labels.
        tied: Whether a masked-LM head multiplies with the token table.
        relative_buckets: Rows of a table of biases for relative positions, which all layers share (MPNet); 0 for no such table.
        layer_groups: Groups of blocks that are run several times with the same parameters (ALBERT); 0: each block is run once.
        group_size: Blocks in a group.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int
    type_vocab_size: int = 2
    embedding_size: int | None = None
    first_position: int = 0
    pad_token_id: int = 0
    activation: str = "gelu"
    layer_norm_eps: float = 1e-12
    dropout: float = 0.1
    attention_dropout: float = 0.1
    head_dropout: float = 0.1
    answer_dropout: float = 0.0
    initializer_range: float = 0.02
    num_labels: int = 2
    tied: bool = True
    relative_buckets: int = 0
    layer_groups: int = 0
    group_size: int = 1

    @property
    def max_length(self) -> int:
        """The longest example in tokens."""
        return self.max_positions - self.first_position

    @property
    def projects(self) -> bool:
        """Whether a projection follows the embeddings: where E is not H, and in ALBERT always."""
        return bool(self.layer_groups) or (self.embedding_size or self.hidden_size) != self.hidden_size

    @property
    def layer_of_depth(self) -> tuple[int, ...]:
        """The number of the block at each depth, the lowest first."""
        if not self.layer_groups:
            return tuple(range(self.num_layers))
        groups = [int(depth / (self.num_layers / self.layer_groups)) for depth in range(self.num_layers)]
        return tuple(group * self.group_size + number for group in groups for number in range(self.group_size))

    @property
    def is_plain(self) -> bool:
        """Whether a decoder without relative positions and shared layers can have its blocks."""
        return not self.relative_buckets and not self.layer_groups


class EncoderOutput(NamedTuple):
    """The output of an encoder.

    Attributes:
        hidden: f[B, T, H], the last layer's output. Values at padding are meaningless.
        pooled: f[B, H] of a model with a pooler, else None.
        logits: Logits of a model with a head, in the shape of its kind, else None.
    """

    hidden: jax.Array
    pooled: jax.Array | None = None
    logits: jax.Array | None = None


class Encoder(nn.Module):
    """Token ids to contextual vectors (Devlin et al. 2019, post-norm transformer encoder).

    Attributes:
        config: Sizes and constants.
        dtype: Compute dtype; parameters, layer norms and softmax stay float32.
        kernels: How the layers are computed.
    """

    config: EncoderConfig
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
            position_ids: i32[B, T], each token's position in its example, from 0 in every family; None counts along the row, in
                RoBERTa and MPNet without padding. Relative positions are those in the row, as examples are not interleaved.
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
        x_BxTxH = Embeddings(cfg, self.dtype, self.kernels, name="embeddings")(
            input_ids, token_type_ids, position_ids, deterministic
        )
        bias_1xNxTxT = None
        if cfg.relative_buckets:
            init, indices_1xT = nn.initializers.normal(cfg.initializer_range), jnp.arange(input_ids.shape[1])[None]
            table = RelativeBias(cfg.num_heads, cfg.relative_buckets, LONGEST_DISTANCE, True, init, name="relative_bias")
            bias_1xNxTxT = table(indices_1xT, indices_1xT)
        blocks = {i: Block(cfg, self.dtype, self.kernels, name=f"layer_{i}") for i in sorted(set(cfg.layer_of_depth))}
        for i in cfg.layer_of_depth:
            x_BxTxH = blocks[i](x_BxTxH, mask_BxTxT, deterministic, bias_1xNxTxT)
        return EncoderOutput(hidden=x_BxTxH)


class Embeddings(nn.Module):
    """Sum of token, position and type embeddings, then layer norm, dropout, and a projection to H."""

    config: EncoderConfig
    dtype: Any
    kernels: Kernels = PLAIN

    @nn.compact
    def __call__(
        self,
        ids_BxT: jax.Array,
        types_BxT: jax.Array | None,
        positions_BxT: jax.Array | None,
        deterministic: bool,
    ) -> jax.Array:
        cfg = self.config
        E = cfg.embedding_size or cfg.hidden_size
        init = nn.initializers.normal(cfg.initializer_range)
        embed = functools.partial(Embed, features=E, dtype=self.dtype, embedding_init=init)
        x_BxTxE = embed(cfg.vocab_size, name="word")(ids_BxT)
        x_BxTxE += embed(cfg.max_positions, name="position")(_position_rows(cfg, ids_BxT, positions_BxT))
        if cfg.type_vocab_size:
            types_BxT = jnp.zeros_like(ids_BxT) if types_BxT is None else types_BxT
            x_BxTxE += embed(cfg.type_vocab_size, name="token_type")(types_BxT)
        x_BxTxE = layer_norm(cfg.layer_norm_eps, self.dtype, "norm", kernel=self.kernels.norm)(x_BxTxE)
        x_BxTxE = Dropout(cfg.dropout)(x_BxTxE, deterministic=deterministic)
        if not cfg.projects:
            return x_BxTxE
        return Dense(cfg.hidden_size, dtype=self.dtype, kernel_init=init, name="project")(x_BxTxE)


def _position_rows(cfg: EncoderConfig, ids_BxT: jax.Array, positions_BxT: jax.Array | None) -> jax.Array:
    """The row of each token in the position table, i32[B, T]."""
    if positions_BxT is not None:
        return positions_BxT + cfg.first_position
    if not cfg.first_position:
        return jnp.broadcast_to(jnp.arange(ids_BxT.shape[1]), ids_BxT.shape)
    # Padding is not counted, wherever it is, and gets the row of the padding id.
    real_BxT = (ids_BxT != cfg.pad_token_id).astype(jnp.int32)
    return jnp.cumsum(real_BxT, axis=1) * real_BxT + cfg.pad_token_id


class Block(nn.Module):
    """Self-attention and feed-forward, each with residual and layer norm after it."""

    is_layer: ClassVar[bool] = True

    config: EncoderConfig
    dtype: Any
    kernels: Kernels = PLAIN

    @nn.compact
    def __call__(
        self, x_BxTxH: jax.Array, mask_BxTxT: jax.Array, deterministic: bool, bias_1xNxTxT: jax.Array | None = None
    ) -> jax.Array:
        cfg = self.config
        init = nn.initializers.normal(cfg.initializer_range)
        dense = functools.partial(Dense, dtype=self.dtype, kernel_init=init)
        norm = functools.partial(layer_norm, cfg.layer_norm_eps, self.dtype, kernel=self.kernels.norm)
        drop = Dropout(cfg.dropout)

        D = cfg.hidden_size // cfg.num_heads
        attention = Attention(cfg.num_heads, D, self.dtype, init, cfg.attention_dropout, kernels=self.kernels, name="attention")
        attended_BxTxH = attention(x_BxTxH, mask_BxTxT, deterministic, bias_BxNxTxS=bias_1xNxTxT)
        x_BxTxH = norm("attention_norm")(x_BxTxH + drop(attended_BxTxH, deterministic=deterministic))
        y_BxTxF = self.kernels.activation(cfg.activation)(dense(cfg.intermediate_size, name="feed_forward_in")(x_BxTxH))
        y_BxTxH = dense(cfg.hidden_size, name="feed_forward_out")(y_BxTxF)
        return norm("feed_forward_norm")(x_BxTxH + drop(y_BxTxH, deterministic=deterministic))


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig:
    """Sizes of the embedding trunk.

    Attributes:
        vocab_size: Rows of the table.
        dimension: E, width of each embedding.
    """

    vocab_size: int
    dimension: int


class SharedEmbedding(nn.Module):
    """A bag of words: token ids to vectors by one table look-up, pooled by the masked mean like every other trunk.

    Attributes:
        config: Sizes.
        dtype: Compute dtype; the table stays float32.
    """

    config: EmbeddingConfig
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
        """Looks up ids i32[B, T] and returns hidden f[B, T, E]; the other arguments change nothing."""
        table = Embed(
            self.config.vocab_size,
            self.config.dimension,
            dtype=self.dtype,
            embedding_init=nn.initializers.normal(0.05),
            name="word",
        )
        return EncoderOutput(hidden=table(input_ids))
