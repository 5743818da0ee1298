"""Prefix tuning: learned keys and values in front of every row.

Shapes in names: B rows, T queries, S keys, P length of the prefix, N attention heads, D size of a head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mtl_jax.core.errors import UserError
from mtl_jax.core.parts import ONLY_IF_SET
from mtl_jax.models.kv_cache import KeyValue
from mtl_jax.transfer.adapters.base import Adapter, Call, Layer, Params
from mtl_jax.transfer.adapters.ia3 import FUSED


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefix(Adapter):
    """Additional keys and values in every attention, visible to all queries (Li and Liang 2021, section 4.2).

    Parameters for each attention: key and value f32[P, N, D], normal with deviation 0.02. They are trained directly, not
    reparametrised by a network over a smaller matrix as in the paper's section 4.3, which finds that more stable. In a packed
    row the prefix is visible to all examples; padding stays masked. The prefix has no positions: it is not rotated in
    ModernBERT, where local layers see it, too, and T5's position bias for it is 0. It changes the output from the start.

    Attributes:
        length: P.
        target: A regular expression that must match the whole path of an attention.
        shift: Whether tokens have the positions from P on, as in PEFT, where the prefix is a cache of P earlier tokens. Only
            where positions are added to the tokens' vectors.

    Examples:
        >>> mtl_jax.Prefix(name="prefix", length=10).length
        10
    """

    length: int = 16
    target: str = dataclasses.field(default=".*", metadata=ONLY_IF_SET)
    shift: bool = dataclasses.field(default=False, metadata=ONLY_IF_SET)

    order: ClassVar[int] = 3

    def check(self) -> None:
        super().check()
        if self.length < 1:
            raise UserError(f"adapter {self.name!r}: length is {self.length}; it must be at least 1")

    @property
    def added_tokens(self) -> int:
        return self.length if self.shift else 0

    def where(self, layers: Mapping[str, Layer]) -> list[Layer]:
        matching = self.matching(layers, self.target, ("attention", "rotary"))
        kinds = {layer.kind for layer in layers.values()}
        rotated = any(layer.rotated for layer in layers.values())
        if self.shift and (rotated or not kinds & {"root", "positions"}):
            raise UserError(
                f"adapter {self.name!r}: shift is for positions that are added to tokens, and this trunk has others"
            )
        return matching

    def uses(self, layer: Layer) -> str:
        if layer.kind in ("root", "positions"):  # any parameters do
            return "layer_0/attention" if self.shift else ""
        # In ModernBERT the map that makes keys and values takes part in it.
        parent, _, name = layer.path.rpartition("/")
        return parent if name == FUSED else layer.path

    def init(self, key: jax.Array, layer: Layer) -> dict[str, jax.Array]:
        shape = (self.length, layer.heads, layer.head_size)
        keys = dict(zip(("key", "value"), jax.random.split(key), strict=True))
        return {name: 0.02 * jax.random.normal(key, shape) for name, key in keys.items()}

    def around(self, params: Params, call: Call) -> Any:
        kinds = {"attention": self._extend, "rotary": self._make_room, "dense": self._fill}
        kinds |= {"root": self._shift_rows, "positions": self._shift_embeddings}
        return kinds[call.layer.kind](params, call)

    def _shift_rows(self, params: Params, call: Call) -> Any:
        """A whole trunk with all positions P higher."""
        ids_BxT, *rest = call.args
        positions_BxT = call.kwargs.get("position_ids")
        if positions_BxT is None:
            positions_BxT = jnp.broadcast_to(jnp.arange(ids_BxT.shape[1]), ids_BxT.shape)
        return call.next(ids_BxT, *rest, **{**call.kwargs, "position_ids": positions_BxT + self.length})

    def _shift_embeddings(self, params: Params, call: Call) -> Any:
        """The same for the embeddings of a decoder, which are given positions."""
        ids_BxT, table_VxH, positions_BxT, *rest = call.args
        return call.next(ids_BxT, table_VxH, positions_BxT + self.length, *rest, **call.kwargs)

    def _extend(self, params: Params, call: Call) -> Any:
        """Attention with the prefix before the row's keys and values."""
        x_BxTxH, mask_BxTxS, *rest = call.args
        changed = dict(call.kwargs)
        row = changed.get("source")
        if row is None:
            row = call.module.keys_values(x_BxTxH)

        def longer(name: str) -> jax.Array:
            row_BxNxSxD = getattr(row, name)
            prefix_BxPxNxD = self._rows(params[name], x_BxTxH.shape[0], row_BxNxSxD.dtype)
            return jnp.concatenate([prefix_BxPxNxD.swapaxes(1, 2), row_BxNxSxD], axis=2)

        visible = jnp.ones((*mask_BxTxS.shape[:-1], self.length), mask_BxTxS.dtype)
        bias = changed.get("bias_BxNxTxS")
        if bias is not None:
            changed["bias_BxNxTxS"] = jnp.pad(bias, ((0, 0), (0, 0), (0, 0), (self.length, 0)))
        changed["source"] = KeyValue(longer("key"), longer("value"))
        return call.next(x_BxTxH, jnp.concatenate([visible, mask_BxTxS], axis=-1), *rest, **changed)

    def _make_room(self, params: Params, call: Call) -> Any:
        """Attention with one map for queries, keys and values: P more tokens, which _fill() fills; later cut off."""
        x_BxTxH, mask_BxTxT, turn, *rest = call.args
        padding = (self.length, 0)
        x_BxTxH = jnp.pad(x_BxTxH, ((0, 0), padding, (0, 0)))
        mask_BxTxT = jnp.pad(mask_BxTxT, ((0, 0), padding, padding), constant_values=True)
        unrotated = [
            jnp.pad(part, ((0, 0), padding, (0, 0), (0, 0)), constant_values=value)
            for part, value in ((turn.cos, 1.0), (turn.sin, 0.0))
        ]
        return call.next(x_BxTxH, mask_BxTxT, type(turn)(*unrotated), *rest, **call.kwargs)[:, self.length :]

    def _fill(self, params: Params, call: Call) -> Any:
        """The map's output, with the prefix as keys and values, and 0 as query, for the P added tokens."""
        y_BxTx3H = call()
        key, value = (self._rows(params[name], y_BxTx3H.shape[0], y_BxTx3H.dtype) for name in ("key", "value"))
        rows = jnp.concatenate([part.reshape(*part.shape[:2], -1) for part in (jnp.zeros_like(key), key, value)], axis=-1)
        return jnp.concatenate([rows, y_BxTx3H[:, self.length :]], axis=1)

    def _rows(self, leaf: jax.Array, rows: int, dtype: Any) -> jax.Array:
        """f[B, P, N, D]: the prefix of each row, from one prefix for all rows or one for each."""
        return jnp.broadcast_to(leaf, (rows, *leaf.shape[-3:])).astype(dtype)
