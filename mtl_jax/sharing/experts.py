"""Experts with gates: small networks after the parts of each layer, mixed by weights of each task.

Shapes in names: B rows, T tokens a row, O width of the vectors that experts read and change, W width of an expert, E experts,
S selectors of a gate, C bits of an expert's code.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.core.errors import UserError
from mtl_jax.models.layers import ACTIVATIONS, times
from mtl_jax.sharing.base import GATES, PER_TOKEN, Sharing
from mtl_jax.transfer.adapters.base import Call, Layer, Params

OWN_EXPERTS = "own_"  # prefix of the names of parameters of a task's own experts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts(Sharing):
    """y + sum_e g_e up_e(activation(down_e(y))), where y is the output of a part of a layer and g a task's gate.

    Each expert is a bottleneck as in transfer.adapters.Bottleneck. Every up_e starts at 0: the outputs do not change at first.

    Attributes:
        width: Width of an expert, W.
        gates: What a gate reads. token: the vector of each token, by a linear map of the task's own; task: only the task.
        activation: A key of models.layers.ACTIVATIONS.
        target: A regular expression for the linear maps after which the experts are.
    """

    width: int = 16
    gates: str = PER_TOKEN
    activation: str = "gelu"
    target: str = r".*/feed_forward_out"

    order: ClassVar[int] = 2

    @property
    @abc.abstractmethod
    def shared_experts(self) -> int:
        """How many experts all tasks share."""

    @property
    def own_experts(self) -> int:
        """How many experts each task has for itself."""
        return 0

    @property
    def all_experts(self) -> int:
        """E, the experts that a row passes."""
        return self.shared_experts + self.own_experts

    def check(self) -> None:
        self.at_least("width", 1)
        self.one_of("gates", GATES)
        self.one_of("activation", ACTIVATIONS)

    def where(self, layers: Mapping[str, Layer]) -> list[Layer]:
        return self.matching(layers, self.target)

    def init(self, key: jax.Array, layer: Layer) -> dict[str, jax.Array]:
        return self._experts(key, layer, self.shared_experts, "")

    def init_own(self, key: jax.Array, layer: Layer) -> dict[str, jax.Array]:
        expert_key, gate_key = jax.random.split(key)
        own = self._experts(expert_key, layer, self.own_experts, OWN_EXPERTS) if self.own_experts else {}
        return {**own, **self.init_gate(gate_key, layer)}

    def init_gate(self, key: jax.Array, layer: Layer) -> dict[str, jax.Array]:
        """Initial parameters of one task's gate: equal weights for all experts."""
        return {"gate": jnp.zeros((layer.outputs, self.all_experts) if self.gates == PER_TOKEN else self.all_experts)}

    def gate(self, params: Params, y_BxTxO: jax.Array) -> jax.Array:
        """The weights of the experts: f32[B, T, E], or f32[B, 1, E] if the gate reads no tokens."""
        return jax.nn.softmax(self.read(params["gate"], y_BxTxO))

    def read(self, leaf: jax.Array, y_BxTxO: jax.Array) -> jax.Array:
        """The numbers of a gate, float32: a product with the tokens' vectors for [B, O, ...], unchanged for [B, 1, ...]."""
        if self.gates == PER_TOKEN:
            return times(y_BxTxO, leaf.astype(y_BxTxO.dtype)).astype(jnp.float32)
        return leaf

    def around(self, params: Params, call: Call) -> Any:
        y_BxTxO = call()
        gate_BxTxE = self.gate(params, y_BxTxO)
        call.show("gate", gate_BxTxE, expert_names(self.shared_experts, self.own_experts))
        gate_BxTxE = gate_BxTxE.astype(y_BxTxO.dtype)
        shared, own = jnp.split(gate_BxTxE, [self.shared_experts], axis=-1)
        change = self._change(params, "", shared, y_BxTxO)
        if self.own_experts:
            change += self._change(params, OWN_EXPERTS, own, y_BxTxO)
        return y_BxTxO + change

    def _experts(self, key: jax.Array, layer: Layer, count: int, prefix: str) -> dict[str, jax.Array]:
        """Initial parameters of several experts, side by side."""
        inner = count * self.width
        return {
            f"{prefix}down_kernel": jax.random.normal(key, (layer.outputs, inner)) * layer.outputs**-0.5,
            f"{prefix}down_bias": jnp.zeros(inner),
            f"{prefix}up_kernel": jnp.zeros((inner, layer.outputs)),
            f"{prefix}up_bias": jnp.zeros((count, layer.outputs)),
        }

    def _change(self, params: Params, prefix: str, gate_BxTxE: jax.Array, y_BxTxO: jax.Array) -> jax.Array:
        """The weighted sum of the outputs of several experts, by one product: each is weighted before its last map."""
        names = ("down_kernel", "down_bias", "up_kernel", "up_bias")
        down, down_bias, up, up_bias = (params[f"{prefix}{name}"].astype(y_BxTxO.dtype) for name in names)
        inner = ACTIVATIONS[self.activation](times(y_BxTxO, down) + down_bias)
        by_expert = inner.reshape(*inner.shape[:2], gate_BxTxE.shape[-1], self.width) * gate_BxTxE[..., None]
        return times(by_expert.reshape(inner.shape), up) + times(gate_BxTxE, up_bias)


def expert_names(shared: int, own: int) -> tuple[str, ...]:
    """Names of experts, for reports.

    >>> expert_names(2, 0), expert_names(1, 1)
    (('expert 1', 'expert 2'), ('shared 1', 'own 1'))
    """
    kinds = [("shared" if own else "expert", shared), ("own", own)]
    return tuple(f"{kind} {number}" for kind, count in kinds for number in range(1, count + 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MMoE(Experts):
    """Experts that all tasks share, and a softmax gate for each task (Ma et al. 2018, multi-gate mixture of experts).

        Experiment(..., sharing=MMoE(experts=4, width=16))

    Attributes:
        experts: How many experts, E.
    """

    experts: int = 4

    @property
    def shared_experts(self) -> int:
        return self.experts

    def check(self) -> None:
        super().check()
        self.at_least("experts", 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CGC(Experts):
    """Shared experts, experts of each task's own, and a gate of each task over both (Tang et al. 2020, section 4.1).

    At every layer a row passes the shared experts and those of its task. PLE has a separate shared stream.

        Experiment(..., sharing=CGC(shared=2, own=1, width=16))

    Attributes:
        shared: Experts of all tasks.
        own: Experts of each task.
    """

    shared: int = 2
    own: int = 1

    @property
    def shared_experts(self) -> int:
        return self.shared

    @property
    def own_experts(self) -> int:
        return self.own

    def check(self) -> None:
        super().check()
        self.at_least("shared", 1)
        self.at_least("own", 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DSelectK(Experts):
    """Shared experts, of which each task's gate selects at most k, by a smooth function (Hazimeh et al. 2021, DSelect-k).

    An expert's number in binary is its code. A selector has a number for each bit, which a smooth step maps to 0..1. The
    product over the bits is the selector's weight of an expert, and the gate is the mean of the selectors, weighted by a
    softmax. Once every bit is 0 or 1, each selector has chosen one expert. The paper's entropy term, which only makes this
    faster, is left out.

        Experiment(..., sharing=DSelectK(experts=4, selected=2))

    Attributes:
        experts: How many experts, E; a power of two.
        selected: The most experts of a task, S.
        gamma: Width of the smooth step.
    """

    experts: int = 4
    selected: int = 2
    gamma: float = 1.0

    @property
    def shared_experts(self) -> int:
        return self.experts

    @property
    def bits(self) -> int:
        """C, the bits of an expert's code."""
        return self.experts.bit_length() - 1

    def check(self) -> None:
        super().check()
        self.at_least("experts", 2)
        self.at_least("selected", 1)
        if self.experts & (self.experts - 1):
            raise UserError(f"sharing: experts of DSelectK is {self.experts}; it must be a power of two, such as 4 or 8")
        if self.selected > self.experts:
            raise UserError(f"sharing: selected of DSelectK is {self.selected}, more than its {self.experts} experts")
        if not self.gamma > 0:
            raise UserError(f"sharing: gamma of DSelectK is {self.gamma}; it must be above 0")

    def init_gate(self, key: jax.Array, layer: Layer) -> dict[str, jax.Array]:
        S, C = self.selected, self.bits
        inside = (layer.outputs,) if self.gates == PER_TOKEN else ()
        scale = self.gamma / 100 / (layer.outputs**0.5 if inside else 1.0)
        code = jax.random.uniform(key, (*inside, S * C), minval=-scale, maxval=scale)  # in the middle of the step
        return {"code": code, "selector": jnp.zeros((*inside, S))}

    def gate(self, params: Params, y_BxTxO: jax.Array) -> jax.Array:
        code = self.read(params["code"], y_BxTxO)
        step_BxTxSxC = smooth_step(code.reshape(*code.shape[:2], self.selected, self.bits), self.gamma)
        ones_ExC = (np.arange(self.experts)[:, None] >> np.arange(self.bits)) & 1
        of_bits = jnp.where(ones_ExC == 1, step_BxTxSxC[..., None, :], 1.0 - step_BxTxSxC[..., None, :])
        selector_BxTxS = jax.nn.softmax(self.read(params["selector"], y_BxTxO))
        return (selector_BxTxS[..., None] * of_bits.prod(axis=-1)).sum(axis=-2)


def smooth_step(x: jax.Array, gamma: float) -> jax.Array:
    """0 below -gamma / 2, 1 above gamma / 2, and a cubic with continuous slope between (Hazimeh et al. 2021, equation 3).

    >>> smooth_step(jnp.array([-1.0, 0.0, 1.0]), 1.0).tolist()
    [0.0, 0.5, 1.0]
    """
    x = jnp.clip(x, -gamma / 2, gamma / 2)
    return -2 / gamma**3 * x**3 + 3 / (2 * gamma) * x + 0.5
