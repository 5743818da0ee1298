import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from mtl_jax import ParamRule, Phase, weighting
from mtl_jax.data.stream import single_phase, stream
from mtl_jax.models.layers import Head
from mtl_jax.training.forward import cached_features, encode_tokens
from mtl_jax.training.gradient import make_backward
from mtl_jax.training.phase_state import initial_state
from mtl_jax.training.setup import prepare
from mtl_jax.training.step import make_gradient_fn, make_train_step
from mtl_jax.training.train_state import StepInputs
from mtl_jax.transfer import freezing, top_layers
from mtl_jax.transfer import optimizer as optimizers
from mtl_jax.transfer.optimizer import Optimizer

DECAYING = Optimizer(learning_rate=1e-2, weight_decay=0.1, clip_norm=0.1, warmup=0.0)


@pytest.fixture(scope="module")
def batch(bert, data):
    experiment = tiny.experiment(bert, data)
    batches = stream(prepare(experiment).corpus, experiment.batch, 0, single_phase(experiment.batch, 100))
    yield next(batches)
    batches.close()


def one_phase(bert, data, *rules, **changes):
    prepared = prepare(tiny.experiment(bert, data, phases=(Phase("only", 5, rules=rules),), **changes))
    plan = prepared.plans[0]
    trains_trunk = any(jax.tree.leaves(plan.mask["trunk"]))
    backward = make_backward(encode_tokens(prepared.trunk.module), prepared.corpus.tasks, trains_trunk=trains_trunk)
    step = make_train_step(make_gradient_fn(backward, plan.rule), plan.optimizer, plan.mask)
    return prepared, step, initial_state(prepared)


def flops(step, state, batch, table=None):
    return jax.jit(step).lower(state, StepInputs(batch, table)).compile().cost_analysis()["flops"]


def test_one_step_is_the_textbook_written_out(bert, data, batch):
    """No dropout, SGD, fixed weights: parameters after a step = parameters - rate * gradient of the weighted sum."""
    weights = {"rating": 1.0, "coarse": 0.5, "fine": 2.0}
    trunk = dataclasses.replace(tiny.experiment(bert, data).trunk, dropout=0.0)
    tasks = tuple(dataclasses.replace(t, dropout=0.0) for t in tiny.experiment(bert, data).tasks)
    sgd = Optimizer(name="sgd", learning_rate=0.1, clip_norm=0.0, b1=0.0, warmup=0.0, schedule="constant")
    prepared, step, state = one_phase(
        bert, data, ParamRule(".*"), trunk=trunk, tasks=tasks, optimizer=sgd, weighting="fixed", weights=weights
    )

    batch = jax.tree.map(lambda leaf: leaf[[0, 7]], batch)  # a row of each source, cut to two examples
    kept, early = batch.segments <= 2, np.arange(batch.index.shape[1]) < 2
    batch = batch._replace(
        tokens=batch.tokens * kept,
        segments=batch.segments * kept,
        index=np.where(early, batch.index, -1),
        labels={task.name: np.where(early, batch.labels[task.name], task.missing) for task in tasks},
    )

    def objective(params):
        """Example by example, without packing."""
        per_task = {task.name: [] for task in prepared.corpus.tasks}
        for row, slot in zip(*np.nonzero(batch.index >= 0), strict=True):
            ids = jnp.asarray(batch.tokens[row][batch.segments[row] == slot + 1])[None]
            vector = prepared.trunk.module.apply({"params": params["trunk"]}, ids).hidden[0].mean(0)
            for task in prepared.corpus.tasks:
                label = batch.labels[task.name][row, slot]
                if np.isnan(label) or label == task.missing:
                    continue
                output = Head(task.outputs, task.hidden).apply({"params": params["heads"][task.name]}, vector)
                if task.labels:
                    per_task[task.name].append(-jax.nn.log_softmax(output)[label])
                else:
                    per_task[task.name].append((output[0] - label / task.scale) ** 2)
        return sum(weights[name] * jnp.mean(jnp.stack(losses)) for name, losses in per_task.items())

    total, gradient = jax.jit(jax.value_and_grad(objective))(prepared.params)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, prepared.params, gradient)
    new_state, metrics = jax.jit(step)(state, StepInputs(batch))
    np.testing.assert_allclose(metrics.total, total, rtol=1e-5)
    np.testing.assert_allclose(metrics.gradient_norm, optax.tree.norm(gradient), rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), new_state.params, expected)


def test_frozen_leaves_do_not_move_by_a_bit(deep, data, batch):
    """AdamW with decay and clipping; half of the trunk frozen."""
    frozen = r"trunk/(embeddings|layer_0)/.*"
    rules = (ParamRule(frozen, train=False), ParamRule(".*"))
    _, step, state = one_phase(deep, data, *rules, optimizer=DECAYING)
    before = jax.device_get(state.params)
    for _ in range(3):
        state, _ = jax.jit(step)(state, StepInputs(batch))
    mask = freezing.trainable(before, rules)
    same = jax.tree.map(lambda a, b: a.tobytes() == np.asarray(b).tobytes(), before, state.params)
    assert jax.tree.all(jax.tree.map(lambda same, train: same != train, same, mask))


@pytest.mark.parametrize("layers", [0, 1])
def test_frozen_leaves_own_no_optimizer_state(deep, data, layers):
    """Two moments of four bytes a number that trains, the age of each leaf, and what schedules count."""
    _, _, state = one_phase(deep, data, *top_layers(layers, tiny.LAYERS), optimizer=DECAYING)
    trained = jax.tree.leaves([state.params["heads"], [state.params["trunk"]["layer_1"]] * layers])
    expected = 2 * sum(leaf.nbytes for leaf in trained) + 4 * len(trained) + 4
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state)) == expected


def test_frozen_parts_cost_no_backward_pass(deep, data, batch):
    """By XLA's own count: a frozen trunk costs its forward pass, half a trunk less than a whole one."""
    _, full_step, full = one_phase(deep, data, ParamRule(".*"), optimizer=DECAYING)
    _, top_step, top = one_phase(deep, data, *top_layers(1, tiny.LAYERS), optimizer=DECAYING)
    prepared, heads_step, heads = one_phase(deep, data, *tiny.HEADS_ONLY, optimizer=DECAYING)
    plan = prepared.plans[0]
    table = jnp.zeros((prepared.corpus.size, tiny.HIDDEN))
    cached_backward = make_backward(cached_features, prepared.corpus.tasks, trains_trunk=False)
    cached_step = make_train_step(make_gradient_fn(cached_backward, plan.rule), plan.optimizer, plan.mask)

    def forward(params, batch):
        return encode_tokens(prepared.trunk.module)(params["trunk"], batch, None, None)

    trunk_forward = jax.jit(forward).lower(heads.params, batch).compile().cost_analysis()["flops"]
    everything, half = flops(full_step, full, batch), flops(top_step, top, batch)
    only_heads, cached = flops(heads_step, heads, batch), flops(cached_step, heads, batch, table)
    assert only_heads - cached <= 1.02 * trunk_forward
    assert only_heads < 0.45 * everything
    assert only_heads < half < 0.8 * everything
    assert cached < 0.1 * everything


def test_cached_features_give_the_same_step(bert, data, batch):
    prepared, step, state = one_phase(bert, data, *tiny.HEADS_ONLY)
    plan = prepared.plans[0]
    cached_backward = make_backward(cached_features, prepared.corpus.tasks, trains_trunk=False)
    cached_step = make_train_step(make_gradient_fn(cached_backward, plan.rule), plan.optimizer, plan.mask)
    encode = jax.jit(encode_tokens(prepared.trunk.module))
    pooled = encode(prepared.params["trunk"], batch, None, None).pooled
    table = np.zeros((prepared.corpus.size, tiny.HIDDEN), np.float32)
    table[batch.index[batch.index >= 0]] = pooled[batch.index >= 0]
    a, metrics_a = jax.jit(step)(state, StepInputs(batch))
    b, metrics_b = jax.jit(cached_step)(state, StepInputs(batch, jnp.asarray(table)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), metrics_a, metrics_b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), a.params, b.params)


def test_an_absent_task_has_no_loss_and_no_gradient(bert, data, batch):
    _, step, state = one_phase(bert, data, ParamRule(".*"), optimizer=dataclasses.replace(DECAYING, weight_decay=0.0))
    labels = batch.labels | {"fine": np.full_like(batch.labels["fine"], -1)}
    new_state, metrics = jax.jit(step)(state, StepInputs(batch._replace(labels=labels)))
    assert metrics.losses["fine"] == metrics.counts["fine"] == 0
    before, after = state.params["heads"]["fine"], new_state.params["heads"]["fine"]
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_the_rule_sees_losses_without_gradient(bert, data, batch):
    """A rule whose weights depend on the losses must not be differentiated through."""
    prepared, _, state = one_phase(bert, data, ParamRule(".*"))
    plan = prepared.plans[0]

    def by_loss(state, signals):
        return {task: 1.0 / (loss + 1.0) for task, loss in signals.losses.items()}, state

    rule = weighting.Rule(init=lambda names: (), update=by_loss)
    backward = make_backward(encode_tokens(prepared.trunk.module), prepared.corpus.tasks, trains_trunk=True)
    step = make_train_step(make_gradient_fn(backward, rule), plan.optimizer, plan.mask)
    _, metrics = jax.jit(step)(state, StepInputs(batch))
    weights = {task: float(weight) for task, weight in metrics.weights.items()}
    fixed_step = make_train_step(make_gradient_fn(backward, weighting.fixed(weights)), plan.optimizer, plan.mask)
    _, expected = jax.jit(fixed_step)(state, StepInputs(batch))
    np.testing.assert_allclose(metrics.gradient_norm, expected.gradient_norm, rtol=1e-5)


def test_schedules():
    config = Optimizer(warmup=0.2, schedule="linear")
    rate = optimizers.schedule(config, peak=1.0, steps=10)
    np.testing.assert_allclose([rate(0), rate(1), rate(2), rate(9)], [0.5, 1.0, 8 / 9, 1 / 9], atol=1e-6)
    constant = optimizers.schedule(Optimizer(warmup=0.0, schedule="constant"), peak=0.5, steps=10)
    assert [float(constant(step)) for step in (0, 9)] == [0.5, 0.5]


def test_weight_decay_spares_biases_and_norms():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "scale": jnp.ones(2)}
    config = Optimizer(weight_decay=0.5, clip_norm=0.0, schedule="constant", warmup=0.0)
    optimizer = optimizers.build(config, freezing.decide(params, [ParamRule(".*")]), 0.1, 5)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.05)
    np.testing.assert_array_equal(updates["bias"], 0)
    np.testing.assert_array_equal(updates["scale"], 0)
