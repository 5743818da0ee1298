"""The lines that mtl_jax logs, as plain text on standard error: for commands, and for scripts that configure no logging."""

from __future__ import annotations

import logging
import os
import sys

import tqdm

RED, GREEN, YELLOW, BOLD = "31", "32", "33", "1"


def painted(text: str, colour: str) -> str:
    """A text in a colour where standard error is a terminal, unless NO_COLOR is set (https://no-color.org)."""
    terminal = sys.stderr is not None and sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    return f"\033[{colour}m{text}\033[0m" if terminal else text


class StandardError(logging.Handler):
    """Writes plain lines to the standard error of the moment, on a terminal above the progress bar, which stays below them."""

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stderr is None:
            return
        try:
            colour = YELLOW if record.levelno >= logging.WARNING else getattr(record, "colour", "")
            line = painted(self.format(record), colour) if colour else self.format(record)
            if sys.stderr.isatty():
                tqdm.tqdm.write(line, file=sys.stderr)
            else:
                print(line, file=sys.stderr, flush=True)
        except Exception:  # as other handlers of logging do
            self.handleError(record)


def to_stderr() -> None:
    """Logs the lines of mtl_jax, and of other libraries only errors: for commands."""
    _only_errors_of_others()
    logger = logging.getLogger("mtl_jax")
    logger.handlers = [StandardError()]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def show() -> None:
    """The same for a call from Python, unless the script has a handler of its own for mtl_jax or for everything.

    A script that configures logging later gets the lines by its own handler alone.
    """
    logger = logging.getLogger("mtl_jax")
    if logger.handlers or logging.getLogger().handlers:
        return
    _only_errors_of_others()
    handler = StandardError()
    handler.addFilter(lambda record: not logging.getLogger().handlers)
    logger.addHandler(handler)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)


def _only_errors_of_others() -> None:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch was not found, which is not needed
    logging.getLogger("absl").setLevel(logging.ERROR)
