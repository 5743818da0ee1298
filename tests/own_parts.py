"""Runs an example of experiments/own as its user does, on a few rows, within the test's process."""

import runpy
import sys
from pathlib import Path
from unittest import mock

import tiny

from mtl_jax import Experiment
from mtl_jax.cli import main as commands
from mtl_jax.cli import scripts

FOLDER = Path(__file__).resolve().parents[1] / "experiments" / "own"
# A few steps of a small model.
SMALL = [
    *("--phases.0.steps", "4", "--evaluation.every", "2", "--checkpoints.every", "2", "--checkpoints.keep", "9"),
    *("--batch.rows", "4", "--batch.row-length", "24", "--devices", "1"),
]


def data_flags(folder: Path) -> list[str]:
    """Flags that put small files in place of the two downloaded sources."""
    tiny.write_data(folder)
    table = (folder / "ratings.tsv").read_text(encoding="utf-8").replace("rating", "sentiment", 1)
    (folder / "sentiment.tsv").write_text(table, encoding="utf-8")
    paths = [flag for number in (0, 1) for flag in (f"--sources.{number}.path", str(folder / "sentiment.tsv"))]
    return [*paths, "--trunk.vocabulary", "60", "--trunk.dimension", "8"]


def copied(name: str, folder: Path) -> Path:
    """A copy of an example and of what it imports, which a test may change."""
    for file in (name, "two_tasks.py"):
        (folder / file).write_text((FOLDER / file).read_text(encoding="utf-8"), encoding="utf-8")
    return folder / name


def experiment_of(script: Path, *flags: str) -> Experiment:
    """The experiment that python SCRIPT FLAGS would train."""
    with scripts.given(flags):
        return scripts.read(str(script))


def start(script: Path, *flags: str) -> None:
    """python SCRIPT FLAGS; SystemExit where it exits with a code."""
    with mock.patch.object(sys, "argv", [str(script), *flags]), mock.patch.object(sys, "path", [str(script.parent), *sys.path]):
        runpy.run_path(str(script), run_name="__main__")


def command(*arguments: str) -> None:
    """mtl-jax ARGUMENTS; SystemExit where it exits with a code."""
    with mock.patch.object(sys, "argv", ["mtl-jax", *arguments]), mock.patch.object(sys, "path", [*sys.path]):
        commands.console()
