"""Joint runs against a run alone, of the tiny experiment: numbers, the cache, the command, the report, errors."""

import dataclasses
import json
import shutil

import pytest
import tiny
from made import write_ablation

import mtl_jax
from mtl_jax import Embedding, Evaluation, Phase, train
from mtl_jax.ablation import compare_runs
from mtl_jax.cli import main
from mtl_jax.core.errors import UserError
from mtl_jax.reporting import compare as comparing
from mtl_jax.reporting.compare_section import section
from mtl_jax.reporting.compared import Alone, Column, Compared
from mtl_jax.reporting.paired_bootstrap import Difference
from mtl_jax.reporting.series import of_records
from mtl_jax.reporting.study import Run
from mtl_jax.training import row_outcomes


def copy(run, target, **changes):
    """A finished run with another configuration, as if it had been trained so."""
    shutil.copytree(run, target)
    for name in ("config.json", "results.json"):
        content = json.loads((target / name).read_text())
        (target / name).write_text(json.dumps(content | {key: value for key, value in changes.items() if key in content}))
    return target


@pytest.fixture(scope="module")
def runs(workdir, bert, data, tmp_path_factory):
    """joint and joint1 with seeds 0 and 1, of three tasks; alone, of the task coarse. And a cache of their own."""
    folder = tmp_path_factory.mktemp("compared")
    experiment = tiny.experiment(bert, data, only=("coarse",), phases=(Phase("everything", steps=3),), trunk=Embedding(60, 8))
    train(dataclasses.replace(experiment, evaluation=Evaluation(every=3, baseline="none")), folder / "alone")
    shutil.copytree(workdir, folder / "joint")
    copy(workdir, folder / "joint1", seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTL_JAX_CACHE", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def result(runs):
    return mtl_jax.compare([runs / "joint", runs / "joint1"], runs / "alone", resamples=200)


def test_values_are_those_of_the_results(runs, result):
    of_runs = {name: json.loads((runs / name / "results.json").read_text())["tasks"] for name in ("joint", "alone")}
    assert result.alone["coarse"].value == pytest.approx(of_runs["alone"]["coarse"]["test"]["accuracy"], abs=1e-6)
    column = result.columns["joint"]
    assert column.values == {"coarse": pytest.approx(of_runs["joint"]["coarse"]["test"]["accuracy"], abs=1e-6)}
    difference = column.differences["coarse"]
    assert difference.value == pytest.approx(column.values["coarse"] - result.alone["coarse"].value)
    assert difference.low <= difference.value <= difference.high
    assert (column.mean, column.worst) == (None, None)  # one task
    assert column.covers.endswith("the runs alone with one seed: how much its seed matters is not in them")
    assert result.notes == ("no run alone has rating, fine",)


def test_a_second_call_opens_no_run_and_leaves_workdirs_as_they_are(runs, result, monkeypatch):
    files = {path: path.stat().st_mtime_ns for path in runs.glob("*/*") if "cache" not in path.parts}
    monkeypatch.setattr(compare_runs, "open_run", None)
    again = mtl_jax.compare([runs / "joint", runs / "joint1"], runs / "alone", resamples=200)
    assert again == result
    assert files == {path: path.stat().st_mtime_ns for path in runs.glob("*/*") if "cache" not in path.parts}


def test_every_setting_has_a_column(runs, result, tmp_path, capsys):
    """Two runs of several tasks are compared in each of them; names and files are those of the command."""
    other = copy(runs / "joint", tmp_path / "other", weighting="uncertainty")
    compared = mtl_jax.compare([runs / "joint", other], runs / "joint1", resamples=200)
    assert list(compared.columns) == ["equal", "uncertainty"]
    column = compared.columns["equal"]
    assert all(difference == Difference(0, 0, 0) for difference in column.differences.values())  # the same parameters
    assert (column.mean, column.worst) == (Difference(0, 0, 0), Difference(0, 0, 0))
    assert column.summary == "3 unclear; on average no gain is shown"
    named = (f"hard={runs / 'joint'}", f"hard={runs / 'joint1'}", f"other={other}")
    main.compare(named[0], (str(runs / "alone"),), named[1:], json=str(tmp_path / "out.json"), resamples=200)
    written = json.loads((tmp_path / "out.json").read_text())
    assert list(written["joint"]) == ["hard", "other"]
    assert written["joint"]["hard"]["differences"]["coarse"]["value"] == result.columns["joint"].differences["coarse"].value
    assert "| task   | test metric   | alone" in capsys.readouterr().out


def test_a_slow_metric_has_fewer_resamples(runs, monkeypatch):
    monkeypatch.setattr(mtl_jax.Classification, "row_statistics", lambda self, outputs, examples: None)
    monkeypatch.setattr(row_outcomes, "VERSION", -1)
    monkeypatch.setattr(comparing, "MEASURED_AGAIN", 20)
    slow = mtl_jax.compare(runs / "joint", runs / "alone", resamples=100)
    assert slow.notes[-1] == "coarse: 20 resamples, as the metric has no row_statistics()"
    monkeypatch.undo()
    exact = mtl_jax.compare(runs / "joint", runs / "alone", resamples=100)
    assert slow.columns["joint"].values == pytest.approx(exact.columns["joint"].values)


def test_the_report_has_a_section(runs, tmp_path):
    page = mtl_jax.report(runs / "joint", runs / "joint1", output=tmp_path, alone=[runs / "alone"])
    assert "Is any task hurt?" in page.read_text(encoding="utf-8")
    assert (tmp_path / "figures" / "compare.png").exists()


def made(hurt=-0.1):
    """Two settings and three tasks by hand."""
    differences = {
        "a": Difference(0.1, 0.05, 0.2),
        "b": Difference(0.0, -0.1, 0.1),
        "c": Difference(hurt, hurt - 0.1, hurt / 2),
    }
    cosines = {"a": {"c": -0.2, "b": 0.1}, "b": {"a": 0.1, "c": 0.3}, "c": {"a": -0.2, "b": 0.3}}
    values = dict.fromkeys("abc", 0.5)
    hard = Column(("x",), values, differences, Difference(0.01, -0.1, 0.1), differences["c"], "c", cosines, "rows and seeds")
    undefined = {**differences, "c": Difference(*[float("nan")] * 3)}
    other = hard._replace(differences=undefined, cosines={}, mean=Difference(0.05, 0.01, 0.1), worst=differences["b"])
    return Compared({task: Alone("accuracy", 0.4, ("y",)) for task in "abc"}, {"hard": hard, "other": other}, 1000)


def test_a_hurt_task_names_its_conflicts():
    compared = made()
    hard, other = compared.columns.values()
    assert hard.summary == "1 helped, 1 unclear, 1 hurt; on average no gain is shown"
    assert other.summary == "1 helped, 1 unclear, 1 undefined; on average a gain"
    assert hard.hurt_lines == ["c is hurt, and in conflict with a -0.20 (mean cosine of the gradients)"]
    calm = hard._replace(cosines={"c": {"b": -0.001, "a": 0.2}})
    assert calm.hurt_lines == ["c is hurt, but in conflict with no other task: the lowest mean cosine is -0.00, with b"]
    assert hard._replace(cosines={}).hurt_lines[0].startswith("c: which task is in conflict is not known")
    assert "-0.1000 [-0.2000, -0.0500] hurt (c)" in compared.table()
    assert json.loads(json.dumps(compared.to_json()))["joint"]["other"]["differences"]["c"]["value"] is None
    figures = [part.slug for part in section(compared).parts if hasattr(part, "slug")]
    assert figures == ["compare", "compare_settings", "compare_conflicts"]


def test_cosines_are_means_over_runs():
    norms = {"gradient_norm/a": 1.0, "gradient_norm/b": 1.0}
    runs = [
        Run("r", {}, 0, "done", "pcgrad", {}, {"test": {"a": {}, "b": {}}}, {}, {}, of_records([record | norms], {}, 1), ())
        for record in ({"kind": "train", "step": 1, "cosines": [[1.0, c], [c, 1.0]]} for c in (0.5, -0.1))
    ]
    assert comparing._cosines(runs) == {"a": {"b": pytest.approx(0.2)}, "b": {"a": pytest.approx(0.2)}}


def test_an_ablation_stands_for_its_runs(tmp_path):
    folder = write_ablation(tmp_path / "ablation")
    with pytest.raises(UserError, match="run 0015 of the ablation is not finished; let it end first"):
        comparing._folders([str(folder)], [])
    notes = []
    folders = comparing._folders([str(folder)], notes, partly=True)
    assert [path.name for path in folders] == [f"{number:04d}" for number in range(15) if number != 1]
    assert notes == [f"{folder}: 1 run that diverged left out"]


def test_bad_input_is_one_line(runs, tmp_path):
    joint, alone = runs / "joint", runs / "alone"
    unfinished = copy(alone, tmp_path / "unfinished")
    (unfinished / "results.json").unlink()
    other = copy(alone, tmp_path / "other")
    (other / "config.json").write_text(
        (other / "config.json").read_text().replace('"learning_rate": 0.01', '"learning_rate": 0.02')
    )
    metric = copy(alone, tmp_path / "metric")
    stored = json.loads((metric / "data.json").read_text())
    stored["tasks"]["coarse"]["metric"] = "macro_f1"
    (metric / "data.json").write_text(json.dumps(stored))
    rows = copy(alone, tmp_path / "rows")
    config = json.loads((rows / "config.json").read_text())
    config["sources"][1]["cut_seed"] = 5
    (rows / "config.json").write_text(json.dumps(config))
    for arguments, line in (
        ((tmp_path, alone), "not the workdir of a run"),
        ((joint, unfinished), r"unfinished: the run is not finished \(it has no results.json\)"),
        (([joint, joint], alone), "joint: the same run is given twice on the joint side"),
        ((joint, joint), "joint: the same run is given as joint and as alone"),
        ((joint, []), "no run alone is given"),
        (([], alone), "no joint run is given"),
        ((joint, [alone, other]), "task coarse: .* differ in .*learning_rate; give one setting"),
        ((joint, metric), "task coarse: its metric is accuracy in .*joint, and macro_f1 in .*metric"),
        ((joint, rows), "task coarse: .* do not have the same test rows in the same order: "),
        (({"hard": [joint, other]}, alone), "hard: its runs differ in|a report compares"),
    ):
        with pytest.raises(UserError, match=line):
            mtl_jax.compare(*arguments)
    with pytest.raises(UserError, match="resamples is 3; it must be at least 100"):
        mtl_jax.compare(joint, alone, resamples=3)
    renamed = copy(alone, tmp_path / "renamed")
    for name in ("config.json", "data.json", "results.json"):
        (renamed / name).write_text((renamed / name).read_text().replace('"coarse"', '"other"'))
    with pytest.raises(
        UserError, match="renamed: has no task of the joint runs; its tasks are other, theirs rating, coarse, fine"
    ):
        mtl_jax.compare(joint, renamed)
    with pytest.raises(UserError, match="renamed: has no task in common with the runs alone"):
        mtl_jax.compare({"hard": joint, "renamed": renamed}, alone)
    with pytest.raises(UserError, match="--joint a/b: give every joint setting a name, as NAME=PATHS"):
        mtl_jax.reporting.named(["x=y", "a/b"])
