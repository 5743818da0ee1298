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
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits: the same command, started again, goes on

_CONFIG = (tyro.conf.AvoidSubcommands,)  # a union's default decides its type; flags set that type's fields
_REGISTRY = tyro.constructors.ConstructorRegistry()
_WORDS: dict[str, HeadWeights] = {"true": True, "false": False, "rule": "rule"}


@_REGISTRY.primitive_rule
def _head_weights(field: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """How weigh_heads is read and shown: true, false or rule."""
    if field.type != HeadWeights:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="{true,false,rule}",
        instance_from_str=lambda words: _WORDS[words[0]],
        is_instance=lambda value: isinstance(value, bool) or value == "rule",
        str_from_instance=lambda value: [str(value).lower()],
        choices=tuple(_WORDS),
    )


def _as_words(arguments: Sequence[str]) -> list[str]:
    """The command line with --weigh-heads and --no-weigh-heads, which were a switch, as --weigh-heads true and false."""
    found: list[str] = []
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue="--"):
        flag = argument.replace("_", "-")
        if flag == "--no-weigh-heads":
            found += ["--weigh-heads", "false"]
        else:
            found += [argument, "true"] if flag == "--weigh-heads" and following.startswith("--") else [argument]
    return found


@dataclasses.dataclass(frozen=True)
class Launch:
    """What a script's command line sets: the experiment's fields, and where and how to run it.

    Attributes:
        experiment: The experiment.
        workdir: Where everything is written; the same workdir resumes. Default: runs/NAME.
        allow_config_change: Go on in a workdir that was begun with another configuration.
        distributed: Train together with other processes, each started with the same command and a shared workdir: auto on a
            TPU pod, Slurm and the like, else HOST:PORT,INDEX,COUNT (process 0's address, own index, number of processes).
    """

    experiment: Annotated[Experiment, tyro.conf.arg(name="")]
    workdir: str = ""
    allow_config_change: bool = False
    distributed: str = ""


def main(experiment: Experiment, description: str | None = None) -> None:
    """Command line over an experiment: parses the flags, trains, prints the table; ends the process with an exit code.

    Exit codes: 0 done, 2 bad input or a loss that is not finite, 75 stopped by a signal with the state saved.

    Args:
        experiment: The defaults of every flag.
        description: Shown by --help; default: the docstring of the calling script.
    """
    if description is None:
        description = getattr(sys.modules["__main__"], "__doc__", None)
    launch = tyro.cli(
        Launch,
        args=_as_words(sys.argv[1:]),
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
    found = train(launch.experiment, workdir, allow_config_change=launch.allow_config_change)
    if jax.process_index() == 0:
        print(results.table([found]))
        print(f"everything is in {workdir}")


def predict(
    workdir: Annotated[str, tyro.conf.Positional],
    /,
    task: str,
    text: tuple[str, ...] = (),
    file: str = "",
) -> None:
    """Predictions of a run's best checkpoint: one JSON object a line, in the order of the input.

    Args:
        workdir: The run's workdir.
        task: The task whose head answers.
        text: Texts to predict.
        file: A UTF-8 file with one text a line, or of lines of JSON objects with the text columns of the task's source if its
            name ends in .jsonl; - for standard input. Every line gets an answer, empty ones an error object.
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
    """Loss and metrics of a run's best checkpoint on other rows, as one JSON object; null where a metric is not defined.

    Args:
        workdir: The run's workdir.
        task: The task whose head answers.
        path: Rows with the columns of the task's source: a file, data:REST, tfds:NAME#SPLIT or hf:ORG/NAME#SPLIT.
        format: Of a file, if it is another than the source's.
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
        task: Of a workdir: the task whose head is written beside the trunk, in the format of sentence-transformers.
        overwrite: Replace a checkpoint that is there.
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
    """Models put together: finished runs as a workdir, or checkpoints of one family as a directory that transformers opens.

    Of runs the best checkpoints are merged. Heads of tasks that all of them have are merged like the trunk; those that one run
    has stand beside each other. Where the runs' data is there, the result is measured on dev and test.

    Args:
        target: The directory to write; merge.json in it says what was merged, and how.
        sources: Workdirs; or checkpoints: directories, pip:ASSET/MEMBER, or hub ids ORG/NAME.
        method: soup: the mean. average: weighted by --weights. greedy: the best run by dev, and in order of dev every other
            that does not hurt. wise: (1 - alpha) base + alpha source. arithmetic: base + scale * the sum of (source - base).
            ties: base + scale * what the sources' changes agree on, each trimmed to its largest. dare, dare_ties: changes are
            dropped by chance and the rest grows, then arithmetic or ties.
        base: For wise, arithmetic, ties and dare: the checkpoint or run that the sources started from.
        weights: For average: one for each source.
        alpha: For wise: from 0, the base, to 1, the source (0.5).
        scale: For arithmetic, ties and dare (1.0); for arithmetic and dare also one for each source. May be negative.
        keep: For ties: the share of each source's changes that stays (0.2).
        drop: For dare: the share of each source's changes that is dropped (0.9).
        seed: For dare (0).
        trunk_only: Of checkpoints with different heads: the bare models.
        overwrite: Replace what an earlier merge wrote.
    """
    from mtl_jax import merge as module
    from mtl_jax.training import results

    how = module.Method(method, weights or None, alpha, scale or None, keep, drop, seed)
    found = module.merge(target, sources, how, base=base, trunk_only=trunk_only, overwrite=overwrite)
    if found is not None:
        print(results.table([found]))
    print(f"everything is in {target}")


def results(workdirs: tyro.conf.Positional[tuple[str, ...]], /) -> None:
    """The table of a finished run; of several, mean and standard deviation over those of the same experiment and tasks.

    Args:
        workdirs: Workdirs of finished runs; a table for each experiment and set of tasks.
    """
    from mtl_jax.training import results as module

    print(module.tables([module.read(Path(workdir)) for workdir in workdirs]))


def report(workdirs: tyro.conf.Positional[tuple[str, ...]], /, output: str = "") -> None:
    """A page, a table of all values, statistics and figures of an ablation, or of ordinary runs beside each other.

    Writes report.html, which needs no other file, ablation.csv, results.json and figures/*.png.

    Args:
        workdirs: One ablation; or workdirs of runs of the same tasks, "runs/*" for those there. Of runs that differ in the seed
            only, mean and standard deviation.
        output: Where to. Default: of an ablation itself, of runs report/.
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
    own, flags = scripts.divided(sys.argv[1:])

    def command() -> None:
        tyro.extras.subcommand_cli_from_dict(commands, prog="mtl-jax", description=__doc__, args=own, config=_CONFIG)

    with scripts.given(flags):
        run(command)


def run(command: Callable[[], None]) -> None:
    """Runs a command; what is the user's to mend becomes one line on standard error and an exit code, as in main()."""
    _log_to_stderr()
    try:
        try:
            command()
        except (UserError, Interrupted, KeyboardInterrupt):
            raise
        except Exception as error:  # a write that nothing nearer to it has told of
            refused = refusal(error)
            if refused is None:
                raise
            with contextlib.suppress(UserError):
                flush_output()  # or Python tries once more when it ends
            where = getattr(error, "filename", None) or "a file"
            raise UserError(f"{shown(where)}: cannot be read or written ({reason(refused)})") from error
        flush_output()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except Interrupted as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except KeyboardInterrupt:  # before or after the work that listens to it
        print("stopped", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def _log_to_stderr() -> None:
    """Our own progress notes as plain lines; of the libraries, errors only."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found": it is not needed
    logging.getLogger("absl").setLevel(logging.ERROR)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("mtl_jax")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
