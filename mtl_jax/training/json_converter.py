"""How each class of an experiment is written as JSON values and read back: the converter of cattrs, with our hooks.

A part is its fields and its "kind", the name of its class. Fields that earlier runs did not have are written only where they
are set, so that config.json of an unchanged experiment stays the same.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, cast

import cattrs
from cattrs.gen import make_dict_structure_fn, make_dict_unstructure_fn, override

from mtl_jax import augment, sharing
from mtl_jax.core import parts
from mtl_jax.core.json_shapes import object_of, text, whole
from mtl_jax.core.parts import ONLY_IF_SET, Part
from mtl_jax.data.formats import script_rows
from mtl_jax.data.source import FIELDS, ScriptRows, Source
from mtl_jax.experiment import Experiment, HeadWeights, Weighting
from mtl_jax.tasks.label_names import LabelNames


@functools.cache  # making one takes a tenth of a second
def converter() -> cattrs.Converter:
    """The converter, with the kinds of all parts that are loaded; it refuses keys that no class has."""
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
