"""The experiment and its tasks as JSON: config.json and data.json of a workdir, written and read back."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import cattrs
from cattrs.strategies import configure_tagged_union

from mtl_jax.core import configuration
from mtl_jax.core.errors import UserError
from mtl_jax.core.files import to_json as to_strict_json
from mtl_jax.experiment import Experiment, HeadWeights
from mtl_jax.tasks import AnyTask
from mtl_jax.transfer.adapters import AnyAdapter
from mtl_jax.transfer.regularisers import AnyRegulariser
from mtl_jax.trunks import AnyTrunk


def to_json(experiment: Experiment) -> dict[str, Any]:
    """The experiment as JSON values; elements of unions carry their class name as "kind"."""
    return _converter().unstructure(experiment)


def from_json(values: Any, where: str = "config.json") -> Experiment:
    """The inverse of to_json.

    Args:
        values: Parsed JSON.
        where: The file that the values are from, for errors.

    Raises:
        UserError: The values are not those of an experiment, or a number is outside the limits of its field.
    """
    experiment: Experiment = _structured(values, Experiment, where)
    try:
        configuration.check(experiment, leave_out=configuration.SEEDS)  # earlier versions took any seed
    except UserError as error:
        raise UserError(f"{where}: not what mtl_jax wrote ({error})") from error
    return experiment


def with_defaults(values: Any) -> Any:
    """The JSON values of an experiment that an earlier version wrote, with newer fields at their defaults.

    Values that are not those of an experiment are returned unchanged.
    """
    try:
        return json.loads(to_strict_json(to_json(_structured(values, Experiment, ""))))
    except UserError:
        return values  # the comparison with the present configuration will show what differs


def tasks_to_json(tasks: Sequence[AnyTask]) -> dict[str, Any]:
    """{name: task as JSON values}, with what each task learned from the data, such as its labels."""
    return {task.name: _converter().unstructure(task, AnyTask) for task in tasks}


def tasks_from_json(values: Mapping[str, Any], where: str = "data.json") -> tuple[AnyTask, ...]:
    """The inverse of tasks_to_json.

    Raises:
        UserError: The values are not those of tasks.
    """
    return tuple(_structured(value, AnyTask, where) for value in values.values())


def _structured(values: Any, kind: Any, where: str) -> Any:
    try:
        return _converter().structure(values, kind)
    # KeyError, TypeError: cattrs looks a union's kind up as it is, also if it is unknown or not a text.
    except (cattrs.BaseValidationError, AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        reasons = cattrs.transform_error(error) if isinstance(error, cattrs.BaseValidationError) else [repr(error)]
        raise UserError(
            f"{where}: not what mtl_jax wrote ({reasons[0].replace(' @ $.', ' at ').replace(' @ $', '')[:200]}); it may be of "
            "another version, or damaged"
        ) from error


@functools.cache  # making one takes a tenth of a second
def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    converter.register_structure_hook(float | str, _number_or_text)
    converter.register_structure_hook(HeadWeights, _head_weights)
    # JSON has no infinity: an infinite bound is written as a text. The hooks of the unions are made from those registered
    # before them, so this one must be the earlier.
    converter.register_unstructure_hook(float, lambda number: number if abs(number) != float("inf") else str(number))
    configure_tagged_union(AnyTrunk, converter, tag_name="kind")
    configure_tagged_union(AnyTask, converter, tag_name="kind")
    configure_tagged_union(AnyAdapter, converter, tag_name="kind")
    configure_tagged_union(AnyRegulariser, converter, tag_name="kind")
    return converter


def _number_or_text(value: Any, _: Any) -> float | str:
    if not isinstance(value, (int, float, str)):
        raise ValueError(f"{value!r} is not a number or a text")
    return value


def _head_weights(value: Any, _: Any) -> HeadWeights:
    if not isinstance(value, bool) and value != "rule":
        raise ValueError(f"{value!r} is not true, false or rule")
    return cast(HeadWeights, value)
