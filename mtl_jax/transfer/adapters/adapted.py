"""A trunk with adapters: the trunk's own code runs, and the calls of its layers are intercepted.

Shapes in names: B rows, N sources.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_jax.core import trees
from mtl_jax.core.errors import UserError, count, listed
from mtl_jax.models.layers import Attention, Embed
from mtl_jax.models.modernbert import RotaryAttention
from mtl_jax.models.seq2seq_layers import Embeddings
from mtl_jax.transfer.adapters.base import RUN, TASK, Adapter, Call, Layer
from mtl_jax.transfer.adapters.prefix import Prefix
from mtl_jax.transfer.adapters.prompt_tuning import ROOT, WORDS

ADAPTERS = "adapters"


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A linen module with adapters, used like the module: init(key, ids), apply({"params": ...}, ids, mask, ...).

    Its parameters are the module's and, beside them, {"adapters": {name: {layer: ...}}}.

    Attributes:
        base: The module, unchanged.
        adapters: The adapters.
        sources: N, for adapters with parameters for each source.
    """

    base: nn.Module
    adapters: tuple[Adapter, ...]
    sources: int = 1

    @property
    def config(self) -> Any:
        """The module's sizes."""
        return self.base.config

    @property
    def dtype(self) -> Any:
        """The compute dtype of the module."""
        return self.base.dtype

    @functools.cached_property
    def layers(self) -> dict[str, Layer]:
        """The layers that can be adapted, by path."""
        layers: dict[str, Layer] = {}

        def record(next_call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            if context.method_name == "__call__":
                layer = _layer("/".join(context.module.path), context.module, args)
                if layer is not None:
                    layers[layer.path] = layer
            return next_call(*args, **kwargs)

        with nn.intercept_methods(record):
            jax.eval_shape(lambda: self.base.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
        words = next((layer for layer in layers.values() if layer.kind == WORDS), None)
        return layers if words is None else {**layers, "": words._replace(kind=ROOT)}

    @functools.cached_property
    def where(self) -> dict[str, list[Layer]]:
        """{adapter: the layers that have its parameters}.

        Raises:
            UserError: An adapter has no layer in this module.
        """
        return {adapter.name: adapter.where(self.layers) for adapter in self.adapters}

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
                own = {
                    name.removeprefix(f"{layer.path}/"): leaf
                    for name, leaf in trunk.items()
                    if name.startswith(f"{layer.path}/")
                }
                path = f"{adapter.name}/{layer.path}"
                layer_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
                if adapter.per == RUN:
                    added[path] = adapter.start(layer_key, layer, own)
                else:
                    start = jax.vmap(lambda key, adapter=adapter, layer=layer, own=own: adapter.start(key, layer, own))
                    keys = jax.random.split(layer_key, self.sources)
                    added[path] = jax.tree.map(_stack, start(keys))
        return {**params, ADAPTERS: trees.nested(added)}

    def apply(
        self,
        variables: Mapping[str, Any],
        *args: Any,
        rngs: dict[str, jax.Array] | None = None,
        source: jax.Array | None = None,
        **kwargs: Any,
    ) -> Any:
        """The module's apply() with adapters.

        Args:
            variables: {"params": ...}.
            *args: Arguments of the module.
            rngs: As in linen; with deterministic=False adapters, too, draw their dropout from "dropout".
            source: i32[B], the source of each row, if sources have their own adapters; a row without a source, -1, gets those
                of source 0.
            **kwargs: Arguments of the module by name.

        Raises:
            ValueError: The parameters have no adapters, or source or an rng is missing.
        """
        params = dict(variables["params"])
        if ADAPTERS not in params:
            raise ValueError("these parameters have no adapters; add() adds new ones")
        added = params.pop(ADAPTERS)
        by_layer = {adapter.name: self._by_layer(adapter, trees.flat(added[adapter.name]), source) for adapter in self.adapters}
        key = None if kwargs.get("deterministic", True) else (rngs or {}).get("dropout")
        if (
            key is None
            and not kwargs.get("deterministic", True)
            and any(getattr(adapter, "dropout", 0) for adapter in self.adapters)
        ):
            raise ValueError('adapters have dropout, so apply() needs an rng named "dropout" unless deterministic')
        nearest_first, layers = sorted(self.adapters, key=lambda adapter: adapter.order), self.layers

        def intercept(next_call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            layer = layers.get("/".join(context.module.path)) if context.method_name == "__call__" else None
            if layer is None:
                return next_call(*args, **kwargs)
            call: Callable[..., Any] = next_call
            for adapter in nearest_first:
                layer_params = by_layer[adapter.name].get(adapter.uses(layer))
                if layer_params is not None:
                    call = _around(adapter, layer_params, layer, context.module, call, key)
            return call(*args, **kwargs)

        with nn.intercept_methods(intercept):
            return self.base.apply({**variables, "params": params}, *args, rngs=rngs, **kwargs)

    def _by_layer(self, adapter: Adapter, flat: Mapping[str, Any], source: jax.Array | None) -> dict[str, dict[str, jax.Array]]:
        """{layer: parameters}; if sources have their own, the parameters of each row's source."""
        by_layer: dict[str, dict[str, jax.Array]] = {}
        for path, leaf in flat.items():
            layer, _, name = path.rpartition("/")
            by_layer.setdefault(layer, {})[name] = leaf
        if adapter.per == RUN:
            return by_layer
        if source is None:
            raise ValueError(f"adapter {adapter.name!r}: each source has its own, so apply() needs the source of every row")
        # A product, since the gradient of indexing is summed in no fixed order on GPUs.
        chosen_BxN = jax.nn.one_hot(jnp.maximum(source, 0), self.sources)
        return {
            layer: {name: self._chosen(leaf, chosen_BxN) for name, leaf in params.items()} for layer, params in by_layer.items()
        }

    def _chosen(self, leaf: jax.Array, chosen_BxN: jax.Array) -> jax.Array:
        stack = leaf.reshape(self.sources, 1, -1) if leaf.ndim == 1 else leaf
        return jnp.einsum("bn,n...->b...", chosen_BxN, stack, precision="highest")


class OfSource(nn.Module):
    """A trunk with adapters as a linen module, for use inside a module without sources: all rows are of one source.

    Attributes:
        adapted: The trunk.
        source: The number of the source.
    """

    adapted: Adapted
    source: int = 0

    @property
    def config(self) -> Any:
        """The trunk's sizes."""
        return self.adapted.config

    @property
    def dtype(self) -> Any:
        """The compute dtype of the trunk."""
        return self.adapted.dtype

    def __call__(self, input_ids: jax.Array, *args: Any, **kwargs: Any) -> Any:
        """The trunk's output; the arguments are those of the trunk."""
        rows_B = jnp.full(len(input_ids), self.source)
        return self.adapted.apply({"params": self.variables["params"]}, input_ids, *args, source=rows_B, **kwargs)


def as_module(trunk: nn.Module | Adapted, source: int) -> nn.Module:
    """A trunk for use inside another linen module: itself, or, if it has adapters, the trunk with those of one source."""
    return OfSource(trunk, source) if isinstance(trunk, Adapted) else trunk


def adapt(module: nn.Module, adapters: Sequence[Adapter], sources: int = 1) -> Adapted:
    """A trunk with adapters: BERT, RoBERTa, DistilBERT, ELECTRA, ModernBERT, or the encoder of Marian, BART, T5.

    With optax alone:

        checkpoint = mtl_jax.pretrained.load("path", head=None)
        module = adapt(checkpoint.model.trunk, [Lora(name="lora", rank=8)])
        params = module.add(checkpoint.params["trunk"], jax.random.key(0))
        frozen, added = params, params["adapters"]
        optimizer = optax.adam(1e-3)
        state = optimizer.init(added)

        def loss(added):
            return objective(module.apply({"params": {**frozen, "adapters": added}}, ids, mask).hidden)

        updates, state = optimizer.update(jax.grad(loss)(added), state, added)
        added = optax.apply_updates(added, updates)

    Args:
        module: The trunk: a linen module with the attention of models.layers or models.modernbert, and nn.Dense.
        adapters: The adapters.
        sources: Number of sources, for adapters with parameters for each source.

    Raises:
        UserError: A field is refused, two adapters have one name, or one has no layer in the module.
    """
    check(adapters)
    adapted = Adapted(module, tuple(adapters), sources)
    check_alone(adapters, adapted.where)  # where raises if an adapter has no layer
    return adapted


def check_alone(adapters: Sequence[Adapter], where: Mapping[str, Sequence[Layer]]) -> None:
    """Raises UserError if two adapters are at one layer, and are of a kind of which it has at most one."""
    at_layer: dict[str, str] = {}
    for adapter in adapters:
        for layer in where[adapter.name] if adapter.alone else ():
            if layer.path in at_layer:
                raise UserError(
                    f"adapters {at_layer[layer.path]!r} and {adapter.name!r} are both at {layer.path}, and a layer has at most "
                    f"one {type(adapter).__name__}: give one of them another target"
                )
            at_layer[layer.path] = adapter.name


def check(adapters: Sequence[Adapter], sources: Mapping[str, str] | None = None) -> None:
    """Checks adapters without a trunk.

    Args:
        adapters: The adapters.
        sources: {task: its source}; None: not known.

    Raises:
        UserError: One line that names the adapter.
    """
    names = [adapter.name for adapter in adapters]
    for adapter in adapters:
        if names.count(adapter.name) > 1:
            raise UserError(f"adapter names must differ: {adapter.name!r} stands twice")
        if not adapter.name or not adapter.name.replace("-", "_").isidentifier() or not adapter.name.isascii():
            raise UserError(f"adapter name {adapter.name!r}: use letters, digits, '_' and '-' only, a letter first")
        adapter.check()
        if adapter.per == TASK and sources is not None:
            used = list(sources.values())
            sharing = [task for task, source in sources.items() if used.count(source) > 1]
            if sharing:
                raise UserError(
                    f"adapter {adapter.name!r}: per is task, but tasks {', '.join(sharing[:2])} share the rows of source "
                    f"{sources[sharing[0]]!r}, which pass the trunk once: say per source, or declare the same file as a "
                    "second source"
                )
    prefixes = [adapter.name for adapter in adapters if isinstance(adapter, Prefix)]
    if len(prefixes) > 1:
        raise UserError(f"adapters {listed(prefixes)} are all prefixes: declare one, as long as they are together")


def notes(adapted: Adapted, params: Mapping[str, Any]) -> list[str]:
    """A line for each adapter with its numbers of layers and parameters, and what shares them.

    Args:
        adapted: The trunk.
        params: Its parameters, with {"adapters": ...}.
    """
    lines = []
    for adapter in adapted.adapters:
        size = sum(leaf.size for leaf in jax.tree.leaves(params[ADAPTERS][adapter.name]))
        shared = "for all rows alike" if adapter.per == RUN else f"for each of {count(adapted.sources, 'source')} its own"
        kind, places = type(adapter).__name__, len(adapted.where[adapter.name])
        lines.append(f"adapter {adapter.name}: {kind} at {count(places, 'layer')}, {count(size, 'parameter')}, {shared}")
    return lines


def _layer(path: str, module: nn.Module, args: tuple[Any, ...]) -> Layer | None:
    if isinstance(module, nn.Dense):
        return Layer(path, "dense", inputs=args[0].shape[-1], outputs=module.features)
    if isinstance(module, Attention):
        return Layer(path, "attention", heads=module.num_heads, head_size=module.head_size)
    if isinstance(module, RotaryAttention):
        return Layer(path, "rotary", heads=module.config.num_heads, head_size=module.config.head_size)
    if isinstance(module, Embed) and path.endswith("embeddings/word"):
        return Layer(path, WORDS, outputs=module.features)
    if isinstance(module, Embeddings):
        return Layer(path, WORDS, outputs=module.config.hidden_size)
    return None


def _below(flat: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {path.removeprefix(prefix): leaf for path, leaf in flat.items() if path.startswith(prefix)}


def _around(
    adapter: Adapter, params: dict[str, jax.Array], layer: Layer, module: nn.Module, call: Any, key: jax.Array | None
) -> Callable[..., Any]:
    layer_key = None if key is None else jax.random.fold_in(key, zlib.crc32(f"{adapter.name}/{layer.path}".encode()))
    return lambda *args, **kwargs: adapter.around(params, Call(layer, module, call, args, kwargs, layer_key))


def _stack(leaf: jax.Array) -> jax.Array:
    # The vectors of all sources become one vector, since weight decay is for leaves of two or more dimensions only.
    return leaf.reshape(-1) if leaf.ndim == 2 else leaf


def merge_adapters(adapted: Adapted, params: Mapping[str, Any], source: int | None = None) -> dict[str, Any]:
    """The parameters of the module with its adapters merged into them, such as W + (alpha / rank) A B; without dropout.

    Args:
        adapted: The module with adapters, all of which have merged(): Lora and its relatives, IA3.
        params: Its parameters, with {"adapters": ...}.
        source: The source whose adapters are merged, if sources have their own.

    Raises:
        UserError: An adapter cannot be merged, or source is missing.
    """
    base = trees.flat({name: tree for name, tree in params.items() if name != ADAPTERS})
    for adapter in sorted(adapted.adapters, key=lambda adapter: adapter.order):
        if adapter.per != RUN and source is None:
            raise UserError(f"adapter {adapter.name!r}: each source has its own; say of which task it is to be merged")
        for layer in adapted.where[adapter.name]:
            layer_params: Any = params[ADAPTERS][adapter.name]
            for name in layer.path.split("/"):
                layer_params = layer_params[name]
            if adapter.per != RUN:
                layer_params = jax.tree.map(lambda leaf: of_source(leaf, adapted.sources, source), layer_params)
            kernel = {name: base[f"{layer.path}/{name}"] for name in ("kernel", "bias") if f"{layer.path}/{name}" in base}
            base |= {f"{layer.path}/{name}": leaf for name, leaf in adapter.merged(layer_params, kernel, layer).items()}
    return trees.nested(base)


def of_source(leaf: jax.Array, sources: int, source: int | None) -> jax.Array:
    """The parameter of one source, out of those of all sources."""
    return leaf.reshape(sources, -1)[source] if leaf.ndim == 1 else leaf[source]
