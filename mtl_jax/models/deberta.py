"""DeBERTa (He et al. 2021), as of its versions 2 and 3: attention scores from content and relative position apart.

Shapes in names: B rows, T tokens, E embedding size, H hidden size, F feed-forward size, N attention heads, D = H / N,
S distances on one side that have a vector of their own, U vectors of distances that a row of T tokens needs.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.models.dropout import Dropout
from mtl_jax.models.encoder import EncoderOutput
from mtl_jax.models.kv_cache import KeyValue
from mtl_jax.models.layers import ACTIVATIONS, PLAIN, Attention, Dense, Embed, Kernels, attend, attention_mask_BxTxT
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


def distance_buckets(distances: np.ndarray, buckets: int, longest: int) -> np.ndarray:
    """Signed buckets of signed distances, i32 of the same shape.

    Distances up to buckets / 2 are their own bucket. Those beyond share buckets that grow with the logarithm, so that the
    distance longest - 1 has the last one.

    Args:
        distances: Query minus key, any shape.
        buckets: Buckets on one side, 0 included.
        longest: Larger than buckets / 2 + 1.
    """
    middle, size = buckets // 2, np.abs(distances)
    # In float32, step by step as torch does it: the ceiling would carry another rounding into another bucket.
    share = np.log(np.maximum(size, middle).astype(np.float32) / np.float32(middle))
    share = share / np.log(np.float32((longest - 1) / middle))
    grown = np.ceil(share * np.float32(middle - 1)).astype(np.int32) + middle
    return np.where(size <= middle, distances, np.sign(distances) * grown).astype(np.int32)


@functools.lru_cache(maxsize=32)
def distance_rows(cfg: DebertaConfig, length: int) -> tuple[range, np.ndarray]:
    """The rows of the table of distances that a row of tokens needs.

    Args:
        cfg: Sizes and constants.
        length: T.

    Returns:
        The U rows of the table, and for each distance -(T - 1) .. T - 1 of a query from a key the number of its row among
        those, i32[2 T - 1].
    """
    distances = np.arange(1 - length, length)
    if cfg.longest_distance:
        distances = distance_buckets(distances, cfg.span, cfg.longest_distance)
    rows = np.clip(distances + cfg.span, 0, 2 * cfg.span - 1)
    return range(int(rows[0]), int(rows[-1]) + 1), rows - rows[0]


def windows(scores_BxNxTxR: jax.Array) -> jax.Array:
    """Row i of f[B, N, T, 2 T - 1] from column T - 1 - i on, T columns: f[B, N, T, T], without a gather."""
    *leading, T, R = scores_BxNxTxR.shape
    flat = jnp.pad(scores_BxNxTxR, ((0, 0),) * (len(leading) + 1) + ((0, 1),)).reshape(*leading, T * (R + 1))
    return flat[..., T - 1 : T - 1 + T * R].reshape(*leading, T, R)[..., :T]


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
        distances_UxH = table(jnp.asarray(distance_rows(cfg, T)[0]))
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
            cfg.num_heads, cfg.head_size, self.dtype, init, cfg.attention_dropout, scale=cfg.scale, config=cfg, name="attention"
        )
        attended_BxTxH = attention(x_BxTxH, mask_BxTxT, deterministic, distances_UxH=distances_UxH)
        h_BxTxH = norm("attention_norm")(x_BxTxH + drop(attended_BxTxH))
        y_BxTxF = self.kernels.activation(cfg.activation)(dense(cfg.intermediate_size, name="feed_forward_in")(h_BxTxH))
        h_BxTxH = norm("feed_forward_norm")(h_BxTxH + drop(dense(cfg.hidden_size, name="feed_forward_out")(y_BxTxF)))
        if not self.convolves:
            return h_BxTxH
        real_BxTx1 = jnp.diagonal(mask_BxTxT, axis1=1, axis2=2)[..., None]
        y_BxTxH = Convolution(cfg.convolution, cfg.convolution_groups, self.dtype, init, name="convolution")(
            x_BxTxH, mask_BxTxT
        )
        y_BxTxH = ACTIVATIONS[cfg.convolution_activation](drop(jnp.where(real_BxTx1, y_BxTxH, 0)))
        h_BxTxH = norm("convolution_norm")(h_BxTxH + y_BxTxH)
        return jnp.where(real_BxTx1, h_BxTxH, 0)


class DisentangledAttention(Attention):
    """Self-attention whose scores have terms of content and distance (He et al. 2021, section 3.1).

    Keys that come from elsewhere, in front of the row's own, have no distance, and those terms are 0 for them.

    Attributes:
        config: Which terms there are, and which maps project the vectors of distances.
    """

    config: DebertaConfig = dataclasses.field(kw_only=True)

    def setup(self) -> None:
        super().setup()
        cfg = self.config
        self.drop_distances = Dropout(cfg.dropout)
        if cfg.span and not cfg.shared_projections:
            dense = functools.partial(Dense, cfg.hidden_size, dtype=self.dtype, kernel_init=self.init)
            self.position_key = dense() if cfg.content_to_position else None
            self.position_query = dense() if cfg.position_to_content else None

    def __call__(
        self,
        x_BxTxH: jax.Array,
        mask_BxTxS: jax.Array,
        deterministic: bool,
        *,
        source: KeyValue | None = None,
        bias_BxNxTxS: jax.Array | None = None,
        distances_UxH: jax.Array | None = None,
    ) -> jax.Array:
        """f[B, T, H] to f[B, T, H]; keys and values are the source's, which end with x's own, or x's own if it is None."""
        source = self.keys_values(x_BxTxH) if source is None else source
        q_BxTxNxD = self._heads(self.query(x_BxTxH))
        if distances_UxH is not None:
            T, S = x_BxTxH.shape[1], source.key.shape[2]
            terms_BxNxTxT = self.distance_scores(q_BxTxNxD, source.key[:, :, S - T :], distances_UxH, deterministic)
            terms_BxNxTxS = jnp.pad(terms_BxNxTxT, ((0, 0), (0, 0), (0, 0), (S - T, 0)))
            bias_BxNxTxS = terms_BxNxTxS if bias_BxNxTxS is None else bias_BxNxTxS + terms_BxNxTxS
        drops = self.dropout > 0.0 and not deterministic
        out_BxTxNxD = attend(
            q_BxTxNxD,
            source.key,
            source.value,
            mask_BxTxS,
            scale=self.config.scale,
            bias_BxNxTxS=bias_BxNxTxS,
            dropout=functools.partial(self.drop, deterministic=False) if drops else None,
        )
        return self.output(out_BxTxNxD.reshape(x_BxTxH.shape))

    def distance_scores(
        self, q_BxTxNxD: jax.Array, k_BxNxTxD: jax.Array, distances_UxH: jax.Array, deterministic: bool
    ) -> jax.Array:
        """The terms of distances, scaled: f[B, N, T, T]."""
        cfg, T = self.config, q_BxTxNxD.shape[1]
        # One more axis, because adapters of rows make the projections of distances those of rows.
        distances_1xUxH = self.drop_distances(distances_UxH, deterministic=deterministic)[None]
        row_of_distance = distance_rows(cfg, T)[1]  # of query minus key, ascending
        scores_BxNxTxT = jnp.zeros((len(q_BxTxNxD), cfg.num_heads, T, T), q_BxTxNxD.dtype)
        if cfg.content_to_position:
            project = self.key if cfg.shared_projections else self.position_key
            keys_xRxNxD = self._heads(project(distances_1xUxH))[:, row_of_distance[::-1]]
            scores_BxNxTxT += windows(_products(q_BxTxNxD * cfg.scale, keys_xRxNxD))
        if cfg.position_to_content:
            project = self.query if cfg.shared_projections else self.position_query
            queries_xRxNxD = self._heads(project(distances_1xUxH))[:, row_of_distance]
            scores_BxNxTxT += windows(_products(k_BxNxTxD.swapaxes(1, 2), queries_xRxNxD * cfg.scale)).swapaxes(2, 3)
        return scores_BxNxTxT


def _products(x_BxTxNxD: jax.Array, y_xRxNxD: jax.Array) -> jax.Array:
    """f[B, N, T, R] of vectors of tokens and of distances, which are the same for all rows or each row's own."""
    if len(y_xRxNxD) == 1:
        return jnp.einsum("btnd,rnd->bntr", x_BxTxNxD, y_xRxNxD[0])
    return jnp.einsum("btnd,brnd->bntr", x_BxTxNxD, y_xRxNxD)


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
