"""Task gradients of the token table, without a table for each task.

Every task reads few rows of the table, so K whole tables would be almost all zeros. The trunk gets the vectors of its tokens
in place of the table, and their gradients are added up by token and task. Shapes in names: T tokens of a batch, as often as a
task has them, Q pairs of a token and a task at most, E columns of the table, V its rows, K tasks, C pairs that are compared
at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mtl_jax.training import mesh as meshes
from mtl_jax.training.task_gradients import Layout


class TokenGradients(NamedTuple):
    """The gradients of a token table by token and task, the pairs in ascending order of both.

    Attributes:
        values: f32[Q, E].
        tokens: i32[Q]; V where there is no further pair, and the values are zeros.
        tasks: i32[Q], numbers of tasks.
    """

    values: jax.Array
    tokens: jax.Array
    tasks: jax.Array


def of_rounds(
    vectors: Sequence[jax.Array], tokens: jax.Array, layout: Layout, halves: int, table_rows: int, mesh: Mesh | None
) -> TokenGradients:
    """The gradients of a token table from those of the tokens' vectors, as the backward pass gives them.

    Tasks have the numbers of their sorted names; in the second half of a batch K is added. Shapes: N blocks of R rows, M tasks
    of a round.

    Args:
        vectors: For each round the gradients of the tokens' vectors, f[..., M, R, T, E]. Axes in front are parts of the batch,
            the first of them, if there are two halves, the half.
        tokens: i32[..., N, R, T].
        layout: The rounds.
        halves: 1 or 2.
        table_rows: V.
        mesh: The devices, if there are several: each gets a share of the columns.
    """
    number = {name: place for place, name in enumerate(sorted(layout.tasks))}
    K, ids, tasks = len(number), [], []
    for entries in layout.rounds:
        ids.append(tokens[..., np.array([block for _, block in entries]), :, :])
        tasks_M = np.array([number[task] for task, _ in entries])[:, None, None]
        half = np.arange(halves).reshape(-1, *[1] * (tokens.ndim - 1)) if halves > 1 else 0
        tasks.append(np.broadcast_to(tasks_M + K * half, ids[-1].shape))
    if mesh is not None:
        vectors = [meshes.in_shares(mesh, leaf, axes=(-1,)) for leaf in vectors]
    gradients_TxE = jnp.concatenate([leaf.reshape(-1, leaf.shape[-1]) for leaf in vectors])
    ids_T, tasks_T = jnp.concatenate([leaf.ravel() for leaf in ids]), np.concatenate([leaf.ravel() for leaf in tasks])
    return by_token_and_task(gradients_TxE, ids_T, jnp.asarray(tasks_T), table_rows, halves * K)


def by_token_and_task(
    gradients_TxE: jax.Array, tokens_T: jax.Array, tasks_T: jax.Array, table_rows: int, tasks: int
) -> TokenGradients:
    """Adds up the gradients of tokens that are the same row of the table and belong to the same task.

    Args:
        gradients_TxE: The gradient of each token's vector, f[T, E].
        tokens_T: Rows of the table, i32[T].
        tasks_T: The task that each gradient is of, i32[T].
        table_rows: V.
        tasks: K.

    >>> gradients = by_token_and_task(jnp.ones((3, 2)), jnp.array([4, 4, 4]), jnp.array([0, 1, 0]), 9, 2)
    >>> gradients.values[:, 0].tolist(), gradients.tokens.tolist(), gradients.tasks.tolist()
    ([2.0, 1.0, 0.0], [4, 4, 9], [0, 1, 0])
    """
    pair_T, end = tokens_T * tasks + tasks_T, table_rows * tasks
    if len(pair_T) < end:
        order_T = jnp.argsort(pair_T, stable=True)
        pair_T, gradients_TxE = pair_T[order_T], gradients_TxE[order_T]
        first_T = jnp.concatenate([jnp.ones(1, bool), pair_T[1:] != pair_T[:-1]])
        place_T = jnp.cumsum(first_T) - 1
        pair_Q = jnp.sort(jnp.where(first_T, pair_T, end))
    else:  # more than all pairs that there are
        pair_Q, place_T = jnp.arange(end), pair_T
    values_QxE = jnp.zeros((len(pair_Q), gradients_TxE.shape[1]), jnp.float32)
    return TokenGradients(values_QxE.at[place_T].add(gradients_TxE), pair_Q // tasks, pair_Q % tasks)


def gram_matrix(gradients: TokenGradients, tasks: int) -> jax.Array:
    """Inner products of the tasks' gradients of the table: f32[K, K].

    The pairs of a token stand side by side, so only near ones are compared: those of C places, and of these with the next C.

    Args:
        gradients: by_token_and_task(...).
        tasks: K.

    >>> gradients = by_token_and_task(jnp.ones((3, 2)), jnp.array([4, 4, 4]), jnp.array([0, 1, 0]), 9, 2)
    >>> gram_matrix(gradients, 2).tolist()
    [[8.0, 4.0], [4.0, 2.0]]
    """
    C = -(-max(tasks, 2) // 8) * 8
    missing = -len(gradients.tokens) % C
    values_BxCxE = jnp.pad(gradients.values, ((0, missing), (0, 0))).reshape(-1, C, gradients.values.shape[1])
    tokens_BxC = jnp.pad(gradients.tokens, (0, missing), constant_values=-1).reshape(-1, C)
    tasks_BxCxK = jax.nn.one_hot(jnp.pad(gradients.tasks, (0, missing)), tasks).reshape(-1, C, tasks)

    def compared(others: slice) -> jax.Array:
        count = len(values_BxCxE) - (others.start or 0)
        products_BxCxC = jnp.einsum("bce,bde->bcd", values_BxCxE[:count], values_BxCxE[others], precision="highest")
        same_BxCxC = tokens_BxC[:count, :, None] == tokens_BxC[others][:, None, :]
        products_BxCxC = jnp.where(same_BxCxC, products_BxCxC, 0.0)
        rows_BxCxK = jnp.einsum("bcd,bdk->bck", products_BxCxC, tasks_BxCxK[others], precision="highest")
        return jnp.einsum("bck,bcl->kl", tasks_BxCxK[:count], rows_BxCxK, precision="highest")

    near_KxK = compared(slice(1, None))
    return compared(slice(None)) + near_KxK + near_KxK.T


def rows_read(gradients: TokenGradients, tasks: int, table_rows: int) -> tuple[jax.Array, jax.Array]:
    """The tasks' gradients of the rows that any task reads: f32[K, U, E], and the rows i32[U], where U = min(Q, V).

    Args:
        gradients: by_token_and_task(...).
        tasks: K.
        table_rows: V, which also stands for no row.
    """
    before_Q = jnp.concatenate([jnp.full(1, -1, gradients.tokens.dtype), gradients.tokens[:-1]])
    place_Q = jnp.cumsum(gradients.tokens != before_Q) - 1
    U = min(len(gradients.tokens), table_rows)
    values_KxUxE = jnp.zeros((tasks, U, gradients.values.shape[1]), jnp.float32)
    values_KxUxE = values_KxUxE.at[gradients.tasks, place_Q].add(gradients.values, mode="drop")
    return values_KxUxE, jnp.full(U, table_rows).at[place_Q].set(gradients.tokens, mode="drop")


def combine(gradients: TokenGradients, weights_K: jax.Array, table_rows: int, mesh: Mesh | None = None) -> jax.Array:
    """The weighted sum of the tasks' gradients of the table: f32[V, E].

    Args:
        gradients: by_token_and_task(...).
        weights_K: A weight for each task.
        table_rows: V.
        mesh: The devices, if there are several.
    """
    weighted_QxE = weights_K[gradients.tasks][:, None] * gradients.values
    if mesh is not None and len(weighted_QxE) < table_rows:  # the devices get the shares of the smaller array
        weighted_QxE = jax.lax.with_sharding_constraint(weighted_QxE, meshes.replicated(mesh))
    table_VxE = jnp.zeros((table_rows, gradients.values.shape[1]), jnp.float32)
    return table_VxE.at[gradients.tokens].add(weighted_QxE, mode="drop", indices_are_sorted=True)
