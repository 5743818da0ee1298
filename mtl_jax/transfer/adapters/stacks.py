"""Parameters that are there several times: stacked by source, by task, or as copies of a layer; and their paths.

Shapes in names: B rows, N parameters of one kind in a stack.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.transfer.adapters.base import OWN, Inserted, Layer


def chosen_rows(leaf: jax.Array, chosen_BxN: jax.Array) -> jax.Array:
    """The part of a stack for each row."""
    N = chosen_BxN.shape[-1]
    stack = leaf.reshape(N, 1, -1) if leaf.ndim == 1 else leaf
    return jnp.einsum("bn,n...->b...", chosen_BxN, stack, precision="highest")


def subtree(tree: Mapping[str, Any], path: str) -> Any:
    """The part of a tree at a path such as "layer_0/attention"."""
    for name in path.split("/"):
        tree = tree[name]
    return tree


def stacked_init(init: Any, key: jax.Array, layer: Layer, count: int) -> dict[str, Any]:
    """The results of an adapter's init() or init_own() for several sources or tasks."""
    by_owner: dict[str, Any] = jax.vmap(lambda key: init(key, layer))(jax.random.split(key, count))
    return jax.tree.map(flat_vectors, by_owner)


def stacked_copies(tree: Any, count: int) -> Any:
    """Several copies of parameters; vectors as flat_vectors() says."""
    return jax.tree.map(lambda leaf: flat_vectors(jnp.broadcast_to(leaf, (count, *leaf.shape))), tree)


def flat_vectors(leaf: jax.Array) -> jax.Array:
    """A stack as it is kept: that of vectors is one long vector."""
    # Weight decay is for leaves of two or more dimensions only.
    return leaf.reshape(-1) if leaf.ndim == 2 else leaf


def below(flat: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The leaves whose paths begin with a prefix, by the rest of their paths."""
    return {path.removeprefix(prefix): leaf for path, leaf in flat.items() if path.startswith(prefix)}


def of_number(leaf: jax.Array, count: int, number: int | None) -> jax.Array:
    """The parameter of one source or task, out of a stack of several."""
    return leaf.reshape(count, -1)[number] if leaf.ndim == 1 else leaf[number]


def has_own(adapter: Inserted, layer: Layer, tasks: int) -> bool:
    """Whether an adapter has parameters of single tasks at a layer, or copies of the layer."""
    return bool(jax.eval_shape(lambda: adapter.init_own(jax.random.key(0), layer))) or bool(adapter.copied(layer, tasks))


def is_own(path: str) -> bool:
    """Whether a parameter belongs to single tasks by its path alone; see OwnParts for those of adapters."""
    return f"/{OWN}/" in f"/{path}/"


SHARED, UNREAD = "", "(no task)"  # in place of the name of a task


class OwnParts(NamedTuple):
    """Which parameters of a trunk belong to single tasks; such parameters are not in the Gram matrix of the trunk.

    Attributes:
        by_adapter: {adapter with parameters for each source or task: the only task that reads each of them}; SHARED where
            several tasks do, UNREAD where none does.
        tasks: The tasks, in the order of their parts in other parameters of single tasks.
    """

    by_adapter: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    tasks: tuple[str, ...] = ()

    def of(self, path: str) -> tuple[bool, ...]:
        """(True,) for a parameter of single tasks, (False,) for a shared one, else a bool for each part of the stack.

        >>> OwnParts({"lora": ("rating", SHARED)}).of("adapters/lora/layer_0/attention/query/a")
        (True, False)

        Args:
            path: The parameter's path in the trunk.
        """
        if is_own(path):
            return (True,)
        parts = tuple(owner != SHARED for owner in self.owners(path))
        return parts if len(set(parts)) > 1 else parts[:1]

    def owners(self, path: str) -> tuple[str, ...]:
        """The task of each part of a stack, SHARED or UNREAD; (SHARED,) for a parameter that is not stacked.

        Args:
            path: As for of().
        """
        if is_own(path):
            return self.tasks
        of_adapters, _, adapter_path = path.partition("/")
        name = adapter_path.partition("/")[0] if of_adapters == "adapters" else ""
        return self.by_adapter.get(name, (SHARED,))


def mask_of(parts: tuple[bool, ...], shape: tuple[int, ...]) -> np.ndarray:
    """bool[shape]: the part of each number of a stack of such parameters."""
    return np.repeat(np.array(parts), int(np.prod(shape)) // len(parts)).reshape(shape)
