import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

from mtl_jax.tasks import metrics

TEXTS = ["the cat sat on the mat", "a dog runs in the park", "no"]
RIGHT = [["the cat is on the mat", "there is a cat on the mat"], ["a dog is running in the park"], ["yes", "no no", "no"]]


def test_bleu_and_chrf_of_sacrebleu():
    one = [[found[0]] for found in RIGHT]
    found = metrics.text_scores("bleu", TEXTS, one)
    stream = [found[0] for found in RIGHT]
    assert found == {
        "bleu": pytest.approx(BLEU().corpus_score(TEXTS, [stream]).score / 100),
        "chrf": pytest.approx(CHRF().corpus_score(TEXTS, [stream]).score / 100),
    }
    assert 0 < found["bleu"] < 1
    assert metrics.text_scores("chrf", TEXTS, one) == found


def test_several_references_of_which_there_are_not_always_as_many():
    streams = [[RIGHT[0][0], RIGHT[1][0], "yes"], [RIGHT[0][1], None, "no no"], [None, None, "no"]]
    found = metrics.text_scores("bleu", TEXTS, RIGHT)
    assert found["bleu"] == pytest.approx(BLEU().corpus_score(TEXTS, streams).score / 100)
    assert found["chrf"] == pytest.approx(CHRF().corpus_score(TEXTS, streams).score / 100)


def test_rouge_of_the_nearest_reference():
    names = ("rouge1", "rouge2", "rougeL")
    scorer, known = RougeScorer(names, use_stemmer=True), list(zip(TEXTS, RIGHT, strict=True))
    expected = {
        name: np.mean([max(scorer.score(one, text)[name].fmeasure for one in right) for text, right in known]) for name in names
    }
    found = metrics.text_scores("rougeL", TEXTS, RIGHT)
    assert found == pytest.approx(expected)
    assert found["rouge1"] > found["rouge2"] > 0


def test_signatures_say_how_and_by_which_version():
    assert set(metrics.signatures("bleu", RIGHT)) == {"bleu", "chrf"}
    assert "|tok:13a|" in metrics.signatures("bleu", RIGHT)["bleu"]
    assert metrics.signatures("rouge2", RIGHT)["rouge2"].startswith("rouge-score:0.")
    assert metrics.signatures("token_accuracy", RIGHT) == {}


@pytest.mark.parametrize(
    ("references", "count"), [([["a"], ["b c"]], "1"), ([["a", "b"], ["c", "d"]], "2"), ([["a"], ["b", "c"]], "var")]
)
def test_signatures_say_how_many_references_there_were(references, count):
    for name, signature in metrics.signatures("bleu", references).items():
        assert signature.startswith(f"nrefs:{count}|"), name


def test_nothing_to_measure():
    assert metrics.text_scores("bleu", [], []) == {"bleu": 0.0, "chrf": 0.0}
    assert metrics.text_scores("token_accuracy", ["a"], [["a"]]) == {}
