"""Label sets come from the whole training file, whichever rows are trained on; what that leaves untaught is said."""

import json
import re

import numpy as np
import pytest
import tiny

from mtl_jax import Classification, Multilabel, Regression, Seq2Seq, Source, Tagging
from mtl_jax.core.errors import UserError
from mtl_jax.data import label_notes
from mtl_jax.data.corpus import make_corpus, read_sources
from mtl_jax.data.examples import Examples
from mtl_jax.data.formats.records import Records
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.ragged import Ragged
from mtl_jax.data.splits import read
from mtl_jax.pretrained import load_tokenizer

CLASS, TAGS = Classification(name="t", source="s"), Tagging(name="t", source="s", column="label")
SEVERAL = Multilabel(name="t", source="s", column="label")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    tiny.write_bert(folder)
    return load_tokenizer(folder)


def corpus(tmp_path, tokenizer, task, rows, **options):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows), encoding="utf-8")
    source = Source(name="s", path=str(path), format="jsonl", **options)
    return make_corpus([source], [task], read_sources([source], [task]), tokenizer, 16)


def told(found):
    return [note.replace("task t: ", "") for note in found.notes if note.startswith("task t: ")]


def write(path, *rows):
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("limits", [{"limit": 12}, {"limit_train": 12}, {"limit": 40, "limit_train": 12}])
@pytest.mark.parametrize(
    ("task", "label", "labels"),
    [
        (CLASS, lambda n: f"c{n}", [f"c{n}" for n in range(8)]),
        (SEVERAL, lambda n: [f"c{n}", "all"], ["all", *(f"c{n}" for n in range(8))]),
        (TAGS, lambda n: f"B-{n} I-{n} O", [*(f"B-{n}" for n in range(8)), *(f"I-{n}" for n in range(8)), "O"]),
    ],
    ids=["class", "several", "tags"],
)
def test_a_sorted_file_keeps_its_labels_under_a_limit(tmp_path, tokenizer, task, label, labels, limits):
    rows = [(f"film was {number}", label(number // 40)) for number in range(320)]
    # The official dev rows have labels that a few training rows may lack.
    official = {"dev_path": write(tmp_path / "dev.jsonl", *[(f"song was {n}", label(n)) for n in range(8)])}
    found = corpus(tmp_path, tokenizer, task, rows, **official, **limits)
    assert list(found.tasks[0].labels) == labels
    train = found.splits["train"]["s"]
    assert len(train.data) == 12
    trained = {str(row.columns["label"]) for row in train.data}
    assert 4 <= len(trained) < 8, "drawn from all of the file"
    absent = [name for name in labels if not any(name in str(row.columns["label"]) for row in train.data)]
    (line,) = told(found)
    of = "word" if task.words else "row"
    assert line == f"{len(absent)} of its {len(labels)} labels {'is' if len(absent) == 1 else 'are'} on no training {of}: " + (
        ", ".join(absent[:10]) + (f" and {len(absent) - 10} more" if len(absent) > 10 else "")
    )


def test_rows_of_a_limit_are_drawn_by_seed_and_text(tmp_path):
    rows = [(f"text {number}", "x") for number in range(200)]

    def train(rows, **options):
        splits = read(Source(name="s", path=write(tmp_path / "a.jsonl", *rows), format="jsonl", **options))
        return [row.columns["text"] for row in splits.rows["train"]]

    whole, many, few = train(rows), train(rows, limit_train=40), train(rows, limit_train=10)
    assert [text for text in whole if text in many] == many, "in the order of the file"
    assert set(few) < set(many)
    assert set(train(rows[::-1], limit_train=10)) == set(few), "wherever they stand"
    test = write(tmp_path / "test.jsonl", ("another", "x"))
    official = {"dev_path": test, "test_path": test}
    assert set(train(rows, limit_train=10, **official)) != set(train(rows, limit_train=10, cut_seed=1, **official))


def test_records_on_disk_are_drawn_alike(tmp_path, monkeypatch):
    rows = [{"text": f"text {number}", "label": f"c{number // 10}"} for number in range(200)] + [
        {"text": "text 0", "label": "new"}
    ]
    monkeypatch.setattr("mtl_jax.data.splits._open", lambda source, split: Records(source.place(split), rows, {}))
    splits = read(Source(name="s", path="hf:any", limit=5))
    assert [len(splits.rows[split]) for split in ("train", "dev", "test")] == [5, 5, 5]
    assert {row.columns["label"] for row in splits.all_rows} == {*(f"c{n}" for n in range(20)), "new"}
    assert label_notes.conflicting_labels(CLASS.filled(splits.all_rows, None), splits.repeats) == [
        "task t: 1 of the repeated texts has another label than the row that is kept: hf:any: record 200 has 'new' where "
        f"hf:any: record 0 has 'c0'; {CLASS.conflict_advice}"
    ]


def test_a_label_whose_only_row_is_dropped_counts(tmp_path, tokenizer):
    rows = [(f"film was {number}", "ab"[number % 2]) for number in range(100)]
    found = corpus(tmp_path, tokenizer, CLASS, [*rows, ("film  WAS 1", "rare")])
    assert found.tasks[0].labels == ("a", "b", "rare")
    assert "1 repeated text dropped" in found.notes[0]
    path = tmp_path / "a.jsonl"
    assert told(found) == [
        "1 of its 3 labels is on no training row: rare",
        f"1 of the repeated texts has another label than the row that is kept: {path}:101 has 'rare' where {path}:2 has 'b'; "
        "for several labels of a text, put them in one row and declare a Multilabel; else correct them",
    ]


def test_a_single_label_is_said(tmp_path, tokenizer):
    rows = [(f"film was {number}", "a") for number in range(100)]
    assert told(corpus(tmp_path, tokenizer, CLASS, rows)) == ["'a' is its only label, so there is nothing to learn"]
    assert told(corpus(tmp_path, tokenizer, SEVERAL, rows)) == []  # a yes or no


@pytest.mark.parametrize(
    ("task", "values", "lines"),
    [
        (CLASS, np.array([0, -1, 2]), ["1 of its 3 labels is on no training row: b"]),
        (CLASS, np.array([0, 1, 2]), []),
        (TAGS, Ragged.of([[-1, 0], [2]], np.int32), ["1 of its 3 labels is on no training word: b"]),
        (SEVERAL, np.array([[1, 0, 0], [0, -1, 0]]), ["2 of its 3 labels are on no training row: b, c"]),
    ],
)
def test_labels_that_nothing_teaches(task, values, lines):
    task = type(task)(name="t", source="s", labels=("a", "b", "c"))
    found = label_notes.absent_labels(task, Examples("s", 0, [], {"t": values}))
    assert [line.removeprefix("task t: ") for line in found] == lines


@pytest.mark.parametrize(
    ("task", "first", "again", "differ"),
    [
        (CLASS, "a", "b", True),
        (CLASS, "a", "a", False),
        (CLASS, None, "b", True),  # what the row that stays does not say
        (CLASS, "a", None, False),
        (SEVERAL, ["a", "b"], ["b", "a"], False),
        (SEVERAL, ["a"], ["b"], True),
        (TAGS, "O B-x", "O O", True),
        (TAGS, "O B-x", "O B-x", False),
        (Regression(name="t", source="s"), "1", "1.0", False),
        (Regression(name="t", source="s"), "1", "2", True),
        (Seq2Seq(name="t", source="s", column="label"), "ein Text", "noch einer", True),
    ],
)
def test_repeated_texts_with_another_label(task, first, again, differ):
    rows = [Row({"text": "two words", "label": label}, f"a.csv:{line}") for line, label in enumerate((first, again), start=1)]
    lines = label_notes.conflicting_labels(task.filled(rows, None), [(rows[1], rows[0])])
    assert len(lines) == differ
    assert all(re.search(r"a\.csv:2(, word 2,)? has .* where a\.csv:1(, word 2,)? has", line) for line in lines)
    assert all(line.endswith(task.conflict_advice) for line in lines)


def test_the_word_whose_tag_differs_is_shown(tmp_path):
    path = tmp_path / "a.conll"
    path.write_text("".join(f"the O\nman B-{kind}\n\nfilm{n} O\n\n" for n, kind in enumerate("xyx")) * 9, encoding="utf-8")
    source = Source(name="s", path=str(path), format="conll", columns=("text", "label"), cut_dev=0.3, cut_test=0.3)
    splits = read(source)
    (line,) = label_notes.conflicting_labels(TAGS.filled(splits.all_rows, None), splits.repeats)
    assert line.startswith("task t: 9 of the repeated texts have another label than the row that is kept: ")
    assert f"{path}:7 has 'B-y' where {path}:2 has 'B-x'" in line


def test_long_format_says_what_it_loses(tmp_path, tokenizer):
    """Also where the text that a training row repeats is an official one."""
    rows = [(f"film was {number}", label) for number in range(100) for label in "ab"]
    line = f"100 of the repeated texts have another label than the row that is kept: .*; {CLASS.conflict_advice}"
    assert re.fullmatch(line, told(corpus(tmp_path, tokenizer, CLASS, rows))[-1])
    dev = write(tmp_path / "dev.jsonl", ("film was 3", "c"))
    found = read(Source(name="s", path=str(tmp_path / "a.jsonl"), dev_path=dev, format="jsonl"))
    pairs = [(row.columns["label"], first.columns["label"]) for row, first in found.repeats]
    assert (len(pairs), pairs.count(("a", "c")), pairs.count(("b", "c")), found.repeated) == (101, 1, 1, 101)


def test_twenty_thousand_labels_are_looked_up():
    """A search in a tuple made reading quadratic; an error line named them all."""
    task = Classification(name="t", source="s", labels=tuple(f"class {n}" for n in range(20_000)))
    assert [task.parse(Row({"label": f"class {n}"}, "a")) for n in range(20_000)] == list(range(20_000))
    with pytest.raises(ValueError, match=r"'new' is not in the label set \(class 0, .*, class 9 and 19990 more\)$") as caught:
        task.parse(Row({"label": "new"}, "a"))
    assert not isinstance(caught.value, UserError)


LONG = "y" * 50_000


@pytest.mark.parametrize(
    ("task", "columns"),
    [
        (Classification(name="t", source="s", labels=("a",)), {"label": LONG}),
        (Classification(name="t", source="s", labels=("a", "b"), threshold=0.5), {"label": LONG}),
        (Classification(name="t", source="s", labels=("a",)), {"label": [LONG]}),
        (Regression(name="t", source="s"), {"label": LONG}),
        (Multilabel(name="t", source="s", columns=("a",)), {"a": LONG}),
        (Multilabel(name="t", source="s", column="label", labels=("a",)), {"label": [LONG, LONG]}),
        (Multilabel(name="t", source="s", column="label", labels=("a",)), {"label": LONG}),
        (Tagging(name="t", source="s", column="label", labels=("O",)), {"text": LONG, "label": LONG}),
        (Tagging(name="t", source="s", column="label", labels=("O",)), {LONG: ""}),
    ],
)
def test_an_error_cuts_what_it_quotes(task, columns):
    with pytest.raises((UserError, ValueError)) as caught:
        task.parse(Row(columns, "a.csv:2"))
    assert len(str(caught.value)) < 1500
