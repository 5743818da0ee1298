"""Adapters put into the kernels that they change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import traverse_util

from mtl_jax.errors import UserError
from mtl_jax.transfer.adapters.adapted import ADAPTERS, Adapted
from mtl_jax.transfer.adapters.base import RUN


def merge_adapters(adapted: Adapted, params: Mapping[str, Any], source: int | None = None) -> dict[str, Any]:
    """The parameters of the module alone that do, without dropout, what it does with its adapters: W + (alpha / rank) A B.

    Args:
        adapted: The module with adapters, Lora and IA3 only.
        params: Its parameters, {"adapters": ...} among them.
        source: Whose adapters, where each source has its own.

    Raises:
        UserError: An adapter cannot be merged, or it is not said whose.
    """
    base = traverse_util.flatten_dict({name: tree for name, tree in params.items() if name != ADAPTERS}, sep="/")
    for adapter in sorted(adapted.adapters, key=lambda adapter: adapter.order):
        if adapter.per != RUN and source is None:
            raise UserError(f"adapter {adapter.name!r}: each source has its own; say of which task it is to be merged")
        for layer in adapted.where[adapter.name]:
            own: Any = params[ADAPTERS][adapter.name]
            for name in layer.path.split("/"):
                own = own[name]
            if adapter.per != RUN:
                own = jax.tree.map(lambda leaf: _of(leaf, adapted.sources, source), own)
            kernel = {name: base[f"{layer.path}/{name}"] for name in ("kernel", "bias") if f"{layer.path}/{name}" in base}
            base |= {f"{layer.path}/{name}": leaf for name, leaf in adapter.merged(own, kernel, layer).items()}
    return traverse_util.unflatten_dict(base, sep="/")


def _of(leaf: jax.Array, sources: int, source: int | None) -> jax.Array:
    return leaf.reshape(sources, -1)[source] if leaf.ndim == 1 else leaf[source]
