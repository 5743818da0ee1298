"""The interface of an adapter: its layers in a trunk, its parameters there, and how they change the layer's output.

Shapes in names: B rows, T tokens a row, I inputs of a linear map, O its outputs.
"""

from __future__ import annotations

import abc
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax

from mtl_jax.core.errors import NOT_A_PATTERN, UserError, listed, unknown
from mtl_jax.core.files import shown
from mtl_jax.core.parts import Part, origin_of
from mtl_jax.transfer.adapters.routes import Routes, Rows

RUN, SOURCE, TASK = SHARING = ("run", "source", "task")
DENSE, ATTENTION, ROTARY, WHOLE, COMMON = ("dense", "attention", "rotary", "layer", "common")  # kinds of layers
OWN = "own"  # parameters of each task alone are at .../LAYER/own/NAME, the others at .../LAYER/NAME

Params = Mapping[str, jax.Array]


class Layer(NamedTuple):
    """A place in a trunk where an adapter can be.

    Attributes:
        path: The path, such as "layer_0/attention/query": a parameter's path without "trunk/" and the parameter's name.
        kind: "dense", a linear map; "attention", as in models.layers; "rotary", as in models.modernbert; "layer", a whole
            layer, a module that says is_layer; "words", where tokens become vectors; "root", the whole module, whose path is
            that of "words"; "positions", a decoder's embeddings; "common", no place but parameters for several layers.
        inputs: I for a linear map, else 0.
        outputs: O for a linear map, the width of the vectors for words, else 0.
        heads: Number of heads of an attention, else 0.
        head_size: Size of a head of an attention, else 0.
        calls: How often the trunk calls it: more than once where layers are shared, as in ALBERT.
        rotated: Whether it is an attention with rotary positions.
    """

    path: str
    kind: str
    inputs: int = 0
    outputs: int = 0
    heads: int = 0
    head_size: int = 0
    calls: int = 1
    rotated: bool = False


class Shown(NamedTuple):
    """Weights that a layer shows.

    Attributes:
        weights: As for Call.show().
        columns: The names of the last axis.
    """

    weights: jax.Array
    columns: tuple[str, ...]


class Call(NamedTuple):
    """One call of a layer that an adapter may change.

    Attributes:
        layer: The layer.
        module: Its linen module, bound.
        next: The call itself, with the adapters that are nearer to the layer.
        args: Its arguments.
        kwargs: Its arguments by name.
        key: PRNG key for dropout; None: no dropout.
        outer: The arguments of the whole layer that this call is a part of; () outside of layers.
        rows: The tasks of the rows, where something in the trunk belongs to single tasks.
        memo: What an adapter keeps from one layer to the next, in one pass; by a key of its choice.
        shown: {layer: {name: weights}} so far, of a pass that looks at them; None in every other pass.
    """

    layer: Layer
    module: Any
    next: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    key: jax.Array | None
    outer: tuple[Any, ...] = ()
    rows: Rows | None = None
    memo: dict[str, Any] = {}  # noqa: RUF012  each pass gives its own
    shown: dict[str, dict[str, Shown]] | None = None

    def __call__(self) -> Any:
        """The result of the call without this adapter."""
        return self.next(*self.args, **self.kwargs)

    def show(self, name: str, weights: jax.Array, columns: Sequence[str] = ()) -> None:
        """Shows which weights a sharing uses at this layer, for metrics.jsonl and the report; nothing in a training step.

        Args:
            name: A name for the weights; each name once a layer.
            weights: Those of each token, f[..., T, E], or of each row, f[..., 1, E], whose first axes are the rows with their
                copies, one after another; or those of each task, f[K, E].
            columns: Names of the E numbers, without "/"; by default 1 to E.

        Raises:
            ValueError: There is not a name for each of the E numbers, or one has a "/".
        """
        if self.shown is None:
            return
        names = tuple(columns) or tuple(str(number) for number in range(1, weights.shape[-1] + 1))
        if len(set(names)) != weights.shape[-1] or any("/" in text for text in (name, *names)):
            need = f"{weights.shape[-1]} different names without '/' are needed"
            raise ValueError(f"{name} at {self.layer.path}: {need}, not {names}")
        self.shown.setdefault(self.layer.path, {})[name] = Shown(weights, names)


class Inserted(abc.ABC):
    """Parameters inside a trunk that change what its layers compute: an adapter, or a sharing of the trunk by the tasks.

    Attributes:
        name: Its parameters are trunk/adapters/NAME/LAYER/... in the model.
        per: As in Adapter, for the parameters of init(); those of init_own() are a task's in any case.
    """

    name: str
    per: str

    # If several change one layer, those with lower numbers are nearer to it, whatever the order of declaration: low-rank
    # changes belong to the kernel, scales apply to its output, a bottleneck follows them, a prefix is around all.
    order: ClassVar[int] = 0
    # The path of parameters that all its layers get beside their own, such as those of a network that makes parameters.
    common: ClassVar[str] = ""
    # Whether around() gets a task's parameters for every row; else for every task.
    by_row: ClassVar[bool] = True

    @abc.abstractmethod
    def where(self, layers: Mapping[str, Layer]) -> list[Layer]:
        """The layers that have parameters of this, out of all layers of a trunk by path.

        Raises:
            UserError: There is no such layer.
        """

    @abc.abstractmethod
    def init(self, key: jax.Array, layer: Layer) -> dict[str, jax.Array]:
        """Initial parameters, f32, for one of these layers. One whose name begins with fixed_ never trains."""

    def start(self, key: jax.Array, layer: Layer, trunk: Params) -> dict[str, jax.Array]:
        """As init(), for parameters that depend on those of the trunk; calls init() unless a class defines it.

        Args:
            key: As for init().
            layer: As for init().
            trunk: The layer's parameters in the trunk by name, such as "kernel".
        """
        return self.init(key, layer)

    def start_own(self, key: jax.Array, layer: Layer, trunk: Params) -> dict[str, jax.Array]:
        """As start(), of what a task has alone; calls init_own() unless a class defines it."""
        return self.init_own(key, layer)

    def init_own(self, key: jax.Array, layer: Layer) -> dict[str, jax.Array]:
        """Initial parameters, f32, that each task has alone; of one task."""
        return {}

    def init_for(self, key: jax.Array, layer: Layer, tasks: int) -> dict[str, jax.Array]:
        """Initial parameters, f32, that tasks share and whose shapes depend on the number of tasks."""
        return {}

    def copied(self, layer: Layer, tasks: int) -> dict[str, int]:
        """{name: how many copies of the trunk's parameters of a whole layer begin there}; those of tasks are at OWN."""
        return {}

    def through(self, routes: Routes) -> int:
        """How many copies of each row go through the layers from the first on that has parameters of single tasks."""
        return routes.copies

    def routes(self, routes: Routes) -> Routes:
        """Which copies of a row leave the trunk, from those that a run's tasks need."""
        return routes

    @abc.abstractmethod
    def around(self, params: Params, call: Call) -> Any:
        """The output of a layer with it.

        Args:
            params: Parameters as from init() and init_own(). Where rows differ, those of each row: matrices [B, ...], vectors
                [B, 1, ...]. Where by_row is false, those of init_own() are a tree at OWN, of every task: matrices [K, ...].
            call: The call of the layer.
        """

    def uses(self, layer: Layer) -> str:
        """The path of the layer whose parameters are used at a layer; "" for none."""
        return layer.path

    @abc.abstractmethod
    def merged(self, params: Params, kernel: Mapping[str, Any], layer: Layer) -> dict[str, Any]:
        """The parameters of a linear map, or of a whole layer, with it merged into them: the same outputs without dropout.

        Args:
            params: Parameters as from init() and init_own(), of one task.
            kernel: {"kernel": f32[I, O], "bias": f32[O] if there is one}, or the tree of the layer.
            layer: The layer.

        Raises:
            UserError: It cannot be merged.
        """

    def matching(self, layers: Mapping[str, Layer], pattern: str, kinds: tuple[str, ...] = ("dense",)) -> list[Layer]:
        """The layers of these kinds whose whole path the pattern matches, for where().

        Raises:
            UserError: The pattern is not a regular expression, or matches no layer.
        """
        title = f"{getattr(self, 'door', 'adapter')} {self.name!r}"
        try:
            expression = re.compile(pattern)
        except NOT_A_PATTERN as error:
            raise UserError(f"{title}: {shown(pattern)!r} is not a regular expression ({error})") from error
        possible = [layer for layer in layers.values() if layer.kind in kinds]
        matching = [layer for layer in possible if expression.fullmatch(layer.path)]
        if not matching:
            paths = sorted({re.sub(r"\d+", "N", layer.path) for layer in possible})
            raise UserError(
                f"{title} finds no place in this trunk: {pattern!r} matches no layer; there are {listed(paths)}"
                if paths
                else f"{title} finds no place in this trunk: it has no layers that could be adapted"
            )
        return matching


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter(Part, Inserted):
    """A few parameters added to a trunk. A class of your own needs where(), init() and around(); merged() is for convert.

        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Gate(mtl_jax.transfer.adapters.Adapter):
            def where(self, layers):
                return self.matching(layers, ".*/feed_forward_out")

            def init(self, key, layer):
                return {"gate": jnp.ones(layer.outputs)}

            def around(self, params, call):
                y = call()
                return y * params["gate"].astype(y.dtype)

    Attributes:
        name: Its parameters are trunk/adapters/NAME/LAYER/... in the model.
        per: What shares the parameters. run: all rows. task: each task has its own parameters; the rows of tasks that share a
            source pass the trunk once for each of them, from the first layer with such an adapter on. source: each source has
            its own parameters, which its tasks share.
    """

    name: str
    per: str = RUN

    door: ClassVar[str] = "adapter"
    # Whether a layer has at most one adapter of this kind.
    alone: ClassVar[bool] = False

    def check(self) -> None:
        """Raises UserError if a field is refused."""
        if self.per not in SHARING:
            raise unknown(f"per of adapter {self.name!r}:", self.per, SHARING)

    @property
    def added_tokens(self) -> int:
        """Tokens that it puts in front of every example, which take up positions of the trunk."""
        return 0

    def check_rows(self, examples: int) -> None:
        """Raises UserError if the adapter does not fit rows of up to this many examples."""

    def merged(self, params: Params, kernel: Mapping[str, Any], layer: Layer) -> dict[str, Any]:
        """The parameters of a linear map with the adapter merged into them: the same outputs without dropout.

        Args:
            params: Parameters as from init().
            kernel: {"kernel": f32[I, O], "bias": f32[O] if there is one}.
            layer: The linear map.

        Raises:
            UserError: This kind of adapter cannot be merged into a kernel.
        """
        ours = origin_of(type(self)) is None
        mergeable = "Lora, its relatives and IA3" if ours else "Lora, its relatives, IA3 and classes that define merged()"
        raise UserError(
            f"adapter {self.name!r} is a {type(self).__name__}, which cannot be put into the trunk's kernels, and transformers "
            f"has no class for a trunk with it: only {mergeable} can be merged"
        )

    def weighted(self, params: Params, weight: float) -> dict[str, Any]:
        """Parameters with which the adapter's change counts by a weight: 0 is the layer without it, 1 the adapter as it is.

        Args:
            params: As from init(), for one layer.
            weight: The weight.

        Raises:
            UserError: The change of this kind has no weight.
        """
        raise UserError(f"adapter {self.name!r} is a {type(self).__name__}, whose change cannot be multiplied by a weight")
