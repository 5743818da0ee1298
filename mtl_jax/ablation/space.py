"""The values that an ablation tries: lists, grids, random and Sobol samples, and points of the simplex of weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import qmc

from mtl_jax.ablation import fields
from mtl_jax.ablation.fields import Path
from mtl_jax.core import name_options
from mtl_jax.core.errors import UserError
from mtl_jax.core.errors import count as number_of
from mtl_jax.experiment import Experiment

RANGES = {
    "grid": "grid:LOW:HIGH:N",
    "loggrid": "loggrid:LOW:HIGH:N",
    "uniform": "uniform:LOW:HIGH",
    "loguniform": "loguniform:LOW:HIGH",
}
SAMPLERS = ("random", "sobol")
_DIGITS = 6  # after the point, of weights on the simplex


class Axis(NamedTuple):
    """Fields that vary together, and the points that they take.

    Attributes:
        paths: The fields.
        points: Each point has one value for each field.
    """

    paths: tuple[Path, ...]
    points: tuple[tuple[Any, ...], ...]


class Range(NamedTuple):
    """An interval of numbers, to be divided into a grid or sampled from.

    Attributes:
        low: The lower end.
        high: The upper end.
        log: Whether the logarithms of the numbers are spread evenly, instead of the numbers.
    """

    low: float
    high: float
    log: bool

    def at(self, share: float) -> float:
        """The number at a share of the way from low to high, the share from 0 to 1."""
        if self.log:
            return math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        return self.low + share * (self.high - self.low)


def axes(experiment: Experiment, vary: Sequence[str], samples: str = "") -> list[Axis]:
    """The axes of an ablation, from the texts of the command line.

    Args:
        experiment: Its fields are varied.
        vary: Texts "FIELD=VALUES". VALUES are a list (1e-5,3e-5), grid:LOW:HIGH:N, loggrid:LOW:HIGH:N, uniform:LOW:HIGH,
            loguniform:LOW:HIGH; for weights also simplex:N, simplex:lattice:M, simplex:A/B/C,... and lists of A/B/C in the
            order of the tasks. A weight may be a schedule, linear_schedule(1.0, 0.0, 1000).
        samples: How all ranges are sampled together: "random:N[:SEED]" or "sobol:N[:SEED]".

    Returns:
        One axis for each field with listed values, and one axis for all fields with ranges.

    Raises:
        UserError: A field or its values are refused, a field is given twice, or there are ranges without samples.
    """
    listed: list[Axis] = []
    ranges: dict[Path, Range] = {}
    names: set[str] = set()
    for text in vary:
        field, equals, spec = text.partition("=")
        if not equals or not spec.strip():
            raise UserError(f"--vary {text!r}: write FIELD=VALUES, such as optimizer.learning-rate=1e-5,3e-5")
        path = fields.find(experiment, field.strip())
        fields.check(experiment, path)
        name = ".".join(path)
        for other in names:
            if name == other or name.startswith(other + ".") or other.startswith(name + "."):
                raise UserError(f"--vary {field.strip()}: the field {name} has two axes; name it once")
        names.add(name)
        values = _values(experiment, path, spec.strip(), f"--vary {field.strip()}")
        if isinstance(values, Range):
            ranges[path] = values
        else:
            listed.append(Axis((path,), tuple((value,) for value in values)))
    if ranges:
        return [*listed, _sampled(ranges, samples)]
    if samples:
        raise UserError(f"--samples {samples}: no field has a range, such as optimizer.learning-rate=loguniform:1e-6:1e-3")
    return listed


def _values(experiment: Experiment, path: Path, spec: str, where: str) -> list[Any] | Range:
    if fields.is_weights(path):
        names = [task.name for task in experiment.tasks]
        return [dict(zip(names, point, strict=True)) for point in _weight_vectors(names, spec, where)]
    kind = spec.partition(":")[0]
    if kind not in RANGES:
        return _different([_written_value(experiment, path, text, where) for text in _elements(spec, where)], where)
    form, numbers = RANGES[kind], name_options.parse(spec, where, form=RANGES, arguments=True).arguments
    if len(numbers) != form.count(":"):
        raise UserError(f"{where}: write {form}")
    interval = _range(numbers[0], numbers[1], kind.startswith("log"), where)
    if kind in ("uniform", "loguniform"):
        _typed_value(experiment, path, interval.at(0.5), where)
        return interval
    if not _is_whole(numbers[2], 1):
        raise UserError(f"{where}: write {form} with N of at least 1")
    shares = np.linspace(0.0, 1.0, int(numbers[2]))
    return [_typed_value(experiment, path, interval.at(float(share)), where) for share in shares]


def _range(low: Any, high: Any, log: bool, where: str) -> Range:
    start, end = name_options.number(low), name_options.number(high)
    if math.isnan(start) or math.isnan(end):
        raise UserError(f"{where}: LOW and HIGH must be two numbers, but are {f'{low}:{high}'!r}")
    if not (math.isfinite(start) and math.isfinite(end) and start < end) or (log and start <= 0):
        needed = "LOW must be below HIGH, both finite" + (" and above 0" if log else "")
        raise UserError(f"{where}: from {start:g} to {end:g}: {needed}")
    return Range(start, end, log)


def _is_whole(value: Any, least: int) -> bool:
    number = name_options.number(value)
    return math.isfinite(number) and number == int(number) and number >= least


def _written_value(experiment: Experiment, path: Path, text: str, where: str) -> Any:
    """The value that a text stands for; a field that holds text takes the text itself, even if it looks like a number."""
    declared, value = fields.type_of(experiment, path), name_options.value(text)
    if not fields.fits(value, declared) and fields.fits(text, declared):
        return text
    return _typed_value(experiment, path, value, where, text)


def _typed_value(experiment: Experiment, path: Path, value: Any, where: str, text: str = "") -> Any:
    declared = fields.type_of(experiment, path)
    if not fields.fits(value, declared):
        raise UserError(f"{where}: {text or repr(value)} is not a value of this field, which is {fields.in_words(declared)}")
    whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if whole and declared is not Any and fields.fits(1.5, declared) else value


def _elements(text: str, where: str) -> list[str]:
    elements = name_options.split(text, ",")
    if not all(elements):
        raise UserError(f"{where}: a value is empty")
    return elements


def _different(values: list[Any], where: str) -> list[Any]:
    for value in values:
        if values.count(value) > 1:
            raise UserError(f"{where}: {value!r} is given twice")
    return values


def _weight_vectors(names: Sequence[str], spec: str, where: str) -> list[tuple[Any, ...]]:
    kind, _, rest = spec.partition(":")
    if kind != "simplex":
        return _different([_weight_vector(names, text, where) for text in _elements(spec, where)], where)
    if rest.isdecimal():
        return simplex(len(names), int(rest))
    if rest.startswith("lattice:") and rest[8:].isdecimal():
        return lattice(len(names), int(rest[8:]))
    points = _different([_weight_vector(names, text, where) for text in _elements(rest, where)], where)
    for point in points:
        if any(isinstance(weight, str) or weight < 0 for weight in point) or abs(sum(point) - 1) > 1e-6:
            shown = "/".join(map(str, point))
            raise UserError(f"{where}: {shown} is not on the simplex: weights must not be negative and must sum to 1")
    return points


def _weight_vector(names: Sequence[str], text: str, where: str) -> tuple[Any, ...]:
    weights = tuple(name_options.value(part) for part in name_options.split(text, "/"))
    if len(weights) != len(names):
        raise UserError(f"{where}: {text!r} has {number_of(len(weights), 'weight')}; write one for each of {'/'.join(names)}")
    for weight in weights:
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not is_number and not (isinstance(weight, str) and "(" in weight):
            raise UserError(f"{where}: {weight!r} in {text!r} is neither a number nor a schedule")
    return tuple(float(weight) if isinstance(weight, int) else weight for weight in weights)


def simplex(tasks: int, count: int) -> list[tuple[float, ...]]:
    """Points of the simplex of weights that sum to 1: its centre, then quasi-random points, spread evenly.

    The gaps between sorted uniform numbers are spread evenly over the simplex; the numbers are a scrambled Sobol sequence.

    Args:
        tasks: K.
        count: Number of points.

    Raises:
        UserError: The count is below 1, or there are fewer than two tasks.
    """
    if count < 1:
        raise UserError("simplex:N has no point: N must be at least 1")
    if tasks < 2:
        raise UserError("weights on the simplex are for two tasks or more")
    cuts = np.sort(qmc.Sobol(tasks - 1, seed=0).random_base2(max(1, math.ceil(math.log2(count)))), axis=1)
    edges = np.concatenate([np.zeros((len(cuts), 1)), cuts, np.ones((len(cuts), 1))], axis=1)
    return [_on_simplex([1 / tasks] * tasks), *(_on_simplex(gaps) for gaps in np.diff(edges, axis=1)[: count - 1])]


def lattice(tasks: int, parts: int) -> list[tuple[float, ...]]:
    """All points of the simplex whose weights are multiples of 1 / parts, corners included.

    Raises:
        UserError: There are no parts, or fewer than two tasks.
    """
    if parts < 1 or tasks < 2:
        raise UserError("simplex:lattice:M is for M of at least 1 and two tasks or more")
    points = []
    for bars in itertools.combinations(range(parts + tasks - 1), tasks - 1):
        edges = [-1, *bars, parts + tasks - 1]
        points.append(tuple((right - left - 1) / parts for left, right in itertools.pairwise(edges)))
    return points[::-1]


def _on_simplex(weights: Sequence[float]) -> tuple[float, ...]:
    """The weights rounded, the last one so that they still sum to 1."""
    rounded = [round(float(weight), _DIGITS) for weight in weights]
    return (*rounded[:-1], round(1 - sum(rounded[:-1]), _DIGITS))


def _sampled(ranges: dict[Path, Range], samples: str) -> Axis:
    """The axis of all ranges: points that are sampled from them together."""
    fields_of_ranges = ", ".join(".".join(path) for path in ranges)
    sampler, numbers, options = name_options.parse(samples, "--samples", arguments=True)
    if sampler not in SAMPLERS or options or len(numbers) not in (1, 2) or not all(_is_whole(n, 0) for n in numbers):
        raise UserError(f"{fields_of_ranges}: say how often to sample the range by --samples sobol:N or random:N (and :SEED)")
    count, seed = int(numbers[0]), int(numbers[1]) if len(numbers) == 2 else 0
    if count < 1:
        raise UserError(f"--samples {samples}: there would be no run")
    if sampler == "random":
        shares = np.random.default_rng(seed).random((count, len(ranges)))
    else:
        shares = qmc.Sobol(len(ranges), seed=seed).random_base2(math.ceil(math.log2(count)) if count > 1 else 0)[:count]
    intervals = list(ranges.values())
    points = [[interval.at(float(share)) for interval, share in zip(intervals, row, strict=True)] for row in shares]
    return Axis(tuple(ranges), tuple(map(tuple, points)))
