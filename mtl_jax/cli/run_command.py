"""Runs a command: its log, its errors as single lines, its exit code."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable

import tyro

from mtl_jax.core import log_lines
from mtl_jax.core.configuration import EXIT_BAD_INPUT
from mtl_jax.core.errors import Interrupted, UserError
from mtl_jax.core.files import reason, refusal, shown
from mtl_jax.core.text_lines import flush_output

TYRO_CONFIG = (tyro.conf.AvoidSubcommands,)  # the default of a union decides its type; flags set the fields of that type
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits: the same command, started again, resumes


def run(command: Callable[[], None]) -> None:
    """Runs a command; an error that the user can mend becomes one line on standard error and an exit code, as in main().

    Examples:
        >>> mtl_jax.run(lambda: print(len(mtl_jax.results("runs/tiny"))))  # a command of a script's own
        1
    """
    log_lines.to_stderr()
    try:
        try:
            command()
        except (UserError, Interrupted, KeyboardInterrupt):
            raise
        except Exception as error:  # a failed write that no code nearer to it has reported
            refused = refusal(error)
            if refused is None:
                raise
            with contextlib.suppress(UserError):
                flush_output()  # else Python tries again when it exits
            pipe = isinstance(error, BrokenPipeError)
            path = getattr(error, "filename", None) or ("standard output" if pipe else "a file")
            raise UserError(f"{shown(path)}: cannot be read or written ({reason(refused)})") from error
        flush_output()
    except UserError as error:
        print(f"{log_lines.painted('error:', log_lines.RED)} {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except Interrupted as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except KeyboardInterrupt:  # before or after the work that catches the signal itself
        print("stopped", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
