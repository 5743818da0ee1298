"""Llama (Touvron et al. 2023) and its relatives Qwen2, Qwen3 and Gemma 3: one module for decoder-only trunks.

Tokens see what stands before them in their example; queries share keys and values in groups (Ainslie et al. 2023); positions
are rotations. The families differ in configuration only.

Shapes in names: B rows, T tokens, S keys, H hidden size, N query heads, M heads of keys and values, D size of a head,
F feed-forward size, K beams, P columns of a prompt.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_jax.core.errors import UserError, count
from mtl_jax.models.dropout import Dropout
from mtl_jax.models.kv_cache import KeyValue, visible_ancestors, visible_past, write_cache
from mtl_jax.models.layers import PLAIN, Dense, Embed, Kernels, attention_mask_BxTxT
from mtl_jax.models.llama_config import LlamaConfig, Rope
from mtl_jax.models.modernbert import Rotation, rotate

Cache = tuple[KeyValue, ...]  # of each layer f[B, M, S, D]; for beams with the K entries of a position side by side


class Past(NamedTuple):
    """The tokens that stand before a step of decoding, and the state of the beams that take it.

    Attributes:
        cache: Keys and values, f[B, M, P + S * K, D] a layer: first those of the prompt, then those of the steps.
        real: [B, P], 1 at the prompt's tokens that are visible: its last one is not, since the first step reads it again.
        start: i32[B], the position of that token.
        step: i32[], the number of the step; may be traced.
        ancestry: i32[B, K, S], as in models.kv_cache.visible_ancestors; None: one beam.
    """

    cache: Cache
    real: jax.Array
    start: jax.Array
    step: jax.Array | int
    ancestry: jax.Array | None = None


class CausalOutput(NamedTuple):
    """The output of a decoder-only model.

    Attributes:
        hidden: f[B, T, H], the last layer's output. Values at padding are meaningless.
        pooled: f[B, H], what a head over rows reads, else None.
        logits: Logits of a model with a head, in the shape of its kind, else None.
        cache: Keys and values of the tokens, or the cache with them, if asked for.
    """

    hidden: jax.Array
    pooled: jax.Array | None = None
    logits: jax.Array | None = None
    cache: Cache | None = None


class Llama(nn.Module):
    """Token ids to contextual vectors, each of what stands before it.

    Attributes:
        config: Sizes and constants.
        dtype: Compute dtype; parameters, norms, rotations and softmax stay float32.
        kernels: How the layers are computed.
        pooling: How tasks pool an example's vectors: "last", or "mean".
    """

    config: LlamaConfig
    dtype: Any = jnp.float32
    kernels: Kernels = PLAIN
    pooling: str = "last"

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
        past: Past | None = None,
        keep_cache: bool = False,
    ) -> CausalOutput:
        """Encodes a batch of rows, or the tokens of one step of decoding.

        Args:
            input_ids: i32[B, T]; with `past` i32[B, K], the tokens of K beams at one position.
            attention_mask: [B, T], 1 at real tokens; None means that all are real. Not read with `past`.
            token_type_ids: Not read: these models have no types.
            position_ids: i32[B, T], each token's position in its example; None counts along the row. Only differences
                matter. In local layers neighbours are counted along the row.
            segment_ids: i32[B, T], the example each token belongs to in a packed row; tokens attend
                inside their own segment only. None means one example a row.
            deterministic: False applies dropout and needs an rng named "dropout", if there is any.
            past: What stands before; its cache is returned with these tokens.
            keep_cache: Whether keys and values are returned.

        Returns:
            CausalOutput with hidden f[B, T, H].

        Raises:
            UserError: A row is longer than `dynamic` positions reach.
        """
        cfg = self.config
        T = input_ids.shape[1]
        if past is not None:
            global_mask, local_mask, position_ids = _step_masks(cfg, past, T)
        else:
            if attention_mask is None:
                attention_mask = jnp.ones_like(input_ids)
            if position_ids is None:
                position_ids = jnp.broadcast_to(jnp.arange(T), input_ids.shape)
            global_mask = attention_mask_BxTxT(attention_mask, segment_ids) & visible_past(T, T)
            index_T = jnp.arange(T)
            local_mask = global_mask & (index_T[:, None] - index_T[None, :] < cfg.window)
        if "dynamic" in (cfg.rope.kind, cfg.local_rope.kind) and cfg.max_length < T:
            raise UserError(f"a row of {count(T, 'token')} is too long: dynamic positions are read up to {cfg.max_length}")
        angles = {rope: rope_rotation(position_ids, rope, cfg.head_size) for rope in {cfg.rope, cfg.local_rope}}

        x_BxTxH = Embeddings(cfg, self.dtype, name="embeddings")(input_ids)
        first = 0 if past is None else past.real.shape[1] + past.step * T
        caches = []
        for number, is_global in enumerate(cfg.global_layers):
            mask, rope = (global_mask, cfg.rope) if is_global else (local_mask, cfg.local_rope)
            cache = None if past is None else past.cache[number]
            block = Block(cfg, self.dtype, self.kernels, name=f"layer_{number}")
            x_BxTxH, keys_values = block(x_BxTxH, mask, angles[rope], deterministic, cache, first)
            caches.append(keys_values)
        x_BxTxH = _norm(cfg, self.dtype, "final_norm")(x_BxTxH)
        return CausalOutput(x_BxTxH, cache=tuple(caches) if keep_cache or past is not None else None)


def rope_rotation(positions_BxT: jax.Array, rope: Rope, head_size: int) -> Rotation:
    """Angles of rotary positions.

    Args:
        positions_BxT: Position of each token in its example.
        rope: The wavelengths.
        head_size: D.
    """
    angle_BxTx1xd = (positions_BxT[..., None].astype(jnp.float32) * rope.frequencies(head_size))[:, :, None]
    return Rotation(jnp.cos(angle_BxTx1xd), jnp.sin(angle_BxTx1xd))


def _step_masks(cfg: LlamaConfig, past: Past, beams: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The keys that each beam may see, bool[B, K, P + S * K], in global and in local layers, and their position i32[B, 1]."""
    B, P = past.real.shape
    S = (past.cache[0].key.shape[2] - P) // beams
    if past.ancestry is None:
        steps_BxKxL = jnp.broadcast_to(jnp.arange(S) <= past.step, (B, beams, S))
    else:
        steps_BxKxL = visible_ancestors(past.ancestry, past.step)
    prompt_BxKxP = jnp.broadcast_to(past.real.astype(bool)[:, None], (B, beams, P))
    mask_BxKxS = jnp.concatenate([prompt_BxKxP, steps_BxKxL], axis=-1)
    # The first step reads the token of the prompt's last column.
    column_S = jnp.concatenate([jnp.arange(P), P - 1 + jnp.repeat(jnp.arange(S), beams)])
    near_S = P - 1 + past.step - column_S < cfg.window
    return mask_BxKxS, mask_BxKxS & near_S, (past.start + past.step)[:, None]


class Embeddings(nn.Module):
    """Token embeddings times a constant."""

    config: LlamaConfig
    dtype: Any

    @nn.compact
    def __call__(self, ids_BxT: jax.Array) -> jax.Array:
        cfg = self.config
        embed = Embed(cfg.vocab_size, cfg.hidden_size, dtype=self.dtype, embedding_init=_init(cfg), name="word")
        x_BxTxH = embed(ids_BxT)
        return x_BxTxH if cfg.embedding_scale == 1.0 else x_BxTxH * cfg.embedding_scale


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * (offset + scale) over the last axis, in float32 (Zhang and Sennrich 2019).

    Attributes:
        epsilon: Added to the mean square.
        offset: 1 in Gemma, whose scales start at 0; else 0.
        dtype: Of the output.
    """

    epsilon: float
    offset: float
    dtype: Any

    @nn.compact
    def __call__(self, x_xH: jax.Array) -> jax.Array:
        scale_H = self.param("scale", nn.initializers.constant(1.0 - self.offset), (x_xH.shape[-1],))
        x = x_xH.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return (x * inverse * (self.offset + scale_H)).astype(self.dtype)


class Block(nn.Module):
    """Attention and gated feed-forward (Shazeer 2020), each with a norm in front, in Gemma also after it, and a residual."""

    is_layer: ClassVar[bool] = True

    config: LlamaConfig
    dtype: Any
    kernels: Kernels = PLAIN

    @nn.compact
    def __call__(
        self,
        x_BxTxH: jax.Array,
        mask_BxTxS: jax.Array,
        angles: Rotation,
        deterministic: bool,
        cache: KeyValue | None = None,
        first: jax.Array | int = 0,
    ) -> tuple[jax.Array, KeyValue]:
        """The new x f[B, T, H], and keys and values: those of x, or the cache with these written from column `first` on."""
        cfg = self.config
        norm = functools.partial(_norm, cfg, self.dtype)
        dense = functools.partial(Dense, use_bias=cfg.feed_forward_bias, dtype=self.dtype, kernel_init=_init(cfg))
        attention = GroupedAttention(cfg, self.dtype, self.kernels, name="attention")

        y_BxTxH = norm("attention_norm")(x_BxTxH)
        keys_values = attention.keys_values(y_BxTxH, angles)
        if cache is not None:
            keys_values = write_cache(cache, keys_values, first)
        y_BxTxH = attention(y_BxTxH, mask_BxTxS, deterministic, angles, cache is not None, source=keys_values)
        x_BxTxH += norm("attention_post_norm")(y_BxTxH) if cfg.post_norms else y_BxTxH

        y_BxTxH = norm("feed_forward_norm")(x_BxTxH)
        y_BxTxF = self.kernels.activation(cfg.activation)(dense(cfg.intermediate_size, name="feed_forward_in")(y_BxTxH))
        y_BxTxF *= dense(cfg.intermediate_size, name="feed_forward_gate")(y_BxTxH)
        y_BxTxH = dense(cfg.hidden_size, name="feed_forward_out")(y_BxTxF)
        return x_BxTxH + (norm("feed_forward_post_norm")(y_BxTxH) if cfg.post_norms else y_BxTxH), keys_values


class GroupedAttention(nn.Module):
    """Attention with N heads of queries and M of keys and values, with rotary positions.

    Attributes:
        config: Sizes and constants.
        dtype: Compute dtype.
        kernels: How scores and probabilities are computed.
    """

    config: LlamaConfig
    dtype: Any
    kernels: Kernels = PLAIN

    def setup(self) -> None:
        cfg = self.config
        dense = functools.partial(Dense, use_bias=cfg.attention_bias, dtype=self.dtype, kernel_init=_init(cfg))
        self.query = dense(cfg.num_heads * cfg.head_size)
        self.key = dense(cfg.kv_heads * cfg.head_size)
        self.value = dense(cfg.kv_heads * cfg.head_size)
        self.output = Dense(cfg.hidden_size, use_bias=cfg.output_bias, dtype=self.dtype, kernel_init=_init(cfg))
        if cfg.query_key_norm:
            self.query_norm, self.key_norm = (RMSNorm(cfg.norm_eps, cfg.norm_offset, self.dtype) for _ in range(2))
        self.drop = Dropout(cfg.attention_dropout)

    def keys_values(self, x_BxTxH: jax.Array, angles: Rotation) -> KeyValue:
        """Rotated keys, and values, f[B, M, T, D] of a sequence f[B, T, H]."""
        key_BxTxMxD, value_BxTxMxD = self._heads(self.key(x_BxTxH)), self._heads(self.value(x_BxTxH))
        if self.config.query_key_norm:
            key_BxTxMxD = self.key_norm(key_BxTxMxD)
        return KeyValue(rotate(key_BxTxMxD, angles).swapaxes(1, 2), value_BxTxMxD.swapaxes(1, 2))

    def __call__(
        self, x_BxTxH: jax.Array, mask_BxTxS: jax.Array, deterministic: bool, angles: Rotation, few: bool, *, source: KeyValue
    ) -> jax.Array:
        """f[B, T, H] to f[B, T, H]; keys and values are the source's. `few`: there are few queries and many keys."""
        cfg = self.config
        q_BxTxNxD = self._heads(self.query(x_BxTxH))
        if cfg.query_key_norm:
            q_BxTxNxD = self.query_norm(q_BxTxNxD)
        q_BxTxNxD, group = rotate(q_BxTxNxD, angles), cfg.num_heads // cfg.kv_heads
        key, value = source
        if few:  # the queries of a group share each key, which is not copied for them
            q_BxTxNxD = q_BxTxNxD.reshape(*q_BxTxNxD.shape[:2], cfg.kv_heads, group, cfg.head_size).swapaxes(2, 3)
            q_BxTxNxD = q_BxTxNxD.reshape(x_BxTxH.shape[0], -1, cfg.kv_heads, cfg.head_size)
            mask_BxTxS = jnp.repeat(mask_BxTxS, group, axis=1)
        elif group > 1:
            key, value = (jnp.repeat(part, group, axis=1) for part in source)
        out = self._attend(q_BxTxNxD, key, value, mask_BxTxS, deterministic)
        if few:
            out = out.reshape(*x_BxTxH.shape[:2], group, cfg.kv_heads, cfg.head_size).swapaxes(2, 3)
        return self.output(out.reshape(*x_BxTxH.shape[:-1], -1))

    def _attend(self, q: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, deterministic: bool) -> jax.Array:
        cfg = self.config
        drops = cfg.attention_dropout > 0.0 and not deterministic
        return self.kernels.attend(
            q,
            key,
            value,
            mask,
            scale=cfg.head_size**-0.5 if cfg.attention_scale is None else cfg.attention_scale,
            dropout=functools.partial(self.drop, deterministic=False) if drops else None,
        )

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], -1, self.config.head_size)


def _norm(cfg: LlamaConfig, dtype: Any, name: str) -> RMSNorm:
    return RMSNorm(cfg.norm_eps, cfg.norm_offset, dtype, name=name)


def _init(cfg: LlamaConfig) -> Any:
    return nn.initializers.normal(cfg.initializer_range)
