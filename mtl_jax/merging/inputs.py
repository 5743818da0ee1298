"""Models as parts (trunk and heads), checked for compatibility and merged part by part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mtl_jax import trunk_compatibility
from mtl_jax.core.errors import UserError
from mtl_jax.merging.method import Method
from mtl_jax.training import workdir as workdirs
from mtl_jax.transfer import merge_methods
from mtl_jax.transfer.merge_methods import check_alike, flat
from mtl_jax.trunk_compatibility import TrunkSignature

TRUNK = "trunk"
Parts = Mapping[str, Any]
Measure = Callable[[Parts], float]


class Model(NamedTuple):
    """One of the models to merge, or the base.

    Attributes:
        name: Its name on the command line.
        parts: {"trunk": parameters, "heads/TASK" or "head" or "pooler": parameters}, on the host.
        signature: The properties in which the trunks must agree.
        facts: Its entry in merge.json.
    """

    name: str
    parts: Parts
    signature: TrunkSignature
    facts: dict[str, Any]


class Merged(NamedTuple):
    """The result of a merge.

    Attributes:
        parts: All parts that any of the models has, as in Model.
        record: The contents of merge.json.
    """

    parts: Parts
    record: dict[str, Any]


def check(base: Model | None, models: Sequence[Model]) -> None:
    """Checks, before any work, that models can be merged.

    Raises:
        UserError: Their trunks are of different families or differ in more than parameters; or parameters differ in
            structure or shape (names a parameter and both shapes), or are not finite.
    """
    all_models = [*([base] if base else []), *models]
    names, signatures = [model.name for model in all_models], [model.signature for model in all_models]
    trunk_compatibility.check_family(names, signatures)
    for part in dict.fromkeys(part for model in models for part in model.parts):
        owners = [model for model in all_models if part in model.parts]
        check_alike([{part: model.parts[part]} for model in owners], [model.name for model in owners])
    trunk_compatibility.check_constants(names, signatures)
    trunk_compatibility.check_vocabulary(names, signatures)
    for model in all_models:
        _check_finite(model.parts, f"{model.name}: ", "it cannot be merged")


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes merge.json as the last file: it lists the files of the directory, which a later merge may replace."""
    names = sorted([workdirs.MERGED, *(path.name for path in folder.iterdir())])
    workdirs.write_json(folder / workdirs.MERGED, {**record, "written": names})


def merge_models(method: Method, base: Model | None, models: Sequence[Model], measure: Measure | None = None) -> Merged:
    """Merges models.

    The method is applied to the parts that the base and all models have, as to one vector. A part that only one model has stays
    as it is. Of a part that several models have, the mean is taken, because the base has no such part.

    Args:
        method: The checked method.
        base: The model that they started from, for methods with a base.
        models: The checked models.
        measure: Parts -> dev criterion, for greedy.

    Raises:
        UserError: A merged number is not finite, or no source has a dev criterion for greedy.
    """
    all_models = [*([base] if base else []), *models]
    joint = [part for part in models[0].parts if all(part in model.parts for model in all_models)]
    merged, facts = _apply(method, joint, base, models, measure)
    parts, origins = dict(merged), dict.fromkeys(joint, method.name)
    weights = method.weights or (1.0,) * len(models)
    for part in dict.fromkeys(part for model in models for part in model.parts if part not in joint):
        owners = [(model, weight) for model, weight in zip(models, weights, strict=True) if part in model.parts]
        if len(owners) == 1:
            parts[part], origins[part] = owners[0][0].parts[part], f"as in {owners[0][0].name}"
        else:
            parts[part] = merge_methods.average([model.parts[part] for model, _ in owners], [weight for _, weight in owners])
            origins[part] = f"mean of {', '.join(model.name for model, _ in owners)}"
    _check_finite(parts, "merged: ", "a smaller scale may help")
    record = {"method": method.describe(), "sources": [model.facts for model in models]}
    record |= {} if base is None else {"base": base.facts}
    return Merged(parts, {**record, "parts": origins, **facts})


def _apply(
    method: Method, joint: Sequence[str], base: Model | None, models: Sequence[Model], measure: Measure | None
) -> tuple[Any, dict[str, Any]]:
    """Merges the parts that all models have; returns them, and further facts for merge.json."""
    trees: list[Any] = [{part: model.parts[part] for part in joint} for model in models]
    start: Any = None if base is None else {part: base.parts[part] for part in joint}
    if method.name in ("soup", "average"):
        return merge_methods.average(trees, method.weights or ()), {}
    if method.name == "greedy":
        assert measure is not None
        soup = merge_methods.greedy_soup(trees, measure)
        if not np.isfinite(soup.score):
            raise UserError("method greedy: the dev criterion of no source is a number")
        tried = [{"source": models[n].name, "dev": _finite(dev), "taken": taken} for n, dev, taken in soup.tried]
        return soup.params, {"tried": tried}
    if method.name == "wise":
        assert method.alpha is not None
        return merge_methods.interpolate(start, trees[0], method.alpha), {}
    assert method.scale is not None
    if method.name == "arithmetic":
        return merge_methods.arithmetic(start, trees, _single_or_all(method.scale)), {}
    if method.name == "ties":
        assert method.keep is not None
        return merge_methods.ties(start, trees, method.keep, method.scale[0]), {}
    assert method.drop is not None
    assert method.seed is not None
    key = jax.random.key(method.seed)
    return merge_methods.dare(start, trees, method.drop, key, _single_or_all(method.scale), method.keep), {}


def _single_or_all(scale: tuple[float, ...]) -> float | tuple[float, ...]:
    return scale[0] if len(scale) == 1 else scale


def _finite(score: float) -> float | None:
    """The score, or None for infinity and NaN, which JSON does not have."""
    return score if np.isfinite(score) else None


def _check_finite(parts: Parts, owner: str, advice: str) -> None:
    for path, leaf in flat(parts).items():
        if not np.isfinite(leaf.astype(np.float32)).all():
            raise UserError(f"{owner}{path} has numbers that are not finite; {advice}")
