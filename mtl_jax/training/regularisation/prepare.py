"""The regularisers of a run before its first step: what they need is opened, and what is wrong with them is found."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from mtl_jax.core.errors import UserError, unknown
from mtl_jax.core.trees import leaves_of, matching
from mtl_jax.data.corpus import Corpus
from mtl_jax.experiment import Experiment
from mtl_jax.tasks import Task
from mtl_jax.training import restore
from mtl_jax.training.regularisation import fisher
from mtl_jax.training.regularisation.teachers import Teacher, check_vocabulary, open_teacher, tasks_to_imitate
from mtl_jax.training.restore import Run
from mtl_jax.transfer.regularisers import EWC, FIELD, L2SP, AnyRegulariser, Distillation, RDrop
from mtl_jax.trunks import Trunk
from mtl_jax.weighting import schedules


class Opened(NamedTuple):
    """What regularisers need.

    Attributes:
        teachers: As in Prepared; so are learned and watched.
    """

    teachers: dict[str, Teacher]
    learned: dict[str, Run]
    watched: dict[str, list[str]]


def of_phase(experiment: Experiment, number: int, steps: range) -> tuple[AnyRegulariser, ...]:
    """The regularisers that count in a phase.

    Args:
        experiment: The experiment.
        number: The phase's place, from 0.
        steps: Its steps.
    """
    begun = {"", *(phase.name for phase in experiment.phases[: number + 1])}
    return tuple(
        each for each in experiment.regularisers if each.phase in begun and schedules.over(each.weight, steps, each.name).any()
    )


def prepare(experiment: Experiment, trunk: Trunk, corpus: Corpus, texts: Sequence[str]) -> Opened:
    """Opens teachers and other runs; those of regularisers that never count stay closed.

    Args:
        experiment: The experiment.
        trunk: Its trunk.
        corpus: Its data.
        texts: Some training texts.

    Raises:
        UserError: One of them cannot be opened, or does not go with this run.
    """
    found = Opened({}, {}, {})
    tasks = {task.name: task for task in corpus.tasks}
    length = experiment.batch.row_length
    for each in _used(experiment):
        if isinstance(each, Distillation):
            teacher = open_teacher(each, trunk, tasks, length, texts, trunk.module.dtype)
            found.teachers[each.name] = teacher
            if each.of == "logits":
                found.watched[each.name] = tasks_to_imitate(each, teacher, tasks)
        elif isinstance(each, RDrop) and each.tasks:
            found.watched[each.name] = list(each.tasks)
        elif isinstance(each, EWC):
            if each.run:
                run = restore.open_finished(Path(each.run), f"{FIELD}: run of {each.name}")
                fisher.source_of_run(run, each)
                check_vocabulary(trunk.tokenizer, run.trunk.tokenizer, texts, f"{FIELD}: run of {each.name}, {each.run},")
                found.learned[each.name] = run
            elif each.source not in corpus.splits["train"]:
                raise unknown(f"source of {each.name}:", each.source, corpus.splits["train"])
            learned = found.learned[each.name].tasks if each.run else corpus.tasks
            fisher.check(each, [task for task in learned if task.source == each.source])
    return found


def projections(experiment: Experiment, teachers: Mapping[str, Teacher], width: int) -> dict[str, Any]:
    """{regulariser: parameters of its own}, which stand beside the heads: from the trunk's width to a teacher's.

    Args:
        experiment: Its seed decides.
        teachers: As in Prepared.
        width: The trunk's.
    """
    found = {}
    for each in experiment.regularisers:
        if isinstance(each, Distillation) and each.name in teachers:
            other = teachers[each.name].width
            if each.of != "logits" and other != width:
                key = jax.random.fold_in(jax.random.key(experiment.seed), zlib.crc32(each.name.encode()))
                kernel = jax.nn.initializers.lecun_normal()(key, (width, other))
                found[each.name] = {"projection": {"kernel": kernel}}
    return found


def check(
    experiment: Experiment, tasks: Mapping[str, Task], trunk: Trunk, params: Any, learned: Mapping[str, Run], trains_trunk: bool
) -> None:
    """Finds out whether regularisers have anything to work on.

    Args:
        experiment: The experiment.
        tasks: Its tasks, filled in.
        trunk: Its trunk.
        params: Its parameters.
        learned: As in Opened.
        trains_trunk: Whether any of the trunk trains in some phase.

    Raises:
        UserError: An expression matches no parameter, another run's parameters have other shapes, outputs cannot be compared,
            or there is no dropout that R-Drop could vary.
    """
    leaves = leaves_of(params)
    if experiment.mixout.p:
        _matches("mixout.parameters", experiment.mixout.parameters, leaves)
    for each in _used(experiment):
        if isinstance(each, L2SP):
            _matches(f"{FIELD}: shared of {each.name}", each.shared, leaves)
        elif isinstance(each, EWC):
            paths = _matches(f"{FIELD}: parameters of {each.name}", each.parameters, leaves)
            if each.run:
                same_shapes(each, paths, leaves, leaves_of(learned[each.name].params))
        elif isinstance(each, RDrop):
            _can_differ(each, tasks, trunk, experiment.adapters, trains_trunk)


def _used(experiment: Experiment) -> list[AnyRegulariser]:
    steps = range(sum(phase.steps for phase in experiment.phases))
    return [each for each in experiment.regularisers if schedules.over(each.weight, steps, each.name).any()]


def _matches(where: str, pattern: str, leaves: Mapping[str, Any]) -> list[str]:
    found = matching(pattern, leaves)
    if not found:
        first, *_, last = leaves
        raise UserError(f"{where}, {pattern!r}, matches no parameter; paths look like {first} and {last}")
    return found


def same_shapes(each: EWC, paths: Collection[str], own: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Raises UserError where another run's parameters are not of the shapes here.

    Args:
        each: Names the run.
        paths: The parameters that are compared.
        own: {path: leaf} here.
        other: {path: leaf} there.
    """
    for path in paths:
        if path not in other or other[path].shape != own[path].shape:
            there = f"of shape {other[path].shape}" if path in other else "absent"
            raise UserError(
                f"{FIELD}: run of {each.name}: {path} is {there} in {each.run} and of shape {own[path].shape} here: "
                "it must be a run with the same trunk"
            )


def _can_differ(each: RDrop, tasks: Mapping[str, Task], trunk: Trunk, adapters: Sequence[Any], trains_trunk: bool) -> None:
    chosen = [tasks[name] for name in each.tasks] or [task for task in tasks.values() if task.compared_as]
    for task in chosen:
        if not task.compared_as:
            raise UserError(
                f"{FIELD}: {each.name}: outputs of a {type(task).__name__} such as {task.name!r} cannot be compared"
            )
    if not chosen:
        raise UserError(f"{FIELD}: {each.name}: there is no task whose outputs can be compared")
    config = getattr(trunk.module, "config", None)
    rates = [getattr(config, name) for name in dir(config) if "dropout" in name]
    rates = [*rates, *(getattr(adapter, "dropout", 0.0) for adapter in adapters)] if trains_trunk else []
    if not any(rates) and not any(task.dropout for task in chosen):
        raise UserError(
            f"{FIELD}: {each.name} compares two passes that differ by dropout, but there is none: set trunk.dropout or a task's"
        )
