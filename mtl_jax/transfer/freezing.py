"""Which parameters train: regex rules on parameter paths, and the split of a tree by them.

A frozen leaf is not part of what is differentiated, so it costs no backward pass and has no optimizer state; nothing is
added to it, so it stays bit-identical. (optax.masked would pass raw gradients through frozen leaves, and zeroed gradients
would still decay them.)
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax

from mtl_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ParamRule:
    """Parameters whose path matches, and whether they train.

    Attributes:
        pattern: A regular expression that must match the whole path, such as "trunk/layer_0/attention/query/kernel".
        train: Whether these parameters train; False keeps them as they are.
    """

    pattern: str
    train: bool = True


def path_name(path: tuple[Any, ...]) -> str:
    """A jax key path as names with slashes: trunk/layer_0/attention/query/kernel."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def trainable(params: Any, rules: Sequence[ParamRule]) -> Any:
    """The optax mask that the rules describe: True where a parameter trains. The first rule that matches decides.

    Args:
        params: A tree of arrays or of shapes.
        rules: Must cover every parameter, and each must match at least one.

    Returns:
        A tree of bools with the structure of params.

    Raises:
        UserError: A pattern is no regular expression, a rule matches nothing, or a parameter is not covered.
    """
    try:
        patterns = [re.compile(rule.pattern) for rule in rules]
    except re.error as error:
        raise UserError(f"a parameter rule is no regular expression: {error.pattern!r} ({error})") from error
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    names = [path_name(path) for path, _ in paths_and_leaves]
    for pattern in patterns:
        if not any(pattern.fullmatch(name) for name in names):
            raise UserError(f"the rule {pattern.pattern!r} matches no parameter; paths look like {names[0]} and {names[-1]}")
    mask = []
    for name in names:
        decided = [rule.train for rule, pattern in zip(rules, patterns, strict=True) if pattern.fullmatch(name)]
        if not decided:
            raise UserError(f"no rule covers the parameter {name}; add one, for example '.*' at the end")
        mask.append(decided[0])
    return jax.tree.unflatten(treedef, mask)


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


def _is_none(leaf: Any) -> bool:
    return leaf is None
