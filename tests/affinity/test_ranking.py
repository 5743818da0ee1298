"""Rankings, their intervals, and their quality against a truth; groups of tasks; signals from gradients."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_jax import UserError, affinity, weighting
from mtl_jax.affinity import experiment_affinity, ranking, task_groups


def noisy(seed, shift):
    values = np.random.default_rng(seed).normal(shift, 1, 200)
    return lambda rows: values[rows].mean()


def test_sources_are_ranked_with_intervals():
    estimators = {"poor": noisy(0, 0.0), "best": noisy(1, 1.0), "near": noisy(2, 0.95)}
    estimates = affinity.ranked(estimators, 200, resamples=200, seed=3)
    assert [estimate.source for estimate in estimates][-1] == "poor"
    assert sum(estimate.first for estimate in estimates) == pytest.approx(1)
    assert estimates[-1].first == 0
    for estimate in estimates:
        assert estimate.value == pytest.approx(estimators[estimate.source](np.arange(200)))
        assert estimate.low < estimate.value < estimate.high
    assert affinity.ranked(estimators, 200, resamples=200, seed=3) == estimates
    assert affinity.ranked(estimators, 200, resamples=200, seed=4) != estimates


def test_an_interval_of_a_mean_has_the_width_of_its_standard_error():
    values = np.random.default_rng(5).normal(size=400)
    [estimate] = affinity.ranked({"a": lambda rows: values[rows].mean()}, 400, resamples=2000, level=0.9)
    expected = 2 * 1.645 * values.std(ddof=1) / 20
    assert estimate.high - estimate.low == pytest.approx(expected, rel=0.08)


def test_a_half_that_is_refused_is_left_out():
    def refuses(share):
        def estimate(rows):
            if len(rows) < 20 and rows[0] % 10 < 10 * share:
                raise UserError("one class")
            return float(rows.mean())

        return estimate

    [some] = affinity.ranked({"a": refuses(0.1)}, 20)
    assert some.low < some.high
    [none] = affinity.ranked({"a": refuses(1.0)}, 20)
    assert math.isnan(none.low)
    assert math.isnan(none.first)
    [few] = affinity.ranked({"a": noisy(0, 0)}, 3)
    assert math.isnan(few.high)
    with pytest.raises(UserError, match="one class"):
        affinity.ranked({"a": refuses(1.0)}, 19)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"resamples": -1}, "resamples is -1"), ({"level": 1.0}, r"level is 1\.0; it must be above 0 and below 1")],
)
def test_options_of_a_ranking(options, message):
    with pytest.raises(UserError, match=message):
        affinity.ranked({"a": noisy(0, 0)}, 20, **options)
    with pytest.raises(UserError, match="there is no source to rank"):
        affinity.ranked({}, 20)


TRUTH = {"a": 0.9, "b": 0.8, "c": 0.6, "d": 0.3}


def test_the_quality_of_rankings_by_hand():
    right = {name: 10 * score for name, score in TRUTH.items()}
    wrong = {name: -score for name, score in TRUTH.items()}
    assert [affinity.regret(right, TRUTH, k) for k in (1, 3)] == [0, 0]
    assert [affinity.regret(wrong, TRUTH, k) for k in (1, 2, 3, 4)] == pytest.approx([6 / 9, 3 / 9, 1 / 9, 0])
    assert affinity.ndcg(right, TRUTH) == 1
    gains = np.exp2((np.array([0.3, 0.6, 0.8, 0.9]) - 0.3) / 0.6) - 1
    discount = 1 / np.log2([2, 3, 4, 5])
    assert affinity.ndcg(wrong, TRUTH) == pytest.approx(gains @ discount / (gains[::-1] @ discount))
    assert affinity.ndcg(wrong, TRUTH, scaled=False) > affinity.ndcg(wrong, TRUTH)
    assert affinity.spearman(right, TRUTH) == pytest.approx(1)
    assert affinity.spearman(wrong, TRUTH) == pytest.approx(-1)


def test_an_estimator_that_cannot_tell_gets_no_credit():
    equal = dict.fromkeys(TRUTH, 0.5)
    for names in itertools.permutations(TRUTH):
        shuffled = {name: equal[name] for name in names}
        assert ranking.order(shuffled, TRUTH) == ["d", "c", "b", "a"]
    assert math.isnan(affinity.spearman(equal, TRUTH))
    assert ranking.order({"a": math.nan, "d": 0.0}, TRUTH) == ["d", "a"]
    assert affinity.ndcg(TRUTH, equal) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: affinity.regret({"x": 1.0}, TRUTH), "unknown source of an estimate: 'x'"),
        (lambda: affinity.regret(TRUTH, TRUTH, 0), "k is 0; it must be at least 1"),
        (lambda: affinity.regret({"a": 1.0}, {"a": -1.0}), "the best true score is -1"),
        (lambda: affinity.regret({}, TRUTH), "there are no estimates"),
        (lambda: affinity.spearman({"a": 1.0}, {"a": math.nan}), "the true score with source 'a' is nan"),
        (lambda: affinity.ndcg({"a": 1.0}, {"a": -1.0}, scaled=False), "a true score is -1; without scaling"),
        (lambda: affinity.mean_places([]), "there are no rankings to average"),
        (lambda: affinity.joint_or_sequential(0, 5), "the target has 0 rows; it needs at least 1"),
    ],
)
def test_bad_rankings_are_one_line(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_mean_places_over_rankings():
    def estimates(**values):
        return [affinity.Estimate(name, value, math.nan, math.nan, math.nan) for name, value in values.items()]

    means = affinity.mean_places([estimates(a=3.0, b=1.0, c=1.0), estimates(b=5.0, a=2.0, c=math.nan), estimates(c=9.0)])
    assert means == {"a": 0.25, "b": 0.375, "c": 0.875}
    assert list(means) == ["a", "b", "c"]
    assert affinity.mean_places([estimates(c=9.0)]) == {"c": 0.0}


def test_the_size_rule_and_its_flags():
    assert affinity.joint_or_sequential(64, 1000) == "joint"
    assert affinity.joint_or_sequential(1000, 1000) == "sequential"
    assert affinity.advise("mr", "sst2", 64, 1000).flags == ("--only mr sst2 --workdir runs/mr_with_sst2",)
    first, second = affinity.advise("mr", "sst2", 1000, 64).flags
    assert first == "--only sst2 --workdir runs/sst2"
    assert second == "--only mr --init-from.path runs/sst2 --init-from.subtree trunk --workdir runs/mr_after_sst2"


# Groups.


def best_by_hand(gains, budget):
    """Every choice of at most `budget` groups that cover all tasks; each task is served by the group that is best for it."""
    size = len(gains)
    subsets = [s for n in range(1, size + 1) for s in itertools.combinations(range(size), n)]

    def score(task, group):
        others = [other for other in group if other != task]
        return np.mean([gains[other][task] for other in others]) if others else 0.0

    table = np.array([[score(task, group) if task in group else -np.inf for task in range(size)] for group in subsets])
    best = -np.inf
    for count in range(1, budget + 1):
        for chosen in itertools.combinations(range(len(subsets)), count):
            best = max(best, table[list(chosen)].max(axis=0).sum())
    return best


@given(seed=st.integers(0, 10**6), budget=st.integers(1, 3))
def test_groups_are_the_best_of_all(seed, budget):
    gains = np.random.default_rng(seed).normal(size=(4, 4))
    names = list("abcd")
    grouping = affinity.groups(gains, names, budget)
    assert grouping.optimal
    assert grouping.score == pytest.approx(best_by_hand(gains, budget))
    assert sorted(task for group in grouping.groups for task in group.served) == names
    assert len(grouping.groups) <= budget
    by_hand = 0.0
    for group in grouping.groups:
        assert set(group.served) <= set(group.trained)
        for task in group.served:
            others = [names.index(other) for other in group.trained if other != task]
            by_hand += np.mean([gains[other, names.index(task)] for other in others]) if others else 0.0
    assert grouping.score == pytest.approx(by_hand)


@given(seed=st.integers(0, 10**6), budget=st.integers(1, 4))
def test_branch_and_bound_finds_what_exhaustive_search_finds(seed, budget):
    gains = np.random.default_rng(seed).normal(size=(6, 6))
    np.fill_diagonal(gains, 0)
    for search in (task_groups._exhaustive, task_groups._branch_and_bound):
        division, optimal, _ = search(gains, budget, 10**6)
        score = sum(task_groups._best_group(gains, served)[0] for served in division)
        if search is task_groups._exhaustive:
            expected = score
    assert optimal
    assert score == pytest.approx(expected)


def test_a_search_that_ends_early_says_so():
    gains = np.random.default_rng(1).normal(size=(10, 10))
    names = [f"task_{number}" for number in range(10)]
    whole, cut = (affinity.groups(gains, names, 3, nodes=nodes) for nodes in (10**6, 10))
    assert (whole.optimal, cut.optimal, cut.tried) == (True, False, 10)
    assert cut.score <= whole.score
    assert sorted(task for group in cut.groups for task in group.served) == sorted(names)


def test_scores_alone_are_added():
    gains = np.full((2, 2), -1.0)
    grouping = affinity.groups(gains, ["a", "b"], 5, alone={"a": 0.5, "b": 0.25})
    assert grouping.score == 0.75
    assert [group.trained for group in grouping.groups] == [("a",), ("b",)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.eye(2), ["a"], 1), r"gains has shape \(2, 2\) for 1 names"),
        ((np.eye(2), ["a", "a"], 1), "a task stands twice among a, a"),
        ((np.eye(2), ["a", "b"], 0), "budget is 0; it must be at least 1 model"),
        ((np.full((2, 2), np.nan), ["a", "b"], 1), "the gain of 'b' from 'a' is not finite"),
    ],
)
def test_bad_groups_are_one_line(arguments, message):
    with pytest.raises(UserError, match=message):
        affinity.groups(*arguments)
    with pytest.raises(UserError, match="alone has no score of b"):
        affinity.groups(np.eye(2), ["a", "b"], 1, alone={"a": 1.0})


# Signals from gradients.


def quadratics():
    random = np.random.default_rng(0)
    targets = jnp.asarray(random.normal(size=(3, 5)) + 2, jnp.float32)
    params = {"w": jnp.zeros(5), "b": jnp.ones(())}

    def losses_of(params):
        return ((params["w"] - targets) ** 2).sum(axis=1) + jnp.arange(1.0, 4.0) * params["b"] ** 2

    return params, losses_of


def test_tag_looks_ahead():
    params, losses_of = quadratics()
    losses, gradients, rate = losses_of(params), jax.jacobian(losses_of)(params), 1e-3
    exact = affinity.tag_lookahead(losses, affinity.lookahead_losses(losses_of, params, gradients, rate))
    by_hand = np.zeros((3, 3))
    for i in range(3):
        step = jax.tree.map(lambda leaf, slope, i=i: leaf - rate * slope[i], params, gradients)
        by_hand[i] = 1 - np.asarray(losses_of(step)) / np.asarray(losses)
    np.testing.assert_allclose(exact, by_hand, rtol=1e-4)
    gram = weighting.gram({str(i): jax.tree.map(lambda leaf, i=i: leaf[i], gradients) for i in range(3)})
    first_order = jax.jit(affinity.tag_first_order)(gram, losses, rate)
    np.testing.assert_allclose(first_order, exact, rtol=2e-2)


def test_gradient_cosines():
    random = np.random.default_rng(1)
    rows = np.concatenate([random.normal(size=(3, 7)), np.zeros((1, 7))])
    cosines = jax.jit(affinity.gradient_cosines)(rows @ rows.T)
    by_hand = np.corrcoef(rows[:3], rowvar=True) * 0
    for i, j in itertools.product(range(3), repeat=2):
        by_hand[i, j] = rows[i] @ rows[j] / np.linalg.norm(rows[i]) / np.linalg.norm(rows[j])
    np.testing.assert_allclose(cosines[:3, :3], by_hand, rtol=1e-5)
    assert not np.asarray(cosines[3]).any()


@pytest.mark.parametrize(
    ("tasks", "nodes", "end"), [(8, 10, ""), (9, 10**6, "it is proven to be the best"), (12, 3, "the search ended")]
)
def test_groups_of_many_tasks_say_what_was_done(tasks, nodes, end):
    gains = np.random.default_rng(0).normal(size=(tasks, tasks))
    note = affinity.groups(gains, [f"t{n}" for n in range(tasks)], 2, nodes=nodes).note
    assert end in note
    assert ("too many to compare all groupings, which is done up to 8: branch and bound looked at" in note) == (tasks > 8)


def test_groups_in_the_command_are_those_of_the_gains():
    """Rankings of a joint run as gains; a task without any is a group by itself, and a line says so."""
    gains = np.array([[0, 2, -1], [2, 0, -1], [-1, -1, 0]])
    names = ["a", "b", "c"]

    def ranking(column):
        others = [row for row in range(3) if row != column]
        return {"grad_tag": [affinity.Estimate(names[row], gains[row, column], np.nan, np.nan, np.nan) for row in others]}

    rankings = {name: ranking(column) for column, name in enumerate(names)}
    grouping, lines = experiment_affinity._groups(rankings, 2)
    assert lines == []
    assert [group.served for group in grouping.groups] == [("a", "b"), ("c",)]
    result = affinity.Affinity({}, {}, {}, {}, [], {}, {}, {}, grouping)
    assert affinity.table(result).splitlines()[1:3] == ["  --only a b  (for a, b)", "  --only c  (for c)"]
    assert result.as_json()["groups"]["groups"][1] == {"trained": ("c",), "served": ("c",)}
    by_itself = "groups: grad_tag lacks gains of c or from it, so it is a group by itself"
    grouping, lines = experiment_affinity._groups({**rankings, "c": {}}, 2)
    assert [group.trained for group in grouping.groups] == [("a", "b"), ("c",)]
    assert lines == [by_itself]
    assert experiment_affinity._groups({**rankings, "c": {}}, 1) == (
        None,
        [by_itself, "groups: none are made of 2 tasks in 0 models"],
    )
    only_a, lines = experiment_affinity._groups({"a": rankings["a"], "b": {}, "c": {}}, 3)
    assert (only_a, len(lines)) == (None, 3)
