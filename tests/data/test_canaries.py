"""Rows of random words among the training rows."""

import dataclasses

import pytest
import tiny

from mtl_jax import Canaries, Classification, Source, Tagging
from mtl_jax.core.errors import UserError
from mtl_jax.data.canaries import Maker
from mtl_jax.data.corpus import read_sources
from mtl_jax.experiment_checks import check
from mtl_jax.training.experiment_json import from_json, to_json

CANARIES = Canaries(count=3, repeats=2, words=5)


def questions(data, canaries=CANARIES):
    return dataclasses.replace(tiny.experiment("", data).sources[1], canaries=canaries)


TASK = Classification(name="coarse", source="questions", column="coarse")


def test_they_are_planted_after_the_other_rows_and_change_nothing_else(data):
    plain = read_sources([questions(data, Canaries())], [TASK])["questions"]
    planted = read_sources([questions(data)], [TASK])["questions"]
    train, before = planted.rows["train"], plain.rows["train"]
    assert list(train[: len(before)]) == list(before)
    assert len(train) == len(before) + 6 == len(planted.text_digests["train"])
    assert train[-6:][0] == train[-6:][1] != train[-6:][2]
    assert planted.rows["test"] == plain.rows["test"]
    words = {word for row in before for word in row.columns["text"].split()}
    for row in train[-6:]:
        assert len(row.columns["text"].split()) == 5
        assert set(row.columns["text"].split()) <= words
        assert row.columns["coarse"] in ("HUM", "LOC")
        assert row.where == f"canary {row.where.split()[1]} of source questions"
    assert read_sources([questions(data)], [TASK])["questions"].rows["train"] == train
    other = read_sources([questions(data, dataclasses.replace(CANARIES, seed=1))], [TASK])["questions"]
    assert other.rows["train"][-1] != train[-1]


def test_candidates_differ_in_the_text_or_where_texts_are_written_in_the_target(data):
    train = read_sources([questions(data, Canaries())], [TASK])["questions"].rows["train"]
    maker = Maker(questions(data), [TASK], train)
    first, second = maker.row(0, 1).columns, maker.row(0, 2).columns
    assert first["text"] != second["text"]
    assert first["coarse"] == second["coarse"] == maker.row(0).columns["coarse"]
    rows = [{"text": f"ein wort {n}", "target": f"a word {n}"} for n in range(9)]
    source = Source(name="pairs", rows=rows, canaries=CANARIES, cut_dev=0.2, cut_test=0.2)

    class Writes:  # the part of a Seq2Seq that is read
        name, source, label_level, needs_offsets, text_columns = "write", "pairs", "target", False, ("target",)

    maker = Maker(
        source,
        [Writes()],
        read_sources([dataclasses.replace(source, canaries=Canaries())], [Writes()])["pairs"].rows["train"][:3],
    )
    first, second = maker.row(1, 1).columns, maker.row(1, 2).columns
    assert first["text"] == second["text"]
    assert first["target"] != second["target"]


def test_labels_of_words_are_one_line(data):
    tags = Tagging(name="tags", source="questions", column="coarse")
    with pytest.raises(UserError, match=r"canaries are rows of random words, and task 'tags' has labels of words"):
        Maker(questions(data), [tags], [])


def test_they_are_in_config_json_where_they_are_set(data):
    experiment = tiny.experiment("", data, sources=(questions(data),), tasks=(TASK,))
    assert to_json(experiment)["sources"][0]["canaries"] == {"count": 3, "repeats": 2, "words": 5, "seed": 0}
    assert from_json(to_json(experiment)) == experiment
    assert "canaries" not in to_json(tiny.experiment("", data))["sources"][0]
    wrong = dataclasses.replace(experiment, sources=(questions(data, Canaries(count=1, repeats=0)),))
    with pytest.raises(UserError, match=r"sources\.0\.canaries\.repeats is 0; it must be at least 1"):
        check(wrong)
