from pathlib import Path

import made
import pytest

from mtl_jax import reporting


@pytest.fixture(scope="session")
def ablation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an ablation and its report. To be read only."""
    folder = made.write_ablation(tmp_path_factory.mktemp("ablation"))
    assert reporting.write(folder, folder) == folder / "report.html"
    return folder
