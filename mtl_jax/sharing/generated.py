"""Parts that all layers share: a network that makes adapters for each task and layer, and projections for attention.

Shapes in names: B rows, T tokens a row, O width of a layer's vectors, W width inside, K tasks, D size of an embedding, N heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mtl_jax.core.errors import UserError
from mtl_jax.models.layers import ACTIVATIONS, attend, times
from mtl_jax.sharing.base import Sharing
from mtl_jax.transfer.adapters.base import COMMON, OWN, Call, Layer, Params
from mtl_jax.transfer.adapters.bottleneck import VARIANTS

NETWORK, PROJECTIONS = "network", "projections"  # the paths of parameters that all layers share
LAYER_NORM_EPS = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class HyperFormer(Sharing):
    """Adapters that one network makes from embeddings of the task and the place (Mahabadi et al. 2021, HyperFormer++).

    y + norm(up(activation(down(y)))), where y is the output of a part of a layer. The maps down and up and the norm's scale and
    shift are linear functions of h = V relu(U [task; place]). The two functions for the norm start at 0, so that the outputs do
    not change at first. Only an embedding belongs to a task.

        Experiment(..., sharing=HyperFormer(width=16, embedding=32))

    Attributes:
        width: Width inside, W.
        embedding: Size of both embeddings and of h, D.
        activation: A key of models.layers.ACTIVATIONS.
        variant: After which parts of a layer, as in transfer.adapters.Bottleneck.
    """

    width: int = 16
    embedding: int = 32
    activation: str = "gelu"
    variant: str = "houlsby"

    by_row: ClassVar[bool] = False
    common: ClassVar[str] = NETWORK
    order: ClassVar[int] = 2

    def check(self) -> None:
        self.at_least("width", 1)
        self.at_least("embedding", 1)
        self.one_of("activation", ACTIVATIONS)
        self.one_of("variant", VARIANTS)

    def where(self, layers: Mapping[str, Layer]) -> list[Layer]:
        return _with_common(self.matching(layers, VARIANTS[self.variant]), NETWORK, "HyperFormer")

    def init(self, key: jax.Array, layer: Layer) -> dict[str, jax.Array]:
        D, inner = self.embedding, layer.outputs * self.width
        if layer.kind != COMMON:
            return {"place": jax.random.normal(key, (D,))}
        keys = jax.random.split(key, 4)
        return {
            "project_in": jax.random.normal(keys[0], (2 * D, D)) * (2 * D) ** -0.5,
            "project_out": jax.random.normal(keys[1], (D, D)) * D**-0.5,
            "down": jax.random.normal(keys[2], (D, inner)) * (D * layer.outputs) ** -0.5,
            "up": jax.random.normal(keys[3], (D, inner)) * (D * self.width) ** -0.5,
            "scale": jnp.zeros((D, layer.outputs)),
            "shift": jnp.zeros((D, layer.outputs)),
        }

    def init_own(self, key: jax.Array, layer: Layer) -> dict[str, jax.Array]:
        return {"task": jax.random.normal(key, (self.embedding,))} if layer.kind == COMMON else {}

    def around(self, params: Params, call: Call) -> Any:
        assert call.rows is not None
        y_BxTxO = call()
        task_KxD = params[OWN]["task"].reshape(-1, self.embedding)
        place_KxD = jnp.broadcast_to(params["place"], task_KxD.shape)
        h_KxD = jax.nn.relu(jnp.concatenate([task_KxD, place_KxD], axis=1) @ params["project_in"]) @ params["project_out"]
        # A product, as in stacks.py.
        h_BxD = jax.nn.one_hot(call.rows.task_BC, len(task_KxD)) @ h_KxD
        B, width = y_BxTxO.shape[0], y_BxTxO.shape[-1]
        down, up, scale, shift = ((h_BxD @ params[name]).astype(y_BxTxO.dtype) for name in ("down", "up", "scale", "shift"))
        inner = ACTIVATIONS[self.activation](times(y_BxTxO, down.reshape(B, width, self.width)))
        change = times(inner, up.reshape(B, self.width, width))
        return y_BxTxO + _normed(change) * scale[:, None] + shift[:, None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pal(Sharing):
    """Attention of low width for each task, beside every layer (Stickland and Murray 2019, projected attention layers).

    A layer's input is projected to W numbers, passes an attention without output map, and is projected back. The activation of
    the result is added to the output of the feed-forward part. Each task has both projections for itself, the same in all
    layers, and the maps to queries, keys and values for itself in each layer. The second projection starts at 0: the outputs do
    not change at first.

        Experiment(..., sharing=Pal(width=24, heads=4))

    Attributes:
        width: Width inside, W.
        heads: Heads of the attention, N; divides W.
    """

    width: int = 24
    heads: int = 4

    common: ClassVar[str] = PROJECTIONS
    order: ClassVar[int] = 4

    def check(self) -> None:
        self.at_least("width", 1)
        self.at_least("heads", 1)
        if self.width % self.heads:
            raise UserError(f"sharing: width of Pal is {self.width}, which its {self.heads} heads do not divide")

    def where(self, layers: Mapping[str, Layer]) -> list[Layer]:
        places = self.matching(layers, r".*/feed_forward_out")
        whole = [layer.path for layer in layers.values() if layer.kind == "layer"]
        outside = [place.path for place in places if not any(place.path.startswith(f"{path}/") for path in whole)]
        if outside:
            raise UserError(f"sharing: Pal reads the input of a whole layer, but {outside[0]} is not in a layer")
        return _with_common(places, PROJECTIONS, "Pal")

    def init(self, key: jax.Array, layer: Layer) -> dict[str, jax.Array]:
        return {}

    def init_own(self, key: jax.Array, layer: Layer) -> dict[str, jax.Array]:
        W = self.width
        if layer.kind == COMMON:
            down = jax.random.normal(key, (layer.outputs, W)) * layer.outputs**-0.5
            return {"down": down, "up": jnp.zeros((W, layer.outputs))}
        keys = dict(zip(("query", "key", "value"), jax.random.split(key, 3), strict=True))
        return {name: jax.random.normal(key, (W, W)) * W**-0.5 for name, key in keys.items()}

    def around(self, params: Params, call: Call) -> Any:
        y_BxTxO = call()
        x_BxTxH, mask_BxTxT = call.outer[:2]
        cast = {name: leaf.astype(y_BxTxO.dtype) for name, leaf in params.items()}
        z_BxTxW = times(x_BxTxH.astype(y_BxTxO.dtype), cast["down"])
        q, k, v = (times(z_BxTxW, cast[name]).reshape(*z_BxTxW.shape[:2], self.heads, -1) for name in ("query", "key", "value"))
        z = attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask_BxTxT, scale=(self.width // self.heads) ** -0.5)
        return y_BxTxO + ACTIVATIONS["gelu"](times(z.reshape(z_BxTxW.shape), cast["up"]))


def _normed(x: jax.Array) -> jax.Array:
    """A layer norm without parameters, computed in float32."""
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt((centred**2).mean(axis=-1, keepdims=True) + LAYER_NORM_EPS)).astype(x.dtype)


def _with_common(places: list[Layer], path: str, name: str) -> list[Layer]:
    """The places, and one more for the parameters that they share.

    Raises:
        UserError: They have different widths.
    """
    widths = sorted({place.outputs for place in places})
    if len(widths) > 1:
        raise UserError(f"sharing: {name} needs layers of one width, and the trunk's have {widths[0]} and {widths[-1]}")
    return [Layer(path, COMMON, inputs=widths[0], outputs=widths[0]), *places]
