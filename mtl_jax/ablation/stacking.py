"""The train states of many runs as one: leaves that differ between runs have an axis over runs in front.

A leaf that is the same in all runs and never trains, such as those of a frozen trunk, is stored once, and computed with once.

Shapes in names: N runs. `per_run` is always a tree of bools over the parameters: true for leaves with the axis over runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mtl_jax.core import trees
from mtl_jax.training import mesh as meshes
from mtl_jax.training.train_state import TrainState


class Together(NamedTuple):
    """The contents of a checkpoint of many runs: the fields of TrainState, and `best`.

    Attributes:
        step: i32[], number of steps done; the same in all runs.
        params: As in TrainState; per-run leaves are [N, ...].
        opt_state: As in TrainState, all leaves [N, ...].
        rule_state: As in TrainState, all leaves [N, ...].
        key: u32[N, 2].
        average: As in TrainState, all leaves [N, ...].
        best: The evaluated parameters of each run's best evaluation, per-run leaves only, [N, ...].
    """

    step: jax.Array
    params: Any
    opt_state: Any
    rule_state: Any
    key: jax.Array
    average: Any = None
    best: Any = None

    def state(self) -> TrainState:
        """The state without `best`."""
        return TrainState(*self[:6])


def differing(params: Sequence[Any]) -> Any:
    """Tree of bools: the leaves that are not bit by bit the same in all of these parameters."""

    def differs(first: Any, *others: Any) -> bool:
        return any(other is not first and not np.array_equal(np.asarray(first), np.asarray(other)) for other in others)

    return jax.tree.map(differs, *params)


def either(*masks: Any) -> Any:
    """Tree of bools: the leaves that are true in at least one of these trees."""
    return jax.tree.map(lambda *values: any(values), *masks)


def axes(per_run: Any) -> TrainState:
    """The axes over runs of a state, in the form of jax.vmap's in_axes."""
    params: Any = jax.tree.map(lambda stacked: 0 if stacked else None, per_run)
    return TrainState(step=None, params=params, opt_state=0, rule_state=0, key=0, average=0)  # type: ignore[arg-type]


def shardings(per_run: Any, mesh: Mesh) -> TrainState:
    """The shardings of a state: per-run leaves are divided over runs, all others replicated."""
    by_runs, whole = meshes.by_runs(mesh), meshes.replicated(mesh)
    params = jax.tree.map(lambda stacked: by_runs if stacked else whole, per_run)
    return TrainState(whole, params, by_runs, by_runs, by_runs, by_runs)  # type: ignore[arg-type]


def placed(shapes: Any, shardings: Any) -> Any:
    """Shapes with shardings.

    Args:
        shapes: A tree of arrays or shapes.
        shardings: A sharding for each leaf, or for a whole part of the tree.
    """

    def place(sharding: Any, part: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), part)

    return jax.tree.map(place, shardings, shapes)


def stack(params: Sequence[Any], per_run: Any, mesh: Mesh) -> Any:
    """The parameters of N runs as one tree; per-run leaves are [N, ...], the others those of the first run."""

    def put(stacked: bool, *leaves: Any) -> jax.Array:
        if not stacked:
            return meshes.place(np.array(leaves[0]), meshes.replicated(mesh))  # copied: the step donates its buffer
        arrays = [np.asarray(leaf) for leaf in leaves]
        alike = all(array is arrays[0] for array in arrays)
        whole = np.broadcast_to(arrays[0], (len(arrays), *arrays[0].shape)) if alike else np.stack(arrays)
        return meshes.place(whole, meshes.by_runs(mesh))

    return jax.tree.map(put, per_run, *params)


def widen(params: Any, before: Any, per_run: Any, count: int, mesh: Mesh) -> Any:
    """The parameters with an axis over N runs for leaves that become per-run.

    Args:
        params: Parameters, or a part of them with other leaves None.
        before: The per-run leaves so far.
        per_run: The per-run leaves from now on.
        count: N.
        mesh: The devices.
    """

    def put(was_per_run: bool, stacked: bool, leaf: Any) -> Any:
        if was_per_run or not stacked or leaf is None:
            return leaf
        array = np.asarray(leaf)
        return meshes.place(np.broadcast_to(array, (count, *array.shape)), meshes.by_runs(mesh))

    return jax.tree.map(put, before, per_run, params)


def keys(seeds: Sequence[int], mesh: Mesh) -> jax.Array:
    """u32[N, 2]: the key of each run, the same as that of a run that is trained alone."""
    run_keys = [jax.random.key_data(jax.random.fold_in(jax.random.key(seed), 1)) for seed in seeds]
    return meshes.place(np.stack([np.asarray(key) for key in run_keys]), meshes.by_runs(mesh))


def take(tree: Any, per_run: Any, number: int) -> Any:
    """The parameters of one run.

    Args:
        tree: The parameters of all runs.
        per_run: The per-run leaves.
        number: The place of the run.
    """
    return jax.tree.map(lambda stacked, leaf: leaf[number] if stacked else leaf, per_run, tree)


def take_state(state: TrainState, per_run: Any, number: int) -> TrainState:
    """The state of one run."""
    rest = jax.tree.map(lambda leaf: leaf[number], state._replace(step=None, params=None))  # type: ignore[arg-type]
    return rest._replace(step=state.step, params=take(state.params, per_run, number))


def keep_better(mesh: Mesh) -> Callable[[Any, Any, jax.Array], Any]:
    """Jitted: (best [N, ...], measured [N, ...], bool[N]) -> best, replaced by measured in the runs where the bool is true."""

    def choose(best: Any, measured: Any, better_N: jax.Array) -> Any:
        def pick(old: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.where(better_N.reshape(-1, *[1] * (old.ndim - 1)), new, old)

        return jax.tree.map(pick, best, measured)

    return jax.jit(choose, donate_argnums=0, out_shardings=meshes.by_runs(mesh))


def per_run_part(params: Any, per_run: Any) -> Any:
    """The per-run leaves; None for the others."""
    return trees.split(params, per_run)[0]
