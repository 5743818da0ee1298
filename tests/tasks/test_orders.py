"""Kinds that choose and order: their losses and labels against plain loops."""

import jax
import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from mtl_jax import MultipleChoice, Ordinal, Ranking, Source
from mtl_jax.core.errors import UserError
from mtl_jax.data import units
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.labels import Window
from mtl_jax.transfer import setfit

RNG = np.random.default_rng(1)


def log_softmax(x):
    return x - np.log(np.exp(x).sum())


@pytest.mark.parametrize("objective", ["listwise", "pairwise"])
def test_ranking_compares_within_groups(objective):
    """Two groups and an empty place in row 0; in row 1 a group of equal grades, which says nothing."""
    task = Ranking(name="r", source="s", group="query", objective=objective)
    groups = [["a", "b", "a", "a", "b", None], ["c", "c", None, None, None, None]]
    grades = [[0, 1, 2, 1, 0, None], [1, 1, None, None, None, None]]
    labels = np.full((2, 6, 3), np.nan, np.float32)
    window = Window(0, np.zeros(1), None, None, None)
    for r in range(2):
        for s in range(6):
            labels[r, s] = task.window_label(None if grades[r][s] is None else (grades[r][s], groups[r][s]), window)
    scores = RNG.normal(size=(2, 6, 1)).astype(np.float32)
    total, count = jax.jit(task.loss)(scores, labels)
    expected = 0.0
    for name in ("a", "b"):
        places = [s for s in range(6) if groups[0][s] == name]
        x, g = scores[0, places, 0], np.array([grades[0][s] for s in places])
        if objective == "listwise":
            expected -= (g / g.sum() * log_softmax(x)).sum()
        else:
            pairs = [(i, j) for i in range(len(g)) for j in range(len(g)) if g[i] > g[j]]
            expected += np.mean([np.log1p(np.exp(x[j] - x[i])) for i, j in pairs])
    np.testing.assert_allclose([total, count], [expected, 2], rtol=1e-5)


def test_multiple_choice_leaves_missing_choices_out():
    task = MultipleChoice(name="m", source="s", choices=("options",), most=3, answers=("A", "B", "C"))
    rows = [Row({"options": ["x", "y"], "label": "B"}, "a"), Row({"options": ["x", "y", "z"], "label": ""}, "b")]
    labels = np.full((1, 7, 2), task.missing, np.int32)
    for place, row in enumerate(rows):
        for number in range(3):
            window = Window(number, np.zeros(1), None, None, None)
            labels[0, 3 * place + number] = task.window_label(task.parse(row), window)
    scores = RNG.normal(size=(1, 7, 1)).astype(np.float32)
    total, count = task.loss(scores, labels)
    np.testing.assert_allclose([total, count], [-log_softmax(scores[0, :2, 0])[1], 1], rtol=1e-5)
    assert task.texts_of(Row({"text": "q", **rows[0].columns}, "a"), Source(name="s")) == [("q", "x"), ("q", "y"), ("q", "")]
    for columns, message in (
        ({"options": ["x"], "label": "B"}, "a choice that the row does not have"),
        ({"options": ["x"] * 4, "label": "B"}, "has 4 choices, and most is 3"),
        ({"options": "x", "label": "B"}, "is no list of texts"),
        ({"options": ["x"], "label": "D"}, "none of the answers"),
    ):
        with pytest.raises((UserError, ValueError), match=message):
            task.parse(Row(columns, "there"))


def test_ordinal():
    task = Ordinal(name="o", source="s").filled([Row({"label": str(n)}, "a") for n in (10, 9, 1)], None)
    assert task.labels == ("1", "9", "10")
    outputs, labels = RNG.normal(size=(40, 2)).astype(np.float32), RNG.integers(3, size=40)
    predicted = (outputs > 0).sum(axis=1)
    assert task.scores(outputs, labels)["kappa"] == pytest.approx(cohen_kappa_score(labels, predicted, weights="quadratic"))
    shares = task.probabilities(np.array([2.0, 3.0]))  # "above 9" cannot be likelier than "above 1"
    assert list(shares.values()) == pytest.approx([1 / (1 + np.exp(2)), 0, 1 / (1 + np.exp(-2))])
    total, count = task.loss(outputs[None], np.where(labels == 0, -1, labels)[None])
    above = labels[:, None] > np.arange(2)
    expected = np.log1p(np.exp(np.where(above, -outputs, outputs))).mean(axis=1)[labels > 0].sum()
    np.testing.assert_allclose([total, count], [expected, (labels > 0).sum()], rtol=1e-5)
    for labels, line in (
        (("good",), r"its labels \(good\) are not numbers, so their order is not known; give labels, the lowest first"),
        (
            ("3", "nan", "1", "2", "-inf"),
            "its labels -inf, nan are not finite numbers, so their order is not known; give labels",
        ),
        (("1", "2", "1.0"), "its labels '1' and '1.0' are one number, .*, or write the number in one way"),
    ):
        with pytest.raises(UserError, match=f"task 'o': {line}"):
            Ordinal(name="o", source="s").filled([Row({"label": label}, "a") for label in labels], None)
    chosen = Ordinal(name="o", source="s", labels=("1", "nan", "1.0")).filled([], None)
    assert chosen.labels == ("1", "nan", "1.0")


def test_groups_are_divided_in_order():
    rows = [Row({"query": name}, "a") for name in "abacaab"]
    together = units.units_of(np.arange(7, dtype=np.int32), rows, [Ranking(name="r", source="s", group="query", together=3)])
    assert [unit.tolist() for unit in together] == [[0, 2, 4], [5], [1, 6], [3]]


def test_setfit():
    contrast, head = setfit("sim", "label", 20, 30, rate=2e-5, head_rate=1e-2)
    assert (contrast.steps, contrast.learning_rate, contrast.weights) == (20, 2e-5, {"sim": 1.0, "label": 0.0})
    assert [rule.train for rule in head.rules] == [True, False]
    with pytest.raises(UserError, match="both 'sim'"):
        setfit("sim", "sim", 1, 1, rate=1, head_rate=1)
