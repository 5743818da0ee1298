"""The wheel, in an environment of its own, away from the clone."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mtl_jax.core import assets

ROOT = Path(__file__).resolve().parents[1]
PIP = ["-m", "pip", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, *PIP, "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)], check=True)
    (file,) = folder.glob("mtl_jax-*.whl")
    return file


@pytest.mark.long
def test_it_has_every_module_and_file(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("mtl_jax/")}
    files = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "mtl_jax").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == files


@pytest.mark.long
def test_it_runs_the_script_of_the_readme_in_a_fresh_environment(wheel, wheels, tmp_path):
    """Its commands, its import, and two steps of the script that the README shows whole."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"MTL_JAX_CACHE": str(assets.cache_dir())}
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    subprocess.run(
        [python, *PIP, "install", "-q", "-c", str(ROOT / "constraints.txt"), str(wheel)], check=True, env=environment
    )
    (tmp_path / "elsewhere").mkdir()
    (script,) = re.findall(
        r"```python\n(from mtl_jax import .*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    (tmp_path / "elsewhere" / "two_tasks.py").write_text(script, encoding="utf-8")

    def run(*command: str) -> str:
        folder = tmp_path / "elsewhere"
        return subprocess.run(command, check=True, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE).stdout

    bin = python.parent
    assert str(tmp_path) in run(str(python), "-c", "import mtl_jax; print(mtl_jax.__file__)")
    assert "predict" in run(str(bin / "mtl-jax"), "--help")
    flags = ["--phases.0.steps", "2", "--phases.1.steps", "2", "--sources.0.limit", "64", "--sources.1.limit", "64"]
    run(str(python), "two_tasks.py", "--workdir", "two", *flags, "--evaluation.baseline", "none")
    assert (tmp_path / "elsewhere" / "two" / "results.json").exists()
    assert "type" in run(str(bin / "mtl-jax"), "results", "two")


@pytest.mark.long
@pytest.mark.parametrize("requirement", [["-r", "requirements-tpu.txt"], ["-e", ".[cuda]"]])
def test_accelerators_requirements_resolve(requirement):
    """pip finds versions that fit together, and installs nothing."""
    command = [sys.executable, *PIP, "install", "-q", "--dry-run", "--ignore-installed", *requirement]
    subprocess.run(command, check=True, cwd=ROOT)
