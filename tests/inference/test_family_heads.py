"""Tasks whose head is the text classifier of the checkpoint's family: trained, written, opened, and begun from again."""

import dataclasses
import json
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_decoder
import tiny_seq2seq
from safetensors.numpy import load_file

from mtl_jax import (
    Checkpoints,
    Classification,
    Embedding,
    Evaluation,
    InitFrom,
    Lora,
    Multilabel,
    Phase,
    Pretrained,
    Regression,
    Source,
    pretrained,
    train,
)
from mtl_jax.core.errors import UserError
from mtl_jax.core.trees import flat
from mtl_jax.inference import card_snippets, export, front_matter, peft_export
from mtl_jax.inference.export import convert
from mtl_jax.inference.predict import TrainedRun, open_run, predict
from mtl_jax.models.trunk_output import segment_first
from mtl_jax.training import init_from
from mtl_jax.training.setup import prepare
from mtl_jax.transfer.adapters import load_peft
from mtl_jax.trunks import base as trunks

TEXTS = ["the film is great", "who is the man ?"]
QUICKLY = {"xla_backend_optimization_level": 0}
CARD = "---\nlicense: mit\nlanguage:\n- en\nbase_model: someone/tiny\n---\n\n# A BERT\n"


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """Heads of all three kinds, on a BERT with a card; the first step reads features that are computed once."""
    folder = tmp_path_factory.mktemp("family")
    tiny.write_bert(folder / "bert", layers=1)
    (folder / "bert" / "README.md").write_text(CARD)
    tiny.write_data(folder, rows=40)
    pairs = [(good, bad) for bad in tiny.BAD for good in tiny.GOOD]
    rows = [{"text": f"{good} {bad} film", "topics": [good, "song"][: 1 + (bad == "sad")]} for good, bad in pairs]
    base = tiny.experiment(folder / "bert", folder)
    return dataclasses.replace(
        base,
        sources=(*base.sources, Source("topics", rows=rows[4:], dev_rows=rows[:2], test_rows=rows[2:4])),
        tasks=(
            Regression(name="rating", source="ratings", column="rating", scale=2.0, head="family"),
            Classification(name="fine", source="questions", column="fine", head="family"),
            Multilabel(name="topics", source="topics", column="topics", head="family"),
        ),
        phases=(Phase("heads", steps=1, rules=tiny.HEADS_ONLY), Phase("everything", steps=1)),
        checkpoints=Checkpoints(every=2, keep=1),
        evaluation=Evaluation(baseline="none"),
    )


@pytest.fixture(scope="module")
def prepared(experiment):
    return prepare(experiment)


@pytest.fixture(scope="module")
def run(experiment, tmp_path_factory):
    """One step of one task."""
    workdir = tmp_path_factory.mktemp("run") / "run"
    train(dataclasses.replace(experiment, only=("fine",), phases=experiment.phases[1:]), workdir)
    return workdir


@pytest.fixture(scope="module")
def written(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "fine"
    assert convert(run, folder, task="fine") == ""
    return folder


def code_of(folder):
    """The code in the card, with its second text."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    return code.replace(card_snippets.FOLDER, str(folder)).replace("another one", TEXTS[1])


def test_heads_begin_as_the_pooler_of_the_checkpoint_and_train(prepared, run):
    assert [plan.cached_features for plan in prepared.plans] == [True, False]
    begin, end = flat(prepared.params["heads"]), flat(open_run(run).params["heads"])
    kernel = tiny.bert_tensors(layers=1)["pooler.dense.weight"].T
    for task in ("rating", "fine", "topics"):
        np.testing.assert_array_equal(begin[f"{task}/pooler/dense/kernel"], kernel)
    assert not any(np.array_equal(begin[path], leaf) for path, leaf in end.items())
    assert "classifier" not in json.loads((run / "config.json").read_text())["tasks"][1]


def test_what_is_written_says_what_the_run_says(run, written):
    checkpoint = pretrained.load(str(written))
    assert (checkpoint.head, checkpoint.unused, checkpoint.initialized) == ("sequence_classification", (), ())
    inputs = checkpoint.tokenizer(TEXTS, padding=True, return_tensors="np")
    logits = np.asarray(
        jax.jit(checkpoint.model.apply, compiler_options=QUICKLY)({"params": checkpoint.params}, **inputs).logits
    )
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for line, row in zip(predict(run, "fine", TEXTS), probabilities, strict=True):
        assert checkpoint.labels[row.argmax()] == line["label"]
        assert row.max() == pytest.approx(line["probability"], abs=2e-6)


def test_names_shapes_and_labels_of_every_kind(prepared, run, tmp_path, monkeypatch):
    """As transformers has them; the scale of a regression is a part of the last layer."""
    begun = TrainedRun(prepared.experiment, prepared.corpus.tasks, prepared.trunk, prepared.params, 1, None)
    monkeypatch.setattr(export, "open_run", lambda folder: begun)
    for task, labels, kind, scale in (
        ("rating", ["LABEL_0"], "regression", 2.0),
        ("fine", begun.task("fine").labels, "single_label_classification", 1.0),
        ("topics", begun.task("topics").labels, "multi_label_classification", 1.0),
    ):
        convert(run, tmp_path / task, task=task)
        config = json.loads((tmp_path / task / "config.json").read_text())
        assert list(config["id2label"].values()) == list(labels)
        assert (config["problem_type"], config["architectures"]) == (kind, ["BertForSequenceClassification"])
        tensors, head = load_file(tmp_path / task / "model.safetensors"), prepared.params["heads"][task]
        np.testing.assert_array_equal(tensors["classifier.weight"], np.asarray(head["head"]["classifier"]["kernel"]).T * scale)
        np.testing.assert_array_equal(tensors["bert.pooler.dense.bias"], head["pooler"]["dense"]["bias"])


def test_a_run_begins_as_it_to_the_bit(experiment, prepared, run, written):
    """The labels come by name, whatever their order; by init_from, too."""
    trained = open_run(run)
    labels = trained.task("fine").labels
    task = Classification(name="other", source="questions", column="fine", labels=labels[::-1], head="family")
    again = dataclasses.replace(experiment, trunk=Pretrained(str(written)), tasks=(task,))
    head, expected = prepare(again).params["heads"]["other"], trained.params["heads"]["fine"]
    np.testing.assert_array_equal(head["pooler"]["dense"]["kernel"], expected["pooler"]["dense"]["kernel"])
    np.testing.assert_array_equal(head["head"]["classifier"]["kernel"], expected["head"]["classifier"]["kernel"][:, ::-1])
    loaded = InitFrom(str(written), renames=(("^(pooler|head)/", r"heads/fine/\1/"),))
    begun = prepared._replace(experiment=dataclasses.replace(experiment, init_from=loaded))
    params = flat(init_from.load_parameters(begun)[0].params["heads"]["fine"])
    for path, leaf in flat(expected).items():
        np.testing.assert_array_equal(params[path], leaf)


def test_the_card_says_what_stands_in_the_run(run, written):
    card = (written / "README.md").read_text()
    assert front_matter.fields_of(card) == {"license": ("mit",), "language": ("en",), "base_model": ("someone/tiny",)}
    assert "pipeline_tag: text-classification" in card
    data, results = (json.loads((run / f"{name}.json").read_text()) for name in ("data", "results"))
    for of_source in data["sources"].values():
        assert all(part["sha256"] in card for part in of_source.values())
    for name, task in results["tasks"].items():
        score = task["test"][task["metric"]]
        assert re.search(rf"\| {name} .*\| {'undefined' if score is None else f'{score:.4f}'}", card)
    for part in ("## Audit", "rule equal", "| everything ", "seed 0", "## Licence\n\nmit, which is that of bert"):
        assert part in card
    assert str(written.parent.parent) not in card


def test_the_card_of_a_private_run_says_nothing_of_its_rows(run, tmp_path, monkeypatch):
    private = open_run(run)
    private = private._replace(experiment=dataclasses.replace(private.experiment, private=True))
    monkeypatch.setattr(export, "open_run", lambda folder: private)
    convert(run, tmp_path / "out", task="fine")
    card = (tmp_path / "out" / "README.md").read_text()
    data = json.loads((run / "data.json").read_text())
    assert not any(part["sha256"] in card for of_source in data["sources"].values() for part in of_source.values())
    assert "## Audit" not in card
    assert "seed" not in card
    assert "examples" not in card.partition("## How it was trained")[0].partition("## What was trained")[2]


def test_its_code_gives_the_probabilities_of_the_run(run, written, capsys):
    pytest.importorskip("torch")
    exec(code_of(written), {})
    _, answers = eval(capsys.readouterr().out)
    (line,) = predict(run, "fine", TEXTS[1:])
    assert (answers[0]["label"], answers[0]["score"]) == (line["label"], pytest.approx(line["probability"], abs=1e-5))


@pytest.mark.long
def test_the_code_of_every_kind(experiment, tmp_path, capsys):
    """After a first phase that reads features which are computed once."""
    pytest.importorskip("torch")
    train(experiment, tmp_path / "run")
    for task in ("fine", "topics", "rating"):
        convert(tmp_path / "run", tmp_path / task, task=task)
        exec(code_of(tmp_path / task), {})
        scores = {answer["label"]: answer["score"] for answer in eval(capsys.readouterr().out)[1]}
        (line,) = predict(tmp_path / "run", task, TEXTS[1:])
        expected = {"LABEL_0": line["value"]} if task == "rating" else line.get("probabilities", {})
        expected |= {line["label"]: line["probability"]} if task == "fine" else {}
        for label, value in expected.items():
            assert scores[label] == pytest.approx(value, abs=1e-5)


def test_adapters_go_out_to_peft_with_the_head(prepared, tmp_path):
    """A pooler that has trained is stored, too; a classifier of several layers is one module there."""
    trunk = trunks.adapt(prepared.trunk, [Lora(name="lora", rank=2)], 3)
    params = {**prepared.params, "trunk": trunks.init_params(trunk, jax.random.key(0))}
    begun = TrainedRun(prepared.experiment, prepared.corpus.tasks, trunk, params, 1, None)
    hint = peft_export.write(begun, "run", tmp_path / "peft", begun.task("rating"), overwrite=False)
    assert "AutoModelForSequenceClassification of" in hint
    assert "num_labels=1" in hint
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["modules_to_save"], config["task_type"]) == (["bert.pooler.dense", "classifier"], "SEQ_CLS")
    base = pretrained.load(prepared.experiment.trunk.path, head="sequence_classification", labels=1)
    loaded = load_peft(tmp_path / "peft", base).params
    kernel = params["heads"]["rating"]["head"]["classifier"]["kernel"]
    np.testing.assert_array_equal(loaded["head"]["classifier"]["kernel"], kernel * 2.0)


def test_the_code_for_several_labels_without_the_family(prepared, run, tmp_path, monkeypatch, capsys):
    task = dataclasses.replace(prepared.corpus.tasks[2], head="", classifier=None)
    params = {**prepared.params, "heads": {"topics": task.init(jax.random.key(0), tiny.HIDDEN)}}
    begun = TrainedRun(prepared.experiment, (task,), prepared.trunk, params, 1, None)
    monkeypatch.setattr(export, "open_run", lambda folder: begun)
    assert "no class for the head of topics: open" in convert(run, tmp_path / "out", task="topics")
    assert json.loads((tmp_path / "out" / "labels.json").read_text()) == list(task.labels)
    assert "id2label" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert "pipeline_tag" not in (tmp_path / "out" / "README.md").read_text().partition("---\n#")[0]
    model = types.SimpleNamespace(encode=lambda texts: np.zeros((len(texts), len(task.labels))))
    library = types.SimpleNamespace(SentenceTransformer=lambda folder: model)
    monkeypatch.setitem(sys.modules, "sentence_transformers", library)
    exec(code_of(tmp_path / "out"), {})
    assert eval(capsys.readouterr().out.splitlines()[-1]) == dict.fromkeys(task.labels, 0.5)


def test_the_first_token_of_every_segment():
    hidden = np.random.default_rng(0).normal(size=(2, 6, 3)).astype(np.float32)
    found = segment_first(jnp.asarray(hidden), jnp.asarray([[1, 1, 2, 2, 2, 0], [1, 2, 3, 3, 0, 0]]), 3)
    expected = np.stack([[hidden[0, 0], hidden[0, 2], np.zeros(3)], [hidden[1, 0], hidden[1, 1], hidden[1, 2]]])
    np.testing.assert_array_equal(found, expected)


def test_the_card_of_a_base_model():
    card = "---\nlanguage: [de, 'en']\nlicense: \"apache-2.0\"\nbase_model:\n  - a/b\n---\ntext\nlicense: mit\n"
    assert front_matter.fields_of(card) == {"language": ("de", "en"), "license": ("apache-2.0",), "base_model": ("a/b",)}
    assert front_matter.fields_of("# A model\nlicense: mit\n") == {}
    assert front_matter.fields_of("---\nlicense: <script>\n---\n") == {}


def test_bad_input(experiment, tmp_path):
    tiny_seq2seq.write_t5(tmp_path / "t5")
    tiny_decoder.write_llama(tmp_path / "llama")
    mean = Pretrained(str(tmp_path / "llama"), pooling="mean")
    for trunk, fields, message in (
        (None, {"hidden": 4}, "task 'fine': hidden is 4, but head is 'family', and its layers are those of transformers"),
        (None, {"dropout": 0.1}, r"task 'fine': dropout is 0\.1, but head is 'family', and its rates are the trunk's"),
        (None, {"head": "famly"}, r"unknown head of task 'fine': 'famly' \(did you mean 'family'\?\)"),
        (Embedding(), {}, "task 'fine': head is 'family', but the trunk is from scratch.*; leave head out"),
        (Pretrained(str(tmp_path / "t5")), {}, "checkpoints of the family t5 have no classifier here; leave head out"),
        (
            mean,
            {},
            "the classifier of llama checkpoints reads the last token, and trunk.pooling is 'mean'; leave trunk.pooling",
        ),
    ):
        task = dataclasses.replace(experiment.tasks[1], **fields)
        with pytest.raises(UserError, match=message):
            prepare(dataclasses.replace(experiment, tasks=(task,), trunk=trunk or experiment.trunk))
