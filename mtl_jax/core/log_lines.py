"""The lines that mtl_jax logs, as plain text on standard error: for commands, and for scripts that configure no logging."""

from __future__ import annotations

import logging
import os
import sys

import tqdm


class StandardError(logging.Handler):
    """Writes plain lines to the standard error of the moment, on a terminal above the progress bar, which stays below them."""

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stderr is None:
            return
        try:
            if sys.stderr.isatty():
                tqdm.tqdm.write(self.format(record), file=sys.stderr)
            else:
                print(self.format(record), file=sys.stderr, flush=True)
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
