"""EuroBERT (Boizard et al. 2025): Llama's blocks as an encoder, in which every token sees its whole example.

Shapes in names: B rows, T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_jax.models.encoder import EncoderOutput
from mtl_jax.models.layers import PLAIN, Dense, Kernels, attention_mask_BxTxT
from mtl_jax.models.llama import Block, Embeddings, RMSNorm, rope_rotation
from mtl_jax.models.llama_config import LlamaConfig
from mtl_jax.models.trunk_output import segment_mean

POOLINGS = ("late", "mean", "bos")


@dataclasses.dataclass(frozen=True)
class EuroBertConfig(LlamaConfig):
    """Sizes and constants, read from a checkpoint's config.json.

    Attributes:
        head_pooling: What the head over rows reads: the mean of the tokens, their first (bos), or, late, every token, of whose
            logits the mean is the row's.
    """

    head_pooling: str = "late"


class EuroBert(nn.Module):
    """Token ids to contextual vectors.

    Attributes:
        config: Sizes and constants; all layers are global.
        dtype: Compute dtype; parameters, norms, rotations and softmax stay float32.
        kernels: How the layers are computed.
    """

    config: EuroBertConfig
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
            token_type_ids: Not read: these models have no types.
            position_ids: i32[B, T], each token's position in its example; None counts along the row. Only differences matter.
            segment_ids: i32[B, T], the example each token belongs to in a packed row; tokens attend
                inside their own segment only. None means one example a row.
            deterministic: False applies dropout and needs an rng named "dropout", if there is any.

        Returns:
            EncoderOutput with hidden f[B, T, H].
        """
        cfg = self.config
        if attention_mask is None:
            attention_mask = jnp.ones_like(input_ids)
        if position_ids is None:
            position_ids = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        mask_BxTxT = attention_mask_BxTxT(attention_mask, segment_ids)
        angles = rope_rotation(position_ids, cfg.rope, cfg.head_size)
        x_BxTxH = Embeddings(cfg, self.dtype, name="embeddings")(input_ids)
        for number in range(len(cfg.global_layers)):
            x_BxTxH, _ = Block(cfg, self.dtype, self.kernels, name=f"layer_{number}")(
                x_BxTxH, mask_BxTxT, angles, deterministic
            )
        return EncoderOutput(hidden=RMSNorm(cfg.norm_eps, cfg.norm_offset, self.dtype, name="final_norm")(x_BxTxH))


class RowHead(nn.Module):
    """Logits f[B, num_labels] of a row: a linear layer over a dense one of its tokens' vectors.

    Attributes:
        config: Sizes and constants.
        dtype: Compute dtype.
    """

    reads_mask: ClassVar[bool] = True

    config: EuroBertConfig
    dtype: Any

    @nn.compact
    def __call__(
        self,
        hidden_BxTxH: jax.Array,
        pooled_BxH: jax.Array | None,
        table_VxH: jax.Array | None,
        deterministic: bool,
        *,
        attention_mask: jax.Array,
    ) -> jax.Array:
        cfg, init = self.config, nn.initializers.normal(self.config.initializer_range)

        def mean(x_BxTxH: jax.Array) -> jax.Array:
            return segment_mean(x_BxTxH, attention_mask.astype(bool), 1)[:, 0].astype(x_BxTxH.dtype)

        x = {"bos": lambda: hidden_BxTxH[:, 0], "mean": lambda: mean(hidden_BxTxH), "late": lambda: hidden_BxTxH}[
            cfg.head_pooling
        ]()
        x = nn.gelu(Dense(cfg.hidden_size, dtype=self.dtype, kernel_init=init, name="dense")(x), approximate=False)
        if cfg.head_pooling == "late":  # the mean of linear outputs is the output of the mean
            x = mean(x)
        return Dense(cfg.num_labels, dtype=self.dtype, kernel_init=init, name="classifier")(x)


class TokenLogits(nn.Module):
    """Logits f[B, T, V] of every token over the vocabulary, in one linear map.

    Attributes:
        config: Sizes and constants; feed_forward_bias is that of this map, too, and tied whether it is the token table.
        dtype: Compute dtype.
    """

    config: EuroBertConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, hidden_BxTxH: jax.Array, pooled_BxH: jax.Array | None, table_VxH: jax.Array | None, deterministic: bool
    ) -> jax.Array:
        cfg = self.config
        if not cfg.tied:
            init = nn.initializers.normal(cfg.initializer_range)
            dense = Dense(cfg.vocab_size, use_bias=cfg.feed_forward_bias, dtype=self.dtype, kernel_init=init, name="lm_head")
            return dense(hidden_BxTxH)
        assert table_VxH is not None
        logits_BxTxV = jnp.einsum("bth,vh->btv", hidden_BxTxH, table_VxH.astype(self.dtype))
        if not cfg.feed_forward_bias:
            return logits_BxTxV
        return logits_BxTxV + self.param("bias", nn.initializers.zeros, (cfg.vocab_size,)).astype(self.dtype)
