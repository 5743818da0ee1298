"""The command mtl-jax launch: writes what a system needs to train an experiment on several machines, and starts it."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from mtl_jax.cli import scripts
from mtl_jax.core.errors import UserError
from mtl_jax.core.files import shown, write_text, writing
from mtl_jax.core.text_lines import flush_output

MARK = "mtl-jax launch"  # in the first lines of every file that is written


class Launched(NamedTuple):
    """What became of a launch.

    Attributes:
        file: The file that was written; with dry_run, that would be.
        command: The command that starts the job with it.
        code: The exit code of the command; None where it was not started.
    """

    file: str
    command: str
    code: int | None


def launch_command(
    script: Annotated[str, tyro.conf.Positional],
    /,
    on: str,
    name: str = "",
    folder: str = "",
    python: str = "python",
    prepare: str = "",
    restarts: int = 20,
    output: str = "",
    ablate: str = "",
    dry_run: bool = False,
    yes: bool = False,
) -> None:
    """Trains an experiment on several machines: writes the file that a system needs for it, and starts it after a question.

    Exit code 75 of a run means "start me again": each file does so, as often as --restarts says. The script's own flags come
    after --; its --workdir must be seen by all machines, and --distributed is added.

    Args:
        script: A script that calls mtl_jax.main, in the current directory or below.
        on: The system with its options: ssh:HOST,HOST; slurm:nodes=2,gpus=8; gcloud:zone=ZONE,type=v4-16;
            skypilot:accelerators=H100:8; xpk:cluster=NAME,type=v5litepod-16; or one of --import FILE. Options: docs/pods.md.
        name: The job's name. Default: that of the script.
        folder: The directory on the machines in which the script starts. Default: this one, which ssh and slurm do not
            copy; for gcloud, where it is copied to.
        python: The Python of the machines.
        prepare: A line of shell that each machine runs first, such as ". ~/venv/bin/activate" or "pip install -e .".
        restarts: How often it is started again at most.
        output: The file to write. Default: launch/NAME with an ending.
        ablate: Train an ablation of the script, whose runs the hosts share: the options of mtl-jax ablate as one text, such as
            "--vary optimizer.learning-rate=1e-3,1e-2 --workdir /shared/ablation".
        dry_run: Print the file and the command, and write and start nothing; the system's tool need not be there.
        yes: Start without asking.
    """
    launched = launch(
        script,
        on,
        scripts.given_flags(),
        name=name,
        folder=folder,
        python=python,
        prepare=prepare,
        restarts=restarts,
        output=output,
        ablate=ablate,
        dry_run=dry_run,
        yes=yes,
    )
    if launched.code:
        flush_output()
        sys.exit(launched.code)


def launch(
    script: str | Path,
    on: str,
    flags: Sequence[str] = (),
    *,
    name: str = "",
    folder: str = "",
    python: str = "python",
    prepare: str = "",
    restarts: int = 20,
    output: str = "",
    ablate: str = "",
    dry_run: bool = False,
    yes: bool = False,
) -> Launched:
    """Writes what a system needs to train an experiment on several machines, and starts it if `yes` or the user says so.

    Args:
        script: A script that calls mtl_jax.main, in the current directory or below.
        on: The system with its options, such as "slurm:nodes=2,gpus=8"; see register_launcher for one's own.
        flags: The script's flags, without --distributed.
        name: The job's name; default: that of the script.
        folder: The directory on the machines in which the script starts; default: the launcher's choice.
        python: The Python of the machines.
        prepare: A line of shell that each machine runs first.
        restarts: How often it is started again at most.
        output: The file to write; default: launch/NAME with an ending.
        ablate: The options of mtl-jax ablate as one text, to train an ablation of the script; empty: the script is run.
        dry_run: Print the file and the command, and write and start nothing.
        yes: Start without asking; else the user is asked, where there is a terminal.

    Raises:
        UserError: The script, a flag, the system or an option is refused, or the system's tool is not on PATH.

    Examples:
        >>> launched = mtl_jax.launch("two_tasks.py", "slurm:nodes=2,gpus=8", ["--workdir", "runs/pod"], dry_run=True)
        #!/usr/bin/env bash
        ...
        >>> launched.command
        'sbatch launch/two-tasks.sbatch'
    """
    from mtl_jax.launching import job as jobs
    from mtl_jax.launching.systems import launch_file

    path = _relative(Path(script))
    job = jobs.Job(name or jobs.name_for(path), path, tuple(flags), folder, python, prepare, restarts, output, ablate)
    jobs.check(job)
    file = launch_file(on, job)
    with scripts.given(flags):
        scripts.read(path, "launch")
    command = shlex.join(file.command)
    if dry_run:
        print(f"{file.text}\n# {file.path}; started by: {command}")
        return Launched(file.path, command, None)
    if shutil.which(file.tool) is None:
        raise UserError(f"--on {on.partition(':')[0]}: {file.tool} is not on PATH; {file.install}, or look at --dry-run")
    if output and not _replaceable(Path(output)):
        raise UserError(
            f"--output {shown(output)}: this file is not one of mtl-jax launch, so it is not replaced; choose another"
        )
    with writing(file.path):
        Path(file.path).parent.mkdir(parents=True, exist_ok=True)
    write_text(Path(file.path), file.text)
    print(f"{file.path} is written; it is started by: {command}")
    if not (yes or _agreed()):
        return Launched(file.path, command, None)
    flush_output()
    return Launched(file.path, command, _run(file.command))


def _relative(script: Path) -> str:
    """The script's path in the current directory, as the machines see it.

    Raises:
        UserError: It is elsewhere; or it does not exist.
    """
    if not script.is_file():
        raise UserError(f"{shown(script)}: no such script")
    if not script.resolve().is_relative_to(Path.cwd()):
        raise UserError(
            f"{shown(script)}: not in this directory, which the machines have; start mtl-jax launch in the project's"
        )
    return str(script.resolve().relative_to(Path.cwd()))


def _replaceable(path: Path) -> bool:
    """Whether a file is not there, or was written by mtl-jax launch."""
    return not path.exists() or (path.is_file() and MARK in path.read_text(encoding="utf-8", errors="replace")[:300])


def _agreed() -> bool:
    """Asks on a terminal whether to start; elsewhere nothing is started."""
    if not sys.stdin.isatty():
        print("nothing is started: give --yes, or run the command")
        return False
    return input("start it now? [y/N] ").strip().lower() in ("y", "yes")


def _run(command: Sequence[str]) -> int:
    """Runs a command to its end; Ctrl-C reaches it too, and it decides what to do."""
    with subprocess.Popen(command) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue
