import numpy as np
import pytest
from sklearn.metrics import f1_score, matthews_corrcoef

from mtl_jax.core.errors import UserError
from mtl_jax.tasks import metrics

LABELS = ("none", "against", "favor")


def test_by_hand():
    gold, found = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 0])
    scores = metrics.scores(gold, found, "f1:against+favor", LABELS)
    assert scores == pytest.approx(
        {
            "accuracy": 3 / 5,
            "macro_f1": (1 / 2 + 4 / 5 + 0) / 3,
            "macro_recall": (1 / 2 + 1 + 0) / 3,
            "matthews": (3 * 5 - (2 * 2 + 2 * 3)) / np.sqrt((25 - 4 - 9) * (25 - 4 - 4 - 1)),
            "f1:against+favor": (4 / 5 + 0) / 2,
        }
    )


def test_against_sklearn():
    rng = np.random.default_rng(0)
    gold, found = rng.integers(0, 3, 60), rng.integers(0, 3, 60)
    scores = metrics.scores(gold, found, "f1:favor", LABELS)
    assert scores["f1:favor"] == pytest.approx(f1_score(gold == 2, found == 2))
    assert scores["matthews"] == pytest.approx(matthews_corrcoef(gold, found))
    assert metrics.scores(gold, found, "accuracy", LABELS).keys() == set(metrics.NAMES)


def test_nothing_varies():
    same = np.zeros(3, int)
    expected = {"accuracy": 1.0, "macro_f1": 1.0, "macro_recall": 1.0, "matthews": 0.0, "f1:favor": 0.0}
    assert metrics.scores(same, same, "f1:favor", LABELS) == expected


def test_names():
    assert metrics.names("macro_f1") == metrics.NAMES
    assert metrics.names("f1:favor") == (*metrics.NAMES, "f1:favor")
    assert metrics.names("f1:") == metrics.NAMES
    assert metrics.f1_labels("f1:favor+against", LABELS) == [2, 1]
    assert metrics.f1_labels("f1:a+b", ("a+b", "c")) == [0]
    with pytest.raises(UserError, match=r"metric 'f1:x': 'x' is not in the label set \(none, against, favor\)"):
        metrics.f1_labels("f1:x", LABELS)


@pytest.mark.parametrize(
    ("name", "metric", "published"),
    [("emotion", "macro_f1", 79.83), ("irony", "f1:1", 62.48), ("offensive", "macro_f1", 81.55)],
)
def test_tweeteval_figures_from_the_systems_own_files(shared_data, name, metric, published):
    folder = shared_data / "tweeteval"
    gold, found = (
        np.array(path.read_text().split(), int)
        for path in (folder / name / "test_labels.txt", folder / "predictions" / f"{name}.txt")
    )
    labels = tuple(map(str, range(gold.max() + 1)))
    assert 100 * metrics.scores(gold, found, metric, labels)[metric] == pytest.approx(published, abs=0.005)
