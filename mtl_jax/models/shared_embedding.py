"""The seed-size trunk: a shared embedding table, nothing else.

Shapes in names: B rows, T tokens, E embedding dimension.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_jax.models.encoder import EncoderOutput
from mtl_jax.models.layers import Embed


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
    """Token ids to vectors by one table look-up; pooled by the masked mean like every other trunk.

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
        """Looks up i32[B, T] ids; returns hidden f[B, T, E]. A bag of words: the other arguments change nothing."""
        table = Embed(
            self.config.vocab_size,
            self.config.dimension,
            dtype=self.dtype,
            embedding_init=nn.initializers.normal(0.05),
            name="word",
        )
        return EncoderOutput(hidden=table(input_ids))
