"""main(): the command line of an experiment script."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from mtl_jax.cli import part_names, script_flags, scripts
from mtl_jax.cli.run_command import TYRO_CONFIG, run
from mtl_jax.core.configuration import check_kinds
from mtl_jax.core.hooks import Hooks
from mtl_jax.core.text_lines import flush_output
from mtl_jax.data.source import GivenRows
from mtl_jax.experiment import Experiment, HeadWeights, Weighting

_REGISTRY = tyro.constructors.ConstructorRegistry()
_HEAD_WEIGHTS: dict[str, HeadWeights] = {"true": True, "false": False, "rule": "rule"}


@_REGISTRY.primitive_rule
def _head_weights(field: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """How weigh_heads is parsed and shown: true, false or rule."""
    if field.type != HeadWeights:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="{true,false,rule}",
        instance_from_str=lambda words: _HEAD_WEIGHTS[words[0]],
        is_instance=lambda value: isinstance(value, bool) or value == "rule",
        str_from_instance=lambda value: [str(value).lower()],
        choices=tuple(_HEAD_WEIGHTS),
    )


@_REGISTRY.primitive_rule
def _weighting(field: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """How weighting is parsed and shown: a name; a Rule of the script is only shown."""
    if field.type != Weighting:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="STR",
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: isinstance(value, Weighting),
        str_from_instance=lambda value: [value if isinstance(value, str) else "a Rule of the script"],
    )


@_REGISTRY.primitive_rule
def _script_rows(field: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """Rows that a script gives a Source stay as they are: they have no flag."""
    if field.type != GivenRows:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="ROWS",
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: True,
        str_from_instance=lambda value: [repr(value)],
    )


def _without_switches(arguments: Sequence[str]) -> list[str]:
    """The command line with the former switches --weigh-heads and --no-weigh-heads as --weigh-heads true and false."""
    changed: list[str] = []
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue="--"):
        flag = argument.replace("_", "-")
        if flag == "--no-weigh-heads":
            changed += ["--weigh-heads", "false"]
        else:
            changed += [argument, "true"] if flag == "--weigh-heads" and following.startswith("--") else [argument]
    return changed


@dataclasses.dataclass(frozen=True)
class Launch:
    """The flags of a script: the experiment's fields, and where and how to run it.

    Attributes:
        experiment: The experiment.
        workdir: Where everything is written; the same workdir resumes. Default: runs/NAME.
        dry_run: Read the data, print all tables, compile one step, and write nothing.
        allow_config_change: Resume in a workdir that was begun with another configuration.
        distributed: Train together with other processes that are started with the same command and a shared workdir: auto on a
            TPU pod, Slurm and the like, else HOST:PORT,INDEX,COUNT (address of process 0, index of this process, their number).
        logger: Send metrics to this logger, too: wandb, trackio, mlflow, or one that a script registers. May be repeated.
    """

    experiment: Annotated[Experiment, tyro.conf.arg(name="")]
    workdir: str = ""
    dry_run: bool = False
    allow_config_change: bool = False
    distributed: str = ""
    logger: tyro.conf.UseAppendAction[tuple[str, ...]] = ()


def main(experiment: Experiment, description: str | None = None, *, hooks: Hooks | Iterable[Hooks] = ()) -> None:
    """The command line of a script: parses the flags, trains, prints the table of results, and exits.

    Exit codes: 0 done, 2 bad input or a loss that is not finite, 75 stopped by a signal with the state saved.

    Args:
        experiment: The default of every flag.
        description: The text that --help shows; default: the docstring of the calling script.
        hooks: Functions to be called during the run; one Hooks or several. An ablation of the script does not call them.

    Examples:
        >>> mtl_jax.main(EXPERIMENT)  # as python SCRIPT.py --workdir runs/tiny
        | task ...
        everything is in runs/tiny
    """
    if scripts.imported.get():
        raise scripts.Read(experiment)
    if description is None:
        description = getattr(sys.modules["__main__"], "__doc__", None)
    if scripts.only_read.get():  # by a command or a test, which has its own log
        launch = _parsed(experiment, description or "")
        raise scripts.Read(launch.experiment, bool(hooks or launch.logger), launch.distributed)
    run(lambda: _launch(_parsed(experiment, description or ""), hooks))


def _parsed(experiment: Experiment, description: str) -> Launch:
    """The flags of the command line; --help, --help-all and --help-names print and exit.

    Raises:
        UserError: A flag or a name in one is unknown, or a file to import fails.
    """
    arguments, files = scripts.divided_imports(sys.argv[1:])
    scripts.import_parts(files)
    check_kinds(experiment)  # the parser guesses at what is of another class
    if "--help-names" in arguments:
        print(part_names.names_page())
        flush_output()
        raise SystemExit(0)
    if {"--help", "-h"} & set(arguments):
        print(script_flags.help_page(Launch(experiment, f"runs/{experiment.name}"), f"python {sys.argv[0]}", description))
        flush_output()
        raise SystemExit(0)
    everything = "--help-all" in arguments
    arguments = _without_switches(["--help" if argument == "--help-all" else argument for argument in arguments])
    by_place = script_flags.by_place(experiment, arguments)
    try:
        launch, remaining = tyro.cli(
            Launch,
            args=by_place,
            default=Launch(experiment),
            description=description,
            config=TYRO_CONFIG,
            registry=_REGISTRY,
            return_unknown_args=True,
        )
    except SystemExit as ended:
        if everything and not ended.code:
            print(part_names.names_page())
            flush_output()
        raise
    if remaining:
        given = dict(zip(by_place, arguments, strict=True))
        raise script_flags.unknown_flag(Launch(experiment), [given.get(argument, argument) for argument in remaining])
    return launch


def _launch(launch: Launch, hooks: Hooks | Iterable[Hooks]) -> None:
    import jax

    from mtl_jax.training import loggers, results_table
    from mtl_jax.training import mesh as meshes
    from mtl_jax.training.dry_run import dry_run
    from mtl_jax.training.train import train

    if launch.distributed:
        meshes.connect(launch.distributed)
    loggers.checked(launch.logger)
    if launch.dry_run:
        line = dry_run(launch.experiment)
        if jax.process_index() == 0:
            print(line)
        return
    workdir = Path(launch.workdir or f"runs/{launch.experiment.name}")
    scores = train(
        launch.experiment, workdir, allow_config_change=launch.allow_config_change, hooks=hooks, loggers=launch.logger
    )
    if jax.process_index() == 0:
        print(results_table.table([scores]))
        print(f"everything is in {workdir}")
