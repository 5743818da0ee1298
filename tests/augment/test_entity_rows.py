"""Rows for taggers: words and labels stay beside each other, tags stay valid."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_word_edits import entities, tagged

from mtl_jax import Classification, Source, Tagging, UserError
from mtl_jax.augment import Concatenate, MentionReplacement
from mtl_jax.data import augmentations
from mtl_jax.data.formats.rows import Row
from mtl_jax.tasks import bio

SAID = Source("said", rows=[])
TASK = Tagging(name="t", source="said")


def maker(augmentation, rows):
    return augmentation.maker(augmentations.rows_of(SAID, [TASK], rows))


@settings(max_examples=40, deadline=None)
@given(st.lists(tagged(), min_size=1, max_size=4), st.integers(0, 10**6), st.booleans())
def test_tags_stay_valid_and_with_their_words(cases, seed, as_text):
    rows = []
    for n, (words, tags) in enumerate(cases):
        marked = [f"{word}/{tag}" for word, tag in zip(words, tags, strict=True)]
        lines = ("f", [10 * n + place for place in range(len(words))])
        rows.append(Row({"text": " ".join(marked) if as_text else marked, "tags": tags}, f"f:{n}", None if as_text else lines))
    generators = [np.random.default_rng([seed, n]) for n in range(len(rows))]
    for row, made in zip(rows, maker(Concatenate(), rows)(rows, generators), strict=True):
        text, tags = made.columns["text"], made.columns["tags"]
        words = text.split() if as_text else text
        assert len(words) == len(tags) == len(tags if made.words is None else made.words[1])
        assert [word.split("/")[1].replace("I-", "B-") for word in words] == [str(tag).replace("I-", "B-") for tag in tags]
        assert not bio.invalid_tags(tags)
        assert words[: len(row.columns["tags"])] == (row.columns["text"].split() if as_text else row.columns["text"])
    if not any(entities(*case) for case in cases):
        return
    for row, made in zip(rows, maker(MentionReplacement(mentions=0.7), rows)(rows, generators), strict=True):
        if isinstance(made, str):
            continue
        text, tags = made.columns["text"], made.columns["tags"]
        words = text.split() if as_text else text
        old = row.columns["text"].split() if as_text else row.columns["text"]
        assert len(words) == len(tags)
        assert not bio.invalid_tags(tags)
        before, after = entities(old, row.columns["tags"]), entities(words, tags)
        assert [kind for kind, _ in before] == [kind for kind, _ in after]
        assert {tuple(x) for _, x in after} <= {
            tuple(x)
            for other in rows
            for _, x in entities(other.columns["text"].split() if as_text else other.columns["text"], other.columns["tags"])
        }
        outside = [
            [word for word, tag in zip(*pair, strict=True) if tag == "O"]
            for pair in ((old, row.columns["tags"]), (words, tags))
        ]
        assert outside[0] == outside[1]


def test_mentions_of_other_lengths_and_other_columns():
    rows = [
        Row({"text": ["Ann", "met", "Bob"], "tags": ["B-P", "O", "B-P"], "pos": ["N", "V", "N"]}, "f:1", ("f", [1, 2, 3])),
        Row({"text": ["New", "York", "City", "is", "big"], "tags": "B-L I-L I-L O O", "pos": list("NNNVA")}, "f:2"),
        Row({"text": ["in", "Rome"], "tags": ["O", "B-L"], "pos": ["I", "N"]}, "f:3", ("f", [8, 9])),
    ]
    make = maker(MentionReplacement(mentions=1.0), rows)
    ann, york, rome = make(rows, [np.random.default_rng(0) for _ in rows])
    assert ann.columns["text"] == ["Bob", "met", "Ann"]
    assert ann.columns["pos"] == [None, "V", None]
    assert york.columns["text"] == ["Rome", "is", "big"]
    assert york.columns["tags"] == ["B-L", "O", "O"]
    assert rome.columns == {
        "text": ["in", "New", "York", "City"],
        "tags": ["O", "B-L", "I-L", "I-L"],
        "pos": ["I", None, None, None],
    }
    assert rome.words == ("f", [8, 9, 9, 9])


def test_what_does_not_fit_is_one_line():
    task = Classification(name="c", source="said", column="c")
    for augmentation in (Concatenate(), MentionReplacement()):
        with pytest.raises(
            UserError, match="does not fit task 'c', a Classification with labels of texts: it keeps labels of w"
        ):
            augmentations.check([dataclasses.replace(SAID, augment=(augmentation,))], [task])
    with pytest.raises(UserError, match=r"mentions is 1\.2; it must be at least 0 and at most 1"):
        augmentations.check([dataclasses.replace(SAID, augment=(MentionReplacement(mentions=1.2),))], [TASK])
    with pytest.raises(UserError, match="source 'said': no training row has an entity"):
        maker(MentionReplacement(), [Row({"text": "a b", "tags": "N V"}, "f:1")])
