"""Encoder-decoder transformers (Marian, BART, mBART, M2M100, Pegasus, T5, UMT5): the encoder is a trunk, the decoder its head.

Shapes in names: B rows, T source tokens, U target tokens, L positions of a cache, H hidden size, V vocabulary, K beams.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_jax.models.dropout import Dropout
from mtl_jax.models.encoder import EncoderOutput
from mtl_jax.models.kv_cache import KeyValue, visible_keys
from mtl_jax.models.layers import PLAIN, Kernels
from mtl_jax.models.seq2seq_decoder import Cache, Decoder, DecoderOutput, RowClassifier, Source
from mtl_jax.models.seq2seq_layers import (
    Block,
    Embeddings,
    Seq2SeqConfig,
    default_positions,
    make_norm,
    relative_bias,
    token_positions,
)
from mtl_jax.models.trunk_output import token_table


class Seq2SeqOutput(NamedTuple):
    """The output of an encoder-decoder.

    Attributes:
        hidden: f[B, T, H], the encoder's output.
        decoder_hidden: f[B, U, H], the decoder's; None if it did not run.
        logits: f32[B, U, V]; of a classifier f32[B, num_labels]; None if the decoder did not run.
    """

    hidden: jax.Array
    decoder_hidden: jax.Array | None
    logits: jax.Array | None


class Seq2SeqEncoder(nn.Module):
    """The encoder, a trunk like models.encoder.Encoder; it has the token table that a decoder may share.

    Attributes:
        config: Sizes and constants.
        dtype: Compute dtype; parameters, norms and softmax stay float32.
        kernels: How the layers are computed.
    """

    config: Seq2SeqConfig
    dtype: Any = jnp.float32
    kernels: Kernels = PLAIN

    def setup(self) -> None:
        cfg = self.config
        self.embeddings = Embeddings(cfg, cfg.vocab_size, self.dtype)
        if cfg.positions == "relative":
            self.relative_bias = relative_bias(cfg, cfg.encoder_heads, bidirectional=True)
        self.layer = [Block(cfg, False, self.dtype, self.kernels) for _ in range(cfg.encoder_layers)]
        if cfg.pre_norm:
            self.norm = make_norm(cfg)
        self.drop = Dropout(cfg.dropout if cfg.drop_output else 0.0)

    def table(self) -> jax.Array:
        """The token table f32[V, H]."""
        return self.embeddings.table()

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
        """Encodes a batch of rows; arguments and result are those of models.encoder.Encoder.

        These families have no token types: token_type_ids changes nothing.
        """
        cfg = self.config
        if attention_mask is None:
            attention_mask = jnp.ones_like(input_ids)
        if position_ids is None:
            position_ids = token_positions(cfg, input_ids)
        mask_BxTxT = visible_keys(attention_mask, segment_ids, segment_ids)
        bias = self.relative_bias(position_ids, position_ids) if cfg.positions == "relative" else None
        x_BxTxH = self.embeddings(input_ids, self.table(), position_ids, deterministic)
        for layer in self.layer:
            layer_bias = layer.position_bias(position_ids, position_ids) if bias is None else bias
            x_BxTxH, _ = layer(x_BxTxH, mask_BxTxT, layer_bias, deterministic)
        if cfg.pre_norm:
            x_BxTxH = self.norm(x_BxTxH).astype(self.dtype)
        return EncoderOutput(hidden=self.drop(x_BxTxH, deterministic=deterministic))


class Seq2Seq(nn.Module):
    """Encoder and decoder; parameters {"trunk": encoder, "head": decoder}.

    Attributes:
        trunk: The encoder: this family's, or another one with its call signature and a decoder that fits it.
        head: The decoder, or decoder and classifier, or None for the encoder alone.
    """

    trunk: nn.Module
    head: Decoder | RowClassifier | None = None

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        decoder_input_ids: jax.Array | None = None,
        decoder_attention_mask: jax.Array | None = None,
        *,
        position_ids: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        decoder_position_ids: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        deterministic: bool = True,
    ) -> Seq2SeqOutput:
        """Encodes the source and predicts each next target token from the ones before it (teacher forcing).

        Args:
            input_ids: i32[B, T].
            attention_mask: [B, T], 1 at real tokens; None means that all are real.
            decoder_input_ids: i32[B, U], the target shifted right; None runs the encoder only. A classifier derives it from
                input_ids.
            decoder_attention_mask: [B, U].
            position_ids: i32[B, T], 0-based inside each example; None counts from 0 in every row.
            segment_ids: i32[B, T], the example each token belongs to in a packed row. None means one example a row.
            decoder_position_ids: i32[B, U].
            decoder_segment_ids: i32[B, U]; a target sees only the source tokens of the same segment.
            token_type_ids: Changes nothing.
            deterministic: False applies dropout and needs an rng named "dropout".
        """
        hidden = self.encode(
            input_ids, attention_mask, position_ids=position_ids, segment_ids=segment_ids, deterministic=deterministic
        ).hidden
        if isinstance(self.head, RowClassifier):
            source = self.head.source(hidden, attention_mask, segment_ids)
            labels = self.head(input_ids, source, self._table(), deterministic)
            return Seq2SeqOutput(hidden, labels.hidden, labels.logits)
        if decoder_input_ids is None or self.head is None:
            return Seq2SeqOutput(hidden, None, None)
        output = self.decode(
            decoder_input_ids,
            self.source(hidden, attention_mask, segment_ids),
            decoder_attention_mask,
            decoder_position_ids=decoder_position_ids,
            decoder_segment_ids=decoder_segment_ids,
            deterministic=deterministic,
        )
        return Seq2SeqOutput(hidden, output.hidden, output.logits)

    def encode(self, input_ids: jax.Array, attention_mask: jax.Array | None = None, **kwargs: Any) -> EncoderOutput:
        """The encoder alone; arguments and result are those of models.encoder.Encoder."""
        return self.trunk(input_ids, attention_mask, **kwargs)

    def source(
        self, hidden: jax.Array, attention_mask: jax.Array | None = None, segment_ids: jax.Array | None = None
    ) -> Source:
        """The part of the encoder's output that decode() reads; it is computed once and used at every step.

        Args:
            hidden: f[B, T, H].
            attention_mask: [B, T], the encoder's.
            segment_ids: i32[B, T], the encoder's.
        """
        return self._decoder().source(hidden, attention_mask, segment_ids)

    def init_cache(self, batch: int, length: int, beams: int = 1) -> Cache:
        """An empty cache for `length` target tokens of `batch` rows with `beams` beams each; needs no parameters.

        Raises:
            UserError: The model has fewer positions.
        """
        head = self._decoder()
        cfg = head.config
        default_positions(cfg, length)
        empty = jnp.zeros((batch, cfg.decoder_heads, length * beams, cfg.size_of_head(cfg.decoder_heads)), head.dtype)
        return tuple(KeyValue(empty, empty) for _ in range(cfg.decoder_layers))

    def decode(
        self,
        decoder_input_ids: jax.Array,
        source: Source,
        decoder_attention_mask: jax.Array | None = None,
        *,
        decoder_position_ids: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
        step: jax.Array | int = 0,
        ancestry: jax.Array | None = None,
        deterministic: bool = True,
    ) -> DecoderOutput:
        """Logits of the next tokens: of all at once (teacher forcing), or a few more after those in the cache.

        Args:
            decoder_input_ids: i32[B, U]; with a cache usually U = 1.
            source: From source(), of the same B rows.
            decoder_attention_mask: [B, U], 1 at real tokens; with a cache [B, L], a number for each of its positions.
            decoder_position_ids: i32[B, U], for packed rows; not with a cache.
            decoder_segment_ids: i32[B, U], for packed rows; not with a cache.
            cache: The cache from init_cache() or from the step before; None runs without a cache.
            step: i32[], number of tokens in the cache; may be traced. step + U is at most L: a write past the end of the cache,
                which a traced step cannot detect, overwrites its last positions.
            ancestry: i32[B, K, L], with a cache for K beams: the tokens i32[B, K] are then those of K beams at one position.
                Each beam sees at every position l the entry of beam ancestry[b, k, l], and at `step` its own entry.
            deterministic: False applies dropout and needs an rng named "dropout".

        Returns:
            DecoderOutput; its cache includes these tokens.

        Raises:
            ValueError: A cache together with packed rows, or one that is too short.
        """
        if cache is not None and not (decoder_position_ids is None and decoder_segment_ids is None):
            raise ValueError("a cache has one example a row; it cannot be used with position or segment ids")
        return self._decoder()(
            decoder_input_ids,
            source,
            self._table(),
            decoder_attention_mask,
            decoder_position_ids,
            decoder_segment_ids,
            cache,
            step,
            deterministic,
            ancestry,
        )

    @property
    def logit_scale(self) -> float:
        """Factor on the decoder's output before the logits."""
        return self._decoder().config.logit_scale

    @property
    def logit_cap(self) -> float | None:
        """Soft cap on the logits: none."""
        return None

    @property
    def vocabulary(self) -> int:
        """V, the tokens that can be generated."""
        return self._decoder().config.decoder_vocab_size

    @property
    def most_generated(self) -> int | None:
        """The most tokens of a generated text; None: any number."""
        return self._decoder().config.max_positions

    def prefill(
        self, input_ids: jax.Array, attention_mask: jax.Array, positions: int, beams: int
    ) -> tuple[Source, Cache, jax.Array | None]:
        """Reads the sources: what the decoder reads of them, an empty cache, and None, since all texts begin alike.

        Args:
            input_ids: i32[B, T].
            attention_mask: [B, T], 1 at real tokens.
            positions: Tokens that the cache has room for.
            beams: K.
        """
        hidden = self.encode(input_ids, attention_mask).hidden
        return self.source(hidden, attention_mask), self.init_cache(len(input_ids), positions, beams), None

    def projection(self) -> tuple[jax.Array, jax.Array]:
        """Kernel f[H, V] and bias f32[V] of the logits, which are decoder_hidden * logit_scale @ kernel + bias."""
        return self._decoder().projection(self._table())

    def _table(self) -> jax.Array:
        return token_table(self.trunk.variables["params"])

    def _decoder(self) -> Decoder:
        if not isinstance(self.head, Decoder):
            raise ValueError("this model has no decoder that predicts tokens")
        return self.head
