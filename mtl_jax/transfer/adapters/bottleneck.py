"""Bottleneck adapters: small networks behind the parts of each block.

Shapes in names: B rows, T tokens a row, O width of what is adapted, W width of the bottleneck.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mtl_jax.core.errors import UserError, unknown
from mtl_jax.models.layers import ACTIVATIONS, times
from mtl_jax.transfer.adapters.base import Adapter, Call, Layer, Params

# {variant: the layers that it follows}
VARIANTS = {"houlsby": r".*/(attention/output|feed_forward_out)", "pfeiffer": r".*/feed_forward_out"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bottleneck(Adapter):
    """y + up(activation(down(y))), where y is the output of a part of a block, before it is added to the residual stream.

    Parameters for each layer: down_kernel f32[O, W], normal with variance 1 / O, down_bias f32[W], up_kernel f32[W, O] and
    up_bias f32[O]. The last three start at 0, so that the output does not change at first; Houlsby et al. draw kernels from a
    normal with deviation 0.01. The adapter comes before the block's dropout, residual and norm. Norms train only if the rules
    say so (Houlsby et al. train them), and from the search of Pfeiffer et al. only the place in the block is used, not the
    arrangement of norms and residuals.

    Attributes:
        width: W.
        variant: houlsby: behind attention and behind feed-forward (Houlsby et al. 2019). pfeiffer: behind feed-forward only
            (Pfeiffer et al. 2021).
        activation: A key of models.layers.ACTIVATIONS.

    Examples:
        >>> mtl_jax.Bottleneck(name="adapter", width=16).width
        16
    """

    width: int = 64
    variant: str = "houlsby"
    activation: str = "gelu"

    order: ClassVar[int] = 2

    def check(self) -> None:
        super().check()
        if self.width < 1:
            raise UserError(f"adapter {self.name!r}: width is {self.width}; it must be at least 1")
        if self.variant not in VARIANTS:
            raise unknown(f"variant of adapter {self.name!r}:", self.variant, VARIANTS)
        if self.activation not in ACTIVATIONS:
            raise unknown(f"activation of adapter {self.name!r}:", self.activation, ACTIVATIONS)

    def where(self, layers: Mapping[str, Layer]) -> list[Layer]:
        return self.matching(layers, VARIANTS[self.variant])

    def init(self, key: jax.Array, layer: Layer) -> dict[str, jax.Array]:
        return {
            "down_kernel": jax.random.normal(key, (layer.outputs, self.width)) * layer.outputs**-0.5,
            "down_bias": jnp.zeros(self.width),
            "up_kernel": jnp.zeros((self.width, layer.outputs)),
            "up_bias": jnp.zeros(layer.outputs),
        }

    def around(self, params: Params, call: Call) -> Any:
        y_BxTxO = call()
        cast = {name: leaf.astype(y_BxTxO.dtype) for name, leaf in params.items()}
        inner_BxTxW = ACTIVATIONS[self.activation](times(y_BxTxO, cast["down_kernel"]) + cast["down_bias"])
        return y_BxTxO + (times(inner_BxTxW, cast["up_kernel"]) + cast["up_bias"])

    def weighted(self, params: Params, weight: float) -> dict[str, Any]:
        return {name: leaf * weight if name.startswith("up_") else leaf for name, leaf in params.items()}
