"""IA3: learned scales inside a trunk.

Shapes in names: B rows, T tokens a row, I inputs of a linear map, O its outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mtl_jax.transfer.adapters.base import Adapter, Call, Layer, Params

FUSED = "query_key_value"


@dataclasses.dataclass(frozen=True, kw_only=True)
class IA3(Adapter):
    """Keys, values and the inside of the feed-forward part, each multiplied by a learned vector (Liu et al. 2022, section 3.3).

    Parameters: scale f32[O] at every key and value map, and scale f32[I] on the input of feed_forward_out; if one map makes
    query, key and value, key and value f32[O / 3]. All start at 1, so that the output does not change at first.

    Examples:
        >>> experiment = dataclasses.replace(EXPERIMENT, adapters=(mtl_jax.IA3(name="ia3"),))
    """

    order: ClassVar[int] = 1

    def where(self, layers: Mapping[str, Layer]) -> list[Layer]:
        return self.matching(layers, rf".*/(attention/(key|value|{FUSED})|feed_forward_out)")

    def init(self, key: jax.Array, layer: Layer) -> dict[str, jax.Array]:
        if _name(layer) == FUSED:
            return {part: jnp.ones(layer.outputs // 3) for part in ("key", "value")}
        return {"scale": jnp.ones(layer.inputs if _on_input(layer) else layer.outputs)}

    def around(self, params: Params, call: Call) -> Any:
        scale = _scale(params)
        if _on_input(call.layer):
            x, *rest = call.args
            return call.next(x * scale.astype(x.dtype), *rest, **call.kwargs)
        y = call()
        return y * scale.astype(y.dtype)

    def merged(self, params: Params, kernel: Mapping[str, Any], layer: Layer) -> dict[str, Any]:
        scale = _scale(params)
        if _on_input(layer):
            return {**kernel, "kernel": kernel["kernel"] * scale[:, None]}
        return {name: leaf * scale for name, leaf in kernel.items()}


def _name(layer: Layer) -> str:
    return layer.path.rpartition("/")[2]


def _on_input(layer: Layer) -> bool:
    return _name(layer) == "feed_forward_out"


def _scale(params: Params) -> jax.Array:
    """f32[..., O] or f32[..., I]."""
    if "scale" in params:
        return params["scale"]
    return jnp.concatenate([jnp.ones_like(params["key"]), params["key"], params["value"]], axis=-1)
