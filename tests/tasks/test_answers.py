import json

import pytest

from mtl_jax.tasks.metrics import answer_scores, exact, f1, normalise

# Five systems on the questions of XQuAD (English) that they answered: how many, exact match, F1.
SYSTEMS = {
    "bert": (1190, 74.87, 86.32),
    "r-net+": (1190, 72.77, 83.41),
    "slqa+": (1190, 72.18, 82.85),
    "match-lstm_with_ans-ptr": (1190, 61.09, 72.67),
    "logistic_regression_baseline": (1188, 34.60, 45.93),
}


def test_normalisation():
    assert normalise("The  U.S. Army,\tan army") == "us army army"
    assert normalise("A-team theatre") == "ateam theatre"  # an article is a word of its own, once punctuation is gone
    assert normalise("An. the") == ""


@pytest.mark.parametrize(
    ("predicted", "gold", "expected"),
    [
        ("the Broncos", ["Broncos"], (1, 1)),
        ("Denver Broncos", ["Broncos"], (0, 2 / 3)),
        ("Denver Broncos", ["Broncos", "Denver Broncos of Denver"], (0, 2 / 3)),
        ("big big cat", ["big cat cat"], (0, 2 / 3)),  # words are counted, not only present
        ("", [], (1, 1)),
        ("something", [], (0, 0)),
        ("", ["something"], (0, 0)),
        ("the", ["something"], (0, 0)),
        ("", ["the", "something"], (0, 0)),  # an article is no answer where there is another
        ("", ["the"], (1, 1)),
    ],
)
def test_scores_by_hand(predicted, gold, expected):
    assert exact(predicted, gold) == expected[0]
    assert f1(predicted, gold) == pytest.approx(expected[1])


def test_means_over_questions():
    assert answer_scores(["a cat", "dog"], [["cat"], ["cat"]]) == {"exact": 0.5, "f1": 0.5}


@pytest.mark.parametrize("system", SYSTEMS)
def test_published_systems(shared_data, system):
    folder = shared_data / "xquad"
    if not folder.is_dir():
        pytest.skip("no xquad in shared/data")
    articles = json.loads((folder / "xquad.en.json").read_text(encoding="utf-8"))["data"]
    predicted = json.loads((folder / "predictions" / f"{system}.json").read_text(encoding="utf-8"))
    questions = [question for article in articles for part in article["paragraphs"] for question in part["qas"]]
    answered = [question for question in questions if question["id"] in predicted]
    gold = [[answer["text"] for answer in question["answers"]] for question in answered]
    found = answer_scores([predicted[question["id"]] for question in answered], gold)
    assert (len(answered), 100 * found["exact"], 100 * found["f1"]) == pytest.approx(SYSTEMS[system], abs=0.01)
