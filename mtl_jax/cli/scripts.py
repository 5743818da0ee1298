"""Reads the experiment that a script would train, without training it."""

from __future__ import annotations

import contextlib
import contextvars
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mtl_jax.core.errors import UserError

if TYPE_CHECKING:  # takes a second to import, and --help needs none of it
    from mtl_jax.experiment import Experiment

only_read: contextvars.ContextVar[bool] = contextvars.ContextVar("only_read", default=False)
_flags: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("flags", default=())


class Read(BaseException):
    """Ends a script at its call of main(), where its experiment is known. Not an Exception, so that scripts do not catch it."""

    def __init__(self, experiment: Experiment):
        super().__init__()
        self.experiment = experiment


def divided(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments of a command, and those after "--", which belong to a script."""
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    return list(arguments[:end]), list(arguments[end + 1 :])


@contextlib.contextmanager
def given(flags: Sequence[str]) -> Iterator[None]:
    """Within this context, read() passes these flags to the script."""
    token = _flags.set(tuple(flags))
    try:
        yield
    finally:
        _flags.reset(token)


def read(script: str) -> Experiment:
    """The experiment of a script, with the flags of given().

    Args:
        script: A Python file that calls mtl_jax.main, as `python SCRIPT FLAGS` would run it.

    Raises:
        UserError: The file does not exist, or it ends without calling main().
    """
    path = Path(script)
    if not path.is_file():
        raise UserError(f"{script}: no such script")
    argv, folders = sys.argv, list(sys.path)
    token = only_read.set(True)
    sys.argv, sys.path[:0] = [script, *_flags.get()], [str(path.resolve().parent)]
    try:
        runpy.run_path(script, run_name="__main__")
    except Read as called:
        return called.experiment
    finally:
        sys.argv, sys.path[:] = argv, folders
        only_read.reset(token)
    raise UserError(f"{script}: it did not call mtl_jax.main(experiment), so there is nothing to ablate")
