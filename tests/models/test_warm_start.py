"""A decoder that starts as an encoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mtl_jax import pretrained
from mtl_jax.models.encoder import Embeddings
from mtl_jax.models.seq2seq_decoder import Decoder
from mtl_jax.models.warm_start import decoder_like, decoder_params, spread_layers


@pytest.mark.parametrize(
    ("layers", "of", "expected"),
    [(6, 6, [0, 1, 2, 3, 4, 5]), (3, 6, [0, 2, 5]), (2, 12, [0, 11]), (1, 6, [0]), (4, 12, [0, 4, 7, 11])],
)
def test_layers_are_spread_evenly(layers, of, expected):
    assert spread_layers(layers, of) == expected


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    tiny.write_bert(tmp_path_factory.getbasetemp() / "three", layers=3)
    return pretrained.load(str(tmp_path_factory.getbasetemp() / "three"))


@pytest.fixture(scope="module")
def begun(checkpoint):
    """Module and parameters."""
    cfg, trunk = checkpoint.config, checkpoint.params["trunk"]
    module = Decoder(decoder_like(cfg, 2, 9, dropout=0.0))
    table = trunk["embeddings"]["word"]["embedding"]

    def whole(decoder):
        return decoder(jnp.zeros((1, 1), jnp.int32), decoder.source(jnp.zeros((1, 1, cfg.hidden_size)), None, None), table)

    fresh = module.init(jax.random.key(0), method=whole)["params"]
    found = decoder_params(fresh, trunk, cfg)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, fresh)
    return module, found


def test_its_layers_are_the_encoder_s(checkpoint, begun):
    trunk, (_, params) = checkpoint.params["trunk"], begun
    for ours, theirs in (("layer_0", "layer_0"), ("layer_1", "layer_2")):
        for part in ("attention", "attention_norm", "feed_forward_in", "feed_forward_out", "feed_forward_norm"):
            jax.tree.map(np.testing.assert_array_equal, params[ours][part], trunk[theirs][part])
        for part in ("attention", "attention_norm"):
            jax.tree.map(np.testing.assert_array_equal, params[ours][f"cross_{part}"], trunk[theirs][part])


def test_it_reads_a_text_as_the_encoder_does(checkpoint, begun):
    """Token, position and type of token, and their norm."""
    (module, params), trunk = begun, checkpoint.params["trunk"]
    ids = np.array([[5, 9, 3, 30, 7]])
    quiet = dataclasses.replace(checkpoint.config, dropout=0.0)
    theirs = Embeddings(quiet, jnp.float32).apply({"params": trunk["embeddings"]}, ids, None, None, True)

    def read(decoder):
        return decoder.embeddings(ids, trunk["embeddings"]["word"]["embedding"], jnp.arange(5)[None], True)

    np.testing.assert_allclose(module.apply({"params": params}, method=read), theirs, atol=1e-6)
