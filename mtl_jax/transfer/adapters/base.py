"""What every kind of adapter is: a few parameters at some layers of a trunk, and what they do there.

Shapes in names: B rows, T tokens a row, I inputs of a linear map, O its outputs.
"""

from __future__ import annotations

import abc
import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax

from mtl_jax.core.configuration import Configuration
from mtl_jax.core.errors import NOT_A_PATTERN, UserError, listed, unknown
from mtl_jax.core.files import shown

RUN, SOURCE, TASK = SHARING = ("run", "source", "task")

Params = Mapping[str, jax.Array]


class Layer(NamedTuple):
    """A place in a trunk where an adapter can be.

    Attributes:
        path: Where it is, such as "layer_0/attention/query": a parameter's path without "trunk/" and the parameter's name.
        kind: "dense", a linear map; "attention", of models.layers; "rotary", of models.modernbert.
        inputs: I, of a linear map, else 0.
        outputs: O, of a linear map, else 0.
        heads: Of an attention, else 0.
        head_size: Of an attention, else 0.
    """

    path: str
    kind: str
    inputs: int = 0
    outputs: int = 0
    heads: int = 0
    head_size: int = 0


class Call(NamedTuple):
    """One call of a layer that an adapter may change.

    Attributes:
        layer: Which.
        module: The linen module, bound.
        next: The call itself, adapters that stand nearer to the layer included.
        args: Its arguments.
        kwargs: Its arguments by name.
        key: PRNG key for dropout; None: there is none.
    """

    layer: Layer
    module: Any
    next: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    key: jax.Array | None

    def __call__(self) -> Any:
        """The call as it would be without the adapter."""
        return self.next(*self.args, **self.kwargs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter(Configuration, abc.ABC):
    """A few parameters added to a trunk.

    Attributes:
        name: Its parameters are trunk/adapters/NAME/LAYER/... in the model.
        per: Who shares them. run: everything. task: each task has its own; every task needs a source of its own, since the rows
            of a source pass the trunk once. source: each source has its own, which its tasks share.
    """

    name: str
    per: str = RUN

    # Where several adapters change one layer, those with lower numbers stand nearer to it, in whatever order they are declared:
    # low-rank changes belong to the kernel, scales apply to what it gives, a bottleneck follows that, a prefix is around all.
    order: ClassVar[int] = 0

    def check(self) -> None:
        """Raises UserError where a field makes no sense."""
        if self.per not in SHARING:
            raise unknown(f"per of adapter {self.name!r}:", self.per, SHARING)

    @abc.abstractmethod
    def where(self, layers: Mapping[str, Layer]) -> list[Layer]:
        """The layers, of all that a trunk has by path, that have parameters of this adapter.

        Raises:
            UserError: There are none.
        """

    @abc.abstractmethod
    def init(self, key: jax.Array, layer: Layer) -> dict[str, jax.Array]:
        """Fresh parameters f32 for one of those layers."""

    @abc.abstractmethod
    def around(self, params: Params, call: Call) -> Any:
        """What a layer gives with the adapter.

        Args:
            params: What init() made; or for each row its own: matrices [B, ...], vectors [B, 1, ...].
            call: The call.
        """

    def uses(self, layer: Layer) -> str:
        """The path under which the parameters for a layer are, "" for none."""
        return layer.path

    def merged(self, params: Params, kernel: Mapping[str, Any], layer: Layer) -> dict[str, Any]:
        """The parameters of a linear map that does by itself what it did with this adapter; without dropout.

        Args:
            params: What init() made.
            kernel: {"kernel": f32[I, O], "bias": f32[O] if there is one}.
            layer: The linear map.

        Raises:
            UserError: A kernel cannot do that.
        """
        raise UserError(
            f"adapter {self.name!r} is a {type(self).__name__}, which cannot be put into the trunk's kernels, and transformers "
            "has no class for a trunk with it: only Lora and IA3 can be merged"
        )

    def _matching(self, layers: Mapping[str, Layer], pattern: str, kinds: tuple[str, ...] = ("dense",)) -> list[Layer]:
        """The layers of these kinds whose whole path the pattern matches.

        Raises:
            UserError: It is no regular expression, or there are none.
        """
        try:
            expression = re.compile(pattern)
        except NOT_A_PATTERN as error:
            raise UserError(f"adapter {self.name!r}: {shown(pattern)!r} is no regular expression ({error})") from error
        possible = [layer for layer in layers.values() if layer.kind in kinds]
        found = [layer for layer in possible if expression.fullmatch(layer.path)]
        if not found:
            there = sorted({re.sub(r"\d+", "N", layer.path) for layer in possible})
            raise UserError(
                f"adapter {self.name!r} finds no place in this trunk: {pattern!r} matches no layer; there are {listed(there)}"
                if there
                else f"adapter {self.name!r} finds no place in this trunk: it has no layers that could be adapted"
            )
        return found
