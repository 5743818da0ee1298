import json

import made
import numpy as np
import pytest
import tiny

from mtl_jax.core.errors import UserError
from mtl_jax.reporting import read
from mtl_jax.reporting.series import POINTS, Series, band, of_records
from mtl_jax.reporting.statistics import criterion
from mtl_jax.training.experiment_json import to_json

DONE = {"values": {"weighting": "equal"}, "status": "done"}


def run(folder, status="done", tasks=made.TASKS, **values):
    return made.write_run(folder, {"values": {"weighting": "equal", **values}, "status": status}, tasks)


def test_an_ablation(tmp_path):
    study = read([made.write_ablation(tmp_path)])
    assert (study.name, study.criterion, study.tasks) == ("made by hand", "mean", made.TASKS)
    assert study.fields == ("weighting", "weights")  # the learning rate is the same for all
    assert [run.seed for run in study.runs] == [0, 1] * 8
    assert study.runs[1].diverged
    assert study.runs[1].scores == {}
    assert study.runs[-1].status == "running"
    assert dict(study.runs[8].weights) == {"tweets": 0.2, "movies": 0.2, "sms": 0.6}
    assert dict(study.runs[-1].weights) == {}


def test_runs_that_wait_have_no_files_yet(tmp_path):
    entries = [entry | {"status": "waiting"} for entry in made.entries()]
    entries[0]["status"] = "done"
    study = read([made.write_ablation(tmp_path, entries)])
    assert [run.status for run in study.runs] == ["done"] + ["waiting"] * 15
    assert study.runs[5].curves == {}


def test_of_ordinary_runs_what_differs_in_their_configurations_varies(tmp_path):
    folders = [
        run(tmp_path / "a", seed=0),
        run(tmp_path / "b", seed=1),
        run(tmp_path / "c", weighting="fixed", weights={"tweets": 1, "movies": 2, "sms": 3}),
        made.write_run(tmp_path / "d", DONE, phases=[{"name": "heads", "steps": 40}], name="other", devices=8),
    ]
    study = read(folders)
    assert study.fields == ("weighting", "phases", "weights")  # neither name, seed nor devices; a list of another length is one
    assert [run.name for run in study.runs] == ["a", "b", "c", "d"]
    assert study.name == "made, other"
    assert study.runs[2].values["weights"] == {"tweets": 1, "movies": 2, "sms": 3}


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    names = [found.name for found in read([run(tmp_path / "a" / "run"), run(tmp_path / "b" / "run", seed=1)]).runs]
    assert names == [str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run")]


def test_an_unfinished_run_is_shown_as_such(tmp_path):
    study = read([run(tmp_path / "a"), run(tmp_path / "b", status="unfinished", seed=1)])
    assert [run.status for run in study.runs] == ["done", "unfinished"]
    assert "dev/tweets" in study.runs[1].curves


def test_bad_input_is_one_line(tmp_path):
    ablation, other = made.write_ablation(tmp_path / "ablation"), run(tmp_path / "other", tasks={"spans": "f1"})
    own = run(tmp_path / "own")
    (tmp_path / "empty").mkdir()
    cases = [
        ([], "no workdir given"),
        ([tmp_path / "nowhere"], "nowhere: not the workdir of a run"),
        ([own, tmp_path / "empty"], "empty: not the workdir of a run"),
        ([own, other], r"other: trains spans, but .*own tweets, movies, sms; a report compares runs of the same tasks"),
        ([own, ablation], "ablation is an ablation; a report is of one ablation or of ordinary runs"),
    ]
    for folders, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            read(folders)
        assert "\n" not in str(caught.value)


def test_tasks_and_metrics_of_a_run_without_results_are_those_of_its_experiment(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_json(tiny.experiment(tmp_path, tmp_path))))
    study = read([tmp_path])
    assert study.tasks == {"rating": "pearson", "coarse": "accuracy", "fine": "accuracy"}
    assert study.runs[0].status == "unfinished"


def test_curves_are_means_of_windows_without_what_is_not_finite():
    records = [{"kind": "train", "step": step, "loss/a": float(step)} for step in range(1, 601)]
    records[4]["loss/a"] = float("nan")
    records.append({"kind": "dev", "step": 600, "a/accuracy": 0.5})
    curves = of_records(records, {"a": "accuracy"}, 600)
    assert set(curves) == {"loss/a", "dev/a"}
    width = 600 // POINTS
    assert curves["loss/a"].steps_N.tolist() == list(range(width, 601, width))
    assert curves["loss/a"].values_N[0] == pytest.approx(np.mean([step for step in range(1, width + 1) if step != 5]))
    assert curves["loss/a"].values_N[-1] == pytest.approx(np.mean(range(601 - width, 601)))
    assert curves["dev/a"].steps_N.tolist() == [600]


def test_a_band_is_mean_and_deviation_of_the_runs_that_have_the_step():
    found = band([Series(np.array([10, 20]), np.array([1.0, 2.0])), Series(np.array([10, 30]), np.array([3.0, 4.0]))])
    assert found.steps_N.tolist() == [10, 20, 30]
    assert found.mean_N.tolist() == [2.0, 2.0, 4.0]
    assert found.sd_N.tolist() == [pytest.approx(np.std([1, 3], ddof=1)), 0.0, 0.0]


def test_the_criterion_is_that_of_the_experiment(tmp_path):
    folder = made.write_run(tmp_path / "a", DONE, evaluation={"criterion": "movies/loss"})
    study = read([folder])
    results = json.loads((folder / "results.json").read_text())
    assert criterion(study, study.runs[0]) == results["tasks"]["movies"]["dev"]["loss"]
