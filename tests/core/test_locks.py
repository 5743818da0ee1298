"""Locks, with a real process that has one and is killed."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import filelock
import pytest
import tiny

import mtl_jax
from mtl_jax import merging
from mtl_jax.ablation import ablate
from mtl_jax.ablation.extract import take
from mtl_jax.core import locks, staging
from mtl_jax.core.errors import UserError
from mtl_jax.inference import export
from mtl_jax.merging import Method

ELSEWHERE = {"pid": 7, "host": "another-host", "since": "2020-01-01 00:00:00+00:00"}


def free(folder: Path) -> bool:
    """Whether the workdir can be locked."""
    try:
        with locks.workdir(folder):
            return True
    except UserError:
        return False


def test_a_second_process_is_told_who_has_it_and_a_killed_one_keeps_nobody_out(tmp_path):
    folder = tmp_path / "run"
    code = "import sys; from pathlib import Path; from mtl_jax.core import locks\n"
    code += "with locks.workdir(Path(sys.argv[1])):\n    print('locked', flush=True)\n    sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"locked\n"
        line = rf"run: process {holder.pid} on {socket.gethostname()} has been writing it since 20.*; let it end, or choose"
        with pytest.raises(UserError, match=line), locks.workdir(folder):
            pass
        assert json.loads((folder / locks.NAME).read_text())["pid"] == holder.pid  # who is refused changes nothing
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    assert (folder / locks.NAME).exists()
    assert free(folder)
    assert not (folder / locks.NAME).exists()


def test_everything_that_writes_is_refused_at_once(bert, data, tmp_path):
    experiment, out, source = tiny.experiment(bert, data), tmp_path / "out", str(bert)
    whole = (
        lambda: export.convert(source, out),
        lambda: merging.merge(out, [source, str(data)], Method("soup")),
        lambda: take(source, "0001", out),
    )
    trainings = (lambda: mtl_jax.train(experiment, out), lambda: ablate.ablate(experiment, out, ["seed=0,1"]))
    for lock, writes in ((locks.workdir, (*trainings, *whole)), (locks.target, whole)):
        with lock(out):
            for write in writes:
                with pytest.raises(UserError, match=r"out: process .* has been writing it since"):
                    write()
        assert not list(tmp_path.iterdir())


def test_a_directory_is_made_and_gone_again_if_nothing_came_into_it(tmp_path):
    with pytest.raises(UserError, match="bad"), locks.workdir(tmp_path / "a" / "b"):
        raise UserError("bad")
    assert not list(tmp_path.iterdir())
    with locks.workdir(tmp_path / "a" / "b"):
        (tmp_path / "a" / "c").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["c"]
    (tmp_path / "empty").mkdir()
    assert free(tmp_path / "empty")
    assert (tmp_path / "empty").exists()


def test_what_is_put_in_its_place_whole_does_not_replace_a_workdir_that_trains(tmp_path):
    place = tmp_path / "run"
    training = locks.workdir(place)

    def replace() -> None:
        with staging.staged(place) as folder:
            (folder / "new").touch()
            training.__enter__()  # it begins while the other is made
            (place / "old").touch()

    with pytest.raises(UserError, match=r"run: process .* has been writing it"):
        replace()
    training.__exit__(None, None, None)
    assert [path.name for path in place.iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("left", [json.dumps(ELSEWHERE), "", "[]", "{", '{"pid": 7}', "null\n"])
def test_a_file_that_nobody_locks_keeps_nobody_out(tmp_path, left):
    (tmp_path / locks.NAME).write_text(left)
    assert free(tmp_path)


@pytest.mark.parametrize("said", ["", "[]", "{", '{"pid": 7}', "\ud800"])
def test_a_holder_that_is_not_known_is_still_one(tmp_path, said):
    with locks.workdir(tmp_path):
        (tmp_path / locks.NAME).write_bytes(said.encode("utf-8", "surrogatepass"))
        with pytest.raises(UserError, match="another process is writing it; let it end, or choose another --workdir"):
            locks.workdir(tmp_path).__enter__()


def test_of_another_host_it_is_said_how_to_end_a_lock_and_that_one_was_left(tmp_path, caplog, monkeypatch):
    with locks.workdir(tmp_path):
        (tmp_path / locks.NAME).write_text(json.dumps(ELSEWHERE))
        with pytest.raises(UserError, match=r"process 7 on another-host .*, or delete .*\.lock if that host is gone"):
            locks.workdir(tmp_path).__enter__()
    (tmp_path / locks.NAME).write_text(json.dumps(ELSEWHERE))
    assert free(tmp_path)
    assert "process 7 on another-host began to write it at 2020-01-01" in caplog.text


def test_a_lock_file_that_was_deleted_lets_the_next_one_in_and_is_not_taken_from_it(tmp_path):
    with locks.workdir(tmp_path):
        (tmp_path / locks.NAME).unlink()
        second = locks.workdir(tmp_path)
        second.__enter__()
    assert (tmp_path / locks.NAME).exists()
    assert not free(tmp_path)
    second.__exit__(None, None, None)
    assert free(tmp_path)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOLCK, "No locks available"), OSError(errno.ENOSYS, ""), NotImplementedError()]
)
def test_where_the_file_system_has_no_locks_a_line_says_so(tmp_path, monkeypatch, caplog, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(filelock, "lock_descriptor", refuse)
    assert free(tmp_path)
    assert f"{tmp_path}: this file system has no locks" in caplog.text


def test_an_error_of_another_kind_is_one_line(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(filelock, "lock_descriptor", refuse)
    with pytest.raises(UserError, match=r"run: cannot be written \(Input/output error\)"):
        locks.workdir(tmp_path / "run").__enter__()
    monkeypatch.undo()
    assert free(tmp_path / "run")


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(locks, "_write", full)
    with pytest.raises(UserError, match=r"run: cannot be written \(No space left on device\)"):
        locks.workdir(tmp_path / "run").__enter__()
    assert not list(tmp_path.iterdir())


def test_a_report_waits_for_another_if_it_may(tmp_path):
    with locks.report(tmp_path), locks.workdir(tmp_path):  # the report of an ablation that is under way
        for patience in (0, 0.3):
            with pytest.raises(UserError, match="choose another --output"):
                locks.report(tmp_path, patience).__enter__()
    with locks.report(tmp_path, 0.3):
        pass
    assert not list(tmp_path.iterdir())


def test_who_has_patience_writes_after_the_first(tmp_path):
    place, order = tmp_path / "made", []

    def second() -> None:
        with locks.target(place, patience=60.0):
            order.append("second")

    thread = threading.Thread(target=second)
    with locks.target(place):
        thread.start()
        thread.join(0.05)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


@pytest.mark.parametrize("times", [1, 3])
def test_a_directory_that_another_process_removes_is_made_again(tmp_path, monkeypatch, times):
    """The other process ends between this one's mkdir and open, and removes what it made and is empty."""
    folder, left = tmp_path / "taken" / "0", [times]
    opened = locks.open_to_lock

    def late(path: Path):
        if left[0]:
            left[0] -= 1
            folder.rmdir()
            folder.parent.rmdir()
        return opened(path)

    monkeypatch.setattr(locks, "open_to_lock", late)
    with locks.workdir(folder):
        assert (folder / locks.NAME).exists()
    left[0] = times
    with locks.target(folder / "made"):
        assert folder.exists()


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="file"), locks.workdir(folder):
            pass
