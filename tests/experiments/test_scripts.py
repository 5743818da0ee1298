"""Every experiment script, as a user starts it, for two steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
FLAGS = {
    "quickstart.py": [
        *("--phases.0.steps", "1", "--phases.1.steps", "1", "--batch.rows", "12"),
        *(flag for number in range(6) for flag in (f"--sources.{number}.limit", "60")),
    ],
    "shared_embedding.py": ["--phases.0.steps", "2"],
}


def test_every_script_is_here():
    assert {path.name for path in EXPERIMENTS.glob("*.py")} == set(FLAGS)


@pytest.mark.parametrize("script", FLAGS)
def test_two_steps(script, wheels, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, str(EXPERIMENTS / script), "--workdir", str(tmp_path / "run"), *FLAGS[script]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["steps"] == 2
    assert all(task in done.stdout for task in results["tasks"])
