"""The parameters of adapters and sharings for one task, and a trunk into which they are merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from mtl_jax.core import trees
from mtl_jax.core.errors import UserError
from mtl_jax.transfer.adapters.adapted import ADAPTERS, Adapted
from mtl_jax.transfer.adapters.base import OWN, RUN, SOURCE, TASK, Inserted, Layer
from mtl_jax.transfer.adapters.stacks import SHARED, UNREAD, OwnParts, below, has_own, of_number, subtree


def merge_adapters(
    adapted: Adapted, params: Mapping[str, Any], source: int | None = None, task: str | None = None
) -> dict[str, Any]:
    """The parameters of the module with its adapters merged into them, such as W + (alpha / rank) A B; without dropout.

    Args:
        adapted: The module with adapters, all of which have merged(): Lora and its relatives, IA3.
        params: Its parameters, with {"adapters": ...}.
        source: The source whose adapters are merged, if sources have their own.
        task: The task whose parameters are merged, if tasks have their own.

    Raises:
        UserError: An adapter cannot be merged, or source or task is missing.
    """
    base = trees.flat({name: tree for name, tree in params.items() if name != ADAPTERS})
    for adapter in sorted(adapted.adapters, key=lambda adapter: adapter.order):
        for layer in adapted.where[adapter.name]:
            owner = owner_of(adapted, adapter, layer)
            if (owner == SOURCE and source is None) or (owner == TASK and task is None):
                raise UserError(f"adapter {adapter.name!r}: each {owner} has its own; say of which task it is to be merged")
            layer_params = params_at(adapted, adapter, params[ADAPTERS], layer, source, task)
            whole = trees.nested(below(base, f"{layer.path}/"))
            merged = trees.flat(adapter.merged(layer_params, whole, layer))
            base |= {f"{layer.path}/{name}": leaf for name, leaf in merged.items()}
    return trees.nested(base)


def owner_of(adapted: Adapted, adapter: Inserted, layer: Layer) -> str:
    """What has parameters of its own at a layer: RUN for nothing, SOURCE, or TASK."""
    tasks = 0 if adapted.routes is None else len(adapted.routes.tasks)
    if adapted.by_task(adapter) or (tasks and has_own(adapter, layer, tasks)):
        return TASK
    return RUN if adapter.per == RUN else SOURCE


def own_parts(module: Any, tasks: Sequence[Sequence[str]]) -> OwnParts:
    """Which parameters of a trunk belong to single tasks.

    An adapter of a source is its only task's own; where a source has several tasks, they share it.

    Args:
        module: The trunk, with or without adapters.
        tasks: The tasks of each source, in the order of the sources' numbers.
    """
    if not isinstance(module, Adapted):
        return OwnParts()
    in_order = tuple(module.routes.tasks) if module.routes is not None else ()
    of_sources = tuple(SHARED if len(names) > 1 else names[0] if names else UNREAD for names in tasks)
    stacked = [adapter for adapter in module.adapters if adapter.per != RUN]
    return OwnParts({adapter.name: in_order if module.by_task(adapter) else of_sources for adapter in stacked}, in_order)


def params_at(
    adapted: Adapted,
    adapter: Inserted,
    added: Mapping[str, Any],
    layer: Layer,
    source: int | None = None,
    task: str | None = None,
) -> dict[str, Any]:
    """The parameters of an adapter or a sharing at one layer, of one task.

    Args:
        adapted: The module.
        adapter: One of its adapters.
        added: Its parameters at "adapters".
        layer: The layer.
        source: The number of the source, where owner_of() is SOURCE.
        task: The task, where owner_of() is TASK.
    """
    params = dict(subtree(added[adapter.name], layer.path))
    task_params = params.pop(OWN, {})
    if adapted.by_task(adapter):
        task_params, params = params, {}
    elif adapter.per != RUN:
        params = jax.tree.map(lambda leaf: of_number(leaf, adapted.sources, source), params)
    if task_params and adapted.routes is not None and task is not None:
        number, tasks = adapted.routes.number(task), len(adapted.routes.tasks)
        params |= jax.tree.map(lambda leaf: of_number(leaf, tasks, number), task_params)
    return params
