"""The flags of a script: elements by name as well as by place, unknown flags with the nearest one, and a help of one screen.

An experiment has hundreds of flags, one for each field; --help shows those that people use, --help-all shows all, and
--help-names the names that they take.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import docstring_parser

from mtl_jax.core import parts
from mtl_jax.core.errors import UserError, listed, nearest, unknown
from mtl_jax.core.files import shown
from mtl_jax.data.source import FIELDS, Source
from mtl_jax.experiment import Experiment

# The flags of --help by group. NAME stands for each element of a field, "*" for all fields of one.
GROUPS: dict[str, tuple[str, ...]] = {
    "run": ("workdir", "dry-run", "seed", "only", "devices", "sharding", "remat", "dtype", "init-from.path", "logger"),
    "losses": ("weighting", "weighting-options", "weights", "combinators", "regularisers.NAME.weight"),
    "model": ("trunk.*", "sharing.*", "adapters.NAME.rank"),
    "training": (
        *("phases.NAME.steps", "phases.NAME.learning-rate", "optimizer.learning-rate", "optimizer.weight-decay"),
        *("batch.rows", "batch.row-length", "batch.mixture", "batch.accumulate", "averaging"),
    ),
    "data": ("sources.NAME.path", "sources.NAME.limit", "sources.NAME.limit-train"),
    "tasks": ("tasks.NAME.metric", "tasks.NAME.head", "tasks.NAME.hidden", "tasks.NAME.dropout"),
    "evaluation": ("evaluation.every", "evaluation.criterion", "evaluation.patience", "checkpoints.every", "checkpoints.keep"),
}


def by_place(experiment: Experiment, arguments: Sequence[str]) -> list[str]:
    """The arguments with elements of tuples by place: --phases.everything.steps becomes --phases.1.steps.

    Raises:
        UserError: There is no element of that name.
    """
    return [_by_place(experiment, argument) for argument in arguments]


def _by_place(experiment: Any, argument: str) -> str:
    match = re.fullmatch(r"--((?:no-)?)([a-z_-]+)\.([^.=]+)((?:[.=].*)?)", argument, re.DOTALL)
    if not match:
        return argument
    negation, field, name, rest = match.groups()
    names = _names(getattr(experiment, field.replace("-", "_"), None))
    if not names or name.isdecimal():
        return argument
    if name not in names:
        raise unknown(f"name in {argument.partition('=')[0]}:", name, names)
    place = names.index(name)
    if rest.startswith("."):  # a task may have adapters
        rest = "." + _by_place(getattr(experiment, field.replace("-", "_"))[place], f"--{rest[1:]}").removeprefix("--")
    return f"--{negation}{field}.{place}{rest}"


def _names(value: Any) -> list[str]:
    """The names of the elements of a field like sources; [] for other fields."""
    return [getattr(element, "name", "") for element in value] if isinstance(value, tuple) and _has_parts(value) else []


def _has_parts(value: Any) -> bool:
    return any(dataclasses.is_dataclass(element) for element in value)


def flags_of(value: Any, path: str = "") -> Iterator[str]:
    """Every flag of a configuration, such as optimizer.learning-rate and tasks.movies.metric."""
    rows = {rows for _, rows in FIELDS.values()} if isinstance(value, Source) else ()  # no flags: a script gives them
    for field in dataclasses.fields(value):
        if field.name in rows or "filled_in" in field.metadata:
            continue
        name = path + field.name.replace("_", "-")
        inner = getattr(value, field.name)
        if dataclasses.is_dataclass(inner) and not isinstance(inner, type):
            yield from flags_of(inner, f"{name}.")
        elif isinstance(inner, tuple) and _has_parts(inner):
            for place, element in enumerate(inner):
                yield from flags_of(element, f"{name}.{getattr(element, 'name', place)}.")
        else:
            yield name


def all_flags(launch: Any) -> list[str]:
    """Every flag of a script: those of Launch, whose field experiment has no name of its own, and the experiment's."""
    of_launch = [field.name.replace("_", "-") for field in dataclasses.fields(launch) if field.name != "experiment"]
    return [*of_launch, *flags_of(launch.experiment)]


def unknown_flag(launch: Any, arguments: Sequence[str]) -> UserError:
    """The error for arguments that no flag takes: the first of them, and the nearest flag.

    Args:
        launch: The Launch with the defaults of all flags.
        arguments: Those that are left over.
    """
    first = next((argument for argument in arguments if argument.startswith("--")), "")
    if not first:
        return UserError(f"{listed(arguments)}: not a flag, and no flag before takes it; see --help")
    given = first.partition("=")[0].replace("_", "-")
    near = _nearest_flag(given.removeprefix("--"), all_flags(launch))
    hint = f" (did you mean --{near}?)" if near else ""
    return UserError(f"unknown flag {shown(given)}{hint}; --help shows the flags that people use, --help-all all")


def _nearest_flag(name: str, flags: Sequence[str]) -> str:
    """The flag that a mistyped one most likely means; "" where none is near.

    A last part alone, such as --rows or --lr, means the flag with the fewest parts that ends with it, of those that people use.
    """
    used = [re.compile(flag.replace("NAME", "[^.]+").replace("*", ".+")) for group in GROUPS.values() for flag in group]
    likely = sorted(flags, key=lambda flag: (not any(pattern.fullmatch(flag) for pattern in used), flag.count(".")))
    by_end: dict[str, str] = {}
    for flag in likely:
        by_end.setdefault(flag.rpartition(".")[2].replace("-", "_"), flag)
    if name.replace("-", "_") in by_end:
        return by_end[name.replace("-", "_")]
    return nearest(name, flags) or by_end.get(nearest(name.replace("-", "_"), by_end), "")


def help_page(launch: Any, program: str, description: str) -> str:
    """--help of a script: one screen.

    Args:
        launch: The Launch with the defaults of all flags.
        program: The command, such as "python experiments/quickstart.py".
        description: The script's docstring.
    """
    experiment: Experiment = launch.experiment
    width = min(shutil.get_terminal_size((110, 40)).columns, 120)
    lines = [f"usage: {program} [FLAGS]", "", description.strip(), ""]
    for group, flags in GROUPS.items():
        rows = [row for flag in flags for row in _rows(launch, flag)]
        if rows:
            lines += [group, *(line for flag, text in rows for line in _two_columns(flag, text, width))]
    rows = list(_rows_of_own_parts(experiment))
    if rows:
        lines += ["parts of your own", *(line for flag, text in rows for line in _two_columns(flag, text, width))]
    names = {field: _names(getattr(experiment, field)) for field in ("sources", "tasks", "phases", "adapters", "regularisers")}
    named = "; ".join(f"{field} {', '.join(of_field)}" for field, of_field in names.items() if of_field)
    total = len(all_flags(launch))
    lines += ["", *textwrap.wrap(f"NAME is one of: {named}.", width)]
    more = f"--help-all shows all {total} flags, --help-names the names they take, and --import FILE.py brings your own."
    return "\n".join([*lines, *textwrap.wrap(more, width)])


def _rows(launch: Any, flag: str) -> Iterator[tuple[str, str]]:
    """(flag with its default, description) of an entry of GROUPS."""
    first, *rest = flag.replace("-", "_").split(".")
    owner = launch if hasattr(launch, first) else launch.experiment
    value = getattr(owner, first)
    if not rest:
        yield f"--{flag} {'' if value is False else _shown(value)}".rstrip(), _description(type(owner), first)
    elif rest == ["*"]:
        for field in dataclasses.fields(value):
            default = _shown(getattr(value, field.name))
            yield f"--{first}.{field.name.replace('_', '-')} {default}".rstrip(), _description(type(value), field.name)
    elif rest[0] == "NAME":
        elements = [element for element in value or () if hasattr(element, rest[1])]
        if elements:
            values = list(dict.fromkeys(_shown(getattr(element, rest[1])) for element in elements))
            default = values[0] if len(values) == 1 else "..."
            yield f"--{flag} {default}".rstrip(), _description(type(elements[0]), rest[1])
    else:
        default = _shown(getattr(value, rest[0]))
        yield f"--{flag} {default}".rstrip(), _description(type(value), rest[0])


def _rows_of_own_parts(experiment: Experiment) -> Iterator[tuple[str, str]]:
    """(flag, description) of the fields that the user's classes of tasks, adapters and regularisers declare."""
    above = {flag for flags in GROUPS.values() for flag in flags}
    kinds = {}
    for group in ("tasks", "adapters", "regularisers"):
        for element in getattr(experiment, group):
            if parts.origin_of(type(element)) is not None:
                kinds[type(element)] = f"{group}.NAME"
    for kind, path in kinds.items():
        for field in dataclasses.fields(kind):
            flag = f"{path}.{field.name.replace('_', '-')}"
            if field.name in vars(kind).get("__annotations__", {}) and field.name != "name" and flag not in above:
                default = "" if field.default is dataclasses.MISSING else _shown(field.default)
                yield f"--{flag} {default}".rstrip(), _description(kind, field.name)


def _shown(value: Any) -> str:
    """A default as one would type it, cut to what fits; "" where there is none."""
    if isinstance(value, Mapping):
        value = tuple(part for item in value.items() for part in item)
    text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 24 else f"{text[:21]}..."


def _description(kind: type, field: str) -> str:
    """The first sentence on a field in the docstring of its class or of a class above."""
    for base in kind.__mro__:
        for param in docstring_parser.parse(base.__doc__ or "").params:
            if param.arg_name == field and not (param.description or "").startswith("As in all"):
                text = " ".join((param.description or "").split())
                return re.split(r"(?<=[a-z)])[.;] ", text, maxsplit=1)[0].rstrip(".")
    return ""


def _two_columns(flag: str, text: str, width: int, left: int = 44) -> list[str]:
    wrapped = textwrap.wrap(text, max(width - left, 30), max_lines=1, placeholder=" ...") or [""]
    if len(flag) + 3 > left:
        return [f"  {flag}", " " * left + wrapped[0]]
    return [f"  {flag}".ljust(left) + wrapped[0]]
