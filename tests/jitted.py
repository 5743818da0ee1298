"""Modules as one program: operation by operation, each shape of each operation would be compiled by itself."""

import functools
from typing import Any

import flax.linen as nn
import jax


@functools.partial(jax.jit, static_argnums=0)
def _apply(module: nn.Module, variables: Any, args: tuple[Any, ...], arrays: dict[str, Any]) -> Any:
    return module.apply(variables, *args, **arrays)


def apply(module: nn.Module, params: Any, *args: Any, **arrays: Any) -> Any:
    """module.apply({"params": params}, ...), compiled once for equal modules and shapes."""
    return _apply(module, {"params": params}, args, arrays)
