"""The plan of an ablation: axes become runs, and runs become programs; runs that differ in numbers only share a program."""

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
from mtl_jax.experiment import Experiment, data_seed_of
from mtl_jax.experiment_checks import check
from mtl_jax.training.experiment_json import to_json
from mtl_jax.transfer.optimizer import UNUSED
from mtl_jax.transfer.unlabelled import SelfTraining
from mtl_jax.weighting import schedules

GIVEN = ("equal", "fixed", "scheduled")  # the weightings that can have given weights


class Run(NamedTuple):
    """One training among many.

    Attributes:
        name: Its number, which is also the name of its folder.
        values: {varied field: value}; weights are one field.
        experiment: Its whole configuration; trained alone, it gives the same numbers.
    """

    name: str
    values: dict[str, Any]
    experiment: Experiment


class Program(NamedTuple):
    """Runs that are trained by one compiled program.

    Attributes:
        number: Its place, from 0.
        runs: The runs.
        template: An experiment that represents all runs: a loss that counts in one of them counts in it.
    """

    number: int
    runs: tuple[Run, ...]
    template: Experiment


def runs(
    experiment: Experiment, axes: Sequence[Axis], methods: Sequence[str] = (), seeds: int = 1, *, own_order: bool = False
) -> list[Run]:
    """All combinations of the values of the axes; combinations that give the same experiment are one run.

    An axis over weights is for methods with given weights, and one over weighting_options for the methods that have the option;
    other methods are not combined with it. Methods with given weights keep those of the experiment; its weighting_options are
    for its own rule, and each method has its own.

    Args:
        experiment: The fixed fields, with tasks selected.
        axes: space.axes(...).
        methods: Weighting rules, "cagrad" or "cagrad:c=0.4"; an axis over weights adds "fixed" to them.
        seeds: Number of seeds: experiment.seed and those after it.
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
    used = {path for _, method_axes in by_method for axis in method_axes for path in axis.paths}
    for path in (path for axis in axes for path in axis.paths if path not in used):
        raise UserError(f"--vary {'.'.join(path)}: none of the methods {listed(methods)} has it")
    different: dict[str, Run] = {}
    several_seeds = seeds > 1 or bool(varied_seed)
    for fixed, method_axes in by_method:
        for points in itertools.product(*(axis.points for axis in method_axes)):
            values: dict[Path, Any] = dict(fixed)
            for axis, point in zip(method_axes, points, strict=True):
                values |= dict(zip(axis.paths, point, strict=True))
            for number in range(seeds):
                run_values = values | ({("seed",): experiment.seed + number} if seeds > 1 else {})
                run_experiment = _applied(experiment, run_values)
                if several_seeds and not own_order and run_experiment.data_seed is None:
                    run_experiment = dataclasses.replace(run_experiment, data_seed=experiment.seed)
                shown = {".".join(path): value for path, value in run_values.items() if value != {}}
                different.setdefault(json.dumps(to_json(run_experiment), sort_keys=True), Run("", shown, run_experiment))
    if len(different) < 2:
        raise UserError("nothing varies: give --vary FIELD=VALUES, --methods or --seeds; one run is trained by its script")
    for run in different.values():
        check(run.experiment)
        if run.experiment.optimizer.private.clip:
            raise UserError(
                "optimizer.private: the runs of an ablation learn from the same rows, and what they spend adds up; train each "
                "by its script"
            )
        if run.experiment.sharding == "fsdp":
            raise UserError(
                "sharding is fsdp, but an ablation trains different runs on different devices: leave it replicated, or train "
                "each run by its script"
            )
        for regulariser in run.experiment.regularisers:
            if isinstance(regulariser, SelfTraining):
                raise UserError(
                    f"regularisers: {regulariser.name} chooses the rows that a run reads, and the runs of an ablation "
                    "share theirs; train each by its script"
                )
    width = max(4, len(str(len(different) - 1)))
    return [run._replace(name=f"{number:0{width}d}") for number, run in enumerate(different.values())]


def _methods(axes: Sequence[Axis], methods: Sequence[str]) -> tuple[list[Axis], list[str]]:
    """The axes without that over the weighting, and the methods, which that axis may give."""
    weightings = [axis for axis in axes if axis.paths == (("weighting",),)]
    if weightings and methods:
        raise UserError("--methods and --vary weighting: the field weighting has two axes; name it once")
    methods = [str(value) for axis in weightings for (value,) in axis.points] or list(methods)
    repeated = {method for method in methods if methods.count(method) > 1}
    if repeated:
        raise UserError(f"--methods: {listed(sorted(repeated))} is given twice")
    weights = any(path[0] == "weights" for axis in axes for path in axis.paths)
    if methods and weights and not any(method in ("fixed", "scheduled") for method in methods):
        methods = ["fixed", *methods]
    return [axis for axis in axes if axis not in weightings], methods


def _of_method(experiment: Experiment, text: str, axes: Sequence[Axis]) -> tuple[dict[Path, Any], list[Axis]]:
    """The values that a method fixes, and the axes that it is combined with."""
    name, _, options = name_options.parse(text, "method", weighting.RULES)
    parameters = inspect.signature(weighting.RULES[name]).parameters
    if name in GIVEN and options:
        raise UserError(f"--methods {text}: it has no options; weights are given by --vary weights=...")
    fixed: dict[Path, Any] = {("weighting",): name, ("weighting_options",): options}  # not those of the script's rule
    if not weighting.takes_weights(name):
        fixed["weights",] = {}
    repeated = [path[1] for axis in axes for path in axis.paths if path[0] == "weighting_options" and path[1] in options]
    if repeated:
        raise UserError(f"--methods {text} and --vary weighting-options.{repeated[0]}: the field has two axes; name it once")
    kept = []
    for axis in axes:
        paths = [path for path in axis.paths if path[0] != "weights" or weighting.takes_weights(name)]
        paths = [path for path in paths if not (path[0] == "weighting_options" and path[1] not in parameters)]
        if paths:
            places = [axis.paths.index(path) for path in paths]
            points = dict.fromkeys(tuple(_hashable(point[n]) for n in places) for point in axis.points)
            kept.append(Axis(tuple(paths), tuple(tuple(_plain(value) for value in point) for point in points)))
    return fixed, kept


def _hashable(value: Any) -> Any:
    return tuple(value.items()) if isinstance(value, dict) else value


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, tuple) else value


def _applied(experiment: Experiment, values: Mapping[Path, Any]) -> Experiment:
    """The experiment with these values; given weights also make the weighting fixed, or scheduled."""
    tasks = [task.name for task in experiment.tasks]
    for path, value in values.items():
        owner = path[:-1]
        if owner and owner[-1] == "weights" and not fields.get(experiment, owner):
            experiment = fields.put(experiment, owner, dict.fromkeys(tasks, 1.0))
        experiment = fields.put(experiment, path, value)
    _refuse_unused(experiment, values)
    if any(path[0] == "weights" and value != {} for path, value in values.items()):
        if experiment.weighting not in GIVEN and not weighting.takes_weights(str(experiment.weighting)):
            raise UserError(f"--vary weights: weights are for the weighting fixed, but it is {experiment.weighting!r}")
        if all(phase.weights for phase in experiment.phases):
            raise UserError("--vary weights: every phase has its own weights; vary phases.N.weights")
        if experiment.weighting in GIVEN:
            texts = any(isinstance(weight, str) for weight in experiment.weights.values())
            experiment = dataclasses.replace(experiment, weighting="scheduled" if texts else "fixed")
    return experiment


def _refuse_unused(experiment: Experiment, values: Mapping[Path, Any]) -> None:
    """Raises UserError if a varied number is not used by the experiment: all of its runs would be the same."""
    for path in values:
        if path == ("optimizer", "learning_rate") and all(phase.learning_rate is not None for phase in experiment.phases):
            raise UserError("--vary optimizer.learning-rate: every phase has its own rate; vary phases.N.learning-rate")
        if path[0] == "optimizer" and path[-1] in UNUSED.get(experiment.optimizer.name, ()):
            raise UserError(f"--vary {'.'.join(path)}: the optimizer {experiment.optimizer.name} does not use it")


def programs(planned: Sequence[Run]) -> list[Program]:
    """The programs of these runs, in the order of their first runs."""
    groups: dict[str, list[Run]] = {}
    for run in planned:
        groups.setdefault(_key(run.experiment), []).append(run)
    return [Program(number, tuple(group), _template(group)) for number, group in enumerate(groups.values())]


def _key(experiment: Experiment) -> str:
    """A text that is the same for all runs of one program: the experiment without the numbers that may differ."""
    if experiment.weighting == "scheduled":
        experiment = dataclasses.replace(experiment, weighting="fixed")
    for path in fields.numbers(experiment):
        if fields.get(experiment, path) is not None:
            experiment = fields.put(experiment, path, 0.0)
    return json.dumps(to_json(dataclasses.replace(experiment, seed=0, data_seed=None)), sort_keys=True)


def _template(group: Sequence[Run]) -> Experiment:
    """The first run's experiment, with the largest value of each number, so that only a weight that is 0 in all runs is 0."""
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
    """The seed of a run's data order."""
    return data_seed_of(run.experiment)
