"""Numbers, durations and settings as short texts for readers."""

from __future__ import annotations

from collections.abc import Sequence

from mtl_jax.core.errors import count as count
from mtl_jax.reporting.statistics import Group, Spread
from mtl_jax.training.run_settings import NOTHING as NOTHING
from mtl_jax.training.run_settings import labels as labels_of
from mtl_jax.training.run_settings import numbers as numbers
from mtl_jax.training.run_settings import run_names
from mtl_jax.training.run_settings import setting as setting
from mtl_jax.training.run_settings import value as value


def labels(groups: Sequence[Group], fields: Sequence[str]) -> list[str]:
    """A label for each group: the fields in which groups differ, or the names of its runs if that is not short or unique."""
    return labels_of([group.values for group in groups], fields, [[run.name for run in group.runs] for group in groups])


def runs(group: Group) -> str:
    """The names of a group's runs; of many, the first and the number of the others."""
    return run_names([run.name for run in group.runs])


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
