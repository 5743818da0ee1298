"""Which parameters train, and how fast: regex rules on parameter paths, and the split of a tree by them.

A frozen leaf is not part of what is differentiated, so it costs no backward pass and has no optimizer state; nothing is
added to it, so it stays bit-identical. (optax.masked would pass raw gradients through frozen leaves, and zeroed gradients
would still decay them.)
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax

from mtl_jax.core.configuration import Configuration
from mtl_jax.core.errors import NOT_A_PATTERN, UserError, listed
from mtl_jax.core.files import shown
from mtl_jax.core.trees import path_name


@dataclasses.dataclass(frozen=True)
class ParamRule(Configuration):
    """Parameters whose path matches, whether they train, and how.

    Attributes:
        pattern: A regular expression that must match the whole path, such as "trunk/layer_0/attention/query/kernel".
        train: Whether these parameters train; False keeps them as they are.
        rate: Factor on the learning rate; with adamw it slows the decay down as well.
        weight_decay: In place of the optimizer's; None: the optimizer's. Neither is for parameters of one dimension.
        schedule: In place of the optimizer's, by its name; empty: the optimizer's.
    """

    pattern: str
    train: bool = True
    rate: float = 1.0
    weight_decay: float | None = None
    schedule: str = ""


def check(rules: Sequence[ParamRule]) -> None:
    """Finds what is wrong with rules without parameters.

    Raises:
        UserError: A pattern is no regular expression, or a number makes no sense.
    """
    for rule in rules:
        at = f"the rule {rule.pattern!r}"
        try:
            re.compile(rule.pattern)
        except NOT_A_PATTERN as error:
            raise UserError(f"a parameter rule is no regular expression: {shown(rule.pattern)!r} ({error})") from error
        if not 0 < rule.rate < math.inf:
            hint = "; to keep parameters as they are, say train=False" if rule.rate == 0 else ""
            raise UserError(f"{at}: rate is {rule.rate}; it must be above 0{hint}")
        if rule.weight_decay is not None and not 0 <= rule.weight_decay < math.inf:
            raise UserError(f"{at}: weight_decay is {rule.weight_decay}; it must not be negative")
        if not rule.train and (rule.rate != 1.0 or rule.weight_decay is not None or rule.schedule):
            raise UserError(f"{at}: it keeps parameters as they are (train=False): leave out rate, weight_decay and schedule")


def decide(params: Any, rules: Sequence[ParamRule]) -> Any:
    """The rule that decides on each parameter: the first that matches.

    Args:
        params: A tree of arrays or of shapes.
        rules: Must cover every parameter, and each must match at least one.

    Returns:
        A tree of rules with the structure of params.

    Raises:
        UserError: A rule makes no sense or matches nothing, or a parameter is not covered.
    """
    check(rules)
    patterns = [re.compile(rule.pattern) for rule in rules]
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    names = [path_name(path) for path, _ in paths_and_leaves]
    for pattern in patterns:
        if not any(pattern.fullmatch(name) for name in names):
            layers = _layers(names) if "layer_" in pattern.pattern else ""
            there = layers or f"paths look like {names[0]} and {names[-1]}"
            raise UserError(f"the rule {pattern.pattern!r} matches no parameter; {there}")
    decided = []
    for name in names:
        first = next((rule for rule, pattern in zip(rules, patterns, strict=True) if pattern.fullmatch(name)), None)
        if first is None:
            layers = f" ({_layers(names)})" if _layers([name]) else ""
            raise UserError(f"no rule covers the parameter {name}{layers}; add one, for example '.*' at the end")
        decided.append(first)
    return jax.tree.unflatten(treedef, decided)


def trainable(params: Any, rules: Sequence[ParamRule]) -> Any:
    """The optax mask that the rules describe: True where a parameter trains.

    Args:
        params: A tree of arrays or of shapes.
        rules: As for decide.

    Returns:
        A tree of bools with the structure of params.

    Raises:
        UserError: As for decide.
    """
    return jax.tree.map(lambda rule: rule.train, decide(params, rules))


def _layers(names: Sequence[str]) -> str:
    """Which numbered layers there are: "there are trunk/layer_0 to trunk/layer_5"."""
    found: dict[str, set[int]] = {}
    for name in names:
        match = re.match(r"(.*?layer_)(\d+)/", name)
        if match:
            found.setdefault(match[1], set()).add(int(match[2]))
    spans = [f"{at}{min(numbers)} to {at}{max(numbers)}" for at, numbers in found.items()]
    return f"there are {listed(spans)}" if spans else ""
