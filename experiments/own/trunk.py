"""A trunk of one's own: layers of convolutions over words (after Kim 2014), shared by question types and product reviews.

    MTL_JAX_DATA=FOLDER python experiments/own/trunk.py
    MTL_JAX_DATA=FOLDER python experiments/own/trunk.py --trunk.window 2 --workdir runs/window2
    mtl-jax predict runs/window2 --import experiments/own/trunk.py --task trec --text "Who wrote Emma ?"

FOLDER has sentences/ with TREC (Li and Roth 2002) and the customer reviews of Hu and Liu (2004). A row may have several texts,
so a token's neighbours count only where they are of the same text: where their segment_ids are equal.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_jax import Batching, Classification, Evaluation, Experiment, Optimizer, Phase, Source, main
from mtl_jax.trunks import EncoderOutput, TrunkConfig


@dataclasses.dataclass(frozen=True)
class Convolutions(TrunkConfig):
    """Convolutions over the words of a text, each with a residual.

    Attributes:
        vocabulary: Most words in the vocabulary.
        width: H, the size of the vectors.
        window: W, the neighbours on either side that a convolution reads.
        layers: Convolutions.
        dropout: Dropout rate after each convolution.
    """

    vocabulary: int = 8000
    width: int = 96
    window: int = 1
    layers: int = 2
    dropout: float = 0.2

    def module(self, vocab_size: int, dtype: Any) -> nn.Module:
        return ConvolutionsModule(vocab_size, self.width, self.window, self.layers, self.dropout, dtype)


class ConvolutionsModule(nn.Module):
    """Token ids i32[B, T] to vectors f[B, T, H]."""

    vocab_size: int
    width: int
    window: int
    layers: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        *,
        position_ids: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        deterministic: bool = True,
    ) -> EncoderOutput:
        if segment_ids is None:
            segment_ids = jnp.ones_like(input_ids) if attention_mask is None else attention_mask
        x = nn.Embed(self.vocab_size, self.width, dtype=self.dtype, name="word")(input_ids)
        for layer in range(self.layers):
            y = nn.Dense(self.width, dtype=self.dtype, name=f"layer_{layer}")(neighbours(x, segment_ids, self.window))
            x += nn.Dropout(self.dropout)(nn.gelu(y), deterministic=deterministic)
        return EncoderOutput(hidden=x)


def neighbours(x: jax.Array, segment_ids: jax.Array, window: int) -> jax.Array:
    """f[B, T, (2 W + 1) H]: the vectors around each token, zeros where they are of another text or outside the row."""
    length, sides = x.shape[1], (window, window)
    padded, segments = jnp.pad(x, ((0, 0), sides, (0, 0))), jnp.pad(segment_ids, ((0, 0), sides), constant_values=-1)
    parts = []
    for start in range(2 * window + 1):
        same = segments[:, start : start + length] == segment_ids
        parts.append(jnp.where(same[..., None], padded[:, start : start + length], 0))
    return jnp.concatenate(parts, axis=-1)


def source(name: str, file: str, test: str = "") -> Source:
    """Lines "LABEL TEXT"."""
    pattern = r"(?P<label>\d) (?P<text>.+)"
    return Source(name=name, path=f"data:sentences/{file}", test_path=test, format="lines", pattern=pattern, lenient=True)


EXPERIMENT = Experiment(
    name="own_trunk",
    trunk=Convolutions(),
    sources=(
        source("trec", "TREC.train.all", test="data:sentences/TREC.test.all"),
        source("reviews", "custrev.all"),
    ),
    tasks=(
        Classification(name="trec", source="trec", column="label"),
        Classification(name="reviews", source="reviews", column="label"),
    ),
    phases=(Phase("everything", steps=300),),
    optimizer=Optimizer(learning_rate=2e-3),
    batch=Batching(rows=16, row_length=64),
    evaluation=Evaluation(every=50),
)

if __name__ == "__main__":
    main(EXPERIMENT)
