"""What can be merged: trees of one shape, and numbers within their bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.counting import count as number_of
from mtl_jax.errors import UserError
from mtl_jax.transfer.freezing import path_name

Flat = dict[str, np.ndarray]


def flat(tree: Any) -> Flat:
    """{path: leaf} of a tree, on the host; paths like those of parameter rules."""
    return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def check_alike(trees: Sequence[Any], names: Sequence[str] = ()) -> list[Flat]:
    """The leaves of trees of one shape, by path.

    Args:
        trees: The trees.
        names: What errors call them.

    Raises:
        UserError: There are none; a path is not in all of them; a leaf has not the same shape in all, or is no float.
    """
    if not trees:
        raise UserError("there is nothing to merge: no parameters were given")
    names = names or [f"tree {number}" for number in range(len(trees))]
    first, *others = flats = [flat(tree) for tree in trees]
    for name, other in zip(names[1:], others, strict=True):
        for path in [*first, *(path for path in other if path not in first)]:
            here, there = (leaves[path].shape if path in leaves else None for leaves in (first, other))
            if here != there:
                raise UserError(
                    f"{name}: {path} is {_shape(there)} there, and {_shape(here)} in {names[0]}; only models of one family and "
                    "shape can be merged"
                )
    for name, leaves in zip(names, flats, strict=True):
        for path, leaf in leaves.items():
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise UserError(f"{name}: {path} is of type {leaf.dtype}; only floating point numbers can be merged")
    return flats


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else f"of shape {shape}"


def check_weights(weights: Sequence[float], count: int) -> None:
    """Raises UserError where these are no weights of so many models."""
    if len(weights) != count:
        raise UserError(f"weights are {_listed(weights)}: one for each of the {number_of(count, 'model')} is needed")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not math.fsum(weights):
        raise UserError(f"weights are {_listed(weights)}; they must be finite, not negative, and not all 0")


def check_scales(scales: Sequence[float], count: int) -> None:
    """Raises UserError where these are no scales of so many task vectors."""
    if len(scales) != count:
        raise UserError(
            f"scale is {_listed(scales)}: give one number, or one for each of the {number_of(count, 'task vector')}"
        )
    if not all(math.isfinite(scale) for scale in scales):
        raise UserError(f"scale is {_listed(scales)}; it must be finite")


def check_share(what: str, value: float) -> None:
    """Raises UserError where alpha is outside 0..1."""
    if not 0 <= value <= 1:
        raise UserError(f"{what} is {value:g}; it must be from 0 to 1 (further than that goes task arithmetic, with a scale)")


def check_keep(keep: float) -> None:
    """Raises UserError where this is no share of a vector that stays."""
    if not 0 < keep <= 1:
        raise UserError(f"keep is {keep:g}; it is the share that stays, above 0 and 1 at most")


def check_drop(drop: float) -> None:
    """Raises UserError where this is no share of a vector that is dropped."""
    if not 0 <= drop < 1:
        raise UserError(f"drop is {drop:g}; it is the share that is dropped, at least 0 and below 1")


def _listed(numbers: Sequence[float]) -> str:
    return " ".join(f"{number:g}" for number in numbers)
