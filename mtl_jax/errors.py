"""Errors that are the user's to mend: shown as one line, without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
    near = difflib.get_close_matches(name, choices, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return UserError(f"unknown {kind} {name!r}{hint}; choices: {', '.join(choices) or 'none'}")
