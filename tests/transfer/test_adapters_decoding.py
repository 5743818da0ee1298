"""A trunk with adapters under a decoder: texts are those of the same adapters inside the trunk's kernels."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import tiny_translation

import mtl_jax
from mtl_jax import IA3, Classification, Evaluation, Lora, Optimizer, Phase, Source, adapters_only, pretrained
from mtl_jax.core.errors import UserError
from mtl_jax.core.trees import flat
from mtl_jax.decoding import generate
from mtl_jax.inference.export import convert
from mtl_jax.inference.predict import open_run, predict
from mtl_jax.inference.text_model import TextRequest, from_run
from mtl_jax.merging import merge
from mtl_jax.merging.method import Method
from mtl_jax.training import text_evaluation
from mtl_jax.training.experiment_json import from_json, to_json
from mtl_jax.training.phase_state import initial_state
from mtl_jax.training.setup import prepare
from mtl_jax.transfer.adapters import merge_adapters

ADAPTERS = (Lora(name="lora", rank=2, alpha=4.0, per="source"), IA3(name="ia3", per="source"))
INSIDE = (Lora(name="inside", rank=2, target=".*/(query|value)"),)


def declared(folder):
    """Two sources with their own adapters; texts are generated on the second one."""
    first = tiny_translation.experiment(folder)
    return dataclasses.replace(
        first,
        sources=(Source(name="labels", path=f"{folder}/labels.jsonl", format="jsonl"), *first.sources),
        tasks=(
            Classification(name="long", source="labels", column="long"),
            dataclasses.replace(first.tasks[0], beams=1, adapters=INSIDE),
        ),
        adapters=ADAPTERS,
        phases=(Phase("adapters", 2, rules=adapters_only(decoders=("translation",))),),
        optimizer=Optimizer(learning_rate=0.05),
        evaluation=Evaluation(every=2, baseline="none"),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data, and a run on it in run/."""
    folder = tmp_path_factory.mktemp("adapted")
    tiny_translation.write_data(folder, rows=80)
    rows = (folder / "pairs.jsonl").read_text().splitlines(keepends=True)
    (folder / "labels.jsonl").write_text("".join(rows[:40]))
    (folder / "pairs.jsonl").write_text("".join(rows[40:]))
    mtl_jax.train(declared(folder), folder / "run")
    return folder


def test_texts_are_by_the_adapters_of_the_task_s_source(folder):
    """On the rows on which training measures."""
    run = open_run(folder / "run")
    task, adapted, trunk = run.task("translation"), run.trunk.module, run.params["trunk"]
    examples = prepare(declared(folder)).corpus.splits["dev"]["pairs"]
    found = text_evaluation.generate(task, run.trunk, run.params, examples, 1)
    for place in (0, 1):
        inside = run.params | {"trunk": merge_adapters(adapted, trunk, place)}
        expected = text_evaluation.generate(task, run.trunk._replace(module=adapted.base), inside, examples, 1)
        own = np.allclose([one.score for one in found], [one.score for one in expected], atol=1e-4)
        assert own == (place == 1)


def test_of_a_decoder_with_adapters_only_these_train(folder):
    experiment = declared(folder)
    assert from_json(json.loads(json.dumps(to_json(experiment)))) == experiment
    start = flat(initial_state(prepare(experiment)).params["heads"]["translation"])
    trained = flat(open_run(folder / "run", "last").params["heads"]["translation"])
    changed = {path for path, leaf in trained.items() if not np.array_equal(leaf, start[path])}
    assert "adapters/inside/layer_0/cross_attention/query/b" in changed
    assert all(path.startswith("adapters/inside/") for path in changed)


def test_they_go_out_inside_the_kernels(folder, tmp_path):
    """The run's texts are those of the converted model."""
    (answer,) = predict(folder / "run", "translation", ["the dog sees"])
    convert(str(folder / "run"), tmp_path / "out", task="translation")
    converted = pretrained.load(str(tmp_path / "out"))
    ids = np.array([converted.tokenizer("the dog sees")["input_ids"]])
    length = declared(folder).tasks[1].target_length
    _, scores = generate(converted, ids, np.ones_like(ids), num_beams=1, max_new_tokens=length)
    assert scores[0] == pytest.approx(answer["score"], abs=1e-4)
    with pytest.raises(UserError, match="its trunk is from no checkpoint, and a PEFT directory opens on one"):
        convert(str(folder / "run"), tmp_path / "peft", task="translation", peft=True)


def test_a_run_translates(folder):
    (answer,) = predict(folder / "run", "translation", ["the dog sees"])
    model = from_run(folder / "run", TextRequest("translation"))
    ids = model.encode(["the dog sees"], None)
    config = mtl_jax.decoding.GenerationConfig(**model.setting.options)
    (same,) = mtl_jax.decoding.generate_all(model.model, model.params, ids, config)
    assert model.decode(same.tokens[0]) == answer["text"]
    assert same.scores[0] == pytest.approx(answer["score"], abs=1e-5)


def test_a_merged_run_is_measured_by_its_texts(folder, tmp_path):
    """The mean of a run and its copy is the run, BLEU and all."""
    shutil.copytree(folder / "run", tmp_path / "copy")
    merged = merge(tmp_path / "merged", [str(folder / "run"), str(tmp_path / "copy")], Method("soup"))
    expected = json.loads((folder / "run" / "results.json").read_text())["tasks"]
    for metric, value in expected["translation"]["test"].items():
        assert merged["tasks"]["translation"]["test"][metric] == pytest.approx(value, abs=1e-4), metric
    assert "bleu" in expected["translation"]["test"]
