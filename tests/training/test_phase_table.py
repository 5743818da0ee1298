import contextlib
import dataclasses
import math

import jax
import numpy as np
import pytest
import tiny

from mtl_jax import Checkpoints, Optimizer, ParamRule, Phase
from mtl_jax.core.errors import UserError
from mtl_jax.experiment_checks import check
from mtl_jax.training.checkpoint_store import Store
from mtl_jax.training.phase_plan import table, with_ages_of
from mtl_jax.training.phase_state import initial_state, start_phase, template
from mtl_jax.training.setup import prepare
from mtl_jax.transfer import probe_then_finetune, split, unfreezing

PHASES = unfreezing(9, at=(3, 6), layers=tiny.LAYERS, decay=0.5, learning_rate=0.1)


@pytest.fixture(scope="module")
def bert(deep):
    return deep


@pytest.fixture(scope="module")
def prepared(bert, data):
    return prepare(tiny.experiment(bert, data, phases=PHASES))


def test_the_table_at_the_start(prepared):
    def size(*names):
        part = prepared.params
        for name in names:
            part = part[name]
        return sum(leaf.size for leaf in jax.tree.leaves(part))

    rows = [line.split() for line in prepared.notes[-1].splitlines()[2:]]
    assert [row[0] for row in rows if "/" not in row[0]] == ["heads", "top_1", "top_2"]
    total, heads, layer, embeddings = size(), size("heads"), size("trunk", "layer_0"), size("trunk", "embeddings")
    assert heads + 2 * layer + embeddings == total
    first = ["heads/.*|trunk/adapters/.*", f"{heads:,}", f"{heads / total:.1%}", "0.1", "0.01", "linear"]
    assert rows[0] == ["heads", *first]
    assert rows[1][-3:] == [f"{total - heads:,}", f"{(total - heads) / total:.1%}", "frozen"]
    assert rows[3][:4] == ["trunk/layer_1/.*", f"{layer:,}", f"{layer / total:.1%}", "0.05"]
    assert rows[6] == [  # two layers in a row are one line
        *("trunk/layer_1/.*", "...", "trunk/layer_0/.*"),
        *(f"{2 * layer:,}", f"{2 * layer / total:.1%}", "0.05", "...", "0.025", "0.01", "linear"),
    ]
    assert len(rows) == 3 * 3 - 1


def test_rules_with_other_decay_or_schedule_have_lines_of_their_own(bert, data, prepared):
    rules = (ParamRule("trunk/layer_0/.*", weight_decay=0.5), ParamRule("trunk/layer_1/.*", schedule="cosine"), ParamRule(".*"))
    experiment = tiny.experiment(bert, data, phases=(Phase("only", 5, rules),))
    endings = [line.split()[-2:] for line in table(experiment, prepared.params).splitlines()[2:]]
    assert endings == [["0.5", "linear"], ["0.01", "cosine"], ["0.01", "linear"]]


def test_a_new_phase_keeps_the_moments_of_what_goes_on_training(prepared):
    """On the state itself, with random numbers for moments."""
    rng = np.random.default_rng(0)
    state = initial_state(prepared)
    for before, plan in zip(prepared.plans, prepared.plans[1:], strict=False):
        random = jax.tree.map(lambda leaf: np.asarray(9 * rng.random(leaf.shape), leaf.dtype), state.opt_state)
        state = state._replace(opt_state=random)
        entered = start_phase(plan, state, prepared)
        old, new = random[1], entered.opt_state[1]
        assert jax.tree.structure(new.mu) == jax.tree.structure(plan.optimizer.init(_trained(prepared, plan))[1].mu)
        ages, counts = iter(old.counts), iter(new.counts)
        for was, now, *moments in zip(*map(_leaves, (before.mask, plan.mask, old.mu, new.mu, old.nu, new.nu)), strict=True):
            age, count = next(ages) if was else 0, next(counts) if now else None
            old_mu, new_mu, old_nu, new_nu = moments
            if not now:
                assert new_mu is None
                assert new_nu is None
                continue
            assert count == age
            np.testing.assert_array_equal(new_mu, old_mu if was else np.zeros_like(new_mu))
            np.testing.assert_array_equal(new_nu, old_nu if was else np.zeros_like(new_nu))
        assert entered.opt_state[2].steps == 0  # the schedule's, of the new phase
        buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(entered)]
        assert len(set(buffers)) == len(buffers)  # all can be donated
        state = entered


def test_a_checkpoint_of_any_phase_is_its_state_and_enters_the_next_one(prepared, tmp_path):
    rng, plans = np.random.default_rng(0), prepared.plans
    state = initial_state(prepared)
    with contextlib.closing(Store(tmp_path, Checkpoints(keep=9))) as store:
        for number, plan in enumerate(plans):
            state = jax.tree.map(lambda leaf: np.asarray(9 * rng.random(leaf.shape), leaf.dtype), state)
            store.save(plan.end, state, {}, None)
            store.wait()
            restored = store.restore(plan.end, lambda _, n=number, end=plan.end: template(prepared, n, end)).state
            jax.tree.map(np.testing.assert_array_equal, restored, state)
            for following in plans[number + 1 : number + 2]:
                state = start_phase(following, state, prepared)
                jax.tree.map(np.testing.assert_array_equal, start_phase(following, restored, prepared), state)


def test_bias_corrections_are_by_the_counts_of_the_state(prepared):
    """A workdir may go on under other phases than those that trained its moments: then each parameter has its own count."""
    plan = prepared.plans[-1]
    params, _ = split(prepared.params, plan.mask)
    assert set(jax.tree.leaves(plan.since)) == {0, 1, 2}
    of_config = plan.optimizer.init(params)
    clip, moments, rules = of_config
    since = np.asarray(jax.tree.leaves(plan.since))
    by_phase = clip, moments._replace(counts=9 - 3 * since), rules
    other = clip, moments._replace(counts=np.arange(len(since), dtype=np.int32)), rules
    assert with_ages_of(plan, of_config, prepared.experiment) is plan
    assert with_ages_of(plan, by_phase, prepared.experiment) is plan
    by_count = with_ages_of(plan, other, prepared.experiment)

    def updates(plan, state):
        return jax.tree.leaves(plan.optimizer.update(jax.tree.map(np.ones_like, params), state, params)[0])

    for ours, theirs in zip(updates(plan, by_phase), updates(by_count, by_phase), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    differ = [not np.array_equal(*pair) for pair in zip(updates(plan, other), updates(by_count, other), strict=True)]
    assert sum(differ) == len(since) - 3  # the first parameter of each phase decides for the others


@pytest.mark.parametrize(
    ("rule", "optimizer", "message"),
    [
        (ParamRule(".*", rate=-0.5), {}, "rate is -0.5; it must be above 0"),
        (ParamRule(".*", rate=0.0), {}, "rate is 0.0; it must be above 0; to freeze parameters, set train=False"),
        (ParamRule(".*", rate=math.nan), {}, "rate is nan"),
        (ParamRule(".*", weight_decay=-0.1), {}, "weight_decay is -0.1; it must not be negative"),
        (ParamRule(".*", schedule="cosin"), {}, "unknown schedule of the rule '..': 'cosin' .did you mean 'cosine'"),
        (ParamRule(".*", weight_decay=0.1), {"name": "sgd"}, "weight_decay is for adamw, and optimizer.name is sgd"),
        (ParamRule(".*", train=False, rate=0.5), {}, "leave out rate, weight_decay and schedule"),
    ],
)
def test_rules_that_make_no_sense(rule, optimizer, message):
    experiment = tiny.experiment("none", "none", phases=(Phase("only", 5, (rule,)),), optimizer=Optimizer(**optimizer))
    with pytest.raises(UserError, match=message):
        check(experiment)


def test_a_probe_looks_features_up(bert, data):
    phases = probe_then_finetune(4, 4, probe_rate=1e-2, rate=1e-3)
    plans = prepare(dataclasses.replace(tiny.experiment(bert, data), phases=phases)).plans
    assert [plan.cached_features for plan in plans] == [True, False]
    assert [float(plan.learning_rate(plan.phase.steps // 2)) > 1e-3 for plan in plans] == [True, False]


def _trained(prepared, plan):
    return jax.tree.map(lambda leaf, train: leaf if train else None, prepared.params, plan.mask)


def _leaves(tree):
    return jax.tree.leaves(tree, is_leaf=lambda leaf: leaf is None)
