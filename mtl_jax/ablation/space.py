"""What is tried: lists, grids, random and Sobol samples, and points of the simplex of weights."""

from __future__ import annotations

import ast
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import qmc

from mtl_jax.ablation import fields
from mtl_jax.ablation.fields import Path
from mtl_jax.core.errors import UserError
from mtl_jax.core.errors import count as number_of
from mtl_jax.experiment import Experiment

_ROUND = 6  # digits after the point of weights on the simplex


class Axis(NamedTuple):
    """Fields that vary together, and the points that they take.

    Attributes:
        paths: The fields.
        points: For each point a value of each field.
    """

    paths: tuple[Path, ...]
    points: tuple[tuple[Any, ...], ...]


class Range(NamedTuple):
    """Numbers between two ends, to be drawn.

    Attributes:
        low: The lower end.
        high: The upper end.
        log: Whether their logarithm is what is spread evenly.
    """

    low: float
    high: float
    log: bool

    def at(self, share: float) -> float:
        """The number at a share of the way, from 0 to 1."""
        if self.log:
            return math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        return self.low + share * (self.high - self.low)


def axes(experiment: Experiment, vary: Sequence[str], samples: str = "") -> list[Axis]:
    """What is varied, from the command line's words.

    Args:
        experiment: Its fields.
        vary: "FIELD=VALUES" each. VALUES are a list (1e-5,3e-5), grid:LOW:HIGH:N, loggrid:LOW:HIGH:N, uniform:LOW:HIGH,
            loguniform:LOW:HIGH; of weights also simplex:N, simplex:lattice:M, simplex:A/B/C,... and lists of A/B/C in the order
            of the tasks. A weight may be a schedule, linear_schedule(1.0, 0.0, 1000).
        samples: How ranges are drawn, all together: "random:N[:SEED]" or "sobol:N[:SEED]".

    Raises:
        UserError: A field or its values are refused, twice the same field, or ranges without samples.
    """
    found: list[Axis] = []
    ranges: dict[Path, Range] = {}
    seen: set[str] = set()
    for text in vary:
        name, equals, spec = text.partition("=")
        if not equals or not spec.strip():
            raise UserError(f"--vary {text!r}: write FIELD=VALUES, such as optimizer.learning-rate=1e-5,3e-5")
        path = fields.find(experiment, name.strip())
        fields.check(experiment, path)
        for other in seen:
            mine = ".".join(path)
            if mine == other or mine.startswith(other + ".") or other.startswith(mine + "."):
                raise UserError(f"--vary {name.strip()}: the field {mine} has two axes; name it once")
        seen.add(".".join(path))
        values = _values(experiment, path, spec.strip(), f"--vary {name.strip()}")
        if isinstance(values, Range):
            ranges[path] = values
        else:
            found.append(Axis((path,), tuple((value,) for value in values)))
    if ranges:
        found.append(_drawn(ranges, samples))
    elif samples:
        raise UserError(f"--samples {samples}: no field has a range, such as optimizer.learning-rate=loguniform:1e-6:1e-3")
    return found


def _values(experiment: Experiment, path: Path, spec: str, where: str) -> list[Any] | Range:
    kind, *rest = spec.split(":") if "(" not in spec else [spec]
    if fields.is_weights(path):
        names = [task.name for task in experiment.tasks]
        return [dict(zip(names, point, strict=True)) for point in _vectors(names, spec, where)]
    if kind in ("grid", "loggrid"):
        (low, high), count = _ends(rest[:2], kind == "loggrid", where), rest[2:]
        if len(count) != 1 or not count[0].isdecimal() or int(count[0]) < 1:
            raise UserError(f"{where}: write {kind}:LOW:HIGH:N with N of at least 1")
        steps = np.linspace(0.0, 1.0, int(count[0]))
        return [_typed(experiment, path, Range(low, high, kind == "loggrid").at(float(step)), where) for step in steps]
    if kind in ("uniform", "loguniform"):
        if len(rest) != 2:
            raise UserError(f"{where}: write {kind}:LOW:HIGH")
        drawn = Range(*_ends(rest, kind == "loguniform", where), kind == "loguniform")
        _typed(experiment, path, drawn.at(0.5), where)
        return drawn
    return _different([_written(experiment, path, part, where) for part in _parts(spec, where)], where)


def _ends(texts: Sequence[str], log: bool, where: str) -> tuple[float, float]:
    try:
        low, high = (float(text) for text in texts)
    except ValueError as error:
        raise UserError(f"{where}: LOW and HIGH must be two numbers, but are {':'.join(texts)!r}") from error
    if not (math.isfinite(low) and math.isfinite(high) and low < high) or (log and low <= 0):
        raise UserError(f"{where}: from {low:g} to {high:g} is no range{' of numbers above 0' if log else ''}")
    return low, high


def _written(experiment: Experiment, path: Path, text: str, where: str) -> Any:
    """The value that is written so: a literal, or, where the field holds text, the text itself, whatever it looks like."""
    declared, literal = fields.type_of(experiment, path), _literal(text)
    if not fields.fits(literal, declared) and fields.fits(text, declared):
        return text
    return _typed(experiment, path, literal, where, text)


def _typed(experiment: Experiment, path: Path, value: Any, where: str, text: str = "") -> Any:
    declared = fields.type_of(experiment, path)
    if not fields.fits(value, declared):
        raise UserError(f"{where}: {text or repr(value)} is not a value of it, which is {fields.in_words(declared)}")
    whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if whole and declared is not Any and fields.fits(1.5, declared) else value


def _literal(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _parts(text: str, where: str) -> list[str]:
    """Split at commas outside parentheses."""
    depth, found = 0, [""]
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            found.append("")
        else:
            found[-1] += character
    if not all(part.strip() for part in found):
        raise UserError(f"{where}: a value is empty")
    return [part.strip() for part in found]


def _different(values: list[Any], where: str) -> list[Any]:
    for value in values:
        if values.count(value) > 1:
            raise UserError(f"{where}: {value!r} stands there twice")
    return values


def _vectors(names: Sequence[str], spec: str, where: str) -> list[tuple[Any, ...]]:
    kind, _, rest = spec.partition(":")
    if kind != "simplex":
        return _different([_vector(names, part, where) for part in _parts(spec, where)], where)
    if rest.isdecimal():
        return simplex(len(names), int(rest))
    if rest.startswith("lattice:") and rest[8:].isdecimal():
        return lattice(len(names), int(rest[8:]))
    points = _different([_vector(names, part, where) for part in _parts(rest, where)], where)
    for point in points:
        if any(isinstance(weight, str) or weight < 0 for weight in point) or abs(sum(point) - 1) > 1e-6:
            shown = "/".join(map(str, point))
            raise UserError(f"{where}: {shown} is not on the simplex: weights must not be negative and must sum to 1")
    return points


def _vector(names: Sequence[str], text: str, where: str) -> tuple[Any, ...]:
    found = tuple(_literal(part.strip()) for part in text.split("/"))
    if len(found) != len(names):
        raise UserError(f"{where}: {text!r} has {number_of(len(found), 'weight')}; write one for each of {'/'.join(names)}")
    for weight in found:
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number and not (isinstance(weight, str) and "(" in weight):
            raise UserError(f"{where}: {weight!r} in {text!r} is neither a number nor a schedule")
    return tuple(float(weight) if isinstance(weight, int) else weight for weight in found)


def simplex(tasks: int, count: int) -> list[tuple[float, ...]]:
    """Points of the simplex of weights that sum to 1: its centre, then quasi-random ones, spread evenly.

    Gaps between sorted uniform numbers are spread evenly over the simplex; here the numbers are a scrambled Sobol sequence.

    Args:
        tasks: K.
        count: How many.

    Raises:
        UserError: It is below 1, or there are fewer than two tasks.
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
    found = []
    for bars in itertools.combinations(range(parts + tasks - 1), tasks - 1):
        edges = [-1, *bars, parts + tasks - 1]
        found.append(tuple((b - a - 1) / parts for a, b in itertools.pairwise(edges)))
    return found[::-1]


def _on_simplex(weights: Sequence[float]) -> tuple[float, ...]:
    """Rounded, and still summing to 1."""
    rounded = [round(float(weight), _ROUND) for weight in weights]
    return (*rounded[:-1], round(1 - sum(rounded[:-1]), _ROUND))


def _drawn(ranges: dict[Path, Range], samples: str) -> Axis:
    named = ", ".join(".".join(path) for path in ranges)
    kind, *numbers = samples.split(":")
    if kind not in ("random", "sobol") or len(numbers) not in (1, 2) or not all(n.isdecimal() for n in numbers):
        raise UserError(f"{named}: a range is drawn from; say how often by --samples sobol:N or random:N (and :SEED)")
    count, seed = int(numbers[0]), int(numbers[1]) if len(numbers) == 2 else 0
    if count < 1:
        raise UserError(f"--samples {samples}: there would be no run")
    if kind == "random":
        shares = np.random.default_rng(seed).random((count, len(ranges)))
    else:
        shares = qmc.Sobol(len(ranges), seed=seed).random_base2(math.ceil(math.log2(count)) if count > 1 else 0)[:count]
    points = tuple(tuple(r.at(float(x)) for r, x in zip(ranges.values(), row, strict=True)) for row in shares)
    return Axis(tuple(ranges), points)
