"""Errors that the user can mend, shown as one line without a traceback, and the phrases that error lines are made of.

Suggestions for mistyped names, lists cut to a readable length, numbers with their nouns.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

SHOWN = 10  # most names in an error line
NOT_A_PATTERN = (re.error, OverflowError, RecursionError)  # what re.compile raises


class UserError(Exception):
    """Bad input. The message is one line that names the field, file or line and says what to do.

    Examples:
        >>> try:
        ...     mtl_jax.results("nowhere")
        ... except mtl_jax.UserError as error:
        ...     print(error)
        nowhere: no results.json...
    """


class Interrupted(Exception):
    """The run was asked to stop (SIGTERM or SIGINT) and has saved its state; the same command resumes it.

    Examples:
        >>> try:
        ...     results = mtl_jax.train(EXPERIMENT, "runs/tiny")
        ... except mtl_jax.Interrupted:
        ...     print("start it again")
    """


def unknown(kind: str, name: str, choices: Iterable[str]) -> UserError:
    """The error for a name that is not among the choices; it lists them and suggests the nearest.

    Args:
        kind: The kind of thing that is named, for example "task".
        name: The name that was given.
        choices: The names that exist.

    Returns:
        The error, to be raised by the caller.
    """
    choices = list(choices)
    near = nearest(name, choices)
    hint = f" (did you mean {listed([near])!r}?)" if near else ""
    given = repr(name if len(name) <= 100 else f"{name[:100]}...")
    return UserError(f"unknown {kind} {given}{hint}; choices: {listed(choices)}")


def nearest(name: str, choices: Iterable[str]) -> str:
    """The choice that a mistyped name most likely means; "" where none is near.

    In this order: a choice with almost the same spelling; one that is the first or last words of the name (a text_pair is a
    pair); one with a similar spelling; one whose initials are the name (lr).
    """
    choices, name = list(choices), name[:100]
    words = [choice for choice in choices if name.endswith(f"_{choice}") or name.startswith(f"{choice}_")]
    near = [
        *difflib.get_close_matches(name, choices, n=1, cutoff=0.8),
        *sorted(words, key=lambda choice: (name.endswith(choice), len(choice)), reverse=True),
        *difflib.get_close_matches(name, choices, n=1),
        *(choice for choice in choices if "".join(word[:1] for word in choice.split("_")) == name),
    ]
    return near[0] if near else ""


def listed(names: Iterable[object]) -> str:
    """Names for an error line: the first ten, each cut to 100 characters, and the number of the others."""
    texts = [str(name) for name in names]
    first = ", ".join(text if len(text) <= 100 else f"{text[:100]}..." for text in texts[:SHOWN])
    return f"{first} and {len(texts) - SHOWN} more" if len(texts) > SHOWN else first or "none"


def count(number: int, noun: str, plural: str = "") -> str:
    """A number and its noun: "1 run", "2 runs", "1,000 runs".

    Args:
        number: The number.
        noun: The singular, with its adjectives, such as "other run".
        plural: The plural, where it is not the singular and an s.
    """
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def there_are(number: int, noun: str, plural: str = "") -> str:
    """count() with a verb before it: "there is 1 run", "there are 2 runs"."""
    return f"there {'is' if number == 1 else 'are'} {count(number, noun, plural)}"
