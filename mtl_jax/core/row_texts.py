"""Texts of rows in error lines, logs and records: shown, or left out where a run is private.

Whatever shows a value of a row to people goes through quoted() or named(). A run marked private is read, trained and opened
within hiding(), where they return a remark in place of the value; file and line are always shown.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ParamSpec, TypeVar

from mtl_jax.core.errors import listed
from mtl_jax.core.files import reason, shown

HIDDEN = "(not shown: private)"

P = ParamSpec("P")
R = TypeVar("R")

_hidden: contextvars.ContextVar[bool] = contextvars.ContextVar("hidden", default=False)


@contextlib.contextmanager
def hiding(private: bool) -> Iterator[None]:
    """Within this context, if `private` or if it is so already, no text of a row is shown."""
    token = _hidden.set(private or _hidden.get())
    try:
        yield
    finally:
        _hidden.reset(token)


def hiding_if(private: Callable[..., bool]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: the function runs within hiding(), if `private` is true of its arguments.

    Args:
        private: From the arguments of the function to whether no text of a row may be shown.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def hidden_function(*args: P.args, **kwargs: P.kwargs) -> R:
            with hiding(private(*args, **kwargs)):
                return function(*args, **kwargs)

        return hidden_function

    return decorate


def are_hidden() -> bool:
    """Whether texts of rows are left out now."""
    return _hidden.get()


def quoted(value: Any) -> str:
    """A value of a row in quotation marks, the middle of a long one left out.

    >>> quoted("a text")
    "'a text'"
    """
    if are_hidden():
        return HIDDEN
    return repr(shown(value)) if isinstance(value, str) else shown(repr(value))


def named(columns: Iterable[object]) -> str:
    """Names of columns, which are values of the first row where a file lacks its header."""
    return HIDDEN if are_hidden() else listed(columns)


def plain(text: str) -> str:
    """A text as it is; empty where texts are left out."""
    return "" if are_hidden() else text


def why(error: Exception) -> str:
    """The message of an error of other people's code, which may quote a text; where texts are left out its kind alone."""
    return f"{type(error).__name__} {HIDDEN}" if are_hidden() else reason(error)
