"""Rules from losses and preferences; test_beside_torchjd.py has their numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import weighting
from mtl_jax.core.errors import UserError
from mtl_jax.weighting import Signals

PREFERENCES = {"a": 0.5, "b": 2.0, "c": 1.0}


def weigh(rule, losses, counts=None):
    by_task = {task: jnp.float32(loss) for task, loss in losses.items()}
    present = counts and {task: jnp.float32(count) for task, count in counts.items()}
    weights, _ = rule.update((), Signals(by_task, None, jnp.int32(0), jax.random.key(0), present))
    return [float(weight) for weight in weights.values()]


@pytest.mark.parametrize("rule", [weighting.cosmos(1.5, PREFERENCES), weighting.pbi(3.0, PREFERENCES)])
def test_absent_tasks_do_not_count_and_the_balance_is_kept(rule):
    """Losses in the proportions of the preferences are followed in these; one that is too large gets more weight."""
    balanced = weigh(rule, {"a": 0.1, "b": 0.4, "c": 0.2})
    np.testing.assert_allclose(np.array(balanced) / balanced[0], [1, 4, 2], rtol=1e-2)
    larger = weigh(rule, {"a": 0.3, "b": 0.4, "c": 0.2})
    assert larger[0] / sum(larger) > balanced[0] / sum(balanced)
    without = weigh(rule, {"a": 0.3, "b": 0.4, "c": 0.0}, {"a": 1, "b": 1, "c": 0})
    alone = weighting.make(
        rule.name,
        weights={task: PREFERENCES[task] for task in "ab"},
        **{"cosmos": {"lam": 1.5}, "pbi": {"theta": 3.0}}[rule.name],
    )
    np.testing.assert_allclose(without, [*weigh(alone, {"a": 0.3, "b": 0.4}), 0], rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: weighting.cosmos(-1.0), "weighting cosmos: lam is -1"),
        (lambda: weighting.pbi(-1.0), "weighting pbi: theta is -1"),
        (lambda: weighting.pbi(weights={"a": 0.0}), "weighting pbi: the preference of a is 0"),
        (lambda: weighting.cosmos(weights={"a": "linear_schedule(1, 0, 5)"}), "preference of a is .*it must be a number"),
        (lambda: weighting.cosmos(weights={"aa": 1.0}).init("ab"), "unknown task in weights of weighting 'cosmos': 'aa'"),
        (lambda: weighting.cosmos(weights={"a": 1.0}).init("ab"), "weighting cosmos: no weights for b"),
        (lambda: weighting.pbi(reference={"a": 1.0}).init("ab"), "weighting pbi: no reference for b"),
    ],
)
def test_options(make, problem):
    with pytest.raises(UserError, match=problem):
        make()
