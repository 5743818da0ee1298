"""The command line: main() for experiment scripts, and the console entry mtl-jax."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from mtl_jax.cli import scripts
from mtl_jax.cli.ablations import ablate, take
from mtl_jax.cli.translate import summarize, translate
from mtl_jax.core.errors import Interrupted, UserError
from mtl_jax.core.files import reason, refusal, shown, to_json
from mtl_jax.core.text_lines import flush_output, lines_of, object_of, print_lines, read_bytes
from mtl_jax.experiment import Experiment, HeadWeights

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits: the same command, started again, resumes

_CONFIG = (tyro.conf.AvoidSubcommands,)  # the default of a union decides its type; flags set the fields of that type
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
        allow_config_change: Resume in a workdir that was begun with another configuration.
        distributed: Train together with other processes that are started with the same command and a shared workdir: auto on a
            TPU pod, Slurm and the like, else HOST:PORT,INDEX,COUNT (address of process 0, index of this process, their number).
    """

    experiment: Annotated[Experiment, tyro.conf.arg(name="")]
    workdir: str = ""
    allow_config_change: bool = False
    distributed: str = ""


def main(experiment: Experiment, description: str | None = None) -> None:
    """The command line of a script: parses the flags, trains, prints the table of results, and exits.

    Exit codes: 0 done, 2 bad input or a loss that is not finite, 75 stopped by a signal with the state saved.

    Args:
        experiment: The default of every flag.
        description: The text that --help shows; default: the docstring of the calling script.
    """
    if description is None:
        description = getattr(sys.modules["__main__"], "__doc__", None)
    launch = tyro.cli(
        Launch,
        args=_without_switches(sys.argv[1:]),
        default=Launch(experiment),
        description=description,
        config=_CONFIG,
        registry=_REGISTRY,
    )
    if scripts.only_read.get():
        if launch.distributed:
            raise UserError("--distributed: an ablation trains on the devices of one process; leave it out")
        raise scripts.Read(launch.experiment)
    run(lambda: _launch(launch))


def _launch(launch: Launch) -> None:
    import jax

    from mtl_jax.training import mesh as meshes
    from mtl_jax.training import results
    from mtl_jax.training.loop import train

    if launch.distributed:
        meshes.connect(launch.distributed)
    workdir = Path(launch.workdir or f"runs/{launch.experiment.name}")
    scores = train(launch.experiment, workdir, allow_config_change=launch.allow_config_change)
    if jax.process_index() == 0:
        print(results.table([scores]))
        print(f"everything is in {workdir}")


def predict(
    workdir: Annotated[str, tyro.conf.Positional],
    /,
    task: str,
    text: tuple[str, ...] = (),
    file: str = "",
) -> None:
    """Predictions of a run's best checkpoint: one JSON object per line, in the order of the input.

    Args:
        workdir: The run's workdir.
        task: The task whose head answers.
        text: Texts to predict.
        file: A UTF-8 file with one text per line, or, if its name ends in .jsonl, with one JSON object per line that has the
            text columns of the task's source; - for standard input. Every line gets an answer, an empty line an error object.
    """
    from mtl_jax.inference import predict as prediction

    rows: list[Any] = lines_of(read_bytes(file), file) if file else []
    if not rows and not text:
        raise UserError("nothing to predict: give --text or --file")
    if file.endswith(".jsonl"):
        numbered = enumerate(rows, start=1)
        rows = [object_of(line, f"{file}:{number}") if line.strip() else {} for number, line in numbered]
    print_lines(to_json(answer, ensure_ascii=False) for answer in prediction.predict(workdir, task, [*text, *rows]))


def evaluate(
    workdir: Annotated[str, tyro.conf.Positional],
    /,
    task: str,
    path: str,
    format: str = "",
) -> None:
    """Loss and metrics of a run's best checkpoint on other rows: one JSON object, null where a metric is not defined.

    Args:
        workdir: The run's workdir.
        task: The task whose head answers.
        path: The rows, with the columns of the task's source: a file, data:REST, tfds:NAME#SPLIT or hf:ORG/NAME#SPLIT.
        format: The file's format, if it differs from the source's.
    """
    from mtl_jax.inference import predict as prediction

    print_lines([to_json(prediction.evaluate(workdir, task, path, format))])


def convert(
    source: Annotated[str, tyro.conf.Positional],
    target: Annotated[str, tyro.conf.Positional],
    /,
    task: str = "",
    overwrite: bool = False,
) -> None:
    """A run's trunk, or any checkpoint, as a directory that transformers opens: safetensors, config.json, tokenizer.

    Args:
        source: A run's workdir, or a checkpoint: a directory, pip:ASSET/MEMBER, or a hub id ORG/NAME.
        target: The directory to write.
        task: For a workdir: the task whose head is written beside the trunk, in the format of sentence-transformers.
        overwrite: Replace an existing checkpoint.
    """
    from mtl_jax.inference import export

    if note := export.convert(source, target, task=task, overwrite=overwrite):
        print(note)
    print(f"everything is in {target}")


def merge(
    target: Annotated[str, tyro.conf.Positional],
    sources: Annotated[tuple[str, ...], tyro.conf.Positional],
    /,
    method: str,
    base: str = "",
    weights: tuple[float, ...] = (),
    alpha: float | None = None,
    scale: tuple[float, ...] = (),
    keep: float | None = None,
    drop: float | None = None,
    seed: int | None = None,
    trunk_only: bool = False,
    overwrite: bool = False,
) -> None:
    """Merges models: finished runs into a workdir, or checkpoints of one family into a directory that transformers opens.

    For runs, the best checkpoints are merged. Heads of tasks that all runs have are merged like the trunk; the other heads are
    kept side by side. If the runs' data can be read, the result is evaluated on dev and test.

    Args:
        target: The directory to write; its merge.json records the sources and the method.
        sources: Workdirs; or checkpoints: directories, pip:ASSET/MEMBER, or hub ids ORG/NAME.
        method: soup: the mean. average: the mean weighted by --weights. greedy: the best run by dev, and in order of dev every
            other run that does not lower its score. wise: (1 - alpha) base + alpha source. arithmetic: base + scale * the sum
            of (source - base). ties: base + scale * the mean of the sources' largest changes that agree in sign. dare,
            dare_ties: changes are dropped at random and the others scaled up, then arithmetic or ties.
        base: For wise, arithmetic, ties and dare: the checkpoint or run that the sources started from.
        weights: For average: one for each source.
        alpha: For wise: from 0, the base, to 1, the source (0.5).
        scale: For arithmetic, ties and dare (1.0); for arithmetic and dare also one for each source. May be negative.
        keep: For ties: the share of each source's changes that is kept (0.2).
        drop: For dare: the share of each source's changes that is dropped (0.9).
        seed: For dare: the seed of what is dropped (0).
        trunk_only: For checkpoints with different heads: merge the bare models.
        overwrite: Replace the result of an earlier merge.
    """
    from mtl_jax import merge as module
    from mtl_jax.training import results

    checked = module.Method(method, weights or None, alpha, scale or None, keep, drop, seed)
    scores = module.merge(target, sources, checked, base=base, trunk_only=trunk_only, overwrite=overwrite)
    if scores is not None:
        print(results.table([scores]))
    print(f"everything is in {target}")


def results(workdirs: tyro.conf.Positional[tuple[str, ...]], /) -> None:
    """The table of results of a finished run, or mean and standard deviation over several runs.

    Args:
        workdirs: Workdirs of finished runs; each experiment and set of tasks has one table.
    """
    from mtl_jax.training import results as module

    print(module.tables([module.read(Path(workdir)) for workdir in workdirs]))


def report(workdirs: tyro.conf.Positional[tuple[str, ...]], /, output: str = "") -> None:
    """A report on an ablation, or on ordinary runs side by side: a page, a table of all values, statistics and figures.

    Writes report.html, which needs no other file, ablation.csv, results.json and figures/*.png.

    Args:
        workdirs: One ablation; or workdirs of runs with the same tasks, such as "runs/*". Runs that differ only in the seed
            are shown as mean and standard deviation.
        output: The directory to write. Default: the ablation's workdir; for runs, report/.
    """
    from mtl_jax import report as module

    folders = module.find(workdirs)
    print(f"the report is {module.write(folders, Path(output) if output else module.default_output(folders))}")


def console() -> None:
    """The console entry mtl-jax."""
    commands: dict[str, Callable[..., Any]] = {
        "predict": predict,
        "evaluate": evaluate,
        "translate": translate,
        "summarize": summarize,
        "convert": convert,
        "merge": merge,
        "ablate": ablate,
        "take": take,
        "results": results,
        "report": report,
    }
    arguments, script_flags = scripts.divided(sys.argv[1:])

    def command() -> None:
        tyro.extras.subcommand_cli_from_dict(commands, prog="mtl-jax", description=__doc__, args=arguments, config=_CONFIG)

    with scripts.given(script_flags):
        run(command)


def run(command: Callable[[], None]) -> None:
    """Runs a command; an error that the user can mend becomes one line on standard error and an exit code, as in main()."""
    _log_to_stderr()
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
            path = getattr(error, "filename", None) or "a file"
            raise UserError(f"{shown(path)}: cannot be read or written ({reason(refused)})") from error
        flush_output()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except Interrupted as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except KeyboardInterrupt:  # before or after the work that catches the signal itself
        print("stopped", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def _log_to_stderr() -> None:
    """Logs the lines of mtl_jax as plain text, and of other libraries only errors."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch was not found, which is not needed
    logging.getLogger("absl").setLevel(logging.ERROR)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("mtl_jax")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
