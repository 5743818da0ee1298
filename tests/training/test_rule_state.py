"""The state of every weighting rule lives in the train state: saved, restored, the same bits."""

import every_rule
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import Checkpoints, weighting
from mtl_jax.training import gram_gradient
from mtl_jax.training.checkpoint_store import Store
from mtl_jax.training.train_state import create
from mtl_jax.weighting import Signals

TASKS = ("a", "b", "c")
WRAPPED = {f"{name} wrapped": name for name in ("upgrad", "dwa", "famo", "imtl", "modo", "auto_lambda")}


def rule_of(name):
    rule = every_rule.make(WRAPPED.get(name, name), TASKS)
    for combinator in ("every:k=2", "ema:decay=0.5", "normalized") if name in WRAPPED else ():
        rule = weighting.combine(rule, combinator)
    return rule


def test_the_state_of_every_rule_comes_back(tmp_path):
    trunk = {"kernel": jnp.ones((2, 5))}
    gradients = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 5)), jnp.float32)}
    losses = dict(zip(TASKS, jnp.asarray([0.5, 1.0, 2.0]), strict=True))
    signals = Signals(losses, None, jnp.int32(0), jax.random.key(0), **every_rule.beside_gram(jnp.eye(3)))
    states = {}
    for name in (*weighting.RULES, *WRAPPED):
        rule = rule_of(name)
        state = gram_gradient.init_rule(rule, TASKS, trunk)
        if rule.transform is not None:
            changed, after = jax.jit(rule.transform.update)(state["transform"], signals, gradients)
            told = every_rule.told(rule, after, gradients)
            _, rule_state = jax.jit(rule.update)(state["rule"], signals._replace(gram=jnp.eye(3), transformed=told))
            states[name] = {"rule": rule_state, "transform": after}
            assert jax.tree.structure(changed) == jax.tree.structure(gradients)
        else:
            _, states[name] = jax.jit(rule.update)(state, signals._replace(gram=jnp.eye(3)))
        same = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, state, states[name])
        assert all(jax.tree.leaves(same)), name  # else the compiled step could not go on with it
    state = create({"trunk": trunk}, (), states, 0)
    store = Store(tmp_path, Checkpoints())
    store.save(1, state, {"step": 1}, None)
    store.wait()
    restored = store.latest(lambda record: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state))
    store.close()
    jax.tree.map(np.testing.assert_array_equal, restored.state.rule_state, states)
