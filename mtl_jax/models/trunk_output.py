"""The interface between trunk and heads: the trunk's output, its token table, and its facts that tasks depend on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.core.errors import UserError
from mtl_jax.models.encoder import EncoderConfig
from mtl_jax.models.llama_config import LlamaConfig
from mtl_jax.models.seq2seq_layers import Seq2SeqConfig


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Copies:
    """Which of the copies of a row each task's head reads; no array is in it.

    Attributes:
        of: (task, copy) of all tasks; () where a row has one copy.
    """

    of: tuple[tuple[str, int], ...] = ()


ONE_COPY = Copies()
TEXT_VECTORS = ("pooled", "first")  # the fields of Encoded with a vector for each example


class Encoded(NamedTuple):
    """The trunk's output for a batch; a field that no task of the run reads is None.

    Attributes:
        tokens: f[R, T, H], a vector for each token.
        pooled: f32[R, S, H], the mean of each example's token vectors.
        table: f32[V, E], the trunk's token table, for heads that share it.
        copies: Where tasks of one source have vectors of their own: which of them are whose; tokens are then f[R, C, T, H] and
            pooled and first f32[R, C, S, H].
        first: f32[R, S, H], the vector of each example's first token.
    """

    tokens: jax.Array | None = None
    pooled: jax.Array | None = None
    table: jax.Array | None = None
    copies: Copies = ONE_COPY
    first: jax.Array | None = None

    def read_by(self, task: str) -> Encoded:
        """What the head of a task reads: one copy of the rows."""
        if not self.copies.of:
            return self
        number = dict(self.copies.of)[task]
        leaves = (self.tokens, self.pooled, self.first)
        tokens, pooled, first = (None if leaf is None else leaf[:, number] for leaf in leaves)
        return Encoded(tokens, pooled, self.table, first=first)

    @property
    def of_texts(self) -> dict[str, jax.Array]:
        """The fields with a vector for each example, without those that are None."""
        return {name: leaf for name in TEXT_VECTORS if (leaf := getattr(self, name)) is not None}


def token_table(params: Any) -> jax.Array:
    """The trunk's token table f32[V, E]; its path in every trunk is word/embedding or embeddings/word/embedding.

    Raises:
        UserError: The trunk has no such table.
    """
    for parent in (params, params.get("embeddings")):
        word = parent.get("word") if isinstance(parent, Mapping) else None
        if isinstance(word, Mapping) and "embedding" in word:  # a user's trunk may call anything word
            return word["embedding"]
    raise UserError("the trunk has no token table that a head could share")


def looked_up(params: Any) -> jax.Array | None:
    """The vectors f[R, T, E] that a training step may give a trunk in place of its token table; None: it has the table."""
    for parent in (params, params.get("embeddings")):
        word = parent.get("word") if isinstance(parent, Mapping) else None
        table = word.get("embedding") if isinstance(word, Mapping) else None
        if table is not None and table.ndim > 2:
            return table
    return None


def with_token_table(params: Any, table_VxE: jax.Array | None) -> Any:
    """The trunk's parameters with another token table."""
    if "word" in params:
        return params | {"word": params["word"] | {"embedding": table_VxE}}
    return params | {"embeddings": with_token_table(params["embeddings"], table_VxE)}


class TrunkFacts(NamedTuple):
    """Facts about the run's trunk that a task may depend on.

    Attributes:
        tokenizer: A transformers tokenizer.
        width: H, the size of its vectors.
        table: V, E: shape of its token table; (0, 0) if it has none.
        decoder: The sizes of the decoder of an encoder-decoder checkpoint or of a trunk from scratch, else None.
        head: Parameters of that decoder, or of the LM head of a decoder-only trunk, if the checkpoint has them, else None.
        start: The token that this decoder reads first, if it is known.
        encoder: The sizes of an encoder whose layers a decoder could start as, else None.
        causal: The sizes of a decoder-only trunk, else None.
        raw: The checkpoint's config.json; None for a trunk from scratch.
        dropout: Every dropout rate of the trunk; None: those of the checkpoint.
        pooling: What Encoded.pooled is: a key of POOLINGS.
    """

    tokenizer: Any
    width: int
    table: tuple[int, int]
    decoder: Seq2SeqConfig | None
    head: Any
    start: int | None
    encoder: EncoderConfig | None
    causal: LlamaConfig | None = None
    raw: Mapping[str, Any] | None = None
    dropout: float | None = None
    pooling: str = "mean"


def segment_first(hidden_RxTxH: jax.Array, segments_RxT: jax.Array, num_segments: int) -> jax.Array:
    """Vector of the first token of every segment, in float32; arguments and result as of segment_mean()."""
    before_RxT = jnp.pad(segments_RxT[:, :-1], ((0, 0), (1, 0)))
    return _chosen(hidden_RxTxH, segments_RxT, segments_RxT != before_RxT, num_segments)


def segment_last(hidden_RxTxH: jax.Array, segments_RxT: jax.Array, num_segments: int) -> jax.Array:
    """Vector of the last token of every segment, in float32; arguments and result as of segment_mean()."""
    after_RxT = jnp.pad(segments_RxT[:, 1:], ((0, 0), (0, 1)))
    return _chosen(hidden_RxTxH, segments_RxT, segments_RxT != after_RxT, num_segments)


def _chosen(hidden_RxTxH: jax.Array, segments_RxT: jax.Array, chosen_RxT: jax.Array, num_segments: int) -> jax.Array:
    """The vector of the one token of every segment that is chosen."""
    places_RxSxT = segments_RxT[:, None, :] == jnp.arange(1, num_segments + 1)[None, :, None]
    places_RxSxT &= chosen_RxT[:, None, :]
    # A product, since the gradient of indexing is summed in no fixed order on GPUs.
    return jnp.einsum("rst,rth->rsh", places_RxSxT.astype(jnp.float32), hidden_RxTxH.astype(jnp.float32), precision="highest")


def segment_mean(hidden_RxTxH: jax.Array, segments_RxT: jax.Array, num_segments: int) -> jax.Array:
    """Mean of the token vectors of every segment, in float32.

    Args:
        hidden_RxTxH: Token vectors of R rows.
        segments_RxT: Segment of each token, counted from 1; 0 is padding.
        num_segments: S, the most segments of a row.

    Returns:
        f32[R, S, H]; zeros for segments that have no token.
    """
    member_RxSxT = segments_RxT[:, None, :] == jnp.arange(1, num_segments + 1)[None, :, None]
    member_RxSxT = member_RxSxT.astype(jnp.float32)
    total_RxSxH = jnp.einsum("rst,rth->rsh", member_RxSxT, hidden_RxTxH.astype(jnp.float32))
    return total_RxSxH / jnp.maximum(member_RxSxT.sum(axis=-1, keepdims=True), 1.0)


# How the vectors of an example's tokens become one; a linen module of a trunk names one in its attribute `pooling`.
POOLINGS = {"mean": segment_mean, "last": segment_last}


def pooling_of(module: Any) -> str:
    """A key of POOLINGS: the attribute `pooling` of a trunk's module; the mean where it has none, as encoders."""
    pooling = getattr(module, "pooling", "mean")
    return pooling if isinstance(pooling, str) and pooling in POOLINGS else "mean"
