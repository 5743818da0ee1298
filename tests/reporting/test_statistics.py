import itertools
import math

import made
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mtl_jax import reporting
from mtl_jax.reporting import formatting, read, statistics


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return read([made.write_ablation(tmp_path_factory.mktemp("ablation"))])


def test_groups_are_means_over_seeds_of_runs_that_came_to_their_end(study):
    groups = statistics.groups(study)
    entries = made.entries()
    assert [len(group.runs) for group in groups] == [2] * 8
    assert sum(len(group.done()) for group in groups) == 14  # one diverged, one runs
    for group in groups[1:-1]:
        for task, metric in made.TASKS.items():
            values = [made.score(entry, task) for entry in entries if entry["run"] in {run.name for run in group.runs}]
            found = group.scores["test"][task][metric]
            assert found.n == 2
            assert found.mean == pytest.approx(np.mean(values), abs=1e-12)
            assert found.sd == pytest.approx(np.std(values, ddof=1), abs=1e-12)
    diverged = groups[0].scores["test"]["tweets"]["pearson"]
    assert diverged == statistics.Spread(made.score(entries[0], "tweets"), None, 1)


def test_the_best_is_by_dev(study):
    best = statistics.ranked(statistics.groups(study))
    means = [
        np.mean(
            [made.score({"values": dict(group.values) | {"seed": seed}}, task, "dev") for task in made.TASKS for seed in (0, 1)]
        )
        for group in best
    ]
    assert best[0].method == "pcgrad"
    assert all(a >= b - 0.005 for a, b in itertools.pairwise(means))  # two groups have one seed only


@given(arrays.arrays(np.float64, st.tuples(st.integers(1, 12), st.integers(1, 3)), elements=st.integers(0, 4).map(float)))
def test_the_pareto_front_is_what_nothing_beats(points_NxD):
    def beats(a, b):
        return all(x >= y for x, y in zip(a, b, strict=True)) and any(x > y for x, y in zip(a, b, strict=True))

    expected = [not any(beats(other, point) for other in points_NxD) for point in points_NxD]
    assert statistics.pareto(points_NxD).tolist() == expected
    assert any(expected)


@pytest.mark.parametrize(
    ("one", "other", "tie"),
    [
        (((0.8, 0.02)), ((0.79, 0.001)), True),  # within the first one's deviation
        (((0.8, 0.001)), ((0.79, 0.02)), True),  # or the other's
        (((0.8, 0.001)), ((0.79, 0.002)), False),
        (((0.189, 0.6)), ((-0.289, 0.5)), True),
        (((0.189, 0.1)), ((-0.289, 0.2)), False),
        (((-0.289, 0.02)), ((-0.3, 0.001)), True),
        (((0.8, None)), ((0.8, None)), True),  # of one seed only equal ones
        (((0.8, None)), ((0.7999, None)), False),
        (((0.0, None)), ((-0.0, None)), True),
    ],
)
def test_what_lies_within_a_deviation_ties(one, other, tie):
    first, second = (statistics.Spread(mean, sd, 1 if sd is None else 2) for mean, sd in (one, other))
    assert statistics.ties(first, second) == statistics.ties(second, first) == tie


def test_average_relative_change():
    assert statistics.relative_change({"a": 0.6, "b": 0.3, "c": 9.0}, {"a": 0.5, "b": 0.4}) == pytest.approx((20 - 25) / 2)


def test_methods_against_equal_with_ranks(study):
    comparison = statistics.compare(study, statistics.groups(study))
    assert comparison.reference == "the method equal"
    methods = {method.name: method for method in comparison.methods}
    assert set(methods) == {"fixed", "equal", "pcgrad"}
    entries = {entry["values"]["weighting"]: entry for entry in made.entries() if entry["values"]["seed"] == 0}
    equal = {task: made.score(entries["equal"], task) + 0.002 for task in made.TASKS}  # mean over seeds 0 and 1
    pcgrad = {task: made.score(entries["pcgrad"], task) for task in made.TASKS}  # of seed 1 still runs
    expected = np.mean([100 * (pcgrad[task] / equal[task] - 1) for task in made.TASKS])
    assert methods["pcgrad"].change == statistics.Spread(pytest.approx(expected), None, 1)
    assert methods["equal"].change.mean == pytest.approx(0, abs=1e-9)
    assert methods["equal"].change.sd > 0
    tests = {
        name: {task: method.group.mean(task, metric) for task, metric in made.TASKS.items()} for name, method in methods.items()
    }
    for task in made.TASKS:
        order = sorted(tests, key=lambda name: -tests[name][task])
        assert [methods[name].ranks[task] for name in order] == [1, 2, 3]
    assert methods["pcgrad"].rank == pytest.approx(np.mean(list(methods["pcgrad"].ranks.values())))


@pytest.mark.parametrize(
    ("methods", "alone", "reference"),
    [
        (("equal", "pcgrad"), True, "each task trained alone"),
        (("cagrad", "pcgrad"), False, "the linear probe"),
    ],
)
def test_what_methods_are_compared_with(tmp_path, methods, alone, reference):
    entries = made.entries(points=(), methods=methods)
    folders = [made.write_run(tmp_path / entry["run"], entry | {"status": "done"}) for entry in entries]
    for task in made.TASKS if alone else ():
        entry = {"values": {"weighting": "equal"}, "status": "done"}
        folders.append(made.write_run(tmp_path / f"alone-{task}", entry, {task: made.TASKS[task]}, only=[task]))
    study = read(folders)
    comparison = statistics.compare(study, statistics.groups(study))
    assert comparison.reference == reference
    assert {method.name for method in comparison.methods} == set(methods)


def test_a_reference_that_is_not_above_zero_counts_for_no_task(tmp_path):
    folders = []
    for name, tweets in (("equal", -0.1), ("cagrad", 0.3)):
        folders.append(made.write_run(tmp_path / name, {"values": {"weighting": name}, "status": "done"}))
        made.change_score(folders[-1], "tweets", tweets)
    study = read(folders)
    comparison = statistics.compare(study, statistics.groups(study))
    assert comparison.left_out == ("tweets",)
    assert all(set(method.changes) == {"movies", "sms"} for method in comparison.methods)


def test_a_score_that_is_not_finite_is_none(tmp_path):
    folder = made.write_run(tmp_path / "run", {"values": {"weighting": "equal"}, "status": "done"})
    made.change_score(folder, "tweets", math.nan)
    (group,) = statistics.groups(read([folder]))
    assert group.mean("tweets", "pearson") is None
    assert group.mean("movies", "accuracy") is not None


def test_methods_with_an_undefined_metric_are_not_compared(tmp_path):
    folders = []
    for name in ("equal", "cagrad"):
        folders.append(made.write_run(tmp_path / name, {"values": {"weighting": name}, "status": "done"}))
        made.change_score(folders[-1], "tweets", math.nan)
    study = read(folders)
    assert statistics.compare(study, statistics.groups(study)) is None


def test_the_line_on_the_best_setting_is_that_of_the_page(tmp_path):
    """Means over the seeds decide, so it is the first of ranked(), with its criterion."""
    folder = made.write_ablation(tmp_path)
    study = read([folder])
    best = statistics.ranked(statistics.groups(study))[0]
    line = reporting.best_setting(folder)
    assert line.startswith(f"best on dev: {formatting.setting(best.values, study.fields)} (")
    assert f" {best.criterion.mean:.4f}, {best.criterion.n} seed" in line
