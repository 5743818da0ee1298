"""The rows of the token table that a batch reads, in place of the table.

A gradient of the table is zero but in these rows. A step that holds one for each task holds K tables otherwise: half of what
the K gradients of MiniLM are, and more with a vocabulary of many languages.

Shapes in names: V rows of the table, E its columns, R rows of a batch, T tokens a row, U = R T.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.data.batches import Batch
from mtl_jax.models.encoded import token_table, with_token_table
from mtl_jax.training.state import TrainState
from mtl_jax.training.step import Measure, Measured


def only_read(found: Measure) -> Measure:
    """A measure with the same result, inside of which the token table has the rows of the batch's tokens only.

    Args:
        found: A measure for which tokens are places in the token table and nothing else.
    """

    def measure(
        trained: Any, frozen: Any, batch: Batch, table: jax.Array | None, state: TrainState, references: Any = None
    ) -> Measured:
        whole_VxE = token_table(trained["trunk"])
        if whole_VxE is None or len(whole_VxE) <= batch.tokens.size:  # it is frozen, or there is nothing to win
            return found(trained, frozen, batch, table, state, references)
        # Different tokens in order, then V for each that is there twice; no row is read from V, and none is written to it.
        ids_U, places_RxT = jnp.unique(batch.tokens, return_inverse=True, size=batch.tokens.size, fill_value=len(whole_VxE))
        rows_UxE = whole_VxE.at[ids_U].get(mode="fill", fill_value=0.0)
        narrow = trained | {"trunk": with_token_table(trained["trunk"], rows_UxE)}
        tokens_RxT = places_RxT.reshape(batch.tokens.shape).astype(batch.tokens.dtype)
        measured = found(narrow, frozen, batch._replace(tokens=tokens_RxT), table, state, references)
        trunk = measured.gradient["trunk"]
        gradient_VxE = jnp.zeros_like(whole_VxE).at[ids_U].set(token_table(trunk), mode="drop")
        return measured._replace(gradient=measured.gradient | {"trunk": with_token_table(trunk, gradient_VxE)})

    return measure
