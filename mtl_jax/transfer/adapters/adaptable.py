"""Which layers of a trunk can be adapted, found in one trace of its calls."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_jax.models.layers import Attention, Embed
from mtl_jax.models.llama import GroupedAttention
from mtl_jax.models.modernbert import RotaryAttention
from mtl_jax.models.remat import is_layer
from mtl_jax.models.seq2seq_layers import Embeddings
from mtl_jax.models.traced import remembered
from mtl_jax.transfer.adapters.base import ATTENTION, DENSE, ROTARY, WHOLE, Layer
from mtl_jax.transfer.adapters.prompt_tuning import ROOT, WORDS


@remembered
def adaptable_layers(base: nn.Module) -> dict[str, Layer]:
    """The layers of a module that can be adapted, by path, in the order of their calls."""
    layers: dict[str, Layer] = {}

    def record(next_call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if context.method_name == "__call__":
            layer = layer_of("/".join(context.module.path), context.module, args)
            if layer is not None:
                calls = layers[layer.path].calls + 1 if layer.path in layers else 1
                layers[layer.path] = layer._replace(calls=calls)
        return next_call(*args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(lambda: base.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    words = next((layer for layer in layers.values() if layer.kind == WORDS), None)
    return layers if words is None else {**layers, "": words._replace(kind=ROOT)}


def layer_of(path: str, module: nn.Module, args: tuple[Any, ...]) -> Layer | None:
    """The layer that a module is, by its call; None if it cannot be adapted."""
    if isinstance(module, nn.Dense):
        return Layer(path, DENSE, inputs=args[0].shape[-1], outputs=module.features)
    if isinstance(module, GroupedAttention):
        return Layer(path, ATTENTION, heads=module.config.kv_heads, head_size=module.config.head_size, rotated=True)
    if isinstance(module, Attention):
        return Layer(path, ATTENTION, heads=module.num_heads, head_size=module.head_size)
    if isinstance(module, RotaryAttention):
        return Layer(path, ROTARY, heads=module.config.num_heads, head_size=module.config.head_size, rotated=True)
    if is_layer(module):
        return Layer(path, WHOLE, inputs=args[0].shape[-1], outputs=args[0].shape[-1])
    if isinstance(module, Embed) and path.endswith("embeddings/word"):
        return Layer(path, WORDS, outputs=module.features)
    if isinstance(module, Embeddings):
        return Layer(path, WORDS, outputs=module.config.hidden_size)
    return None
