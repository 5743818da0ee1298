"""Per-task gradients of the shared trunk at the price of plain training, and the Gram matrix of them.

Every task has rows of its own source, so the gradients of K tasks need no K backward passes over the batch: the rows are cut
into blocks by source, the heads' backward gives each task's cotangent on its own block, and each block goes back through the
trunk once. Only tasks that share a source need one backward pass of that block each.

Shapes in names: N blocks (sources), R rows a block, S examples a row, H trunk width, K tasks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from mtl_jax.core import trees
from mtl_jax.data.batches import Batch
from mtl_jax.tasks import Task
from mtl_jax.transfer.adapters.stacks import OwnParts, mask_of

NO_ADAPTERS = OwnParts()  # of which single tasks have parts
CHUNK = 8192  # numbers of every task at a time, so that K chunks fit into a core's cache


class Layout(NamedTuple):
    """Which rows belong to which tasks; all of it static.

    Attributes:
        rows: The most rows of each source in a batch, in order.
        fixed: Whether every batch has exactly these rows, source by source; else rows of any number and order.
        rounds: Tasks by backward pass: rounds[r] lists (task, block) for the r-th task of every block with more than r tasks.
    """

    rows: tuple[int, ...]
    fixed: bool
    rounds: tuple[tuple[tuple[str, int], ...], ...]

    @property
    def tasks(self) -> list[str]:
        """Task names in the order of the rounds."""
        return [task for entries in self.rounds for task, _ in entries]


def layout(tasks: Sequence[Task], rows: dict[str, int], fixed: bool = False) -> Layout:
    """The layout of a run.

    Args:
        tasks: The tasks.
        rows: {source: the most rows it has in a batch}, in the run's order.
        fixed: As in Layout.
    """
    blocks = {source: [task.name for task in tasks if task.source == source] for source in rows}
    depth = max(len(names) for names in blocks.values())
    rounds = tuple(
        tuple((names[r], number) for number, names in enumerate(blocks.values()) if len(names) > r) for r in range(depth)
    )
    return Layout(tuple(rows.values()), fixed, rounds)


@jax.named_scope("blocks")
def cut(batch: Batch, layout: Layout, tasks: Sequence[Task], multiple: int = 1) -> Batch:
    """A batch as equal blocks by source: leaves [rows of the batch, ...] become [N, R, ...], padded with empty rows.

    Args:
        batch: The batch.
        layout: The layout.
        tasks: The tasks, for their missing labels.
        multiple: R is the smallest multiple of this that is at least the largest of layout.rows.
    """
    N, R = len(layout.rows), -(-max(layout.rows) // multiple) * multiple
    if layout.fixed and set(layout.rows) == {R}:
        return jax.tree.map(lambda leaf: leaf.reshape(N, R, *leaf.shape[1:]), batch)
    of_source_NxB = batch.source == jnp.arange(N)[:, None]
    # The rows of source 0 in order, then those of source 1 ..., then the batch's empty ones.
    order_B = jnp.argsort(jnp.where(batch.source < 0, N, batch.source), stable=True)
    count_N = of_source_NxB.sum(axis=1)
    within_NxR = jnp.arange(R)[None] + (jnp.cumsum(count_N) - count_N)[:, None]
    row_NxR = order_B[jnp.minimum(within_NxR, len(order_B) - 1)]
    # A row past the end of its block is past the end of the batch, where `fill` takes over.
    index_NxR = jnp.where(jnp.arange(R) < count_N[:, None], row_NxR, len(order_B))

    def take(leaf: jax.Array, fill: float) -> jax.Array:
        return jnp.take(leaf, index_NxR, axis=0, mode="fill", fill_value=fill)

    return Batch(
        tokens=take(batch.tokens, 0),
        segments=take(batch.segments, 0),
        positions=take(batch.positions, 0),
        index=take(batch.index, -1),
        source=take(batch.source, -1),
        types=None if batch.types is None else take(batch.types, 0),
        labels={task.name: take(batch.labels[task.name], task.missing) for task in tasks},
    )


def encode_blocks(
    encode_block: Callable[[Any, Any, Batch, jax.Array], Any], parameters: Any, by_block: Any, blocks: Batch, keys_N: jax.Array
) -> tuple[Any, Callable[[Any, np.ndarray], Any]]:
    """One forward pass over all blocks, and a backward pass through each block separately.

    The residuals of the forward pass are kept once a block, except those that are the same for all blocks, as parameters and
    their casts are: N copies would make every matrix product of the backward pass a batched one over N copies of its weights.

    Args:
        encode_block: (parameters, what the block has of `by_block`, block, key) -> Encoded: arrays f[R, ...].
        parameters: The shared parameters to differentiate by.
        by_block: Other arrays to differentiate by, of which every block has a part: leaves [N, ...].
        blocks: cut(...).
        keys_N: A dropout key for each block.

    Returns:
        Encoded with leaves [N, R, ...], and a function (cotangents [M, R, ...], the places of their M blocks) -> gradients:
        trees like `parameters` and like `by_block`, leaves [M, ...].
    """
    structure: list[Any] = []

    def forward(parameters: Any, part: Any, block: Batch, key: jax.Array) -> tuple[Any, list[jax.Array]]:
        encoded, pull = jax.vjp(lambda *both: encode_block(both[0], both[1], block, key), parameters, part)
        residuals, treedef = jax.tree.flatten(pull)
        structure[:] = [treedef]
        return encoded, residuals

    first = jax.tree.map(lambda leaf: leaf[0], (by_block, blocks, keys_N))
    axes = [0 if differs else None for differs in depends(forward, parameters, *first)[1]]
    in_axes, out_axes = (None, 0, 0, 0), (0, axes)
    encoded, residuals = jax.vmap(forward, in_axes=in_axes, out_axes=out_axes)(parameters, by_block, blocks, keys_N)

    def back(residuals: list[jax.Array], cotangent: Any) -> Any:
        return jax.tree.unflatten(structure[0], residuals)(cotangent)

    def pull(cotangents: Any, places_M: np.ndarray) -> Any:
        all_blocks = len(places_M) == len(keys_N)
        chosen = [leaf if all_blocks or axis is None else leaf[places_M] for leaf, axis in zip(residuals, axes, strict=True)]
        return jax.vmap(back, in_axes=(axes, 0))(chosen, cotangents)

    return encoded, pull


def depends(function: Callable[..., Any], shared: Any, *by_block: Any) -> Any:
    """Which outputs of function(shared, *by_block) depend on more than `shared`: a tree of bools like the output.

    The traced program tells it. A parameter, or its cast to bfloat16, does not; an activation does.
    """
    program, shape = jax.make_jaxpr(function, return_shape=True)(shared, *by_block)
    jaxpr = program.jaxpr
    marked = set(jaxpr.invars[len(jax.tree.leaves(shared)) :])
    for equation in jaxpr.eqns:
        if any(not isinstance(value, Literal) and value in marked for value in equation.invars):
            marked.update(equation.outvars)
    flags = [not isinstance(value, Literal) and value in marked for value in jaxpr.outvars]
    return jax.tree.unflatten(jax.tree.structure(shape), flags)


def task_gradients(
    pull: Callable[[Any, np.ndarray], Any],
    cotangents: dict[str, Any],
    rounds: Sequence[Sequence[tuple[str, int]]],
) -> list[tuple[Any, Any]]:
    """The gradient of every task with respect to the shared parameters, and with respect to what its block has.

    Args:
        pull: The second result of encode_blocks.
        cotangents: {task: the gradient of its loss with respect to Encoded of its block}.
        rounds: Layout.rounds.

    Returns:
        For each round two trees, as encode_blocks() says, leaves [tasks of the round, ...].
    """
    by_round = []
    for entries in rounds:
        places_M = np.array([block for _, block in entries])
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(cotangents[task] for task, _ in entries))
        by_round.append(pull(stacked, places_M))
    return by_round


def in_order(rounds: Sequence[Any], names: Sequence[str]) -> Any:
    """The rounds as one tree, leaves [K, ...] in sorted order of the names, float32."""
    order = np.argsort(np.array(names))

    def join(*leaves: jax.Array) -> jax.Array:
        leaf = leaves[0] if len(leaves) == 1 else jnp.concatenate(leaves)
        leaf = leaf if (order == np.arange(len(order))).all() else leaf[order]  # a copy only where the order differs
        return leaf.astype(jnp.float32)

    return jax.tree.map(join, *rounds)


@jax.named_scope("gram")
def gram_matrix(rounds: Sequence[Any], names: Sequence[str] | Sequence[int]) -> jax.Array:
    """Inner products of the task gradients: f32[K, K], rows in sorted order of the names.

    Args:
        rounds: task_gradients(...).
        names: Task names, or numbers, in the order of the rounds.
    """

    def inner(*rounds_KxP: jax.Array) -> jax.Array:
        rows_KxP = jnp.concatenate(rounds_KxP)
        return _products(rows_KxP, rows_KxP)

    def inner_by_rounds(*rounds: jax.Array) -> jax.Array:
        """The same without a copy of the first round, which has most of the tasks."""
        parts = rounds if len(rounds) < 3 else (rounds[0], jnp.concatenate(rounds[1:]))
        return jnp.block([[_products(rows, columns) for columns in parts] for rows in parts])

    def inner_by_chunks(*rounds_KxP: jax.Array) -> jax.Array:
        """The same by chunks, for CPUs, where XLA takes six times as long for the product of a few very long rows."""
        whole = rounds_KxP[0].shape[1] // CHUNK

        def add(n: jax.Array, total_KxK: jax.Array) -> jax.Array:
            return total_KxK + inner(*[jax.lax.dynamic_slice_in_dim(rows, n * CHUNK, CHUNK, axis=1) for rows in rounds_KxP])

        rest_KxK = inner(*[rows[:, whole * CHUNK :] for rows in rounds_KxP])
        return jax.lax.fori_loop(0, whole, add, rest_KxK)

    def on_cpu(*leaves: jax.Array) -> jax.Array:
        flat_KxP = [leaf.reshape(len(leaf), -1) for leaf in leaves]
        return (inner if flat_KxP[0].shape[1] <= 2 * CHUNK else inner_by_chunks)(*flat_KxP)

    def gram_of_leaf(*leaves: jax.Array) -> jax.Array:
        return jax.lax.platform_dependent(*leaves, cpu=on_cpu, default=inner_by_rounds)

    no_leaves_KxK = jnp.zeros((len(names), len(names)))
    gram_KxK = jax.tree.reduce(jnp.add, jax.tree.map(gram_of_leaf, *rounds), no_leaves_KxK)
    order = np.argsort(np.array(names))
    return gram_KxK[order][:, order]


def _products(rows: jax.Array, columns: jax.Array) -> jax.Array:
    """f32[K, M]: the inner products of the rows [K, ...] with the columns [M, ...]."""
    inside = tuple(range(1, rows.ndim))
    return jax.lax.dot_general(
        rows, columns, ((inside, inside), ((), ())), precision="highest", preferred_element_type=jnp.float32
    )


def of_halves(both_2Kx2K: jax.Array, counts: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The Gram matrix of the whole batch's task gradients, and Signals.cross: both f32[K, K].

    Args:
        both_2Kx2K: Inner products of the halves' parts in the whole batch's gradients, which are their sums: those of the
            first half before those of the second, tasks in sorted order.
        counts: {task: f32[2]}, labelled examples or tokens of each half.
    """
    K = len(counts)
    gram_KxK = both_2Kx2K.reshape(2, K, 2, K).sum(axis=(0, 2))
    counts_2xK = jnp.stack([counts[name] for name in sorted(counts)], axis=1)
    # From a part of the whole mean to the half's own mean; a half without examples has no gradient, and 0 stays 0.
    scale_2xK = counts_2xK.sum(axis=0) / jnp.maximum(counts_2xK, 1.0)
    in_both_K = (counts_2xK > 0).all(axis=0)
    cross_KxK = scale_2xK[0][:, None] * both_2Kx2K[:K, K:] * scale_2xK[1][None, :]
    return gram_KxK, jnp.where(in_both_K[:, None] & in_both_K[None, :], cross_KxK, 0.0)


@jax.named_scope("combined")
def combine(rounds: Sequence[Any], weights: Mapping[str, jax.Array], names: Sequence[str], own: OwnParts = NO_ADAPTERS) -> Any:
    """sum_k weight_k * gradient_k, a tree like the parameters, float32.

    A task with a weight below 0 does not change parameters that belong to single tasks, as it does not change its head.

    Args:
        rounds: task_gradients(...).
        weights: {task: f32[]}.
        names: Task names in the order of the rounds.
        own: Which parameters belong to single tasks.
    """

    def sum_of(path: Any, leaf: jax.Array, weights_K: jax.Array) -> jax.Array:
        parts = own.of(trees.path_name(path))
        rows = leaf.astype(jnp.float32)
        if not any(parts):
            return jnp.tensordot(weights_K, rows, axes=1)
        of_tasks = jnp.tensordot(jnp.maximum(weights_K, 0.0), rows, axes=1)
        if all(parts):
            return of_tasks
        return jnp.where(mask_of(parts, of_tasks.shape), of_tasks, jnp.tensordot(weights_K, rows, axes=1))

    start, total = 0, None
    if not jax.tree.leaves(rounds):  # a trunk that is a token table and no more
        return rounds[0]
    for gradients in rounds:
        count = len(jax.tree.leaves(gradients)[0])
        weights_K = jnp.stack([weights[name] for name in names[start : start + count]])
        part = jax.tree_util.tree_map_with_path(functools.partial(sum_of, weights_K=weights_K), gradients)
        total = part if total is None else jax.tree.map(jnp.add, total, part)
        start += count
    return total


def gram_of_rows(rows: Any) -> jax.Array:
    """f32[K, K], the inner products of the task gradients in a tree of leaves [K, ...], which shared_only() made."""
    return gram_matrix([rows], range(len(jax.tree.leaves(rows)[0])))


def shared_only(gradients: Any, own: OwnParts = NO_ADAPTERS) -> Any:
    """Gradients of the trunk without those by parameters of single tasks, in which tasks cannot conflict.

    Args:
        gradients: Leaves [K, ...], arrays or shapes.
        own: Which parameters belong to single tasks.

    Returns:
        The tree with None in place of such leaves, and with zeros in their part of a stack that has both.
    """

    def shared(path: Any, leaf: Any) -> Any:
        parts = own.of(trees.path_name(path))
        return None if all(parts) else leaf if not any(parts) else _only(leaf, parts, kept=False)

    return jax.tree_util.tree_map_with_path(shared, gradients)


def of_single_tasks(gradients: Any, own: OwnParts = NO_ADAPTERS) -> Any:
    """What shared_only() leaves out of gradients, in the same form."""

    def of_tasks(path: Any, leaf: Any) -> Any:
        parts = own.of(trees.path_name(path))
        return leaf if all(parts) else None if not any(parts) else _only(leaf, parts, kept=True)

    return jax.tree_util.tree_map_with_path(of_tasks, gradients)


def together(shared: Any, of_tasks: Any, own: OwnParts = NO_ADAPTERS) -> Any:
    """One gradient from that of the shared parameters and that of those of single tasks, which have None for the others."""

    def either(path: Any, shared_leaf: Any, own_leaf: Any) -> Any:
        if shared_leaf is None or own_leaf is None:
            return own_leaf if shared_leaf is None else shared_leaf
        return jnp.where(mask_of(own.of(trees.path_name(path)), own_leaf.shape), own_leaf, shared_leaf)

    return jax.tree_util.tree_map_with_path(either, shared, of_tasks, is_leaf=lambda leaf: leaf is None)


def _only(leaf: Any, parts: tuple[bool, ...], kept: bool) -> Any:
    """A leaf [K, ...] with zeros where its part of the stack is not of the wanted kind."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    return jnp.where(mask_of(parts, leaf.shape[1:]) == kept, leaf, jnp.zeros((), leaf.dtype))
