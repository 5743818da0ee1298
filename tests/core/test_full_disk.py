"""Writes that the system refuses: one line with the reason, nothing half-written, exit code 2."""

import contextlib
import dataclasses
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny

import mtl_jax
from mtl_jax import trunks
from mtl_jax.cli.run_command import EXIT_BAD_INPUT, run
from mtl_jax.core import files, plotting
from mtl_jax.core.errors import UserError
from mtl_jax.core.staging import staged
from mtl_jax.data import array_cache
from mtl_jax.inference.resumable_output import Journal
from mtl_jax.pretrained.saving import Saved, write_safetensors
from mtl_jax.training import workdir as workdirs
from mtl_jax.training.checkpoint_store import Store
from mtl_jax.training.metrics_log import Logger, read_metrics

resource = pytest.importorskip("resource")
FULL = Path("/dev/full")
TOO_LARGE = r"cannot be written \(File too large\)"


@contextlib.contextmanager
def room_for(size: int) -> Iterator[None]:
    """Files cannot grow beyond so many bytes, which needs no rights of an administrator."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_staged(folder: Path) -> None:
    with staged(folder / "a") as staging:
        write_safetensors(staging / "model.safetensors", {"x": Saved(np.zeros(500), False)})


def save_trunk(folder: Path) -> None:
    words = [f"word{number}" for number in range(50)]
    trunks.save(trunks.build(trunks.Embedding(dimension=4), [" ".join(words)], np.float32), folder / "trunk")


def journal(folder: Path) -> None:
    with contextlib.closing(Journal(folder / "a.txt", {"input": "x"})) as opened:
        opened.add(0, {"texts": ["long" * 50]})


def write(logger: Logger) -> None:
    for step in range(1, 20):
        logger.write("train", step, {"loss/a": 0.5})
    logger.flush()


def log(folder: Path) -> None:
    with contextlib.closing(Logger(folder, 0)) as logger:
        write(logger)


WRITERS = {
    "JSON": lambda folder: workdirs.write_json(folder / "a.json", list(range(100))),
    "text": lambda folder: files.write_text(folder / "a.csv", "x" * 100),
    "figure": lambda folder: plotting.curves([], [("a", "loss")], folder / "a.png"),
    "log": log,
    "export": write_staged,
    "trunk": save_trunk,
    "journal": journal,
}


@pytest.mark.parametrize("what", list(WRITERS))
def test_what_cannot_be_written_is_one_line_and_leaves_nothing_half(tmp_path, what):
    with room_for(50), pytest.raises(UserError, match=TOO_LARGE) as caught:
        WRITERS[what](tmp_path)
    assert "\n" not in str(caught.value)
    left = {path.name for path in tmp_path.rglob("*") if path.is_file() and (".part" in path.name or path.name.startswith("."))}
    assert left <= {"a.txt.part"}  # which keeps what was done
    WRITERS[what](tmp_path)  # when there is room


def test_a_file_that_was_there_stays(tmp_path):
    workdirs.write_json(tmp_path / "a.json", {"before": 1})
    with room_for(5), pytest.raises(UserError, match=TOO_LARGE):
        workdirs.write_json(tmp_path / "a.json", {"now": 2})
    assert workdirs.read_json(tmp_path / "a.json") == {"before": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")
def test_a_log_on_a_full_disk_is_one_line_once(tmp_path):
    """Closing it afterwards, which tries again, is silent; and both files are closed."""
    for name in ("metrics", "board"):
        logger = Logger(tmp_path, 0)
        if name == "metrics":
            logger._file.close()
            logger._file = FULL.open("a", buffering=1)
        else:
            logger._board._file._writer.close()
            logger._board._file._writer = FULL.open("wb")
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); the same command resumes"):
            write(logger)
        logger.close()


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    arrays = {"x": np.arange(100)}
    with room_for(200):
        assert array_cache.store(tmp_path, "key", arrays, {}, "token") == arrays
    assert "cannot write the token cache (File too large)" in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
        (ValueError('RESOURCE_EXHAUSTED: Error writing "x": No space left on device [OS error 28: ENOSPC]'), os.strerror(28)),
        (Exception("No space left on device (os error 28)"), os.strerror(28)),  # as Rust has it
        (ExceptionGroup("two", [ValueError("x"), OSError(errno.EFBIG, "File too large")]), "File too large"),
        (FileNotFoundError(errno.ENOENT, "No such file"), None),
        (ValueError("No space for it"), None),
    ],
)
def test_refusals_are_told_from_mistakes(error, expected, capsys):
    """In whichever kind of exception and however deep; what is not one keeps its traceback."""

    def raises() -> None:
        try:
            raise error
        except Exception as caught:
            raise RuntimeError("later") from caught

    refused = files.refusal(error)
    assert (refused and files.reason(refused)) == expected
    with pytest.raises(SystemExit if expected else RuntimeError) as ended:
        run(raises)
    if expected:
        assert ended.value.code == EXIT_BAD_INPUT
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        assert expected in said


@pytest.mark.long
def test_a_training_without_room_ends_in_one_line_and_resumes(shallow, data, tmp_path, monkeypatch, capfd):
    whole = tiny.experiment(shallow, data)
    experiment = dataclasses.replace(whole, tasks=whole.tasks[1:2], phases=whole.phases[1:])
    saved = Store.save
    limits = contextlib.ExitStack()

    def save(self, step, *rest):
        if step == 4:
            limits.enter_context(room_for(20_000))  # less than a checkpoint, more than the other files
        saved(self, step, *rest)

    monkeypatch.setattr(Store, "save", save)
    with limits, pytest.raises(SystemExit) as ended:
        run(lambda: mtl_jax.train(experiment, tmp_path / "run"))
    assert ended.value.code == EXIT_BAD_INPUT
    error = capfd.readouterr().err
    assert "error: " in error
    assert "a checkpoint cannot be written (File too large); when it can be, the same command resumes from step 2" in error
    assert "Traceback" not in error
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["2"]
    monkeypatch.undo()
    assert mtl_jax.train(experiment, tmp_path / "run")["steps"] == 6
    assert [record["step"] for record in read_metrics(tmp_path / "run") if record["kind"] == "train"] == list(range(1, 7))
