"""Numbers, durations and settings as short texts for readers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mtl_jax.core.errors import count as count
from mtl_jax.reporting.statistics import Group, Spread
from mtl_jax.reporting.study import BY_NAME, key

LONG = 60  # most characters of a label
NOTHING = "\N{EN DASH}"


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


def labels(groups: Sequence[Group], fields: Sequence[str]) -> list[str]:
    """A label for each group: the fields in which groups differ, or the names of its runs if that is not short or unique."""
    settings = [group.values for group in groups]
    texts = [setting(values, varied(settings, fields) or fields) for values in settings]
    return [
        runs(group) if len(label) > LONG or texts.count(label) > 1 else label
        for group, label in zip(groups, texts, strict=True)
    ]


def runs(group: Group) -> str:
    """The names of a group's runs; of many, the first and the number of the others."""
    names = [run.name for run in group.runs]
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} more"


def varied(settings: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> list[str]:
    """The fields with more than one value."""
    return [field for field in fields if len({key(values.get(field)) for values in settings}) > 1]


def digits(spreads: Sequence[Spread]) -> int:
    """Decimals of numbers between 0 and 1: four if means lie within 0.01 and deviations are below 0.002, else three."""
    means = [spread.mean for spread in spreads]
    steady = all(spread.sd is None or spread.sd < 0.002 for spread in spreads)
    return 4 if steady and len(means) > 1 and max(means) - min(means) < 0.01 else 3


def spread(scores: Spread | None, decimals: int = 3, plus: bool = False) -> str:
    """ "mean ± standard deviation", or only the mean for a single value."""
    if scores is None:
        return NOTHING
    deviation = "" if scores.sd is None else f" ± {scores.sd:.{decimals}f}"
    return number(scores.mean, decimals, plus) + deviation


def number(number: float, decimals: int = 3, plus: bool = False) -> str:
    """A rounded number; with `plus` positive numbers have a sign, too."""
    rounded = round(number, decimals) + 0.0  # -0.0 becomes 0.0
    return f"{rounded:{'+' if plus and rounded else ''}.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def duration(seconds: float) -> str:
    """A duration such as 4.2 s, 51 s, 4 min 12 s, 2 h 5 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
