"""LoRA: low-rank changes of linear maps.

Shapes in names: B rows, T tokens a row, I inputs of a linear map, O its outputs, R rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mtl_jax.core.errors import UserError
from mtl_jax.models.dropout import drop
from mtl_jax.models.layers import times
from mtl_jax.transfer.adapters.base import Adapter, Call, Layer, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora(Adapter):
    """y = W x + (alpha / rank) B A x at linear maps (Hu et al. 2022, LoRA, section 4.1).

    Parameters for each layer: a f32[I, R], normal with variance 1 / I, and b f32[R, O], zeros, so that the output does not
    change at first.

    Attributes:
        rank: R.
        alpha: The change is multiplied by alpha / rank.
        dropout: Dropout rate on the input of A during training.
        target: A regular expression that must match the whole path of a linear map inside the trunk, such as
            "layer_0/attention/query". The paper's choice is query and value; ModernBERT has one map for query, key and value.

    Examples:
        >>> mtl_jax.Lora(name="lora", rank=8, target=".*/(query|value)").rank
        8
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target: str = r".*/(query|value|query_key_value)"

    order: ClassVar[int] = 0

    def check(self) -> None:
        super().check()
        if self.rank < 1:
            raise UserError(f"adapter {self.name!r}: rank is {self.rank}; it must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"adapter {self.name!r}: dropout is {self.dropout}; it must be at least 0 and below 1")

    def where(self, layers: Mapping[str, Layer]) -> list[Layer]:
        matching = self.matching(layers, self.target)
        for layer in matching:
            if self.rank > min(layer.inputs, layer.outputs):
                raise UserError(
                    f"adapter {self.name!r}: rank is {self.rank}, but {layer.path} is only {layer.inputs} x {layer.outputs}"
                )
        return matching

    def init(self, key: jax.Array, layer: Layer) -> dict[str, jax.Array]:
        a_IxR = jax.random.normal(key, (layer.inputs, self.rank)) * layer.inputs**-0.5
        return {"a": a_IxR, "b": jnp.zeros((self.rank, layer.outputs))}

    @property
    def scale(self) -> float:
        """The factor on A B."""
        return self.alpha / self.rank

    def around(self, params: Params, call: Call) -> Any:
        y_BxTxO = call()
        return y_BxTxO + self.change(params, call, y_BxTxO.dtype)

    def change(self, params: Params, call: Call, dtype: Any) -> jax.Array:
        """The change of the output, scale * x A B, f[B, T, O] in the given dtype."""
        x_BxTxI = call.args[0].astype(dtype)
        if call.key is not None and self.dropout:
            x_BxTxI = drop(call.key, self.dropout, x_BxTxI)
        inner_BxTxR = times(x_BxTxI, params["a"].astype(dtype))
        return self.scale * times(inner_BxTxR, params["b"].astype(dtype))

    def product(self, params: Params) -> jax.Array:
        """A B, f32[I, O]."""
        return jnp.matmul(params["a"], params["b"], precision="highest")

    def merged(self, params: Params, kernel: Mapping[str, Any], layer: Layer) -> dict[str, Any]:
        return {**kernel, "kernel": kernel["kernel"] + self.scale * self.product(params)}

    def weighted(self, params: Params, weight: float) -> dict[str, Any]:
        # Of A B - A0 B0 (PiSSA) both products.
        return {name: leaf * weight if name.rpartition("_")[2] == "b" else leaf for name, leaf in params.items()}
