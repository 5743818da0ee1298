"""A trunk with adapters under a decoder: texts are those of the same adapters inside the trunk's kernels."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny_translation

import mtl_jax
from mtl_jax import IA3, Lora, Phase, adapters_only
from mtl_jax.merge import merge
from mtl_jax.merge.method import Method
from mtl_jax.prediction import predict
from mtl_jax.text_model import Asked, from_run
from mtl_jax.training import generation
from mtl_jax.training.prepare import prepare
from mtl_jax.transfer.adapters import adapt, merge_adapters

ADAPTERS = (Lora(name="lora", rank=2, alpha=4.0, per="source"), IA3(name="ia3", per="source"))


def test_texts_are_by_the_adapters_of_the_task_s_source(tmp_path):
    tiny_translation.write_data(tmp_path, rows=50)
    prepared = prepare(tiny_translation.experiment(tmp_path))
    task, _ = prepared.corpus.tasks
    module = adapt(prepared.trunk.module, ADAPTERS, sources=2)
    rng = np.random.default_rng(0)
    trunk = module.add(prepared.params["trunk"], jax.random.key(0))
    trunk["adapters"] = jax.tree.map(lambda leaf: leaf + rng.normal(size=leaf.shape).astype(np.float32), trunk["adapters"])
    examples = prepared.corpus.splits["train"]["pairs"]
    found = []
    for place in (0, 1):
        adapted = prepared.trunk._replace(module=module)
        texts = generation.generate(task, adapted, prepared.params | {"trunk": trunk}, examples._replace(place=place), 2)
        inside = prepared.params | {"trunk": merge_adapters(module, trunk, place)}
        expected = generation.generate(task, prepared.trunk, inside, examples, 2)
        assert [one.text for one in texts] == [one.text for one in expected]
        np.testing.assert_allclose([one.score for one in texts], [one.score for one in expected], atol=1e-4)
        found.append(texts)
    assert found[0] != found[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapted")
    tiny_translation.write_data(folder, rows=30)
    phases = (Phase("everything", 1), Phase("adapters", 1, rules=adapters_only()))
    mtl_jax.train(tiny_translation.experiment(folder, adapters=ADAPTERS, phases=phases), folder / "run")
    return folder / "run"


def test_a_run_translates(run):
    (answer,) = predict(run, "translation", ["the dog sees"])
    model = from_run(run, Asked("translation"))
    ids = model.encode(["the dog sees"], None)
    config = mtl_jax.decoding.GenerationConfig(**model.setting.options)
    (same,) = mtl_jax.decoding.generate_all(model.model, model.params, ids, config)
    assert model.decode(same.tokens[0]) == answer["text"]
    assert same.scores[0] == pytest.approx(answer["score"], abs=1e-5)


def test_a_merged_run_is_measured_by_its_texts(run, tmp_path):
    """The mean of a run and its copy is the run, BLEU and all."""
    shutil.copytree(run, tmp_path / "copy")
    merged = merge(tmp_path / "merged", [str(run), str(tmp_path / "copy")], Method("soup"))
    expected = json.loads((run / "results.json").read_text())["tasks"]
    for metric, value in expected["translation"]["test"].items():
        assert merged["tasks"]["translation"]["test"][metric] == pytest.approx(value, abs=1e-4), metric
    assert "bleu" in expected["translation"]["test"]
