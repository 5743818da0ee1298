"""Joins several runs into one experiment with the sources and tasks of all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from mtl_jax.core.errors import UserError, listed
from mtl_jax.data.source import Source
from mtl_jax.experiment import Experiment
from mtl_jax.inference.predict import TrainedRun
from mtl_jax.tasks import Task
from mtl_jax.training.experiment_json import tasks_to_json
from mtl_jax.transfer.adapters import Adapted
from mtl_jax.transfer.adapters.base import RUN

# Fields of tasks that matter in training, or to readers, only: joined runs may differ in them, and the first run's are kept.
MAY_DIFFER = ("dropout", "label_smoothing", "balanced", "class_weights", "label_names")
# Fields of sources that say where rows are: the rows themselves are compared.
PLACES = ("path", "dev_path", "test_path", "rows", "dev_rows", "test_rows")

RENAME = "train one of them under another name"


class Member(NamedTuple):
    """A run that is merged.

    Attributes:
        name: Its workdir as given on the command line.
        run: The run.
        data: The contents of its data.json.
    """

    name: str
    run: TrainedRun
    data: Mapping[str, Any]


class Union(NamedTuple):
    """The runs as one experiment.

    Attributes:
        experiment: The first run's, with the sources and tasks of all. If the runs have different tasks, weights, shares and
            the like are reset.
        tasks: The tasks, with the labels and sizes that the runs' data gave them.
        data: The contents of data.json.
        same: Whether all runs have the same tasks.
    """

    experiment: Experiment
    tasks: tuple[Task, ...]
    data: dict[str, Any]
    same: bool


def unite(members: Sequence[Member], method: str) -> Union:
    """Joins runs into one experiment.

    Args:
        members: The runs.
        method: The method's name, which becomes part of the experiment's.

    Raises:
        UserError: Two runs have different tasks or sources of one name, or different adapters.
    """
    for member in members[1:]:
        check_adapters(members[0], member)
    tasks: dict[str, tuple[Member, Task]] = {}
    sources: dict[str, tuple[Member, Source]] = {}
    for member in members:
        for task in member.run.tasks:
            owner, earlier = tasks.setdefault(task.name, (member, task))
            _check_same("task", owner, earlier, member, task, MAY_DIFFER)
        used = {task.source for task in member.run.tasks}
        for source in member.run.experiment.sources:
            if source.name in used:
                first, declared = sources.setdefault(source.name, (member, source))
                _check_same("source", first, declared, member, source, PLACES)
                _check_rows(source.name, first, member)
    filled = cast(tuple[Task, ...], tuple(task for _, task in tasks.values()))
    same = all({task.name for task in member.run.tasks} == set(tasks) for member in members)
    data = {
        "sources": {name: member.data["sources"][name] for name, (member, _) in sources.items()},
        "tasks": tasks_to_json(filled),
    }
    declared_tasks = {task.name: task for member in reversed(members) for task in member.run.experiment.tasks}
    experiment = dataclasses.replace(
        members[0].run.experiment,
        name=f"{'+'.join(dict.fromkeys(member.run.experiment.name for member in members))}-{method}",
        sources=tuple(source for _, source in sources.values()),
        tasks=tuple(declared_tasks[name] for name in tasks),
        only=(),
    )
    return Union(experiment if same else _plain(experiment, members), filled, data, same)


def _plain(experiment: Experiment, members: Sequence[Member]) -> Experiment:
    """The experiment without weights, shares and the like, which name the tasks of one run only."""
    phases = tuple(dataclasses.replace(phase, weights={}, mixture="", shares={}) for phase in experiment.phases)
    length = max(member.run.experiment.batch.row_length for member in members)
    return dataclasses.replace(
        experiment,
        phases=phases,
        weighting="equal",
        weights={},
        weighting_options={},
        combinators=(),
        regularisers=(),
        batch=dataclasses.replace(experiment.batch, row_length=length, mixture="uniform", mixture_end="", shares={}),
        evaluation=dataclasses.replace(experiment.evaluation, criterion="mean"),
    )


def check_adapters(first: Member, second: Member) -> None:
    """Checks that parameters of adapters and of the sharing mean the same in two runs, beyond their shapes.

    Raises:
        UserError: They differ, for example in a factor, or in the order of sources or tasks that have parameters of their own.
    """
    _check_sharing(first, second)
    advice = "mtl-jax convert merges Lora and IA3 into the kernels; such checkpoints can be merged"
    adapters, others = ({a.name: a for a in member.run.experiment.adapters} for member in (first, second))
    if adapters.keys() != others.keys():
        names = [", ".join(sorted(names)) or "none" for names in (others, adapters)]
        raise UserError(f"{second.name}: its adapters are {names[0]}, and those of {first.name} {names[1]}; {advice}")
    for name, adapter in adapters.items():
        _check_same("adapter", first, adapter, second, others[name], MAY_DIFFER, advice)
    separate = [adapter.name for adapter in adapters.values() if adapter.per != RUN]
    if separate and first.run.sources != second.run.sources:
        sources = [", ".join(member.run.sources) for member in (second, first)]
        raise UserError(
            f"{second.name}: each source has separate adapters ({listed(separate)}), and its sources are {sources[0]}, "
            f"those of {first.name} {sources[1]}; with --task, {advice}"
        )


def _check_sharing(first: Member, second: Member) -> None:
    """Raises UserError unless two runs share their trunks in the same way, and by the same tasks."""
    sharing, other = (member.run.experiment.sharing for member in (first, second))
    if sharing != other:
        raise UserError(
            f"{second.name}: its tasks share the trunk by {other}, and those of {first.name} by {sharing}; only runs with the "
            "same sharing can be merged"
        )
    module = first.run.trunk.module
    by_task = isinstance(module, Adapted) and module.routes is not None
    tasks = [[task.name for task in member.run.tasks] for member in (first, second)]
    if by_task and tasks[0] != tasks[1]:
        raise UserError(
            f"{second.name}: its tasks are {listed(tasks[1])}, and those of {first.name} are {listed(tasks[0])}; each has "
            "parameters of its own in the trunk, so the tasks must be the same, in the same order"
        )


def _check_same(
    kind: str, first: Member, declared: Any, second: Member, other: Any, ignored: Sequence[str], advice: str = RENAME
) -> None:
    """Raises UserError if two declarations of one name differ."""
    if type(declared) is not type(other):
        differing, values = "kind", (type(declared).__name__, type(other).__name__)
    else:
        fields = (field.name for field in dataclasses.fields(declared) if field.name not in ignored)
        differing = next((name for name in fields if getattr(declared, name) != getattr(other, name)), "")
        values = getattr(declared, differing, ""), getattr(other, differing, "")
    if differing:
        raise UserError(
            f"{second.name}: {kind} {declared.name!r} differs from that in {first.name}: {differing} is {values[1]!r}, but "
            f"{values[0]!r} in {first.name}; {kind}s of one name must be the same: {advice}"
        )


def _check_rows(source: str, first: Member, second: Member) -> None:
    """Raises UserError if the dev or test rows of a source differ: one run may have trained on those of the other."""
    if first is second:
        return
    # The hash is of tokens and labels, so it can be compared if both runs read the rows in the same way.
    tasks = [{t.name for t in member.run.tasks if t.source == source} for member in (first, second)]
    lengths = {member.run.experiment.batch.row_length for member in (first, second)}
    alike = tasks[0] == tasks[1] and len(lengths) == 1
    for split in ("dev", "test"):
        rows, others = (member.data["sources"][source][split] for member in (first, second))
        if rows != others if alike else rows["examples"] != others["examples"]:
            raise UserError(
                f"{second.name}: source {source!r} has other {split} rows than in {first.name}: one of the runs may have "
                "trained on them; merge runs of the same data"
            )
