"""From what is varied to runs, and from runs to programs: runs whose experiments differ in numbers only share one."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mtl_jax import weighting
from mtl_jax.ablation import fields
from mtl_jax.ablation.fields import Path
from mtl_jax.ablation.space import Axis
from mtl_jax.core import name_options
from mtl_jax.core.errors import UserError, listed
from mtl_jax.experiment import Experiment, check, data_seed_of
from mtl_jax.experiment_json import to_json
from mtl_jax.transfer.optimizer import UNUSED
from mtl_jax.weighting import schedules

GIVEN = ("equal", "fixed", "scheduled")  # the weightings that given weights go with


class Run(NamedTuple):
    """One training among many.

    Attributes:
        name: Its number, and its folder's name.
        values: {field: value} of what was varied; weights are one field.
        experiment: Its whole configuration: trained alone, it gives the same numbers.
    """

    name: str
    values: dict[str, Any]
    experiment: Experiment


class Program(NamedTuple):
    """Runs that are trained by one compiled program.

    Attributes:
        number: Its place, from 0.
        runs: The runs.
        template: An experiment that stands for all of them: what counts in one of them counts in it.
    """

    number: int
    runs: tuple[Run, ...]
    template: Experiment


def runs(
    experiment: Experiment, axes: Sequence[Axis], methods: Sequence[str] = (), seeds: int = 1, *, own_order: bool = False
) -> list[Run]:
    """All combinations, those that come to the same experiment once.

    An axis over weights belongs to given weights, and one over weighting_options to the methods that have the option: the other
    methods are not crossed with it.

    Args:
        experiment: What stays, tasks selected.
        axes: space.axes(...).
        methods: Weighting rules, "cagrad" or "cagrad:c=0.4"; given weights add "fixed" to them.
        seeds: How many: experiment.seed and those after it.
        own_order: Whether each seed has its own order of the data; else all runs see the same batches.

    Raises:
        UserError: A combination is refused, or there is none.
    """
    axes, methods = _methods(axes, methods)
    if seeds < 1:
        raise UserError(f"--seeds is {seeds}; it must be at least 1")
    varied_seed = [axis for axis in axes if ("seed",) in axis.paths]
    if varied_seed and seeds > 1:
        raise UserError("--seeds and --vary seed: the field seed has two axes; name it once")
    by_method = [_of_method(experiment, method, axes) for method in methods] if methods else [({}, list(axes))]
    used = {path for _, own in by_method for axis in own for path in axis.paths}
    for path in (path for axis in axes for path in axis.paths if path not in used):
        raise UserError(f"--vary {'.'.join(path)}: none of the methods {listed(methods)} has it")
    found: list[Run] = []
    known: set[str] = set()
    several = seeds > 1 or bool(varied_seed)
    for fixed, own_axes in by_method:
        for points in itertools.product(*(axis.points for axis in own_axes)):
            values: dict[Path, Any] = dict(fixed)
            for axis, point in zip(own_axes, points, strict=True):
                values |= dict(zip(axis.paths, point, strict=True))
            for number in range(seeds):
                own = values | ({("seed",): experiment.seed + number} if seeds > 1 else {})
                alone = _applied(experiment, own)
                if several and not own_order and alone.data_seed is None:
                    alone = dataclasses.replace(alone, data_seed=experiment.seed)
                key = json.dumps(to_json(alone), sort_keys=True)
                if key not in known:
                    known.add(key)
                    shown = {".".join(path): value for path, value in own.items() if value != {}}
                    found.append(Run("", shown, alone))
    if len(found) < 2:
        raise UserError("nothing varies: give --vary FIELD=VALUES, --methods or --seeds; one run is trained by its script")
    for run in found:
        check(run.experiment)
    width = max(4, len(str(len(found) - 1)))
    return [run._replace(name=f"{number:0{width}d}") for number, run in enumerate(found)]


def _methods(axes: Sequence[Axis], methods: Sequence[str]) -> tuple[list[Axis], list[str]]:
    """Axes without that of the weighting, which is the methods'."""
    named = [axis for axis in axes if axis.paths == (("weighting",),)]
    if named and methods:
        raise UserError("--methods and --vary weighting: the field weighting has two axes; name it once")
    methods = [str(value) for axis in named for (value,) in axis.points] or list(methods)
    twice = {method for method in methods if methods.count(method) > 1}
    if twice:
        raise UserError(f"--methods: {listed(sorted(twice))} stands there twice")
    weights = any(path[0] == "weights" for axis in axes for path in axis.paths)
    if methods and weights and not any(method in ("fixed", "scheduled") for method in methods):
        methods = ["fixed", *methods]
    return [axis for axis in axes if axis not in named], methods


def _of_method(experiment: Experiment, text: str, axes: Sequence[Axis]) -> tuple[dict[Path, Any], list[Axis]]:
    """The values that a method brings, and the axes that it is crossed with."""
    name, _, options = name_options.parse(text, "method", weighting.RULES)
    has = inspect.signature(weighting.RULES[name]).parameters
    fixed: dict[Path, Any] = {("weighting",): name}
    if name not in GIVEN:
        fixed |= {("weights",): {}, ("weighting_options",): options}
    elif options:
        raise UserError(f"--methods {text}: it has no options; weights are given by --vary weights=...")
    elif name == "equal":
        fixed |= {("weights",): {}, ("weighting_options",): {}}
    twice = [path[1] for axis in axes for path in axis.paths if path[0] == "weighting_options" and path[1] in options]
    if twice:
        raise UserError(f"--methods {text} and --vary weighting-options.{twice[0]}: the field has two axes; name it once")
    kept = []
    for axis in axes:
        own = [path for path in axis.paths if not (path[0] == "weights" and name not in ("fixed", "scheduled"))]
        own = [path for path in own if not (path[0] == "weighting_options" and path[1] not in has)]
        if own:
            places = [axis.paths.index(path) for path in own]
            points = dict.fromkeys(tuple(_hashable(point[n]) for n in places) for point in axis.points)
            kept.append(Axis(tuple(own), tuple(tuple(_plain(value) for value in point) for point in points)))
    return fixed, kept


def _hashable(value: Any) -> Any:
    return tuple(value.items()) if isinstance(value, dict) else value


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, tuple) else value


def _applied(experiment: Experiment, values: Mapping[Path, Any]) -> Experiment:
    """The experiment with these values, and what follows from them: a weight that is given makes the weighting fixed."""
    tasks = [task.name for task in experiment.tasks]
    for path, value in values.items():
        owner = path[:-1]
        if owner and owner[-1] == "weights" and not fields.get(experiment, owner):
            experiment = fields.put(experiment, owner, dict.fromkeys(tasks, 1.0))
        experiment = fields.put(experiment, path, value)
    _refuse_idle(experiment, values)
    if any(path[0] == "weights" and value != {} for path, value in values.items()):
        if experiment.weighting not in GIVEN:
            raise UserError(f"--vary weights: weights are for the weighting fixed, but it is {experiment.weighting!r}")
        if all(phase.weights for phase in experiment.phases):
            raise UserError("--vary weights: every phase has weights of its own; vary phases.N.weights")
        texts = any(isinstance(weight, str) for weight in experiment.weights.values())
        experiment = dataclasses.replace(experiment, weighting="scheduled" if texts else "fixed")
    return experiment


def _refuse_idle(experiment: Experiment, values: Mapping[Path, Any]) -> None:
    """Raises UserError where a value is of a number that the experiment does not use: its runs would all be the same."""
    for path in values:
        if path == ("optimizer", "learning_rate") and all(phase.learning_rate is not None for phase in experiment.phases):
            raise UserError("--vary optimizer.learning-rate: every phase has a rate of its own; vary phases.N.learning-rate")
        if path[0] == "optimizer" and path[-1] in UNUSED.get(experiment.optimizer.name, ()):
            raise UserError(f"--vary {'.'.join(path)}: the optimizer {experiment.optimizer.name} does not use it")


def programs(found: Sequence[Run]) -> list[Program]:
    """The runs by program, in the order in which they first occur."""
    groups: dict[str, list[Run]] = {}
    for run in found:
        groups.setdefault(_key(run.experiment), []).append(run)
    return [Program(number, tuple(group), _template(group)) for number, group in enumerate(groups.values())]


def _key(experiment: Experiment) -> str:
    """What is alike in the runs of one program."""
    if experiment.weighting == "scheduled":
        experiment = dataclasses.replace(experiment, weighting="fixed")
    for path in fields.numbers(experiment):
        if fields.get(experiment, path) is not None:
            experiment = fields.put(experiment, path, 0.0)
    return json.dumps(to_json(dataclasses.replace(experiment, seed=0, data_seed=None)), sort_keys=True)


def _template(group: Sequence[Run]) -> Experiment:
    """The first run, with of every number one that counts somewhere: a weight that is 0 in all runs only is left out."""
    first = group[0].experiment
    template = first
    if any(run.experiment.weighting == "scheduled" for run in group):
        template = dataclasses.replace(template, weighting="scheduled")
    steps = range(sum(phase.steps for phase in first.phases))
    for path in fields.numbers(first):
        values = [fields.get(run.experiment, path) for run in group]
        if any(value != values[0] for value in values):
            counts = [np.asarray(schedules.over(value, steps, path[-1])).max() for value in values]
            template = fields.put(template, path, values[int(np.argmax(counts))])
    return dataclasses.replace(template, seed=min(run.experiment.seed for run in group))


def order_of(run: Run) -> int:
    """The seed of the order in which a run sees the data."""
    return data_seed_of(run.experiment)
