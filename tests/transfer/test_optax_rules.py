"""Rates, decay and schedules by leaf, beside a plain optax optimizer for each leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax.core.errors import UserError
from mtl_jax.transfer import ParamRule, by_rules, decide, merge, split, trainable
from mtl_jax.transfer.freezing import training_since
from mtl_jax.transfer.optax_rules import AdamState, carry, clip_by_norm, scale_by_adam, scale_by_rules
from mtl_jax.transfer.optimizer import Optimizer, build, schedule

RNG = np.random.default_rng(0)
PARAMS = {
    "trunk": {"layer_0": {"kernel": jnp.asarray(RNG.normal(size=(3, 2)), jnp.float32), "bias": jnp.ones(2)}},
    "heads": {"a": {"kernel": jnp.asarray(RNG.normal(size=(2, 1)), jnp.float32), "bias": jnp.ones(1)}},
}
RULES = (
    ParamRule("trunk/.*", rate=0.25, weight_decay=0.3, schedule="cosine"),
    ParamRule("heads/a/bias", train=False),
    ParamRule(".*"),
)


def gradients(step):
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), PARAMS)


def close(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), actual, expected)


def test_a_chain_for_all_is_an_adamw_for_each_leaf():
    config = Optimizer(warmup=0.2, weight_decay=0.1, clip_norm=0.0)
    mask = trainable(PARAMS, RULES)
    optimizer = build(config, decide(PARAMS, RULES), peak=1e-2, steps=5)
    state, params = optimizer.init(split(PARAMS, mask)[0]), PARAMS
    assert state[1].counts.shape == (3,)

    cosine = schedule(Optimizer(warmup=0.2, schedule="cosine"), 0.25e-2, 5)
    linear = schedule(Optimizer(warmup=0.2, schedule="linear"), 1e-2, 5)
    by_hand = {  # decay spares what has one dimension, whoever asks for it
        ("trunk", "layer_0", "kernel"): optax.adamw(cosine, weight_decay=0.3),
        ("trunk", "layer_0", "bias"): optax.adam(cosine),
        ("heads", "a", "kernel"): optax.adamw(linear, weight_decay=0.1),
    }
    leaves = {path: _at(PARAMS, path) for path in by_hand}
    states = {path: by_hand[path].init(leaf) for path, leaf in leaves.items()}
    one, each = jax.jit(optimizer.update), {path: jax.jit(by_hand[path].update) for path in by_hand}
    for step in range(5):
        trained, frozen = split(params, mask)
        updates, state = one(split(gradients(step), mask)[0], state, trained)
        params = merge(optax.apply_updates(trained, updates), frozen)
        for path, leaf in leaves.items():
            update, states[path] = each[path](_at(gradients(step), path), states[path], leaf)
            leaves[path] = leaf + update
    for path, leaf in leaves.items():
        close(_at(params, path), leaf)
    assert params["heads"]["a"]["bias"] is PARAMS["heads"]["a"]["bias"]


@pytest.mark.parametrize("shared", [True, False], ids=["one correction for each age", "one for each leaf"])
def test_moments_go_on_and_new_ones_have_their_own_age(shared):
    """Phases of a bias alone, everything, everything but a kernel, everything again: Adam by Adam written out."""
    phases = [
        (ParamRule("heads/a/bias"), ParamRule(".*", train=False)),
        (ParamRule(".*"),),
        (ParamRule("trunk/layer_0/kernel", train=False), ParamRule(".*")),
        (ParamRule(".*"),),
    ]
    masks = [trainable(PARAMS, rules) for rules in phases]
    state, ages, fresh = None, {}, optax.scale_by_adam()
    for number, mask in enumerate(masks):
        since = training_since(masks[: number + 1])
        chain = optax.chain(optax.identity(), scale_by_adam(since=since if shared else None))
        new = chain.init(split(PARAMS, mask)[0])
        state = new if state is None else carry(state, new)
        trains = [path for path in _paths(PARAMS) if _at(mask, path)]
        ages = {path: ages.get(path, fresh.init(_at(PARAMS, path))) for path in trains}
        np.testing.assert_array_equal(state[1].counts, [ages[path].count for path in trains])
        for step in range(2):
            gradient = gradients(10 * number + step)
            updates, state = chain.update(split(gradient, mask)[0], state)
            for path in trains:
                expected, ages[path] = fresh.update(_at(gradient, path), ages[path])
                close(_at(updates, path), expected)
    assert state[1].counts.tolist() == [8, 6, 6, 2]  # leaves in the order of names: heads, then the trunk's bias and kernel
    assert jax.tree.leaves(since) == [0, 1, 1, 3]


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e3, np.inf, np.nan])
def test_clipping_is_that_of_optax(scale):
    gradient = jax.tree.map(lambda leaf: leaf * scale, gradients(0))
    ours, theirs = clip_by_norm(0.5), optax.clip_by_global_norm(0.5)
    clipped, state = ours.update(gradient, ours.init(PARAMS))
    close(clipped, theirs.update(gradient, theirs.init(PARAMS))[0])
    assert state == theirs.init(PARAMS)  # checkpoints of either are checkpoints of the other


def test_momentum_goes_on_and_schedules_begin_anew():
    config = Optimizer(name="sgd", clip_norm=0.0)
    rules = (ParamRule("heads/.*"), ParamRule(".*", train=False))
    first = build(config, decide(PARAMS, rules), 0.1, 5)
    trained = split(PARAMS, trainable(PARAMS, rules))[0]
    _, state = first.update(split(gradients(0), trainable(PARAMS, rules))[0], first.init(trained), trained)
    everything = build(config, decide(PARAMS, [ParamRule(".*")]), 0.1, 5)
    later = carry(state, everything.init(PARAMS))
    close(later[1].trace["heads"], gradients(0)["heads"])
    assert not np.any(later[1].trace["trunk"]["layer_0"]["kernel"])
    assert (int(state[2].steps), int(later[2].steps)) == (1, 0)


def test_rules_for_plain_optax():
    """A whole tree in, a whole tree out; frozen leaves have no state and do not move, decay or not."""
    optimizer = by_rules(PARAMS, RULES, optax.scale_by_adam(), 0.1, 0.5, {"cosine": optax.cosine_decay_schedule(0.1, 10)})
    state = optimizer.init(PARAMS)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * (6 + 2 + 2)
    updates, state = jax.jit(optimizer.update)(gradients(0), state, PARAMS)
    assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)
    assert not np.any(updates["heads"]["a"]["bias"])
    sign = np.sign(gradients(0)["trunk"]["layer_0"]["kernel"])
    close(updates["trunk"]["layer_0"]["kernel"], -0.025 * (sign + 0.3 * PARAMS["trunk"]["layer_0"]["kernel"]))
    close(updates["trunk"]["layer_0"]["bias"], -0.025 * np.sign(gradients(0)["trunk"]["layer_0"]["bias"]))


def test_state_has_strong_types():
    """A weak one would change after a step, and a second program would be compiled."""
    optimizer = build(Optimizer(), decide(PARAMS, [ParamRule(".*")]), 0.1, 5)
    state = optimizer.init(PARAMS)
    _, after = jax.jit(optimizer.update)(gradients(0), state, PARAMS)
    for tree in (state, after, carry(after, state)):
        assert not any(leaf.weak_type for leaf in jax.tree.leaves(tree))
        assert isinstance(tree[1], AdamState)
    assert jax.tree.map(jnp.result_type, state) == jax.tree.map(jnp.result_type, after)


def test_a_schedule_that_is_none():
    with pytest.raises(UserError, match=r"schedule of the rule 'trunk/.\*': 'cosine'; choices: none"):
        scale_by_rules(decide(PARAMS, RULES), {"": optax.constant_schedule(0.1)})


def _paths(tree):
    return [tuple(key.key for key in path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _at(tree, path):
    for key in path:
        tree = tree[key]
    return tree
