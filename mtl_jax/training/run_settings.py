"""Settings of finished runs: the fields in which their configurations differ, and short texts that tell them apart."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mtl_jax.training.workdir import PLACES, differences

# Fields of an experiment without an effect on what a setting learns.
NOT_COMPARED = ("name", "seed", "devices", "sharding", "remat", "checkpoints")
BY_NAME = ("weights", "shares", "class_weights")  # dicts of numbers by task, source or label; each is one field
LONG = 60  # most characters of a label
NOTHING = "\N{EN DASH}"


def varied_values(configs: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    """The fields, without the seed, in which configurations differ, and {field: value} of each configuration.

    Args:
        configs: Parsed config.json files.
    """
    changed = {field for config in configs[1:] for field, _, _ in differences(configs[0], config)}
    fields_changed = {_without_keys(field) for field in changed if not PLACES.fullmatch(field)}
    # Where the length of a list differs, the whole list is the field.
    whole = {field for field in fields_changed if not any(field.startswith(f"{other}.") for other in fields_changed)}
    compared = sorted(field for field in whole if field.partition(".")[0] not in NOT_COMPARED)
    values = [{field: found for field in compared if (found := _value_at(config, field)) is not None} for config in configs]
    return varied(["weighting", *compared], values), values


def varied(fields: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The fields with more than one value, without duplicates and without the seed."""
    return tuple(
        field for field in dict.fromkeys(fields) if field != "seed" and len({key(values.get(field)) for values in settings}) > 1
    )


def key(value: Any) -> str:
    """A value of a field as a text that can be compared."""
    return json.dumps(value, sort_keys=True)


def labels(settings: Sequence[Mapping[str, Any]], fields: Sequence[str], names: Sequence[Sequence[str]]) -> list[str]:
    """A label for each setting: the fields in which they differ, or the names of its runs if that is not short or unique.

    Args:
        settings: {field: value} of each.
        fields: The fields to show.
        names: The names of the runs of each setting.
    """
    texts = [setting(values, varied(fields, settings) or fields) for values in settings]
    return [
        run_names(of_runs) if len(label) > LONG or texts.count(label) > 1 else label
        for label, of_runs in zip(texts, names, strict=True)
    ]


def run_names(names: Sequence[str]) -> str:
    """The names of the runs of a setting; of many, the first and the number of the others."""
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} more"


def setting(values: Mapping[str, Any], fields: Sequence[str]) -> str:
    """The values of some fields as a label.

    A rule is shown by its name, weights by their numbers, other fields by the last part of their path and the value. Empty
    values are left out, unless all are empty.
    """
    filled = [field for field in fields if field in values and values[field] not in (None, [], {}, "")]
    parts = []
    for field in filled or [field for field in fields if field in values]:
        field_value = values[field]
        last = field.rpartition(".")[2]
        if isinstance(field_value, Mapping) and field_value:
            parts.append(numbers(field_value) if last in BY_NAME else value(field_value))
        else:
            parts.append(value(field_value) if field == "weighting" else f"{last} {value(field_value)}")
    return ", ".join(parts) or NOTHING


def numbers(weights: Mapping[str, Any]) -> str:
    """The values of weights, in their order."""
    return " / ".join(value(weight) for weight in weights.values())


def value(field_value: Any) -> str:
    """The value of a varied field in a few characters."""
    if field_value is None:
        return NOTHING
    if isinstance(field_value, bool):
        return "yes" if field_value else "no"
    if isinstance(field_value, float):
        return f"{field_value:.3g}" if abs(field_value) < 1 else f"{field_value:.5g}"
    if isinstance(field_value, Mapping):
        if "name" in field_value:  # a phase, a source, a task
            return str(field_value["name"])
        return ", ".join(f"{name}={value(element)}" for name, element in field_value.items()) or NOTHING
    if isinstance(field_value, (list, tuple)):
        return ", ".join(value(element) for element in field_value) or NOTHING
    return str(field_value) or NOTHING


def _without_keys(field: str) -> str:
    """The path of a field, which for fields of BY_NAME ends before the task, source or label."""
    parts = field.split(".")
    ends = [end for end, part in enumerate(parts, 1) if part in BY_NAME]
    return ".".join(parts[: ends[0]]) if ends else field


def _value_at(config: Any, field: str) -> Any:
    """The value at a path such as a.b.0.c; None where the path does not exist."""
    for part in field.split("."):
        if isinstance(config, dict) and part in config:
            config = config[part]
        elif isinstance(config, list) and part.isdecimal() and int(part) < len(config):
            config = config[int(part)]
        else:
            return None
    return config
