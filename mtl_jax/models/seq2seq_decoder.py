"""The decoder of Marian, BART, mBART, M2M100, Pegasus, T5 and UMT5: a head on an encoder.

Shapes in names: B rows, T source tokens, U target tokens, L positions of a cache, H hidden size, V vocabulary, N attention
heads, D size of a head, K beams.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_jax.models.dropout import Dropout
from mtl_jax.models.kv_cache import KeyValue, visible_ancestors, visible_keys, visible_past
from mtl_jax.models.layers import Dense
from mtl_jax.models.seq2seq_layers import (
    Block,
    Embeddings,
    Seq2SeqConfig,
    default_positions,
    kernel_init,
    make_norm,
    relative_bias,
    token_positions,
)

# An entry for each decoder layer, f[B, N, L, D]; for beams f[B, N, L * K, D], with the K entries of a position side by side.
Cache = tuple[KeyValue, ...]


class Source(NamedTuple):
    """The part of the encoder's output that the decoder reads; the same at every step of decoding.

    Attributes:
        layers: Keys and values f[B, N, T, D] of each decoder layer's cross-attention.
        real: [B, T], 1 at real tokens.
        segments: i32[B, T] in packed rows, or None.
    """

    layers: tuple[KeyValue, ...]
    real: jax.Array
    segments: jax.Array | None

    def padded(self, length: int) -> Source:
        """The source of rows of one example, padded to so many tokens."""
        more = length - self.real.shape[1]

        def widen(x: KeyValue) -> KeyValue:
            return jax.tree.map(lambda x_BxNxTxD: jnp.pad(x_BxNxTxD, ((0, 0), (0, 0), (0, more), (0, 0))), x)

        return Source(tuple(map(widen, self.layers)), jnp.pad(self.real, ((0, 0), (0, more))), None)


class DecoderOutput(NamedTuple):
    """The output of a decoder.

    Attributes:
        hidden: f[B, U, H], its last layer's output.
        logits: f32[B, U, V].
        cache: The cache with these tokens, if one was given.
    """

    hidden: jax.Array
    logits: jax.Array
    cache: Cache | None


class Decoder(nn.Module):
    """The decoder and its vocabulary, the head of text-to-text tasks.

    Attributes:
        config: Sizes and constants.
        dtype: Compute dtype; parameters, norms, softmax and logits stay float32.
    """

    config: Seq2SeqConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        cfg = self.config
        self.embeddings = Embeddings(cfg, None if cfg.reads_trunk_table else cfg.decoder_vocab_size, self.dtype)
        if cfg.positions == "relative":
            self.relative_bias = relative_bias(cfg, cfg.decoder_heads, bidirectional=False)
        self.layer = [Block(cfg, True, self.dtype) for _ in range(cfg.decoder_layers)]
        if cfg.pre_norm:
            self.norm = make_norm(cfg)
        self.drop = Dropout(cfg.dropout if cfg.drop_output else 0.0)
        if not cfg.tied:
            init = nn.initializers.normal(cfg.initializer_range)
            self.lm_head = Dense(cfg.decoder_vocab_size, use_bias=False, dtype=self.dtype, kernel_init=init)
        if cfg.logit_bias:
            self.final_logits_bias = self.param("final_logits_bias", nn.initializers.zeros, (1, cfg.decoder_vocab_size))

    def source(self, hidden_BxTxH: jax.Array, real_BxT: jax.Array | None, segments_BxT: jax.Array | None) -> Source:
        """The part of the encoder's output f[B, T, H] that the decoder reads."""
        if real_BxT is None:
            real_BxT = jnp.ones(hidden_BxTxH.shape[:2], jnp.int32)
        return Source(tuple(layer.source(hidden_BxTxH) for layer in self.layer), real_BxT, segments_BxT)

    def __call__(
        self,
        ids_BxU: jax.Array,
        source: Source,
        table_VxH: jax.Array,
        real_BxU: jax.Array | None = None,
        positions_BxU: jax.Array | None = None,
        segments_BxU: jax.Array | None = None,
        cache: Cache | None = None,
        step: jax.Array | int = 0,
        deterministic: bool = True,
        ancestry_BxKxL: jax.Array | None = None,
    ) -> DecoderOutput:
        """As Seq2Seq.decode; table_VxH is the encoder's token table, which is used if the config shares it."""
        cfg = self.config
        if not cfg.reads_trunk_table:
            table_VxH = self.embeddings.table()
        B, U = ids_BxU.shape
        length = U if cache is None else cache[0].key.shape[2]
        if isinstance(step, int) and step + U > length:
            raise ValueError(f"{U} tokens after {step} do not fit into a cache of {length}")
        first = step  # the first position of the cache that is written
        if ancestry_BxKxL is not None:
            key_positions = jnp.repeat(default_positions(cfg, length // U), U, axis=1)
            query_positions, first = jnp.full((1, U), step), step * U
            mask = visible_ancestors(ancestry_BxKxL, step)
        else:
            key_positions = default_positions(cfg, length) if positions_BxU is None else positions_BxU
            query_positions = step + jnp.arange(U)[None] if positions_BxU is None else positions_BxU
            if positions_BxU is None and cache is None:
                query_positions = token_positions(cfg, ids_BxU)
            if real_BxU is None:
                real_BxU = jnp.ones((B, length), jnp.int32)
            mask = visible_past(U, length, step) & visible_keys(real_BxU, segments_BxU, segments_BxU)
        source_mask = visible_keys(source.real, segments_BxU, source.segments)
        bias = self.relative_bias(query_positions, key_positions) if cfg.positions == "relative" else None

        x_BxUxH = self.embeddings(ids_BxU, table_VxH, query_positions, deterministic)
        new_cache = []
        for i, layer in enumerate(self.layer):
            layer_cache = None if cache is None else cache[i]
            layer_bias = layer.position_bias(query_positions, key_positions) if bias is None else bias
            x_BxUxH, keys_values = layer(
                x_BxUxH, mask, layer_bias, deterministic, source.layers[i], source_mask, layer_cache, first
            )
            new_cache.append(keys_values)
        if cfg.pre_norm:
            x_BxUxH = self.norm(x_BxUxH).astype(self.dtype)
        x_BxUxH = self.drop(x_BxUxH, deterministic=deterministic)
        return DecoderOutput(x_BxUxH, self.logits(x_BxUxH, table_VxH), None if cache is None else tuple(new_cache))

    def logits(self, x_BxUxH: jax.Array, table_VxH: jax.Array) -> jax.Array:
        """Logits f32[B, U, V] of the last layer's output; table_VxH as in the call."""
        cfg = self.config
        if not cfg.reads_trunk_table:
            table_VxH = self.embeddings.table()
        x_BxUxH = x_BxUxH * cfg.logit_scale
        if cfg.tied:
            logits = jnp.einsum("buh,vh->buv", x_BxUxH, table_VxH.astype(self.dtype), preferred_element_type=jnp.float32)
        else:
            logits = self.lm_head(x_BxUxH).astype(jnp.float32)
        return logits + self.final_logits_bias if cfg.logit_bias else logits

    def projection(self, table_VxH: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Kernel f[H, V] and bias f32[V] of the logits, hidden * logit_scale @ kernel + bias; table_VxH as in the call."""
        cfg = self.config
        if cfg.tied:
            kernel_HxV = (table_VxH if cfg.reads_trunk_table else self.embeddings.table()).T
        else:
            kernel_HxV = self.lm_head.variables["params"]["kernel"]
        bias_V = self.final_logits_bias[0] if cfg.logit_bias else jnp.zeros(cfg.decoder_vocab_size)
        return kernel_HxV.astype(self.dtype), bias_V


class RowClassifier(nn.Module):
    """Labels of a row (Lewis et al. 2020): the decoder reads the source, and its last end-of-sentence token is classified.

    Attributes:
        config: Sizes and constants.
        dtype: Compute dtype.
    """

    config: Seq2SeqConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        cfg = self.config
        # The decoder without its own vocabulary; its logits are not used.
        self.decoder = Decoder(
            dataclasses.replace(cfg, tied=True, shared_table=cfg.reads_trunk_table, logit_bias=False), self.dtype
        )
        dense = functools.partial(Dense, dtype=self.dtype, kernel_init=kernel_init(cfg))
        self.dense, self.classifier = dense(cfg.hidden_size), dense(cfg.num_labels)
        self.drop = Dropout(cfg.head_dropout)

    def source(self, hidden_BxTxH: jax.Array, real_BxT: jax.Array | None, segments_BxT: jax.Array | None) -> Source:
        """The part of the encoder's output f[B, T, H] that the decoder reads."""
        return self.decoder.source(hidden_BxTxH, real_BxT, segments_BxT)

    def __call__(self, ids_BxT: jax.Array, source: Source, table_VxH: jax.Array, deterministic: bool) -> DecoderOutput:
        """Logits f32[B, num_labels] of rows of one example; without an end-of-sentence token the last token counts.

        Raises:
            ValueError: The rows are packed.
        """
        if source.segments is not None:
            raise ValueError("this head labels whole rows; it cannot be used with segment ids")
        cfg = self.config
        start_Bx1 = jnp.full_like(ids_BxT[:, :1], cfg.decoder_start_token_id)
        shifted_BxT = jnp.concatenate([start_Bx1, ids_BxT[:, :-1]], axis=1)
        hidden_BxTxH = self.decoder(shifted_BxT, source, table_VxH, deterministic=deterministic).hidden
        last_B = ids_BxT.shape[1] - 1 - jnp.argmax(ids_BxT[:, ::-1] == cfg.eos_token_id, axis=1)
        x_BxH = jnp.take_along_axis(hidden_BxTxH, last_B[:, None, None], axis=1)[:, 0]
        x_BxH = nn.tanh(self.dense(self.drop(x_BxH, deterministic=deterministic)))
        logits = self.classifier(self.drop(x_BxH, deterministic=deterministic))
        return DecoderOutput(hidden_BxTxH, logits.astype(jnp.float32), None)
