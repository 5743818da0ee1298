"""mtl-jax convert: what it writes says what the run says."""

import ast
import json
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import tiny
from jitted import apply
from safetensors.numpy import load_file

from mtl_jax import Evaluation, Phase, Source, Span, Tagging, pretrained, train
from mtl_jax.cli import main
from mtl_jax.core.errors import UserError
from mtl_jax.inference import export
from mtl_jax.inference.export import convert
from mtl_jax.inference.predict import open_run, predict

TEXTS = ["the film is great", "who is the man ?", "a sad song", "where was the city . " * 9]


def answers(folder, texts):
    """What the directory says by its files, as sentence-transformers reads them: trunk, mean of real tokens, linear layers."""
    checkpoint = pretrained.load(str(folder))
    length = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
    inputs = checkpoint.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="np")
    inputs.pop("token_type_ids", None)
    x = np.asarray(apply(checkpoint.model, checkpoint.params, **inputs).hidden)
    for module in json.loads((folder / "modules.json").read_text())[1:]:
        config = json.loads((folder / module["path"] / "config.json").read_text())
        if module["type"].endswith("Pooling"):
            assert config["pooling_mode_mean_tokens"]
            mask = inputs["attention_mask"][..., None]
            x = (x * mask).sum(1) / mask.sum(1)
        else:
            tensors = load_file(folder / module["path"] / "model.safetensors")
            x = x @ tensors["linear.weight"].T + tensors["linear.bias"]
            x = np.maximum(x, 0) if config["activation_function"].endswith("ReLU") else x
    return x


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def test_the_trunk_goes_out_as_the_bare_model(workdir, tmp_path):
    convert(str(workdir), tmp_path / "out")
    run, found = open_run(workdir), pretrained.load(str(tmp_path / "out"))
    assert found.head is None
    assert (found.unused, found.initialized) == ((), ())
    for path in ("layer_0/feed_forward_out/kernel", "embeddings/word/embedding"):
        ours, theirs = run.params["trunk"], found.params["trunk"]
        for name in path.split("/"):
            ours, theirs = ours[name], theirs[name]
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(run.trunk.beside["pooler"]["dense"]["bias"], tiny.bert_tensors()["pooler.dense.bias"])
    assert not (tmp_path / "out" / "modules.json").exists()


@pytest.mark.parametrize("task", ["rating", "coarse", "fine"])
def test_a_head_goes_out_beside_the_trunk(workdir, tmp_path, task):
    convert(str(workdir), tmp_path / "out", task=task)
    outputs, expected = answers(tmp_path / "out", TEXTS), predict(workdir, task, TEXTS)
    if task == "rating":
        np.testing.assert_allclose(outputs[:, 0], [line["value"] for line in expected], atol=2e-6)
        return
    labels = json.loads((tmp_path / "out" / "labels.json").read_text())
    assert [labels[best] for best in outputs.argmax(-1)] == [line["label"] for line in expected]
    np.testing.assert_allclose(softmax(outputs).max(-1), [line["probability"] for line in expected], atol=2e-6)


def snippet(folder):
    """The lines of the export's card, as whoever follows it would run them."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert code.count("path/of/this/directory") == 1
    return code.replace("path/of/this/directory", str(folder))


@pytest.mark.parametrize("task", ["rating", "fine"])
def test_the_card_of_a_text_head_works(workdir, tmp_path, monkeypatch, capsys, task):
    """The files say what sentence-transformers would; test_sentence_transformers_opens_it asks itself, where it is there."""
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["mtl-jax", "convert", str(workdir), str(out), "--task", task])
    main.console()
    assert f"no class for the head of {task}: open {out} with sentence-transformers" in capsys.readouterr().out
    model = types.SimpleNamespace(
        SentenceTransformer=lambda path: types.SimpleNamespace(encode=lambda x: answers(Path(path), x))
    )
    monkeypatch.setitem(sys.modules, "sentence_transformers", model)
    exec(snippet(out), {})
    shown, expected = capsys.readouterr().out, predict(workdir, task, ["a text", "another one"])
    if task == "fine":
        assert shown == f"{[line['label'] for line in expected]}\n"
    else:
        np.testing.assert_allclose([float(x) for x in shown.strip("[]\n").split()], [x["value"] for x in expected], atol=1e-5)


@pytest.mark.parametrize("task", ["", "rating", "fine"])
def test_a_bare_model_names_no_labels(workdir, tmp_path, monkeypatch, task):
    """transformers would put a random head under them."""
    run = open_run(workdir)
    labels = {
        "id2label": {"0": "no", "1": "yes"},
        "label2id": {"no": 0, "yes": 1},
        "problem_type": "single_label_classification",
    }
    monkeypatch.setattr(
        export, "open_run", lambda folder: run._replace(trunk=run.trunk._replace(raw={**run.trunk.raw, **labels}))
    )
    convert(str(workdir), tmp_path / "out", task=task)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"id2label", "label2id", "num_labels", "problem_type"} & config.keys()
    assert config["architectures"] == ["BertModel"]


def test_transformers_opens_it(workdir, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModel, AutoTokenizer

    convert(str(workdir), tmp_path / "out", task="fine")
    model, info = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    checkpoint = pretrained.load(str(tmp_path / "out"))
    inputs = AutoTokenizer.from_pretrained(tmp_path / "out")(TEXTS[:2], padding=True, return_tensors="np")
    ours = apply(checkpoint.model, checkpoint.params, **inputs)
    with torch.no_grad():
        theirs = model.eval()(**{name: torch.from_numpy(value) for name, value in inputs.items()})
    real = inputs["attention_mask"].astype(bool)
    np.testing.assert_allclose(np.asarray(ours.hidden)[real], theirs.last_hidden_state.numpy()[real], atol=1e-5)


@pytest.fixture(scope="module")
def tagger(bert, tmp_path_factory):
    """A run of two steps: tags, and answers to questions, from one trunk; and a tagger whose head has a hidden layer."""
    folder = tmp_path_factory.mktemp("tagger")
    for split, word in (("train", "city"), ("dev", "song"), ("test", "man")):
        (folder / f"{split}.conll").write_text(f"good B-good\nfilm I-good\n{word} O\n\nsad B-bad\n{word} O\n", encoding="utf-8")
        asked = {"question": "who", "context": f"the {word} was sad", "answers": [{"text": word, "start": 4}]}
        (folder / f"{split}.jsonl").write_text(json.dumps(asked) + "\n", encoding="utf-8")

    def source(name, suffix, **fields):
        train, dev, test = (str(folder / f"{split}.{suffix}") for split in ("train", "dev", "test"))
        return Source(name=name, path=train, dev_path=dev, test_path=test, **fields)

    labels = ("O", "B-good", "I-good", "B-bad")
    found = tiny.experiment(
        bert,
        folder,
        sources=(
            source("words", "conll", format="conll", columns=("text", "tags")),
            source("asked", "jsonl", format="jsonl", text="question", pair="context"),
        ),
        tasks=(
            Tagging(name="tags", source="words", labels=labels),
            Tagging(name="deep", source="words", labels=labels, hidden=4),
            Span(name="answer", source="asked"),
        ),
        phases=(Phase("everything", steps=2),),
        evaluation=Evaluation(baseline="none"),
    )
    train(found, folder / "run")
    return folder / "run"


@pytest.mark.parametrize(("task", "kind"), [("tags", "token_classification"), ("answer", "question_answering")])
def test_a_head_on_tokens_goes_out_as_transformers_own(tagger, tmp_path, task, kind):
    convert(str(tagger), tmp_path / "out", task=task)
    run, found = open_run(tagger), pretrained.load(str(tmp_path / "out"))
    assert (found.head, found.unused, found.initialized) == (kind, (), ())
    (layer,) = found.params["head"].values()
    for leaf in ("kernel", "bias"):
        np.testing.assert_array_equal(layer[leaf], run.params["heads"][task]["output"][leaf])
    if task == "tags":
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert [config["id2label"][str(i)] for i in range(4)] == ["O", "B-good", "I-good", "B-bad"]


def test_transformers_tags_as_the_run_does(tagger, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForQuestionAnswering, AutoModelForTokenClassification

    for task, kind in (("tags", AutoModelForTokenClassification), ("answer", AutoModelForQuestionAnswering)):
        convert(str(tagger), tmp_path / task, task=task)
        model, info = kind.from_pretrained(tmp_path / task, output_loading_info=True)
        assert not any(info.values()), info
        found = pretrained.load(str(tmp_path / task))
        inputs = found.tokenizer(["good film the city", "sad song"], padding=True, return_tensors="np")
        ours = np.asarray(found.model.apply({"params": found.params}, **inputs).logits)
        with torch.no_grad():
            theirs = model.eval()(**{name: torch.from_numpy(value) for name, value in inputs.items()})
        logits = theirs.logits if task == "tags" else torch.stack([theirs.start_logits, theirs.end_logits], dim=-1)
        real = inputs["attention_mask"].astype(bool)
        np.testing.assert_allclose(ours[real], logits.numpy()[real], atol=1e-5)


@pytest.mark.parametrize("task", ["tags", "answer"])
def test_the_card_of_a_head_on_tokens_works(tagger, tmp_path, capsys, task):
    pytest.importorskip("torch")
    assert convert(str(tagger), tmp_path / "out", task=task) == ""
    code = snippet(tmp_path / "out").replace("a question", "who").replace("a text with the answer", "the city was sad")
    code = code.replace("a text", "good film the city")
    exec(code, {})
    shown = capsys.readouterr().out.strip()
    if task == "answer":
        assert shown in "the city was sad"
    else:
        expected = predict(tagger, "tags", ["good film the city"])[0]["tags"]
        pieces = ast.literal_eval(re.sub(r"np\.float32\(([^)]+)\)", r"\1", shown))
        found = {piece["word"]: piece["entity"] for piece in pieces}
        assert [found.get(word, "O") for word in ("good", "film", "the", "city")] == expected


def test_the_card_of_the_trunk_works(workdir, tmp_path, capsys):
    pytest.importorskip("torch")
    assert convert(str(workdir), tmp_path / "out") == ""
    exec(snippet(tmp_path / "out"), {})
    assert capsys.readouterr().out.strip() == f"torch.Size([1, 4, {tiny.HIDDEN}])"


def test_a_head_that_transformers_has_not_is_refused(tagger, tmp_path):
    with pytest.raises(UserError, match="task 'deep': its head is not a single linear layer"):
        convert(str(tagger), tmp_path / "out", task="deep")
    assert not (tmp_path / "out").exists()


def test_sentence_transformers_opens_it(workdir, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    convert(str(workdir), tmp_path / "out", task="fine")
    model = library.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    np.testing.assert_allclose(model.encode(TEXTS), answers(tmp_path / "out", TEXTS), atol=1e-5)


def test_a_checkpoint_of_another_form(deep, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mtl-jax", "convert", str(deep), str(tmp_path / "out")])
    main.console()
    assert capsys.readouterr().out == f"everything is in {tmp_path / 'out'}\n"
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in tiny.bert_tensors().items():
        np.testing.assert_array_equal(found[name], tensor)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (deep / "tokenizer.json").read_bytes()


def test_bad_input(workdir, bert, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("dear diary")
    for arguments, options, message in (
        ((str(workdir), tmp_path / "out"), {"task": "fien"}, r"unknown task 'fien' \(did you mean 'fine'\?\)"),
        ((str(bert), tmp_path / "out"), {"task": "fine"}, "not the workdir of a run"),
        ((str(bert), tmp_path / "full"), {"overwrite": True}, "not empty, and not a checkpoint"),
        ((str(bert), bert), {}, "it holds a checkpoint already"),
        ((str(tmp_path), tmp_path / "out"), {}, r"config\.json is missing"),
    ):
        with pytest.raises(UserError, match=message):
            convert(*arguments, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
    assert (tmp_path / "full" / "diary.txt").exists()
