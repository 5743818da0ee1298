"""Several runs as one experiment: their sources and tasks beside each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from mtl_jax.core.errors import UserError, listed
from mtl_jax.data.source import Source
from mtl_jax.experiment import Experiment
from mtl_jax.inference.predict import TrainedRun
from mtl_jax.tasks import AnyTask, Task
from mtl_jax.training.experiment_json import tasks_to_json
from mtl_jax.transfer.adapters.base import RUN

# Fields of tasks that say how they were trained, not what they predict: runs of one experiment may differ in them.
TRAINING_ONLY = ("dropout", "label_smoothing", "balanced", "class_weights")
# Fields of sources that say where the rows lie: whether they are the same is seen from the rows.
PLACES = ("path", "dev_path", "test_path")

RENAME = "train one of them under another name"


class Member(NamedTuple):
    """A run that is merged.

    Attributes:
        name: Its workdir as it was given.
        run: The run.
        data: The contents of its data.json.
    """

    name: str
    run: TrainedRun
    data: Mapping[str, Any]


class Union(NamedTuple):
    """The runs as one.

    Attributes:
        experiment: The first run's, with all sources and tasks; what would train it is left as it was where all runs have the
            same tasks, else it is plain.
        tasks: The tasks, filled with what was found in the runs' data.
        data: For data.json.
        same: Whether all runs have the same tasks.
    """

    experiment: Experiment
    tasks: tuple[Task, ...]
    data: dict[str, Any]
    same: bool


def unite(members: Sequence[Member], method: str) -> Union:
    """The runs as one experiment.

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
            owner, known = tasks.setdefault(task.name, (member, task))
            _check_same("task", owner, known, member, task, TRAINING_ONLY)
        used = {task.source for task in member.run.tasks}
        for source in member.run.experiment.sources:
            if source.name in used:
                first, declared = sources.setdefault(source.name, (member, source))
                _check_same("source", first, declared, member, source, PLACES)
                _check_rows(source.name, first, member)
    filled = cast(tuple[AnyTask, ...], tuple(task for _, task in tasks.values()))
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
    """Without weights, shares and the like, which name tasks of one run only."""
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
    """Finds out whether parameters of adapters mean the same in two runs, which their shapes don't say.

    Raises:
        UserError: They do not: another factor, say, or another order of the sources that each have their own.
    """
    advice = "mtl-jax convert puts Lora and IA3 into the kernels, and such checkpoints can be merged"
    here, there = ({a.name: a for a in member.run.experiment.adapters} for member in (first, second))
    if here.keys() != there.keys():
        names = [", ".join(sorted(adapters)) or "none" for adapters in (there, here)]
        raise UserError(f"{second.name}: its adapters are {names[0]}, and those of {first.name} {names[1]}; {advice}")
    for name, adapter in here.items():
        _check_same("adapter", first, adapter, second, there[name], TRAINING_ONLY, advice)
    own = [adapter.name for adapter in here.values() if adapter.per != RUN]
    if own and first.run.sources != second.run.sources:
        sources = [", ".join(member.run.sources) for member in (second, first)]
        raise UserError(
            f"{second.name}: each source has its own adapters ({listed(own)}), and its sources are {sources[0]}, those of "
            f"{first.name} {sources[1]}; with --task, {advice}"
        )


def _check_same(
    what: str, first: Member, one: Any, second: Member, other: Any, ignored: Sequence[str], advice: str = RENAME
) -> None:
    """Raises UserError where two declarations of one name differ."""
    if type(one) is not type(other):
        differs, here, there = "kind", type(one).__name__, type(other).__name__
    else:
        fields = (field.name for field in dataclasses.fields(one) if field.name not in ignored)
        differs = next((name for name in fields if getattr(one, name) != getattr(other, name)), "")
        here, there = (getattr(side, differs, "") for side in (one, other))
    if differs:
        raise UserError(
            f"{second.name}: {what} {one.name!r} is another than in {first.name}: {differs} is {there!r} there, and {here!r} "
            f"in {first.name}; {what}s of one name must be the same: {advice}"
        )


def _check_rows(source: str, first: Member, second: Member) -> None:
    """Raises UserError where the dev or test rows of a source differ: one run may have learned from the other's."""
    if first is second:
        return
    # The hash is of tokens and labels: it can be compared where both read the rows in the same way.
    tasks = [{t.name for t in member.run.tasks if t.source == source} for member in (first, second)]
    lengths = {member.run.experiment.batch.row_length for member in (first, second)}
    alike = tasks[0] == tasks[1] and len(lengths) == 1
    for split in ("dev", "test"):
        here, there = (member.data["sources"][source][split] for member in (first, second))
        if here != there if alike else here["examples"] != there["examples"]:
            raise UserError(
                f"{second.name}: source {source!r} has other {split} rows than in {first.name}: one of the runs may have "
                "learned from them; merge runs of the same data"
            )
