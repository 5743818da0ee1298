"""Experiment scripts as data: the experiment that a script would train, without training it."""

from __future__ import annotations

import contextlib
import contextvars
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from mtl_jax.core.errors import UserError
from mtl_jax.experiment import Experiment

only_read: contextvars.ContextVar[bool] = contextvars.ContextVar("only_read", default=False)
_flags: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("flags", default=())


class Read(BaseException):
    """Ends a script at its call of main: what it would train is known. No error, and not to be caught as one."""

    def __init__(self, experiment: Experiment):
        super().__init__()
        self.experiment = experiment


def divided(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command's own arguments, and those after "--", which are a script's."""
    at = list(arguments).index("--") if "--" in arguments else len(arguments)
    return list(arguments[:at]), list(arguments[at + 1 :])


@contextlib.contextmanager
def given(flags: Sequence[str]) -> Iterator[None]:
    """While inside, scripts are read with these flags."""
    token = _flags.set(tuple(flags))
    try:
        yield
    finally:
        _flags.reset(token)


def read(script: str) -> Experiment:
    """The experiment of a script, with the flags that are given for it.

    Args:
        script: A Python file that calls mtl_jax.main, as `python SCRIPT FLAGS` would run it.

    Raises:
        UserError: There is no such file, or it ends without calling main.
    """
    path = Path(script)
    if not path.is_file():
        raise UserError(f"{script}: no such script")
    argv, folders = sys.argv, list(sys.path)
    token = only_read.set(True)
    sys.argv, sys.path[:0] = [script, *_flags.get()], [str(path.resolve().parent)]
    try:
        runpy.run_path(script, run_name="__main__")
    except Read as found:
        return found.experiment
    finally:
        sys.argv, sys.path[:] = argv, folders
        only_read.reset(token)
    raise UserError(f"{script}: it did not call mtl_jax.main(experiment), so there is nothing to ablate")
