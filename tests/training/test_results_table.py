"""What the table says of runs beside their baselines."""

import dataclasses
import json
import pickle

import pytest
import tiny

import mtl_jax
from mtl_jax.training import results_table
from mtl_jax.training.experiment_json import to_json


def run(metric: float, baseline: float, seed: int = 0) -> dict:
    task = {"metric": "mcc", "test": {"mcc": metric}, "baselines": {"constant": {"mcc": baseline}}}
    facts = {"best_step": 1, "steps": 1, "best_criterion": metric, "seconds": 1.0, "versions": {"devices": "1 x cpu"}}
    return {"experiment": "e", "seed": seed, "weighting": "equal", "tasks": {"a": task}, **facts}


@pytest.mark.parametrize(
    ("metrics", "baseline", "verdict"),
    [
        ([0.5], 0.4, "Beats every baseline on every task."),
        ([0.5], 0.5, "a: ties with majority / mean (0.5000 against 0.5000)"),
        ([0.49999], 0.50001, "a: ties with majority / mean (0.5000 against 0.5000)"),
        ([0.4], 0.5, "a: did not beat majority / mean (0.4000 against 0.5000)"),
        ([0.0], 0.0, "a: ties with majority / mean (0.0000 against 0.0000)"),
        ([-0.1], -0.1, "a: ties with majority / mean (-0.1000 against -0.1000)"),
        ([-0.1], -0.2, "Beats every baseline on every task."),
        ([-0.2], -0.1, "a: did not beat majority / mean (-0.2000 against -0.1000)"),
        ([0.49, 0.53], 0.5, "a: ties with majority / mean (0.5100 ± 0.0283 against 0.5000 ± 0.0000)"),
        ([0.47, 0.51], 0.5, "a: ties with majority / mean (0.4900 ± 0.0283 against 0.5000 ± 0.0000)"),
        ([0.53, 0.55], 0.5, "Beats every baseline on every task."),
        ([0.43, 0.45], 0.5, "a: did not beat majority / mean (0.4400 ± 0.0141 against 0.5000 ± 0.0000)"),
    ],
)
def test_a_tie_is_no_defeat(metrics, baseline, verdict):
    lines = results_table.table([run(metric, baseline, seed) for seed, metric in enumerate(metrics)]).splitlines()
    assert lines[4] == verdict


def write(folder, metric, baseline=0.4, **changes):
    """A workdir as far as the table needs it; metrics of its task may be given by name."""
    experiment = dataclasses.replace(tiny.experiment("", ""), name="e", **changes)
    contents = run(0.0, baseline, experiment.seed) | {"weighting": experiment.weighting}
    if isinstance(metric, dict):
        contents["tasks"]["a"] |= {"metric": next(iter(metric)), "baselines": {}}
    contents["tasks"]["a"] |= {"test": metric if isinstance(metric, dict) else {"mcc": metric}, "dev": {}}
    contents["tasks"]["a"]["dev"] = contents["tasks"]["a"]["test"]
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(contents))
    (folder / "config.json").write_text(json.dumps(to_json(experiment)))
    return folder


def test_runs_that_differ_in_more_than_the_seed_have_columns_of_their_own(tmp_path):
    options = {"c": 0.5}
    folders = [
        write(tmp_path / "equal0", 0.5, seed=0),
        write(tmp_path / "cagrad", 0.3, weighting="cagrad", weighting_options=options),
        write(tmp_path / "equal1", 0.52, seed=1, remat="full"),
    ]
    lines = str(mtl_jax.results(*folders)).splitlines()
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in (lines[0], lines[2])] == [
        ["task", "test metric", "majority / mean", "equal", "cagrad, c 0.5"],
        ["a", "mcc", "0.4000 ± 0.0000", "0.5100 ± 0.0141", "0.3000"],
    ]
    assert lines[4:6] == [
        "equal: Beats every baseline on every task.",
        "cagrad, c 0.5: a: did not beat majority / mean (0.3000 against 0.4000)",
    ]
    assert [line.partition(", weighting")[0] for line in lines[6:]] == [
        "equal: Seed 0",
        "equal: Seed 1",
        "cagrad, c 0.5: Seed 0",
    ]
    found = mtl_jax.results(*folders)
    assert str(pickle.loads(pickle.dumps(found))) == str(found) == results_table.tables(list(found))
    assert str(mtl_jax.results(folders[0], folders[2])) == results_table.table([dict(found[0]), dict(found[2])])


def test_a_baseline_that_differs_has_a_column_for_each_setting(tmp_path):
    folders = [write(tmp_path / "equal", 0.5), write(tmp_path / "scale", 0.6, 0.3, weighting="uncertainty")]
    head = str(mtl_jax.results(*folders)).splitlines()[0]
    assert [cell.strip() for cell in head.split("|")[3:-1]] == [
        "majority / mean, equal",
        "majority / mean, uncertainty",
        "equal",
        "uncertainty",
    ]


def test_a_metric_that_a_run_lacks_is_one_line(tmp_path):
    tasks = tiny.experiment("", "").tasks
    changed = tuple(dataclasses.replace(task, metric="macro_f1") if task.name == "coarse" else task for task in tasks)
    folders = [write(tmp_path / "first", 0.5), write(tmp_path / "second", {"macro_f1": 0.6, "own": 0.7}, tasks=changed)]
    text = str(mtl_jax.results(*folders))
    assert text.count("a: has no test mcc, but macro_f1, own") == 1
    assert results_table.table([run(0.5, 0.4), run(0.5, 0.4) | {"tasks": mtl_jax.results(folders[1])[0]["tasks"]}])


def test_a_merged_run_is_not_one_of_those_that_it_was_merged_from(tmp_path):
    folders = [write(tmp_path / name, 0.5) for name in ("alone", "soup", "wise")]
    for folder, method in zip(folders[1:], ("soup", "wise"), strict=True):
        contents = json.loads((folder / "results.json").read_text())
        (folder / "results.json").write_text(json.dumps(contents | {"merged": {"method": method, "sources": 2}}))
        (folder / "merge.json").write_text(json.dumps({"method": {"name": method}, "written": []}))
    head = str(mtl_jax.results(*folders)).splitlines()[0]
    assert [cell.strip() for cell in head.split("|")[4:-1]] == ["alone", "soup", "wise"]
