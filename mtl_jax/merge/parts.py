"""Models as parts, trunk and heads, and what becomes of each part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mtl_jax.errors import UserError
from mtl_jax.merge.method import Method
from mtl_jax.transfer import merging
from mtl_jax.transfer.mergeable import check_alike, flat

TRUNK = "trunk"
Parts = Mapping[str, Any]


class Model(NamedTuple):
    """One of those that are merged.

    Attributes:
        name: How it was called on the command line.
        parts: {"trunk": parameters, "heads/TASK" or "head" or "pooler": parameters}, on the host.
        facts: What merge.json says of it.
    """

    name: str
    parts: Parts
    facts: dict[str, Any]


class Merged(NamedTuple):
    """What came of it.

    Attributes:
        parts: As in Model: all that any source has.
        how: {part: how it was made}.
        facts: More for merge.json.
    """

    parts: Parts
    how: dict[str, str]
    facts: dict[str, Any]


def joint_parts(base: Model | None, models: Sequence[Model]) -> list[str]:
    """The parts that are in the base and in all models: what a method is applied to."""
    everywhere = [*models, *([base] if base else [])]
    return [part for part in models[0].parts if all(part in model.parts for model in everywhere)]


def check(base: Model | None, models: Sequence[Model]) -> None:
    """Finds out, before any work, whether the models can be merged.

    Raises:
        UserError: They differ in structure or shape: names the parameter and both shapes. Or a number in one is not finite.
    """
    everywhere = [*([base] if base else []), *models]
    for part in dict.fromkeys(part for model in models for part in model.parts):
        owners = [model for model in everywhere if part in model.parts]
        check_alike([{part: model.parts[part]} for model in owners], [model.name for model in owners])
    for model in everywhere:
        for path, leaf in flat(model.parts).items():
            if not np.isfinite(leaf.astype(np.float32)).all():
                raise UserError(f"{model.name}: {path} has numbers that are not finite; it cannot be merged")


def put_together(
    method: Method, base: Model | None, models: Sequence[Model], measure: Callable[[Parts], float] | None = None
) -> Merged:
    """The models merged.

    The method is applied to the parts that the base and all models have, as to one vector. Of the others, those of one model
    stay as they are, and of those of several the mean is taken: a base without heads says nothing about them.

    Args:
        method: How, checked.
        base: What they started from, for methods that have one.
        models: The models, checked.
        measure: For greedy: parts -> dev criterion.
    """
    joint = joint_parts(base, models)
    trees = [{part: model.parts[part] for part in joint} for model in models]
    start = None if base is None else {part: base.parts[part] for part in joint}
    found, facts = _apply(method, start, trees, models, measure)
    parts, how = dict(found), dict.fromkeys(joint, method.name)
    weights = method.weights or [1.0] * len(models)
    for part in dict.fromkeys(part for model in models for part in model.parts if part not in joint):
        owners = [(model, weight) for model, weight in zip(models, weights, strict=True) if part in model.parts]
        if len(owners) == 1:
            parts[part], how[part] = owners[0][0].parts[part], f"as in {owners[0][0].name}"
        else:
            parts[part] = merging.average([model.parts[part] for model, _ in owners], [weight for _, weight in owners])
            how[part] = f"mean of {', '.join(model.name for model, _ in owners)}"
    for path, leaf in flat(parts).items():
        if not np.isfinite(leaf.astype(np.float32)).all():
            raise UserError(f"{path} is not finite after merging; use a smaller scale")
    return Merged(parts, how, facts)


def _apply(
    method: Method, start: Any, trees: list[Any], models: Sequence[Model], measure: Callable[[Parts], float] | None
) -> tuple[Any, dict[str, Any]]:
    scale: Any = method.scale if method.scale is None or len(method.scale) > 1 else method.scale[0]
    if method.name == "greedy":
        assert measure is not None
        soup = merging.greedy_soup(trees, measure)
        tried = [{"source": models[n].name, "dev": dev, "taken": taken} for n, dev, taken in soup.tried]
        return soup.params, {"tried": tried, "dev": soup.score}
    if method.name == "wise":
        return merging.interpolate(start, trees[0], method.alpha or 0.0), {}
    if method.name == "arithmetic":
        return merging.arithmetic(start, trees, scale), {}
    if method.name == "ties":
        return merging.ties(start, trees, method.keep or 0.0, scale), {}
    if method.name in ("dare", "dare_ties"):
        return merging.dare(start, trees, method.drop or 0.0, jax.random.key(method.seed or 0), scale, method.keep), {}
    return merging.average(trees, method.weights or ()), {}
