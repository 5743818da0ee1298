"""A trunk with adapters: the trunk's own code runs, and the calls of its layers are intercepted.

Shapes in names: B rows, N sources.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_jax.core import trees
from mtl_jax.core.errors import UserError, listed
from mtl_jax.transfer.adapters.adaptable import adaptable_layers
from mtl_jax.transfer.adapters.base import (
    COMMON,
    OWN,
    RUN,
    TASK,
    WHOLE,
    Adapter,
    Call,
    Inserted,
    Layer,
    Shown,
)
from mtl_jax.transfer.adapters.prompt_tuning import ROOT
from mtl_jax.transfer.adapters.routes import Routes, Rows, arguments_by_row, repeated
from mtl_jax.transfer.adapters.stacks import below, chosen_rows, has_own, stacked_copies, stacked_init, subtree

ADAPTERS = "adapters"


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A linen module with adapters, used like the module: init(key, ids), apply({"params": ...}, ids, mask, ...).

    Its parameters are the module's and, beside them, {"adapters": {name: {layer: ...}}}.

    Attributes:
        base: The module, unchanged.
        adapters: The adapters, and the sharing of a run whose tasks do not share all of the trunk.
        sources: N, for adapters with parameters for each source.
        routes: The tasks of every row; None: nothing in the trunk belongs to single tasks.
        owners: [N], for each source the one whose parameters its rows read; (): its own.
    """

    base: nn.Module
    adapters: tuple[Inserted, ...]
    sources: int = 1
    routes: Routes | None = None
    owners: tuple[int, ...] = ()

    @property
    def config(self) -> Any:
        """The module's sizes."""
        return self.base.config

    @property
    def dtype(self) -> Any:
        """The compute dtype of the module."""
        return self.base.dtype

    @property
    def copies(self) -> int:
        """How many copies of each row its output has, one after another; more than one only where tasks share a source."""
        return 1 if self.routes is None else self.routes.copies

    @property
    def copy_of(self) -> tuple[tuple[str, int], ...]:
        """(task, the copy of a row that its head reads), where there are several; else ()."""
        return self.routes.copy_of if self.routes is not None and self.copies > 1 else ()

    @property
    def layers(self) -> dict[str, Layer]:
        """The layers that can be adapted, by path, in the order of their calls."""
        return adaptable_layers(self.base)

    @functools.cached_property
    def where(self) -> dict[str, list[Layer]]:
        """{adapter: the layers that have its parameters}.

        Raises:
            UserError: An adapter has no layer in this module.
        """
        return {adapter.name: adapter.where(self.layers) for adapter in self.adapters}

    @property
    def has_parts_of_tasks(self) -> bool:
        """Whether anything in the trunk belongs to single tasks."""
        tasks = 0 if self.routes is None else len(self.routes.tasks)
        return any(
            self.by_task(adapter) or any(has_own(adapter, layer, tasks) for layer in self.where[adapter.name])
            for adapter in self.adapters
        )

    def by_task(self, adapter: Inserted) -> bool:
        """Whether the parameters of init() are stacked by task; else by source, or not at all."""
        return adapter.per == TASK and self.copies > 1

    def stacked(self, adapter: Inserted) -> int:
        """How many times the parameters of init() are there."""
        assert self.routes is not None or not self.by_task(adapter)
        return len(self.routes.tasks) if self.routes is not None and self.by_task(adapter) else self.sources

    @functools.cached_property
    def first_copied(self) -> str | None:
        """The path of the whole layer from which on a row has its copies; None: none is copied.

        Raises:
            UserError: Parameters of single tasks are outside of whole layers.
        """
        if self.routes is None or max(adapter.through(self.routes) for adapter in self.adapters) == 1:
            return None
        enclosing = {}
        for adapter in self.adapters:
            places, tasks = self.where[adapter.name], len(self.routes.tasks)
            everywhere = self.by_task(adapter) or any(
                has_own(adapter, place, tasks) for place in places if place.kind == COMMON
            )
            for place in places:
                if place.kind != COMMON and (everywhere or has_own(adapter, place, tasks)):
                    enclosing[place.path] = self.enclosing(place.path)
        outside = [path for path, whole in enclosing.items() if whole is None]
        if outside:
            raise UserError(
                f"tasks that share a source cannot have parameters of their own at {listed(outside)}, which is in no layer of "
                "the trunk: choose places inside layers, or declare the same file as a second source"
            )
        order = list(self.layers)
        return min((path for path in enclosing.values() if path is not None), key=order.index, default=None)

    def enclosing(self, path: str) -> str | None:
        """The path of the whole layer that a layer is a part of, or is."""
        whole = [layer.path for layer in self.layers.values() if layer.kind == WHOLE]
        return next((outer for outer in whole if path == outer or path.startswith(f"{outer}/")), None)

    @functools.cached_property
    def copied_layers(self) -> frozenset[str]:
        """The paths of the layers whose rows are copies."""
        if self.first_copied is None:
            return frozenset()
        order = list(self.layers)
        return frozenset(order[order.index(self.first_copied) :])

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """{"params": ...}: the parameters of the module's init(), and new adapters from the same key."""
        key = rngs["params"] if isinstance(rngs, Mapping) else rngs
        return {"params": self.add(self.base.init(rngs, *args, **kwargs)["params"], key)}

    def add(self, params: Mapping[str, Any], key: jax.Array) -> dict[str, Any]:
        """The parameters of the module, such as pretrained ones, with new adapters beside them."""
        added: dict[str, Any] = {}
        trunk = trees.flat(params)
        for adapter in self.adapters:
            for layer in self.where[adapter.name]:
                beneath = below(trunk, f"{layer.path}/")
                path = f"{adapter.name}/{layer.path}"
                layer_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
                if adapter.per == RUN:
                    added[path] = dict(adapter.start(layer_key, layer, beneath))
                else:
                    start = functools.partial(adapter.start, trunk=beneath)
                    added[path] = stacked_init(start, layer_key, layer, self.stacked(adapter))
                if self.routes is not None:
                    tasks = len(self.routes.tasks)
                    own_key = jax.random.fold_in(layer_key, zlib.crc32(OWN.encode()))
                    task_params = stacked_init(functools.partial(adapter.start_own, trunk=beneath), own_key, layer, tasks)
                    added[path] |= adapter.init_for(layer_key, layer, tasks)
                    added[path] |= {OWN: task_params} if task_params else {}
                    for name, copies in adapter.copied(layer, tasks).items():
                        whole = stacked_copies(subtree(params, layer.path), copies)
                        added[path][name] = {**added[path].get(name, {}), **whole}
        return {**params, ADAPTERS: trees.nested(added)}

    def apply(
        self,
        variables: Mapping[str, Any],
        *args: Any,
        rngs: dict[str, jax.Array] | None = None,
        shown: dict[str, dict[str, Shown]] | None = None,
        source: jax.Array | None = None,
        one_source: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The module's apply() with adapters.

        Args:
            variables: {"params": ...}.
            *args: Arguments of the module.
            rngs: As in linen; with deterministic=False adapters, too, draw their dropout from "dropout".
            shown: Is filled with the weights that the sharing shows, by layer and name; where it is traced, only the same trace
                may read them. None: they are not looked at.
            source: i32[B], the source of each row, if sources or tasks have their own adapters; a row without a source, -1,
                gets those of source 0.
            one_source: Whether all rows are of one source, which spares work where layers are copied.
            **kwargs: Arguments of the module by name.

        Returns:
            The module's output; where copies > 1, rows are [B copies], those of one row one after another.

        Raises:
            ValueError: The parameters have no adapters, or source or an rng is missing.
        """
        params = dict(variables["params"])
        if ADAPTERS not in params:
            raise ValueError("these parameters have no adapters; add() adds new ones")
        added = params.pop(ADAPTERS)
        rows = None
        if self.routes is not None:
            if source is None:
                raise ValueError("tasks have their own parameters, so apply() needs the source of every row")
            rows = self.routes.of(source, one_source)._replace(by_row=self._by_row(args, kwargs))
        by_layer = {adapter.name: self._by_layer(adapter, added[adapter.name], source, rows) for adapter in self.adapters}
        key = None if kwargs.get("deterministic", True) else (rngs or {}).get("dropout")
        if (
            key is None
            and not kwargs.get("deterministic", True)
            and any(getattr(adapter, "dropout", 0) for adapter in self.adapters)
        ):
            raise ValueError('adapters have dropout, so apply() needs an rng named "dropout" unless deterministic')
        nearest_first, layers = sorted(self.adapters, key=lambda adapter: adapter.order), self.layers
        memos: dict[str, dict[str, Any]] = {adapter.name: {} for adapter in self.adapters}
        outer: list[tuple[Any, ...]] = [()]  # the arguments of the layers that are being called
        calls: Counter[str] = Counter()

        def intercept(next_call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            layer = layers.get("/".join(context.module.path)) if context.method_name == "__call__" else None
            inside_copy = layer is not None and layer.kind == ROOT and type(context.module) is not type(self.base)
            if layer is None or inside_copy:
                return next_call(*args, **kwargs)
            if rows is not None and layer.kind == WHOLE and layer.path in self.copied_layers:
                args, kwargs = repeated((args, kwargs), rows.by_row[layer.path], rows.source_B.shape[0], self.through)
            call: Callable[..., Any] = next_call
            # A layer that is called again, as a shared one is, drops other numbers each time.
            call_key = key if key is None or not calls[layer.path] else jax.random.fold_in(key, calls[layer.path])
            calls[layer.path] += 1
            for adapter in nearest_first:
                layer_params = by_layer[adapter.name].get(adapter.uses(layer))
                if layer_params is not None:
                    about = (call_key, outer[-1], rows, memos[adapter.name], None if isinstance(adapter, Adapter) else shown)
                    call = around(adapter, layer_params, layer, context.module, call, *about)
            if layer.kind != WHOLE:
                return call(*args, **kwargs)
            outer.append(args)
            try:
                return call(*args, **kwargs)
            finally:
                outer.pop()

        with nn.intercept_methods(intercept):
            return self.base.apply({**variables, "params": params}, *args, rngs=rngs, **kwargs)

    def _by_row(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, tuple[bool, ...]]:
        """Rows.by_row, if a layer's rows or parameters are copied."""
        whole = any(layer.kind == WHOLE for places in self.where.values() for layer in places)
        return arguments_by_row(self.base, args, kwargs) if whole or self.copied_layers else {}

    @functools.cached_property
    def through(self) -> int:
        """How many copies of a row go through the copied layers."""
        return 1 if self.routes is None else max(adapter.through(self.routes) for adapter in self.adapters)

    def _by_layer(
        self, adapter: Inserted, added: Mapping[str, Any], source: jax.Array | None, rows: Rows | None
    ) -> dict[str, dict[str, Any]]:
        """{layer: parameters}; if sources or tasks have their own, those of each row."""
        by_layer: dict[str, dict[str, Any]] = {}
        common = subtree(added, adapter.common) if adapter.common else {}
        for layer in (layer for layer in self.where[adapter.name] if layer.kind != COMMON):
            params = dict(subtree(added, layer.path))
            task_params = {**common.get(OWN, {}), **params.pop(OWN, {})}
            params = {**{name: leaf for name, leaf in common.items() if name != OWN}, **params}
            copied = layer.path in self.copied_layers
            if adapter.per != RUN and self.by_task(adapter):
                task_params, params = params, {}
            elif adapter.per != RUN:
                if source is None:
                    raise ValueError(
                        f"adapter {adapter.name!r}: each source has its own, so apply() needs the source of every row"
                    )
                # A product, since the gradient of indexing is summed in no fixed order on GPUs.
                source_B = jnp.repeat(source, self.through, axis=0) if copied else source
                owner_B = jnp.maximum(source_B, 0)
                owner_B = jnp.asarray(self.owners)[owner_B] if self.owners else owner_B
                chosen_BxN = jax.nn.one_hot(owner_B, self.sources)
                params = {name: chosen_rows(leaf, chosen_BxN) for name, leaf in params.items()}
            if task_params and rows is not None:
                tasks = len(rows.routes.tasks)
                if adapter.by_row:
                    assert copied or rows.routes.copies == 1  # first_copied is the first layer with such parameters
                    chosen_BxK = jax.nn.one_hot(rows.task_BC, tasks)
                    task_params = {name: chosen_rows(leaf, chosen_BxK) for name, leaf in task_params.items()}
                params |= task_params if adapter.by_row else {OWN: task_params}
            by_layer[layer.path] = params
        return by_layer


def around(
    adapter: Inserted,
    params: dict[str, Any],
    layer: Layer,
    module: nn.Module,
    call: Any,
    key: jax.Array | None,
    outer: tuple[Any, ...] = (),
    rows: Rows | None = None,
    memo: dict[str, Any] | None = None,
    shown: dict[str, dict[str, Shown]] | None = None,
) -> Callable[..., Any]:
    """The call of a layer with an adapter around it; arguments as in Call."""
    layer_key = None if key is None else jax.random.fold_in(key, zlib.crc32(f"{adapter.name}/{layer.path}".encode()))
    about = (layer_key, outer, rows, {} if memo is None else memo, shown)
    return lambda *args, **kwargs: adapter.around(params, Call(layer, module, call, args, kwargs, *about))
