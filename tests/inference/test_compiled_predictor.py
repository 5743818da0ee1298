"""convert --stablehlo: the directory opens without the package, and gives what predict says."""

import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import compiling
import finished_runs
import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mtl_jax import (
    Classification,
    Contrastive,
    Embedding,
    Lora,
    Multilabel,
    Ordinal,
    Regression,
    Source,
    Span,
    Tagging,
    UserError,
    convert,
    load_model,
)
from mtl_jax.cli import main
from mtl_jax.sharing import MMoE
from mtl_jax.trunks import EncoderOutput, TrunkConfig

pytest.importorskip("flatbuffers")

TEXTS = ["a text", "another one"]
PAIRS = [("a text", "a second one"), ("another text", "its second one")]
WORDS = [["a", "text"], ["another", "one"]]


def written(path: Path, rows: list[dict], **fields: Any) -> Source:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(name=path.stem, path=str(path), format="jsonl", **fields)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def sources(folder):
    texts = [f"a {first} {second}" for first in tiny.GOOD + tiny.BAD for second in tiny.OTHER[:6]]
    plain = [{"text": t, "kind": f"k{n % 3}", "all": ["x", "y"][: 1 + n % 2], "stars": n % 3} for n, t in enumerate(texts)]
    pairs = [{"text": t, "other": f"who is {t}", "kind": str(n % 2), "score": n % 5} for n, t in enumerate(texts)]
    words = [{"text": t.split(), "tags": ["O", "B-X", "I-X"]} for t in texts]
    asked = [{"question": t, "context": f"the {t}", "answers": [{"text": "a", "start": 4}]} for t in texts]
    made = [
        written(folder / "plain.jsonl", plain),
        written(folder / "pairs.jsonl", pairs, pair="other"),
        written(folder / "alike.jsonl", pairs, pair="other"),
        written(folder / "words.jsonl", words),
        written(folder / "asked.jsonl", asked, text="question", pair="context"),
    ]
    return {source.name: source for source in made}


TASKS = (
    Classification(name="kind", source="plain", column="kind", hidden=8),
    Multilabel(name="all", source="plain", column="all"),
    Ordinal(name="stars", source="plain", column="stars"),
    Regression(name="number", source="plain", column="stars", minimum=0, maximum=2, scale=2.0),
    Classification(name="follows", source="pairs", column="kind"),
    Contrastive(name="alike", source="alike", column="score", objective="cosent"),
    Tagging(name="tags", source="words"),
    Span(name="answer", source="asked", stride=4),
)


@pytest.fixture(scope="module")
def model(folder, sources):
    """A run of every kind, on the smallest trunk; nothing of it was trained."""
    changes: dict = {"sources": tuple(sources.values()), "tasks": TASKS, "trunk": Embedding(dimension=8)}
    finished_runs.write(folder / "run", tiny.experiment("", "", **changes))
    return load_model(folder / "run")


def snippet(folder: Path) -> str:
    text = (folder / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert code.count("path/of/this/directory") == 1
    return code.replace("path/of/this/directory", str(folder))


def same(answers, expected):
    for answer, wanted in zip(answers, expected, strict=True):
        for name, value in wanted.items():
            if isinstance(value, dict):
                same([answer[name]], [value])
            elif name == "vector" or isinstance(value, float):
                np.testing.assert_allclose(answer[name], value, atol=1e-5)
            elif name in answer:  # entities, and the characters of an answer, are not in the page's lines
                assert answer[name] == value


def inputs_of(task: Any) -> list:
    if isinstance(task, Span):
        return [{"question": first, "context": second} for first, second in PAIRS]
    return {"pairs": [{"text": first, "other": second} for first, second in PAIRS], "words": WORDS}.get(task.source, TEXTS)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_lines_of_the_page_say_what_predict_says(model, folder, tmp_path, task, capsys):
    hint = convert(folder / "run", tmp_path / "out", task=task.name, stablehlo=True)
    assert hint == f"{tmp_path / 'out'} opens with jax alone, as its README.md shows"
    names: dict = {}
    exec(snippet(tmp_path / "out"), names)
    answers, expected = names["answers"], model.predict(task.name, inputs_of(task))
    if isinstance(task, Tagging):  # which are not repaired here
        expected = [{"words": answer["words"]} for answer in expected]
    same(answers, expected)
    about = json.loads((tmp_path / "out" / "predictor.json").read_text())
    assert (about["task"], about["kind"], about["programs"]) == (task.name, type(task).__name__, {})
    for file, digest in about["sha256"].items():
        assert hashlib.sha256((tmp_path / "out" / file).read_bytes()).hexdigest() == digest
    assert (tmp_path / "out" / "model.stablehlo").stat().st_size < 100_000  # parameters are beside it


@dataclasses.dataclass(frozen=True)
class Places(TrunkConfig):
    """A trunk that transformers has no class for, which makes a table of positions on the host."""

    width: int = 8

    def module(self, vocab_size, dtype):
        return PlacesModule(vocab_size, self.width, dtype)


class PlacesModule(nn.Module):
    vocab_size: int
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, input_ids, attention_mask=None, *, position_ids=None, segment_ids=None, deterministic=True):
        waves = np.sin(np.arange(input_ids.shape[1])[:, None] * np.arange(1, self.width + 1)).astype(np.float32)
        places = jnp.zeros_like(input_ids) if position_ids is None else position_ids
        x = nn.Embed(self.vocab_size, self.width, dtype=self.dtype, name="word")(input_ids) + jnp.asarray(waves)[places]
        return EncoderOutput(hidden=nn.Dense(self.width, dtype=self.dtype)(x))


def test_a_trunk_of_ones_own_opens_in_a_process_without_the_package(folder, sources, tmp_path, monkeypatch, capsys):
    """Its program needs the number of tokens, so there is one for each of two lengths."""
    task = Classification(name="kind", source="plain", column="kind")
    changes: dict = {"sources": (sources["plain"],), "tasks": (task,), "trunk": Places()}
    finished_runs.write(folder / "own", tiny.experiment("", "", **changes))
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["mtl-jax", "convert", str(folder / "own"), str(out), "--stablehlo"])
    main.console()
    assert "opens with jax alone" in capsys.readouterr().out
    assert sorted(path.name for path in out.glob("*.stablehlo")) == ["model-16.stablehlo", "model-24.stablehlo"]
    code = f"import sys; sys.modules['mtl_jax'] = None\n{snippet(out)}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=compiling.environment(), check=True)
    same(eval(done.stdout), load_model(folder / "own").predict("kind", TEXTS))


def test_a_task_of_a_shared_trunk_with_adapters(bert, folder, sources, tmp_path):
    """Each task of a source of pairs has its own mixture of experts; the program has the adapters, and the rows of one task."""
    tasks = (TASKS[4], Regression(name="number", source="pairs", column="score", minimum=0, maximum=4))
    changes: dict = {"adapters": (Lora(name="lora", rank=2, per="source"),), "sharing": MMoE(experts=2, width=4)}
    shutil.copytree(bert, folder / "bert")
    settings = json.loads((bert / "tokenizer_config.json").read_text())
    names = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    (folder / "bert" / "tokenizer_config.json").write_text(json.dumps(settings | names))
    experiment = tiny.experiment(folder / "bert", "", sources=(sources["pairs"],), tasks=tasks, **changes)
    finished_runs.write(folder / "shared", experiment)
    convert(folder / "shared", tmp_path / "out", task="number", stablehlo=True)
    assert "token_type_ids" in json.loads((tmp_path / "out" / "predictor.json").read_text())["inputs"]
    made: dict = {}
    exec(snippet(tmp_path / "out"), made)
    same(made["answers"], load_model(folder / "shared").predict("number", inputs_of(tasks[1])))


def test_mistakes_are_one_line(model, bert, folder, tmp_path, monkeypatch):
    for source, changes, message in (
        (bert, {}, "not the workdir of a run, and only a run's tasks have predictors; leave --stablehlo out"),
        (folder / "run", {"task": ""}, "name by --task the task to export: kind, all, stars"),
        (folder / "run", {"task": "kinds"}, "unknown task 'kinds'"),
        (folder / "run", {"peft": True}, "--peft and --stablehlo are two forms; give one of them"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            convert(source, tmp_path / "out", **{"task": "kind", "stablehlo": True} | changes)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(UserError, match=r"not empty, and not a predictor \(predictor\.json is missing\)"):
        convert(folder / "run", tmp_path / "notes", task="kind", stablehlo=True, overwrite=True)
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(UserError, match=r"needs the package flatbuffers.*pip install 'mtl_jax\[stablehlo\]'"):
        convert(folder / "run", tmp_path / "out", task="kind", stablehlo=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
