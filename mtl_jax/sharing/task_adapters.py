"""An adapter for each task."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from mtl_jax.core.errors import UserError
from mtl_jax.sharing.base import Sharing
from mtl_jax.transfer.adapters.base import Adapter, Call, Layer, Params
from mtl_jax.transfer.adapters.lora import Lora


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskAdapters(Sharing):
    """One trunk, and an adapter of any kind for each task (Houlsby et al. 2019), even if tasks share a source.

    Each task's adapter starts from its own random numbers; with Lora, IA3 or Bottleneck the outputs do not change at first.

        Experiment(..., sharing=TaskAdapters(adapter=Bottleneck(name="task", width=16)))

    Attributes:
        adapter: The adapter. Its fields name and per are not used: its parameters are trunk/adapters/sharing/LAYER/own/...
    """

    adapter: Adapter = Lora(name="task")

    def check(self) -> None:
        self.adapter.check()
        if self.adapter.added_tokens:
            raise UserError(
                f"sharing: {type(self.adapter).__name__} puts tokens in front of a text, before the first layer, which a row "
                'passes once for all tasks: declare it among the adapters, with per="task"'
            )

    @property
    def order(self) -> int:  # type: ignore[override]
        """The order of the adapter."""
        return self.adapter.order

    @property
    def dropout(self) -> float:
        """The dropout of the adapter, 0 if it has none."""
        return float(getattr(self.adapter, "dropout", 0.0))

    def where(self, layers: Mapping[str, Layer]) -> list[Layer]:
        return self.adapter.where(layers)

    def init(self, key: jax.Array, layer: Layer) -> dict[str, jax.Array]:
        return {}

    def init_own(self, key: jax.Array, layer: Layer) -> dict[str, jax.Array]:
        return self.adapter.init(key, layer)

    def start_own(self, key: jax.Array, layer: Layer, trunk: Params) -> dict[str, jax.Array]:
        return self.adapter.start(key, layer, trunk)

    def uses(self, layer: Layer) -> str:
        return self.adapter.uses(layer)

    def around(self, params: Params, call: Call) -> Any:
        return self.adapter.around(params, call)

    def merged(self, params: Params, kernel: Mapping[str, Any], layer: Layer) -> dict[str, Any]:
        return self.adapter.merged(params, kernel, layer)
