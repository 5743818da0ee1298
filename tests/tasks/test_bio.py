import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from seqeval.metrics.sequence_labeling import get_entities

from mtl_jax.tasks import bio

LABELS = ("B-loc", "B-per", "I-loc", "I-per", "O")
tags = st.lists(st.sampled_from(LABELS), max_size=8)


def test_entities_of_a_sentence():
    assert bio.entities(["B-per", "I-per", "O", "B-loc", "B-loc"]) == [("per", 0, 2), ("loc", 3, 4), ("loc", 4, 5)]
    assert bio.entities(["O", "O"]) == bio.entities([]) == []
    assert bio.entities(["I-per", "I-per", "I-loc"]) == [("per", 0, 2), ("loc", 2, 3)]  # as conlleval reads it


@given(tags)
def test_entities_are_those_of_seqeval(tags):
    assert bio.entities(tags) == [(name, first, last + 1) for name, first, last in get_entities(tags)]


@given(tags)
def test_repairing_makes_a_valid_sequence_of_the_same_entities(tags):
    assert bio.invalid_tags(bio.repaired(tags)) == []
    assert bio.entities(bio.repaired(tags)) == bio.entities(tags)
    assert sum(a != b for a, b in zip(tags, bio.repaired(tags), strict=True)) == len(bio.invalid_tags(tags))


def test_a_tag_without_its_beginning_is_found():
    assert bio.invalid_tags(["I-per", "I-per", "B-loc", "I-per"]) == [0, 3]
    assert bio.invalid_tags(["B-per", None, "I-loc", "I-per"]) == [3]  # anything may follow a tag that is not known


def test_which_label_sets_are_entities():
    assert bio.is_bio(LABELS)
    assert not bio.is_bio(("NOUN", "O", "VERB"))
    assert not bio.is_bio(())
    assert not any(map(bio.is_tag, ("0", "PER", "b-per", "S-per", "B-", "I", "")))
    assert bio.has_entities(("0", "O", "I-per"))
    assert not bio.has_entities(("NOUN", "O", "B-"))


@given(st.integers(0, 2**32 - 1), st.integers(0, 5), st.booleans())
def test_decoding_finds_the_best_valid_sequence(seed, length, whole):
    """Against every sequence there is. Small integers: ties and broken sequences are frequent."""
    labels = LABELS if whole else ("B-loc", "I-loc", "I-per", "O")  # here nothing may begin a person
    scores = np.random.default_rng(seed).integers(-3, 4, (length, len(labels))).astype(np.float32)

    def total(sequence):
        return sum(scores[word, label] for word, label in enumerate(sequence))

    sequences = itertools.product(range(len(labels)), repeat=length)
    best = max(total(s) for s in sequences if not bio.invalid_tags([labels[label] for label in s]))
    found = bio.decode(scores, labels)
    assert bio.invalid_tags([labels[label] for label in found]) == []
    assert total(found) == best


def test_other_label_sets_are_decoded_word_by_word():
    scores = np.random.default_rng(0).normal(size=(7, 3))
    np.testing.assert_array_equal(bio.decode(scores, ("ADJ", "NOUN", "VERB")), scores.argmax(1))


def test_entity_scores_by_hand():
    gold = [["B-per", "I-per", "O"], ["B-loc", "O"]]
    found = [["B-per", "O", "O"], ["B-loc", "B-per"]]  # an end too early, one right, one too many
    of_all, by_type = bio.entity_scores(gold, found)
    assert of_all == pytest.approx((1 / 3, 1 / 2, 2 / 5))
    assert by_type == {"loc": (1, 1, 1), "per": (0, 0, 0)}
    assert bio.entity_scores([["O"]], [["O"]]) == ((0, 0, 0), {})
    assert bio.entity_scores([["O"]], [["B-per"]])[0] == (0, 0, 0)


def read_tags(path: Path) -> list[list[str]]:
    """The last column of a file of words and tags."""
    sentences = path.read_text(encoding="utf-8").replace("\r\n", "\n").strip().split("\n\n")
    return [[line.split("\t")[-1].split(" ")[-1] for line in sentence.split("\n")] for sentence in sentences]


@pytest.mark.parametrize(
    ("system", "published"),
    [
        ("uh_ritual", 41.86),
        ("spinningbytes.txt", 40.78),
        ("sjtu_adapt.txt", 40.42),
        ("arcada", 39.98),
        ("flytxt", 38.35),
        ("mic-cis.txt", 37.06),
        ("drexel_cci", 26.30),
    ],
)
def test_published_figures_from_the_systems_own_files(shared_data, system, published):
    """Entity F1 of the WNUT 2017 shared task (Derczynski et al. 2017)."""
    gold = read_tags(shared_data / "wnut17" / "emerging.test.annotated")
    found = read_tags(shared_data / "wnut17" / "submissions" / system)
    assert [len(tags) for tags in gold] == [len(tags) for tags in found]
    of_all, _ = bio.entity_scores(gold, found)
    assert 100 * of_all.f1 == pytest.approx(published, abs=0.01)
