"""What configuration dataclasses have in common: a wrong field in a script is one line, not a traceback."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from mtl_jax.errors import UserError, listed, unknown
from mtl_jax.files import shown

EXIT_BAD_INPUT = 2

_Hook = Callable[[type[BaseException], BaseException, TracebackType | None], Any]


class WrongField(UserError, TypeError):
    """A configuration was given a field that it does not have, or was not given one that it needs.

    It is also the TypeError that Python raises for such a call.
    """


class Configuration:
    """Base of the dataclasses that a script builds: checks the names of their fields before Python does.

    Other mistakes in a call, such as too many positional arguments, stay Python's own.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        if args or kwargs:  # without, it is being unpickled or copied
            _check(cls, args, kwargs)
        return super().__new__(cls)


def _check(cls: type[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    fields = [field for field in dataclasses.fields(cls) if field.init]
    names = [field.name for field in fields]
    ordered = [field.name for field in fields if not field.kw_only]
    given = dict(zip(ordered, args, strict=False)) | kwargs
    what = f"{cls.__name__} {shown(given['name'])!r}" if isinstance(given.get("name"), str) else cls.__name__
    for name in kwargs:
        if name not in names:
            free = [other for other in names if other not in given]
            raise WrongField(str(unknown(f"field of {what}:", name, free or names)))
    needed = [
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING and field.name not in given
    ]
    if needed and len(args) <= len(ordered):
        raise WrongField(f"{what} needs {'the field' if len(needed) == 1 else 'the fields'} {listed(needed)}")


def show_in_one_line() -> None:
    """From now on a UserError that nothing catches ends a script with one line and exit code 2.

    A script builds its configuration before it calls main(), which does the same for what comes later. Other exceptions go to
    the hook that was there; debuggers, pytest and IPython do not use it.
    """
    sys.excepthook = _hook(sys.excepthook)


def _hook(before: _Hook) -> _Hook:
    def show(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if not isinstance(error, UserError):
            before(kind, error, traceback)
            return
        print(f"error: {error}", file=sys.stderr)
        if not hasattr(sys, "ps1") and not sys.flags.interactive:  # at Python's prompt the session stays
            raise SystemExit(EXIT_BAD_INPUT)

    return show
