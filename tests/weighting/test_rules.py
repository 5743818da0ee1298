import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_jax import weighting
from mtl_jax.errors import UserError
from mtl_jax.weighting import Signals


def signals(losses, step=0):
    losses = {task: jnp.float32(loss) for task, loss in losses.items()}
    return Signals(losses=losses, gram=None, step=jnp.int32(step), key=jax.random.key(step))


def run(rule, history):
    """The weights after each set of losses."""
    state = rule.init(tuple(history[0]))
    found = []
    for step, losses in enumerate(history):
        weights, state = rule.update(state, signals(losses, step))
        found.append({task: float(weight) for task, weight in weights.items()})
    return found


def test_equal_is_the_plain_sum():
    assert run(weighting.equal(), [{"a": 3.0, "b": 5.0}]) == [{"a": 1.0, "b": 1.0}]
    assert weighting.weighted_sum({"a": 1.0, "b": 1.0}, {"a": 3.0, "b": 5.0}) == 8.0


def test_fixed_takes_numbers_and_schedules():
    rule = weighting.fixed({"target": 1, "source": optax.linear_schedule(1.0, 0.0, 4)})
    assert [w["source"] for w in run(rule, [{"target": 1.0, "source": 1.0}] * 5)] == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_dwa_follows_the_formula():
    weights = run(weighting.dwa(), [{"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 4.0}, {"a": 9.0, "b": 9.0}])
    assert weights[0] == weights[1] == {"a": 1.0, "b": 1.0}
    expected = 2 * np.exp([0.5, 2.0]) / np.exp([0.5, 2.0]).sum()
    np.testing.assert_allclose(list(weights[2].values()), expected, rtol=1e-6)


@given(st.lists(st.tuples(*[st.floats(0, 2.0**50, width=32, allow_subnormal=False)] * 3), min_size=1, max_size=6))
def test_dwa_weights_are_finite_and_sum_to_k(history):
    for weights in run(weighting.dwa(), [dict(zip("abc", losses, strict=True)) for losses in history]):
        assert sum(weights.values()) == pytest.approx(3, rel=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: weighting.make("pcgard"), "unknown weighting 'pcgard'.*choices: equal, fixed, dwa, mgda"),
        (lambda: weighting.make("dwa", temp=1), "unknown option of weighting 'dwa': 'temp'.*temperature"),
        (lambda: weighting.make("fixed"), "needs weights"),
        (lambda: weighting.dwa(temperature=0), "temperature is 0"),
        (lambda: weighting.fixed({"a": -1.0}), "a is -1.0; a weight must be finite and not negative"),
        (lambda: weighting.fixed({"a": float("nan")}), "a is nan"),
        (lambda: weighting.fixed({"a": 1.0}).init(["a", "b"]), "no weight for b"),
        (lambda: weighting.fixed({"a": 1.0, "c": 1.0}).init(["a"]), "unknown task in weights: 'c'"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(UserError, match=message):
        make()
