"""The experiment and its tasks as JSON: config.json and data.json of a workdir, written and read back."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cattrs

from mtl_jax import weighting
from mtl_jax.audit import deidentified_rows
from mtl_jax.audit.person_names import NAMES
from mtl_jax.audit.recognisers import RECOGNISERS
from mtl_jax.core import configuration, parts
from mtl_jax.core.errors import UserError
from mtl_jax.core.files import shown
from mtl_jax.core.files import to_json as to_strict_json
from mtl_jax.core.json_shapes import mapping, object_of, text
from mtl_jax.data import mixture
from mtl_jax.data.augmentations import of_source
from mtl_jax.data.formats import READERS, script_rows
from mtl_jax.data.source import Augmentation, RowEdit
from mtl_jax.experiment import Experiment, rule_name
from mtl_jax.models.kernels import KERNELS
from mtl_jax.sharing.base import Sharing
from mtl_jax.tasks import Task
from mtl_jax.tasks.metrics import METRICS
from mtl_jax.training import workdir as workdirs
from mtl_jax.training.json_converter import converter
from mtl_jax.transfer.accountants import ACCOUNTANTS
from mtl_jax.transfer.adapters import Adapter
from mtl_jax.transfer.pseudo_labels import CHOICES
from mtl_jax.transfer.regularisers import Regulariser
from mtl_jax.transfer.unlabelled import SelfTraining
from mtl_jax.trunks import TrunkConfig

PARTS = "parts"  # the key of config.json with the user's own parts
COPIES = "copies"  # the key of data.json with the numbers of copies

log = logging.getLogger(__name__)


def to_json(experiment: Experiment) -> dict[str, Any]:
    """The experiment as JSON values; tasks, trunks, adapters and regularisers carry their class name as "kind".

    If the experiment has parts of the user's own, "parts" has the file of each and its hash.
    """
    values = {**converter().unstructure(experiment), "weighting": rule_name(experiment)}
    users_parts = parts.as_json(used_parts(experiment))
    return {**values, PARTS: users_parts} if users_parts else values


def used_parts(experiment: Experiment) -> dict[str, tuple[str, Any]]:
    """{name: (door, class or function)} of the parts of an experiment, ours and the user's."""
    used: dict[str, tuple[str, Any]] = {}
    inside = [getattr(experiment.sharing, field.name) for field in dataclasses.fields(experiment.sharing)]
    inside += [adapter for task in experiment.tasks for adapter in getattr(task, "adapters", ())]
    added = (*experiment.adapters, *(value for value in inside if isinstance(value, Adapter)), *experiment.regularisers)
    for part in (experiment.trunk, experiment.sharing, *experiment.tasks, *added):
        used[type(part).__name__] = (part.door, type(part))
    edits = [source.deidentify for source in experiment.sources if source.deidentify is not None]
    used |= {type(edit).__name__: (edit.door, type(edit)) for edit in edits}
    augmentations = [part for source in experiment.sources for part in of_source(source)] + list(experiment.augment)
    used |= {type(part).__name__: (part.door, type(part)) for part in augmentations}
    rule = experiment.weighting
    if isinstance(rule, weighting.Rule):
        used[rule_name(experiment)] = (weighting.RULES.door, rule.update)
    batch = experiment.batch
    ours = [edit for edit in edits if isinstance(edit, deidentified_rows.Deidentify)]
    for registry, names in (
        (weighting.RULES, [rule] if isinstance(rule, str) else []),
        (weighting.COMBINATORS, experiment.combinators),
        (METRICS, [name for task in experiment.tasks for name in (task.metric, *task.more_metrics)]),
        (READERS, [source.format for source in experiment.sources]),
        (KERNELS, [experiment.kernels]),
        (RECOGNISERS, [name for edit in ours for name in edit.kinds or RECOGNISERS]),
        (NAMES, [edit.names for edit in ours]),
        (mixture.MIXTURES, [batch.mixture, batch.mixture_end, *(phase.mixture for phase in experiment.phases)]),
        (ACCOUNTANTS, [experiment.optimizer.private.accountant]),
        (CHOICES, [part.choose for part in experiment.regularisers if isinstance(part, SelfTraining)]),
    ):
        for name in (re.split("[:(]", name)[0].strip() for name in names):  # without its options
            if name in registry:
                taken = used.get(name, (registry.door,))[0] != registry.door  # by a part of another door
                used[f"{registry.door} {name}" if taken else name] = (registry.door, registry[name])
    return used


def from_json(values: Any, where: str = "config.json") -> Experiment:
    """The inverse of to_json.

    Args:
        values: Parsed JSON.
        where: The file that the values are from, for errors.

    Raises:
        UserError: The values are not those of an experiment, or a number is outside the limits of its field.
    """
    if isinstance(values, Mapping):
        check_parts(values.get(PARTS, {}), where)
    experiment: Experiment = _structured(_without_parts(values), Experiment, where)
    try:
        configuration.check(experiment, leave_out=configuration.SEEDS)  # earlier versions took any seed
    except UserError as error:
        raise UserError(f"{where}: not what mtl_jax wrote ({error})") from error
    return experiment


def with_defaults(values: Any) -> Any:
    """The JSON values of an experiment that an earlier version wrote, with newer fields at their defaults.

    Values that are not those of an experiment are returned unchanged.
    """
    try:
        stored = converter().unstructure(_structured(_without_parts(values), Experiment, ""))
        completed = json.loads(to_strict_json(stored))
        return {**completed, PARTS: values[PARTS]} if PARTS in values else completed
    except UserError:
        return values  # the comparison with the present configuration will show what differs


def _without_parts(values: Any) -> Any:
    """The values without the record of the user's parts."""
    return {name: value for name, value in values.items() if name != PARTS} if isinstance(values, Mapping) else values


def check_parts(recorded: Any, where: str) -> None:
    """Checks that the classes of the user's that a workdir needs are there; warns of a file that has changed since.

    Nothing is imported because a file asks for it.

    Args:
        recorded: As parts.as_json() made it.
        where: The file that it is from, for errors.

    Raises:
        UserError: A class is not there.
    """
    problem = mapping(object_of({"door": text, "file": text, "sha256": text}))(recorded)
    if problem:
        raise UserError(f"{where}: not what mtl_jax wrote ({PARTS}{problem})")
    doors = {door.door: door for door in (Task, TrunkConfig, Sharing, Adapter, Regulariser, RowEdit, Augmentation)}
    for name, part in recorded.items():
        if part["door"] not in doors:
            continue
        kind, file = parts.kinds(doors[part["door"]]).get(name), part["file"]
        if kind is None:
            what = f"{where}: the {part['door']} {name} is a class of {shown(file)}, which is not imported"
            raise UserError(f"{what}; {_advice(file)}")
        origin = parts.origin_of(kind)
        if origin is not None and origin.sha256 != part["sha256"]:
            log.warning(
                "%s: %s has changed since this run: its SHA-256 was %s, is %s", where, file, part["sha256"], origin.sha256
            )


def check_registered(folder: Path, registry: parts.Registry[Any], name: str) -> None:
    """Checks that a function that a run's script registered is there, where it is needed again.

    Args:
        folder: The workdir of the run.
        registry: Where the function is looked up.
        name: Its name.

    Raises:
        UserError: It is not there, and config.json names its file.
    """
    if name in registry:
        return
    part = (workdirs.read_json(folder / "config.json") or {}).get(PARTS, {}).get(name)
    if part and part["door"] == registry.door:
        raise UserError(f"unknown {registry.door} {name!r}: it is a function of {shown(part['file'])}; {_advice(part['file'])}")


def check_metrics(folder: Path, tasks: Sequence[Task]) -> None:
    """check_registered() of the tasks' own metrics, where they are measured again."""
    for task in tasks:
        for name in (task.metric, *task.more_metrics):
            if name not in task.metric_names:
                check_registered(folder, METRICS, name)


def check_functions(folder: Path) -> None:
    """Checks that all functions of the user's that a run needs are there, where its experiment is prepared again.

    Args:
        folder: The workdir of the run.

    Raises:
        UserError: One is not there; names its file.
    """
    record = (workdirs.read_json(folder / "config.json") or {}).get(PARTS, {})
    check_parts(record, str(folder / "config.json"))
    registered = parts.by_door()
    for recorded, part in record.items():
        door, name = part["door"], recorded.removeprefix(f"{part['door']} ")
        if name not in registered.get(door, {}) and "@" not in name:  # with it, the script's own Rule
            raise UserError(f"unknown {door} {name!r}: it is defined in {shown(part['file'])}; {_advice(part['file'])}")


def _advice(file: str) -> str:
    advice = f"add --import {file}" if file.endswith(".py") else "define it first"
    return f"{advice}, or from Python import the file first"


def data_to_json(
    sources: Mapping[str, Any], experiment: Experiment, tasks: Sequence[Task], copies: Mapping[str, Any]
) -> dict[str, Any]:
    """The contents of data.json.

    Args:
        sources: The result of Corpus.describe().
        experiment: The experiment; of rows that its script gave, number and SHA-256 are recorded.
        tasks: The tasks with what they learned from the data.
        copies: The numbers of training rows that are copies of held-out rows; {} where there are none.
    """
    records = {source.name: record for source in experiment.sources if (record := script_rows.records(source))}
    return {
        **sources,
        "tasks": tasks_to_json(tasks),
        **({"rows": records} if records else {}),
        **({COPIES: copies} if copies else {}),
    }


def data_with_defaults(values: Any) -> Any:
    """The contents of a data.json that an earlier version wrote, with newer fields of its tasks at their defaults.

    Values that are not those of tasks are returned unchanged.
    """
    try:
        completed = tasks_to_json(tasks_from_json(values["tasks"]))
    except (UserError, KeyError, TypeError):
        return values  # the comparison with the present data will show what differs
    return {**values, "tasks": json.loads(to_strict_json(completed))}


def tasks_to_json(tasks: Sequence[Task]) -> dict[str, Any]:
    """{name: task as JSON values}, with what each task learned from the data, such as its labels."""
    return {task.name: converter().unstructure(task, Task) for task in tasks}


def tasks_from_json(values: Mapping[str, Any], where: str = "data.json") -> tuple[Task, ...]:
    """The inverse of tasks_to_json.

    Raises:
        UserError: The values are not those of tasks.
    """
    return tuple(_structured(value, Task, where) for value in values.values())


def _structured(values: Any, kind: Any, where: str) -> Any:
    try:
        return converter().structure(values, kind)
    # KeyError, TypeError: cattrs looks a union's kind up as it is, also if it is unknown or not a text.
    except (cattrs.BaseValidationError, AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        reasons = cattrs.transform_error(error) if isinstance(error, cattrs.BaseValidationError) else [repr(error)]
        raise UserError(
            f"{where}: not what mtl_jax wrote ({reasons[0].replace(' @ $.', ' at ').replace(' @ $', '')[:200]}); it may be of "
            "another version, or damaged"
        ) from error
