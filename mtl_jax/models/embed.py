"""A look-up that may be given a table of fewer rows than the vocabulary."""

from __future__ import annotations

import flax.linen as nn
import jax


class Embed(nn.Embed):
    """nn.Embed, with as many rows as the table that it is given; a new one has num_embeddings.

    So a step can hold only the rows that a batch reads (training/token_rows.py), where linen insists on the shape declared.
    """

    def setup(self) -> None:
        given: jax.Array | None = self.get_variable("params", "embedding")
        rows = self.num_embeddings if given is None else given.shape[0]
        self.embedding = self.param("embedding", self.embedding_init, (rows, self.features), self.param_dtype)
