import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_jax.models import dropout

SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 4), (2, 1, 3, 2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_bits_are_those_of_jax(shape):
    np.testing.assert_array_equal(dropout._bits(jax.random.key(3), shape), jax.random.bits(jax.random.key(3), shape))


@given(seed=st.integers(0, 2**31 - 1), probability=st.floats(0, 1, width=32))
def test_draws_are_those_of_jax(seed, probability):
    found = dropout.bernoulli(jax.random.key(seed), probability, (40,))
    np.testing.assert_array_equal(found, jax.random.bernoulli(jax.random.key(seed), probability, (40,)))


def test_they_are_drawn_here_and_for_many_keys_at_once(monkeypatch):
    keys = jax.random.split(jax.random.key(0), 4)
    expected = jax.vmap(lambda key: jax.random.bernoulli(key, 0.3, (5, 6)))(keys)
    monkeypatch.delattr(jax.random, "bernoulli")
    np.testing.assert_array_equal(jax.vmap(lambda key: dropout.bernoulli(key, 0.3, (5, 6)))(keys), expected)


@pytest.mark.parametrize("key", [jax.random.key(0, impl="rbg"), jax.random.PRNGKey(0)], ids=["rbg", "raw"])
def test_other_keys_are_left_to_jax(key):
    np.testing.assert_array_equal(dropout.bernoulli(key, 0.3, (50,)), jax.random.bernoulli(key, 0.3, (50,)))


class Both(nn.Module):
    """Dropout as a part of a module, by name and by number."""

    kind: type
    rate: float

    @nn.compact
    def __call__(self, x, deterministic):
        return self.kind(self.rate, name="named")(self.kind(self.rate)(x, deterministic=deterministic), deterministic)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dropout_is_that_of_flax(dtype, rate, deterministic):
    """The same numbers and gradients, bit by bit: where it stands in a module makes the key."""
    x = jax.random.normal(jax.random.key(0), (3, 4, 5), dtype)

    def gradient(kind):
        def total(x):
            return jnp.sin(Both(kind, rate).apply({}, x, deterministic, rngs={"dropout": jax.random.key(1)})).sum()

        return jax.value_and_grad(total)(x)

    jax.tree.map(np.testing.assert_array_equal, gradient(dropout.Dropout), gradient(nn.Dropout))
