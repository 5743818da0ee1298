"""The train state of many runs as one: a leaf has an axis over runs in front where each run has its own.

What never trains and is the same in all of them, such as a frozen trunk, is there once, and so is the work on it.
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
    """What a checkpoint of many runs holds: the fields of TrainState, and `best`.

    Attributes:
        step: i32[], steps done; the same in all.
        params: As in TrainState; own leaves are [N, ...]. So are all leaves of what follows.
        opt_state: As in TrainState.
        rule_state: As in TrainState.
        key: u32[N, 2].
        average: As in TrainState.
        best: The measured parameters of each run's best evaluation, own leaves only.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    rule_state: Any
    key: jax.Array
    average: Any = None
    best: Any = None

    def state(self) -> TrainState:
        """Without `best`."""
        return TrainState(*self[:6])


def differing(params: Sequence[Any]) -> Any:
    """Tree of bools: which leaves are not the same, bit by bit, in all of these parameters."""

    def differs(first: Any, *others: Any) -> bool:
        return any(other is not first and not np.array_equal(np.asarray(first), np.asarray(other)) for other in others)

    return jax.tree.map(differs, *params)


def either(*masks: Any) -> Any:
    """Tree of bools: which leaves are true in one of these."""
    return jax.tree.map(lambda *values: any(values), *masks)


def axes(own: Any) -> TrainState:
    """The axes over runs of a state, as jax.vmap takes them.

    Args:
        own: Tree of bools over the parameters.
    """
    params: Any = jax.tree.map(lambda has: 0 if has else None, own)
    return TrainState(step=None, params=params, opt_state=0, rule_state=0, key=0, average=0)  # type: ignore[arg-type]


def shardings(own: Any, mesh: Mesh) -> TrainState:
    """How a state lies on the devices: own leaves cut over runs, all else whole on every device."""
    by_runs, whole = meshes.by_runs(mesh), meshes.replicated(mesh)
    params = jax.tree.map(lambda has: by_runs if has else whole, own)
    return TrainState(whole, params, by_runs, by_runs, by_runs, by_runs)  # type: ignore[arg-type]


def placed(shapes: Any, shardings: Any) -> Any:
    """Shapes with where they lie.

    Args:
        shapes: A tree of arrays or shapes.
        shardings: A sharding for each leaf, or for a whole part of the tree.
    """

    def place(sharding: Any, part: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), part)

    return jax.tree.map(place, shardings, shapes)


def stack(params: Sequence[Any], own: Any, mesh: Mesh) -> Any:
    """Parameters of N runs, [N, ...] where they are own."""

    def put(has: bool, *leaves: Any) -> jax.Array:
        if not has:
            return meshes.place(np.array(leaves[0]), meshes.replicated(mesh))  # copied: the step donates its buffer
        arrays = [np.asarray(leaf) for leaf in leaves]
        alike = all(array is arrays[0] for array in arrays)
        whole = np.broadcast_to(arrays[0], (len(arrays), *arrays[0].shape)) if alike else np.stack(arrays)
        return meshes.place(whole, meshes.by_runs(mesh))

    return jax.tree.map(put, own, *params)


def widen(params: Any, before: Any, own: Any, count: int, mesh: Mesh) -> Any:
    """Leaves that become own get an axis over N runs.

    Args:
        params: Parameters, or a part of them, other leaves None.
        before: Tree of bools: the leaves that are own.
        own: Those that are to be.
        count: N.
        mesh: The devices.
    """

    def put(was: bool, has: bool, leaf: Any) -> Any:
        if was or not has or leaf is None:
            return leaf
        array = np.asarray(leaf)
        return meshes.place(np.broadcast_to(array, (count, *array.shape)), meshes.by_runs(mesh))

    return jax.tree.map(put, before, own, params)


def keys(seeds: Sequence[int], mesh: Mesh) -> jax.Array:
    """u32[N, 2]: the key of each run, as training.state.create makes it."""
    found = [jax.random.key_data(jax.random.fold_in(jax.random.key(seed), 1)) for seed in seeds]
    return meshes.place(np.stack([np.asarray(key) for key in found]), meshes.by_runs(mesh))


def take(tree: Any, own: Any, number: int) -> Any:
    """Parameters of one run.

    Args:
        tree: Parameters of all of them.
        own: Tree of bools: which leaves are own.
        number: The run.
    """
    return jax.tree.map(lambda has, leaf: leaf[number] if has else leaf, own, tree)


def take_state(state: TrainState, own: Any, number: int) -> TrainState:
    """The state of one run."""
    rest = jax.tree.map(lambda leaf: leaf[number], state._replace(step=None, params=None))  # type: ignore[arg-type]
    return rest._replace(step=state.step, params=take(state.params, own, number))


def keep_better(mesh: Mesh) -> Callable[[Any, Any, jax.Array], Any]:
    """Jitted: (best [N, ...], measured [N, ...], bool[N]) -> best, replaced in those runs."""

    def choose(best: Any, measured: Any, better_N: jax.Array) -> Any:
        def pick(old: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.where(better_N.reshape(-1, *[1] * (old.ndim - 1)), new, old)

        return jax.tree.map(pick, best, measured)

    return jax.jit(choose, donate_argnums=0, out_shardings=meshes.by_runs(mesh))


def own_part(params: Any, own: Any) -> Any:
    """The own leaves; None for the others."""
    return trees.split(params, own)[0]
