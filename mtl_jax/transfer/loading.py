"""Where parameters begin: which of a source go where, by name, and what became of every one of both sides."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flax import traverse_util

from mtl_jax.core.configuration import Configuration
from mtl_jax.core.errors import NOT_A_PATTERN, UserError

FIELD = "init_from"


@dataclasses.dataclass(frozen=True)
class InitFrom(Configuration):
    """What a run's parameters begin as, where they are not as trunk and seed say.

    Names are paths such as trunk/layer_0/attention/query/kernel, heads/TASK/output/bias; of a checkpoint in place of a run,
    head/... is its own head.

    Attributes:
        path: The workdir of a run, or a Hugging Face checkpoint: a directory, pip:ASSET/MEMBER, or a hub id. Empty: nowhere.
        step: Of a run: best, last, or the number of a step that has a checkpoint.
        subtree: What is taken: all below this path, such as trunk or heads/TASK; empty: everything.
        into: Where that goes: the path that takes the place of subtree; empty: the same place.
        renames: Pairs of a regular expression and what replaces it wherever it stands in a path (as re.sub does), one after
            another, after into.
        leave_out: Regular expressions; what matches one with the whole of its new path is not loaded.
    """

    path: str = ""
    step: str = "best"
    subtree: str = ""
    into: str = ""
    renames: tuple[tuple[str, str], ...] = ()
    leave_out: tuple[str, ...] = ()


class Account(NamedTuple):
    """What became of every parameter.

    Attributes:
        loaded: {path: the path in the source that it was loaded from}.
        initialised: Paths that stay as they were.
        left_out: Paths in the source that leave_out names, or that are not in the subtree.
        without_place: Paths in the source for which there is no parameter here.
    """

    loaded: dict[str, str]
    initialised: tuple[str, ...]
    left_out: tuple[str, ...]
    without_place: tuple[str, ...]


def check(init: InitFrom) -> None:
    """Finds what is wrong with the fields alone.

    Raises:
        UserError: One line that names the field.
    """
    if not init.path:
        given = [field.name for field in dataclasses.fields(init) if getattr(init, field.name) != field.default]
        if given:
            raise UserError(f"{FIELD}.{given[0]} is given, but {FIELD}.path is not")
    if init.step not in ("best", "last") and not init.step.isdecimal():
        raise UserError(f"{FIELD}.step is {init.step!r}; it must be best, last, or the number of a step")
    for field, patterns in (("renames", [pattern for pattern, _ in init.renames]), ("leave_out", init.leave_out)):
        for pattern in patterns:
            try:
                re.compile(pattern)
            except NOT_A_PATTERN as error:
                raise UserError(f"{FIELD}.{field}: {pattern[:300]!r} is no regular expression ({error})") from error
    for pattern, new in init.renames:
        try:
            re.sub(pattern, new, "")
        except re.error as error:
            raise UserError(f"{FIELD}.renames: {new!r} cannot take the place of {pattern!r} ({error})") from error


def load_into(params: Any, source: Mapping[str, Any], init: InitFrom) -> tuple[Any, Account]:
    """Parameters with those of a source in their places.

    Args:
        params: A tree of nested dicts of arrays.
        source: {path: array}.
        init: What goes where; its path is for errors.

    Returns:
        A tree as params, each loaded leaf in the dtype that it has there; and the account.

    Raises:
        UserError: A subtree, rename or pattern matches nothing, two go to one place, shapes differ, or nothing is loaded.
    """
    target = traverse_util.flatten_dict(params, sep="/")
    taken = _below(init, source)
    placed, left_out = _left_out(init, _renamed(init, taken))
    result, loaded, without_place = dict(target), dict[str, str](), list[str]()
    for new, old in placed:
        if new not in target:
            without_place.append(old)
            continue
        if new in loaded:
            raise UserError(f"{FIELD}: {loaded[new]} and {old} of {init.path} would both become {new}; leave one out")
        here, there = target[new].shape, source[old].shape
        if here != there:
            raise UserError(
                f"{FIELD}: {new} is {_shape(here)} here and {_shape(there)} in {init.path} ({old}); models of other sizes do "
                f"not fit, and what may stay as it is here is named in {FIELD}.leave_out"
            )
        result[new], loaded[new] = source[old].astype(target[new].dtype), old
    if not loaded:
        raise UserError(
            f"{FIELD}: nothing of {init.path} has a place here; its paths look like {next(iter(source))}, those here like "
            f"{next(iter(target))}: see {FIELD}.into and {FIELD}.renames"
        )
    left_out += [path for path in source if path not in taken]
    account = Account(loaded, tuple(path for path in target if path not in loaded), tuple(left_out), tuple(without_place))
    return traverse_util.unflatten_dict(result, sep="/"), account


def shown(paths: Sequence[str], most: int = 3) -> str:
    """A few of many paths, those of one module as one."""
    groups: dict[str, int] = {}
    for path in paths:
        group = "/".join(path.split("/")[:2])
        groups[group] = groups.get(group, 0) + 1
    names = [f"{group}/..." for group in groups]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _below(init: InitFrom, source: Mapping[str, Any]) -> dict[str, str]:
    """{path: its path with into in the place of subtree} of what is in the subtree."""
    if not init.subtree:
        return {path: f"{init.into}/{path}" if init.into else path for path in source}
    into = init.into or init.subtree
    whole = {path: into for path in source if path == init.subtree}
    below = {path: into + path.removeprefix(init.subtree) for path in source if path.startswith(f"{init.subtree}/")}
    if not whole and not below:
        there = ", ".join(sorted({_top(path) for path in source}))
        raise UserError(f"{FIELD}.subtree: {init.path} has nothing at {init.subtree!r}; there are {there}")
    return whole | below


def _renamed(init: InitFrom, taken: Mapping[str, str]) -> list[tuple[str, str]]:
    """Pairs of new path and path in the source."""
    names = dict(taken)
    for pattern, new in init.renames:
        changed = {path: re.sub(pattern, new, name) for path, name in names.items()}
        if changed == names:
            raise UserError(f"{FIELD}.renames: {pattern!r} changes no path; they look like {next(iter(names.values()))}")
        names = changed
    return [(new, path) for path, new in names.items()]


def _left_out(init: InitFrom, named: Sequence[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[str]]:
    """Those that are loaded, and the source's paths of the others."""
    gone: set[str] = set()
    for pattern in init.leave_out:
        matched = {new for new, _ in named if re.fullmatch(pattern, new)}
        if not matched:
            raise UserError(f"{FIELD}.leave_out: {pattern!r} matches no path; they look like {named[0][0]} and {named[-1][0]}")
        gone |= matched
    return [pair for pair in named if pair[0] not in gone], [path for new, path in named if new in gone]


def _top(path: str) -> str:
    parts = path.split("/")
    return "/".join(parts[: 2 if parts[0] == "heads" else 1])


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a number"
