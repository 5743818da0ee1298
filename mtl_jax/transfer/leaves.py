"""Parameters by their paths, as regular expressions name them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax

from mtl_jax.transfer.freezing import path_name

Leaves = dict[str, jax.Array]


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
