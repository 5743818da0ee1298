"""Which parameters train, and how fast: rules with regular expressions on parameter paths.

A frozen leaf is not differentiated, so it costs no backward pass and has no optimizer state; no update is added to it, so it
stays bit-identical. (optax.masked would pass raw gradients through frozen leaves, and zeroed gradients would still decay them.)
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

# Parameters of adapters that are as the adapter began, such as the singular vectors of a kernel: no rule lets them train.
FIXED = re.compile(r"(.*/)?adapters/.*/fixed_[^/]*")


@dataclasses.dataclass(frozen=True)
class ParamRule(Configuration):
    """Parameters whose path matches, whether they train, and how.

    Attributes:
        pattern: A regular expression that must match the whole path, such as "trunk/layer_0/attention/query/kernel".
        train: Whether these parameters train; False freezes them.
        rate: Factor on the learning rate; with adamw it also scales the decay.
        weight_decay: Weight decay in place of the optimizer's; None: the optimizer's. Parameters of one dimension have none.
        schedule: Name of a schedule in place of the optimizer's; empty: the optimizer's.

    Examples:
        >>> mtl_jax.ParamRule("trunk/layer_[0-3]/.*", train=False).train
        False
    """

    pattern: str
    train: bool = True
    rate: float = 1.0
    weight_decay: float | None = None
    schedule: str = ""


def check(rules: Sequence[ParamRule]) -> None:
    """Checks rules without parameters.

    Raises:
        UserError: A pattern is not a regular expression, or a number is out of range.
    """
    for rule in rules:
        where = f"the rule {rule.pattern!r}"
        try:
            re.compile(rule.pattern)
        except NOT_A_PATTERN as error:
            raise UserError(f"a parameter rule is not a regular expression: {shown(rule.pattern)!r} ({error})") from error
        if not 0 < rule.rate < math.inf:
            hint = "; to freeze parameters, set train=False" if rule.rate == 0 else ""
            raise UserError(f"{where}: rate is {rule.rate}; it must be above 0{hint}")
        if rule.weight_decay is not None and not 0 <= rule.weight_decay < math.inf:
            raise UserError(f"{where}: weight_decay is {rule.weight_decay}; it must not be negative")
        if not rule.train and (rule.rate != 1.0 or rule.weight_decay is not None or rule.schedule):
            raise UserError(f"{where}: it freezes parameters (train=False): leave out rate, weight_decay and schedule")


def decide(params: Any, rules: Sequence[ParamRule]) -> Any:
    """The rule that decides on each parameter: the first one that matches; parameters of FIXED never train.

    Args:
        params: A tree of arrays or of shapes.
        rules: Must cover every parameter, and each must match at least one.

    Returns:
        A tree of rules with the structure of params.

    Raises:
        UserError: A rule is refused by check() or matches no parameter, or a parameter is not covered.
    """
    check(rules)
    patterns = [re.compile(rule.pattern) for rule in rules]
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    names = [path_name(path) for path, _ in paths_and_leaves]
    for pattern in patterns:
        if not any(pattern.fullmatch(name) for name in names):
            layers = _layers(names) if "layer_" in pattern.pattern else ""
            layers = f"{layers}; depths that share a layer count once" if layers else ""
            hint = layers or f"paths look like {names[0]} and {names[-1]}"
            raise UserError(f"the rule {pattern.pattern!r} matches no parameter; {hint}")
    decided = []
    for name in names:
        first = next((rule for rule, pattern in zip(rules, patterns, strict=True) if pattern.fullmatch(name)), None)
        if first is None:
            layers = f" ({_layers(names)})" if _layers([name]) else ""
            raise UserError(f"no rule covers the parameter {name}{layers}; add one, for example '.*' at the end")
        decided.append(ParamRule(FIXED.pattern, train=False) if FIXED.fullmatch(name) else first)
    return jax.tree.unflatten(treedef, decided)


def training_since(masks: Sequence[Any]) -> Any:
    """For each parameter that trains in the last phase, the phase since which it trains without a break; else None.

    Args:
        masks: For each phase so far, a tree of bools: which parameters train.

    Returns:
        A tree of numbers of phases, from 0. Adam's counts are equal for parameters with equal numbers.
    """

    def since(*trains: bool) -> int | None:
        breaks = [number for number, trained in enumerate(trains) if not trained]
        return max(breaks, default=-1) + 1 if trains[-1] else None

    return jax.tree.map(since, *masks)


def trainable(params: Any, rules: Sequence[ParamRule]) -> Any:
    """The optax mask of the rules: True for a parameter that trains.

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
    """The numbered layers among parameters: "there are trunk/layer_0 to trunk/layer_5"; "" without any."""
    layers: dict[str, set[int]] = {}
    for name in names:
        match = re.match(r"(.*?layer_)(\d+)/", name)
        if match:
            layers.setdefault(match[1], set()).add(int(match[2]))
    spans = [f"{prefix}{min(numbers)} to {prefix}{max(numbers)}" for prefix, numbers in layers.items()]
    return f"there are {listed(spans)}" if spans else ""
