"""Initial parameters from a run or a checkpoint: which are loaded where, by name, and an account of every parameter."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mtl_jax.core import trees
from mtl_jax.core.configuration import Configuration
from mtl_jax.core.errors import NOT_A_PATTERN, UserError

FIELD = "init_from"


@dataclasses.dataclass(frozen=True)
class InitFrom(Configuration):
    """A run or checkpoint that gives initial parameters, in place of those that the trunk and the seed give.

    Names are paths such as trunk/layer_0/attention/query/kernel, heads/TASK/output/bias; head/... is the head of a checkpoint.

    Attributes:
        path: The workdir of a run, or a Hugging Face checkpoint: a directory, pip:ASSET/MEMBER, or a hub id. Empty: none.
        step: For a run: best, last, or the number of a step that has a checkpoint.
        subtree: Only parameters below this path are loaded, such as trunk or heads/TASK; empty: all.
        into: The path that replaces subtree in their names; empty: subtree stays.
        renames: Pairs of a regular expression and its replacement, which are applied to every path (as by re.sub), one after
            another, after into.
        leave_out: Regular expressions; a parameter whose whole new path matches one is not loaded.

    Examples:
        >>> experiment = dataclasses.replace(EXPERIMENT, init_from=mtl_jax.InitFrom("runs/tiny"))
    """

    path: str = ""
    step: str = "best"
    subtree: str = ""
    into: str = ""
    renames: tuple[tuple[str, str], ...] = ()
    leave_out: tuple[str, ...] = ()


class Account(NamedTuple):
    """Which parameters were loaded, and which were not.

    Attributes:
        loaded: {path: the path in the source that it was loaded from}.
        initialised: Paths of the parameters that keep their values.
        left_out: Paths in the source that match leave_out, or that are not in the subtree.
        without_place: Paths in the source without a parameter of that name in the model.
        made_again: Paths of the parameters that start as parts of the trunk, such as copies of its layers, and that were made
            again from the loaded trunk.
    """

    loaded: dict[str, str]
    initialised: tuple[str, ...]
    left_out: tuple[str, ...]
    without_place: tuple[str, ...]
    made_again: tuple[str, ...] = ()


def check(init: InitFrom) -> None:
    """Checks the fields without reading anything.

    Raises:
        UserError: One line that names the field.
    """
    if not init.path:
        others = [field.name for field in dataclasses.fields(init) if getattr(init, field.name) != field.default]
        if others:
            raise UserError(f"{FIELD}.{others[0]} is given, but {FIELD}.path is not")
    if init.step not in ("best", "last") and not init.step.isdecimal():
        raise UserError(f"{FIELD}.step is {init.step!r}; it must be best, last, or the number of a step")
    for field, patterns in (("renames", [pattern for pattern, _ in init.renames]), ("leave_out", init.leave_out)):
        for pattern in patterns:
            try:
                re.compile(pattern)
            except NOT_A_PATTERN as error:
                raise UserError(f"{FIELD}.{field}: {pattern[:300]!r} is not a regular expression ({error})") from error
    for pattern, new in init.renames:
        try:
            re.sub(pattern, new, "")
        except re.error as error:
            raise UserError(f"{FIELD}.renames: {new!r} cannot take the place of {pattern!r} ({error})") from error


def load_into(params: Any, source: Mapping[str, Any], init: InitFrom) -> tuple[Any, Account]:
    """The parameters of a model, with those of a source loaded into it.

    Args:
        params: The model's parameters, a tree of nested dicts of arrays.
        source: {path: array}.
        init: Which parameters are loaded, and where; its path is for errors.

    Returns:
        A tree like params, each loaded leaf in the dtype of params; and the account.

    Raises:
        UserError: A subtree, rename or pattern matches nothing, two parameters get one name, shapes differ, or nothing is
            loaded.
    """
    target = trees.flat(params)
    selected = _below(init, source)
    placed, left_out = _left_out(init, _renamed(init, selected))
    result, loaded, without_place = dict(target), dict[str, str](), list[str]()
    for new, old in placed:
        if new not in target:
            without_place.append(old)
            continue
        if new in loaded:
            raise UserError(f"{FIELD}: {loaded[new]} and {old} of {init.path} would both become {new}; leave one out")
        shape, source_shape = target[new].shape, source[old].shape
        if shape != source_shape:
            raise UserError(
                f"{FIELD}: {new} is {_shape(shape)} here and {_shape(source_shape)} in {init.path} ({old}); models of other "
                f"sizes do not fit; name parameters that need not be loaded in {FIELD}.leave_out"
            )
        result[new], loaded[new] = source[old].astype(target[new].dtype), old
    if not loaded:
        raise UserError(
            f"{FIELD}: nothing of {init.path} has a place here; its paths look like {next(iter(source))}, those here like "
            f"{next(iter(target))}: see {FIELD}.into and {FIELD}.renames"
        )
    left_out += [path for path in source if path not in selected]
    account = Account(loaded, tuple(path for path in target if path not in loaded), tuple(left_out), tuple(without_place))
    return trees.nested(result), account


def shown(paths: Sequence[str], most: int = 3) -> str:
    """A few of many paths; the paths of one module are shown as one, such as trunk/layer_0/..."""
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
        subtrees = ", ".join(sorted({_top(path) for path in source}))
        raise UserError(f"{FIELD}.subtree: {init.path} has nothing at {init.subtree!r}; there are {subtrees}")
    return whole | below


def _renamed(init: InitFrom, selected: Mapping[str, str]) -> list[tuple[str, str]]:
    """Pairs of new path and path in the source."""
    names = dict(selected)
    for pattern, new in init.renames:
        changed = {path: re.sub(pattern, new, name) for path, name in names.items()}
        if changed == names:
            raise UserError(f"{FIELD}.renames: {pattern!r} changes no path; they look like {next(iter(names.values()))}")
        names = changed
    return [(new, path) for path, new in names.items()]


def _left_out(init: InitFrom, named: Sequence[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[str]]:
    """The pairs that are loaded, and the paths in the source of those that leave_out matches."""
    matching: set[str] = set()
    for pattern in init.leave_out:
        matched = {new for new, _ in named if re.fullmatch(pattern, new)}
        if not matched:
            raise UserError(f"{FIELD}.leave_out: {pattern!r} matches no path; they look like {named[0][0]} and {named[-1][0]}")
        matching |= matched
    return [pair for pair in named if pair[0] not in matching], [path for new, path in named if new in matching]


def _top(path: str) -> str:
    parts = path.split("/")
    return "/".join(parts[: 2 if parts[0] == "heads" else 1])


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a number"
