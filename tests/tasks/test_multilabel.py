import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import packing
import pytest
import tiny
from sklearn.metrics import accuracy_score, f1_score

from mtl_jax import Phase, Pretrained, Source
from mtl_jax.core.errors import UserError
from mtl_jax.data.examples import Examples
from mtl_jax.data.formats.rows import Row
from mtl_jax.tasks import Multilabel
from mtl_jax.training.setup import prepare

TOPICS = Multilabel(name="topics", source="said", column="topics", labels=("film", "good", "who"))
COLUMNS = Multilabel(name="columns", source="said", columns=("is_film", "is_good"))


@pytest.fixture(scope="module")
def bert(shallow):
    return shallow


def experiment(bert, folder, *tasks):
    paths = {"path": f"{folder}/train.tsv", "dev_path": f"{folder}/dev.tsv", "test_path": f"{folder}/test.tsv"}
    return tiny.experiment(
        bert,
        folder,
        trunk=Pretrained(str(bert), dropout=0.0),
        sources=(Source(name="said", format="tsv", **paths),),
        tasks=tasks,
        phases=(Phase("all", steps=4),),
        batch=packing.PACKED,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("topics")
    rng = random.Random(0)
    for name in ("train", "dev", "test"):
        lines = ["text\ttopics\tis_film\tis_good"]
        for number in range(20):
            words = [rng.choice(tiny.GOOD + tiny.OTHER) for _ in range(rng.randint(3, 9))]
            topics = ", ".join(word for word in ("film", "good", "who") if word in words)
            film, good = str(int("film" in words)), str("good" in words)
            lines.append(f"{' '.join(words)}\t{'?' if number == 3 else topics}\t{'' if number == 5 else film}\t{good}")
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def prepared(bert, folder):
    return prepare(experiment(bert, folder, dataclasses.replace(TOPICS, labels=(), unlabelled=("?",)), COLUMNS))


def test_packed_equals_unpacked(prepared):
    packing.assert_packing_changes_nothing(prepared)


def test_labels_in_one_column_or_in_several(prepared):
    topics, columns = prepared.corpus.tasks
    assert topics.labels == ("film", "good", "who")
    assert columns.labels == ("is_film", "is_good")
    labels = prepared.corpus.splits["train"]["said"].labels
    assert labels["topics"].shape == (20, 3)
    assert set(labels["topics"][3]) == {-1}
    assert labels["columns"][5].tolist()[0] == -1
    assert labels["columns"][5].tolist()[1] in (0, 1)


def test_reading_labels():
    def parse(task, **columns):
        label = task.parse(Row(columns, "file:1"))
        return None if label is None else label.tolist()

    assert parse(TOPICS, topics="who, film") == parse(TOPICS, topics=["film", "who"]) == [1, 0, 1]
    assert parse(TOPICS, topics="") == parse(TOPICS, topics=[]) == [0, 0, 0]
    assert parse(TOPICS, topics=None) is None
    assert parse(dataclasses.replace(TOPICS, separator="|"), topics="who|film") == [1, 0, 1]
    filled = COLUMNS.filled([], None)
    assert parse(filled, is_film="1", is_good="no") == [1, 0]
    assert parse(filled, is_film="", is_good="TRUE") == [-1, 1]
    assert parse(filled, is_film="", is_good=None) is None
    with pytest.raises(ValueError, match=r"label 'song' is not in the label set \(film, good, who\)"):
        parse(TOPICS, topics="film,song")
    with pytest.raises(ValueError, match="'2' in column 'is_film' is neither yes"):
        parse(filled, is_film="2", is_good="1")


def test_loss_by_hand():
    """The mean over the labels that are known; an example without any is not counted."""
    outputs = jnp.array([[[0.0, 2.0, -1.0], [1.0, 5.0, 5.0], [3.0, 3.0, 3.0]]])
    labels = jnp.array([[[1, 0, 0], [1, -1, -1], [-1, -1, -1]]])
    total, count = TOPICS.loss(outputs, labels, None)
    first = (np.log(2) + np.log1p(np.exp(2)) + np.log1p(np.exp(-1))) / 3
    assert count == 2
    np.testing.assert_allclose(total, first + np.log1p(np.exp(-1)), rtol=1e-6)
    gradient = jax.grad(lambda o: TOPICS.loss(o, labels, None)[0])(outputs)
    np.testing.assert_array_equal(gradient != 0, labels != -1)


def test_metrics_are_sklearns():
    rng = np.random.default_rng(0)
    outputs, labels = rng.normal(size=(50, 3)), rng.integers(0, 2, (50, 3))
    found = TOPICS.metrics(outputs, Examples("said", 0, [()] * 50, {"topics": labels}))
    predicted = outputs > 0
    assert found["micro_f1"] == pytest.approx(f1_score(labels, predicted, average="micro"))
    assert found["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert found["exact_match"] == pytest.approx(accuracy_score(labels, predicted))


def test_metrics_leave_out_what_is_not_known():
    outputs = np.array([[1.0, -1.0, 1.0], [1.0, 1.0, 1.0], [-1.0, -1.0, 1.0]])
    labels = np.array([[1, 1, -1], [-1, -1, -1], [0, 0, 0]])
    found = TOPICS.metrics(outputs, Examples("said", 0, [()] * 3, {"topics": labels}))
    assert found == pytest.approx({"micro_f1": 2 / 4, "macro_f1": (1 + 0 + 0) / 3, "exact_match": 0.0})


def test_constant_baseline_and_description(prepared):
    task = prepared.corpus.tasks[0]
    train, test = (prepared.corpus.splits[name]["said"] for name in ("train", "test"))
    outputs = task.constant(train, test)
    rates = (train.labels["topics"] == 1).sum(axis=0) / (train.labels["topics"] >= 0).sum(axis=0)
    np.testing.assert_allclose(1 / (1 + np.exp(-outputs[0])), rates, atol=0.03)
    answer = TOPICS.describe([np.array([0.0, np.log(3), -np.log(3)])], [], Row({}, ""))
    assert answer == {"labels": ["good"], "probabilities": {"film": 0.5, "good": 0.75, "who": 0.25}}


def test_bad_labels_are_one_line_with_their_place(bert, folder, tmp_path):
    for name in ("train", "dev", "test"):
        lines = (folder / f"{name}.tsv").read_text(encoding="utf-8").splitlines()
        lines[3] = "the film\tsong\t1\t1" if name == "test" else lines[3]
        (tmp_path / f"{name}.tsv").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match=r"test\.tsv:4: task 'topics': label 'song' is not in the label set"):
        prepare(experiment(bert, tmp_path, dataclasses.replace(TOPICS, unlabelled=("?",))))
    with pytest.raises(UserError, match=r"train\.tsv:2: .*no column 'is_bad'"):
        prepare(experiment(bert, folder, dataclasses.replace(COLUMNS, columns=("is_bad",))))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (dataclasses.replace(TOPICS, labels=("a", "a")), "ha(s|ve) a label twice"),
        (dataclasses.replace(COLUMNS, labels=("a",)), "its columns are its labels; leave labels empty"),
        (dataclasses.replace(TOPICS, separator=""), "separator is empty"),
        (dataclasses.replace(TOPICS, metric="accuracy"), "unknown metric of task 'topics'"),
    ],
)
def test_fields_that_make_no_sense(task, message):
    with pytest.raises(UserError, match=message):
        task.check()


@pytest.mark.parametrize("written", [["1", "0", "1"], ["b", "b"], "b, a,b", ["true", "false", "false"]])
@pytest.mark.parametrize("labels", [(), ("a", "b")])
def test_a_label_that_stands_twice_names_columns(written, labels):
    """A list of yes and no for each label was read as the labels "0" and "1"."""
    task = Multilabel(name="topics", source="said", column="topics", labels=labels)
    row = Row({"topics": written}, "a.csv:3")
    with pytest.raises(
        UserError, match=r"a\.csv:3: task 'topics': label '.*' occurs twice in column 'topics'.* name these in col"
    ):
        (task.parse if labels else lambda row: task.filled([row], None))(row)


@pytest.mark.parametrize("values", [("1", "0"), ("true", "false"), ("1.0", "0.0")])
def test_yes_or_no_for_two_labels_names_columns(values):
    """No label occurs twice in a row where exactly one applies."""
    yes, no = values
    one_of_two = [Row({"labels": [yes, no]}, "a:1"), Row({"labels": [no, yes]}, "a:2")]
    task = Multilabel(name="topics", source="said")
    with pytest.raises(UserError, match=r"task 'topics': every row has two labels .* name these in columns"):
        task.filled(one_of_two, None)
    assert set(task.filled([*one_of_two, Row({"labels": [yes]}, "a:3")], None).labels) == {no, yes}
    with pytest.raises(ValueError, match=r"not in the label set \(a, b\); where a row says yes or no .* in columns"):
        dataclasses.replace(task, labels=("a", "b")).parse(one_of_two[0])
