"""The example of a hook and a logger: its table, its file, and that the run needs neither of them afterwards."""

import csv
import json
import runpy
import sys
from pathlib import Path

import pytest

import mtl_jax
from mtl_jax.cli import scripts
from mtl_jax.training import loggers

SCRIPT = Path(__file__).resolve().parents[3] / "experiments" / "own" / "hooks.py"
FLAGS = [
    *(flag for number in range(3) for flag in (f"--sources.{number}.limit", "60")),
    *("--phases.0.steps", "2", "--batch.rows", "6", "--batch.row-length", "24", "--evaluation.every", "2"),
    *("--trunk.vocabulary", "500", "--trunk.layers", "1", "--trunk.width", "8", "--trunk.heads", "2"),
    *("--trunk.feed-forward", "8", "--devices", "1"),
]


@pytest.fixture
def script(shared_data, monkeypatch):
    """Runs the script with flags, in this process."""
    monkeypatch.setenv("MTL_JAX_DATA", str(shared_data))

    def script(*flags):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *FLAGS, *flags])
        runpy.run_path(str(SCRIPT), run_name="__main__")

    yield script
    loggers.LOGGERS._functions.pop("csv", None)


def read(workdir):
    return list(csv.DictReader((workdir / "metrics.csv").read_text().splitlines()))


def test_the_table_the_file_and_the_run_afterwards(script, tmp_path, capsys):
    workdir = tmp_path / "run"
    script("--workdir", str(workdir), "--logger", "csv")
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["tasks", "mean", "cosine", "conflicts"]
    assert [line.split()[:2] for line in table[1:4]] == [
        ["emotion,", "irony"],
        ["emotion,", "offensive"],
        ["irony,", "offensive"],
    ]
    rows = read(workdir)
    logged = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert {(row["kind"], row["step"]) for row in rows} == {("train", "1"), ("train", "2"), ("dev", "2")}
    total = next(float(row["value"]) for row in rows if (row["step"], row["name"]) == ("2", "total"))
    assert total == next(record["total"] for record in logged if (record["kind"], record["step"]) == ("train", 2))
    config = json.loads((workdir / "config.json").read_text())
    assert "hooks" not in config.get("parts", {})
    loggers.LOGGERS._functions.pop("csv")
    assert mtl_jax.predict(workdir, "irony", ["what a day"])[0]["label"] in ("0", "1")
    script("--workdir", str(workdir), "--logger", "csv")  # it is done: nothing is called again
    assert read(workdir) == rows
    capsys.readouterr()
    with scripts.given([*FLAGS, "--logger", "csv"]):
        assert scripts.read(str(SCRIPT)).name == "hooks"
    assert "an ablation calls no hooks and no --logger" in capsys.readouterr().err
