"""Names of labels: a data set has numbers or codes, and people read names. Training and metrics do not know them.

A name is given in a dict, or in a file that data sets call their mapping.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from mtl_jax.core.errors import UserError, unknown
from mtl_jax.core.files import shown
from mtl_jax.data.formats.lines import lines, opened
from mtl_jax.tasks import bio

LabelNames = dict[str, str] | str

T = TypeVar("T")


def named(task: T) -> T:
    """A task that knows its label set, with its label_names read and checked: {label: name}.

    Raises:
        UserError: The file cannot be read, a label does not exist, or two labels have one name.
    """
    values: Any = task
    if not values.label_names:
        return task
    names = resolve(values.label_names, values.labels, f"label_names of task {values.name!r}")
    return dataclasses.replace(values, label_names=names)


def resolve(names: LabelNames, labels: Sequence[str], where: str) -> dict[str, str]:
    """{label: name}, of the labels that have one.

    Args:
        names: The names, or the path of a file with them. In a label set of entities, the name of X is that of B-X and I-X.
        labels: The label set.
        where: The field, for errors.

    Raises:
        UserError: The file cannot be read, a label does not exist, or two labels have one name.
    """
    given = read(names) if isinstance(names, str) else names
    wrong = next((value for pair in given.items() for value in pair if not isinstance(value, str) or not value.strip()), None)
    if wrong is not None:
        raise UserError(f'{where}: {wrong!r} is not a text; write names as in {{"0": "anger"}}')
    if bio.is_bio(tuple(labels)):
        types = {tag[2:] for tag in labels if tag != "O"}
        whole = {label: name for label, name in given.items() if label in labels or label not in types}
        of_type = {f"{kind}-{label}": f"{kind}-{name}" for label, name in given.items() if label in types for kind in "BI"}
        given = {**{tag: name for tag, name in of_type.items() if tag in labels}, **whole}
    for label in given:
        if label not in labels:
            raise unknown(f"label in {where}:", label, labels)
    label_of: dict[str, str] = {}
    for label in labels:
        name = given.get(label, label)
        if name in label_of:
            raise UserError(f"{where}: the labels {label_of[name]!r} and {label!r} have one name, {shown(name)!r}")
        label_of[name] = label
    return {label: given[label] for label in labels if label in given}


def read(path: str) -> dict[str, str]:
    """{label: name} of a file: a JSON object, or lines with a label, a tab and its name.

    Args:
        path: A local path, data:REST or pip:ASSET/MEMBER.

    Raises:
        UserError: The file cannot be read, or has another form; names the line.
    """
    with opened(path) as file:
        start = file.read(64)
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
        return _read_json(path)
    names: dict[str, str] = {}
    for line in lines(path):
        if line.error:
            raise line.error
        label, _, name = (part.strip() for part in line.text.partition("\t"))
        if not line.text.strip():
            continue
        if not label or not name:
            raise UserError(f"{path}:{line.number}: not a label, a tab and its name")
        if label in names:
            raise UserError(f"{path}:{line.number}: the label {shown(label)!r} has a name already, {shown(names[label])!r}")
        names[label] = name
    return names


def _read_json(path: str) -> dict[str, str]:
    with opened(path) as file:
        data = file.read()
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value.values()):
        raise UserError(f'{path}: not an object of labels and names, such as {{"0": "anger"}}')
    return dict(value)


def shown_labels(labels: Sequence[str], names: LabelNames) -> tuple[str, ...]:
    """The label set in the names that people read; labels without a name keep theirs."""
    return tuple(labels) if isinstance(names, str) else tuple(names.get(label, label) for label in labels)


def in_line(labels: Sequence[str], shown: Sequence[str]) -> list[str]:
    """Each label with its name, "0 = anger", for a line of the log; a label without a name alone."""
    return [label if label == name else f"{label} = {name}" for label, name in zip(labels, shown, strict=True)]
