"""Numbers, times and settings as a reader wants to see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mtl_jax.core.errors import count as count
from mtl_jax.report.statistics import Group, Spread
from mtl_jax.report.study import BY_NAME, key

LONG = 60  # characters of a label
NOTHING = "\N{EN DASH}"


def value(found: Any) -> str:
    """The value of a varied field in a few characters."""
    if found is None:
        return NOTHING
    if isinstance(found, bool):
        return "yes" if found else "no"
    if isinstance(found, float):
        return f"{found:.3g}" if abs(found) < 1 else f"{found:.5g}"
    if isinstance(found, Mapping):
        if "name" in found:  # a phase, a source, a task
            return str(found["name"])
        return ", ".join(f"{name}={value(own)}" for name, own in found.items()) or NOTHING
    if isinstance(found, (list, tuple)):
        return ", ".join(value(own) for own in found) or NOTHING
    return str(found) or NOTHING


def setting(values: Mapping[str, Any], fields: Sequence[str]) -> str:
    """The values of some fields as a label: the rule by its name, its options as they are typed, weights by their numbers,
    other fields by the last part of theirs.

    What is empty is left out, unless nothing else is there.
    """
    told = [field for field in fields if field in values and values[field] not in (None, [], {}, "")]
    parts = []
    for field in told or [field for field in fields if field in values]:
        found = values[field]
        last = field.rpartition(".")[2]
        if isinstance(found, Mapping) and found:
            parts.append(numbers(found) if last in BY_NAME else value(found))
        else:
            parts.append(value(found) if field == "weighting" else f"{last} {value(found)}")
    return ", ".join(parts) or NOTHING


def numbers(weights: Mapping[str, Any]) -> str:
    """The values of weights, in their order."""
    return " / ".join(value(own) for own in weights.values())


def labels(groups: Sequence[Group], fields: Sequence[str]) -> list[str]:
    """Each group's setting by the fields in which they differ; its runs' names where that is long or not enough."""
    settings = [group.values for group in groups]
    told = [setting(values, varied(settings, fields) or fields) for values in settings]
    return [
        runs(group) if len(label) > LONG or told.count(label) > 1 else label for group, label in zip(groups, told, strict=True)
    ]


def runs(group: Group) -> str:
    """Their names, or where they are many, the first and how many."""
    names = [run.name for run in group.runs]
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} more"


def varied(settings: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> list[str]:
    """The fields that have more than one value."""
    return [field for field in fields if len({key(values.get(field)) for values in settings}) > 1]


def digits(found: Sequence[Spread]) -> int:
    """Decimals for shares of 1: three, or four where the means lie within 0.01 and their deviations below 0.002."""
    means = [spread.mean for spread in found]
    steady = all(spread.sd is None or spread.sd < 0.002 for spread in found)
    return 4 if steady and len(means) > 1 and max(means) - min(means) < 0.01 else 3


def spread(found: Spread | None, decimals: int = 3, plus: bool = False) -> str:
    """mean ± standard deviation, or the mean of one value."""
    if found is None:
        return NOTHING
    deviation = "" if found.sd is None else f" ± {found.sd:.{decimals}f}"
    return number(found.mean, decimals, plus) + deviation


def number(found: float, decimals: int = 3, plus: bool = False) -> str:
    """With a sign where it is below zero as it is shown, or, if wanted, above."""
    rounded = round(found, decimals) + 0.0  # -0.0 becomes 0.0
    return f"{rounded:{'+' if plus and rounded else ''}.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def duration(seconds: float) -> str:
    """4.2 s, 51 s, 4 min 12 s, 2 h 5 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
