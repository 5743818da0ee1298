"""The experiment and its tasks as JSON: config.json and data.json of a workdir, written and read back."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import cattrs
from cattrs.gen import make_dict_structure_fn, make_dict_unstructure_fn, override

from mtl_jax import augment, sharing, weighting
from mtl_jax.audit import deidentified_rows
from mtl_jax.audit.person_names import NAMES
from mtl_jax.audit.recognisers import RECOGNISERS
from mtl_jax.core import configuration, parts
from mtl_jax.core.errors import UserError
from mtl_jax.core.files import shown
from mtl_jax.core.files import to_json as to_strict_json
from mtl_jax.core.json_shapes import mapping, object_of, text, whole
from mtl_jax.core.parts import ONLY_IF_SET, Part
from mtl_jax.data import mixture
from mtl_jax.data.augmentations import of_source
from mtl_jax.data.formats import READERS, script_rows
from mtl_jax.data.source import FIELDS, Augmentation, RowEdit, ScriptRows, Source
from mtl_jax.experiment import Experiment, HeadWeights, Weighting, rule_name
from mtl_jax.models.kernels import KERNELS
from mtl_jax.sharing.base import Sharing
from mtl_jax.tasks import Task
from mtl_jax.tasks.label_names import LabelNames
from mtl_jax.tasks.metrics import METRICS
from mtl_jax.training import workdir as workdirs
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
    values = {**_converter().unstructure(experiment), "weighting": rule_name(experiment)}
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
        stored = _converter().unstructure(_structured(_without_parts(values), Experiment, ""))
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
    return {task.name: _converter().unstructure(task, Task) for task in tasks}


def tasks_from_json(values: Mapping[str, Any], where: str = "data.json") -> tuple[Task, ...]:
    """The inverse of tasks_to_json.

    Raises:
        UserError: The values are not those of tasks.
    """
    return tuple(_structured(value, Task, where) for value in values.values())


def _structured(values: Any, kind: Any, where: str) -> Any:
    try:
        return _converter().structure(values, kind)
    # KeyError, TypeError: cattrs looks a union's kind up as it is, also if it is unknown or not a text.
    except (cattrs.BaseValidationError, AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        reasons = cattrs.transform_error(error) if isinstance(error, cattrs.BaseValidationError) else [repr(error)]
        raise UserError(
            f"{where}: not what mtl_jax wrote ({reasons[0].replace(' @ $.', ' at ').replace(' @ $', '')[:200]}); it may be of "
            "another version, or damaged"
        ) from error


@functools.cache  # making one takes a tenth of a second
def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    for package in (augment, sharing):  # a kind is known by its name once its module is loaded
        for name in dir(package):
            getattr(package, name)
    converter.register_structure_hook(float | str, _number_or_text)
    converter.register_structure_hook(HeadWeights, _head_weights)
    converter.register_structure_hook(LabelNames, _label_names)
    converter.register_structure_hook(Weighting, _text)
    converter.register_unstructure_hook_func(lambda kind: kind == Weighting, lambda rule: rule if isinstance(rule, str) else "")
    # JSON has no infinity: an infinite bound is written as a text. The hooks of the unions are made from those registered
    # before them, so this one must be the earlier.
    converter.register_unstructure_hook(float, lambda number: number if abs(number) != float("inf") else str(number))
    # Before the hooks of Source, which has parts.
    converter.register_structure_hook_func(_is_part, lambda values, door: _part(converter, values, door))
    converter.register_unstructure_hook_func(_is_part, lambda part: _part_to_json(converter, part))
    fields: dict[str, Any] = {rows: override(omit=True) for _, rows in FIELDS.values()}
    for name in ("copies", "near", "time", "canaries", "augment"):
        fields[name] = override(omit_if_default=True)  # workdirs of before stay the same
    fields["deidentify"] = override(
        omit_if_default=True, unstruct_hook=lambda edit: None if edit is None else _part_to_json(converter, edit)
    )
    source_to_json = make_dict_unstructure_fn(Source, converter, **fields)
    converter.register_unstructure_hook(Source, lambda source: {**source_to_json(source), **script_rows.records(source)})
    records: dict[str, Any] = {rows: override(struct_hook=_script_rows) for _, rows in FIELDS.values()}
    converter.register_structure_hook(
        Source, make_dict_structure_fn(Source, converter, _cattrs_forbid_extra_keys=True, **records)
    )
    converter.register_unstructure_hook_factory(_has_only_if_set, lambda kind: _unstructure_fields(converter, kind))
    converter.register_structure_hook_func(_is_part, lambda values, door: _part(converter, values, door))
    converter.register_unstructure_hook_func(_is_part, lambda part: _part_to_json(converter, part))
    later = ("private", "sharding", "remat", "kernels", "augment", "sharing")  # fields that config.json of earlier runs has not
    added: dict[str, Any] = {name: override(omit_if_default=True) for name in later}
    experiment_to_json = make_dict_unstructure_fn(Experiment, converter, **added)
    converter.register_unstructure_hook(Experiment, experiment_to_json)
    return converter


def _is_part(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Part)


def _has_only_if_set(kind: Any) -> bool:
    """Whether it is a dataclass, no Part, with fields that are written only where they are set."""
    if not dataclasses.is_dataclass(kind) or _is_part(kind):
        return False
    return any(ONLY_IF_SET.items() <= field.metadata.items() for field in dataclasses.fields(kind))


def _part(converter: cattrs.Converter, values: Any, door: type[Part]) -> Part:
    """The task, trunk, adapter or regulariser of JSON values, by its kind."""
    if not isinstance(values, Mapping) or not isinstance(values.get("kind"), str):
        raise ValueError(f"a {door.door} without kind")
    kinds = parts.kinds(door)
    if values["kind"] not in kinds:
        raise ValueError(f"unknown kind of {door.door}, {values['kind']!r}")
    kind = kinds[values["kind"]]
    return _structure_fields(converter, cast(Any, kind))(
        {name: value for name, value in values.items() if name != "kind"}, kind
    )


def _part_to_json(converter: cattrs.Converter, part: Part) -> dict[str, Any]:
    return {**_unstructure_fields(converter, cast(Any, type(part)))(part), "kind": type(part).__name__}


@functools.cache
def _structure_fields(converter: cattrs.Converter, kind: Any) -> Any:
    return make_dict_structure_fn(kind, converter, _cattrs_forbid_extra_keys=True)


@functools.cache
def _unstructure_fields(converter: cattrs.Converter, kind: Any) -> Any:
    omitted = [field.name for field in dataclasses.fields(kind) if ONLY_IF_SET.items() <= field.metadata.items()]
    overrides: dict[str, Any] = {name: override(omit_if_default=True) for name in omitted}
    return make_dict_unstructure_fn(kind, converter, **overrides)


def _number_or_text(value: Any, _: Any) -> float | str:
    if not isinstance(value, (int, float, str)):
        raise ValueError(f"{value!r} is not a number or a text")
    return value


def _label_names(value: Any, _: Any) -> LabelNames:
    pairs = value.items() if isinstance(value, dict) else [(value, "")]
    if not all(isinstance(part, str) for pair in pairs for part in pair):
        raise ValueError(f"{value!r} is neither labels and their names nor a path")
    return cast(LabelNames, value)


def _script_rows(value: Any, _: Any) -> ScriptRows:
    """The record of rows that a script gave; the rows themselves are not in the file."""
    if problem := object_of({"rows": whole, "sha256": text})(value):
        raise ValueError(f"the record of a script's rows{problem}")
    return ScriptRows(None, value)


def _text(value: Any, _: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text")
    return value


def _head_weights(value: Any, _: Any) -> HeadWeights:
    if not isinstance(value, bool) and value != "rule":
        raise ValueError(f"{value!r} is not true, false or rule")
    return cast(HeadWeights, value)
