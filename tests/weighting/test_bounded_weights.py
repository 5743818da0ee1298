"""Whatever the losses are, a rule's weights are finite and bounded, and a loss of 0 does not own the step."""

import every_rule
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.weighting import RULES, Signals

LOSSES = [
    *((0.0, 1.0, 2.0), (0.0, 0.0, 1.0), (0.0, 0.0, 0.0), (1e-30, 1.0, 1.0), (1e-38, 1e-8, 1.0)),
    *((1e30, 1.0, 0.0), (1e30, 1e-30, 1.0), (1e38, 1e38, 1e38), (3.0, 1.0, 2.0)),
]
MOST = 1.01e6  # no weight of a loss is larger
# Of these the weights depend on the gradients' lengths, and bounds are on the combined gradient.
BY_LENGTH = ("nash", "fairgrad", "imtl_g", "config", "aligned", "upgrad", "dualproj", "cagrad", "db_mtl", "pcd", "imtl")

# By their definitions a short gradient counts as much as a long one, or decides.
ALL_LENGTHS = ("nash", "fairgrad", "imtl_g", "config", "krum", "mgda", "moco", "sdmgrad", "cagrad", "aligned", "pcd", "imtl")


def made(name, **options):
    return every_rule.make(name, "abc", **options)


def signals(losses, step, rows):
    by_task = dict(zip("abc", map(jnp.float32, losses), strict=True))
    gram = rows @ rows.T
    return Signals(by_task, gram, jnp.int32(step), jax.random.key(step), **every_rule.beside_gram(gram))


def rows_of(losses):
    """Task gradients at an acute angle to each other: of length 1, and 1e-7 where the loss is nothing beside the largest."""
    units = jnp.eye(3) + 0.2
    small = jnp.asarray(losses, jnp.float32) <= 1e-7 * max(losses)
    return jnp.where(small[:, None] & (max(losses) > 0), 1e-7, 1.0) * units


def weigh(name, history, **options):
    """The weights f32[N, 3], the changed rows f32[N, 3, 3] and the last state, step by step, through the transform."""
    rule = made(name, **options)
    state, weights_N, rows_N = rule.init(tuple("abc")), [], []
    kept = None if rule.transform is None else rule.transform.init(jax.ShapeDtypeStruct((3, 3), jnp.float32))
    update = jax.jit(rule.update)
    for step, losses in enumerate(history):
        rows = rows_of(losses)
        at = signals(losses, step, rows)
        if rule.transform is not None:
            changed, kept = rule.transform.update(kept, at._replace(gram=None), rows)
            told, rows = every_rule.told(rule, kept, rows), changed
            at = at._replace(gram=rows @ rows.T, transformed=told)
        weights, state = update(state, at)
        weights_N.append([float(weights[task]) for task in "abc"])
        rows_N.append(rows)
    return np.array(weights_N), np.array(rows_N), (state, kept)


@pytest.mark.parametrize("name", RULES)
def test_weights_and_state_are_finite_whatever_the_losses(name):
    """All of them one after another, so that also what a rule remembers is extreme."""
    weights_N, _, state = weigh(name, [*LOSSES, *LOSSES[::-1]])
    assert np.isfinite(weights_N).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    if name not in BY_LENGTH:
        assert np.abs(weights_N).max() <= MOST


@pytest.mark.parametrize("name", [name for name in RULES if name not in ALL_LENGTHS])
@pytest.mark.parametrize("losses", [(0.0, 1.0, 2.0), (1e-30, 1.0, 1.0), (0.0, 0.0, 1.0)])
def test_a_loss_of_0_does_not_own_the_step(name, losses):
    """Its gradient is noise, 1e-7 of the others: in the combined gradient it is no longer than the longest of those."""
    weights_N, rows_N, _ = weigh(name, [losses] * 3)
    length_NxK = np.abs(weights_N) * np.linalg.norm(rows_N, axis=2)
    nothing = np.array(losses) <= 1e-7
    assert (length_NxK[:, nothing].max(axis=1) <= 1.01 * length_NxK[:, ~nothing].max(axis=1)).all()


@pytest.mark.parametrize("name", ["uncertainty", "imtl_l"])
def test_learned_weights_stop_growing(name):
    """A loss of 0 asks for ever more; the rate is so high that the bound is reached."""
    weights_N, _, _ = weigh(name, [(0.0, 1.0, 2.0)] * 30, learning_rate=1.0)
    assert 1e5 < weights_N[-1][0] <= MOST
    assert (weights_N[-1][1:] < 10).all()


@pytest.mark.parametrize(("name", "options"), [("stch", {"mu": 1e-20}), ("dwa", {"temperature": 1e-35})])
def test_what_overflows_counts_as_the_largest_number(name, options):
    weights_N, _, _ = weigh(name, [(1e30, 1.0, 0.0), (1.0, 1.0, 1.0), (1e30, 1.0, 1.0), (1.0, 1.0, 1.0)], **options)
    assert np.isfinite(weights_N).all()
