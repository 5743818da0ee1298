"""DeBERTa (He et al. 2021), as of its versions 2 and 3: attention scores from content and relative position apart.

Shapes in names: B rows, T tokens, E embedding size, H hidden size, F feed-forward size, N attention heads, D = H / N,
S and U as in models.disentangled.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_jax.models.disentangled import DisentangledAttention, distance_rows
from mtl_jax.models.dropout import Dropout
from mtl_jax.models.encoder import EncoderOutput
from mtl_jax.models.layers import ACTIVATIONS, PLAIN, Dense, Embed, Kernels, attention_mask_BxTxT
from mtl_jax.models.norms import layer_norm


@dataclasses.dataclass(frozen=True)
class DebertaConfig:
    """Sizes and constants, read from a checkpoint's config.json.

    Attributes:
        vocab_size: Rows of the token embedding table.
        hidden_size: H, the width of the residual stream.
        num_layers: Number of transformer blocks.
        num_heads: Attention heads; divides hidden_size.
        intermediate_size: F, the width inside the feed-forward part.
        max_positions: The longest example in tokens that the checkpoint was trained for.
        type_vocab_size: Rows of the token-type table; 0 for no such table.
        embedding_size: E, the width of the embeddings if a projection to H follows; None is H.
        absolute_positions: Whether vectors of absolute positions are added to those of tokens.
        content_to_position: Whether a query's content meets the vectors of its distances to the keys.
        position_to_content: Whether the vectors of distances meet the keys' content.
        span: S, half of the rows of the table of distances; 0 for no such table and neither of those two scores.
        longest_distance: The distance from which on all share a vector, if those beyond S / 2 are put together by their
            logarithm; 0: each distance up to S has its own.
        shared_projections: Whether distances are projected by the maps of content; else by maps of their own.
        norm_distances: Whether a layer norm follows the table of distances.
        convolution: Tokens that the convolution beside the first block reads, an odd number; 0 for no convolution.
        convolution_groups: Groups of its channels.
        convolution_activation: A key of ACTIVATIONS.
        activation: A key of ACTIVATIONS.
        layer_norm_eps: Epsilon inside every layer norm.
        dropout: Rate after embeddings, on the vectors of distances, and after each part of a block.
        attention_dropout: Rate on the attention probabilities.
        pooler_dropout: Rate in front of the dense layer of the head over whole rows.
        head_dropout: Rate in front of the output layer of that head.
        pooler_activation: Of its dense layer; a key of ACTIVATIONS.
        legacy_head: Whether the masked-LM head is saved under the names that transformers calls legacy.
        initializer_range: Standard deviation of freshly initialised weights.
        num_labels: Outputs of heads over labels.
        tied: Whether a masked-LM head multiplies with the token table.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int
    type_vocab_size: int = 0
    embedding_size: int | None = None
    absolute_positions: bool = False
    content_to_position: bool = True
    position_to_content: bool = True
    span: int = 256
    longest_distance: int = 512
    shared_projections: bool = True
    norm_distances: bool = True
    convolution: int = 0
    convolution_groups: int = 1
    convolution_activation: str = "tanh"
    activation: str = "gelu"
    layer_norm_eps: float = 1e-7
    dropout: float = 0.1
    attention_dropout: float = 0.1
    pooler_dropout: float = 0.0
    head_dropout: float = 0.1
    pooler_activation: str = "gelu"
    legacy_head: bool = True
    initializer_range: float = 0.02
    num_labels: int = 2
    tied: bool = True

    @property
    def max_length(self) -> int:
        """The longest example in tokens."""
        return self.max_positions

    @property
    def head_size(self) -> int:
        """D."""
        return self.hidden_size // self.num_heads

    @property
    def scale(self) -> float:
        """Factor on all scores, those of content and those of distances."""
        return (self.head_size * (1 + self.content_to_position + self.position_to_content)) ** -0.5


class Deberta(nn.Module):
    """Token ids to contextual vectors.

    Attributes:
        config: Sizes and constants.
        dtype: Compute dtype; parameters, layer norms and softmax stay float32.
        kernels: How norms and activations are computed; attention, whose scores have further terms, is plain.
    """

    config: DebertaConfig
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
            position_ids: i32[B, T], each token's position in its example, for absolute positions; None counts along the row.
                Distances and neighbours are counted along the row, as examples are not interleaved.
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
        embeddings = Embeddings(cfg, self.dtype, self.kernels, name="embeddings")
        x_BxTxH, distances_UxH = embeddings(input_ids, attention_mask, token_type_ids, position_ids, deterministic)
        for i in range(cfg.num_layers):
            block = Block(cfg, self.dtype, i == 0 and cfg.convolution > 0, self.kernels, name=f"layer_{i}")
            x_BxTxH = block(x_BxTxH, mask_BxTxT, distances_UxH, deterministic)
        return EncoderOutput(hidden=x_BxTxH)


class Embeddings(nn.Module):
    """Vectors of tokens, with layer norm and dropout, and the table of distances, which all blocks share."""

    config: DebertaConfig
    dtype: Any
    kernels: Kernels = PLAIN

    @nn.compact
    def __call__(
        self,
        ids_BxT: jax.Array,
        mask_BxT: jax.Array,
        types_BxT: jax.Array | None,
        positions_BxT: jax.Array | None,
        deterministic: bool,
    ) -> tuple[jax.Array, jax.Array | None]:
        """f[B, T, H], zeros at padding, and f[U, H] or None."""
        cfg, T = self.config, ids_BxT.shape[1]
        E, init = cfg.embedding_size or cfg.hidden_size, nn.initializers.normal(cfg.initializer_range)
        embed = functools.partial(Embed, features=E, dtype=self.dtype, embedding_init=init)
        x_BxTxE = embed(cfg.vocab_size, name="word")(ids_BxT)
        if cfg.absolute_positions:
            positions_BxT = jnp.arange(T)[None] if positions_BxT is None else positions_BxT
            x_BxTxE += embed(cfg.max_positions, name="position")(positions_BxT)
        if cfg.type_vocab_size:
            types_BxT = jnp.zeros_like(ids_BxT) if types_BxT is None else types_BxT
            x_BxTxE += embed(cfg.type_vocab_size, name="token_type")(types_BxT)
        x_BxTxH = x_BxTxE
        if cfg.hidden_size != E:
            x_BxTxH = Dense(cfg.hidden_size, use_bias=False, dtype=self.dtype, kernel_init=init, name="project")(x_BxTxE)
        x_BxTxH = layer_norm(cfg.layer_norm_eps, self.dtype, "norm", kernel=self.kernels.norm)(x_BxTxH)
        x_BxTxH *= mask_BxT[..., None].astype(x_BxTxH.dtype)
        x_BxTxH = Dropout(cfg.dropout)(x_BxTxH, deterministic=deterministic)
        if not cfg.span:
            return x_BxTxH, None
        table = Embed(2 * cfg.span, cfg.hidden_size, dtype=self.dtype, embedding_init=init, name="distance")
        rows_U, _ = distance_rows(cfg.span, cfg.longest_distance, T)
        distances_UxH = table(jnp.asarray(rows_U))
        if cfg.norm_distances:
            distances_UxH = layer_norm(cfg.layer_norm_eps, self.dtype, "distance_norm")(distances_UxH)
        return x_BxTxH, distances_UxH


class Block(nn.Module):
    """Self-attention and feed-forward, each with residual and layer norm after it; the first may have a convolution beside."""

    is_layer: ClassVar[bool] = True

    config: DebertaConfig
    dtype: Any
    convolves: bool = False
    kernels: Kernels = PLAIN

    @nn.compact
    def __call__(
        self, x_BxTxH: jax.Array, mask_BxTxT: jax.Array, distances_UxH: jax.Array | None, deterministic: bool
    ) -> jax.Array:
        cfg = self.config
        init = nn.initializers.normal(cfg.initializer_range)
        dense = functools.partial(Dense, dtype=self.dtype, kernel_init=init)
        norm = functools.partial(layer_norm, cfg.layer_norm_eps, self.dtype, kernel=self.kernels.norm)
        drop = functools.partial(Dropout(cfg.dropout), deterministic=deterministic)

        attention = DisentangledAttention(
            cfg.num_heads,
            cfg.head_size,
            self.dtype,
            init,
            cfg.attention_dropout,
            scale=cfg.scale,
            span=cfg.span,
            longest_distance=cfg.longest_distance,
            content_to_position=cfg.content_to_position,
            position_to_content=cfg.position_to_content,
            shared_projections=cfg.shared_projections or not cfg.span,
            distance_dropout=cfg.dropout,
            name="attention",
        )
        attended_BxTxH = attention(x_BxTxH, mask_BxTxT, deterministic, distances_UxH=distances_UxH)
        h_BxTxH = norm("attention_norm")(x_BxTxH + drop(attended_BxTxH))
        y_BxTxF = self.kernels.activation(cfg.activation)(dense(cfg.intermediate_size, name="feed_forward_in")(h_BxTxH))
        h_BxTxH = norm("feed_forward_norm")(h_BxTxH + drop(dense(cfg.hidden_size, name="feed_forward_out")(y_BxTxF)))
        if not self.convolves:
            return h_BxTxH
        real_BxTx1 = jnp.diagonal(mask_BxTxT, axis1=1, axis2=2)[..., None]
        convolution = Convolution(cfg.convolution, cfg.convolution_groups, self.dtype, init, name="convolution")
        y_BxTxH = convolution(x_BxTxH, mask_BxTxT)
        y_BxTxH = ACTIVATIONS[cfg.convolution_activation](drop(jnp.where(real_BxTx1, y_BxTxH, 0)))
        h_BxTxH = norm("convolution_norm")(h_BxTxH + y_BxTxH)
        return jnp.where(real_BxTx1, h_BxTxH, 0)


class Convolution(nn.Module):
    """A convolution over the neighbours of each token in its own example; others and padding count as zeros.

    Attributes:
        width: Tokens that it reads, an odd number.
        groups: Groups of channels.
        dtype: Compute dtype.
        init: Initialiser of the kernel.
    """

    width: int
    groups: int
    dtype: Any
    init: Any

    @nn.compact
    def __call__(self, x_BxTxH: jax.Array, mask_BxTxT: jax.Array) -> jax.Array:
        """f[B, T, H] of x f[B, T, H] and the tokens that each token may see."""
        B, T, H = x_BxTxH.shape
        G, reach = self.groups, self.width // 2
        kernel_KxIxH = self.param("kernel", self.init, (self.width, H // G, H))
        bias_H = self.param("bias", nn.initializers.zeros, (H,))
        taps = []
        for offset in range(-reach, reach + 1):
            before, after = max(-offset, 0), max(offset, 0)
            around = ((0, 0), (min(before, T), min(after, T)))
            visible_BxT = jnp.zeros((B, T), bool)
            if abs(offset) < T:
                visible_BxT = jnp.pad(jnp.diagonal(mask_BxTxT, offset, axis1=1, axis2=2), around)
            neighbour_BxTxH = jnp.pad(x_BxTxH, (*around, (0, 0)))[:, min(after, T) : min(after, T) + T]
            taps.append(jnp.where(visible_BxT[..., None], neighbour_BxTxH, 0))
        taps_BxTxKxGxI = jnp.stack(taps, axis=2).reshape(B, T, self.width, G, H // G)
        kernel_KxIxGxO = kernel_KxIxH.reshape(self.width, H // G, G, H // G).astype(self.dtype)
        y_BxTxGxO = jnp.einsum("btkgi,kigo->btgo", taps_BxTxKxGxI.astype(self.dtype), kernel_KxIxGxO)
        return y_BxTxGxO.reshape(B, T, H) + bias_H.astype(self.dtype)
