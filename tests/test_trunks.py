"""A trunk of any family: built, written into a workdir, opened again."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from mtl_jax import trunks
from mtl_jax.errors import UserError
from mtl_jax.trunks import Embedding, Pretrained

FIXTURES = Path(__file__).parent / "pretrained" / "fixtures"
NAMES = ["bert_rows", "roberta_tokens", "distilbert_masked_lm", "electra_replaced", "modernbert_rows", "marian", "bart", "t5"]
IDS = np.array([[5, 6, 7, 8, 3, 9]])
PACKED = {"position_ids": np.array([[0, 1, 2, 3, 0, 1]]), "segment_ids": np.array([[1, 1, 1, 1, 2, 2]])}


@pytest.fixture(params=NAMES)
def checkpoint(request, bert, tmp_path):
    """A stored checkpoint with the tiny BERT's tokenizer."""
    shutil.copytree(FIXTURES / request.param, tmp_path / "checkpoint")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bert / name, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_what_is_opened_again_computes_the_same(checkpoint, tmp_path):
    config = Pretrained(str(checkpoint), dropout=0.25)
    trunk = trunks.build(config, [], np.float32)
    rates = {field.name for field in dataclasses.fields(trunk.module.config) if "dropout" in field.name}
    assert {getattr(trunk.module.config, name) for name in rates} == {0.25}
    params = trunks.init_params(trunk, jax.random.key(0))
    assert trunks.width(trunk, params) == 16

    trunks.save(trunk, tmp_path / "trunk")
    again = trunks.reopen(config, tmp_path / "trunk", np.float32)
    assert again.raw == trunk.raw
    jax.tree.map(np.testing.assert_array_equal, again.beside, trunk.beside)
    hidden, expected = (one.module.apply({"params": params}, IDS, **PACKED).hidden for one in (again, trunk))
    np.testing.assert_array_equal(hidden, expected)
    assert again.tokenizer("good film")["input_ids"] == trunk.tokenizer("good film")["input_ids"]


def test_an_embedding_from_scratch(tmp_path):
    trunk = trunks.build(Embedding(vocabulary=10, dimension=4), ["good film", "bad film"], np.float32)
    params = trunks.init_params(trunk, jax.random.key(0))
    trunks.save(trunk, tmp_path)
    again = trunks.reopen(Embedding(vocabulary=10, dimension=4), tmp_path, np.float32)
    ids = np.array([[1, 2]])
    np.testing.assert_array_equal(
        again.module.apply({"params": params}, ids).hidden, trunk.module.apply({"params": params}, ids).hidden
    )


def test_a_dropout_rate_that_is_none(bert):
    with pytest.raises(UserError, match=r"trunk\.dropout is 1\.0"):
        trunks.build(Pretrained(str(bert), dropout=1.0), [], np.float32)
