"""Real processes, killed with real signals: a stopped run ends with the same numbers as one that never stopped."""

import dataclasses
import json
import logging
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from processes import Process

import mtl_jax
from mtl_jax import Checkpoints, Evaluation, Phase
from mtl_jax.core.errors import UserError
from mtl_jax.training.checkpoint_store import Store
from mtl_jax.training.metrics_log import read_metrics

FLAGS = ["--phases.0.steps", "12", "--phases.1.steps", "18", "--evaluation.every", "10", "--checkpoints.every", "3"]
FLAGS += ["--weighting", "dwa"]  # a rule with state
FLAGS += ["--phases.1.rules.0.rate", "0.5", "--phases.1.rules.0.schedule", "slanted_triangular"]


def start(folder: Path, workdir: Path, *flags: str) -> Process:
    return Process(tiny.__file__, "--workdir", workdir, *FLAGS, *flags, devices=8, TINY=str(folder))


def finish(process: Process) -> tuple[int | None, str]:
    output, _ = process.communicate()
    return process.returncode, output


def signal_at(process: Process, workdir: Path, step: int, number: int) -> None:
    """Sends a signal as soon as the run has logged a step."""
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        lines = (workdir / "metrics.jsonl").read_text().count('"train"') if (workdir / "metrics.jsonl").exists() else 0
        if lines >= step:
            process.send_signal(number)
            return
        time.sleep(0.001)
    raise AssertionError(f"the run ended or hung before step {step}: {process.communicate()[0]}")


def outcome(workdir: Path) -> tuple[list[dict], dict[str, bytes], dict]:
    """Everything that must be equal: logged numbers, bytes of the last parameters, scores."""
    store = Store(workdir, Checkpoints(), read_only=True)
    params = store.restore_params(store.steps()[-1])
    store.close()
    import jax

    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    results = json.loads((workdir / "results.json").read_text())
    return (
        read_metrics(workdir),
        {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves},
        {key: results[key] for key in ("tasks", "steps", "best_step", "best_criterion", "training_tokens", "seen", "padding")},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data without a checkpoint: of which trunk is all the same here, and one of a matrix compiles in no time."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.write_data(folder / "data")
    return folder


@pytest.fixture(scope="module")
def uninterrupted(folder: Path):
    code, output = finish(start(folder, folder / "whole"))
    assert code == 0, output
    return outcome(folder / "whole")


def test_killed_twice_at_random_steps_and_resumed(folder, uninterrupted):
    workdir = folder / "killed"
    chance = random.Random()
    for step in (chance.randint(2, 9), chance.randint(15, 22)):  # one in each phase
        process = start(folder, workdir)
        signal_at(process, workdir, step, signal.SIGKILL)
        assert finish(process)[0] == -signal.SIGKILL
        assert not (workdir / "results.json").exists()
    code, output = finish(start(folder, workdir))
    assert code == 0, output
    assert "resuming from step" in output
    assert outcome(workdir) == uninterrupted


def children(process: Process) -> set[int]:
    """Processes below this one, as Linux tells."""
    found, new = set(), {process.pid}
    while new:
        paths = [path for pid in new for path in Path(f"/proc/{pid}/task").glob("*/children")]
        new = {int(pid) for path in paths for pid in path.read_text().split()} - found
        found |= new
    return found


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes under /proc")
def test_worker_processes_change_nothing_and_end_with_the_run(folder, uninterrupted):
    """Killed and resumed with workers, a run ends as one without; its workers do not outlive it."""
    workdir = folder / "workers"
    process = start(folder, workdir, "--batch.workers", "2")
    signal_at(process, workdir, 8, signal.SIGSTOP)  # the save of step 6 has waited for that of step 3
    workers = children(process)
    process.send_signal(signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL
    assert len(workers) >= 2
    deadline = time.monotonic() + 60
    while not all(ended(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    code, output = finish(start(folder, workdir, "--batch.workers", "2"))
    assert code == 0, output
    assert "resuming from step" in output
    assert outcome(workdir) == uninterrupted


def ended(pid: int) -> bool:
    """Whether a process is over and only waits for whoever takes note of it."""
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize(
    "changes",
    [
        {"weighting": "moco", "combinators": ("ema:decay=0.5",)},
        {"averaging": "ema:decay=0.9"},
        pytest.param({"averaging": "last:n=3"}, marks=pytest.mark.long),
    ],
    ids=lambda changes: next(iter(changes.values())),
)
def test_what_is_kept_beside_the_parameters_is_resumed(folder, tmp_path, caplog, changes):
    """MoCo's tracked gradients, a combinator's mean and flags of what was seen, averages: they live in the checkpoint."""
    phases = (Phase("heads", 2, rules=tiny.HEADS_ONLY), Phase("everything", 10))
    experiment = tiny.experiment(
        tiny.MATRIX,
        folder / "data",
        phases=phases,
        evaluation=Evaluation(every=3, baseline="none"),
        checkpoints=Checkpoints(every=2, keep=9),
        **changes,
    )
    caplog.set_level(logging.INFO)
    mtl_jax.train(experiment, tmp_path / "whole")
    if experiment.averaging != "none":
        assert f"measured on averaged parameters ({experiment.averaging})" in caplog.text
    tiny.cut(tmp_path / "whole", tmp_path / "killed", 8)
    mtl_jax.train(experiment, tmp_path / "killed")
    assert "resuming from step 8" in caplog.text
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def test_sigterm_saves_and_exits_with_75(folder, uninterrupted):
    workdir = folder / "stopped"
    process = start(folder, workdir, "--checkpoints.every", "1000")
    signal_at(process, workdir, 7, signal.SIGTERM)
    code, output = finish(process)
    assert code == 75, output
    assert "the same command resumes from there" in output
    assert "Traceback" not in output
    stopped_at = read_metrics(workdir)[-1]["step"]
    code, output = finish(start(folder, workdir, "--checkpoints.every", "1000"))
    assert code == 0, output
    assert f"resuming from step {stopped_at}" in output
    assert outcome(workdir) == uninterrupted


def test_a_damaged_latest_checkpoint_is_passed_over(folder, uninterrupted):
    workdir = folder / "damaged"
    tiny.cut(folder / "whole", workdir, 27)
    # Of the files that hold arrays: others are not needed.
    largest = max((workdir / "checkpoints" / "27" / "state" / "d").iterdir(), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    code, output = finish(start(folder, workdir))
    assert code == 0, output
    assert "checkpoints/27 is damaged" in output
    assert "resuming from step 24" in output
    assert [path.name for path in (workdir / "damaged").iterdir()] == ["27-0"]
    assert outcome(workdir) == uninterrupted


def test_arrays_that_changed_on_disk_are_noticed(folder, uninterrupted, tmp_path):
    """Damage that decompresses: the state's own bits no longer give the sum that was saved with them."""
    from mtl_jax.training import phase_state, setup

    experiment = tiny.experiment(tiny.MATRIX, folder / "data")
    prepared = setup.prepare(experiment)
    state = phase_state.initial_state(prepared)
    store = Store(tmp_path, experiment.checkpoints)
    store.save(1, state, {}, dev=None)
    store.wait()
    record = tmp_path / "checkpoints" / "1" / "record" / "metadata"
    saved = json.loads(record.read_text())
    name = next(path for path in saved["arrays"] if path.startswith("params/"))
    saved["arrays"][name][1] += 1
    record.write_text(json.dumps(saved))
    with pytest.raises(UserError, match="is damaged"):
        store.restore(1, lambda record: phase_state.template(prepared, 0, 1))
    with pytest.raises(UserError, match="is damaged"):
        store.restore_params(1)
    store.close()


def test_the_best_checkpoint_outlives_a_restart(tmp_path):
    from mtl_jax.training.train_state import create

    state = create({"trunk": np.ones(2, np.float32)}, (), (), 0)
    for devs in ({1: 0.9, 2: 0.5, 3: None}, {4: 0.7, 5: None, 6: 0.8}):
        store = Store(tmp_path, Checkpoints(keep=2))
        for step, dev in devs.items():
            store.save(step, state, {}, dev)
        store.wait()
        assert store.steps() == [1, *list(devs)[-2:]]
        assert store.best(lambda step: step).step == 1
        store.close()


@pytest.fixture(scope="module")
def short(folder):
    """A finished run of the tiny experiment as it is, to be copied; and the experiment."""
    experiment = tiny.experiment(tiny.MATRIX, folder / "data")
    mtl_jax.train(experiment, folder / "short")
    return folder / "short", experiment


def test_another_model_is_not_taken_for_damage(short, tmp_path):
    workdir, experiment = short
    shutil.copytree(workdir, tmp_path / "run")
    tasks = (*experiment.tasks[:2], dataclasses.replace(experiment.tasks[2], hidden=4))

    def files():
        return {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}

    before = files()
    with pytest.raises(UserError, match=r"another model: .*fine/hidden/bias is of shape \(8,\) in it and of shape \(4,\) here"):
        mtl_jax.train(dataclasses.replace(experiment, tasks=tasks), tmp_path / "run", allow_config_change=True)
    assert files() == before
    for steps in ((3, 6), (6, 2), (30, 6)):
        phases = tuple(dataclasses.replace(p, steps=n) for p, n in zip(experiment.phases, steps, strict=True))
        with pytest.raises(UserError, match="does not fit the phases"):
            mtl_jax.train(dataclasses.replace(experiment, phases=phases), tmp_path / "run", allow_config_change=True)
    one = dataclasses.replace(experiment, phases=experiment.phases[:1])
    with pytest.raises(UserError, match="does not fit the phases"):
        mtl_jax.train(one, tmp_path / "run", allow_config_change=True)
    assert files() == before


def test_a_finished_run_keeps_its_results_under_another_criterion(short, tmp_path):
    """Its checkpoints were compared by the old one."""
    workdir, experiment = short
    shutil.copytree(workdir, tmp_path / "run")
    names = ("results.json", "config.json", "baselines.json")
    before = {name: (tmp_path / "run" / name).read_bytes() for name in names}
    changed = dataclasses.replace(experiment, evaluation=dataclasses.replace(experiment.evaluation, criterion="coarse"))
    with pytest.raises(UserError, match=r"no checkpoint was evaluated by evaluation\.criterion 'coarse': leave it as it was"):
        mtl_jax.train(changed, tmp_path / "run", allow_config_change=True)
    assert {name: (tmp_path / "run" / name).read_bytes() for name in names} == before


def test_data_that_changed_is_refused(tmp_path):
    tiny.write_data(tmp_path / "data")
    evaluation = Evaluation(every=1, baseline="none")
    experiment = tiny.experiment(tiny.MATRIX, tmp_path / "data", phases=(Phase("one", 1),), evaluation=evaluation)
    mtl_jax.train(experiment, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    questions = tmp_path / "data" / "questions.txt"
    questions.write_text(questions.read_text().replace("LOC:city", "ABC:city"))
    with pytest.raises(UserError, match=r"begun with other data: .*tasks\.coarse\.labels\.0, .* changed"):
        mtl_jax.train(experiment, tmp_path / "run")


def test_a_damaged_best_checkpoint_gives_way_to_the_next(short, tmp_path):
    from mtl_jax.inference.predict import predict

    shutil.copytree(short[0], tmp_path / "run")
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    for path in (tmp_path / "run" / "checkpoints" / str(found["best_step"]) / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    assert predict(tmp_path / "run", "coarse", ["who is the man ?"])[0]["label"] in ("HUM", "LOC")


def test_all_checkpoints_damaged_starts_over(folder, tmp_path):
    experiment = tiny.experiment(tiny.MATRIX, folder / "data")
    one = dataclasses.replace(experiment, phases=experiment.phases[:1])
    first = mtl_jax.train(one, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    for path in (tmp_path / "run" / "checkpoints").rglob("*"):
        if path.is_file() and path.name not in ("_CHECKPOINT_METADATA", "commit_success.txt"):
            path.write_bytes(b"")
    again = mtl_jax.train(one, tmp_path / "run")
    assert again["tasks"] == first["tasks"]
