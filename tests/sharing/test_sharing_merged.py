"""Runs whose tasks share the trunk in another way than all of it: merged, begun from, and imitated."""

import dataclasses
import json
import shutil

import finished_runs
import jax
import numpy as np
import pytest
import tiny

from mtl_jax import Distillation, InitFrom, Phase, sharing
from mtl_jax.core import trees
from mtl_jax.core.errors import UserError
from mtl_jax.inference.predict import open_run
from mtl_jax.merging import Method, merge
from mtl_jax.training import initial_parameters, setup
from mtl_jax.training.experiment_json import to_json

PART = sharing.MMoE(experts=2, width=2)


@pytest.fixture(scope="module")
def runs(bert, data, tmp_path_factory):
    """Two runs of one experiment; one of other experts; one with the tasks in another order; one with hard sharing."""
    folder = tmp_path_factory.mktemp("runs")
    plain = tiny.experiment(bert, data, sharing=PART, phases=(Phase("all", 4),))
    params = finished_runs.write(folder / "one", plain)
    for name, changes in {
        "two": {},
        "other": {"sharing": dataclasses.replace(PART, activation="relu")},
        "turned": {"tasks": plain.tasks[::-1]},
        "hard": {"sharing": sharing.Hard()},
    }.items():
        shutil.copytree(folder / "one", folder / name)
        (folder / name / "config.json").write_text(json.dumps(to_json(dataclasses.replace(plain, **changes))))
        if name == "turned":
            known = json.loads((folder / name / "data.json").read_text())
            known["tasks"] = dict(reversed(known["tasks"].items()))
            (folder / name / "data.json").write_text(json.dumps(known))
    two = finished_runs.moved(params, 1)
    finished_runs.put(folder / "two", two)
    return folder, {"one": params, "two": two}, plain


def test_runs_of_one_sharing_are_merged_leaf_by_leaf(runs, tmp_path):
    folder, params, _ = runs
    results = merge(tmp_path / "soup", [str(folder / "one"), str(folder / "two")], Method("soup"))
    one, two = trees.flat(params["one"]), trees.flat(params["two"])
    for path, leaf in trees.flat(jax.device_get(open_run(tmp_path / "soup").params)).items():
        np.testing.assert_allclose(leaf, (one[path] + two[path]) / 2, atol=1e-6, err_msg=path)
    assert set(results["tasks"]) == {"rating", "coarse", "fine"}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("other", r"other: its tasks share the trunk by MMoE\(.*'relu'.*only runs with the same sharing can be merged"),
        ("hard", r"hard: its tasks share the trunk by Hard\(\), and those of .*one by MMoE"),
        ("turned", r"turned: its tasks are fine, coarse, rating, and those of .*one are rating, coarse, fine"),
    ],
)
def test_runs_of_other_sharings_are_not_merged(runs, tmp_path, other, message):
    folder, _, _ = runs
    with pytest.raises(UserError, match=message):
        merge(tmp_path / "soup", [str(folder / "one"), str(folder / other)], Method("soup"))
    assert not (tmp_path / "soup").exists()


def test_a_checkpoint_is_no_base_for_them(runs, bert, tmp_path):
    folder, _, _ = runs
    method = Method("arithmetic", scale=(1.0,))
    with pytest.raises(UserError, match=r"is a checkpoint, but the tasks of .* share its trunk by MMoE; give a run as --base"):
        merge(tmp_path / "sum", [str(folder / "one"), str(folder / "two")], method, base=str(bert))


def test_a_run_begins_with_the_same_sharing_or_without_it(runs):
    """Parameters of single tasks are loaded where the tasks are the same; else they can be left out."""
    folder, params, plain = runs
    prepared = setup.prepare(plain)

    def load(name, **options):
        init = InitFrom(path=str(folder / name), **options)
        return initial_parameters.load(prepared._replace(experiment=dataclasses.replace(plain, init_from=init)))

    loaded = load("one")
    assert set(loaded.records) == {"init_from.json"}
    jax.tree.map(np.testing.assert_array_equal, loaded.prepared.params, params["one"])
    with pytest.raises(UserError, match=r"each source or task of .*turned has its own adapters.*leave_out trunk/adapters/\.\*"):
        load("turned")
    trunk = load("turned", leave_out=("trunk/adapters/.*",)).prepared.params["trunk"]
    jax.tree.map(np.testing.assert_array_equal, trunk["adapters"], prepared.params["trunk"]["adapters"])


def test_a_teacher_has_hard_sharing(runs):
    folder, _, plain = runs
    student = dataclasses.replace(plain, regularisers=(Distillation(teacher=str(folder / "one")),))
    with pytest.raises(UserError, match=r"share its trunk by MMoE, which knows only the rows of its own tasks"):
        setup.prepare(student, abstract=True)
