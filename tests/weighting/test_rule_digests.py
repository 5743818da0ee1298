"""The names of rules that a script makes: a digest of all that decides the gradient."""

import every_rule
import jax
import jax.numpy as jnp
import pytest

from mtl_jax import weighting
from mtl_jax.weighting import registry

TASKS = ("a", "b", "c")
PAIRS = {
    "cagrad": (weighting.cagrad(c=0.1), weighting.cagrad(c=0.2)),
    "graddrop": (weighting.graddrop(leak=0.1), weighting.graddrop(leak=0.9)),
    "db_mtl": (weighting.db_mtl(beta=0.5), weighting.db_mtl(beta=0.9)),
    "moco": (weighting.moco(beta=0.5), weighting.moco(beta=1.0)),
    "trimmed_mean": (weighting.trimmed_mean(trim=0), weighting.trimmed_mean(trim=1)),
    "auto_lambda": (weighting.auto_lambda("a", share=0.2), weighting.auto_lambda("a", share=0.5)),
    "pcgrad": (weighting.pcgrad(), weighting.pcgrad()._replace(weighs_heads=True)),
    "equal": tuple(weighting.equal()._replace(head_weights=lambda state, w=w: w * jnp.ones(3)) for w in (1, 2)),
    "excess_risk": tuple(
        weighting.excess_risk()._replace(
            transform=weighting.excess_risk().transform._replace(tells=lambda state, rows, w=w: w * jnp.ones(3))
        )
        for w in (1, 2)
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_rules_that_differ_have_names_that_differ(name):
    one, other = (weighting.name_of(rule, TASKS) for rule in PAIRS[name])
    assert one != other
    assert one.startswith(f"{name}@")
    assert weighting.name_of(PAIRS[name][0], TASKS[::-1]) == one


def test_the_same_rule_has_the_same_name():
    assert weighting.name_of(weighting.moco(), TASKS) == weighting.name_of(weighting.moco(), TASKS)
    wrapped = [weighting.combine(weighting.graddrop(leak=leak), "subset:s=2") for leak in (0.1, 0.1, 0.2)]
    first, again, other = (weighting.name_of(rule, TASKS) for rule in wrapped)
    assert first == again != other


def test_the_names_of_our_rules_say_whether_they_weigh_heads():
    plain = {name for name in weighting.RULES if not every_rule.make(name, TASKS).weighs_heads}
    assert plain == registry.PLAIN_HEADS


def test_a_transform_that_needs_the_trunk_has_a_name():
    def change(state, signals, gradients):
        return jax.tree.map(jnp.zeros_like, gradients) | {"layer_0": gradients["layer_0"]}, state

    rule = weighting.graddrop()._replace(transform=weighting.Transform(lambda gradients: (), change))
    assert weighting.name_of(rule, TASKS) != weighting.name_of(weighting.graddrop(), TASKS)
