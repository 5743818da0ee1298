"""Copies of the topmost layers: each task's own, or columns of all tasks that are mixed after every layer.

Shapes in names: B rows with their copies, T tokens a row, H width, K tasks, C copies of a layer, M blocks of rows.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mtl_jax.core import trees
from mtl_jax.core.errors import NOT_A_PATTERN, UserError
from mtl_jax.core.files import shown
from mtl_jax.sharing.base import Sharing, layers_from_the_top
from mtl_jax.sharing.layer_copies import apply_by_number, apply_side_by_side, joined, vectors, with_vectors
from mtl_jax.transfer.adapters.base import COMMON, OWN, Call, Layer, Params
from mtl_jax.transfer.adapters.routes import Routes
from mtl_jax.transfer.regularisers import FIELD, Regulariser

COLUMNS = "columns"
ENDS = "ends"  # the path of parameters that all layers have once


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopLayers(Sharing):
    """Each task has its own topmost layers, which start as copies of the trunk's; the trunk's own are then not used.

        Experiment(..., sharing=TopLayers(own=2))

    Attributes:
        own: How many layers, counted from the top.
    """

    own: int = 1

    by_row: ClassVar[bool] = False

    def check(self) -> None:
        self.at_least("own", 1)

    def where(self, layers: Mapping[str, Layer]) -> list[Layer]:
        return layers_from_the_top(layers, self.own, "sharing: own of TopLayers")

    def init(self, key: jax.Array, layer: Layer) -> dict[str, jax.Array]:
        return {}

    def copied(self, layer: Layer, tasks: int) -> dict[str, int]:
        return {OWN: tasks}

    def around(self, params: Params, call: Call) -> Any:
        assert call.rows is not None
        return apply_by_number(call, params[OWN], call.rows.task_BC, len(call.rows.routes.tasks))

    def merged(self, params: Params, kernel: Mapping[str, Any], layer: Layer) -> dict[str, Any]:
        return dict(params)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossStitch(Sharing):
    """A column of layers for each task, and after every layer a learned mixture of columns (Misra et al. 2016).

    Every column starts as a copy of the trunk's layers. At first a column gets `stay` of itself and (1 - stay) / (K - 1) of
    each other column, so that the outputs are the trunk's up to rounding. Every row passes the columns of all tasks: K times
    the operations, from the first of these layers on.

        Experiment(..., sharing=CrossStitch(layers=2))

    Attributes:
        layers: How many layers have columns, counted from the top; 0: all.
        stay: The share that a column keeps of itself at first.
    """

    layers: int = 0
    stay: float = 0.9

    by_row: ClassVar[bool] = False

    def check(self) -> None:
        self.at_least("layers", 0)

    def where(self, layers: Mapping[str, Layer]) -> list[Layer]:
        return layers_from_the_top(layers, self.layers, "sharing: layers of CrossStitch")

    def routes(self, routes: Routes) -> Routes:
        return all_columns(routes)

    def init(self, key: jax.Array, layer: Layer) -> dict[str, jax.Array]:
        return {}

    def init_for(self, key: jax.Array, layer: Layer, tasks: int) -> dict[str, jax.Array]:
        return {"mix": stitches(tasks, self.stay)}

    def copied(self, layer: Layer, tasks: int) -> dict[str, int]:
        return {COLUMNS: tasks}

    def around(self, params: Params, call: Call) -> Any:
        assert call.rows is not None
        call.show("mix", params["mix"], call.rows.routes.tasks)
        output = apply_side_by_side(call, params[COLUMNS], len(params["mix"]))
        x_BxKxTxH = vectors(output)
        mixed = jnp.einsum("kj,bj...->bk...", params["mix"].astype(x_BxKxTxH.dtype), x_BxKxTxH)
        return joined(with_vectors(output, mixed))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sluice(Sharing):
    """Columns of layers whose halves are mixed, and for each task a mixture of its column's layers (Ruder et al. 2019).

    The vectors of every column are two subspaces of H / 2 numbers. After each layer all 2 K subspaces are mixed. At the end a
    task reads a weighted sum of the outputs of its column's layers. At first a subspace keeps `stay` of itself, and a task
    reads the last layer, so that the outputs are the trunk's up to rounding. The paper's penalty for subspaces that overlap
    is the regulariser Subspaces.

        Experiment(..., sharing=Sluice(layers=2), regularisers=(Subspaces(name="apart", weight=1e-3),))

    Attributes:
        layers: How many layers have columns, counted from the top; 0: all.
        stay: The share that a subspace keeps of itself at first; the rest comes in equal parts from the same subspace of the
            other columns.
    """

    layers: int = 0
    stay: float = 0.9

    by_row: ClassVar[bool] = False
    common: ClassVar[str] = ENDS

    def check(self) -> None:
        self.at_least("layers", 0)

    def where(self, layers: Mapping[str, Layer]) -> list[Layer]:
        places = layers_from_the_top(layers, self.layers, "sharing: layers of Sluice")
        if places[0].outputs % 2:
            raise UserError(f"sharing: Sluice halves the trunk's vectors, but their width {places[0].outputs} is odd")
        return [Layer(ENDS, COMMON, outputs=len(places)), *places]

    def routes(self, routes: Routes) -> Routes:
        return all_columns(routes)

    def init(self, key: jax.Array, layer: Layer) -> dict[str, jax.Array]:
        return {}

    def init_own(self, key: jax.Array, layer: Layer) -> dict[str, jax.Array]:
        return {"depth": jnp.zeros(layer.outputs).at[-1].set(1.0)} if layer.kind == COMMON else {}

    def init_for(self, key: jax.Array, layer: Layer, tasks: int) -> dict[str, jax.Array]:
        return {} if layer.kind == COMMON else {"mix": jnp.kron(stitches(tasks, self.stay), jnp.eye(2))}

    def copied(self, layer: Layer, tasks: int) -> dict[str, int]:
        return {} if layer.kind == COMMON else {COLUMNS: tasks}

    def around(self, params: Params, call: Call) -> Any:
        assert call.rows is not None
        K = len(params["mix"]) // 2
        if call.shown is not None:
            call.show("mix", block_sizes(params["mix"]), call.rows.routes.tasks)
        output = apply_side_by_side(call, params[COLUMNS], K)
        x_BxKxTxH = vectors(output)
        B, T, H = x_BxKxTxH.shape[0], *x_BxKxTxH.shape[2:]
        halves = x_BxKxTxH.reshape(B, K, T, 2, H // 2).swapaxes(2, 3).reshape(B, 2 * K, T, H // 2)
        mixed = jnp.einsum("kj,bj...->bk...", params["mix"].astype(halves.dtype), halves)
        x_BxKxTxH = mixed.reshape(B, K, 2, T, H // 2).swapaxes(2, 3).reshape(B, K, T, H)
        outputs = call.memo.setdefault("outputs", [])
        outputs.append(x_BxKxTxH)
        names = call.memo.setdefault("layers", [])
        names.append(call.layer.path.rpartition("/")[2])
        depth_KxL = params[OWN]["depth"].reshape(K, -1)
        if len(outputs) == depth_KxL.shape[1]:  # the last layer
            call.show("depth", depth_KxL, names)
            depth_KxL = depth_KxL.astype(x_BxKxTxH.dtype)
            x_BxKxTxH = sum(depth_KxL[:, n, None, None] * layer for n, layer in enumerate(outputs))
        return joined(with_vectors(output, x_BxKxTxH))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subspaces(Regulariser):
    """Sluice's penalty for subspaces of a column that overlap (Ruder et al. 2019).

    The loss is the sum over columns, layers and maps of ||A^T B||_F^2. A and B are the parts f32[I, H / 2] of a map f32[I, H]
    that make the first and the second half of the layer's vectors. It is 0 if they are orthogonal.

    Attributes:
        name: As in all regularisers.
        weight: As in all regularisers.
        phase: As in all regularisers.
        parameters: A regular expression for the maps, [..., I, H], that write to the vectors.
    """

    name: str = "subspaces"
    parameters: str = rf"trunk/adapters/sharing/.*/{COLUMNS}/(.*/)?(attention/output|feed_forward_out)/kernel"

    reads_start: ClassVar[bool] = False
    must_match: ClassVar[tuple[str, ...]] = ("parameters",)

    def check(self) -> None:
        try:
            re.compile(self.parameters)
        except NOT_A_PATTERN as error:
            raise UserError(
                f"{FIELD}: parameters of {self.name} is not a regular expression: {shown(self.parameters)!r} ({error})"
            ) from error

    def penalty(self, trained: Mapping[str, jax.Array], references: Mapping[str, Mapping[str, jax.Array]]) -> jax.Array:
        overlaps = [subspace_overlap(trained[path]) for path in trees.matching(self.parameters, trained)]
        return sum(overlaps, jnp.zeros(()))


def subspace_overlap(kernel: jax.Array) -> jax.Array:
    """The sum of ||A^T B||_F^2 over maps, f32[], where A and B are the halves of a map's outputs.

    Args:
        kernel: f[..., I, H], one map or a stack of maps; H is even.
    """
    first, second = jnp.split(kernel.astype(jnp.float32), 2, axis=-1)
    return (jnp.einsum("...ia,...ib->...ab", first, second) ** 2).sum()


def all_columns(routes: Routes) -> Routes:
    """The routes of a sharing whose rows pass the columns of all tasks."""
    columns = tuple(range(len(routes.tasks)))
    return dataclasses.replace(routes, table=(columns,) * len(routes.table))


def block_sizes(mix: jax.Array) -> jax.Array:
    """f32[K, K], the share of each column in each column: the norms of the 2 x 2 blocks of f32[2K, 2K], divided by sqrt(2).

    >>> block_sizes(jnp.kron(stitches(2, 0.75), jnp.eye(2))).tolist()
    [[0.75, 0.25], [0.25, 0.75]]
    """
    K = len(mix) // 2
    return jnp.sqrt((mix.reshape(K, 2, K, 2) ** 2).sum(axis=(1, 3)) / 2)


def stitches(tasks: int, stay: float) -> jax.Array:
    """f32[K, K], the share of each column in each column at first.

    >>> stitches(3, 0.5).tolist()
    [[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5]]
    """
    if tasks == 1:
        return jnp.ones((1, 1))
    return jnp.full((tasks, tasks), (1 - stay) / (tasks - 1)).at[jnp.diag_indices(tasks)].set(stay)
