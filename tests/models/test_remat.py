"""Layers that the backward pass computes again: the same gradients, under the same paths; and which trunks have layers."""

import doctest

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import trunks
from mtl_jax.core.errors import UserError
from mtl_jax.models import remat
from mtl_jax.models.encoder import EmbeddingConfig, Encoder, EncoderConfig, SharedEmbedding
from mtl_jax.models.modernbert import ModernBert, ModernBertConfig
from mtl_jax.models.remat import has_layers, rematerialised
from mtl_jax.models.seq2seq_decoder import Decoder
from mtl_jax.transfer.adapters import Lora, adapt
from mtl_jax.trunks import Transformer

IDS = jnp.arange(12).reshape(2, 6)
BERT = Encoder(EncoderConfig(16, 8, 1, 2, 16, 8))
MODERN = ModernBert(ModernBertConfig(16, 8, 2, 16, (True,), feed_forward_dropout=0.1))
SCRATCH = Transformer(layers=1, width=8, heads=2, feed_forward=16, head_size=8, dropout=0.0).module(16, jnp.float32)


def drawn(init):
    """Parameters by numpy: to compile an initialisation takes longer than the rest of a test."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), jax.eval_shape(init))


def of_trunk(module):
    def loss(params):
        output = module.apply({"params": params}, IDS, deterministic=False, rngs={"dropout": jax.random.key(1)})
        return (output.hidden**3).sum()

    return drawn(lambda: module.init(jax.random.key(0), IDS)["params"]), loss


def of_decoder():
    decoder, hidden, table = Decoder(SCRATCH.config), jnp.ones((2, 3, 8)), jnp.linspace(0, 1, 128).reshape(16, 8)

    def run(decoder, deterministic):
        return decoder(IDS, decoder.source(hidden, None, None), table, deterministic=deterministic).hidden

    def loss(params):
        rngs = {"dropout": jax.random.key(1)}
        return (decoder.apply({"params": params}, False, method=run, rngs=rngs) ** 3).sum()

    return drawn(lambda: decoder.init(jax.random.key(0), True, method=run)["params"]), loss


@pytest.mark.parametrize(
    ("make", "choice"),
    [
        (lambda: of_trunk(adapt(MODERN, [Lora(name="lora", rank=2)])), "layers"),
        (of_decoder, "dots"),  # its layers are also those of trunks from scratch
    ],
    ids=["modernbert with lora, dropout", "decoder"],
)
def test_gradients_are_the_same(make, choice):
    params, loss = make()

    def again(params):
        with rematerialised(choice):
            return loss(params)

    traced = jax.jit(jax.grad(again)).trace(params)
    assert "remat" in str(traced.jaxpr)
    gradient, expected = traced.lower().compile()(params), jax.jit(jax.grad(loss))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), gradient, expected)


class Plain(nn.Module):
    @nn.compact
    def __call__(self, input_ids):
        return nn.Embed(16, 4)(input_ids)


def test_which_trunks_have_layers():
    assert has_layers(BERT)
    assert has_layers(MODERN)
    assert not has_layers(SharedEmbedding(EmbeddingConfig(16, 4)))
    assert not has_layers(Plain())


def test_a_trunk_without_layers_is_refused():
    bag = trunks.build(trunks.Embedding(), ["a good film"], np.float32)
    trunks.check_remat(bag, "none")
    with pytest.raises(UserError, match="remat is 'dots', but the trunk Embedding has no layers that say so: set is_layer"):
        trunks.check_remat(bag, "dots")


def test_examples():
    assert not doctest.testmod(remat).failed
