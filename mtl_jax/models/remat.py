"""Rematerialisation: the backward pass computes the inside of a layer again, in place of keeping it (Chen et al., 2016).

A layer is a linen module whose class says `is_layer = True`, in a trunk of ours or of your own, or in a decoder. Parameters,
random numbers and the module's code are the same; only what is kept between the passes differs.
"""

from __future__ import annotations

import contextlib
from typing import Any

import flax.linen as nn
import jax

from mtl_jax.models import traced

# {choice of Experiment.remat: which numbers inside a layer are kept}; of "none" all are, and there is nothing to do.
POLICIES: dict[str, Any] = {"layers": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
CHOICES = ("none", *POLICIES)


def rematerialised(choice: str) -> contextlib.AbstractContextManager[Any]:
    """Within this context, calls of layers are rematerialised.

    Args:
        choice: none; layers: of each layer only its inputs are kept; dots: and the results of products with its weights.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> class Layer(nn.Module):
    ...     is_layer = True
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         return x + nn.tanh(nn.Dense(4)(x))
    >>> layer, x = Layer(), jnp.ones((2, 4))
    >>> params = layer.init(jax.random.key(0), x)
    >>> def loss(params):
    ...     with rematerialised("layers"):
    ...         return layer.apply(params, x).sum()
    >>> "remat" in str(jax.make_jaxpr(jax.grad(loss))(params))
    True
    """
    if choice == "none":
        return contextlib.nullcontext()
    inside: set[tuple[str, ...]] = set()  # paths of the layers that are being traced, whose calls come here a second time

    def intercept(next_call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        layer, path = context.module, context.module.path
        if context.method_name != "__call__" or not is_layer(layer) or path in inside:
            return next_call(*args, **kwargs)
        # Flags and absent arguments decide the program, so they are no inputs of it.
        arrays = [number for number, argument in enumerate(args) if not isinstance(argument, (bool, int, type(None)))]

        def call(layer: Any, *given: Any) -> Any:
            values = dict(zip(arrays, given, strict=True))
            inside.add(path)
            try:
                return layer(*(values.get(number, argument) for number, argument in enumerate(args)), **kwargs)
            finally:
                inside.discard(path)

        return nn.remat(call, policy=POLICIES[choice])(layer, *(args[number] for number in arrays))

    return nn.intercept_methods(intercept)


def has_layers(module: nn.Module) -> bool:
    """Whether a trunk has layers; its parameters are not made."""
    return any(getattr(call.kind, "is_layer", False) is True for call in traced.calls(module))


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a whole layer."""
    return getattr(type(module), "is_layer", False) is True
