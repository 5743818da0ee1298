"""Copies between lists of texts: the pairs of a hand-written comparison, and the edges of every rule."""

import itertools
import random
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_jax import UserError, audit
from mtl_jax.audit import grams, minhash, text_keys

WORDS = ["red", "fox", "house", "dog", "river", "stone", "runs", "sleeps", "over", "under", "a", "the", "in", "old", "new"]


def words_of(text: str) -> list[str]:
    """The words of a text, by hand."""
    kept = "".join(character if character.isalnum() else " " for character in text.lower())
    return kept.split()


def gram_set(text: str) -> set[tuple[str, ...]]:
    words = words_of(text)
    return {(word,) for word in words} | set(itertools.pairwise(words))


def by_hand(train: list[str], held_out: list[str], threshold: float) -> list[tuple[int, int, float]]:
    pairs = []
    for i, text in enumerate(train):
        for j, other in enumerate(held_out):
            first, second = gram_set(text), gram_set(other)
            if not first or not second:
                continue
            similarity = len(first & second) / len(first | second)
            least = threshold if min(len(words_of(text)), len(words_of(other))) >= 8 else max(threshold, 0.9)
            if "".join(words_of(text)) == "".join(words_of(other)):
                pairs.append((i, j, 1.0))
            elif similarity >= least:
                pairs.append((i, j, similarity))
    return pairs


def sentences(count: int, seed: int) -> list[str]:
    """Sentences of few words, so that many are near one another; some are edits of the one before."""
    rng = random.Random(seed)
    result = [" ".join(rng.choices(WORDS, k=rng.randint(1, 16))) for _ in range(count)]
    for index in range(1, count, 2):
        words = result[index - 1].split()
        words[rng.randrange(len(words))] = rng.choice(["x", "x y", "", "RED"])
        result[index] = " ".join(words)
    return result


def test_the_pairs_are_those_of_a_comparison_of_all_pairs_by_hand():
    train, held_out = sentences(300, 0), sentences(60, 1) + sentences(300, 0)[1:120:2]
    expected = by_hand(train, held_out, 0.7)
    pairs = audit.near_copies(train, held_out)
    assert len(expected) > 90
    assert set(pairs) <= set(expected)
    assert len(pairs) >= 0.99 * len(expected)
    assert pairs == sorted(pairs)


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9])
def test_sets_exactly_at_the_threshold_are_found_as_often_as_the_arithmetic_says(threshold):
    rng = np.random.default_rng(0)
    common, apart = {0.5: (10, 5), 0.7: (14, 3), 0.8: (16, 2), 0.9: (18, 1)}[threshold]
    sets = []
    for _ in range(3000):
        drawn = rng.choice(2**40, common + 2 * apart, replace=False)
        sets += [np.sort(drawn[: common + apart]), np.sort(drawn[apart:])]
    starts = np.arange(len(sets) + 1) * (common + apart)
    texts = grams.Grams(starts, np.concatenate(sets), np.full(len(sets), 9, np.int32))
    pairs, similarities = minhash.similar(texts, threshold, np.arange(0, len(sets), 2), np.arange(1, len(sets), 2))
    assert (pairs[:, 1] == pairs[:, 0] + 1).all()
    assert similarities.tolist() == [threshold] * len(pairs)
    plan = minhash.bands(threshold)
    assert plan.recall(threshold) >= minhash.RECALL
    assert len(pairs) / 3000 == pytest.approx(plan.recall(threshold), abs=0.004)


def test_one_word_in_ten_replaced_is_a_copy_and_one_in_five_is_not():
    text = "an old dog sleeps under that red house by our river"
    assert audit.near_copies([text], [text.replace("red", "blue")]) == [(0, 0, pytest.approx(18 / 24))]
    assert audit.near_copies([text], [text.replace("red", "blue").replace("old", "new")]) == []


def test_one_other_word_makes_another_short_text():
    assert audit.near_copies(["what is the weather in Paris"], ["what is the weather in Rome"]) == []
    assert audit.near_copies(["what is the weather in Paris"], ["What is the weather, in Paris?"]) == [(0, 0, 1.0)]


@pytest.mark.parametrize(
    ("text", "copy"),
    [
        ("a moore 's film !", "A Moore\u2019s film"),
        ("do n't go", "don't go"),
        ("".join(chr(ord(letter) + 0xFEE0) for letter in "fullwidth"), "full width"),
        ("the ﬁsh", "the fish"),
        ("Straße", "STRASSE"),
        (unicodedata.normalize("NFD", "Amélie"), "amélie"),
        ("İstanbul", unicodedata.normalize("NFD", "İSTANBUL")),
        ("so good 😂", "So good! 🎉"),
        ("❤️ yes", "yes"),
        ("हिन्दी में", "हिन्दी, में"),
    ],
)
def test_case_forms_of_unicode_spaces_and_punctuation_do_not_count(text, copy):
    assert audit.near_copies([text], [copy]) == [(0, 0, 1.0)]


def test_texts_that_differ_in_a_letter_or_a_vowel_sign_are_different():
    assert audit.near_copies(["cafe", "हिन्दी"], ["café", "हन्दी"]) == []


def test_a_script_without_spaces_is_compared_by_its_characters():
    text = "一個男人在公園裡騎著一輛紅色的自行車"
    other = "兩個孩子正在海邊的沙灘上堆一座很大的城堡"
    assert audit.near_copies([text], [text.replace("紅", "藍"), other, text + "。"]) == [
        (0, 0, pytest.approx(28 / 38)),
        (0, 2, 1.0),
    ]
    assert audit.near_copies(["猫"], ["猫!", "犬"]) == [(0, 0, 1.0)]


def test_an_empty_text_is_a_copy_of_nothing_and_one_without_letters_of_itself_alone():
    assert audit.near_copies(["", "  ", "?!", "a"], ["", "?!", "??", "\n"]) == [(2, 1, 1.0)]
    assert audit.near_copies([], ["a"]) == audit.near_copies(["a"], []) == audit.copies_within([]) == []


def test_a_pair_is_a_copy_in_either_order():
    assert audit.near_copies([("A b", "c d")], [("c  d", "a b!"), ("c d", "a x"), "a b c d"]) == [(0, 0, 1.0)]


def test_pairs_are_near_copies_where_both_their_texts_are():
    long = "an old dog sleeps under that red house by our river while the rain falls on the roof"
    other = long.replace("red", "blue")
    assert audit.near_copies([(long, "It is raining.")], [("it is raining", other), (long, "It is dry.")]) == [
        (0, 0, pytest.approx(29 / 35, abs=0.05))
    ]


def test_an_iterator_is_a_list():
    assert audit.near_copies(iter(["a b", "Yes!"]), (text for text in ["no", "yes"])) == [(1, 1, 1.0)]
    assert audit.copies_within(iter(["Yes!", "no", "yes"])) == [(0, 2, 1.0)]


def test_copies_within_a_list_are_each_named_once():
    texts = ["Yes!", "no", "yes", "YES", "no"]
    assert audit.copies_within(texts) == [(0, 2, 1.0), (0, 3, 1.0), (1, 4, 1.0), (2, 3, 1.0)]
    many = sentences(300, 0)
    expected = {(i, j, similarity) for i, j, similarity in by_hand(many, many, 0.7) if i < j}
    found = audit.copies_within(many)
    assert set(found) <= expected
    assert len(found) == len(set(found)) >= 0.99 * len(expected)


def test_another_process_finds_the_same_pairs():
    code = "from mtl_jax import audit; from test_copies import sentences; print(audit.copies_within(sentences(200, 2)))"
    there = subprocess.run(
        [sys.executable, "-c", code],
        cwd=__file__.rpartition("/")[0],
        env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout.strip() == str(audit.copies_within(sentences(200, 2)))
    assert grams.grams(["the fox"]).hashes.tolist() == [5698205063352, 15504523215734, 16553059007098]


def test_batches_of_texts_do_not_change_their_n_grams(monkeypatch):
    texts = [*sentences(100, 3), ("a b", "c"), "", "猫が好き"]
    whole = grams.grams(texts)
    monkeypatch.setattr(grams, "CHUNK", 50)
    for one, other in zip(whole, grams.grams(texts), strict=True):
        np.testing.assert_array_equal(one, other)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=30), max_size=6))
def test_any_text_with_letters_is_a_copy_of_itself_in_capitals_between_dashes(texts):
    texts = [text for text in texts if text_keys.letters(text)]
    pairs = audit.near_copies(texts, [f"--{text}--" for text in texts])
    assert {(index, index, 1.0) for index in range(len(texts))} <= set(pairs)


@pytest.mark.parametrize("threshold", [0, -1, 1.1, float("nan"), "high", True, None])
def test_a_threshold_outside_its_range_is_one_line(threshold):
    with pytest.raises(UserError, match=r"threshold is .*; it must be a number above 0 and at most 1"):
        audit.near_copies(["a"], ["b"], threshold)


def test_what_is_no_list_of_texts_is_one_line():
    with pytest.raises(UserError, match="held_out_texts is a text; it must be a list of texts"):
        audit.near_copies(["a"], "b")
    with pytest.raises(UserError, match=r"texts\[1\] is a int; it must be a text, or a pair of texts"):
        audit.copies_within(["a", 3])
