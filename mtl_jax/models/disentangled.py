"""Disentangled attention (He et al. 2021, DeBERTa): scores from content and from vectors of distances, each with the other.

Distances are counted along the row, so the terms of all rows of a batch have one form, the same on every diagonal, and no
gather of scores is needed: the examples of a packed row are not interleaved, and do not see each other.

Shapes in names: B rows, T tokens, H hidden size, N attention heads, D size of a head, S distances on one side that have a
vector of their own, U vectors of distances that a row of T tokens needs, R = 2 T - 1 distances of two tokens.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.models.dropout import Dropout
from mtl_jax.models.kv_cache import KeyValue
from mtl_jax.models.layers import Attention, Dense, attend


def distance_buckets(distances: np.ndarray, buckets: int, longest: int) -> np.ndarray:
    """Signed buckets of signed distances, i32 of the same shape.

    Distances up to buckets / 2 are their own bucket. Those beyond share buckets that grow with the logarithm, so that the
    distance longest - 1 has the last one.

    Args:
        distances: Query minus key, any shape.
        buckets: Buckets on one side, 0 included.
        longest: Larger than buckets / 2 + 1.
    """
    middle, size = buckets // 2, np.abs(distances)
    # In float32, step by step as torch does it: the ceiling would carry another rounding into another bucket.
    share = np.log(np.maximum(size, middle).astype(np.float32) / np.float32(middle))
    share = share / np.log(np.float32((longest - 1) / middle))
    grown = np.ceil(share * np.float32(middle - 1)).astype(np.int32) + middle
    return np.where(size <= middle, distances, np.sign(distances) * grown).astype(np.int32)


def distance_rows(span: int, longest_distance: int, length: int) -> tuple[range, np.ndarray]:
    """The rows of the table of distances that a row of tokens needs.

    Args:
        span: S.
        longest_distance: The distance from which on all share a row, if those beyond S / 2 share rows; 0 if each has its own.
        length: T.

    Returns:
        The U rows of the table, and for each distance -(T - 1) .. T - 1 of a query from a key the number of its row among
        those, i32[2 T - 1].
    """
    distances = np.arange(1 - length, length)
    if longest_distance:
        distances = distance_buckets(distances, span, longest_distance)
    rows = np.clip(distances + span, 0, 2 * span - 1)
    return range(int(rows[0]), int(rows[-1]) + 1), rows - rows[0]


def windows(scores_BxNxTxR: jax.Array) -> jax.Array:
    """Row i of f[B, N, T, 2 T - 1] from column T - 1 - i on, T columns: f[B, N, T, T], without a gather."""
    *leading, T, R = scores_BxNxTxR.shape
    flat = jnp.pad(scores_BxNxTxR, ((0, 0),) * (len(leading) + 1) + ((0, 1),)).reshape(*leading, T * (R + 1))
    return flat[..., T - 1 : T - 1 + T * R].reshape(*leading, T, R)[..., :T]


class DisentangledAttention(Attention):
    """Self-attention whose scores have terms of content and distance (He et al. 2021, section 3.1).

    Keys that come from elsewhere, in front of the row's own, have no distance, and those terms are 0 for them.

    Attributes:
        span: S, half of the rows of the table of distances.
        longest_distance: As for distance_rows().
        content_to_position: Whether a query's content meets the vectors of its distances to the keys.
        position_to_content: Whether the vectors of distances meet the keys' content.
        shared_projections: Whether distances are projected by the maps of content; else by maps of their own.
        distance_dropout: Rate on the vectors of distances.
    """

    span: int = 256
    longest_distance: int = 0
    content_to_position: bool = True
    position_to_content: bool = True
    shared_projections: bool = True
    distance_dropout: float = 0.0

    def setup(self) -> None:
        super().setup()
        self.drop_distances = Dropout(self.distance_dropout)
        if not self.shared_projections:
            dense = functools.partial(Dense, self.num_heads * self.head_size, dtype=self.dtype, kernel_init=self.init)
            if self.content_to_position:
                self.position_key = dense()
            if self.position_to_content:
                self.position_query = dense()

    def __call__(
        self,
        x_BxTxH: jax.Array,
        mask_BxTxS: jax.Array,
        deterministic: bool,
        *,
        source: KeyValue | None = None,
        bias_BxNxTxS: jax.Array | None = None,
        distances_UxH: jax.Array | None = None,
    ) -> jax.Array:
        """f[B, T, H] to f[B, T, H]; keys and values are the source's, which end with x's own, or x's own if it is None."""
        source = self.keys_values(x_BxTxH) if source is None else source
        q_BxTxNxD = self._heads(self.query(x_BxTxH))
        if distances_UxH is not None:
            T, S = x_BxTxH.shape[1], source.key.shape[2]
            terms_BxNxTxT = self.distance_scores(q_BxTxNxD, source.key[:, :, S - T :], distances_UxH, deterministic)
            terms_BxNxTxS = jnp.pad(terms_BxNxTxT, ((0, 0), (0, 0), (0, 0), (S - T, 0)))
            bias_BxNxTxS = terms_BxNxTxS if bias_BxNxTxS is None else bias_BxNxTxS + terms_BxNxTxS
        drops = self.dropout > 0.0 and not deterministic
        out_BxTxNxD = attend(
            q_BxTxNxD,
            source.key,
            source.value,
            mask_BxTxS,
            scale=self.factor,
            bias_BxNxTxS=bias_BxNxTxS,
            dropout=functools.partial(self.drop, deterministic=False) if drops else None,
        )
        return self.output(out_BxTxNxD.reshape(x_BxTxH.shape))

    @property
    def factor(self) -> float:
        """Factor on all scores, those of distances, too."""
        return self.head_size**-0.5 if self.scale is None else self.scale

    def distance_scores(
        self,
        q_BxTxNxD: jax.Array,
        k_BxNxTxD: jax.Array,
        distances_UxH: jax.Array,
        deterministic: bool,
    ) -> jax.Array:
        """The terms of distances, scaled: f[B, N, T, T].

        Args:
            q_BxTxNxD: Queries.
            k_BxNxTxD: Keys.
            distances_UxH: The rows of the table of distances that distance_rows() names.
            deterministic: Whether dropout is off.
        """
        # One more axis in front: adapters of rows make the projections of distances those of rows.
        distances_1xUxH = self.drop_distances(distances_UxH, deterministic=deterministic)[None]
        T, scale = q_BxTxNxD.shape[1], self.factor
        _, ascending_R = distance_rows(self.span, self.longest_distance, T)
        scores_BxNxTxT = jnp.zeros((q_BxTxNxD.shape[0], self.num_heads, T, T), q_BxTxNxD.dtype)
        if self.content_to_position:
            project = self.key if self.shared_projections else self.position_key
            keys_xRxNxD = self._heads(project(distances_1xUxH))[:, ascending_R[::-1]]
            scores_BxNxTxT += windows(_products(q_BxTxNxD * scale, keys_xRxNxD))
        if self.position_to_content:
            project = self.query if self.shared_projections else self.position_query
            queries_xRxNxD = self._heads(project(distances_1xUxH))[:, ascending_R]
            scores_BxNxTxT += windows(_products(k_BxNxTxD.swapaxes(1, 2) * scale, queries_xRxNxD)).swapaxes(2, 3)
        return scores_BxNxTxT


def _products(x_BxTxNxD: jax.Array, y_xRxNxD: jax.Array) -> jax.Array:
    """f[B, N, T, R] of vectors of tokens and of distances, which are the same for all rows or each row's own."""
    if len(y_xRxNxD) == 1:
        return jnp.einsum("btnd,rnd->bntr", x_BxTxNxD, y_xRxNxD[0])
    return jnp.einsum("btnd,brnd->bntr", x_BxTxNxD, y_xRxNxD)
