import jax
import jax.numpy as jnp
import pytest

from mtl_jax.core.errors import UserError
from mtl_jax.transfer import ParamRule, merge, split, trainable

PARAMS = {"trunk": {"layer_0": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}, "heads": {"a": {"bias": jnp.ones(1)}}}


def test_first_matching_rule_decides():
    rules = [ParamRule("trunk/layer_0/bias"), ParamRule("trunk/.*", train=False), ParamRule(".*")]
    assert trainable(PARAMS, rules) == {
        "trunk": {"layer_0": {"kernel": False, "bias": True}},
        "heads": {"a": {"bias": True}},
    }


def test_merge_undoes_split():
    mask = trainable(PARAMS, [ParamRule("heads/.*"), ParamRule("trunk/.*", train=False)])
    trained, frozen = split(PARAMS, mask)
    assert len(jax.tree.leaves(trained)) == 1
    assert len(jax.tree.leaves(frozen)) == 2
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, merge(trained, frozen), PARAMS))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([ParamRule("trunk/.*"), ParamRule("haeds/.*")], "'haeds/.\\*' matches no parameter"),
        ([ParamRule("trunk/.*")], "no rule covers the parameter heads/a/bias"),
        ([ParamRule("trunk/(")], "not a regular expression"),
        ([ParamRule("trunk"), ParamRule(".*")], "'trunk' matches no parameter"),
    ],
)
def test_rules_must_match_and_cover(rules, message):
    with pytest.raises(UserError, match=message):
        trainable(PARAMS, rules)
