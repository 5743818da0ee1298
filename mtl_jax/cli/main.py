"""The console entry mtl-jax. Every command imports what it needs when it runs, so that --help is fast."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tyro

from mtl_jax.cli import part_names, scripts
from mtl_jax.cli.ablations import ablate, take
from mtl_jax.cli.after_training import compare, convert, evaluate, memorisation, merge, predict, pseudo_label, report, results
from mtl_jax.cli.augmenting import augment
from mtl_jax.cli.before_training import affinity, audit, deidentify, plan
from mtl_jax.cli.launches import launch_command
from mtl_jax.cli.run_command import TYRO_CONFIG, run
from mtl_jax.cli.translate import generate, summarize, translate
from mtl_jax.core.errors import UserError, nearest, unknown
from mtl_jax.core.files import shown

DESCRIPTION = (
    "Uses, compares and converts finished runs and checkpoints. Runs are trained by scripts: python SCRIPT.py --help. "
    "--help-names lists the names of rules, estimators, launchers and other parts; --import FILE.py brings your own."
)


def check_flags(name: str, command: Callable[..., Any], arguments: Sequence[str]) -> None:
    """Checks that a command has every flag that it is given, before the parser says what else is missing.

    Raises:
        UserError: It has not; names the nearest.
    """
    known = {"help", "h", *(flag.replace("_", "-") for flag in _fields_of(command))}
    for argument in arguments:
        flag = argument.partition("=")[0].removeprefix("--").replace("_", "-")
        is_flag = argument.startswith("--") and not any(map(str.isspace, flag))  # else the value of one, with flags in it
        if is_flag and flag.removeprefix("no-") not in known and flag not in known:
            near = nearest(flag, sorted(known - {"h"}))
            hint = f" (did you mean --{near}?)" if near else ""
            raise UserError(f"unknown flag {shown(f'--{flag}')}{hint}; mtl-jax {name} --help shows all")


def _fields_of(command: Callable[..., Any]) -> Iterator[str]:
    """The parameters of a command that are flags; of one that is a dataclass, its fields."""
    hints, annotated = typing.get_type_hints(command), typing.get_type_hints(command, include_extras=True)
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        if dataclasses.is_dataclass(hint):
            yield from (field.name for field in dataclasses.fields(hint))
        elif parameter.kind is not inspect.Parameter.POSITIONAL_ONLY:
            names = [getattr(extra, "name", None) for extra in getattr(annotated[parameter.name], "__metadata__", ())]
            yield next(filter(None, names), parameter.name)


def console() -> None:
    """The console entry mtl-jax, also as python -m mtl_jax."""
    commands: dict[str, Callable[..., Any]] = {
        "predict": predict,
        "evaluate": evaluate,
        "pseudo-label": pseudo_label,
        "translate": translate,
        "summarize": summarize,
        "generate": generate,
        "convert": convert,
        "merge": merge,
        "affinity": affinity,
        "ablate": ablate,
        "take": take,
        "audit": audit,
        "deidentify": deidentify,
        "augment": augment,
        "memorisation": memorisation,
        "plan": plan,
        "launch": launch_command,
        "results": results,
        "compare": compare,
        "report": report,
    }
    arguments, script_flags = scripts.divided(sys.argv[1:])

    def command() -> None:
        others, files = scripts.divided_imports(arguments)
        if others and not others[0].startswith("-") and others[0] not in commands:
            raise unknown("command", others[0], commands)
        names = "--help-names" in others
        if others and others[0] in commands and not names:
            check_flags(others[0], commands[others[0]], others[1:])
        scripts.import_parts(files)
        if names:
            print(part_names.names_page())
            return
        tyro.extras.subcommand_cli_from_dict(commands, prog="mtl-jax", description=DESCRIPTION, args=others, config=TYRO_CONFIG)

    with scripts.given(script_flags):
        run(command)
