"""Trees of parameters: their leaves by path, and their split into trainable and frozen leaves."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

Leaves = dict[str, jax.Array]
Flat = dict[str, Any]


def leaves_of(tree: Any) -> Leaves:
    """{path: leaf}; a frozen one, None, is left out."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def put(tree: Any, leaves: Leaves) -> Any:
    """The tree with those leaves in their places."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaves.get(path_name(path), leaf), tree)


def matching(pattern: str, leaves: Mapping[str, Any]) -> list[str]:
    """The paths that a regular expression matches whole."""
    compiled = re.compile(pattern)
    return [path for path in leaves if compiled.fullmatch(path)]


def path_name(path: tuple[Any, ...]) -> str:
    """A jax key path as names with slashes: trunk/layer_0/attention/query/kernel."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def split(params: Any, mask: Any) -> tuple[Any, Any]:
    """Two trees of the same shape: the trainable leaves, and the frozen ones; None stands where a leaf is in the other.

    Args:
        params: A tree of arrays; None leaves, from an earlier split, stay None in both.
        mask: A tree of bools.
    """
    return (
        jax.tree.map(lambda leaf, train: leaf if train else None, params, mask, is_leaf=_is_none),
        jax.tree.map(lambda leaf, train: None if train else leaf, params, mask, is_leaf=_is_none),
    )


def merge(trained: Any, frozen: Any) -> Any:
    """The inverse of split."""
    return jax.tree.map(lambda a, b: b if a is None else a, trained, frozen, is_leaf=_is_none)


def norm(tree: Any) -> jax.Array:
    """The Euclidean norm over all leaves together, of the leaves' dtype; optax.tree.norm for trees without complex numbers.

    Args:
        tree: A tree of real arrays.
    """
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))


def _is_none(leaf: Any) -> bool:
    return leaf is None


def flat(params: Any) -> Flat:
    """{path: leaf}; paths like those of parameter rules."""
    return traverse_util.flatten_dict(params, sep="/")


def nested(leaves: Mapping[str, Any]) -> Any:
    """The inverse of flat."""
    return traverse_util.unflatten_dict(dict(leaves), sep="/")
