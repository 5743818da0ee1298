"""Versions of packages, also of those that were copied without their metadata."""

import importlib.metadata
import re
from pathlib import Path

import mtl_jax
from mtl_jax.core.versions import installed
from mtl_jax.tasks.metrics import signatures


def test_a_package_without_metadata_ends_no_run(monkeypatch):
    """Its version goes into results.json after the last step: an error there would lose the scores."""

    def absent(package):
        raise importlib.metadata.PackageNotFoundError(package)

    assert re.match(r"\d+\.", installed("jax"))
    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert installed("jax") == "not installed"
    assert signatures("rougeL", [["a"]])["rougeL"].startswith("rouge-score:not installed|")


def test_no_other_module_asks_for_versions():
    package = Path(mtl_jax.__file__).parent
    asking = {path.name for path in package.rglob("*.py") if "importlib.metadata" in path.read_text(encoding="utf-8")}
    assert asking == {"versions.py"}
