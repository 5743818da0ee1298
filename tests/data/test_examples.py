"""From rows to examples: what cannot be read is named, or left out and counted; nothing is taken for something else."""

import json

import numpy as np
import pytest
import tiny

from mtl_jax import Classification, Regression, Source, Span, Tagging
from mtl_jax.core.errors import UserError
from mtl_jax.data.corpus import make_corpus, read_sources
from mtl_jax.pretrained import load_tokenizer

TASK = Classification(name="t", source="s", labels=("x", "y"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    tiny.write_bert(folder)
    return load_tokenizer(folder)


def rows(word, label="x", count=3):
    return [{"text": f"{word} film {'the ' * n}", "label": label} for n in range(1, count + 1)]


def corpus(tmp_path, tokenizer, *, train=None, dev=None, test=None, tasks=(TASK,), length=24, **options):
    given = {"train": train or rows("good"), "dev": dev or rows("bad"), "test": test or rows("sad")}
    paths = {}
    for split, found in given.items():
        paths[split] = str(tmp_path / f"{split}.jsonl")
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    source = Source(name="s", path=paths["train"], dev_path=paths["dev"], test_path=paths["test"], format="jsonl", **options)
    return make_corpus([source], tasks, read_sources([source], tasks), tokenizer, length)


def test_a_text_given_as_words_is_one_text(tmp_path, tokenizer):
    """Beside texts as they stand: never read as a pair."""
    found = corpus(tmp_path, tokenizer, train=[{"text": "the man", "label": "x"}, {"text": ["the", "song"], "label": "y"}])
    read = [tokenizer.convert_ids_to_tokens(ids) for ids in found.splits["train"]["s"].tokens]
    assert read == [["[CLS]", "the", "man", "[SEP]"], ["[CLS]", "the", "song", "[SEP]"]]


def test_a_split_without_any_label(tmp_path, tokenizer):
    hidden = rows("sad", label=None)
    with pytest.raises(UserError, match="task 't': no row of split test of source 's' has a label"):
        corpus(tmp_path, tokenizer, test=hidden)
    found = corpus(tmp_path, tokenizer, test=[*hidden, *rows("awful", count=1)])
    np.testing.assert_array_equal(found.splits["test"]["s"].labels["t"], [-1, -1, -1, 0])
    assert "task t: 3 rows have no label" in found.notes


@pytest.mark.parametrize(
    ("task", "label", "message"),
    [
        (TASK, "z", r"label 'z' is not in the label set \(x, y\)"),
        (TASK, ["x"], "column 'label' has a list"),
        (Regression(name="t", source="s"), "nan", "label 'nan' is not a number"),
        (Tagging(name="t", source="s", column="label", labels=("O", "B-x")), "O O", r"words and 2 tags"),
    ],
)
def test_a_label_that_cannot_be_read_is_an_error_or_left_out(tmp_path, tokenizer, task, label, message):
    good = {"x": "1"} if isinstance(task, Regression) else {}
    right = [
        row | {"label": good.get(row["label"], " ".join("O" for _ in row["text"].split()) if task.words else row["label"])}
        for row in rows("good")
    ]
    parts = {"train": right, "dev": [row | {"text": f"bad {row['text']}"} for row in right], "test": None}
    if task.words:
        parts["dev"] = [row | {"label": f"O {row['label']}"} for row in parts["dev"]]
    parts["test"] = [row | {"text": row["text"].replace("good", "sad")} for row in right]
    bad = [*parts["dev"], {"text": "lovely song was", "label": label}]
    with pytest.raises(UserError, match=rf"dev\.jsonl:4.*{message}"):
        corpus(tmp_path, tokenizer, tasks=(task,), train=right, dev=bad, test=parts["test"])
    found = corpus(tmp_path, tokenizer, tasks=(task,), train=right, dev=bad, test=parts["test"], lenient=True)
    assert len(found.splits["dev"]["s"].tokens) == 3
    assert "1 row that cannot be read left out" in found.notes[0]


@pytest.mark.parametrize(("label", "message"), [({}, "no column 'label'.* has null"), ({"label": ["x"]}, "has a list")])
def test_a_training_row_without_a_readable_label_is_an_error_or_left_out(tmp_path, tokenizer, label, message):
    """Also where the labels are found in these rows."""
    task = Classification(name="t", source="s", column="label")
    train = [*rows("good"), *rows("fine", label="y"), {"text": "lovely song was"} | label]
    with pytest.raises(UserError, match=rf"train\.jsonl:7: .*{message}"):
        corpus(tmp_path, tokenizer, tasks=(task,), train=train)
    found = corpus(tmp_path, tokenizer, tasks=(task,), train=train, lenient=True)
    assert found.tasks[0].labels == ("x", "y")
    assert "6/3/3 train/dev/test" in found.notes[0]
    assert "1 row that cannot be read left out" in found.notes[0]


def test_many_texts_that_are_refused_are_left_out_at_once(tmp_path, tokenizer, caplog):
    """What stands beside the divided text leaves no room for it; a line says so, and one tokenises twice."""
    task = Span(name="t", source="s", stride=4)
    pairs = [{"text": "who", "context": f"the man {'was ' * n}", "answers": []} for n in range(5)]
    long = [{"text": "who " * (30 + n), "context": "the man", "answers": []} for n in range(4)]
    dev, test = ([row | {"context": f"{word} {row['context']}"} for row in pairs] for word in ("bad", "sad"))
    train = [*long[:2], *pairs, *long[2:]]
    found = corpus(tmp_path, tokenizer, tasks=(task,), train=train, dev=dev, test=test, pair="context", lenient=True)
    assert [row.columns["text"] for row in found.splits["train"]["s"].data] == ["who"] * 5
    assert "4 rows that cannot be read left out" in found.notes[0]
    (line,) = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert line.startswith("skipped 4 rows, the first: ")
    assert "train.jsonl:1: " in line


def test_a_long_text_that_one_task_reads_to_the_end(tmp_path, tokenizer):
    """The other one has its first window."""
    tags = Tagging(name="tags", source="s", column="label", labels=("O",))
    whole = Classification(name="whole", source="s", column="kind", labels=("x", "y"))
    train = [{"text": "the man " * n, "label": "O O " * n, "kind": "x"} for n in (1, 30, 40)]
    parts = {name: [{"text": f"{name} song", "label": "O O", "kind": "y"}] for name in ("good", "bad")}
    found = corpus(tmp_path, tokenizer, tasks=(tags, whole), train=train, dev=parts["good"], test=parts["bad"])
    assert "2 long texts read in 5 further windows of 24 tokens, of which whole reads the first only" in found.notes[0]


def test_a_tag_of_no_entity_is_an_error_or_left_out(tmp_path, tokenizer):
    task = Tagging(name="t", source="s", column="label")
    parts = {
        split: [{"text": f"{word} man", "label": "B-x I-x"}, {"text": f"{word} song was", "label": "O B-x O"}]
        for split, word in (("train", "good"), ("dev", "bad"), ("test", "sad"))
    }
    kept = corpus(tmp_path, tokenizer, tasks=(task,), **parts)
    parts["train"].append({"text": "fine film", "label": "B-new 0"})
    with pytest.raises(UserError, match=r"train\.jsonl:3: task 't': tag '0' of word 2, 'film', is neither O nor B-X nor I-X"):
        corpus(tmp_path, tokenizer, tasks=(task,), **parts)
    found = corpus(tmp_path, tokenizer, tasks=(task,), lenient=True, **parts)
    assert found.tasks[0].metric == "entity_f1"
    assert len(found.splits["train"]["s"].tokens) == len(kept.splits["train"]["s"].tokens) == 2
    assert "1 row that cannot be read left out" in found.notes[0]


def test_a_text_of_which_nothing_is_left_is_refused(tmp_path, tokenizer, monkeypatch):
    """The special tokens alone are no text."""
    monkeypatch.setattr(tokenizer.backend_tokenizer, "normalizer", __import__("tokenizers").normalizers.Replace("song", ""))
    with pytest.raises(UserError, match=r"train\.jsonl:2: the text has no token"):
        corpus(tmp_path, tokenizer, train=[*rows("good", count=1), {"text": "song", "label": "x"}])


def test_texts_that_the_tokenizer_refuses_may_be_left_out(tmp_path, tokenizer, monkeypatch, caplog):
    """Their labels and the rows beside them too; one that is no Unicode and one of which nothing is left."""
    monkeypatch.setattr(tokenizer.backend_tokenizer, "normalizer", __import__("tokenizers").normalizers.Replace("song", ""))
    good = rows("good")
    train = [good[0], {"text": "song", "label": "x"}, *good[1:], {"text": "half \ud83d", "label": "x"}]
    kept = corpus(tmp_path, tokenizer, train=good)
    found = corpus(tmp_path, tokenizer, train=train, lenient=True)
    assert found.describe() == kept.describe()
    assert [row.columns for row in found.splits["train"]["s"].data] == good
    assert "2 rows that cannot be read left out" in found.notes[0]
    assert "train.jsonl:2: the text has no token" in caplog.text
    with pytest.raises(UserError, match=r"source 's': no text of split dev can be tokenised"):
        corpus(tmp_path, tokenizer, dev=[{"text": "song", "label": "x"}], lenient=True)


def test_an_answer_that_no_window_holds_is_counted(tmp_path, tokenizer):
    context = "the man was sad and the film was good " * 3
    asked = {"text": "who", "context": context.strip(), "answers": [{"text": context[:60].strip(), "start": 0}]}
    short = {"text": "who", "context": "the man was sad", "answers": [{"text": "man", "start": 4}]}
    parts = {
        "train": [asked, short],
        "dev": [short | {"text": "where"}],
        "test": [short | {"text": "is"}],
    }
    found = corpus(tmp_path, tokenizer, tasks=(Span(name="t", source="s", stride=2),), length=12, pair="context", **parts)
    assert "task t: 1 answer is in no window as a whole: learned as no answer" in found.notes
