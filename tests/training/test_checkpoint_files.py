"""Checkpoints whose files are damaged, or are not checkpoints: who resumes and who predicts choose the same one."""

import contextlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from mtl_jax import Checkpoints, Phase
from mtl_jax.core.errors import UserError
from mtl_jax.training import checkpoint_files
from mtl_jax.training import mesh as meshes
from mtl_jax.training.checkpoint_store import Damaged, Store
from mtl_jax.training.phase_state import initial_state, template
from mtl_jax.training.setup import prepare

CRITERION = "mean"


@pytest.fixture(scope="module")
def prepared(shallow, data):
    changes = {"phases": (Phase("everything", steps=4),), "tasks": tiny.experiment("", "").tasks[1:2]}
    return prepare(tiny.experiment(shallow, data, **changes))


@pytest.fixture(scope="module")
def store_of(prepared, tmp_path_factory) -> Path:
    """A workdir with the checkpoints of steps 2 and 4; the earlier one is the better."""
    folder = tmp_path_factory.mktemp("run")
    state = initial_state(prepared)
    with contextlib.closing(Store(folder, Checkpoints(keep=2))) as store:
        for step, dev in ((2, 0.75), (4, 0.5)):
            counts = {"phase": 0, "places": 0, "seen": {}, "seconds": 0.0}
            store.save(step, state._replace(step=state.step + step), {"step": step, "counts": counts, "data": []}, dev)
    return folder


def copied(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def shapes_of(prepared):
    return lambda record: template(prepared, record["counts"]["phase"], record["step"])


def readable(read) -> bool:
    """Whether the checkpoint of step 4 can be read; if not, one short line says it."""
    try:
        read(4)
    except Damaged as error:
        line = str(error)
    else:
        return True
    assert "\n" not in line
    assert len(line.partition("is damaged")[2]) < 150
    return False


def damage(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "gone":
        file.unlink()
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "short":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(content)


@pytest.mark.parametrize("how", ["gone", "flipped", *(pytest.param(how, marks=pytest.mark.long) for how in ("empty", "short"))])
def test_whoever_reads_a_damaged_checkpoint_says_the_same_of_it(prepared, store_of, tmp_path, caplog, capfd, how):
    """Each file in turn: a run resumes from it where its parameters can be read, and else both pass it over in one line."""
    files = sorted(file.relative_to(store_of) for file in (store_of / "checkpoints" / "4").rglob("*") if file.is_file())
    assert any(file.name == "_sharding" for file in files)
    damaged = 0
    for number, file in enumerate(files):
        workdir = copied(store_of, tmp_path / str(number))
        damage(workdir / file, how)
        caplog.clear()
        reader = Store(workdir, Checkpoints(), read_only=True)
        whole = {"state": readable(lambda step, store=reader: store.restore(step, shapes_of(prepared)))}
        whole["params"] = readable(reader.restore_params)
        assert whole["state"] == whole["params"], file
        with contextlib.closing(Store(workdir, Checkpoints(keep=2))) as store:
            latest = store.latest(shapes_of(prepared))
            assert latest is not None
            assert latest.step == (4 if whole["state"] else 2), file
            best = store.best(store.restore_params)
            assert best is not None
            assert (best.step, best.dev) == (2, 0.75)
        damaged += not whole["state"]
        told = [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
        assert len(told) == (not whole["state"]), (file, told)
    assert damaged >= 2
    assert "Traceback" not in capfd.readouterr().err


def test_a_number_in_the_record_that_changed_is_damage(prepared, store_of, tmp_path):
    """JSON that is still JSON: a flipped digit of the step or of the dev number would be believed."""
    workdir = copied(store_of, tmp_path / "run")
    file = workdir / "checkpoints" / "4" / "record" / "metadata"
    text = file.read_text()
    for old, new in (('"mean": 0.5', '"mean": 0.9'), ('"step": 4', '"step": 5')):
        assert old in text
        file.write_text(text.replace(old, new))
        with pytest.raises(Damaged, match="record/metadata: not what was written"):
            Store(workdir, Checkpoints(), read_only=True).restore_params(4)
    record = json.loads(text)
    del record["sha256"]  # as earlier versions wrote it
    file.write_text(json.dumps(record))
    Store(workdir, Checkpoints(), read_only=True).restore_params(4)


def make_junk(checkpoints: Path) -> None:
    for name in ("foo", "007", "-3", ".orbax-checkpoint-tmp", "9.orbax-checkpoint-tmp"):
        (checkpoints / name).mkdir()
        (checkpoints / name / "_CHECKPOINT_METADATA").write_text("")
    (checkpoints / "12").write_text("a file")
    (checkpoints / "77").symlink_to("nowhere")
    (checkpoints / "notes.txt").write_text("kept")
    (checkpoints / "4" / "_CHECKPOINT_METADATA").write_text("[]")
    (checkpoints / "2" / "metrics" / "metrics").write_text('{"mean": "high"}')


def test_what_is_not_a_checkpoint_stops_no_start(prepared, store_of, tmp_path, caplog):
    workdir = copied(store_of, tmp_path / "run")
    make_junk(workdir / "checkpoints")
    before = sorted(path.name for path in (workdir / "checkpoints").iterdir())
    reader = Store(workdir, Checkpoints(), read_only=True)
    assert reader.steps() == [2, 4]
    assert reader.latest(shapes_of(prepared)).step == 4
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == before  # to read is not to tidy
    assert not caplog.records
    with contextlib.closing(Store(workdir, Checkpoints(keep=2))) as store:
        assert store.steps() == [2, 4]
        assert store.best(store.restore_params).step == 2
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2", "4", "notes.txt"]
    assert sorted(path.name for path in (workdir / "damaged").iterdir()) == ["-3-0", "007-0", "12-0", "77-0", "foo-0"]
    assert len(caplog.records) == 5
    assert json.loads((workdir / "checkpoints" / "2" / "metrics" / "metrics").read_text()) == {"mean": 0.75}


def test_what_was_saved_is_what_is_read(prepared, store_of):
    reader, state = Store(store_of, Checkpoints(), read_only=True), initial_state(prepared)
    restored = reader.restore(4, shapes_of(prepared)).state
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for leaf, other in zip(jax.tree.leaves(state._replace(step=state.step + 4)), jax.tree.leaves(restored), strict=True):
        assert np.array_equal(np.asarray(leaf), np.asarray(other))
        assert leaf.dtype == other.dtype
    params = reader.restore_params(4)
    assert jax.tree.structure(params) == jax.tree.structure(state.params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool", "uint32"])
def test_sums_on_the_host_are_those_on_the_devices(dtype):
    """Those of a whole array in the host's memory, and those of one that is cut over devices."""
    whole = jax.numpy.asarray(np.random.default_rng(0).integers(0, 200, (8, 5))).astype(dtype)
    cut = jax.device_put(whole, meshes.by_rows(meshes.make(4, 4)))
    expected = [[8, 5], checkpoint_files.sum_of(np.asarray(whole))]
    assert checkpoint_files.describe({"x": whole})["x"] == expected
    assert checkpoint_files.describe({"x": cut})["x"] == expected


def test_dev_numbers_that_are_not_finite_come_last_and_are_strict_json(prepared, tmp_path):
    state = initial_state(prepared)
    with contextlib.closing(Store(tmp_path, Checkpoints(keep=3))) as store:
        for step, dev in ((1, float("nan")), (2, float("-inf")), (3, 0.25), (4, float("nan"))):
            store.save(step, state, {"step": step, "note": float("inf")}, dev)
    for file in (*tmp_path.rglob("record/metadata"), *tmp_path.rglob("metrics/metrics")):
        json.loads(file.read_text(), parse_constant=pytest.fail)
    reader = Store(tmp_path, Checkpoints(), read_only=True)
    assert reader.best(lambda step: step).step == 3


def test_a_checkpoint_without_room_is_one_line_and_leaves_nothing(prepared, store_of, tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    workdir = copied(store_of, tmp_path / "run")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    state = initial_state(prepared)
    store = Store(workdir, Checkpoints(keep=5))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
        with pytest.raises(UserError, match=r"checkpoints: a checkpoint cannot be written \(File too large\); .*from step 4$"):
            store.save(6, state, {"step": 6}, 0.1)
        store.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2", "4"]
    with contextlib.closing(Store(workdir, Checkpoints(keep=5))) as again:
        again.save(6, state, {"step": 6}, 0.1)
        again.wait()
        assert again.steps() == [2, 4, 6]
