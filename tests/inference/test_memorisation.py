"""What a run remembers: losses of its rows, membership, errors."""

import json
import shutil

import finished_runs
import numpy as np
import pytest
import tiny

import mtl_jax
from mtl_jax.cli import main
from mtl_jax.core.errors import UserError


@pytest.fixture(scope="module")
def result(workdir):
    return mtl_jax.memorisation(workdir, reference=workdir, resamples=50)


def test_losses_are_those_of_the_results(workdir, result):
    scores = json.loads((workdir / "results.json").read_text())["tasks"]
    for task, losses in result.losses.items():
        assert losses["test"] == pytest.approx(scores[task]["test"]["loss"], rel=1e-5)


def test_each_task_has_its_scores(result):
    assert {task: [*scores] for task, scores in result.memberships.items()} == {
        "rating": ["loss", "length", "reference"],
        "coarse": ["loss", "label", "reference"],
        "fine": ["loss", "label", "reference"],
    }
    for scores in result.memberships.values():
        assert scores["reference"].auc == 0.5  # the run itself: all differences are 0
        assert 0 <= scores["loss"].low <= scores["loss"].auc <= scores["loss"].high <= 1
        assert scores["loss"].members > 100 > scores["loss"].others
    assert result.exposures == {}
    assert result.table().count("reference") == 3


def test_the_command_prints_and_writes_the_same(workdir, tmp_path, capsys):
    main.memorisation(str(workdir), task=("coarse",), rows=12, held_out="dev", json=str(tmp_path / "out.json"))
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["memberships"]["coarse"]["loss"]["members"] == 12
    assert np.isfinite(written["losses"]["coarse"]["dev"])
    assert "| coarse | " in capsys.readouterr().out


def test_a_long_row_counts_once_beside_a_task_that_reads_windows(tmp_path):
    """The label of a long row is that of its first window."""
    rows = []
    for number, (first, second) in enumerate((a, b) for a in tiny.GOOD + tiny.BAD for b in tiny.OTHER[:8]):
        words = [first, second, "film"] * (12 if number % 3 == 0 else 1)
        rows.append({"text": words, "tags": ["O"] * len(words), "kind": "xy"[number % 2]})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = mtl_jax.Source("rows", str(tmp_path / "rows.jsonl"), format="jsonl", cut_dev=0.2, cut_test=0.3)
    tasks = (
        mtl_jax.Classification(name="kind", source="rows", column="kind"),
        mtl_jax.Tagging(name="tags", source="rows", metric="token_accuracy"),
    )
    changes = {"sources": (source,), "tasks": tasks, "trunk": mtl_jax.Embedding(dimension=8)}
    finished_runs.write(tmp_path / "run", tiny.experiment("", "", **changes))
    result = mtl_jax.memorisation(tmp_path / "run", resamples=10)
    assert {task: [*scores] for task, scores in result.memberships.items()} == {
        "kind": ["loss", "label"],
        "tags": ["loss", "length"],
    }
    loss, label = result.memberships["kind"].values()
    assert (loss.members, loss.others) == (label.members, label.others)
    assert loss.members + loss.others < len(rows)


def test_bad_input_is_one_line(workdir, tmp_path):
    for arguments, line in (
        ({"tasks": ["course"]}, r"unknown task 'course' \(did you mean 'coarse'\?\)"),
        ({"held_out": "train"}, r"unknown held_out 'train'"),
        ({"rows": 3}, r"rows is 3; it must be at least 10"),
        ({"seed": -1}, r"seed is -1; it must be at least 0"),
    ):
        with pytest.raises(UserError, match=line):
            mtl_jax.memorisation(workdir, **arguments)
    shutil.copytree(workdir, tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "data.json").read_text())
    stored["sources"]["questions"]["train"]["sha256"] = "0" * 64
    (tmp_path / "run" / "data.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"split train of source 'questions' has changed since the run was trained"):
        mtl_jax.memorisation(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match=r"there is no checkpoint yet"):
        mtl_jax.memorisation(tmp_path / "run")


def test_rows_that_a_rule_held_out_are_not_among_those_of_training(bert, data, tmp_path):
    options = {"target": "coarse", "learning_rate": 0.01}
    finished_runs.write(tmp_path, tiny.experiment(bert, data, weighting="auto_lambda", weighting_options=options))
    result = mtl_jax.memorisation(tmp_path, ["coarse", "rating"], rows=10, resamples=50)
    assert result.memberships["coarse"]["loss"].members == 10
