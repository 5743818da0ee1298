"""Relatives of LoRA: another scale, a magnitude of its own, another start, or random matrices that do not train.

Shapes in names: B rows, T tokens a row, I inputs of a linear map, O its outputs, R rank.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.core.errors import UserError
from mtl_jax.models.layers import times
from mtl_jax.transfer.adapters.base import Adapter, Call, Layer, Params
from mtl_jax.transfer.adapters.lora import Lora


@dataclasses.dataclass(frozen=True, kw_only=True)
class RsLora(Lora):
    """LoRA with the factor alpha / sqrt(rank), so that high ranks learn as fast (Kalajdzievski 2023, rsLoRA, section 3).

    Parameters and fields are those of Lora.

    Examples:
        >>> mtl_jax.RsLora(name="rslora", rank=64).rank
        64
    """

    @property
    def scale(self) -> float:
        return self.alpha / math.sqrt(self.rank)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dora(Lora):
    """The kernel as magnitude times direction, and LoRA changes the direction (Liu et al. 2024, DoRA, section 4).

    y = m * (W + s A B)^T x / |W + s A B| + bias, where |.| is the length of the weights of each output and s is alpha / rank.
    Parameters for each layer: a and b as in Lora, and magnitude f32[O], which starts at |W|, so that the output does not change
    at first. The gradient does not pass through |W + s A B| (section 4.3). Dropout is on the input of A only.

    Its length is that of the trunk's own kernel with this adapter, so a layer has at most one.

    Examples:
        >>> mtl_jax.Dora(name="dora", rank=8).rank
        8
    """

    order: ClassVar[int] = -1  # nearest to the kernel, which its length is taken of
    alone: ClassVar[bool] = True

    def start(self, key: jax.Array, layer: Layer, trunk: Params) -> dict[str, jax.Array]:
        return {**self.init(key, layer), "magnitude": jnp.sqrt(jnp.square(trunk["kernel"]).sum(0))}

    def around(self, params: Params, call: Call) -> Any:
        y_BxTxO = call()
        trunk = call.module.variables["params"]
        length = jax.lax.stop_gradient(self._length(params, trunk["kernel"]))
        ratio = (params["magnitude"] / (length if params["a"].ndim == 2 else length[:, None])).astype(y_BxTxO.dtype)
        product = y_BxTxO - trunk["bias"].astype(y_BxTxO.dtype) if "bias" in trunk else y_BxTxO
        return y_BxTxO + (ratio - 1) * product + ratio * self.change(params, call, y_BxTxO.dtype)

    def merged(self, params: Params, kernel: Mapping[str, Any], layer: Layer) -> dict[str, Any]:
        changed_IxO = super().merged(params, kernel, layer)["kernel"]
        return {**kernel, "kernel": changed_IxO * (params["magnitude"] / jnp.linalg.norm(changed_IxO, axis=0))}

    def weighted(self, params: Params, weight: float) -> dict[str, Any]:
        return Adapter.weighted(self, params, weight)

    def _length(self, params: Params, kernel_IxO: jax.Array) -> jax.Array:
        """|W + s A B|, f32[O] or, with a separate A and B for each row, f32[B, O]; no matrix for each row is made."""
        a, b = params["a"], params["b"]
        along_RxO = jnp.einsum("...ir,io->...ro", a, kernel_IxO, precision="highest")
        inner_RxR = jnp.einsum("...ir,...iq->...rq", a, a, precision="highest")
        square_RxO = jnp.einsum("...rq,...qo->...ro", inner_RxR, b, precision="highest")
        change_O = (b * (2 * self.scale * along_RxO + self.scale**2 * square_RxO)).sum(-2)
        return jnp.sqrt(jnp.maximum(jnp.square(kernel_IxO).sum(0) + change_O, jnp.finfo(jnp.float32).tiny))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pissa(Lora):
    """LoRA that starts as the kernel's largest singular vectors (Meng et al. 2024, PiSSA, section 3).

    The paper takes s A B out of the kernel and trains A and B from there. Here the kernel stays as it is, and the adapter adds
    s (A B - A0 B0), which is the same function: the output does not change at first. Parameters for each layer: a f32[I, R] and
    b f32[R, O], which train, and fixed_a and fixed_b, their start, which never do.

    Attributes:
        alpha: The change is multiplied by s = alpha / rank. The paper has alpha = rank.

    Examples:
        >>> mtl_jax.Pissa(name="pissa", rank=8).rank
        8
    """

    alpha: float = 8.0

    def start(self, key: jax.Array, layer: Layer, trunk: Params) -> dict[str, jax.Array]:
        left_IxK, values_K, right_KxO = jnp.linalg.svd(trunk["kernel"], full_matrices=False)
        root_R = jnp.sqrt(values_K[: self.rank] / self.scale)
        a_IxR, b_RxO = left_IxK[:, : self.rank] * root_R, root_R[:, None] * right_KxO[: self.rank]
        return {"a": a_IxR, "b": b_RxO, "fixed_a": a_IxR, "fixed_b": b_RxO}

    def change(self, params: Params, call: Call, dtype: Any) -> jax.Array:
        start = {"a": params["fixed_a"], "b": params["fixed_b"]}
        return super().change(params, call, dtype) - super().change(start, call, dtype)

    def product(self, params: Params) -> jax.Array:
        start = {"a": params["fixed_a"], "b": params["fixed_b"]}
        return super().product(params) - super().product(start)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vera(Adapter):
    """Vectors that scale one pair of random matrices, which all layers share (Kopiczko et al. 2024, VeRA, section 3.1).

    y = W x + b * B (d * A x). A f32[I, R] and B f32[R, O] are the same in all layers of one size; they come from the seed, do
    not train and are in no checkpoint. Parameters for each layer: d f32[R], 0.1 at first, and b f32[O], zeros, so that the
    output does not change at first. The rank can be high, since it costs a number for each layer.

    Attributes:
        rank: R.
        target: As for Lora.
        projection_seed: Seed of A and B.

    Examples:
        >>> mtl_jax.Vera(name="vera", rank=64).rank
        64
    """

    rank: int = 256
    target: str = Lora.target
    projection_seed: int = 0

    def check(self) -> None:
        super().check()
        if self.rank < 1:
            raise UserError(f"adapter {self.name!r}: rank is {self.rank}; it must be at least 1")
        if not 0 <= self.projection_seed < 2**32:
            raise UserError(f"adapter {self.name!r}: projection_seed is {self.projection_seed}; it is from 0 to 2^32 - 1")

    def where(self, layers: Mapping[str, Layer]) -> list[Layer]:
        return self.matching(layers, self.target)

    def init(self, key: jax.Array, layer: Layer) -> dict[str, jax.Array]:
        return {"d": jnp.full(self.rank, 0.1), "b": jnp.zeros(layer.outputs)}

    def around(self, params: Params, call: Call) -> Any:
        y_BxTxO = call()
        cast = {name: leaf.astype(y_BxTxO.dtype) for name, leaf in params.items()}
        a_IxR, b_RxO = (jnp.asarray(matrix, y_BxTxO.dtype) for matrix in self._projection(call.layer))
        inner_BxTxR = times(call.args[0].astype(y_BxTxO.dtype), a_IxR) * cast["d"]
        return y_BxTxO + cast["b"] * times(inner_BxTxR, b_RxO)

    def merged(self, params: Params, kernel: Mapping[str, Any], layer: Layer) -> dict[str, Any]:
        a_IxR, b_RxO = self._projection(layer)
        change_IxO = jnp.matmul(a_IxR * params["d"], b_RxO, precision="highest") * params["b"]
        return {**kernel, "kernel": kernel["kernel"] + change_IxO}

    def weighted(self, params: Params, weight: float) -> dict[str, Any]:
        return {**params, "b": params["b"] * weight}

    def _projection(self, layer: Layer) -> tuple[np.ndarray, np.ndarray]:
        return _random_matrices(self.projection_seed, layer.inputs, self.rank, layer.outputs)


@functools.lru_cache(maxsize=8)
def _random_matrices(seed: int, inputs: int, rank: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """f32[I, R] and f32[R, O], uniform with variance 2 / I and 2 / R (He et al. 2015)."""
    # Not by jax: a run must find the same matrices again under every version of it and on every device.
    random = np.random.RandomState(seed)
    shapes = ((inputs, rank), (rank, outputs))
    a, b = (random.uniform(-1, 1, shape) * math.sqrt(6 / shape[0]) for shape in shapes)
    return a.astype(np.float32), b.astype(np.float32)
