"""Rules that change the task gradients themselves, through their transform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_jax import weighting
from mtl_jax.core.errors import UserError
from mtl_jax.weighting import Signals


def signals(step, losses=(1.0, 1.0), counts=None):
    counts = None if counts is None else dict(zip("ab", map(jnp.float32, counts), strict=True))
    return Signals(dict(zip("ab", map(jnp.float32, losses), strict=True)), None, jnp.int32(step), jax.random.key(step), counts)


def tree(values):
    return {"kernel": jnp.asarray(values, jnp.float32)}


def test_moco_tracks_the_gradients():
    rule = weighting.moco(beta=0.5, sigma=1.0)
    state = rule.transform.init(tree(np.zeros((2, 3))))
    first, state = rule.transform.update(state, signals(0), tree([[2, 2, 2], [4, 4, 4]]))
    np.testing.assert_allclose(first["kernel"][:, 0], [1, 2])
    second, state = rule.transform.update(state, signals(1), tree([[5, 5, 5], [0, 0, 0]]))
    np.testing.assert_allclose(second["kernel"][:, 0], [1 + 0.25 * 4, 2 - 0.25 * 2])
    third, _ = rule.transform.update(state, signals(2, counts=(0, 3)), tree([[0, 0, 0], [6, 6, 6]]))
    np.testing.assert_allclose(third["kernel"][0], second["kernel"][0])  # absent: nothing new about it


def test_db_mtl_averages_the_gradients_of_the_logarithms():
    """4 / 2 = 2, then the mean of 2 and 6 / 3 * 3 = 6, which is 4; handed on times the loss of the step."""
    rule = weighting.db_mtl(beta=0.5, sigma=0.0)
    state = rule.transform.init(tree(np.zeros((2, 3))))
    first, state = rule.transform.update(state, signals(0, losses=(2.0, 1.0)), tree([[4, 4, 4], [3, 3, 3]]))
    np.testing.assert_allclose(first["kernel"][:, 0], [2 * 2, 3], rtol=1e-6)
    second, state = rule.transform.update(state, signals(1, losses=(3.0, 1.0)), tree([[18, 18, 18], [3, 3, 3]]))
    np.testing.assert_allclose(state["average"]["kernel"][:, 0], [4, 3], rtol=1e-6)
    np.testing.assert_allclose(second["kernel"][:, 0], [3 * 4, 3], rtol=1e-6)


def test_db_mtl_weighs_alike_with_and_without_average():
    """In the first step there is nothing to average: the same weights, in the units of the losses."""
    gradients, losses = tree([[4, 0, 0], [0, 3, 0]]), (2.0, 0.5)
    actual = {}
    for beta in (0.0, 0.9):
        rule = weighting.db_mtl(beta=beta)
        changed = gradients
        if rule.transform is not None:
            changed, _ = rule.transform.update(rule.transform.init(gradients), signals(0, losses), gradients)
        gram = changed["kernel"] @ changed["kernel"].T
        actual[beta], _ = rule.update((), signals(0, losses)._replace(gram=gram, transformed=()))
    for task in "ab":
        np.testing.assert_allclose(actual[0.9][task], actual[0.0][task], rtol=1e-5)
    np.testing.assert_allclose(actual[0.0]["a"], 6 / (4 / 2) / 2, rtol=1e-5)  # the longest h, of b, is 3 / 0.5


def test_graddrop_keeps_one_sign_in_each_coordinate():
    """Chen et al.: positive with probability (1 + sum / sum of sizes) / 2."""
    size = 4000
    gradients = tree(np.stack([np.full(size, 3.0), np.full(size, -1.0)]))
    rule = weighting.graddrop()
    actual, _ = rule.transform.update((), signals(0), gradients)
    total = np.asarray(actual["kernel"].sum(axis=0))
    assert set(total) == {3.0, -1.0}
    np.testing.assert_allclose(np.mean(total > 0), 0.75, atol=0.03)
    leaking, _ = weighting.graddrop(leak=1.0).transform.update((), signals(0), gradients)
    np.testing.assert_array_equal(leaking["kernel"], gradients["kernel"])
    alike, _ = rule.transform.update((), signals(0), tree(np.ones((2, 5))))
    np.testing.assert_array_equal(alike["kernel"], np.ones((2, 5)))


@given(seed=st.integers(0, 10_000), trim=st.integers(0, 2))
@settings(max_examples=20)
def test_trimmed_mean_leaves_the_extremes_out(seed, trim):
    """Against a sort; of few present tasks, fewer values are left out."""
    rng = np.random.default_rng(seed)
    rows, here = np.round(rng.normal(size=(5, 6)), 1) * 10.0 ** rng.integers(-3, 4, (5, 1)), rng.random(5) < 0.7
    names, least = "abcde", min(trim, max(0, (here.sum() - 1) // 2))
    rule = weighting.trimmed_mean(trim)
    losses, counts = dict.fromkeys(names, jnp.ones(())), dict(zip(names, here.astype(np.float32), strict=True))
    changed, _ = rule.transform.update((), Signals(losses, None, jnp.int32(0), jax.random.key(0), counts), tree(rows))
    expected = np.sort(rows[here], axis=0)[least : here.sum() - least].mean(axis=0) if here.any() else np.zeros(6)
    np.testing.assert_allclose(changed["kernel"].sum(axis=0), expected, rtol=1e-5, atol=1e-6)
    assert (np.asarray(changed["kernel"])[~here] == 0).all()


@pytest.mark.parametrize(("trim", "problem"), [(-1, "trim is -1"), (0.5, "trim is 0.5"), (2, "needs 5 tasks, but there are 2")])
def test_options_of_trimmed_mean(trim, problem):
    with pytest.raises(UserError, match=problem):
        weighting.trimmed_mean(trim).init("ab")
