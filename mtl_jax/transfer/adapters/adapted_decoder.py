"""A decoder with adapters: a Decoder like any other, so that teacher forcing, caches and beams need no other code.

Its parameters are the decoder's and, beside them, {"adapters": {name: {layer: ...}}}, as those of an adapted trunk.
"""

from __future__ import annotations

import contextlib
import functools
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_jax.core import trees
from mtl_jax.core.errors import UserError
from mtl_jax.models.seq2seq_decoder import Cache, Decoder, DecoderOutput, Source
from mtl_jax.models.seq2seq_layers import Embeddings, Seq2SeqConfig
from mtl_jax.transfer.adapters.adaptable import layer_of
from mtl_jax.transfer.adapters.adapted import ADAPTERS, around
from mtl_jax.transfer.adapters.adapting import check, check_alone
from mtl_jax.transfer.adapters.base import RUN, Adapter, Layer
from mtl_jax.transfer.adapters.stacks import below

OUTPUT = "lm_head"  # the layer of the logits, which beam search reads as a matrix


class AdaptedDecoder(Decoder):
    """A decoder with adapters.

    Attributes:
        adapters: The adapters; all rows share them.
    """

    adapters: tuple[Adapter, ...] = ()

    def source(self, hidden_BxTxH: jax.Array, real_BxT: jax.Array | None, segments_BxT: jax.Array | None) -> Source:
        """The part of the encoder's output f[B, T, H] that the decoder reads."""
        with self._adapted(None):
            return super().source(hidden_BxTxH, real_BxT, segments_BxT)

    def __call__(
        self,
        ids_BxU: jax.Array,
        source: Source,
        table_VxH: jax.Array,
        real_BxU: jax.Array | None = None,
        positions_BxU: jax.Array | None = None,
        segments_BxU: jax.Array | None = None,
        cache: Cache | None = None,
        step: jax.Array | int = 0,
        deterministic: bool = True,
        ancestry_BxKxL: jax.Array | None = None,
    ) -> DecoderOutput:
        """As Decoder."""
        draws = not deterministic and any(getattr(adapter, "dropout", 0) for adapter in self.adapters)
        row = (ids_BxU, source, table_VxH, real_BxU, positions_BxU, segments_BxU)
        with self._adapted(self.make_rng("dropout") if draws else None):
            return super().__call__(*row, cache, step, deterministic, ancestry_BxKxL)

    def _adapted(self, key: jax.Array | None) -> contextlib.AbstractContextManager[Any]:
        """Within this context, the calls of the decoder's layers are those with adapters."""
        added = self.variables["params"].get(ADAPTERS)
        if added is None:  # the decoder's own parameters are being made
            return contextlib.nullcontext()
        layers, depth = layers_of(self.config), len(self.path)
        nearest_first = sorted(self.adapters, key=lambda adapter: adapter.order)
        by_layer: dict[tuple[str, str], dict[str, jax.Array]] = {}
        for adapter in nearest_first:
            for path, leaf in trees.flat(added[adapter.name]).items():
                layer_path, _, name = path.rpartition("/")
                by_layer.setdefault((adapter.name, layer_path), {})[name] = leaf

        def intercept(next_call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            path = context.module.path[depth:]
            layer = layers.get("/".join(path)) if context.method_name == "__call__" and path else None
            if layer is None:
                return next_call(*args, **kwargs)
            call = next_call
            for adapter in nearest_first:
                params = by_layer.get((adapter.name, adapter.uses(layer)))
                if params is not None:
                    call = around(adapter, params, layer, context.module, call, key)
            return call(*args, **kwargs)

        return nn.intercept_methods(intercept)


@functools.lru_cache(maxsize=32)
def layers_of(config: Seq2SeqConfig) -> Mapping[str, Layer]:
    """The layers of a decoder that can be adapted, by path."""
    layers: dict[str, Layer] = {}

    def record(next_call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        path = "/".join(context.module.path)
        if context.method_name == "__call__" and path != OUTPUT:
            is_embeddings = isinstance(context.module, Embeddings)
            layer = Layer(path, "positions") if is_embeddings else layer_of(path, context.module, args)
            layers.update({} if layer is None else {path: layer})
        return next_call(*args, **kwargs)

    def run(decoder: Decoder) -> Any:
        hidden_BxTxH, table_VxH = jnp.zeros((1, 1, config.hidden_size)), jnp.zeros((config.vocab_size, config.hidden_size))
        return decoder(jnp.zeros((1, 1), jnp.int32), decoder.source(hidden_BxTxH, None, None), table_VxH)

    with nn.intercept_methods(record):
        jax.eval_shape(lambda: Decoder(config).init(jax.random.key(0), method=run))
    return layers


def adapt_decoder(decoder: Decoder, adapters: Sequence[Adapter]) -> Decoder:
    """A decoder with adapters; itself without any.

    Args:
        decoder: The decoder.
        adapters: The adapters; what they target are paths inside the decoder, such as "layer_0/cross_attention/query".

    Raises:
        UserError: A field is refused, two adapters have one name, or one has no layer in the decoder.
    """
    if not adapters:
        return decoder
    check_adapters(adapters)
    layers = layers_of(decoder.config)
    check_alone(adapters, {adapter.name: adapter.where(layers) for adapter in adapters})
    return AdaptedDecoder(decoder.config, decoder.dtype, tuple(adapters))


def check_adapters(adapters: Sequence[Adapter]) -> None:
    """Checks adapters of a decoder without the decoder.

    Raises:
        UserError: A field is refused, or two adapters have one name.
    """
    check(adapters)
    for adapter in adapters:
        if adapter.per != RUN:
            raise UserError(f"adapter {adapter.name!r}: per is {adapter.per}, but a decoder is of one task: leave per at run")


def add_to_decoder(decoder: Decoder, params: Mapping[str, Any], key: jax.Array) -> dict[str, Any]:
    """The parameters of a decoder, such as pretrained ones, with new adapters beside them."""
    if not isinstance(decoder, AdaptedDecoder):
        return dict(params)
    flat, added = trees.flat(params), {}
    for adapter in decoder.adapters:
        for layer in adapter.where(layers_of(decoder.config)):
            path = f"{adapter.name}/{layer.path}"
            layer_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
            added[path] = adapter.start(layer_key, layer, below(flat, f"{layer.path}/"))
    return {**params, ADAPTERS: trees.nested(added)}


def merge_decoder(decoder: Decoder, params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a decoder with its adapters merged into them.

    Raises:
        UserError: An adapter cannot be merged.
    """
    base = trees.flat({name: tree for name, tree in params.items() if name != ADAPTERS})
    for adapter in sorted(getattr(decoder, "adapters", ()), key=lambda adapter: adapter.order):
        added = trees.flat(params[ADAPTERS][adapter.name])
        for layer in adapter.where(layers_of(decoder.config)):
            kernel = {name: leaf for name, leaf in below(base, f"{layer.path}/").items() if name in ("kernel", "bias")}
            merged = adapter.merged(below(added, f"{layer.path}/"), kernel, layer)
            base |= {f"{layer.path}/{name}": leaf for name, leaf in merged.items()}
    return trees.nested(base)
