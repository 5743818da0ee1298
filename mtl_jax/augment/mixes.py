"""Mixing: a loss at points between two examples, with both labels; and labels smoothed by those of near examples.

Both are regularisers, losses beside those of the tasks with their own weights. Their computations are also functions of arrays,
for your own loop.

Shapes in names: R rows, T tokens a row, S examples a row, H trunk width.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.core.errors import UserError, unknown
from mtl_jax.transfer.regularisers import FIELD, Regulariser

PLACES = ("pooled", "hidden", "embeddings")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mix(Regulariser):
    """Mixup: examples are mixed in pairs of one source, and so are their labels (Zhang et al., 2018; Guo et al., 2019).

    With m from Beta(alpha, alpha), drawn once a step, the vectors of an example become m x + (1 - m) x', and the loss is
    m loss(y) + (1 - m) loss(y'), which is the loss of the soft label. The partner x' is another example of the batch, of the
    same source, whatever rows the two are packed in. For tasks with a label for each text: classification, multilabel,
    regression. The loss is the sum over tasks of the mean over their labelled examples; a pair with a missing label adds 0.

    Attributes:
        name: As in all regularisers.
        weight: As in all regularisers.
        phase: As in all regularisers.
        tasks: These tasks; empty: all with a label for each text and a weight.
        at: Which vectors are mixed. pooled: the vector of each text, which costs almost nothing. hidden: the token vectors
            after `layer` layers (TMix, Chen et al., 2020). embeddings: those before the first layer. The last two cost a second
            pass through the trunk; the n-th token is mixed with the partner's n-th token, and unchanged if there is none.
        layer: For hidden: the number of layers before the mixing.
        alpha: The smaller it is, the nearer the mixture is to one of the two examples.

    References:
        https://arxiv.org/abs/1710.09412, https://arxiv.org/abs/1905.08941, https://arxiv.org/abs/2004.12239

    Examples:
        >>> experiment = dataclasses.replace(EXPERIMENT, regularisers=(mtl_jax.augment.Mix(at="hidden", layer=1),))
    """

    name: str = "mix"
    tasks: tuple[str, ...] = ()
    at: str = "pooled"
    layer: int = 0
    alpha: float = 0.4

    def check(self) -> None:
        if self.at not in PLACES:
            raise unknown(f"at of {self.name}:", self.at, PLACES)
        if not 0 < self.alpha < math.inf:
            raise UserError(f"{FIELD}: alpha of {self.name} is {self.alpha}; it must be above 0 and finite")
        if (self.at == "hidden") != (self.layer > 0):
            raise UserError(f"{FIELD}: layer of {self.name} is {self.layer}; with at hidden it is 1 or more, else 0")

    @property
    def own_pass(self) -> bool:
        return self.at != "pooled"

    @property
    def changes_inputs(self) -> bool:
        return self.own_pass

    @property
    def reads_vectors(self) -> bool:
        return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeighbourSmoothing(Regulariser):
    """Labels are smoothed by those of the nearest examples (as in Bahri and Jiang, 2021, here within a batch).

    The loss of an example is the mean of its losses with the labels of its k nearest examples of the same source, by the cosine
    of the vectors of their texts. With weight w beside the task's own loss, the sum is the loss of a soft label: 1 / (1 + w) of
    its own label, the rest of its neighbours'. For tasks with a label for each text; summed and averaged as in Mix.

    Attributes:
        name: As in all regularisers.
        weight: As in all regularisers.
        phase: As in all regularisers.
        tasks: These tasks; empty: all with a label for each text and a weight.
        neighbours: k.

    References:
        https://arxiv.org/abs/2102.05140

    Examples:
        >>> experiment = dataclasses.replace(EXPERIMENT, regularisers=(mtl_jax.augment.NeighbourSmoothing(weight=0.1),))
    """

    name: str = "neighbours"
    weight: float | str = 0.1
    tasks: tuple[str, ...] = ()
    neighbours: int = 3

    @property
    def reads_vectors(self) -> bool:
        return True

    def check(self) -> None:
        if self.neighbours < 1:
            raise UserError(f"{FIELD}: neighbours of {self.name} is {self.neighbours}; it must be at least 1")


def partners(key: jax.Array, group_N: jax.Array) -> jax.Array:
    """i32[N]: a partner of each example within its group, by a random permutation of the group.

    Args:
        key: A PRNG key.
        group_N: i32[N], small numbers.

    Examples:
        >>> mtl_jax.augment.partners(jax.random.key(0), jnp.array([0, 1, 0, 1, 2])).tolist()[4]
        4
    """
    in_order = jnp.argsort(group_N, stable=True)
    # Sorted first by a random number, then by group, so that the order within a group is random.
    shuffled = jax.random.permutation(key, len(group_N))
    at_random = shuffled[jnp.argsort(group_N[shuffled], stable=True)]
    return jnp.zeros(len(group_N), jnp.int32).at[in_order].set(at_random.astype(jnp.int32))


def mixed(values_Nx: jax.Array, partner_N: jax.Array, weight: jax.Array) -> jax.Array:
    """[N, ...]: weight times each value plus (1 - weight) times its partner's.

    Args:
        values_Nx: [N, ...].
        partner_N: i32[N].
        weight: f32[].
    """
    return weight * values_Nx + (1 - weight) * values_Nx[partner_N]


def mixed_tokens(
    hidden_RxTxH: jax.Array, segments_RxT: jax.Array, positions_RxT: jax.Array, partner_N: jax.Array, weight: jax.Array
) -> jax.Array:
    """f[R, T, H]: token vectors of packed examples, each mixed with the token at the same position of the partner.

    Args:
        hidden_RxTxH: Token vectors.
        segments_RxT: i32, the example of each token in its row, from 1; 0 at padding.
        positions_RxT: i32, its position in its example.
        partner_N: i32[R * S], the partner of each example; example s of row r is number r * S + s.
        weight: f32[], the weight of the token itself; a token whose partner has none at its position is unchanged.
    """
    R, T = segments_RxT.shape
    S = len(partner_N) // R
    is_of_RxSxT = segments_RxT[:, None, :] == jnp.arange(1, S + 1)[None, :, None]
    first_N, length_N = is_of_RxSxT.argmax(axis=2).reshape(-1), is_of_RxSxT.sum(axis=2).reshape(-1)
    example_RxT = jnp.arange(R)[:, None] * S + jnp.maximum(segments_RxT - 1, 0)
    partner_RxT = partner_N[example_RxT]
    has_token_RxT = (segments_RxT > 0) & (positions_RxT < length_N[partner_RxT])
    place_RxT = (partner_RxT // S) * T + first_N[partner_RxT] + jnp.where(has_token_RxT, positions_RxT, 0)
    others_RxTxH = hidden_RxTxH.reshape(R * T, -1)[place_RxT]
    between_RxTxH = weight * hidden_RxTxH + (1 - weight) * others_RxTxH
    return jnp.where(has_token_RxT[..., None], between_RxTxH, hidden_RxTxH).astype(hidden_RxTxH.dtype)


def nearest(vectors_NxH: jax.Array, group_N: jax.Array, present_N: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k nearest other examples of each within its group, by cosine: i32[N, k]; and bool[N, k], whether they exist.

    Args:
        vectors_NxH: Vectors.
        group_N: i32[N].
        present_N: bool[N]: which entries are examples; the others are not neighbours.
        k: At most N - 1.
    """
    norm_NxH = vectors_NxH / jnp.maximum(jnp.linalg.norm(vectors_NxH, axis=1, keepdims=True), 1e-12)
    allowed_NxN = (group_N[:, None] == group_N[None]) & present_N[None] & ~jnp.eye(len(group_N), dtype=bool)
    cosine_NxN = jnp.where(allowed_NxN, norm_NxH @ norm_NxH.T, -jnp.inf)
    values_Nxk, index_Nxk = jax.lax.top_k(cosine_NxN, k)
    return index_Nxk, jnp.isfinite(values_Nxk)


def soft_loss(
    task: Any, outputs: jax.Array, labels_Nx: jax.Array, partner_N: jax.Array, weight: jax.Array, batch: Any
) -> jax.Array:
    """f32[]: weight times the loss with the own labels plus (1 - weight) times that with the partners', summed over pairs.

    A pair with a missing label adds 0.

    Args:
        task: A Task with a label for each text.
        outputs: f32[R, S, O], of the mixed examples.
        labels_Nx: [R * S, *label_shape].
        partner_N: i32[R * S].
        weight: f32[].
        batch: The rows.
    """
    has_N = has_label(task, labels_Nx)
    both_N = has_N & has_N[partner_N]
    both_Nx = both_N.reshape(-1, *[1] * (labels_Nx.ndim - 1))
    shape = (*outputs.shape[:2], *labels_Nx.shape[1:])
    missing = jnp.asarray(task.missing, labels_Nx.dtype)
    losses = [
        task.loss(outputs, jnp.where(both_Nx, labels, missing).reshape(shape), batch)[0]
        for labels in (labels_Nx, labels_Nx[partner_N])
    ]
    return weight * losses[0] + (1 - weight) * losses[1]


def has_label(task: Any, labels_Nx: jax.Array) -> jax.Array:
    """bool[N]: which examples have a label of a task."""
    known = ~jnp.isnan(labels_Nx) if math.isnan(task.missing) else labels_Nx != task.missing
    return known.reshape(len(labels_Nx), -1).any(axis=1)
