"""What tracing tells about a linen module: its parameters' shapes, its output and its calls, each found out once.

To trace a trunk takes a tenth of a second to seconds, and a run asks several times. Modules are equal where all their fields
are, so the answer for one holds for every equal one.

Shapes in names: B rows, T tokens a row, H width of the vectors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp

T = TypeVar("T")
Arguments = ParamSpec("Arguments")
KEPT = 128  # answers of each function


class Call(NamedTuple):
    """A call of a module inside another one.

    Attributes:
        path: Its names from the root: () is the root itself.
        kind: Its class.
    """

    path: tuple[str, ...]
    kind: type[nn.Module]


def remembered(function: Callable[Arguments, T]) -> Callable[Arguments, T]:
    """The function, which remembers its answers for equal arguments; it works anew where an argument has no hash.

    Args:
        function: Pure, and its result is not changed by those who get it.
    """
    answers: Callable[Arguments, T] = functools.lru_cache(KEPT)(function)  # type: ignore[assignment]

    @functools.wraps(function)
    def ask(*args: Arguments.args, **kwargs: Arguments.kwargs) -> T:
        try:
            hash(args)
        except TypeError:
            return function(*args, **kwargs)
        return answers(*args, **kwargs)

    return ask


@remembered
def shapes(module: nn.Module, inputs: tuple[str, ...] = ()) -> tuple[Any, Any]:
    """(output, variables) of module.init_with_output on token ids i32[1, 1], as ShapeDtypeStructs; nothing is computed.

    Args:
        module: The module.
        inputs: The names of further arguments that it needs, each i32[1, 1], too.

    Examples:
        >>> import flax.linen as nn
        >>> output, variables = shapes(nn.Embed(50, 8))
        >>> output.shape, variables["params"]["embedding"].shape
        ((1, 1, 8), (50, 8))
    """
    ids = jnp.zeros((1, 1), jnp.int32)
    further: dict[str, Any] = dict.fromkeys(inputs, ids)
    shapes: tuple[Any, Any] = jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), ids, **further))
    return shapes


@remembered
def calls(module: nn.Module) -> tuple[Call, ...]:
    """The calls of a module and of those inside it on token ids i32[1, 1], in their order.

    Examples:
        >>> import flax.linen as nn
        >>> [call.path for call in calls(nn.Sequential([nn.Embed(50, 8), nn.Dense(3)]))]
        [(), ('layers_0',), ('layers_1',)]
    """
    calls: list[Call] = []

    def record(next_call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if context.method_name == "__call__":
            calls.append(Call(context.module.path, type(context.module)))
        return next_call(*args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    return tuple(calls)
