"""Metrics from numbers of each row: on resamples, equal to the task's own metrics of the resampled rows."""

from types import SimpleNamespace

import numpy as np
import pytest

from mtl_jax import (
    CausalLM,
    Classification,
    Contrastive,
    MaskedLM,
    Multilabel,
    MultipleChoice,
    Ordinal,
    Ranking,
    Regression,
    Seq2Seq,
    Span,
    Tagging,
)
from mtl_jax.data.examples import Examples, labels_of
from mtl_jax.data.formats.rows import Row
from mtl_jax.tasks.row_statistics import RowStatistics, pearson, spearman
from mtl_jax.training.row_outcomes import _again, _by_row

ROWS = 30
RNG = np.random.default_rng(3)
COUNTS = RNG.multinomial(ROWS, np.full(ROWS, 1 / ROWS), size=4).astype(float)
ONES = np.ones((1, ROWS))
TAGS = ("B-x", "B-y", "I-x", "I-y", "O")
WORDS = ["the film was good", "a bad man , ann", "who was it", "where is the city now"]


def examples_of(task, columns, lengths=None, **fields):
    """Examples with windows of these lengths, one for each row; and the labels that the task reads from the rows."""
    tokens = [np.arange(length, dtype=np.int32) for length in lengths or [4] * len(columns)]
    data = [Row(row, f"row {number}") for number, row in enumerate(columns)]
    examples = Examples("s", 0, tokens, {}, data=data, **fields)
    if not task.decodes:
        examples.labels[task.name] = labels_of(task, examples, None).labels
    return examples


def labelled(task, column, values):
    """Random outputs for rows with random labels, some of them without one."""
    rows = [{column: "" if number % 7 == 3 else str(RNG.choice(values))} for number in range(ROWS)]
    outputs = RNG.normal(size=(ROWS, task.outputs)).astype(np.float32).round(1)  # with ties
    return task, outputs, examples_of(task, rows)


def label_cases():
    base = {"name": "t", "source": "s"}
    for metric in ("accuracy", "macro_f1", "macro_recall", "matthews", "f1:a", "f1:a+c"):
        yield labelled(Classification(**base, labels=("a", "b", "c", "d"), metric=metric), "label", ["a", "b", "c"])
    for metric in Regression.metric_names:
        yield labelled(Regression(**base, scale=2.0, metric=metric), "label", ["0", "1", "1.5", "4"])
    for metric in Ordinal.metric_names:
        yield labelled(Ordinal(**base, labels=("1", "2", "3", "4"), metric=metric), "label", ["1", "2", "4"])
    for metric in Multilabel.metric_names:
        task = Multilabel(**base, columns=("p", "q", "r"), labels=("p", "q", "r"), metric=metric)
        rows = [dict(zip("pqr", RNG.choice(["yes", "no", ""], 3).tolist(), strict=True)) for _ in range(ROWS)]
        yield task, RNG.normal(size=(ROWS, 3)).astype(np.float32), examples_of(task, rows)


def word_cases():
    base = {"name": "t", "source": "s"}
    lengths = RNG.integers(2, 7, ROWS).tolist()
    words = [np.arange(length, dtype=np.int32) for length in lengths]
    rows = []
    for length in lengths:
        tags = RNG.choice(["O", "B-x", "B-y", "_"], length).tolist()
        tags = ["I-x" if before == "B-x" else tag for before, tag in zip(["", *tags], tags, strict=False)]
        rows.append({"text": ["w"] * length, "tags": tags})
    for metric in ("entity_f1", "entity_precision", "entity_recall", "token_accuracy"):
        task = Tagging(**base, labels=TAGS, metric=metric)
        outputs = [RNG.normal(size=(length, len(TAGS))).astype(np.float32) for length in lengths]
        yield task, outputs, examples_of(task, rows, lengths, words=words)
    for metric in Span.metric_names:
        task = Span(**base, metric=metric)
        contexts = [WORDS[number % 4] for number in range(ROWS)]
        offsets = [np.array([(-1, -1), *_spans(context)], np.int32) for context in contexts]
        answers = [[{"text": context.split()[0], "start": 0}] for context in contexts]
        rows = [{"context": context, "answers": answer} for context, answer in zip(contexts, answers, strict=True)]
        rows[5]["answers"] = None
        lengths_of = [len(places) for places in offsets]
        outputs = [RNG.normal(size=(length, 2)).astype(np.float32) for length in lengths_of]
        yield task, outputs, examples_of(task, rows, lengths_of, offsets=offsets)
    task = MaskedLM(**base)
    outputs = [np.stack([np.ones(length), RNG.integers(-1, 2, length)], axis=1) for length in lengths]
    yield task, outputs, examples_of(task, [{"text": "w"}] * ROWS, lengths)


def _spans(text):
    starts = [0, *(place + 1 for place, letter in enumerate(text) if letter == " ")]
    return [(start, start + len(word)) for start, word in zip(starts, text.split(), strict=True)]


def text_cases():
    references = [WORDS[number % 4] for number in range(ROWS)]
    texts = [WORDS[number % 4][: 4 + number] + " it is" for number in range(ROWS)]
    rows = [{"target": "" if number == 2 else text} for number, text in enumerate(references)]
    for metric in ("bleu", "chrf", "rouge1", "rougeL"):
        task = Seq2Seq(name="t", source="s", column="target", metric=metric)
        yield task, texts, examples_of(task, rows)
    for metric in ("exact", "f1", "chrf", "rougeL"):
        task = CausalLM(name="t", source="s", column="target", metric=metric)
        yield task, [text.removesuffix(" it is") for text in texts], examples_of(task, rows)
    lengths = RNG.integers(2, 7, ROWS).tolist()
    task = CausalLM(name="t", source="s", column="target")
    examples = examples_of(task, rows, lengths)
    examples.labels["t"] = [np.where(np.arange(length) < 1, -1, 5) for length in lengths]
    yield task, [RNG.integers(0, 2, (length, 3)).astype(np.float32) for length in lengths], examples


CASES = [*label_cases(), *word_cases(), *text_cases()]


@pytest.mark.parametrize(("task", "outputs", "examples"), CASES, ids=[f"{type(c[0]).__name__}-{c[0].metric}" for c in CASES])
def test_a_metric_of_resampled_rows(task, outputs, examples):
    counts = np.concatenate([ONES, COUNTS])
    exact = task.row_statistics(outputs, examples).metric(counts)
    np.testing.assert_allclose(exact, _again(task, outputs, examples)(counts), atol=1e-12)


def test_lists_and_searches_count_whole():
    """All rows at once; a list counts with its first row, and a list without an order in nothing."""
    base = {"name": "t", "source": "s"}
    choice = MultipleChoice(**base, choices=("p", "q"))
    rows = np.repeat(np.arange(ROWS), 2).astype(np.int32)
    data = [{"p": "a", "q": "b", "label": "" if number == 4 else str(RNG.integers(2))} for number in range(ROWS)]
    cases = [(choice, RNG.normal(size=(2 * ROWS, 1)), data, {"rows": rows, "lengths": [4] * (2 * ROWS)})]
    ranking = Ranking(**base, group="query", column="grade", metric="mrr")
    data = [{"query": f"q{number // 4 * (number < 20)}", "grade": str(RNG.integers(3))} for number in range(ROWS)]
    cases.append((ranking, RNG.normal(size=(ROWS, 1)), data, {}))
    search = Contrastive(**base, compare="labels", column="label", classes=("a", "b", "c"), size=3, metric="ndcg")
    data = [{"label": "" if number == 9 else "abc"[number % 3]} for number in range(ROWS)]
    cases.append((search, RNG.normal(size=(ROWS, 3)), data, {}))
    pairs = Contrastive(**base, column="score", objective="cosent", size=3)
    data = [{"score": str(RNG.integers(5))} for _ in range(ROWS)]
    cases.append((pairs, RNG.normal(size=(2 * ROWS, 3)), data, {"rows": rows, "lengths": [4] * (2 * ROWS)}))
    for task, outputs, data, fields in cases:
        examples = examples_of(task, data, **fields)
        if task is search:  # equal tokens are equal texts
            examples.labels["t"][:, 2] = np.where(np.isnan(examples.labels["t"][:, 2]), np.nan, np.arange(ROWS))
        statistics = task.row_statistics(outputs, examples)
        assert len(statistics.values) == ROWS
        np.testing.assert_allclose(statistics.metric(ONES), task.metrics(outputs, examples)[task.metric], atol=1e-9)


def test_a_correlation_of_constants_is_not_defined():
    values = np.array([[1.0, 2.0], [1.0, 3.0], [2.0, 3.0], [5.0, np.nan]])
    for function in (pearson, spearman):
        assert np.isnan(function(values, np.array([[1.0, 1, 0, 9], [0, 1, 1, 0], [0, 0, 0, 1]]))).all()
        assert function(values, np.array([[1.0, 0, 1, 5]])) == pytest.approx(1)
        assert np.isnan(function(np.array([[np.inf, 1.0], [2.0, 2.0]]), np.ones((1, 2)))).all()
    assert np.isnan(RowStatistics(np.zeros((2, 2)), "mean").metric(np.ones((1, 2)))).all()


def test_texts_stand_at_the_places_of_their_rows():
    """Rows of the hub are other objects at each access, and one that could not be read has no examples."""
    examples = SimpleNamespace(data=range(3), row_of=np.array([0, 2, 2]), groups=lambda: [range(1), range(1, 3)])
    assert _by_row([(object(), "first"), (object(), "third")], examples) == ["first", "", "third"]
