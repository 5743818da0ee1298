"""Low-rank changes of linear maps whose parts are shared, a task's own, or chosen by a router.

Shapes in names: B rows, T tokens a row, I inputs of a linear map, O its outputs, R rank of a part, N parts.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mtl_jax.core.errors import UserError
from mtl_jax.models.dropout import drop
from mtl_jax.models.layers import times
from mtl_jax.sharing.base import GATES, PER_TASK, PER_TOKEN, Sharing
from mtl_jax.transfer.adapters.base import Call, Layer, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRank(Sharing):
    """y = W x + (alpha / R) sum_n w_n B_n u_n: the parts of a low-rank change, each with a weight.

    Every B_n starts at 0, so the outputs do not change at first.

    Attributes:
        rank: Rank of each part, R.
        parts: How many parts, N.
        alpha: The change is multiplied by alpha / R.
        dropout: Dropout rate on the input of the change during training.
        target: A regular expression for the linear maps, as in transfer.adapters.Lora.
    """

    rank: int = 4
    parts: int = 3
    alpha: float = 8.0
    dropout: float = 0.0
    target: str = r".*/(query|value|query_key_value)"

    order: ClassVar[int] = 0

    def check(self) -> None:
        self.at_least("rank", 1)
        self.at_least("parts", 1)
        if not 0 <= self.dropout < 1:
            raise UserError(f"sharing: dropout of {type(self).__name__} is {self.dropout}; it must be at least 0 and below 1")

    def where(self, layers: Mapping[str, Layer]) -> list[Layer]:
        matching = self.matching(layers, self.target)
        for layer in matching:
            if self.rank > min(layer.inputs, layer.outputs):
                raise UserError(
                    f"sharing: rank of {type(self).__name__} is {self.rank}, but {layer.path} is only {layer.inputs} x "
                    f"{layer.outputs}"
                )
        return matching

    def init(self, key: jax.Array, layer: Layer) -> dict[str, jax.Array]:
        down = jax.random.normal(key, (layer.inputs, self.downs * self.rank)) * layer.inputs**-0.5
        return {"a": down, "b": jnp.zeros((self.parts * self.rank, layer.outputs))}

    @property
    def downs(self) -> int:
        """How many maps A there are: one for all parts, or one for each."""
        return 1

    @abc.abstractmethod
    def weights(self, params: Params, x_BxTxI: jax.Array) -> jax.Array:
        """The weights of the parts, f32[B, T, N], or f32[B, 1, N] if they read no tokens.

        Args:
            params: As for around().
            x_BxTxI: The input of the linear map.
        """

    def turned(self, params: Params, u: jax.Array) -> jax.Array:
        """The input of the maps B_n, from u = A x, f[B, T, 1, R] or f[B, T, N, R]; of the same shape."""
        return u

    def around(self, params: Params, call: Call) -> Any:
        y_BxTxO = call()
        x_BxTxI = call.args[0].astype(y_BxTxO.dtype)
        if call.key is not None and self.dropout:
            x_BxTxI = drop(call.key, self.dropout, x_BxTxI)
        u = times(x_BxTxI, params["a"].astype(y_BxTxO.dtype))
        turned = self.turned(params, u.reshape(*u.shape[:2], self.downs, self.rank))
        weights = self.weights(params, x_BxTxI)
        call.show("parts", weights, [f"part {number}" for number in range(1, self.parts + 1)])
        weighted = weights.astype(u.dtype)[..., None] * turned
        change = times(weighted.reshape(*u.shape[:2], self.parts * self.rank), params["b"].astype(y_BxTxO.dtype))
        return y_BxTxO + (self.alpha / self.rank) * change


@dataclasses.dataclass(frozen=True, kw_only=True)
class MtlLora(LowRank):
    """One A, a matrix for each task, and several B with weights of each task (Yang et al. 2024, MTL-LoRA).

    The change for task t is sum_n softmax(w_t / temperature)_n B_n L_t A x. L_t f32[R, R] starts as the identity, w_t at 0.

        Experiment(..., sharing=MtlLora(rank=8, parts=3))

    Attributes:
        temperature: Temperature of the softmax.
    """

    temperature: float = 0.5

    def check(self) -> None:
        super().check()
        if not self.temperature > 0:
            raise UserError(f"sharing: temperature of MtlLora is {self.temperature}; it must be above 0")

    def init_own(self, key: jax.Array, layer: Layer) -> dict[str, jax.Array]:
        return {"transform": jnp.eye(self.rank), "mix": jnp.zeros(self.parts)}

    def weights(self, params: Params, x_BxTxI: jax.Array) -> jax.Array:
        return jax.nn.softmax(params["mix"] / self.temperature)

    def turned(self, params: Params, u: jax.Array) -> jax.Array:
        return times(u[:, :, 0], params["transform"].astype(u.dtype))[:, :, None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HydraLora(LowRank):
    """One A, several B, and a router that weighs the B for each token (Tian et al. 2024, HydraLoRA).

    It has no parameters of single tasks: the router must see in the token how tasks differ.

        Experiment(..., sharing=HydraLora(rank=8, parts=3))
    """

    def init(self, key: jax.Array, layer: Layer) -> dict[str, jax.Array]:
        return {**super().init(key, layer), "router": jnp.zeros((layer.inputs, self.parts))}

    def weights(self, params: Params, x_BxTxI: jax.Array) -> jax.Array:
        return jax.nn.softmax(times(x_BxTxI, params["router"].astype(x_BxTxI.dtype)).astype(jnp.float32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeLora(LowRank):
    """Several LoRA parts, and a gate of each task that weighs them (Liu et al. 2023, MOELoRA).

        Experiment(..., sharing=MoeLora(rank=4, parts=4))

    Attributes:
        gates: What a gate reads. task, as in the paper: only the task; token: each token, by a linear map of the task's own.
    """

    gates: str = PER_TASK

    @property
    def downs(self) -> int:
        return self.parts

    def check(self) -> None:
        super().check()
        self.one_of("gates", GATES)

    def init_own(self, key: jax.Array, layer: Layer) -> dict[str, jax.Array]:
        return {"gate": jnp.zeros((layer.inputs, self.parts) if self.gates == PER_TOKEN else self.parts)}

    def weights(self, params: Params, x_BxTxI: jax.Array) -> jax.Array:
        gate = params["gate"]
        if self.gates == PER_TOKEN:
            gate = times(x_BxTxI, gate.astype(x_BxTxI.dtype)).astype(jnp.float32)
        return jax.nn.softmax(gate)
