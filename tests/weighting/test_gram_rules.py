import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_jax import weighting
from mtl_jax.errors import UserError
from mtl_jax.weighting import Signals

GRAM_RULES = ("mgda", "pcgrad", "cagrad", "fairgrad", "imtl_g", "aligned", "upgrad", "dualproj", "config")
EXAMPLE = np.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])


make = functools.cache(weighting.make)  # one rule object, one compilation


def weights_of(rule, gradients, key=0):
    """The weights for gradients f[K, P]."""
    K = len(gradients)
    gram = jnp.asarray(np.asarray(gradients, np.float64) @ np.asarray(gradients, np.float64).T, jnp.float32)
    losses = {f"t{i:02d}": jnp.float32(1.0) for i in range(K)}
    found, _ = jax.jit(rule.update)(rule.init(tuple(losses)), Signals(losses, gram, jnp.int32(0), jax.random.key(key)))
    return np.array([found[name] for name in sorted(found)], np.float64)


def direction(rule, gradients, key=0):
    return np.asarray(gradients).T @ weights_of(rule, gradients, key)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (weighting.mgda(), [0, 1, 1]),
        (weighting.pcgrad(), [0.5848, 3.8012, 3.8012]),
        (weighting.pcgrad(order="sorted"), [0.5848, 3.8012, 3.8012]),
        (weighting.cagrad(c=0.5), [0.1835, 1.2041, 1.2041]),
        (weighting.cagrad(c=0.4), [0.3468, 1.1633, 1.1633]),
        (weighting.cagrad(c=0.0), [1, 1, 1]),
        (weighting.upgrad(), [0.2924, 1.9006, 1.9006]),
        (weighting.dualproj(), [0.5563, 1.1109, 1.1109]),
        (weighting.fairgrad(alpha=1.0), [0.0766, 0.9985, 0.9985]),
        (weighting.fairgrad(alpha=2.0), [0.0313, 0.7908, 0.7908]),
        (weighting.imtl_g(), [0.0767, 1, 1]),
        (weighting.aligned(), [0.2133, 0.9673, 0.9673]),
        (weighting.config(), [0.1588, 2.0706, 2.0706]),
    ],
)
def test_published_example(rule, expected):
    """Two gradients that conflict; values of the papers' definitions, rounded."""
    np.testing.assert_allclose(direction(rule, EXAMPLE), expected, atol=2e-3)


def pcgrad_written_out(gradients, orders):
    total = np.zeros(gradients.shape[1])
    for i, order in enumerate(orders):
        g = gradients[i].copy()
        for j in order:
            if j != i and g @ gradients[j] < 0:
                g -= g @ gradients[j] / (gradients[j] @ gradients[j]) * gradients[j]
        total += g
    return total


def test_pcgrad_is_the_loop_written_out():
    rng = np.random.default_rng(0)
    for seed in range(5):
        gradients = rng.normal(size=(5, 4))
        sorted_orders = [range(5)] * 5
        expected = pcgrad_written_out(gradients, sorted_orders)
        np.testing.assert_allclose(direction(weighting.pcgrad(order="sorted"), gradients), expected, atol=1e-4)
        key = jax.random.key(seed)
        orders = np.array([jax.random.permutation(k, 5) for k in jax.random.split(key, 5)])
        found = direction(weighting.pcgrad(), gradients, key=seed)
        np.testing.assert_allclose(found, pcgrad_written_out(gradients, orders), atol=1e-4)


def test_aligned_and_config_are_their_definitions():
    gradients = np.random.default_rng(1).normal(size=(4, 9))
    u, s, vt = np.linalg.svd(gradients, full_matrices=False)
    np.testing.assert_allclose(direction(weighting.aligned(), gradients), s.min() * (u @ vt).T @ np.full(4, 0.25), atol=1e-4)
    unit = gradients / np.linalg.norm(gradients, axis=1, keepdims=True)
    d = np.linalg.pinv(unit) @ np.ones(4)
    d /= np.linalg.norm(d)
    np.testing.assert_allclose(direction(weighting.config(), gradients), (gradients @ d).sum() * d, rtol=1e-3, atol=1e-4)


def test_fairgrad_solves_its_equation():
    for alpha in (0.5, 1.0, 2.0):
        gradients = np.random.default_rng(2).normal(size=(6, 20))
        w = weights_of(weighting.fairgrad(alpha=alpha), gradients)
        np.testing.assert_allclose(gradients @ gradients.T @ w, w ** (-1 / alpha), rtol=2e-3)


def test_imtl_g_has_equal_projections():
    gradients = np.random.default_rng(3).normal(size=(4, 9))
    g = direction(weighting.imtl_g(), gradients)
    projections = gradients @ g / np.linalg.norm(gradients, axis=1)
    np.testing.assert_allclose(projections, projections[0], rtol=1e-3)
    assert weights_of(weighting.imtl_g(), gradients).sum() == pytest.approx(1.0, abs=1e-4)


def test_cagrad_is_optimal():
    """No w on a fine random sample of the simplex gives a smaller objective than the one that was found."""
    rng = np.random.default_rng(4)
    gradients = rng.normal(size=(3, 5))
    mean = gradients.mean(0)

    def objective(w):
        return w @ gradients @ mean + 0.5 * np.linalg.norm(mean) * np.linalg.norm(w @ gradients)

    w = (weights_of(weighting.cagrad(c=0.5), gradients) - 1 / 3).clip(0)
    best = objective(w / w.sum())
    assert best <= min(objective(w) for w in rng.dirichlet(np.ones(3), 2000)) + 1e-5


matrices = st.integers(0, 10_000).map(
    lambda seed: np.random.default_rng(seed).normal(size=(4, 6)) * np.exp(np.random.default_rng(seed + 1).normal(size=(4, 1)))
)


@pytest.mark.parametrize("name", ["upgrad", "dualproj", "mgda"])
@given(gradients=matrices)
@settings(max_examples=25)
def test_non_conflicting(name, gradients):
    g = direction(make(name), gradients)
    assert (gradients @ g).min() >= -1e-3 * np.square(gradients).sum(1).max()


@pytest.mark.parametrize("name", sorted(set(GRAM_RULES) - {"pcgrad"}))
@given(gradients=matrices, seed=st.integers(0, 100))
@settings(max_examples=15)
def test_the_order_of_the_tasks_does_not_matter(name, gradients, seed):
    order = np.random.default_rng(seed).permutation(4)
    rule = make(name)
    expected = direction(rule, gradients)
    np.testing.assert_allclose(direction(rule, gradients[order]), expected, rtol=1e-2, atol=1e-2 * np.abs(expected).max())


@pytest.mark.parametrize("name", GRAM_RULES)
@pytest.mark.parametrize(
    "gradients",
    [
        np.zeros((3, 2)),
        np.ones((3, 2)),
        np.array([[1.0, 0.0], [-1.0, 0.0]]),
        np.array([[1.0, 0.0], [0.0, 0.0]]),
        np.array([[1.0, 2.0]]),
        np.random.default_rng(0).normal(size=(3, 4)) * 1e-15,
        np.random.default_rng(0).normal(size=(3, 4)) * 1e15,
        np.random.default_rng(0).normal(size=(3, 4)) * np.array([[1e-6], [1.0], [1e6]]),
    ],
    ids=["zero", "equal", "opposite", "one zero", "K = 1", "1e-15", "1e15", "unlike"],
)
def test_weights_are_finite(name, gradients):
    assert np.isfinite(weights_of(make(name), gradients)).all()


@pytest.mark.parametrize("name", ["mgda", "pcgrad", "cagrad", "imtl_g", "aligned", "upgrad", "dualproj", "config"])
def test_the_weights_do_not_depend_on_a_common_scale(name):
    gradients = np.random.default_rng(5).normal(size=(4, 8))
    rule = weighting.make(name)
    for scale in (1e-8, 1e8):
        np.testing.assert_allclose(weights_of(rule, scale * gradients), weights_of(rule, gradients), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("maker", "message"),
    [
        (lambda: weighting.make("cagrad", c=-1.0), "c is -1.0; it must not be negative"),
        (lambda: weighting.make("cagrad", d=1.0), "unknown option of weighting 'cagrad': 'd'.*choices: c"),
        (lambda: weighting.make("cagrad", c="half"), "c is 'half'; it must be a number"),
        (lambda: weighting.make("fairgrad", alpha=0.0), "alpha is 0.0; it must be above 0"),
        (lambda: weighting.make("pcgrad", order="size"), "order is 'size'; it must be random or sorted"),
    ],
)
def test_bad_options(maker, message):
    with pytest.raises(UserError, match=message):
        maker()
