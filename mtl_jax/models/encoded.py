"""What a trunk hands to the heads."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from mtl_jax.errors import UserError


class Encoded(NamedTuple):
    """A batch as the trunk sees it; each part is there only where a task of the run asks for it.

    Attributes:
        tokens: f[R, T, H], a vector for each token.
        pooled: f32[R, S, H], the mean of each example's token vectors.
        table: f32[V, E], the trunk's token table, for heads that share it.
    """

    tokens: jax.Array | None = None
    pooled: jax.Array | None = None
    table: jax.Array | None = None


def token_table(params: Any) -> jax.Array:
    """The trunk's token table f32[V, E]: every trunk calls it word/embedding, on top or under embeddings.

    Raises:
        UserError: There is none.
    """
    for found in (params, params.get("embeddings", {})):
        if "word" in found:
            return found["word"]["embedding"]
    raise UserError("the trunk has no token table that a head could share")


def with_token_table(params: Any, table_VxE: jax.Array) -> Any:
    """The trunk's parameters with another token table."""
    if "word" in params:
        return params | {"word": params["word"] | {"embedding": table_VxE}}
    return params | {"embeddings": with_token_table(params["embeddings"], table_VxE)}
