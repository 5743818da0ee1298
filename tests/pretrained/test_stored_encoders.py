"""Encoders without torch: stored answers of transformers."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from mtl_jax import pretrained
from mtl_jax.core.errors import UserError

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ["bert_rows", "bert_masked_lm", "roberta_tokens", "xlm_roberta_rows", "distilbert_masked_lm", "electra_replaced"]
NAMES += [
    "camembert_tokens",
    "mpnet_masked_lm",
    "albert_rows",
    "deberta_masked_lm",
    "deberta_rows",
    "nomic_masked_lm",
    "gte_rows",
    "eurobert_rows",
]


@pytest.mark.parametrize("name", NAMES)
def test_stored_answers(name):
    checkpoint = pretrained.load(str(FIXTURES / name))
    stored = np.load(FIXTURES / name / "expected.npz")
    with jax.default_matmul_precision("highest"):
        found = jax.jit(checkpoint.model.apply)({"params": checkpoint.params}, stored["input_ids"], stored["attention_mask"])
    real = stored["attention_mask"].astype(bool)
    np.testing.assert_allclose(found.hidden[real], stored["hidden"][real], rtol=0, atol=1e-5)
    where = real if stored["logits"].shape[:2] == real.shape else slice(None)
    np.testing.assert_allclose(found.logits[where], stored["logits"][where], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["mpnet_masked_lm", "albert_rows", "deberta_rows", "deberta_masked_lm", "gte_rows", "eurobert_rows"]
)
def test_a_packed_row_is_its_examples_alone(name):
    """In one batch: two examples in a row, the second, and the first behind another one."""
    checkpoint = pretrained.load(str(FIXTURES / name), head=None)
    first, second = np.arange(5, 12), np.arange(20, 25)  # longer than the distances that have a vector of their own
    rows = [[first, second], [second], [second, first]]
    ids, mask, positions, segments = np.zeros((4, 3, 14), np.int32)
    for row, examples in enumerate(rows):
        begin = 0
        for segment, example in enumerate(examples, start=1):
            place = (row, slice(begin, begin + len(example)))
            ids[place], mask[place], positions[place], segments[place] = example, 1, np.arange(len(example)), segment
            begin += len(example)
    apply = jax.jit(functools.partial(checkpoint.model.trunk.apply, position_ids=positions, segment_ids=segments))
    hidden = apply({"params": checkpoint.params["trunk"]}, ids, mask).hidden
    np.testing.assert_allclose(hidden[0, 7:12], hidden[1, :5], atol=1e-5)
    np.testing.assert_allclose(hidden[2, :5], hidden[1, :5], atol=1e-5)
    np.testing.assert_allclose(hidden[2, 5:12], hidden[0, :7], atol=1e-5)
    assert np.abs(hidden[0, 7:12] - hidden[0, :5]).max() > 0.1


def test_a_masked_lm_of_deberta_has_two_names(tmp_path):
    """A file with the newer one under a configuration that does not say so, and back under the older one."""
    shutil.copytree(FIXTURES / "deberta_masked_lm", tmp_path / "newer")
    raw = json.loads((tmp_path / "newer" / "config.json").read_text())
    del raw["legacy"]
    (tmp_path / "newer" / "config.json").write_text(json.dumps(raw))
    checkpoint = pretrained.load(str(tmp_path / "newer"))
    pretrained.save(tmp_path / "older", checkpoint)
    names = {name for name in load_file(tmp_path / "older" / "model.safetensors") if not name.startswith("deberta.")}
    transform = "cls.predictions.transform"
    dense, norm = ([f"{transform}.{layer}.{leaf}" for leaf in ("weight", "bias")] for layer in ("dense", "LayerNorm"))
    assert names == {*dense, *norm, "cls.predictions.bias"}
    expected = pretrained.load(str(FIXTURES / "deberta_masked_lm")).params
    for folder in ("newer", "older"):
        jax.tree.map(np.testing.assert_array_equal, pretrained.load(str(tmp_path / folder)).params, expected)


def test_a_head_that_a_family_lacks(tmp_path):
    with pytest.raises(UserError, match="unknown head for nomic_bert checkpoints: 'question_answering'"):
        pretrained.load(str(FIXTURES / "nomic_masked_lm"), head="question_answering")
    checkpoint = pretrained.load(str(FIXTURES / "nomic_masked_lm"), head="token_classification")
    with pytest.raises(UserError, match="no class for a nomic_bert model with a head of kind question_answering"):
        pretrained.save(tmp_path / "out", dataclasses.replace(checkpoint, head="question_answering"))
    assert not (tmp_path / "out").exists()
