"""A trunk of any family: built, written into a workdir, opened again."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from jitted import apply

from mtl_jax import trunks
from mtl_jax.core.errors import UserError
from mtl_jax.models.trunk_output import token_table, with_token_table
from mtl_jax.trunks import Embedding, Pretrained, Transformer

FIXTURES = Path(__file__).parent / "pretrained" / "fixtures"
NAMES = ["bert_rows", "roberta_tokens", "distilbert_masked_lm", "electra_replaced", "modernbert_rows", "marian", "bart", "t5"]
NAMES += [
    *(pytest.param(name, marks=pytest.mark.long) for name in ("mpnet_masked_lm", "albert_rows", "nomic_masked_lm", "gte_rows")),
    "deberta_rows",
]
IDS = np.array([[5, 6, 7, 8, 3, 9]])
PACKED = {"position_ids": np.array([[0, 1, 2, 3, 0, 1]]), "segment_ids": np.array([[1, 1, 1, 1, 2, 2]])}


@pytest.fixture(scope="module")
def bert(deep):
    return deep


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
    assert trunks.width(trunk) == 16

    trunks.save(trunk, tmp_path / "trunk")
    again = trunks.reopen(config, tmp_path / "trunk", np.float32)
    assert again.raw == trunk.raw
    jax.tree.map(np.testing.assert_array_equal, again.beside, trunk.beside)
    hidden, expected = (jax.jit(one.module.apply)({"params": params}, IDS, **PACKED).hidden for one in (again, trunk))
    np.testing.assert_array_equal(hidden, expected)
    assert again.tokenizer("good film")["input_ids"] == trunk.tokenizer("good film")["input_ids"]


def test_a_trunk_may_be_given_the_rows_that_it_reads(checkpoint):
    trunk = trunks.build(Pretrained(str(checkpoint)), [], np.float32)
    params = trunks.init_params(trunk, jax.random.key(0))
    rows, places = np.unique(IDS, return_inverse=True)
    narrow = with_token_table(params, token_table(params)[rows])
    expected = apply(trunk.module, params, IDS, **PACKED).hidden
    found = apply(trunk.module, narrow, places.reshape(IDS.shape), **PACKED).hidden
    np.testing.assert_array_equal(found, expected)


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


def test_a_transformer_from_scratch(tmp_path):
    config = Transformer(vocabulary=300, layers=1, width=8, heads=2, feed_forward=16, max_length=20)
    trunk = trunks.build(config, ["good film", "bad film"], np.float32)
    params = trunks.init_params(trunk, jax.random.key(0))
    trunks.save(trunk, tmp_path)
    again = trunks.reopen(config, tmp_path, np.float32)
    assert again.decoder == trunk.decoder
    assert again.tokenizer("bad film")["input_ids"] == trunk.tokenizer("bad film")["input_ids"]
    assert again.tokenizer.decode(again.tokenizer("bad film")["input_ids"], skip_special_tokens=True) == "bad film"
    ids = np.array([[5, 6, 2]])
    hidden, expected = (one.module.apply({"params": params}, ids).hidden for one in (again, trunk))
    np.testing.assert_array_equal(hidden, expected)
    facts = trunks.facts(trunk)
    assert (facts.width, facts.table) == (8, (len(trunk.tokenizer), 8))
    assert (facts.head, facts.start, facts.encoder) == (None, None, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, r"trunk.layers is 0; it must be at least 1"),
        ({"heads": 3}, r"trunk.heads is 3; it must divide trunk.width, 8"),
        ({"dropout": 1.0}, r"trunk.dropout is 1.0"),
        ({"pieces": "bep"}, r"unknown trunk.pieces 'bep' .did you mean 'bpe'"),
        ({"activation": "rely"}, r"unknown trunk.activation 'rely' .did you mean 'relu'"),
        ({"vocabulary": 260}, r"trunk.vocabulary is 260; it must be at least 2\d\d"),
    ],
)
def test_sizes_of_a_transformer_that_make_no_sense(change, message):
    with pytest.raises(UserError, match=message):
        trunks.build(dataclasses.replace(Transformer(width=8, heads=2), **change), ["good film"], np.float32)


def test_a_checkpoint_from_scratch_has_its_sizes_and_vocabulary_only(bert):
    loaded, fresh = (trunks.build(Pretrained(str(bert), fresh=fresh), [], np.float32) for fresh in (False, True))
    a, b = (trunks.init_params(trunk, jax.random.key(0)) for trunk in (loaded, fresh))
    assert jax.tree.map(np.shape, a) == jax.tree.map(np.shape, b)
    assert not np.allclose(a["layer_0"]["attention"]["query"]["kernel"], b["layer_0"]["attention"]["query"]["kernel"])
    assert fresh.tokenizer("good film")["input_ids"] == loaded.tokenizer("good film")["input_ids"]
