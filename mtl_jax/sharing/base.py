"""The interface of a sharing: parameters inside the trunk, of which some belong to single tasks.

Shapes in names: H width of a layer's vectors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax

from mtl_jax.core.errors import UserError, count, unknown
from mtl_jax.core.parts import Part
from mtl_jax.transfer.adapters.base import RUN, WHOLE, Adapter, Call, Inserted, Layer, Params

GATES = PER_TASK, PER_TOKEN = ("task", "token")  # what a gate reads: only the task, or also each token
NAME = "sharing"  # its parameters are trunk/adapters/sharing/LAYER/..., and those of single tasks .../LAYER/own/...


class TrainedTrunk(NamedTuple):
    """The trunk of a finished run, from which a sharing takes parameters.

    Attributes:
        name: The run's workdir.
        module: Its module; transfer.adapters.Adapted, if it has adapters or a sharing.
        params: Its parameters, on the host.
        adapters: The run's adapters.
        sharing: The run's sharing.
        source_of: {task: the number of its source}, in the order of the tasks.
    """

    name: str
    module: Any
    params: Mapping[str, Any]
    adapters: tuple[Adapter, ...]
    sharing: Sharing
    source_of: Mapping[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sharing(Part, Inserted):
    """How the tasks share the trunk. A class of your own needs where(), init(), init_own() and around().

        @dataclasses.dataclass(frozen=True, kw_only=True)
        class TaskShift(mtl_jax.sharing.Sharing):
            def where(self, layers):
                return self.matching(layers, ".*/feed_forward_out")

            def init(self, key, layer):
                return {}  # parameters that all tasks share

            def init_own(self, key, layer):
                return {"shift": jnp.zeros(layer.outputs)}  # parameters that each task has for itself

            def around(self, params, call):
                y = call()
                return y + params["shift"].astype(y.dtype)  # [B, 1, O], those of the task of each row

    The rows of a source pass the trunk once. If several tasks share a source, its rows have a copy for each of them from the
    first layer with parameters of single tasks on. These parameters are weighted like the trunk's, but no rule compares them,
    and a weight below 0 leaves those of its task unchanged. A sharing with gates calls call.show() in around(), for the report.
    """

    door: ClassVar[str] = "sharing"
    name: ClassVar[str] = NAME  # type: ignore[misc]
    per: ClassVar[str] = RUN  # type: ignore[misc]

    def check(self) -> None:
        """Raises UserError if a field is refused."""

    def earlier_runs(self) -> tuple[str, ...]:
        """The workdirs of finished runs whose parameters loaded() takes; their trunks must be like this run's."""
        return ()

    def loaded(self, params: Mapping[str, Any], trunk: Mapping[str, Any], runs: Sequence[TrainedTrunk]) -> Mapping[str, Any]:
        """The sharing's parameters before the first step; called once when a run begins, and not when it resumes.

        Args:
            params: Its parameters as init(), init_own() and init_for() made them: {"layer_0": ...}, nested by the paths of the
                layers; those of tasks are stacked as in a checkpoint.
            trunk: The trunk's parameters, such as pretrained ones.
            runs: The runs that earlier_runs() names, in its order.

        Returns:
            A tree like params.

        Raises:
            UserError: A run lacks parameters that the sharing takes from it.
        """
        return params

    def merged(self, params: Params, kernel: Mapping[str, Any], layer: Layer) -> dict[str, Any]:
        """The parameters of a layer with a task's part of the sharing merged into them.

        Raises:
            UserError: This sharing cannot be merged.
        """
        raise UserError(
            f"sharing is {type(self).__name__}, and transformers has no class for a trunk with it: only TopLayers, and "
            "TaskAdapters of adapters that can be merged, can be converted"
        )

    def at_least(self, field: str, least: int) -> None:
        """Raises UserError if a whole number is too small."""
        if getattr(self, field) < least:
            raise UserError(f"sharing: {field} of {type(self).__name__} is {getattr(self, field)}; it must be at least {least}")

    def one_of(self, field: str, values: Any) -> None:
        """Raises UserError if a text is not one of the values."""
        if getattr(self, field) not in values:
            raise unknown(f"sharing: {field} of {type(self).__name__}:", getattr(self, field), values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hard(Sharing):
    """Hard sharing: one trunk for all tasks, and a head for each (Caruana 1997). The default; it adds nothing."""

    def where(self, layers: Mapping[str, Layer]) -> list[Layer]:
        return []

    def init(self, key: jax.Array, layer: Layer) -> dict[str, jax.Array]:
        return {}

    def around(self, params: Params, call: Call) -> Any:
        return call()


def check(sharing: Sharing, adapters: Sequence[str]) -> None:
    """Checks a sharing without a trunk.

    Args:
        sharing: The sharing.
        adapters: The names of the run's adapters.

    Raises:
        UserError: A field is refused, or an adapter has the sharing's name.
    """
    sharing.check()
    if NAME in adapters:
        raise UserError(f"adapter {NAME!r}: this is where the parameters of a sharing are; choose another name")


def layers_from_the_top(layers: Mapping[str, Layer], number: int, title: str) -> list[Layer]:
    """The last whole layers of a trunk, in the order of their calls.

    Args:
        layers: All layers by path.
        number: How many; 0: all.
        title: The beginning of an error line.

    Raises:
        UserError: The trunk has fewer.
    """
    whole = [layer for layer in layers.values() if layer.kind == WHOLE]
    if not whole:
        raise UserError(f"{title}: the trunk has no layers; choose another trunk, or leave the sharing at Hard()")
    if number > len(whole):
        raise UserError(f"{title} is {number}, but the trunk has only {count(len(whole), 'layer')}")
    chosen = whole[-number:] if number else whole
    again = [layer for layer in chosen if layer.calls > 1]
    if again:
        raise UserError(
            f"{title}: the trunk calls {again[0].path} {again[0].calls} times, as its layers share parameters, so there is "
            "no topmost one to copy; choose a sharing inside layers, such as MMoE or TaskAdapters"
        )
    return chosen
