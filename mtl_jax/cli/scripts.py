"""Reads the experiment that a script would train, without training it."""

from __future__ import annotations

import contextlib
import contextvars
import importlib.util
import logging
import runpy
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mtl_jax.core import script_calls
from mtl_jax.core.errors import UserError
from mtl_jax.core.script_calls import Read as Read

if TYPE_CHECKING:  # takes a second to import, and --help needs none of it
    from mtl_jax.experiment import Experiment

log = logging.getLogger(__name__)

only_read: contextvars.ContextVar[bool] = contextvars.ContextVar("only_read", default=False)
imported: contextvars.ContextVar[bool] = contextvars.ContextVar("imported", default=False)  # for the parts that it defines
_flags: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("flags", default=())


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


def given_flags() -> tuple[str, ...]:
    """The flags of given(), those after "--"."""
    return _flags.get()


def divided_imports(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments without --import FILE, and the files.

    Raises:
        UserError: --import is the last argument.
    """
    others: list[str] = []
    files: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--import":
            file = next(remaining, None)
            if file is None:
                raise UserError("--import needs a Python file, or the name of a module")
            files.append(file)
        elif argument.startswith("--import="):
            files.append(argument.partition("=")[2])
        else:
            others.append(argument)
    return others, files


def import_parts(files: Sequence[str]) -> None:
    """Imports files with a user's own parts, each a Python file or the name of a module; main() in them does not train.

    Raises:
        UserError: A file does not exist, or fails; the line has its own error.
    """
    for file in files:
        token = imported.set(True)
        try:
            _import(file)
        except Read:
            pass  # the script called main(); what it defines stands above
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            what = f"{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}{_place(error)}"
            raise UserError(f"--import {file}: {what}; it was imported because of --import") from error
        finally:
            imported.reset(token)


def _place(error: BaseException) -> str:
    """ " (FILE:LINE)" of an error in the user's code; "" where no line of it is to blame."""
    if isinstance(error, SyntaxError):
        return f" ({error.filename}:{error.lineno})"
    ours = (__file__, importlib.__file__)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename not in ours]
    frames = [frame for frame in frames if not frame.filename.startswith("<frozen ")]
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def _import(file: str) -> None:
    if not file.endswith(".py"):
        if "/" in file:
            raise UserError(f"--import {file}: name a Python file, or a module")
        importlib.import_module(file)
        return
    path = Path(file)
    if not path.is_file():
        raise UserError(f"--import {file}: no such file")
    name = path.stem if path.stem.isidentifier() else "imported_parts"
    if name in sys.modules:  # as a file that has this name by chance, such as a script called random.py
        name = f"imported_parts_{name}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.resolve().parent))  # as for a script: files beside it can be imported
    spec.loader.exec_module(module)


def read(script: str, purpose: str = "ablate") -> Experiment:
    """The experiment of a script, with the flags of given().

    Args:
        script: A Python file that calls mtl_jax.main, as `python SCRIPT FLAGS` would run it.
        purpose: What the experiment is for, as a verb for error lines. "audit": a script that calls mtl_jax.train has the
            experiment that it would train first.

    Raises:
        UserError: The file does not exist, it ends without calling main(), or its flags have --distributed.
    """
    called = read_call(script, purpose)
    if called.distributed:
        advice = "mtl-jax launch adds it" if purpose == "launch" else f"to {purpose} takes one process"
        raise UserError(f"--distributed: leave it out of the script's flags; {advice}")
    return called.experiment


def read_call(script: str, purpose: str) -> Read:
    """What a script called main() with; as read(), with --distributed allowed."""
    path = Path(script)
    if not path.is_file():
        raise UserError(f"{script}: no such script")
    argv, folders = sys.argv, list(sys.path)
    token, train_token = only_read.set(True), script_calls.until_train.set(purpose == "audit")
    sys.argv, sys.path[:0] = [script, *_flags.get()], [str(path.resolve().parent)]
    try:
        runpy.run_path(script, run_name="__main__")
    except Read as called:
        if called.has_hooks and purpose == "ablate":
            log.warning("%s: an ablation calls no hooks and no --logger; its runs have their own metrics.jsonl", script)
        return called
    finally:
        sys.argv, sys.path[:] = argv, folders
        only_read.reset(token)
        script_calls.until_train.reset(train_token)
    raise UserError(f"{script}: it did not call mtl_jax.main(experiment), so there is nothing to {purpose}")
