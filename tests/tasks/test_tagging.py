import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import packing
import pytest
import tiny

from mtl_jax import Classification, Evaluation, Phase, Pretrained, Source, train
from mtl_jax.core.errors import UserError
from mtl_jax.data.examples import make_examples
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.labels import Window
from mtl_jax.data.splits import read_one
from mtl_jax.inference.predict import predict
from mtl_jax.pretrained import load_tokenizer
from mtl_jax.tasks import Tagging
from mtl_jax.training.setup import prepare

LABELS = ("B-bad", "B-good", "I-bad", "I-good", "O")
SLOTS = Tagging(name="slots", source="said", labels=LABELS)
POS = Tagging(name="pos", source="said", labels=("ADJ", "NOUN", "PUNCT"))
INTENT = Classification(name="intent", source="said", column="intent")


@pytest.fixture(scope="module")
def bert(shallow):
    return shallow


def tag(words):
    """Entities are runs of good or bad words."""
    kinds = ["good" if word in tiny.GOOD else "bad" if word in tiny.BAD else "" for word in words]
    before = ["", *kinds[:-1]]
    return [f"{'I' if kind == last else 'B'}-{kind}" if kind else "O" for kind, last in zip(kinds, before, strict=True)]


def write(folder, name, rows):
    """rows: (words, tags, intent)."""
    lines = ["text\ttags\tintent", *(f"{' '.join(words)}\t{' '.join(tags)}\t{intent}" for words, tags, intent in rows)]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Short sentences, and every tenth too long for a row of 24 tokens; some words and some rows are not labelled."""
    folder = tmp_path_factory.mktemp("said")
    rng = random.Random(0)
    for name in ("train", "dev", "test"):
        rows = []
        for number in range(20):
            length = 60 if number % 10 == 0 else rng.randint(3, 9)
            words = [rng.choice(tiny.GOOD + tiny.BAD + tiny.OTHER) for _ in range(length)]
            tags = tag(words)
            if number % 5 == 1:
                tags[1:3] = ["_", "_"]
            rows.append((words, [] if number == 3 else tags, "" if number == 4 else rng.choice(["ask", "say"])))
        write(folder, f"{name}.tsv", rows)
    return folder


def experiment(bert, folder, *tasks, **changes):
    paths = {"path": f"{folder}/train.tsv", "dev_path": f"{folder}/dev.tsv", "test_path": f"{folder}/test.tsv"}
    return tiny.experiment(
        bert,
        folder,
        trunk=Pretrained(str(bert), dropout=0.0),
        sources=(Source(name="said", format="tsv", **paths),),
        tasks=tasks,
        phases=(Phase("all", steps=4),),
        batch=packing.PACKED,
        **changes,
    )


@pytest.fixture(scope="module")
def prepared(bert, folder):
    """Intent and slots on one source: one forward pass."""
    return prepare(experiment(bert, folder, INTENT, dataclasses.replace(SLOTS, labels=(), hidden=8)))


def examples_of(bert, rows, max_length=24, task=SLOTS):
    rows = [Row({"text": words, "tags": tags}, f"file:{number}") for number, (words, tags) in enumerate(rows, 1)]
    examples, _ = make_examples(Source(name="said", path=""), [task], rows, load_tokenizer(bert), max_length)
    return examples


def perfect(task, examples):
    """Outputs that say at each labelled token what is right, and at the others what is wrong."""
    outputs = []
    for group in examples.groups():
        label = task.parse(examples.data[examples.row_of[group[0]]])
        for i in group:
            placed = task.window_label(label, examples.window(i, group[0]))
            outputs.append(np.eye(len(task.labels), dtype=np.float32)[placed])
    return outputs


def test_packed_equals_unpacked(prepared):
    packing.assert_packing_changes_nothing(prepared)


def test_label_sets_are_found(prepared):
    slots = prepared.corpus.tasks[1]
    assert (slots.labels, slots.metric) == (LABELS, "entity_f1")
    assert slots.metric_names == ("entity_f1", "entity_precision", "entity_recall", "token_accuracy")
    assert POS.metric_names == ("token_accuracy",)
    rows = [Row({"text": "a b", "tags": tags}, "file:1") for tags in ("X Y", "Y _")]
    found = Tagging(name="pos", source="said").filled(rows, None)
    assert (found.labels, found.metric) == (("X", "Y"), "token_accuracy")
    # A type that only goes on, after a word without a label, can begin too.
    found = Tagging(name="t", source="said").filled([Row({"text": "a b", "tags": "_ I-x"}, "file:1")], None)
    assert found.labels == ("B-x", "I-x")


def test_missing_labels_give_no_loss(prepared):
    labels = prepared.corpus.splits["train"]["said"].labels
    counts = packing.measured(prepared, packing.whole(prepared, packing.PACKED)).counts
    assert counts["slots"] == (labels["slots"].values >= 0).sum()
    assert counts["intent"] == (labels["intent"] >= 0).sum() == 19  # one row says no intent; further windows have none

    outputs = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 5)))
    gradient = jax.grad(lambda o: SLOTS.loss(o, jnp.array([[4, -1, 0, -1]]), None)[0])(outputs)
    np.testing.assert_array_equal(np.abs(gradient[0]).sum(-1) > 0, [True, False, True, False])


def test_labels_stand_on_first_sub_words():
    row = Row({"text": "a fine film", "tags": "O B-good _"}, "file:1")
    window = Window(0, np.arange(7), None, np.array([-1, 0, 1, -1, -1, 2, -1]), None)
    np.testing.assert_array_equal(SLOTS.window_label(SLOTS.parse(row), window), [-1, 4, 1, -1, -1, -1, -1])
    np.testing.assert_array_equal(SLOTS.window_label(None, window), [-1] * 7)


def test_a_long_sentence_loses_no_word(prepared, bert):
    """It comes in windows, each word in one of them; metrics and predictions put them together again."""
    for examples in prepared.corpus.splits["train"].values():
        group = examples.groups()[0]
        assert len(group) == 3
        words = np.concatenate([examples.words[i] for i in group])
        np.testing.assert_array_equal(words[words >= 0], np.arange(60))

    slots = prepared.corpus.tasks[1]
    outputs = perfect(slots, examples)
    expected = dict.fromkeys(slots.metric_names, 1.0)
    assert slots.metrics(outputs, examples) == expected
    row = examples.data[0]
    answer = slots.describe(outputs[:3], [examples.window(i, 0) for i in group], row)
    assert answer["words"] == row.columns["text"].split()
    assert answer["tags"] == row.columns["tags"].split() == tag(answer["words"])


def test_predictions_of_a_run_do_not_depend_on_windows(bert):
    """An entity across the edge of two windows is one entity."""
    words = ["the"] * 20 + ["good"] * 4 + ["film"]
    examples = examples_of(bert, [(words, tag(words))])
    assert len(examples.tokens) == 2
    windows = [examples.window(i, 0) for i in range(2)]
    answer = SLOTS.describe(perfect(SLOTS, examples), windows, examples.data[0])
    assert answer["entities"] == [{"type": "good", "start": 20, "end": 24, "text": "good good good good"}]
    assert SLOTS.metrics(perfect(SLOTS, examples), examples)["entity_f1"] == 1.0


def test_broken_predictions_are_decoded_to_valid_ones(bert):
    examples = examples_of(bert, [(["good", "film"], ["B-good", "I-good"])])
    scores = np.zeros((4, 5), np.float32)
    scores[1], scores[2] = [0, 2, 0, 0, 3], [0, 0, 0, 4, 2]  # word by word: O, I-good
    answer = SLOTS.describe([scores], [examples.window(0, 0)], examples.data[0])
    assert answer["tags"] == ["B-good", "I-good"]
    assert SLOTS.metrics([scores], examples) == dict.fromkeys(SLOTS.metric_names, 1.0)


def test_metrics_by_hand_with_words_and_rows_that_are_not_labelled(bert):
    rows = [(["good", "film", "bad"], ["B-good", "O", "B-bad"]), (["fine"], [None]), (["sad", "man"], ["B-bad", "_"])]
    examples = examples_of(bert, rows)
    outputs = perfect(SLOTS, examples)
    outputs[0][3] = np.eye(5)[1]  # "bad" is taken for good
    outputs[1][1] = outputs[2][2] = np.eye(5)[1]  # where nothing is labelled, nothing is wrong
    scores = SLOTS.metrics(outputs, examples)
    found = {"token_accuracy": 3 / 4, "entity_precision": 2 / 3, "entity_recall": 2 / 3, "entity_f1": 2 / 3}
    assert scores == pytest.approx(found)


@pytest.mark.parametrize(("task", "predicted", "accuracy"), [(SLOTS, "O", 3 / 3), (POS, None, 2 / 3)])
def test_a_word_without_a_token(bert, task, predicted, accuracy):
    """The tokenizer makes nothing of a no-break space."""
    tags = {"slots": ["B-good", "O", "O"], "pos": ["ADJ", "PUNCT", "NOUN"]}[task.name]
    examples = examples_of(bert, [(["good", "\u00a0", "film"], tags)])
    answer = task.describe(perfect(task, examples), [examples.window(0, 0)], examples.data[0])
    assert answer["tags"] == [tags[0], predicted, tags[2]]
    assert task.metrics(perfect(task, examples), examples)["token_accuracy"] == pytest.approx(accuracy)
    assert len(task.remarks([examples])) == 1
    assert "1 of 3 words has no token" in task.remarks([examples])[0]
    assert ("entities" in answer) == (task is SLOTS)


def test_constant_baseline_is_the_most_frequent_tag(prepared):
    slots = prepared.corpus.tasks[1]
    split = {name: parts["said"] for name, parts in prepared.corpus.splits.items()}
    outputs = slots.constant(split["train"], split["test"])
    assert [len(x) for x in outputs] == [len(ids) for ids in split["test"].tokens]
    labels = split["test"].labels["slots"].values
    scores = slots.metrics(outputs, split["test"])
    assert scores["token_accuracy"] == pytest.approx((labels[labels >= 0] == 4).mean())
    assert scores["entity_f1"] == 0


def test_balanced_weights_come_from_the_training_words(bert, folder):
    task = dataclasses.replace(SLOTS, balanced=True)
    corpus = prepare(experiment(bert, folder, task)).corpus
    labels = corpus.splits["train"]["said"].labels["slots"].values
    labels = labels[labels >= 0]
    weights = corpus.tasks[0].class_weights
    assert weights == pytest.approx({name: len(labels) / 5 / (labels == i).sum() for i, name in enumerate(LABELS)})
    assert np.mean([weights[LABELS[i]] for i in labels]) == pytest.approx(1)


def test_broken_tags_can_be_read_as_beginnings():
    row = Row({"text": "good film", "tags": ["I-good", "I-good"]}, "file:1")
    repairing = dataclasses.replace(SLOTS, repair=True)
    np.testing.assert_array_equal(repairing.parse(row), [1, 3])


def test_repaired_tags_are_counted(bert, folder, tmp_path):
    for name in ("train", "dev", "test"):
        write(tmp_path, f"{name}.tsv", [(["good", "film", name], ["I-good", "O", "I-bad"], "say")])
    notes = prepare(experiment(bert, tmp_path, Tagging(name="slots", source="said", repair=True))).notes
    assert "task slots: 6 tags I-X without B-X or I-X in front read as B-X" in notes


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ("B-good O", "3 words and 2 tags; there must be one for each word"),
        ("O I-good O", "tag 'I-good' of word 2, 'film', follows neither B nor I of its type; correct it, or set repair"),
        ("B-bad I-good O", "tag 'I-good' of word 2, 'film', follows neither B nor I of its type"),
        ("B-good O B-new", r"tag 'B-new' of word 3, 'was', is not in the label set \(B-bad, B-good, I-bad, I-good, O\)"),
    ],
)
def test_bad_tags_are_one_line_with_their_place(bert, folder, tmp_path, tags, message):
    for name in ("train", "dev", "test"):
        rows = [
            (["good", "film", name], ["B-good", "I-good", "O"], "say"),
            (["sad", "man", name], ["B-bad", "I-bad", "O"], "ask"),
        ]
        write(tmp_path, f"{name}.tsv", [*rows, (["good", "film", "was"], tags.split(), "say")] if name == "dev" else rows)
    with pytest.raises(UserError, match=rf"dev\.tsv:4: task 'slots': {message}"):
        prepare(experiment(bert, tmp_path, dataclasses.replace(SLOTS, labels=())))


def found(tmp_path, lines, **options):
    """A task whose labels are found in a file of two columns, and the file's rows."""
    (tmp_path / "a.conll").write_text(lines, encoding="utf-8")
    rows = read_one(Source(name="s", path=str(tmp_path / "a.conll"), format="conll", columns=("text", "tags")))
    return Tagging(name="ner", source="s", **options).filled(rows, None), rows


BIO = "Ann B-PER\nLee I-PER\nwon O\n\n"


@pytest.mark.parametrize("metric", ["", "entity_f1"])
@pytest.mark.parametrize("tag", ["0", "PER", "b-per", "S-PER", "B-", "word"])
def test_one_stray_tag_does_not_make_entities_plain_tags(tmp_path, tag, metric):
    """Not even where a tag further on is wrong too; "# word" is a word with its tag."""
    task, (good, bad) = found(tmp_path, f"{BIO}# {tag}\na O\nb I-PER\n", metric=metric)
    assert (task.labels, task.metric) == (("B-PER", "I-PER", "O"), "entity_f1")
    task.parse(good)
    message = (
        rf"a\.conll:5: task 'ner': tag '{tag}' of word 1, '#', is neither O nor B-X nor I-X.*\(B-PER, I-PER, O\).*correct it"
    )
    with pytest.raises(UserError, match=message):
        task.parse(bad)


def test_who_asks_for_entities_gets_no_plain_tags(tmp_path):
    task, (row,) = found(tmp_path, "Ann NOUN\nwon VERB\n", metric="entity_recall")
    with pytest.raises(UserError, match=r"a\.conll:1: task 'ner': tag 'NOUN' of word 1, 'Ann', is neither.*\(there is none\)"):
        task.parse(row)


def test_plain_tags_may_look_like_entities_where_that_is_said(tmp_path):
    """Segments as B, M, E, S, for example; what is read as what is said before training."""
    labels = ("B-N", "E-N", "S-V")
    for said in ({"metric": "token_accuracy"}, {"labels": labels}):
        task, (row,) = found(tmp_path, "a B-N\nb E-N\nc S-V\n", **said)
        assert (task.labels, task.metric) == (labels, "token_accuracy")
        np.testing.assert_array_equal(task.parse(row), [0, 1, 2])
        assert task.remarks([]) == ["its tags are read as plain ones, not as entities: 'E-N' is neither O nor B-X nor I-X"]
    task, _ = found(tmp_path, "a NOUN\nb I\nc O\n")
    assert (task.labels, task.metric, task.remarks([])) == (("I", "NOUN", "O"), "token_accuracy", [])
    # Entities that are measured by words stay entities.
    task, _ = found(tmp_path, BIO, metric="token_accuracy")
    assert "entity_f1" in task.metric_names


def test_labels_and_metric_are_shown(prepared):
    assert "task slots: 5 labels (B-bad, B-good, I-bad, I-good, O), measured by entity_f1" in prepared.notes
    assert "task intent: 2 labels (ask, say), measured by accuracy" in prepared.notes


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            "one O\n\n# id = 2\n# a comment\ngood B-good\nfilm I-bad\n",
            r"a\.conll:6: task 'slots': tag 'I-bad' of word 2, 'film', follows",
        ),
        ("# id = 1\none O\ntwo O\ngood B-new\nbad O\n", r"a\.conll:4: task 'slots': tag 'B-new' of word 3, 'good', is not in"),
    ],
)
def test_a_bad_tag_is_on_the_line_of_its_word(tmp_path, lines, message):
    """Where each word has a line, whatever comments stand before the sentence."""
    (tmp_path / "a.conll").write_text(lines, encoding="utf-8")
    *good, bad = read_one(Source(name="said", path=str(tmp_path / "a.conll"), format="conll", columns=("text", "tags")))
    for row in good:
        SLOTS.parse(row)
    with pytest.raises(UserError, match=message):
        SLOTS.parse(bad)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ("O", "I-x")}, "the label set has I-x and lacks B-x"),
        (
            {"labels": ("O", "B-x", "S-x"), "metric": "entity_f1"},
            "metric is entity_f1, and label 'S-x' is neither O nor B-X nor I-X",
        ),
        ({"labels": ("X", "Y"), "metric": "accuracy"}, "unknown metric of task 'slots'.*choices: token_accuracy"),
        ({"labels": ("X", "X")}, "has a label twice"),
        ({"class_weights": {"B-gold": 2.0}}, "'B-gold'.*did you mean 'B-good'"),
    ],
)
def test_fields_that_make_no_sense(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SLOTS, **changes).check()


def test_a_run_from_text_to_entities(bert, folder, tmp_path):
    """Trained, evaluated and asked again: a prediction per word, of long texts too; the intent reads the first window."""
    tasks = (dataclasses.replace(INTENT, balanced=True), dataclasses.replace(SLOTS, labels=()))
    settings = {"evaluation": Evaluation(every=4, baseline="constant")}
    results = train(experiment(bert, folder, *tasks, **settings), tmp_path / "run")["tasks"]
    assert results["slots"]["metric"] == "entity_f1"
    assert set(results["slots"]["test"]) == {"loss", "entity_f1", "entity_precision", "entity_recall", "token_accuracy"}
    short, long = predict(tmp_path / "run", "slots", ["a fine film", "the film " * 30])
    assert (len(short["tags"]), len(long["tags"])) == (3, 60)
    assert "truncated" not in long
    assert predict(tmp_path / "run", "intent", ["the film " * 30])[0]["truncated"]
    words, empty = ["a", "fine", "film"], {"error": "empty text"}
    for as_words in ({"text": words}, words, tuple(words), {"text": tuple(words)}):
        assert predict(tmp_path / "run", "slots", [as_words, "", []]) == [short, empty, empty]


def test_task_and_source_must_name_the_same_text(bert, folder):
    with pytest.raises(UserError, match="task 'slots': text is 'words', but the text of source 'said' is 'text'"):
        prepare(experiment(bert, folder, dataclasses.replace(SLOTS, text="words")))
    with pytest.raises(UserError, match="task 'slots': source 'said' has pairs"):
        SLOTS.check_source(Source(name="said", path="", pair="other"))


@pytest.mark.parametrize(("text", "tags", "column"), [("a b\xa0c", "O O", "text"), ("a b", "O\u3000O O", "tags")])
def test_a_blank_that_divides_like_a_space_is_named(text, tags, column):
    task = Tagging(name="slots", source="said", labels=("O",))
    row = Row({"text": text, "tags": tags}, "a.csv:2")
    with pytest.raises(ValueError, match=rf"words and . tags; .* \(the blank U\+.* in column '{column}' divides like a space"):
        task.parse(row)
    with pytest.raises(ValueError, match=r"one for each word$"):
        task.parse(Row({"text": "a b c", "tags": "O O"}, "a.csv:3"))
    assert len(task.parse(Row({"text": ["a", "b\xa0c"], "tags": ["O", "O"]}, "a.csv:4"))) == 2
