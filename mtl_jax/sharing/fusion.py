"""Attention over adapters that earlier runs have trained (AdapterFusion).

Shapes in names: B rows, T tokens a row, O width of the vectors that the adapters change, N adapters.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.core import trees
from mtl_jax.core.errors import UserError, count, listed, unknown
from mtl_jax.models.layers import times
from mtl_jax.sharing.base import NAME, Sharing, TrainedTrunk
from mtl_jax.sharing.task_adapters import TaskAdapters
from mtl_jax.transfer.adapters.adapted import ADAPTERS, Adapted
from mtl_jax.transfer.adapters.base import DENSE, RUN, TASK, Adapter, Call, Inserted, Layer, Params
from mtl_jax.transfer.adapters.bottleneck import Bottleneck
from mtl_jax.transfer.adapters.of_task import owner_of, params_at
from mtl_jax.transfer.freezing import ParamRule
from mtl_jax.transfer.param_rules import adapters_only

FUSED = "fused"  # the adapters of the earlier runs are trunk/adapters/sharing/LAYER/fused/run_N/...
# Fields in which the adapters of the earlier runs may differ from the declared one; their dropout is not used.
IRRELEVANT = ("name", "per", "dropout")
DEVIATION, NOISE = 0.02, 1e-6  # of query and key, and of value around the identity
PFEIFFER = Bottleneck(name="adapter", variant="pfeiffer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterFusion(Sharing):
    """Attention over the adapters of earlier runs (Pfeiffer et al. 2021, AdapterFusion).

    y + sum_n s_n V z_n, where y is the output of a linear map, y + z_n the output with adapter n, and s the softmax over n of
    (Q y) . (K z_n). Q, K and V are f32[O, O] at each of the adapter's layers. V starts as the identity plus a little noise, so
    that at first the outputs are about those with the mean of all adapters.

        adapter = Bottleneck(name="adapter", width=16, variant="pfeiffer")
        Experiment(
            ...,
            sharing=AdapterFusion(runs=("runs/movies", "runs/names"), adapter=adapter),
            phases=(Phase("fusion", 500, rules=fusion_only()),),
        )

    The adapters are read once, before the first step; then they are in the checkpoints, and the earlier runs are no longer
    needed. Their trunk must be this run's; adapters that were trained with adapters_only() fit the trunk as it was loaded.
    The paper's penalty for a V far from the identity is L2SP(shared="trunk/adapters/sharing/.*/value", beta=0.0).

    Attributes:
        runs: The workdirs of the earlier runs.
        adapter: The adapter that each of them has, of any kind at linear maps. Its name decides if a run has several alike.
        tasks: For each of the runs the task whose adapter is taken; "" if its adapter is for all rows; () if all of them are.
        own: Whether each task has its own Q, K and V.
    """

    runs: tuple[str, ...] = ()
    adapter: Adapter = PFEIFFER
    tasks: tuple[str, ...] = ()
    own: bool = True

    def check(self) -> None:
        self.adapter.check()
        if not self.runs:
            raise UserError("sharing: AdapterFusion needs runs: the workdirs of finished runs whose adapters are fused")
        if len(self.tasks) not in (0, len(self.runs)):
            raise UserError(
                f"sharing: tasks of AdapterFusion are {len(self.tasks)}, but {count(len(self.runs), 'run')}: name one for each "
                "run, empty where the run's adapter is for all rows"
            )

    @property
    def order(self) -> int:  # type: ignore[override]
        """The order of the adapter."""
        return self.adapter.order

    def earlier_runs(self) -> tuple[str, ...]:
        return self.runs

    def where(self, layers: Mapping[str, Layer]) -> list[Layer]:
        places = self.adapter.where(layers)
        other = [place.path for place in places if place.kind != DENSE]
        if other:
            raise UserError(
                f"sharing: adapter of AdapterFusion is a {type(self.adapter).__name__}, which is at {other[0]}; only adapters "
                "at linear maps can be fused"
            )
        return places

    def uses(self, layer: Layer) -> str:
        return self.adapter.uses(layer)

    def init(self, key: jax.Array, layer: Layer) -> dict[str, Any]:
        fused = {_name(number): self.adapter.init(jax.random.fold_in(key, number), layer) for number in range(len(self.runs))}
        return {FUSED: fused, **({} if self.own else new_attention(key, layer.outputs))}

    def init_own(self, key: jax.Array, layer: Layer) -> dict[str, jax.Array]:
        return new_attention(key, layer.outputs) if self.own else {}

    def around(self, params: Mapping[str, Any], call: Call) -> Any:
        y_BxTxO = call()

        def call_once(*args: Any, **kwargs: Any) -> Any:
            leaves, before = jax.tree.leaves((args, kwargs)), jax.tree.leaves((call.args, dict(call.kwargs)))
            same = len(leaves) == len(before) and all(map(operator.is_, leaves, before))
            if same:
                return y_BxTxO
            # A linen module can be called once in a pass, so a copy of it reads the input that the adapter has changed.
            copy, variables = call.module.clone(parent=None), {"params": call.module.variables["params"]}
            return copy.apply(variables, *args, **kwargs)

        inner = call._replace(next=call_once, key=None)
        adapted = [self.adapter.around(params[FUSED][_name(number)], inner) for number in range(len(self.runs))]
        z_BxTxNxO = jnp.stack([output - y_BxTxO for output in adapted], axis=2)
        query, key, value = (params[name].astype(y_BxTxO.dtype) for name in ("query", "key", "value"))
        mixed_BxTxO, weights_BxTxN = fuse(y_BxTxO, z_BxTxNxO, query, key, value)
        call.show("fusion", weights_BxTxN, [f"{number} {Path(run).name}" for number, run in enumerate(self.runs, 1)])
        return y_BxTxO + mixed_BxTxO

    def loaded(self, params: Mapping[str, Any], trunk: Mapping[str, Any], runs: Sequence[TrainedTrunk]) -> Mapping[str, Any]:
        leaves = trees.flat(params)
        for number, (run, task) in enumerate(zip(runs, self.tasks or [""] * len(runs), strict=True)):
            adapter = _alike(run, self.adapter)
            for layer in run.module.where[adapter.name]:
                for name, leaf in adapter_of(run, adapter, layer, task).items():
                    path = f"{layer.path}/{FUSED}/{_name(number)}/{name}"
                    if path not in leaves or leaves[path].shape != leaf.shape:
                        shape = "absent" if path not in leaves else f"of shape {leaves[path].shape}"
                        raise UserError(
                            f"sharing: runs of AdapterFusion: {name} of the adapter at {layer.path} is of shape {leaf.shape} "
                            f"in {run.name} and {shape} here: the run has another trunk"
                        )
                    leaves[path] = leaf
        return trees.nested(leaves)


def fuse(
    y_BxTxO: jax.Array, z_BxTxNxO: jax.Array, query: jax.Array, key: jax.Array, value: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """sum_n softmax_n((query y) . (key z_n)) value z_n, f[B, T, O]; and the softmax, f[B, T, N].

    Args:
        y_BxTxO: The vectors that the attention reads.
        z_BxTxNxO: The changes that it mixes.
        query: f[O, O], or f[B, O, O] for each row; the same holds for key and value.
        key: As query.
        value: As query.
    """
    # y Q K^T first, and the mean of the z_n before V: no matrix is applied to every z_n.
    asked_BxTxO = times(times(y_BxTxO, query), key.swapaxes(-1, -2))
    scores_BxTxN = jnp.einsum("bto,btno->btn", asked_BxTxO, z_BxTxNxO).astype(jnp.float32)
    weights_BxTxN = jax.nn.softmax(scores_BxTxN).astype(y_BxTxO.dtype)
    return times(jnp.einsum("btn,btno->bto", weights_BxTxN, z_BxTxNxO), value), weights_BxTxN


def new_attention(key: jax.Array, width: int) -> dict[str, jax.Array]:
    """Initial query, key and value, f32[O, O]."""
    keys = jax.random.split(key, 3)
    query, key_, noise = (jax.random.normal(part, (width, width)) for part in keys)
    return {"query": DEVIATION * query, "key": DEVIATION * key_, "value": jnp.eye(width) + NOISE * noise}


def fusion_only() -> tuple[ParamRule, ...]:
    """Rules for AdapterFusion: its attention and the heads train; the trunk and the adapters of earlier runs are frozen."""
    return (ParamRule(f"trunk/{ADAPTERS}/{NAME}/.*/{FUSED}/.*", train=False), *adapters_only())


def adapter_of(run: TrainedTrunk, adapter: Inserted, layer: Layer, task: str) -> Params:
    """The parameters of a run's adapter, or sharing, at a layer; of one task, if tasks or sources have their own.

    Raises:
        UserError: The task is unknown, missing, or not needed.
    """
    owner, where = owner_of(run.module, adapter, layer), f"sharing: tasks of AdapterFusion: {run.name}"
    if owner == RUN and task:
        raise UserError(f"{where} has one adapter for all rows, and {task!r} is named for it; leave it empty")
    if owner != RUN and not task:
        advice = f"name one of {listed(run.source_of)} for it"
        raise UserError(f"{where} has an adapter for each {TASK if owner == TASK else 'source'}; {advice}")
    if task and task not in run.source_of:
        raise unknown(f"task of {run.name} in tasks of AdapterFusion:", task, run.source_of)
    return params_at(run.module, adapter, run.params[ADAPTERS], layer, run.source_of.get(task), task or None)


def _alike(run: TrainedTrunk, declared: Adapter) -> Inserted:
    """The adapter of a run that is declared like `declared`; a sharing with an adapter for each task counts as one.

    Raises:
        UserError: There is none, or more than one.
    """
    adapters: list[tuple[Adapter, Inserted]] = [(adapter, adapter) for adapter in run.adapters]
    if isinstance(run.sharing, TaskAdapters):
        adapters.append((run.sharing.adapter, run.sharing))
    where = f"sharing: runs of AdapterFusion: {run.name}"
    if not adapters or not isinstance(run.module, Adapted):
        raise UserError(f"{where} has no adapter; name runs that trained one")
    differences = [difference(adapter, declared) for adapter, _ in adapters]
    alike = [inserted for (_, inserted), differing in zip(adapters, differences, strict=True) if not differing]
    if not alike:
        raise UserError(f"{where} has another adapter than the one declared here: {differences[0]}")
    named = [inserted for inserted in alike if inserted.name == declared.name]
    if len(alike) > 1 and not named:
        names = listed(inserted.name for inserted in alike)
        raise UserError(f"{where} has several such adapters ({names}); give adapter of AdapterFusion the name of one")
    return (named or alike)[0]


def difference(adapter: Adapter, declared: Adapter) -> str:
    """The first difference between two declarations of adapters, in words; "" if there is none that matters here."""
    if type(adapter) is not type(declared):
        return f"{adapter.name!r} is a {type(adapter).__name__}, not a {type(declared).__name__}"
    for field in dataclasses.fields(declared):
        values = getattr(adapter, field.name), getattr(declared, field.name)
        if field.name not in IRRELEVANT and values[0] != values[1]:
            return f"{field.name} of {adapter.name!r} is {values[0]!r}, not {values[1]!r}"
    return ""


def _name(number: int) -> str:
    return f"run_{number}"
