"""The workdir of an ablation: ablation.json, a folder for each run, and one for each program with checkpoints and trunk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtl_jax.ablation.plan import Program, Run, programs
from mtl_jax.core.errors import UserError, count
from mtl_jax.experiment import Experiment, keep_head_weights
from mtl_jax.training import workdir as workdirs
from mtl_jax.training.experiment_json import from_json, to_json, with_defaults

RECORD = "ablation.json"
WAITING = "waiting"


def of_run(folder: Path, name: str) -> Path:
    """The folder of a run: an ordinary workdir without checkpoints and trunk."""
    return folder / "runs" / name


def of_program(folder: Path, number: int) -> Path:
    """The folder of a program: checkpoints of its chunks, and its trunk's sizes and tokenizer."""
    return folder / "programs" / str(number)


def of_chunk(folder: Path, number: int, place: int) -> Path:
    """The folder with the checkpoints of a chunk of a program."""
    return of_program(folder, number) / f"chunk-{place}"


def read(folder: Path) -> dict[str, Any]:
    """The contents of ablation.json.

    Raises:
        UserError: The folder has no such file.
    """
    record = workdirs.read_json(folder / RECORD)
    if record is None:
        raise UserError(f"{folder}: not the workdir of an ablation ({RECORD} is missing)")
    return record


def read_programs(folder: Path, record: dict[str, Any]) -> list[Program]:
    """The programs of an ablation that was begun.

    Args:
        folder: Its workdir.
        record: ablation.json.
    """
    runs = []
    for run in record["runs"]:
        file = of_run(folder, run["run"]) / "config.json"
        runs.append(Run(run["run"], run["values"], from_json(workdirs.read_json(file), str(file))))
    planned = programs(runs)
    if len(record["programs"]) != len(planned):
        raise workdirs.damaged(folder / RECORD, f"it has {len(record['programs'])} programs, and its runs make {len(planned)}")
    return planned


def keep_head_weights_of_runs(folder: Path, experiment: Experiment) -> Experiment:
    """experiment.keep_head_weights, for an ablation that is resumed: the configurations of its runs decide."""
    record = workdirs.read_json(folder / RECORD)
    configs = [of_run(folder, run["run"]) / "config.json" for run in record["runs"]] if record else []
    return keep_head_weights(experiment, workdirs.read_json(configs[0])) if configs else experiment


def check(folder: Path, planned: Sequence[Program]) -> dict[str, Any] | None:
    """The contents of ablation.json if the same ablation was begun in this workdir, else None.

    Raises:
        UserError: Another ablation was begun in the workdir, it is that of a run, or it cannot be written.
    """
    workdirs.check_writable(folder)
    before = workdirs.read_json(folder / RECORD)
    if before is None:
        if (folder / "config.json").exists():
            raise UserError(f"{folder}: this is the workdir of a run; choose another --workdir for the ablation")
        return None
    configs = {run.name: to_json(run.experiment) for program in planned for run in program.runs}
    run_names = {run["run"] for run in before["runs"]}
    if run_names != set(configs):
        raise UserError(
            f"{folder}: begun with {count(len(run_names), 'run')}, and these are {len(configs)}; choose another --workdir"
        )
    if len(before["programs"]) != len(planned):
        raise workdirs.damaged(folder / RECORD, f"it has {len(before['programs'])} programs, and its runs make {len(planned)}")
    for name, config in configs.items():
        workdirs.config_changed(of_run(folder, name), config, False, with_defaults)
    return before


def begin(folder: Path, planned: Sequence[Program]) -> None:
    """Writes the configuration of every run."""
    for run in (run for program in planned for run in program.runs):
        workdirs.create(of_run(folder, run.name))
        if not (of_run(folder, run.name) / "config.json").exists():
            workdirs.write_json(of_run(folder, run.name) / "config.json", to_json(run.experiment))


def ended(record: dict[str, Any]) -> dict[str, str]:
    """{run: status} of the runs that are done or have diverged, in the contents of ablation.json; {} before it has runs."""
    return {run["run"]: run["status"] for run in record.get("runs", ()) if run["status"] != WAITING}


def write(folder: Path, record: dict[str, Any], planned: Sequence[Program], status: dict[str, str]) -> dict[str, Any]:
    """Writes ablation.json, and returns it.

    Args:
        folder: The workdir.
        record: The contents of ablation.json without the runs.
        planned: The programs.
        status: {run: "done" or "diverged ..."}; other runs are waiting.
    """
    rows = sorted((run.name, program.number, run.values) for program in planned for run in program.runs)
    runs = [
        {"run": name, "values": values, "program": number, "status": status.get(name, WAITING)} for name, number, values in rows
    ]
    written = record | {"runs": runs, "devices": workdirs.versions()["devices"]}
    workdirs.write_json(folder / RECORD, written)
    return written
