"""The lines that mtl_jax logs, as plain text on standard error: for commands, and for scripts that configure no logging."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any


class _StandardError(logging.StreamHandler):
    """Writes to the standard error of the moment, which notebooks and tests replace."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(logging.Formatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.stream: Any = sys.stderr
        if self.stream is not None:
            super().emit(record)


def to_stderr() -> None:
    """Logs the lines of mtl_jax as plain text, and of other libraries only errors."""
    _only_errors_of_others()
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("mtl_jax")
    logger.handlers = [handler]
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
    handler = _StandardError()
    handler.addFilter(lambda record: not logging.getLogger().handlers)
    logger.addHandler(handler)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)


def _only_errors_of_others() -> None:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch was not found, which is not needed
    logging.getLogger("absl").setLevel(logging.ERROR)
