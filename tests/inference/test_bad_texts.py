"""Texts that a finished run cannot read: an error of their own, and no other text's answer changes."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from transformers import AutoTokenizer

from mtl_jax import Pretrained, Source
from mtl_jax.cli import main
from mtl_jax.core.errors import UserError
from mtl_jax.inference import predict as prediction
from mtl_jax.inference.predict import evaluate, open_run, predict
from mtl_jax.training.setup import prepare

GOOD = ["who is the man ?", "where is the city ?", "the man was sad", "where was the film"]
ENTITY = f"the token '<ent>' has the id {len(tiny.WORDS)}, but the token table of the trunk has {len(tiny.WORDS)} rows"
BAD = {"a <ent> city": ENTITY, "": "empty text", "a \ud800 city": "not valid Unicode", " ": "empty text"}


def add_token(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<ent>"])
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def run(workdir, tmp_path_factory):
    """The finished run, as if it had been trained with a token more than its trunk has rows."""
    folder = tmp_path_factory.mktemp("bad") / "run"
    shutil.copytree(workdir, folder)
    add_token(folder / "trunk")
    return folder


def same(found, wanted):
    assert [line["label"] for line in found] == [line["label"] for line in wanted]
    np.testing.assert_allclose([x["probability"] for x in found], [x["probability"] for x in wanted], atol=1e-6)


def test_a_bad_text_has_its_own_error_and_changes_no_other(run):
    mixed = [text for pair in zip(GOOD, BAD, strict=True) for text in pair]
    found = predict(run, "fine", mixed)
    same(found[::2], predict(run, "fine", GOOD))
    for answer, message in zip(found[1::2], BAD.values(), strict=True):
        assert answer["error"].startswith(message)
    assert [[*answer] for answer in predict(run, "fine", [*BAD])] == [["error"]] * len(BAD)


@pytest.mark.parametrize("task", ["rating", "fine"])
def test_numbers_that_are_none_are_never_printed(run, monkeypatch, capsys, tmp_path, task):
    broken = open_run(run)
    head = jax.tree.map(lambda leaf: leaf * np.float32(np.nan), broken.params["heads"][task])
    broken.params["heads"][task] = head
    monkeypatch.setattr(prediction, "open_run", lambda folder: broken)
    main.predict(str(run), task=task, text=tuple(GOOD))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [[*line] for line in lines] == [["error"]] * len(GOOD)
    assert lines[0]["error"].startswith("the model's output is not finite")
    (tmp_path / "rows.jsonl").write_text('{"text": "a man", "rating": 1, "fine": "HUM:man"}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl: task .*: the model's output is not finite"):
        evaluate(run, task, str(tmp_path / "rows.jsonl"), "jsonl")


def test_evaluate_names_the_line(run, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "the man", "fine": "HUM:man"}\n{"text": "a <ent>", "fine": "HUM:man"}\n')
    with pytest.raises(UserError, match=rf"rows\.jsonl:2: {ENTITY}"):
        evaluate(run, "fine", str(file), "jsonl")


@pytest.mark.parametrize("split", ["train", "dev", "test", None])
def test_a_token_beyond_the_table_is_refused_before_training(shallow, tmp_path, split):
    shutil.copytree(shallow, tmp_path / "bert")
    add_token(tmp_path / "bert")
    for name in ("train", "dev", "test"):
        text = "a <ent>" if name == split else f"a man {name}"
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{text}", "label": "x"}}\n{{"text": "the {name}", "label": "y"}}\n')
    train, dev, test = (str(tmp_path / f"{name}.jsonl") for name in ("train", "dev", "test"))
    source = Source(name="s", path=train, dev_path=dev, test_path=test, format="jsonl")
    task = tiny.Classification(name="label", source="s", column="label")
    experiment = tiny.experiment("", "", trunk=Pretrained(str(tmp_path / "bert")), sources=(source,), tasks=(task,))
    if split is None:
        notes = prepare(experiment).notes
        assert any(
            note.startswith("source s: the vocabulary does not know") and note.endswith("such as 'train'") for note in notes
        )
        return
    with pytest.raises(UserError, match=rf"{split}\.jsonl:1: {ENTITY}"):
        prepare(experiment)
