"""--help-names: every name that a flag or a script may give a part, by door, with its options and its meaning.

The names are those of the registries and of the classes behind the doors, so a part of the user's is among them.
"""

from __future__ import annotations

import inspect
import re
import shutil
import textwrap
from collections.abc import Mapping
from typing import Any

from mtl_jax.core import parts

# Where a name of a door is written; a class is used in a script.
WRITTEN = {
    "weighting rule": "--weighting NAME --weighting-options OPTION VALUE",
    "combinator": "--combinators NAME:OPTION=VALUE",
    "mixture": "--batch.mixture NAME:OPTION=NUMBER",
    "format": "--sources.SOURCE.format NAME",
    "metric": "--tasks.TASK.metric NAME",
    "kernels": "--kernels NAME",
    "logger": "--logger NAME",
    "accountant": "--optimizer.private.accountant NAME",
    "choice of pseudo-labels": "mtl-jax pseudo-label --choice NAME",
    "affinity estimator": "mtl-jax affinity --estimators NAME",
    "recogniser": "Deidentify(kinds=(NAME,))",
    "recogniser of names": "mtl-jax deidentify --names NAME",
    "launcher": "mtl-jax launch --on NAME:OPTION=VALUE",
}
# Doors to functions whose parameters are options of the name, and how many parameters before these are not.
OPTIONS_AFTER = {"weighting rule": 0, "combinator": 1, "mixture": 1, "launcher": 1}
NOT_OPTIONS = {"weights", "shares"}  # fields of their own
LEFT = 30  # columns of the names


def names_page() -> str:
    """All names, a line or two each, for the terminal's width."""
    _load()
    width = min(shutil.get_terminal_size((110, 40)).columns, 120)
    doors = parts.by_door()
    order = [*(door for door in WRITTEN if doors.get(door)), *(door for door in doors if door not in WRITTEN and doors[door])]
    return "\n\n".join(_section(door, doors[door], width) for door in order)


def _load() -> None:
    """Imports what defines parts, as names are known once their modules are loaded."""
    from mtl_jax import affinity, audit, augment, data, sharing, tasks, transfer, trunks, weighting
    from mtl_jax.launching import systems
    from mtl_jax.training import loggers

    for package in (affinity, audit, augment, data, sharing, tasks, transfer, trunks, weighting, systems, loggers):
        for name in dir(package):
            getattr(package, name)


def _section(door: str, named: Mapping[str, Any], width: int) -> str:
    rows = [f"{door}: {WRITTEN.get(door, 'a class, in a script')}"]
    for name, part in named.items():
        lines = textwrap.wrap(_meaning(part), width - LEFT) or [""]
        label = f"  {name}{_options(door, part)}"
        rows += [label] if len(label) + 2 > LEFT else []
        rows += [f"{'' if rows[-1] is label else label:{LEFT}}{lines[0]}".rstrip(), *(" " * LEFT + line for line in lines[1:])]
    return "\n".join(rows)


def _options(door: str, part: Any) -> str:
    """The options of a name in parentheses, as in (c, solver); "" where there are none."""
    if door not in OPTIONS_AFTER:
        return ""
    options = [name for name in list(inspect.signature(part).parameters)[OPTIONS_AFTER[door] :] if name not in NOT_OPTIONS]
    return f" ({', '.join(options)})" if options else ""


def _meaning(part: Any) -> str:
    """The first sentence of a part's docstring, and the file of a user's part."""
    text = " ".join((getattr(part, "func", part).__doc__ or "").split("\n\n")[0].split())  # of a partial, its function's
    sentence = re.split(r"(?<=[^.][a-z0-9)\]|])[.] (?=[A-Z])", text, maxsplit=1)[0].removesuffix(".")
    origin = parts.origin_of(part)
    return f"{sentence} ({origin.file})".strip() if origin is not None else sentence
