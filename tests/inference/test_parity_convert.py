"""A run with a decoder, converted, against transformers: it opens without a word, and says and generates the same."""

import dataclasses
import warnings

import jax
import numpy as np
import pytest
import tiny_translation
from jitted import apply

from mtl_jax import Evaluation, decoding, pretrained, train
from mtl_jax.inference.export import convert

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXTS = ["the dog sees the small red fish", "cat", "the cat eats", "red red red red red"]


CLASSES = {"marian": "MarianMTModel", "pegasus": "PegasusForConditionalGeneration"}


PARAMS = [("own", "marian"), ("trunk", "pegasus"), pytest.param(("trunk", "marian"), marks=pytest.mark.long)]


@pytest.fixture(scope="module", params=PARAMS, ids=["Marian", "Pegasus", "Marian, one table"])
def converted(request, tmp_path_factory):
    """The decoder shares the trunk's table, or has its own; norms behind each part (Marian), or in front (Pegasus)."""
    table, family = request.param
    folder = tmp_path_factory.mktemp("converted")
    tiny_translation.write_data(folder)
    trunk = dataclasses.replace(tiny_translation.TRUNK, pre_norm=family == "pegasus")
    experiment = tiny_translation.experiment(folder, trunk=trunk)
    task = dataclasses.replace(experiment.tasks[0], table=table, layers=2, beams=3)
    evaluation = Evaluation(every=6, baseline="none")
    train(dataclasses.replace(experiment, tasks=(task,), evaluation=evaluation), folder / "run")
    convert(str(folder / "run"), folder / family, task="translation")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs, told = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder / family, output_loading_info=True)
    assert not any(told.values()), told
    assert type(theirs).__name__ == CLASSES[family]
    code = (folder / family / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    exec(code.replace("path/of/this/directory", str(folder / family)), {})
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / family)
    inputs = tokenizer(TEXTS, padding=True, return_tensors="np")
    ids, mask = inputs["input_ids"].astype(np.int64), inputs["attention_mask"].astype(np.int64)
    return pretrained.load(str(folder / family)), theirs.eval(), ids, mask


def test_logits(converted):
    ours, theirs, ids, mask = converted
    targets = np.random.default_rng(0).integers(4, 300, (len(ids), 6))
    with torch.no_grad():
        expected = theirs(*map(torch.from_numpy, (ids, mask, targets))).logits.numpy()
    with jax.default_matmul_precision("highest"):
        found = apply(ours.model, ours.params, ids, mask, targets).logits
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("call", [{}, {"num_beams": 1}, {"num_beams": 5, "length_penalty": 0.6, "max_new_tokens": 9}])
def test_texts(converted, call):
    """Beams and lengths as the run had them, or as the call says."""
    ours, theirs, ids, mask = converted
    with torch.no_grad():
        expected = theirs.generate(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), **call).numpy()
    found, _ = decoding.generate(ours, ids, mask, **call)
    np.testing.assert_array_equal(found, expected)
