"""Models as parts, trunk and heads, and what becomes of each part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mtl_jax import trunk_compatibility as kinship
from mtl_jax.core.errors import UserError
from mtl_jax.merge.method import Method
from mtl_jax.training import workdir as workdirs
from mtl_jax.transfer import merging
from mtl_jax.transfer.merging import check_alike, flat
from mtl_jax.trunk_compatibility import Kin

TRUNK = "trunk"
Parts = Mapping[str, Any]
Measure = Callable[[Parts], float]


class Model(NamedTuple):
    """One of those that are merged, or the base.

    Attributes:
        name: How it was called on the command line.
        parts: {"trunk": parameters, "heads/TASK" or "head" or "pooler": parameters}, on the host.
        kin: What its trunk must have in common with the others'.
        facts: What merge.json says of it.
    """

    name: str
    parts: Parts
    kin: Kin
    facts: dict[str, Any]


class Merged(NamedTuple):
    """What came of it.

    Attributes:
        parts: As in Model: all that any of the models has.
        record: For merge.json.
    """

    parts: Parts
    record: dict[str, Any]


def check(base: Model | None, models: Sequence[Model]) -> None:
    """Finds out, before any work, whether the models can be merged.

    Raises:
        UserError: Their trunks are of different families, or not the same but for their parameters; parameters differ in
            structure or shape (names one and both shapes), or are not finite.
    """
    everywhere = [*([base] if base else []), *models]
    names, kin = [model.name for model in everywhere], [model.kin for model in everywhere]
    kinship.check_family(names, kin)
    for part in dict.fromkeys(part for model in models for part in model.parts):
        owners = [model for model in everywhere if part in model.parts]
        check_alike([{part: model.parts[part]} for model in owners], [model.name for model in owners])
    kinship.check_constants(names, kin)
    kinship.check_vocabulary(names, kin)
    for model in everywhere:
        _check_finite(model.parts, f"{model.name}: ", "it cannot be merged")


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes merge.json, last of all: it also names what is in the directory, and so what may be replaced."""
    names = sorted([workdirs.MERGED, *(path.name for path in folder.iterdir())])
    workdirs.write_json(folder / workdirs.MERGED, {**record, "written": names})


def put_together(method: Method, base: Model | None, models: Sequence[Model], measure: Measure | None = None) -> Merged:
    """The models merged.

    The method is applied to the parts that the base and all models have, as to one vector. Of the others, those of one model
    stay as they are, and of those of several the mean is taken: a base without heads says nothing about them.

    Args:
        method: How, checked.
        base: What they started from, for methods that have one.
        models: The models, checked.
        measure: For greedy: parts -> dev criterion.

    Raises:
        UserError: A number became infinite, or greedy finds nothing to go by.
    """
    everywhere = [*([base] if base else []), *models]
    joint = [part for part in models[0].parts if all(part in model.parts for model in everywhere)]
    found, facts = _apply(method, joint, base, models, measure)
    parts, how = dict(found), dict.fromkeys(joint, method.name)
    weights = method.weights or (1.0,) * len(models)
    for part in dict.fromkeys(part for model in models for part in model.parts if part not in joint):
        owners = [(model, weight) for model, weight in zip(models, weights, strict=True) if part in model.parts]
        if len(owners) == 1:
            parts[part], how[part] = owners[0][0].parts[part], f"as in {owners[0][0].name}"
        else:
            parts[part] = merging.average([model.parts[part] for model, _ in owners], [weight for _, weight in owners])
            how[part] = f"mean of {', '.join(model.name for model, _ in owners)}"
    _check_finite(parts, "merged: ", "a smaller scale may help")
    record = {"method": method.describe(), "sources": [model.facts for model in models]}
    record |= {} if base is None else {"base": base.facts}
    return Merged(parts, {**record, "parts": how, **facts})


def _apply(
    method: Method, joint: Sequence[str], base: Model | None, models: Sequence[Model], measure: Measure | None
) -> tuple[Any, dict[str, Any]]:
    """The joint parts merged, and more facts for merge.json."""
    trees: list[Any] = [{part: model.parts[part] for part in joint} for model in models]
    start: Any = None if base is None else {part: base.parts[part] for part in joint}
    if method.name in ("soup", "average"):
        return merging.average(trees, method.weights or ()), {}
    if method.name == "greedy":
        assert measure is not None
        soup = merging.greedy_soup(trees, measure)
        if not np.isfinite(soup.score):
            raise UserError("method greedy: the dev criterion of no source is a number")
        tried = [{"source": models[n].name, "dev": _finite(dev), "taken": taken} for n, dev, taken in soup.tried]
        return soup.params, {"tried": tried}
    if method.name == "wise":
        assert method.alpha is not None
        return merging.interpolate(start, trees[0], method.alpha), {}
    assert method.scale is not None
    if method.name == "arithmetic":
        return merging.arithmetic(start, trees, _one_or_each(method.scale)), {}
    if method.name == "ties":
        assert method.keep is not None
        return merging.ties(start, trees, method.keep, method.scale[0]), {}
    assert method.drop is not None
    assert method.seed is not None
    key = jax.random.key(method.seed)
    return merging.dare(start, trees, method.drop, key, _one_or_each(method.scale), method.keep), {}


def _one_or_each(scale: tuple[float, ...]) -> float | tuple[float, ...]:
    return scale[0] if len(scale) == 1 else scale


def _finite(score: float) -> float | None:
    """JSON has no infinity."""
    return score if np.isfinite(score) else None


def _check_finite(parts: Parts, whose: str, advice: str) -> None:
    for path, leaf in flat(parts).items():
        if not np.isfinite(leaf.astype(np.float32)).all():
            raise UserError(f"{whose}{path} has numbers that are not finite; {advice}")
