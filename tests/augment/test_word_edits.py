"""Edits of words: labels of words and answers stay at what they label, whatever is drawn."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_jax import Seq2Seq, Source, Span, Tagging, UserError
from mtl_jax.augment import Aeda, CharacterNoise, Cutoff, Eda, texts
from mtl_jax.augment.aligned import NEW, Word, edited
from mtl_jax.data import augmentations
from mtl_jax.data.formats.rows import Row
from mtl_jax.tasks import bio

TAGGED = Source("said", rows=[])
ASKED = Source("asked", rows=[], text="question", pair="context")
EDITS = (Eda(swap=0.4, delete=0.3, insert=0.4, substitute=0.4), Aeda(most=0.6), CharacterNoise(words=0.8), Cutoff(cut=0.4))


def made(augmentation, source, task, row, seed):
    other = Row({"text": "x yy", "question": "x ?", "context": "zz", "tags": "O O", "answers": []}, "f:2")  # words to draw
    about = augmentations.rows_of(source, [task], [row, other])
    return augmentation.maker(about)([row], [np.random.default_rng(seed)])[0]


@st.composite
def tagged(draw):
    """(words, valid tags), None among the tags for words without one"""
    words = draw(st.lists(st.sampled_from(["a", "bbb", "(cc)", "d.d.", "eeee"]), min_size=1, max_size=9))
    tags = []
    for _ in words:
        before = tags[-1] if tags else "O"
        inside = ["I-X", "I-Y"] if before is None else [] if before == "O" else [f"I-{before[2:]}"]
        tags.append(draw(st.sampled_from(["O", "O", "B-X", "B-Y", None, *inside])))
    return words, tags


def entities(words, tags):
    """(type, words) of every entity, in order."""
    return [(x.type, words[x.start : x.end]) for x in bio.entities([tag or "O" for tag in tags])]


@settings(max_examples=60, deadline=None)
@given(tagged(), st.integers(0, 10**6), st.sampled_from(EDITS))
def test_entities_stay_whole_and_tags_valid(case, seed, edit):
    words, tags = case
    row = Row({"text": words, "tags": tags}, "f:1", ("f", list(range(len(words)))))
    result = made(edit, TAGGED, Tagging(name="t", source="said"), row, seed)
    if isinstance(result, str):
        assert result in ("as it was", "empty")
        return
    new_words, new_tags = result.columns["text"], result.columns["tags"]
    assert len(new_words) == len(new_tags) == len(result.words[1])
    assert not bio.invalid_tags(new_tags)
    if not isinstance(edit, CharacterNoise):  # which changes the words of entities, too, and never their number
        assert entities(new_words, new_tags) == entities(words, tags)
    else:
        assert new_tags == tags
    assert [tag for tag in new_tags if tag != "O"] == [tag for tag in tags if tag != "O"]


@settings(max_examples=60, deadline=None)
@given(tagged(), st.integers(0, 10**6), st.sampled_from(EDITS))
def test_words_that_stay_keep_their_plain_tags(case, seed, edit):
    """Parts of speech: a word that is moved takes its tag along, and an inserted word has none."""
    words = [f"{word}{place}" for place, word in enumerate(case[0])]
    row = Row({"text": " ".join(words), "tags": " ".join(f"TAG{place}" for place in range(len(words)))}, "f:1")
    result = made(edit, TAGGED, Tagging(name="t", source="said"), row, seed)
    if isinstance(result, str):
        return
    for word, tag in zip(result.columns["text"].split(), result.columns["tags"], strict=True):
        if tag is not None and word in words and not isinstance(edit, Eda):
            assert word == words[int(tag[3:])]
        elif tag is None:
            assert isinstance(edit, Eda | Aeda)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(0, 10**6), st.sampled_from(EDITS))
def test_answers_stay_at_their_text(data, seed, edit):
    context = data.draw(st.text(alphabet="ab.\n ", min_size=1, max_size=40).filter(str.strip))
    start = data.draw(st.integers(0, len(context) - 1))
    answer = context[start : data.draw(st.integers(start + 1, len(context)))]
    row = Row({"question": "what is it ?", "context": context, "answers": [{"text": answer, "start": start}]}, "f:1")
    if not answer.strip():
        return
    result = made(edit, ASKED, Span(name="s", source="asked"), row, seed)
    if isinstance(result, str):
        return
    (moved,) = result.columns["answers"]
    assert moved["text"] == answer
    assert result.columns["context"][moved["start"] :].startswith(answer)


def test_white_space_stays_and_origins_give_labels_and_lines():
    row = Row({"text": "a  b\nc d", "tags": "N V N N", "lemma": ["a", "b", "c", "d"]}, "f:1", ("f", [3, 4, 5, 6]))
    about = augmentations.rows_of(TAGGED, [Tagging(name="t", source="said")], [row])
    new = [Word("b", 1), Word("!", NEW), Word("x", 2), Word("d", 3)]
    result = edited(row, about, lambda words, rng: new, np.random.default_rng(0))
    assert result.columns == {"text": "b !\nx d", "tags": ["V", None, "N", "N"], "lemma": ["b", None, "c", "d"]}
    assert result.words == ("f", [4, 4, 5, 6])


@pytest.mark.parametrize(("text", "tags"), [("one word", "not said"), ("one", "_"), ("one word more", "")])
def test_a_value_that_means_no_label_stays(text, tags):
    task = Tagging(name="t", source="said", unlabelled=("", "_", "not said"))
    result = made(Eda(insert=1.0, substitute=1.0), TAGGED, task, Row({"text": text, "tags": tags}, "f:1"), 0)
    assert result.columns["text"] != text
    assert result.columns["tags"] == tags


def test_what_does_not_fit_is_one_line():
    writes, tagger = Seq2Seq(name="w", source="said", column="to"), Tagging(name="t", source="said")
    for edit in (Eda(), Cutoff()):
        source = dataclasses.replace(TAGGED, augment=(edit,))
        with pytest.raises(UserError, match=r"source 'said': augment.0 \(\w+\) does not fit task 'w', a Seq2Seq with target"):
            augmentations.check([source], [tagger, writes])
        augmentations.check([source], [tagger])
    augmentations.check([dataclasses.replace(TAGGED, augment=(Aeda(), CharacterNoise()))], [writes])
    for wrong, words in (
        (Eda(share=1.5), r"share is 1.5; it must be at least 0 and at most 1"),
        (Eda(swap=-0.1), r"swap is -0.1; it must be"),
        (Eda(swap=0.0, delete=0.0, insert=0.0, substitute=0.0), "swap, delete, insert and substitute are all 0"),
        (Aeda(most=0.0), "most is 0"),
        (CharacterNoise(words=2), "words is 2; it must be"),
        (CharacterNoise(shortest=1), "shortest is 1"),
        (Cutoff(cut=1.0), "cut is 1; it must be above 0 and below 1"),
        (Cutoff(added=-1), "added is -1"),
    ):
        with pytest.raises(UserError, match=rf"source 'said': augment.0 \(\w+\): {words}"):
            augmentations.check([dataclasses.replace(TAGGED, augment=(wrong,))], [tagger])
    own = SimpleNamespace(name="own", source="said", label_level="token", needs_offsets=False, corrupts=False)
    with pytest.raises(UserError, match=r"augment.0 \(Aeda\) does not fit task 'own'"):
        augmentations.check([TAGGED], [own], [Aeda()])
    with pytest.raises(UserError, match="puts texts of other rows into a row, so one row would count more than once"):
        augmentations.check([dataclasses.replace(TAGGED, augment=(Eda(),))], [tagger], private=True)
    with pytest.raises(UserError, match="adds rows, so one row would count"):
        augmentations.check([dataclasses.replace(TAGGED, augment=(Aeda(added=1),))], [tagger], private=True)


def test_shares_are_means():
    """Over many texts, as many words are deleted, inserted, replaced as the shares say."""
    long = [" ".join(f"w{place}" for place in range(20)) + f" t{number}" for number in range(150)]
    only = {"swap": 0.0, "delete": 0.0, "insert": 0.0, "substitute": 0.0}
    deleted = texts(Eda(**{**only, "delete": 0.2}), long)
    assert 0.17 < 1 - np.mean([len(text.split()) for text in deleted]) / 21 < 0.23
    inserted = texts(Eda(**{**only, "insert": 0.2}), long)
    assert 0.17 < np.mean([len(text.split()) for text in inserted]) / 21 - 1 < 0.23
    swapped = texts(Eda(**{**only, "swap": 0.2}), long)
    assert all(sorted(new.split()) == sorted(old.split()) and new != old for new, old in zip(swapped, long, strict=True))
    cut = texts(Cutoff(cut=0.25), long)
    assert {len(text.split()) for text in cut} == {16}
    typed = texts(CharacterNoise(words=0.5, shortest=2), long)
    assert all(len(new.split()) == len(old.split()) for new, old in zip(typed, long, strict=True))
    assert texts(Eda(), long, seed=1) == texts(Eda(), long, seed=1) != texts(Eda(), long, seed=2)
