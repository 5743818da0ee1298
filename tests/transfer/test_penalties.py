"""The losses of regularisers and Mixout beside what the papers write, on small arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_jax import transfer

RNG = np.random.default_rng(0)
PARAMS = {"a": RNG.normal(size=(3, 2)).astype(np.float32), "b": {"c": RNG.normal(size=4).astype(np.float32)}}
START = jax.tree.map(lambda leaf: leaf - 0.5, PARAMS)
P, Q = RNG.normal(size=(2, 5, 3)).astype(np.float32)


def softmax(x):
    return np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def kl(p, q):
    return (p * np.log(p / q)).sum(axis=-1)


def test_l2sp():
    new = {"head": np.array([1.0, -2.0], np.float32)}
    expected = 0.2 / 2 * 10 * 0.25 + 0.6 / 2 * 5
    np.testing.assert_allclose(transfer.l2sp(PARAMS, START, new, alpha=0.2, beta=0.6), expected, rtol=1e-5)
    assert transfer.l2sp(PARAMS, PARAMS) == 0
    gradient = jax.grad(lambda params: transfer.l2sp(params, START, alpha=0.2))(PARAMS)
    np.testing.assert_allclose(gradient["a"], 0.2 * (PARAMS["a"] - START["a"]), rtol=1e-5)


def test_ewc():
    fisher = jax.tree.map(lambda leaf: np.abs(leaf), PARAMS)
    expected = sum(0.5 * 0.25 * np.abs(leaf).sum() for leaf in (PARAMS["a"], PARAMS["b"]["c"]))
    np.testing.assert_allclose(transfer.ewc(PARAMS, START, fisher), expected, rtol=1e-5)


def test_fisher_of_logistic_regression():
    """One example after another, by hand: the gradient of log p(y | x) is (y - p) x."""
    x_NxD, y_N = RNG.normal(size=(6, 4)).astype(np.float32), RNG.integers(0, 2, 6)
    w_D = RNG.normal(size=4).astype(np.float32)

    def log_likelihood(params, example):
        x, y = example
        return jax.nn.log_sigmoid(jnp.where(y == 1, 1.0, -1.0) * (x @ params["w"]))

    expected = np.mean([((y - sigmoid(x @ w_D)) * x) ** 2 for x, y in zip(x_NxD, y_N, strict=True)], axis=0)
    actual = transfer.fisher(log_likelihood, {"w": w_D}, (x_NxD, y_N))
    np.testing.assert_allclose(actual["w"], expected, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_distil(temperature):
    expected = temperature**2 * kl(softmax(Q / temperature), softmax(P / temperature))
    np.testing.assert_allclose(transfer.distill(P, Q, temperature), expected, rtol=1e-3, atol=1e-6)
    yes, no = (kl_of(sigmoid(sign * Q / temperature), sigmoid(sign * P / temperature)) for sign in (1, -1))
    expected = temperature**2 * (yes + no).mean(axis=-1)
    np.testing.assert_allclose(transfer.distill(P, Q, temperature, "sigmoid"), expected, rtol=1e-3, atol=1e-6)
    expected = ((P - Q) ** 2).mean(axis=-1)
    np.testing.assert_allclose(transfer.distill(P, Q, temperature, "number"), expected, rtol=1e-5)
    assert not jax.grad(lambda teacher: transfer.distill(P, teacher, temperature).sum())(Q).any()


def kl_of(p, q):
    return p * np.log(p / q)


def test_distil_hidden():
    np.testing.assert_allclose(transfer.distill_hidden(P, Q), ((P - Q) ** 2).mean(axis=-1), rtol=1e-5)
    cosine = (P * Q).sum(axis=-1) / np.linalg.norm(P, axis=-1) / np.linalg.norm(Q, axis=-1)
    np.testing.assert_allclose(transfer.distill_hidden(P, Q, "cosine"), 1 - cosine, rtol=1e-4, atol=1e-6)
    at_0 = jax.grad(lambda student: transfer.distill_hidden(student, Q, "cosine").sum())(np.zeros_like(P))
    assert np.isfinite(at_0).all()


def test_r_drop():
    expected = (kl(softmax(P), softmax(Q)) + kl(softmax(Q), softmax(P))) / 2
    np.testing.assert_allclose(transfer.r_drop(P, Q), expected, rtol=1e-4)
    np.testing.assert_allclose(transfer.r_drop(P, Q), transfer.r_drop(Q, P), rtol=1e-5)
    np.testing.assert_allclose(transfer.r_drop(P, Q, "number"), ((P - Q) ** 2).mean(axis=-1), rtol=1e-5)


@given(st.sampled_from(["softmax", "sigmoid", "number"]), st.integers(0, 99), st.floats(0.5, 20.0))
def test_a_divergence_is_0_of_the_same_and_above_0_of_others(kind, seed, scale):
    p, q = (scale * np.random.default_rng(seed).normal(size=(2, 3, 4))).astype(np.float32)
    np.testing.assert_array_equal(transfer.divergence(kind, p, p), 0)
    assert (transfer.divergence(kind, p, q) > 0).all()


def test_mixout():
    """Each number is that of the start, or goes (w - start) / (1 - p) away from it; the mean is the parameter."""
    params, start, p = {"w": np.full(40_000, 3.0, np.float32)}, {"w": np.full(40_000, 1.0, np.float32)}, 0.7
    mixed = np.asarray(transfer.mixout(jax.random.key(0), params, start, p)["w"])
    own = np.isclose(mixed, 1 + 2 / 0.3)
    assert (own | (mixed == 1)).all()
    np.testing.assert_allclose(own.mean(), 1 - p, atol=0.01)
    np.testing.assert_allclose(mixed.mean(), 3.0, atol=0.1)
    gradient = jax.grad(lambda params: transfer.mixout(jax.random.key(0), params, start, p)["w"].sum())(params)["w"]
    np.testing.assert_allclose(gradient, own / 0.3, rtol=1e-5)
    assert transfer.mixout(jax.random.key(0), params, start, 0.0) is params
