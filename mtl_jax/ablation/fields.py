"""Fields of an experiment by path: find, get and replace them, and collect the numbers in which runs of one program differ."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import weighting
from mtl_jax.core.errors import UserError, listed, unknown
from mtl_jax.experiment import Experiment, rule_name
from mtl_jax.weighting import schedules
from mtl_jax.weighting.base import example_signals

Path = tuple[str, ...]
# {field: f32[N], or f32[N, steps] for schedules} for N runs; of one run without the first axis.
Numbers = dict[str, Any]

# Numbers of the optimizer that may be inputs of a compiled step; its other fields decide how the step is built.
_OPTIMIZER = ("learning_rate", "weight_decay", "b1", "b2", "eps", "ratio")
# {field that may not vary: the reason}
_REFUSED = {
    "name": "it only names the experiment",
    "devices": "it does not change what is trained",
    "sharding": "it does not change what is trained",
    "remat": "it does not change what is trained",
    "only": "runs with different tasks cannot be compared; run two ablations",
    "checkpoints": "it decides what is kept, not what is trained",
    "evaluation": "runs are compared by it",
    "sources": "runs are compared on the same data",
}
_ALLOWED = {("sources", "limit_train"), ("evaluation", "patience")}


def find(experiment: Experiment, text: str) -> Path:
    """The path of a field as the command line names it: "optimizer.learning-rate", "phases.0.steps", "weights.ner".

    An element of a tuple is named by its place or its name. The path has its place, and field names with underscores.

    Raises:
        UserError: There is no such field; the message lists those that exist.
    """
    path: list[str] = []
    value: Any = experiment
    for part in text.split("."):
        where = ".".join(path) or "the experiment"
        if dataclasses.is_dataclass(value):
            names = [field.name for field in dataclasses.fields(value)]
            name = part.replace("-", "_")
            if name not in names:
                raise unknown(f"field of {where}:", part, names)
            value = getattr(value, name)
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            places = {str(getattr(element, "name", place)): place for place, element in enumerate(value)}
            place = int(part) if part.isdecimal() else places.get(part, len(value))
            if not 0 <= place < len(value):
                raise unknown(f"element of {where}:", part, list(places))
            name, value = str(place), value[place]
        elif isinstance(value, Mapping):
            name, value = part, value.get(part)
            if path[-1] == "weights":
                names = [task.name for task in experiment.tasks]
                if name not in names:
                    raise unknown(f"task in {where}:", name, names)
            elif path[-1] == "weighting_options":
                name = part.replace("-", "_")
        else:
            raise UserError(f"--vary {text}: {where} has no fields")
        path.append(name)
    return tuple(path)


def get(tree: Any, path: Path) -> Any:
    """The value of a field; None if a dict has no such key."""
    for name in path:
        if isinstance(tree, Mapping):
            tree = tree.get(name)
        else:
            tree = tree[int(name)] if isinstance(tree, tuple) else getattr(tree, name)
    return tree


def put(tree: Any, path: Path, value: Any) -> Any:
    """A copy with another value of a field, which may be traced."""
    if not path:
        return value
    name, rest = path[0], path[1:]
    if isinstance(tree, tuple):
        place = int(name)
        return (*tree[:place], put(tree[place], rest, value), *tree[place + 1 :])
    if isinstance(tree, Mapping):
        return {**tree, name: put(tree.get(name), rest, value)}
    return dataclasses.replace(tree, **{name: put(getattr(tree, name), rest, value)})


def check(experiment: Experiment, path: Path) -> None:
    """Checks that a field may vary.

    Raises:
        UserError: It may not; the message names the reason and the fields that may.
    """
    text = ".".join(path)
    if path[0] in _REFUSED and (path[0], path[-1]) not in _ALLOWED:
        raise UserError(f"--vary {text}: it cannot vary: {_REFUSED[path[0]]}. {_may_vary()}")
    value = get(experiment, path)
    if (isinstance(value, tuple | Mapping) and not is_weights(path)) or dataclasses.is_dataclass(value):
        raise UserError(f"--vary {text}: it cannot vary as a whole: it has parts. {_may_vary()}")


def _may_vary() -> str:
    rates = ", ".join("optimizer." + name.replace("_", "-") for name in _OPTIMIZER)
    return (
        "What may: weights, weights.TASK, phases.N.weights.TASK, regularisers.N.weight, weighting-options.NAME, seed, "
        f"phases.N.learning-rate, {rates} within one program; "
        "other fields of one value, such as weighting, trunk.dropout or phases.N.steps, in a program for each value"
    )


def is_weights(path: Path) -> bool:
    """Whether a field is a dict with a weight for each task."""
    return path[-1] == "weights"


def numbers(experiment: Experiment) -> list[Path]:
    """The fields in which runs of one program may differ: their numbers are inputs of the compiled program."""
    paths: list[Path] = [("optimizer", name) for name in _OPTIMIZER]
    paths += [("weights", task) for task in experiment.weights]
    for place, phase in enumerate(experiment.phases):
        paths.append(("phases", str(place), "learning_rate"))
        paths += [("phases", str(place), "weights", task) for task in phase.weights]
    paths += [("regularisers", str(place), "weight") for place in range(len(experiment.regularisers))]
    if rule_name(experiment) in weighting.RULES and experiment.weighting not in ("fixed", "scheduled"):
        options = tuple(experiment.weighting_options.items())
        tasks = tuple(sorted(task.name for task in experiment.tasks))
        paths += [("weighting_options", name) for name in _traceable(rule_name(experiment), options, tasks)]
    return paths


@functools.cache
def _traceable(rule_name: str, options: tuple[tuple[str, Any], ...], names: tuple[str, ...]) -> list[str]:
    """The options of a weighting rule that may be traced."""

    def traceable(name: str) -> bool:
        def weigh(value: jax.Array) -> Any:
            rule = weighting.make(rule_name, **{**dict(options), name: value})
            losses = {task: jax.numpy.ones(()) for task in names}
            return rule.update(rule.init(names), example_signals(rule, losses))

        try:
            jax.eval_shape(weigh, jax.ShapeDtypeStruct((), jax.numpy.float32))
        except (jax.errors.JAXTypeError, TypeError):  # the option decides how the rule is built
            return False
        return True

    return [name for name, value in options if isinstance(value, int | float) and traceable(name)]


def type_of(experiment: Experiment, path: Path) -> Any:
    """The declared type of a field: float, int, str, bool, or a union of them; Any if no type is declared."""
    owner = get(experiment, path[:-1])
    if not dataclasses.is_dataclass(owner):
        return float | str if path[-2:-1] == ("weights",) else Any
    return typing.get_type_hints(type(owner))[path[-1]]


def fits(value: Any, declared: Any) -> bool:
    """Whether a value is of a declared type; a whole number is also a float."""
    if declared is Any:
        return True
    if isinstance(declared, types.UnionType) or typing.get_origin(declared) in (typing.Union, types.UnionType):
        return any(fits(value, member) for member in typing.get_args(declared))
    if typing.get_origin(declared) is typing.Literal:
        return value in typing.get_args(declared)
    if declared in (None, type(None)):
        return value is None
    if declared is bool or isinstance(value, bool):
        return declared is bool and isinstance(value, bool)
    return isinstance(value, int | float if declared is float else declared)


def in_words(declared: Any) -> str:
    """A declared type in the words of an error line."""
    if isinstance(declared, types.UnionType) or typing.get_origin(declared) is typing.Union:
        return " or ".join(map(in_words, typing.get_args(declared)))
    if typing.get_origin(declared) is typing.Literal:
        return f"one of {listed(typing.get_args(declared))}"
    names = {
        float: "a number",
        int: "a whole number",
        str: "a text",
        bool: "true or false",
        type(None): "none",
        weighting.Rule: "a Rule",
    }
    return names.get(declared, str(declared))


def collect(experiments: Sequence[Experiment]) -> Numbers:
    """{field: f32[N]} for the numbers in which N experiments differ; f32[N, steps] if one of them is a schedule.

    Args:
        experiments: The N experiments of one program.
    """
    collected: Numbers = {}
    steps = range(sum(phase.steps for phase in experiments[0].phases))
    for path in numbers(experiments[0]):
        values = [get(experiment, path) for experiment in experiments]
        if all(value == values[0] for value in values):
            continue
        if any(isinstance(value, str) for value in values):
            collected[".".join(path)] = np.stack([np.asarray(schedules.over(value, steps, path[-1])) for value in values])
        else:
            collected[".".join(path)] = np.array(values, np.float32)
    return collected


def insert(experiment: Experiment, values: Mapping[str, jax.Array]) -> Experiment:
    """The experiment with the numbers of one run.

    Args:
        experiment: An experiment of the program.
        values: {field: f32[] or f32[steps]}; they may be traced.
    """
    for text, value in values.items():
        experiment = put(experiment, tuple(text.split(".")), _schedule_of(value) if value.ndim else value)
    return experiment


def _schedule_of(values_S: jax.Array) -> schedules.Schedule:
    return lambda step: values_S[jnp.clip(step, 0, len(values_S) - 1)]
