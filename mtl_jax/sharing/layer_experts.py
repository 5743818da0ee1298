"""Experts that are whole layers: copies of the trunk's topmost layers, mixed by gates.

Shapes in names: B rows, M copies of a row that leave the trunk, T tokens a row, H width, K tasks, E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.sharing.base import GATES, PER_TOKEN, Sharing, layers_from_the_top
from mtl_jax.sharing.columns import all_columns
from mtl_jax.sharing.experts import expert_names
from mtl_jax.sharing.layer_copies import apply_side_by_side, joined, vectors, with_vectors
from mtl_jax.transfer.adapters.base import COMMON, OWN, Call, Layer, Params
from mtl_jax.transfer.adapters.routes import Routes

EXPERTS, GATE = "experts", "gates"  # where copies of a layer are, and what all layers have once


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerExperts(Sharing):
    """A sharing whose experts are copies of the trunk's topmost layers.

    All experts start as the trunk's layers, so that at first the outputs are the trunk's up to rounding. Gates start at
    random, because equal experts with equal weights would stay equal.

    Attributes:
        gates: What a gate reads. token: the vector of each token, by the gate's own linear map; task: only the task.
    """

    gates: str = PER_TOKEN

    by_row: ClassVar[bool] = False

    def check(self) -> None:
        self.one_of("gates", GATES)

    def new_gate(self, key: jax.Array, width: int, experts: int) -> jax.Array:
        """Initial parameters of a gate."""
        if self.gates == PER_TOKEN:
            return jax.random.normal(key, (width, experts)) * width**-0.5
        return jax.random.normal(key, (experts,))

    def stacked_gates(self, leaf: jax.Array, count: int) -> jax.Array:
        """The gates of several tasks, [K, H, E] or [K, E]."""
        return leaf.reshape(count, -1) if leaf.ndim == 1 else leaf


def gate_weights(gate: jax.Array, x_BxMxTxH: jax.Array) -> jax.Array:
    """The weights of the experts, f32[B, M, T, E].

    Args:
        gate: f32[..., H, E], a linear map of the vectors; or f32[..., E]; for each row and copy, or with axes of size 1.
        x_BxMxTxH: The vectors that the gate reads.
    """
    B, M, T, _ = x_BxMxTxH.shape
    if gate.ndim == 3:
        return jnp.broadcast_to(jax.nn.softmax(gate)[:, :, None], (B, M, T, gate.shape[-1]))
    return jax.nn.softmax(jnp.matmul(x_BxMxTxH, gate.astype(x_BxMxTxH.dtype)).astype(jnp.float32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MMoELayers(LayerExperts):
    """MMoE whose experts are the topmost layers: a row passes all of them, and its task's gate mixes their results.

    The gate reads the vectors that enter the first of these layers (Ma et al. 2018). These layers cost E times the operations.

        Experiment(..., sharing=MMoELayers(experts=3, layers=1))

    Attributes:
        experts: How many experts, E.
        layers: How many layers an expert has, counted from the top.
    """

    experts: int = 3
    layers: int = 1

    common: ClassVar[str] = GATE

    def check(self) -> None:
        super().check()
        self.at_least("experts", 1)
        self.at_least("layers", 1)

    def where(self, layers: Mapping[str, Layer]) -> list[Layer]:
        places = layers_from_the_top(layers, self.layers, "sharing: layers of MMoELayers")
        return [Layer(GATE, COMMON, inputs=places[0].inputs), *places]

    def through(self, routes: Routes) -> int:
        return self.experts

    def init(self, key: jax.Array, layer: Layer) -> dict[str, jax.Array]:
        return {}

    def init_own(self, key: jax.Array, layer: Layer) -> dict[str, jax.Array]:
        return {"gate": self.new_gate(key, layer.inputs, self.experts)} if layer.kind == COMMON else {}

    def copied(self, layer: Layer, tasks: int) -> dict[str, int]:
        return {} if layer.kind == COMMON else {EXPERTS: self.experts}

    def around(self, params: Params, call: Call) -> Any:
        assert call.rows is not None
        E, B = self.experts, call.rows.source_B.shape[0]
        entry_BxTxH = call.memo.setdefault("entry", call.args[0][::E])
        call.memo["calls"] = call.memo.get("calls", 0) + 1
        output = apply_side_by_side(call, params[EXPERTS], E)
        if call.memo["calls"] < self.layers:
            return joined(output)
        K = len(call.rows.routes.tasks)
        chosen_BxMxK = jax.nn.one_hot(call.rows.task_BC.reshape(B, -1), K)
        gate = jnp.einsum("bmk,k...->bm...", chosen_BxMxK, self.stacked_gates(params[OWN]["gate"], K))
        M = gate.shape[1]
        weights = gate_weights(gate, jnp.broadcast_to(entry_BxTxH[:, None], (B, M, *entry_BxTxH.shape[1:])))
        call.show("gate", weights, expert_names(E, 0))
        y_BxExTxH = vectors(output)
        mixed = jnp.einsum("bmte,beth->bmth", weights.astype(y_BxExTxH.dtype), y_BxExTxH)
        others = jax.tree.map(lambda leaf: jnp.repeat(leaf[:, :1], M, axis=1), output)
        return joined(with_vectors(others, mixed))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PLE(LayerExperts):
    """Progressive layered extraction: a stream for each task and a shared one, with new experts at each level.

    Each of the topmost layers is a level. A level has `own` experts for each task, which read the task's stream, and `shared`
    experts, which read the shared stream. A task's gate mixes its own and the shared experts into its next stream; the shared
    gate, which the last level does not need, mixes all experts. With one level this is CGC. Every row passes all
    K own + shared experts of these layers (Tang et al. 2020).

        Experiment(..., sharing=PLE(levels=2, shared=1, own=1))

    Attributes:
        levels: How many layers are levels, counted from the top.
        shared: Experts that all tasks share, at each level.
        own: Experts that each task has for itself, at each level.
    """

    levels: int = 2
    shared: int = 1
    own: int = 1

    def check(self) -> None:
        super().check()
        for field in ("levels", "shared", "own"):
            self.at_least(field, 1)

    def where(self, layers: Mapping[str, Layer]) -> list[Layer]:
        places = layers_from_the_top(layers, self.levels, "sharing: levels of PLE")
        # A whole layer has no heads of its own: the field tells init_for() which level is not the last.
        return [place._replace(heads=len(places) - 1 - number) for number, place in enumerate(places)]

    def routes(self, routes: Routes) -> Routes:
        return all_columns(routes)

    def through(self, routes: Routes) -> int:
        return len(routes.tasks) * self.own + self.shared

    def init(self, key: jax.Array, layer: Layer) -> dict[str, jax.Array]:
        return {}

    def init_own(self, key: jax.Array, layer: Layer) -> dict[str, jax.Array]:
        return {"gate": self.new_gate(key, layer.inputs, self.own + self.shared)}

    def init_for(self, key: jax.Array, layer: Layer, tasks: int) -> dict[str, jax.Array]:
        return {"shared_gate": self.new_gate(key, layer.inputs, tasks * self.own + self.shared)} if layer.heads else {}

    def copied(self, layer: Layer, tasks: int) -> dict[str, int]:
        return {EXPERTS: tasks * self.own + self.shared}

    def around(self, params: Params, call: Call) -> Any:
        assert call.rows is not None
        K, own = len(call.rows.routes.tasks), self.own
        E = K * own + self.shared
        x_BxExTxH = call.args[0].reshape(-1, E, *call.args[0].shape[1:])
        output = apply_side_by_side(call, params[EXPERTS], E)
        y_BxExTxH = vectors(output)
        gate = self.stacked_gates(params[OWN]["gate"], K)[None]
        weights = gate_weights(gate, x_BxExTxH[:, : K * own : own])
        of_shared = [f"shared {number}" for number in range(1, self.shared + 1)]
        call.show("gate", weights, [*(f"own {number}" for number in range(1, own + 1)), *of_shared])
        read_KxG = np.array([[*range(k * own, (k + 1) * own), *range(K * own, E)] for k in range(K)])
        streams = jnp.einsum("bktg,bkgth->bkth", weights.astype(y_BxExTxH.dtype), y_BxExTxH[:, read_KxG])
        if "shared_gate" not in params:  # the last level
            return joined(with_vectors(jax.tree.map(lambda leaf: leaf[:, :K], output), streams))
        weights = gate_weights(params["shared_gate"][None, None], x_BxExTxH[:, K * own : K * own + 1])
        of_tasks = [f"{task} {number}" for task in call.rows.routes.tasks for number in range(1, own + 1)]
        call.show("shared gate", weights, [*of_tasks, *of_shared])
        shared = jnp.einsum("bzte,beth->bzth", weights.astype(y_BxExTxH.dtype), y_BxExTxH)
        inputs = jnp.concatenate([jnp.repeat(streams, own, axis=1), jnp.repeat(shared, self.shared, axis=1)], axis=1)
        return joined(with_vectors(output, inputs))
