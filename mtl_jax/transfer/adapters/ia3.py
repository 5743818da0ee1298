"""IA3: learned scales inside a trunk.

Shapes in names: B rows, T tokens a row, I inputs of a linear map, O its outputs.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mtl_jax.core.parts import ONLY_IF_SET
from mtl_jax.transfer.adapters.base import Adapter, Call, Layer, Params

FUSED = "query_key_value"
TARGET, INPUTS = rf".*/(attention/(key|value|{FUSED})|feed_forward_out)", ".*/feed_forward_out"


@dataclasses.dataclass(frozen=True, kw_only=True)
class IA3(Adapter):
    """Keys, values and the inside of the feed-forward part, each multiplied by a learned vector (Liu et al. 2022, section 3.3).

    Parameters: scale f32[O] at every key and value map, and scale f32[I] on the input of feed_forward_out; if one map makes
    query, key and value, key and value f32[O / 3]. All start at 1, so that the output does not change at first.

    Attributes:
        target: A regular expression that must match the whole path of a linear map inside the trunk. With another one than the
            paper's choice, also a map for query, key and value has scale f32[O].
        inputs: The maps whose input is scaled, in place of their output.

    Examples:
        >>> experiment = dataclasses.replace(EXPERIMENT, adapters=(mtl_jax.IA3(name="ia3"),))
    """

    target: str = dataclasses.field(default=TARGET, metadata=ONLY_IF_SET)
    inputs: str = dataclasses.field(default=INPUTS, metadata=ONLY_IF_SET)

    order: ClassVar[int] = 1

    def where(self, layers: Mapping[str, Layer]) -> list[Layer]:
        return self.matching(layers, self.target)

    def init(self, key: jax.Array, layer: Layer) -> dict[str, jax.Array]:
        if self.target == TARGET and layer.path.rpartition("/")[2] == FUSED:
            return {part: jnp.ones(layer.outputs // 3) for part in ("key", "value")}
        return {"scale": jnp.ones(layer.inputs if self.on_input(layer) else layer.outputs)}

    def around(self, params: Params, call: Call) -> Any:
        scale = scale_of(params)
        if self.on_input(call.layer):
            x, *rest = call.args
            return call.next(x * scale.astype(x.dtype), *rest, **call.kwargs)
        y = call()
        return y * scale.astype(y.dtype)

    def merged(self, params: Params, kernel: Mapping[str, Any], layer: Layer) -> dict[str, Any]:
        scale = scale_of(params)
        if self.on_input(layer):
            return {**kernel, "kernel": kernel["kernel"] * scale[:, None]}
        return {name: leaf * scale for name, leaf in kernel.items()}

    def weighted(self, params: Params, weight: float) -> dict[str, Any]:
        return {name: 1 + weight * (leaf - 1) for name, leaf in params.items()}

    def on_input(self, layer: Layer) -> bool:
        """Whether the input of a layer is scaled, and not its output."""
        return re.fullmatch(self.inputs, layer.path) is not None


def scale_of(params: Params) -> jax.Array:
    """The factors of a layer, f32[..., O] or f32[..., I]."""
    if "scale" in params:
        return params["scale"]
    return jnp.concatenate([jnp.ones_like(params["key"]), params["key"], params["value"]], axis=-1)
