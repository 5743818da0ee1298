"""Several adapters on one base: together, switched, weighted, and merged into one.

Functions of checkpoints with adapters, as add_adapters() and load_peft() make them; each returns another checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.core import trees
from mtl_jax.core.errors import UserError, listed, unknown
from mtl_jax.pretrained.checkpoint import Checkpoint
from mtl_jax.transfer import merge_methods
from mtl_jax.transfer.adapters.adapted import ADAPTERS
from mtl_jax.transfer.adapters.adapted_checkpoint import (
    HEAD,
    TRUNK,
    adapters_of,
    add_adapters,
    params_of,
    with_params,
    without_adapters,
)
from mtl_jax.transfer.adapters.base import Adapter
from mtl_jax.transfer.adapters.lora import Lora
from mtl_jax.transfer.adapters.low_rank import Dora

Parts = dict[str, list[tuple[Adapter, dict[str, dict[str, Any]]]]]  # {part: [(adapter, {layer: parameters})]}


def combine(checkpoints: Mapping[str, Checkpoint]) -> Checkpoint:
    """A base with the adapters of several checkpoints, all of which act at once.

    At a layer, adapters act in the order of their kinds, as in Adapted; the changes of several LoRAs add up.

    Args:
        checkpoints: {name: a checkpoint with adapters}, of one base. Each adapter is then NAME_ADAPTER. The rest,
            such as the head, is that of the first.

    Raises:
        UserError: The bases differ, one has no adapters, or two adapters cannot be together.

    Examples:
        >>> both = combine({"movies": load_peft("PATH-1", base), "tweets": load_peft("PATH-2", base)})
        >>> only(both, ["movies_default"])  # switched
        >>> weighted(both, {"movies_default": 0.7, "tweets_default": 0.3})
        >>> merged(both, {"movies_default": 0.7, "tweets_default": 0.3}, name="mix")
    """
    if not checkpoints:
        raise UserError("no checkpoints were given to combine")
    first = next(iter(checkpoints.values()))
    base = trees.flat(without_adapters(first).params[TRUNK])
    parts: Parts = {TRUNK: [], HEAD: []}
    for name, checkpoint in checkpoints.items():
        present = _parts(checkpoint)
        if not any(present.values()):
            raise UserError(f"{name}: the checkpoint has no adapters")
        trunk = trees.flat(without_adapters(checkpoint).params[TRUNK])
        if trunk.keys() != base.keys() or not all(jnp.array_equal(leaf, base[path]) for path, leaf in trunk.items()):
            raise UserError(f"{name}: its base is not that of {next(iter(checkpoints))}; adapters belong to one base")
        for part, adapters in present.items():
            parts[part] += [
                (dataclasses.replace(adapter, name=f"{name}_{adapter.name}"), leaves) for adapter, leaves in adapters
            ]
    return _with(first, parts)


def only(checkpoint: Checkpoint, names: Collection[str]) -> Checkpoint:
    """The checkpoint with some of its adapters: the others are switched off.

    Args:
        checkpoint: A checkpoint with adapters.
        names: The adapters to keep; none: the base.

    Raises:
        UserError: There is no adapter of a name.
    """
    _check(checkpoint, names)
    parts = {part: [pair for pair in pairs if pair[0].name in names] for part, pairs in _parts(checkpoint).items()}
    return _with(checkpoint, parts)


def weighted(checkpoint: Checkpoint, weights: Mapping[str, float]) -> Checkpoint:
    """The checkpoint whose adapters' changes are multiplied by weights; an adapter without a weight keeps 1.

    Args:
        checkpoint: A checkpoint with adapters.
        weights: {adapter: weight}.

    Raises:
        UserError: There is no adapter of a name, or its kind has no weight (Dora, Prefix, PromptTuning).
    """
    _check(checkpoint, weights)

    def scaled(adapter: Adapter, leaves: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        if adapter.name not in weights:
            return leaves
        return {layer: adapter.weighted(params, weights[adapter.name]) for layer, params in leaves.items()}

    parts = {
        part: [(adapter, scaled(adapter, leaves)) for adapter, leaves in pairs] for part, pairs in _parts(checkpoint).items()
    }
    return _with(checkpoint, parts)


def merged(checkpoint: Checkpoint, weights: Mapping[str, float], name: str, method: str = "concatenate") -> Checkpoint:
    """The checkpoint with several of its adapters merged into one by weights.

    Args:
        checkpoint: A checkpoint with adapters.
        weights: {adapter: weight}, of adapters of one kind.
        name: The name of the result.
        method: concatenate: low-rank matrices side by side, whose change is exactly the weighted sum, of the sum of the ranks;
            for Lora and its relatives but Dora. average: the weighted mean of the parameters themselves
            (merge_methods.average), for adapters of any one kind with the same fields.

    Raises:
        UserError: A name or the method is unknown, or the adapters cannot be merged in this way.
    """
    _check(checkpoint, weights)
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    parts = _parts(checkpoint)
    for part, pairs in parts.items():
        chosen = [pair for pair in pairs if pair[0].name in weights]
        rest = [pair for pair in pairs if pair[0].name not in weights]
        parts[part] = rest + (METHODS[method](chosen, weights, name) if chosen else [])
    return _with(checkpoint, parts)


Pairs = list[tuple[Adapter, dict[str, dict[str, Any]]]]


def _concatenated(pairs: Pairs, weights: Mapping[str, float], name: str) -> Pairs:
    """One Lora for each rank that results, of factor 1."""
    by_layer: dict[str, list[tuple[jax.Array, jax.Array]]] = {}
    for adapter, leaves in pairs:
        if not isinstance(adapter, Lora) or isinstance(adapter, Dora):
            raise UserError(
                f"adapter {adapter.name!r}: a {type(adapter).__name__} cannot be concatenated; only LoRA without DoRA can"
            )
        for layer, params in leaves.items():
            factor = weights[adapter.name] * adapter.scale
            by_layer.setdefault(layer, []).append((params["a"], factor * params["b"]))
            if "fixed_a" in params:
                by_layer[layer].append((params["fixed_a"], -factor * params["fixed_b"]))
    by_rank: dict[int, dict[str, dict[str, Any]]] = {}
    for layer, products in by_layer.items():
        a, b = jnp.concatenate([a for a, _ in products], 1), jnp.concatenate([b for _, b in products], 0)
        by_rank.setdefault(len(b), {})[layer] = {"a": a, "b": b}
    return [
        (
            Lora(name=name if not number else f"{name}_{number + 1}", rank=rank, alpha=float(rank), target=_either(leaves)),
            leaves,
        )
        for number, (rank, leaves) in enumerate(by_rank.items())
    ]


def _averaged(pairs: Pairs, weights: Mapping[str, float], name: str) -> Pairs:
    first = dataclasses.replace(pairs[0][0], name=name)
    for adapter, _ in pairs:
        if dataclasses.replace(adapter, name=name) != first:
            raise UserError(
                f"adapters {pairs[0][0].name!r} and {adapter.name!r} have different kinds or fields; they cannot be averaged"
            )
    mean: Any = merge_methods.average([leaves for _, leaves in pairs], [weights[adapter.name] for adapter, _ in pairs])
    return [(first, mean)]


METHODS: dict[str, Callable[[Pairs, Mapping[str, float], str], Pairs]] = {
    "concatenate": _concatenated,
    "average": _averaged,
}


def _either(layers: Collection[str]) -> str:
    return "|".join(layers)


def _parts(checkpoint: Checkpoint) -> Parts:
    parts: Parts = {TRUNK: [], HEAD: []}
    for part, adapters in adapters_of(checkpoint).items():
        parts[part] = [(adapter, params_of(checkpoint, part, adapter)) for adapter in adapters]
    return parts


def _with(checkpoint: Checkpoint, parts: Parts) -> Checkpoint:
    base = without_adapters(checkpoint)
    inside = {part: [adapter for adapter, _ in pairs] for part, pairs in parts.items()}
    adapted = add_adapters(base, inside[TRUNK], inside[HEAD])
    values = {
        f"{part}/{ADAPTERS}/{adapter.name}/{layer}/{leaf}": array
        for part, pairs in parts.items()
        for adapter, leaves in pairs
        for layer, params in leaves.items()
        for leaf, array in params.items()
    }
    return with_params(adapted, values)


def _check(checkpoint: Checkpoint, names: Collection[str]) -> None:
    present = [adapter.name for adapters in adapters_of(checkpoint).values() for adapter in adapters]
    for name in names:
        if name not in present:
            raise unknown("adapter", name, present) if present else UserError(f"no adapter {listed([name])}: there are none")
