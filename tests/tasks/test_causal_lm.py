"""A decoder-only trunk that learns answers beside labels: the tokens it sees, one run, and whatever is refused."""

import dataclasses
import json
import shutil

import finished_runs
import jax
import numpy as np
import pytest
import tiny
import tiny_decoder
from jitted import apply

import mtl_jax
from mtl_jax import Batching, CausalLM, Checkpoints, Classification, Evaluation, Experiment, Lora, Phase, Pretrained, Source
from mtl_jax.core.errors import UserError
from mtl_jax.data import conversations
from mtl_jax.data.batches import eval_batches
from mtl_jax.data.examples import Examples
from mtl_jax.data.formats.rows import Row
from mtl_jax.inference import peft_export
from mtl_jax.inference.predict import open_run
from mtl_jax.models.trunk_output import segment_last
from mtl_jax.training.setup import prepare
from mtl_jax.transfer.adapters import (
    IA3,
    Bottleneck,
    Prefix,
    PromptTuning,
    adapt,
    add_adapters,
    as_module,
    load_peft,
    save_peft,
)

ANSWER = CausalLM(name="answer", source="pairs", column="answer", target_length=3, prompt="{text}")
CHAT = CausalLM(name="chat", source="chats", messages="messages", target_length=4)
LABEL = Classification(name="label", source="labels", column="label")


def experiment(folder, *tasks, **changes):
    sources = (
        Source(name="pairs", rows=tiny_decoder.rows()),
        Source(name="labels", rows=tiny_decoder.rows(seed=3)),
        Source(name="chats", rows=tiny_decoder.conversations(), text="messages"),
    )
    values = {
        "name": "tiny",
        "trunk": Pretrained(str(folder)),
        "sources": tuple(source for source in sources if source.name in {task.source for task in tasks}),
        "tasks": tasks,
        "batch": Batching(rows=6, row_length=20, examples_per_row=4),
        "phases": (Phase("everything", steps=4),),
        "evaluation": Evaluation(every=4),
        "checkpoints": Checkpoints(every=4),
        "devices": 1,
    }
    return Experiment(**(values | changes))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny_decoder.write_llama(folder)
    return folder


@pytest.fixture(scope="module")
def run(llama, tmp_path_factory):
    """Answers and labels on one trunk with an adapter, under a rule that reads the Gram matrix."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    adapters, answer = (Lora(name="lora", rank=2),), dataclasses.replace(ANSWER, metric="f1")
    return workdir, mtl_jax.train(experiment(llama, answer, LABEL, weighting="upgrad", adapters=adapters), workdir)


@pytest.fixture(scope="module")
def prepared(llama):
    return prepare(experiment(llama, ANSWER, CHAT), abstract=True)


def test_a_run_answers_and_labels(run):
    workdir, results = run
    scores = results["tasks"]["answer"]["test"]
    assert scores["perplexity"] == pytest.approx(np.exp(scores["loss"]), rel=1e-4)
    assert 0 <= scores["token_accuracy"] <= 1
    model = mtl_jax.load_model(workdir)
    assert mtl_jax.predict(model, "label", ["good film"])[0]["label"] in ("good", "bad")
    answer = mtl_jax.predict(model, "answer", ["good film"])[0]
    assert set(answer["text"].split()) <= set(tiny_decoder.WORDS)


def test_its_texts_are_compared_row_by_row(run, tmp_path, monkeypatch):
    """A run against a copy of it: no difference, and the value of its results."""
    monkeypatch.setenv("MTL_JAX_CACHE", str(tmp_path / "cache"))
    workdir, results = run
    shutil.copytree(workdir, tmp_path / "again")
    sources = experiment(workdir, ANSWER, LABEL).sources
    compared = mtl_jax.compare(workdir, tmp_path / "again", resamples=100, sources=sources)
    assert compared.alone["answer"].value == pytest.approx(results["tasks"]["answer"]["test"]["f1"], abs=1e-6)
    (column,) = compared.columns.values()
    assert column.differences["answer"].value == 0


def test_an_exported_run_generates_the_same(run, tmp_path):
    workdir, _ = run
    mtl_jax.convert(workdir, tmp_path / "out", task="answer")
    checkpoint = mtl_jax.pretrained.load(str(tmp_path / "out"))
    assert checkpoint.head == "causal_lm"
    ids = checkpoint.tokenizer("good film")["input_ids"]
    tokens, _ = mtl_jax.decoding.generate(checkpoint, [ids], max_new_tokens=3)
    text = checkpoint.tokenizer.decode(tokens[0, len(ids) :], skip_special_tokens=True)
    assert text == mtl_jax.predict(workdir, "answer", ["good film"])[0]["text"]


def test_the_answer_in_a_row_is_not_read_by_a_prediction(run):
    """Else it would take room of the prompt, and count as cut where it is long."""
    model, answer = mtl_jax.load_model(run[0]), "good fine " * 4
    for text in ("good film", "the bad film was " * 8):
        alone, beside = mtl_jax.predict(model, "answer", [{"text": text}, {"text": text, "answer": answer}])
        assert alone == beside
        assert ("truncated" in alone) == (len(text) > 20)


def test_columns_of_a_prompt_are_read_as_in_training(llama, tmp_path):
    """Numbers, and what is nested."""
    rows = [row | {"n": number, "of": {"text": row["text"]}} for number, row in enumerate(tiny_decoder.rows())]
    task = dataclasses.replace(ANSWER, prompt="{of.text} {n}")
    source = Source(name="pairs", rows=rows, text="of.text")
    finished_runs.write(tmp_path / "run", experiment(llama, task, sources=(source,)))
    model = mtl_jax.load_model(tmp_path / "run")
    first, second = mtl_jax.predict(model, "answer", [rows[3], {"of.text": rows[3]["text"], "n": "3"}])
    assert first == second
    assert "error" not in first
    with pytest.raises(UserError, match=r"needs the text columns of\.text; 'of\.text' is a number, where a text is needed"):
        mtl_jax.predict(model, "answer", [{"of.text": 3, "n": 3}])


def test_conversations_are_predicted_as_they_are_trained(llama, tmp_path):
    """From lists of messages, without the answer that they may end with."""
    finished_runs.write(tmp_path / "run", experiment(llama, CHAT))
    model, (turns, *_) = mtl_jax.load_model(tmp_path / "run"), [row["messages"] for row in tiny_decoder.conversations()]
    asked = [{"messages": value} for value in (turns, turns[:-1], json.dumps(turns))]
    first, second, third = mtl_jax.predict(model, "chat", asked)
    assert first == second == third
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*asked, {"messages": [{"role": "user"}]}]))
    with pytest.raises(UserError, match=r"input 4: task 'chat': the message .* lacks role, content"):
        mtl_jax.predict_file(model, "chat", file, tmp_path / "out.jsonl", chunk=1)
    assert not (tmp_path / "out.jsonl.part").exists()


@pytest.mark.parametrize("beams", [1, 2])
def test_answers_see_a_prompt_that_was_tuned(llama, tmp_path, beams):
    """The cache has the prompt once, in front of the tokens; texts of several lengths stand in one batch."""
    task = dataclasses.replace(ANSWER, beams=beams, max_new_tokens=4)
    adapters = (PromptTuning(name="prompt", length=3, examples=4),)
    finished_runs.write(tmp_path / "run", experiment(llama, task, adapters=adapters))
    run, texts = open_run(tmp_path / "run"), ["good film", "the bad film was a song"]
    answers = mtl_jax.predict(tmp_path / "run", "answer", texts)
    table = run.params["trunk"]["embeddings"]["word"]["embedding"]

    def scored(tokens):
        """Log-probabilities of the token after each, without a cache. No token sees the padding after it."""
        padded = np.array([[*tokens, *[0] * (16 - len(tokens))]])
        hidden = apply(run.trunk.module, run.params["trunk"], padded).hidden[0]
        return np.asarray(jax.nn.log_softmax(hidden @ table.T))[: len(tokens)]

    for text, answer in zip(texts, answers, strict=True):
        prompt = run.trunk.tokenizer(text)["input_ids"]
        tokens, end = list(prompt), run.task("answer").end
        for _ in range(4 if beams == 1 else 0):
            tokens.append(int(scored(tokens)[-1].argmax()))
            if tokens[-1] == end:
                break
        if beams == 1:
            assert run.trunk.tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True) == answer["text"]
        written = run.trunk.tokenizer(answer["text"], add_special_tokens=False)["input_ids"]
        written += [] if answer.get("unfinished") else [end]
        total = sum(scored([*prompt, *written])[len(prompt) - 1 + n, token] for n, token in enumerate(written))
        assert answer["score"] == pytest.approx(total / len(written), abs=1e-4)


def test_what_of_a_decoder_does_not_go_out_to_peft(llama, tmp_path):
    base = mtl_jax.pretrained.load(str(llama))
    with pytest.raises(UserError, match="prompt tuning of a decoder-only model; only encoders are read"):
        save_peft(tmp_path / "out", add_adapters(base, [PromptTuning(name="prompt", length=2)]))
    with pytest.raises(UserError, match="PEFT has no form for a prefix in a model with rotary positions"):
        save_peft(tmp_path / "out", add_adapters(base, [Prefix(name="prefix", length=2)]))
    with pytest.raises(UserError, match="shift is for positions that are added to tokens, and this trunk has others"):
        add_adapters(base, [Prefix(name="prefix", length=2, shift=True)])


@pytest.mark.filterwarnings("ignore")  # of transformers and peft, about themselves
def test_adapters_go_out_to_peft_with_the_names_of_the_whole_model(llama, tmp_path):
    """They open on the class with the LM head, whose own parameters must be those of the checkpoint."""
    finished_runs.write(tmp_path / "run", experiment(llama, ANSWER, adapters=(Lora(name="lora", rank=2),)))
    hint = mtl_jax.convert(tmp_path / "run", tmp_path / "peft", task="answer", peft=True)
    assert "PeftModel.from_pretrained(AutoModelForCausalLM of " in hint
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    run, base, ids = open_run(tmp_path / "run"), mtl_jax.pretrained.load(str(llama)), np.array([[2, 5, 9, 14]])
    model = run.task("answer").generator(as_module(run.trunk.module, 0, "answer"))
    expected = apply(model, {"trunk": run.params["trunk"], "head": {}}, ids).logits
    loaded = load_peft(tmp_path / "peft", base)
    np.testing.assert_allclose(apply(loaded.model, loaded.params, ids).logits, expected, atol=1e-5)
    assert not np.allclose(apply(base.model, base.params, ids).logits, expected, atol=1e-3)
    trained = run._replace(params={**run.params, "heads": {"answer": {"lm_head": {"kernel": np.zeros((16, 27), np.float32)}}}})
    with pytest.raises(UserError, match="lm_head/kernel of its LM head is not that of the checkpoint"):
        peft_export.write(trained, "run", tmp_path / "more", run.task("answer"), overwrite=False)
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "peft").eval()
    with torch.no_grad():
        np.testing.assert_allclose(theirs(torch.from_numpy(ids)).logits.numpy(), expected, atol=1e-5)


@pytest.mark.long
def test_the_code_in_the_card_of_an_exported_run(run, tmp_path, capsys):
    pytest.importorskip("torch")
    mtl_jax.convert(run[0], tmp_path / "out", task="answer")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: text-generation" in text
    code = text.split("```python\n")[1].split("```")[0].replace("path/of/this/directory", str(tmp_path / "out"))
    exec(code.replace("a prompt", "good film"), {})
    assert mtl_jax.predict(run[0], "answer", ["good film"])[0]["text"] in capsys.readouterr().out


@pytest.mark.parametrize("name", ["answer", "chat"])
def test_a_token_learns_the_one_after_it_in_the_answer_alone(prepared, name):
    task = next(task for task in prepared.corpus.tasks if task.name == name)
    train = prepared.corpus.splits["train"][task.source]
    tokenizer, learned = prepared.trunk.tokenizer, {}
    for batch in eval_batches([train], prepared.experiment.batch, prepared.corpus.tasks):
        assert name == "chat" or ((batch.index >= 0).sum(axis=1) > 1).any()
        labels = batch.labels[name]
        rows, columns = np.nonzero(labels != task.missing)
        np.testing.assert_array_equal(labels[rows, columns], batch.tokens[rows, columns + 1])
        np.testing.assert_array_equal(batch.segments[rows, columns], batch.segments[rows, columns + 1])
        for row, column in zip(rows, columns, strict=True):
            example = batch.index[row, batch.segments[row, column] - 1]
            learned.setdefault(int(example), []).append(int(labels[row, column]))
    assert len(learned) == len(train.tokens)
    for number, row in enumerate(train.data):
        answers = task.parse(row)[0].split()[: task.target_length - 1]
        assert tokenizer.convert_ids_to_tokens(learned[train.first_id + number]) == [
            *answers,
            "[END]" if name == "chat" else "[SEP]",
        ]
        prompt = tokenizer.convert_ids_to_tokens(task.prompt_of(train, number))
        if name == "answer":
            assert prompt == ["[CLS]", *row.columns["text"].split()]
        else:
            assert prompt[-1] == "[BOT]"
            assert prompt.count("[USER]") == row.columns["messages"].count("user")


def test_long_prompts_lose_their_beginning_and_long_answers_their_end(prepared):
    tokenizer = prepared.trunk.tokenizer
    encoded = conversations.encode(
        tokenizer, ["the film was good", "bad ?"], ["good good good", ""], end=3, start=1, max_length=5, target_length=3
    )
    shown = [tokenizer.convert_ids_to_tokens(row) for row in encoded.tokens]
    assert shown == [["[CLS]", "good", "good", "good", "[SEP]"], ["[CLS]", "bad", "?"]]
    assert [row.tolist() for row in encoded.types] == [[0, 0, 1, 1, 1], [0, 0, 0]]
    assert encoded.truncated.tolist() == [0]


def test_adapters_find_their_places_in_a_decoder(prepared):
    adapters = (Lora(name="lora", rank=2), IA3(name="ia3"), Bottleneck(name="bottleneck"), Prefix(name="prefix", length=3))
    module = adapt(prepared.trunk.module, adapters)
    places = {name: sorted(layer.path.removeprefix("layer_0/") for layer in layers) for name, layers in module.where.items()}
    assert places["lora"] == ["attention/query", "attention/value"]
    assert places["ia3"] == ["attention/key", "attention/value", "feed_forward_out"]
    assert places["bottleneck"] == ["attention/output", "feed_forward_out"]
    assert places["prefix"] == ["attention"]
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), np.zeros((1, 1), np.int32)))["params"]["adapters"]
    assert shapes["prefix"]["layer_0"]["attention"]["key"].shape == (3, 2, 4)  # as many heads as keys have
    ids = np.zeros((1, 5), np.int32)
    hidden = jax.eval_shape(
        lambda params: module.apply({"params": params}, ids).hidden, {**prepared.params["trunk"], "adapters": shapes}
    )
    assert hidden.shape == (1, 5, 16)


def test_answers_are_compared_with_all_that_a_row_has():
    rows = [Row({"text": "a", "answer": value}, "rows") for value in (["good film", "fine"], "bad", None)]
    scores = dataclasses.replace(ANSWER, metric="rougeL").text_metrics(["fine", "bad song", "x"], rows)
    assert scores["exact"] == 0.5
    assert scores["f1"] == pytest.approx((1 + 2 / 3) / 2)
    assert scores["rougeL"] == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("", "A", 0),
        ("the", "A", 0),
        ("a", "A", 1),
        ("A.", "A", 1),  # as "B." is right for "B"
        ("<", ">", 0),
        (" > ", ">", 1),
        ("", "?", 0),
        ("The", "the", 1),
        ("", ["?", "fine"], 0),
        ("?", ["?", "fine"], 1),
        ("the film", "Film.", 1),
    ],
)
def test_an_answer_of_an_article_or_a_mark_alone_is_compared_as_it_is(text, answer, expected):
    """Not as in SQuAD, where such an answer means that there is none."""
    rows = [Row({"text": "q", "answer": answer}, "rows")]
    for metric in ("exact", "f1"):
        task = dataclasses.replace(ANSWER, metric=metric)
        assert task.text_metrics([text], rows)[metric] == expected
        examples = Examples("pairs", 0, [np.zeros(1, np.int32)], {}, data=rows)
        assert task.row_statistics([text], examples).values.tolist() == [[expected, 1.0]]


def test_the_last_token_of_each_example_is_its_vector():
    hidden = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    segments = np.array([[1, 1, 2, 2, 2], [1, 2, 0, 0, 0]])
    found = segment_last(hidden, segments, 3)
    expected = np.stack([[hidden[0, 1], hidden[0, 4], np.zeros(3)], [hidden[1, 0], hidden[1, 1], np.zeros(3)]])
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], r"'?\[\]'? is not a list of messages"),
        ("[1", "not a list of messages"),
        ([{"role": "user"}], "lacks role, content"),
        ([{"role": "assistant", "content": "a"}], "an answer and no message before it"),
    ],
)
def test_what_is_no_conversation_is_named(value, message):
    with pytest.raises(ValueError, match=message):
        conversations.parse(value)


def test_conversations_are_lists_their_json_or_a_text():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert conversations.parse(turns) == conversations.parse(json.dumps(turns)) == ((turns[0],), ("b",))
    assert conversations.parse("a") == ((turns[0],), ())


def test_prompts_are_columns_in_braces():
    row = Row({"text": "x", "words": ["a", "b"], "none": None}, "rows.tsv:3")
    assert conversations.filled("{words}: {text}?", row, "task 'answer'") == "a b: x?"
    assert conversations.read_columns("{words}: {a.b!r:>9} {c[0]} {{no}} {words}") == ["words", "a.b", "a", "c[0]", "c"]
    for template, message in (
        ("{other}", r"rows\.tsv:3: task 'answer': the row has no column 'other'"),
        ("{none}", "the row has None in column 'none'"),
        ("{text", "is not a text with columns in braces"),
    ):
        with pytest.raises(UserError, match=message):
            conversations.filled(template, row, "task 'answer'")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"column": ""}, "give either column"),
        ({"column": "answer", "messages": "messages"}, "give either column"),
        ({"column": "", "messages": "messages", "prompt": "{text}"}, "conversations have their own messages"),
        ({"target_length": 1}, "target_length is 1"),
        ({"prompt": "{text"}, "task .answer.: prompt '{text' is not a text with columns in braces"),
        ({"hidden": 8}, "hidden is 8"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"metric": "bleurt"}, "metric of task 'answer'"),
    ],
)
def test_fields_that_make_no_sense(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(ANSWER, **changes).check()


def test_what_does_not_fit_is_refused_before_any_work(llama, tmp_path):
    tiny_decoder.write_llama(tmp_path / "plain", chat=False)
    tiny_decoder.write_llama(tmp_path / "cut", vocab_size=len(tiny_decoder.WORDS) - 1)
    tiny.write_bert(tmp_path / "bert")
    seq2seq = mtl_jax.Seq2Seq(name="text", source="pairs", column="answer", target_length=4)
    beside = dataclasses.replace(LABEL, source="pairs")
    for folder, tasks, message in (
        (tmp_path / "plain", (CHAT,), "task 'chat': the trunk's tokenizer has no chat template"),
        (tmp_path / "bert", (ANSWER,), "task 'answer': a causal LM needs a decoder-only checkpoint"),
        (llama, (seq2seq,), "take CausalLM in place of Seq2Seq"),
        (llama, (ANSWER, beside), "reads the answers beside the texts of source 'pairs', so task 'label' cannot"),
        (llama, (dataclasses.replace(ANSWER, target_length=20),), "nothing is left for the prompt"),
        (
            tmp_path / "cut",
            (CHAT,),
            r"task 'chat': the token '\[END\]' has the id 26, but the token table of the trunk has 26 rows",
        ),
    ):
        with pytest.raises(UserError, match=message):
            prepare(experiment(folder, *tasks), abstract=True)
    with pytest.raises(UserError, match="only decoder-only checkpoints have a choice"):
        prepare(experiment(tmp_path / "bert", LABEL, trunk=Pretrained(str(tmp_path / "bert"), pooling="last")))
