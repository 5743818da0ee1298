"""Many runs in one program are what each of them is alone."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
import tiny_translation

from mtl_jax import L2SP, Checkpoints, Evaluation, Phase, train
from mtl_jax.ablation import compare_runs
from mtl_jax.ablation.ablate import ablate
from mtl_jax.ablation.extract import take
from mtl_jax.core.errors import UserError
from mtl_jax.core.progress import Progress
from mtl_jax.experiment import Experiment
from mtl_jax.inference.predict import predict
from mtl_jax.training import mesh as meshes
from mtl_jax.training.checkpoint_store import Store
from mtl_jax.training.experiment_json import from_json
from mtl_jax.training.metrics_log import read_metrics
from mtl_jax.training.row_outcomes import Reader, read_run
from mtl_jax.trunks import TrunkConfig

VARY = ["weights=1/1/1,0.2/0.3/0.5", "phases.everything.learning-rate=1e-2,1e30"]
SHORT = (Phase("heads", steps=3, rules=tiny.HEADS_ONLY), Phase("everything", steps=3))


def short(trunk: TrunkConfig | Path, data: Path, **changes: object) -> Experiment:
    """Heads on cached features of a shared trunk, then everything, a trunk for each run."""
    return dataclasses.replace(tiny.experiment(trunk, data), **{"phases": SHORT} | changes)


def alone(ablation: Path, name: str, workdir: Path, **changes: object) -> Path:
    """A run of an ablation, trained by itself."""
    config = json.loads((ablation / "runs" / name / "config.json").read_text())
    train(dataclasses.replace(from_json(config), **changes), workdir)
    return workdir


def assert_same_run(one: Path, other: Path) -> None:
    """The same records and the same results, to float tolerance."""
    records, others = read_metrics(one), read_metrics(other)
    assert len(records) == len(others)
    for record, expected in zip(records, others, strict=True):
        assert record.keys() == expected.keys()
        for key in record.keys() - {"kind", "cosines"}:
            assert record[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5), (key, record["step"])
    actual, expected = (json.loads((folder / "results.json").read_text()) for folder in (one, other))
    assert actual["best_step"] == expected["best_step"]
    for task, scores in expected["tasks"].items():
        assert actual["tasks"][task]["test"] == pytest.approx(scores["test"], abs=1e-5)
        assert actual["tasks"][task]["baselines"] == scores["baselines"]


@pytest.fixture(scope="module")
def bars() -> list[Progress]:
    """The progress bars of the finished ablation."""
    return []


@pytest.fixture(scope="module")
def finished(trunk: TrunkConfig, data: Path, tmp_path_factory: pytest.TempPathFactory, bars: list[Progress]) -> Path:
    """Eight runs; half of them diverge in their second phase."""
    folder = tmp_path_factory.mktemp("ablation") / "ablation"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "close", lambda bar: bars.append(bar))
        ablate(short(trunk, data), folder, VARY, seeds=2)
    return folder


def test_at_the_end_nothing_is_left_to_be_estimated(finished, bars):
    """Steps, evaluations and checkpoints came as often as they were expected."""
    (bar,) = [bar for bar in bars if bar._unit == "step"]
    assert bar._done == bar._total == 8 * 6
    assert bar._coming == {"evaluation": 0, "checkpoint": 0, "compilation": 0}
    assert {work: times for work, (_, times) in bar._took.items()} == {"evaluation": 24, "checkpoint": 8, "compilation": 2}


def test_runs_that_differ_in_numbers_share_a_program(finished):
    record = json.loads((finished / "ablation.json").read_text())
    (program,) = record["programs"]
    assert (program["runs"], program["size"], program["chunks"], program["steps"]) == (8, 8, 1, 6)
    assert program["bytes"] > 0


def test_a_run_is_what_it_is_alone(finished, tmp_path):
    """Run 5 has its own weights, learning rate and seed, and neighbours that diverge."""
    assert_same_run(finished / "runs" / "0005", alone(finished, "0005", tmp_path / "alone"))


def test_a_run_that_diverges_is_marked_and_leaves_the_others_alone(finished):
    record = json.loads((finished / "ablation.json").read_text())
    fates = {run["run"]: run["status"] for run in record["runs"]}
    assert fates["0002"] == "diverged at step 4: the dev loss of task 'rating' is nan"
    assert [name for name, fate in fates.items() if fate == "done"] == ["0000", "0001", "0004", "0005"]
    for name, fate in fates.items():
        records = read_metrics(finished / "runs" / name)
        assert max(record["step"] for record in records) == (6 if fate == "done" else 4)
        # Its best checkpoint is of before: also what diverges has results, and says so.
        results = json.loads((finished / "runs" / name / "results.json").read_text())
        assert bool(results["diverged"]) == (fate != "done")


def test_the_same_command_finds_it_done(finished, trunk, data):
    before = {path: path.stat().st_mtime_ns for path in finished.glob("runs/*/results.json")}
    record = ablate(short(trunk, data), finished, VARY, seeds=2)
    assert [run["status"] for run in record["runs"]].count("done") == 4
    assert before == {path: path.stat().st_mtime_ns for path in finished.glob("runs/*/results.json")}


def test_another_ablation_is_refused_in_its_workdir(finished, trunk, data, workdir):
    with pytest.raises(UserError, match="begun with 8 runs, and these are 4"):
        ablate(short(trunk, data), finished, VARY)
    other = dataclasses.replace(short(trunk, data), batch=dataclasses.replace(tiny.experiment(trunk, data).batch, rows=4))
    with pytest.raises(UserError, match=r"begun with another configuration: batch\.rows was 8, is 4"):
        ablate(other, finished, VARY, seeds=2)
    with pytest.raises(UserError, match="the workdir of a run"):
        ablate(short(trunk, data), workdir, VARY)


def test_one_run_is_taken_out_as_a_workdir(finished, tmp_path):
    take(finished, "0005", tmp_path / "run")
    (answer,) = predict(tmp_path / "run", "coarse", ["who is the man"])
    assert 0 < answer["probability"] <= 1
    config = from_json(json.loads((tmp_path / "run" / "config.json").read_text()))
    assert train(config, tmp_path / "run")["run"] == "0005"  # it is done
    with pytest.raises(UserError, match="is there already"):
        take(finished, "0005", tmp_path / "run")
    with pytest.raises(UserError, match="0009"):
        take(finished, "0009", tmp_path / "other")


def test_a_run_is_compared_with_others(finished, tmp_path, monkeypatch):
    """Its values are those of its results, though its checkpoint is its program's."""
    monkeypatch.setenv("MTL_JAX_CACHE", str(tmp_path / "cache"))
    run = read_run(finished / "runs" / "0005")
    outcome = Reader(opened=compare_runs._opened).outcomes(run, ["coarse"])["coarse"]
    value = outcome.measured(np.ones((1, len(outcome.rows.keys))))[0]
    assert value == pytest.approx(run.results["tasks"]["coarse"]["test"]["accuracy"], abs=1e-5)


def test_a_run_that_was_taken_out_goes_on(finished, trunk, data, tmp_path):
    """Longer by two steps, from the state that it had among the others."""
    take(finished, "0004", tmp_path / "run")
    config = from_json(json.loads((tmp_path / "run" / "config.json").read_text()))
    longer = dataclasses.replace(config, phases=(*config.phases, Phase("more", steps=2)))
    actual = train(longer, tmp_path / "run", allow_config_change=True)
    assert actual["steps"] == 8
    assert [r["step"] for r in read_metrics(tmp_path / "run") if r["kind"] == "train"] == list(range(1, 9))


@pytest.mark.long
def test_options_of_a_rule_that_compares_gradients(trunk, data, tmp_path):
    """On four devices: two with runs of their own, two each with half of a batch's rows."""
    experiment = short(trunk, data, phases=SHORT[1:], devices=4)
    ablate(experiment, tmp_path / "ablation", ["weighting-options.c=0.2,0.9"], methods=["cagrad"])
    one = alone(tmp_path / "ablation", "0001", tmp_path / "alone", devices=1)
    assert_same_run(tmp_path / "ablation" / "runs" / "0001", one)


@pytest.mark.long
def test_lambdas_and_schedules(trunk, data, tmp_path):
    """Regularisers hold on to what each run began with; a schedule is a weight among numbers; each run has its own end."""
    phase = dataclasses.replace(SHORT[1], steps=6)
    impatient = Evaluation(every=1, patience=2)
    experiment = short(
        trunk, data, phases=(phase,), regularisers=(L2SP(name="start", weight=0.1),), evaluation=impatient, seed=3
    )
    vary = ["regularisers.start.weight=0.1,5", "weights.coarse=2,linear_schedule(1.0, 0.0, 4)"]
    ablate(experiment, tmp_path / "ablation", vary)
    steps = {
        path.parent.name: json.loads(path.read_text())["steps"] for path in (tmp_path / "ablation").glob("runs/*/results.json")
    }
    assert min(steps.values()) < 6, steps  # some have stopped early
    assert_same_run(tmp_path / "ablation" / "runs" / "0003", alone(tmp_path / "ablation", "0003", tmp_path / "alone"))


@pytest.mark.long
def test_a_chunk_at_a_time(finished, trunk, data, tmp_path):
    """Three runs at once, in chunks that the last run fills up: the numbers of all at once."""
    ablate(short(trunk, data), tmp_path / "chunks", VARY, seeds=2, at_once=3)
    record = json.loads((tmp_path / "chunks" / "ablation.json").read_text())
    assert (record["programs"][0]["size"], record["programs"][0]["chunks"]) == (3, 3)
    for name in ("0001", "0005"):
        assert_same_run(tmp_path / "chunks" / "runs" / name, finished / "runs" / name)


def newest(workdir: Path) -> dict:
    """The parameters of a workdir's newest checkpoint."""
    with contextlib.closing(Store(workdir, Checkpoints(), read_only=True)) as store:
        return store.restore_params(store.steps()[-1])


def cut(ablation: Path, folder: Path, step: int) -> None:
    """A copy of a finished ablation of one chunk, as if it had been killed when this checkpoint was its last."""
    shutil.copytree(ablation, folder)
    record = json.loads((folder / "ablation.json").read_text())
    for run in record["runs"]:
        run["status"] = "waiting"
        (folder / "runs" / run["run"] / "results.json").unlink(missing_ok=True)
    (folder / "ablation.json").write_text(json.dumps(record))
    for path in (folder / "programs" / "0" / "chunk-0" / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)


def test_on_another_number_of_devices(trunk, data, tmp_path, monkeypatch):
    """Three runs on two devices are four, one of them a copy; on one device they go on as four, and can be taken out on any."""

    def present(count: int) -> None:
        monkeypatch.setattr(meshes, "_devices", lambda wanted: jax.devices()[: wanted or count])

    phases = (dataclasses.replace(SHORT[0], steps=4),)
    experiment = short(trunk, data, phases=phases, evaluation=Evaluation(every=2), devices=0)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    present(2)
    vary = ["optimizer.learning-rate=1e-2,1e30,1e-3"]
    ablate(experiment, whole, vary)
    assert json.loads((whole / "ablation.json").read_text())["programs"][0]["size"] == 4
    cut(whole, killed, 2)
    present(3)
    with pytest.raises(UserError, match=r"4 runs were begun at once, and there are 3 devices\. Resume with as many"):
        ablate(experiment, killed, vary)
    present(1)
    ablate(experiment, killed, vary)
    for name in ("0000", "0002"):
        assert_same_run(killed / "runs" / name, whole / "runs" / name)
    for count in (1, 3):
        present(count)
        take(whole, "0002", tmp_path / f"on-{count}")
    for one, other in zip(*(jax.tree.leaves(newest(tmp_path / name)) for name in ("on-1", "on-3")), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(UserError, match=r"run 0001 diverged at step \d: .*, before its first evaluation; there is nothing"):
        take(whole, "0001", tmp_path / "diverged")
    assert not (tmp_path / "diverged").exists()


def test_what_never_trains_is_there_once(deep, data, tmp_path):
    """A checkpoint of six runs with heads on a frozen trunk holds that trunk once."""
    ablate(short(deep, data, phases=SHORT[:1]), tmp_path / "ablation", ["optimizer.weight-decay=grid:0:1:6"])
    params = newest(tmp_path / "ablation" / "programs" / "0" / "chunk-0")
    trunk, heads = (sum(np.size(leaf) for leaf in jax.tree.leaves(params[part])) for part in ("trunk", "heads"))
    assert (trunk, heads) == (5_408, 6 * 214)


def test_memory_that_not_even_one_run_has(trunk, data, tmp_path):
    with pytest.raises(UserError, match="a run needs"):
        ablate(short(trunk, data), tmp_path / "ablation", VARY, memory=1e-6)
    with pytest.raises(UserError, match="--at-once is -1"):
        ablate(short(trunk, data), tmp_path / "ablation", VARY, at_once=-1)
    with pytest.raises(UserError, match="source 'questions' has no column 'nope'"):  # of the second program
        ablate(short(trunk, data), tmp_path / "ablation", ["tasks.coarse.column=coarse,nope"])
    assert not (tmp_path / "ablation").exists()
    shutil.rmtree(tmp_path)


def test_a_task_that_writes_texts(tmp_path):
    """Translation beside a label, a trunk from scratch: its BLEU is of texts that each run decodes for itself."""
    tiny_translation.write_data(tmp_path)
    experiment = tiny_translation.experiment(tmp_path, trunk=dataclasses.replace(tiny_translation.TRUNK, dropout=0.1))
    ablate(experiment, tmp_path / "ablation", ["weights=1/1,1/0.2", "optimizer.learning-rate=1e-2,2e-2"])
    record = json.loads((tmp_path / "ablation" / "ablation.json").read_text())
    assert [program["runs"] for program in record["programs"]] == [4]
    assert_same_run(tmp_path / "ablation" / "runs" / "0003", alone(tmp_path / "ablation", "0003", tmp_path / "alone"))


def test_a_run_that_stops_early_has_the_counts_of_its_own_end(trunk, data, tmp_path):
    phases, evaluation = (Phase("everything", steps=8),), Evaluation(every=1, patience=1, baseline="none")
    experiment = short(trunk, data, phases=phases, evaluation=evaluation)
    ablate(experiment, tmp_path / "all", ["optimizer.learning-rate=1e-3,1e2"])
    facts = []
    for name in ("0000", "0001"):
        folder = alone(tmp_path / "all", name, tmp_path / name)
        actual, expected = (json.loads((at / "results.json").read_text()) for at in (tmp_path / "all" / "runs" / name, folder))
        for key in ("training_tokens", "seen", "padding"):
            assert actual[key] == expected[key]
        facts.append(actual)
    assert facts[0]["steps"] != facts[1]["steps"]
    assert facts[0]["training_tokens"] != facts[1]["training_tokens"]
