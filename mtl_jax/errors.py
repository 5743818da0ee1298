"""Errors that are the user's to mend: shown as one line, without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

SHOWN = 10  # names that an error line lists at most


class UserError(Exception):
    """Bad input. The message is one line that names the field, file or line and says what to do."""


class Interrupted(Exception):
    """The run was asked to stop (SIGTERM or SIGINT) and has saved its state; the same command goes on."""


def unknown(kind: str, name: str, choices: Iterable[str]) -> UserError:
    """The error for a name that is not among the choices: lists them and suggests the nearest.

    Args:
        kind: What is being named, for example "task".
        name: The name that was given.
        choices: The names that exist.

    Returns:
        The error, to be raised by the caller.
    """
    choices = list(choices)
    near = difflib.get_close_matches(name[:100], choices, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    given = repr(name if len(name) <= 100 else f"{name[:100]}...")
    return UserError(f"unknown {kind} {given}{hint}; choices: {listed(choices)}")


def listed(names: Iterable[object]) -> str:
    """Names as an error line lists them: the first ten, each cut to 100 characters, and how many more there are."""
    names = [str(name) for name in names]
    first = ", ".join(name if len(name) <= 100 else f"{name[:100]}..." for name in names[:SHOWN])
    return f"{first} and {len(names) - SHOWN} more" if len(names) > SHOWN else first or "none"
