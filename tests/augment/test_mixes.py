"""Mixing: partners within a source, tokens of packed examples beside their partner's, soft labels as written out."""

import dataclasses
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mtl_jax import Classification, Regression, Tagging, UserError
from mtl_jax.augment import Mix, NeighbourSmoothing, mixed, mixed_tokens, nearest, partners
from mtl_jax.augment.mixes import has_label, soft_loss
from mtl_jax.core import trees
from mtl_jax.data.batches import Batch
from mtl_jax.data.stream import stream
from mtl_jax.models.encoder import EncoderOutput
from mtl_jax.models.remat import rematerialised
from mtl_jax.models.trunk_output import Copies, Encoded, segment_mean
from mtl_jax.training.build_step import gradient_fn
from mtl_jax.training.forward import encode_tokens
from mtl_jax.training.phase_state import initial_state
from mtl_jax.training.regularisation import mixing
from mtl_jax.training.setup import mixture_phases, prepare
from mtl_jax.training.train_state import StepInputs

CLASSES = Classification(name="c", source="a", column="c", labels=("x", "y", "z"))
NUMBER = Regression(name="n", source="a", column="n")


def test_partners_stay_in_their_group_and_are_a_permutation():
    groups = jnp.array([0, 2, 1, 2, 2, 0, 1, 2, 0])
    drawn = np.array(jax.jit(jax.vmap(lambda key: partners(key, groups)))(jax.random.split(jax.random.key(0), 20)))
    for partner in drawn:
        assert sorted(partner.tolist()) == list(range(9))
        assert (groups[partner] == groups).all()
    assert all(len(set(drawn[:, n].tolist())) == int((groups == groups[n]).sum()) for n in range(9))
    values = np.arange(9.0)
    np.testing.assert_allclose(mixed(values, partner, 0.25), 0.25 * values + 0.75 * values[partner])


def test_tokens_of_packed_examples_are_mixed_with_the_same_positions():
    segments = jnp.array([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 2, 0]])
    positions = jnp.array([[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 0]])
    hidden = jnp.arange(12.0).reshape(2, 6, 1)
    partner = jnp.array([3, 2, 0, 1])  # examples (0,0) (0,1) (1,0) (1,1): starts 0, 3, 6, 7 and lengths 3, 2, 1, 4
    result = np.asarray(jax.jit(mixed_tokens)(hidden, segments, positions, partner, jnp.float32(0.25)))[..., 0]
    between = [0.25 * a + 0.75 * b for a, b in ((0, 7), (1, 8), (2, 9), (3, 6))]
    np.testing.assert_allclose(result[0], [*between, 4, 5])
    np.testing.assert_allclose(result[1], [0.75 * 0 + 0.25 * 6, 0.25 * 7 + 0.75 * 3, 0.25 * 8 + 0.75 * 4, 9, 10, 11])


def test_soft_losses_are_those_of_soft_labels():
    rng = np.random.default_rng(0)
    partner, weight = jnp.array([1, 2, 0, 4, 3, 5]), jnp.float32(0.3)
    labels, numbers = jnp.array([0, 1, 2, 0, -1, 1]), jnp.array([0.1, 0.4, jnp.nan, 0.2, 0.3, 0.9])
    batch = Batch(None, None, None, None, None, {})

    @jax.jit
    def losses(outputs, of_numbers):
        soft = weight * jax.nn.one_hot(labels, 3) + (1 - weight) * jax.nn.one_hot(labels[partner], 3)
        both = jnp.array([1, 1, 1, 0, 0, 1.0])  # the pair of 3 and 4 has one label only
        by_hand = -(both[:, None] * soft * jax.nn.log_softmax(outputs.reshape(6, 3))).sum()
        number = weight * numbers + (1 - weight) * numbers[partner]
        soft_number = jnp.where(jnp.isnan(number), jnp.nan, number).reshape(2, 3)
        return (
            (soft_loss(CLASSES, outputs, labels, partner, weight, batch), by_hand),
            (  # the two differ by a constant
                jax.grad(lambda x: soft_loss(NUMBER, x, numbers, partner, weight, batch))(of_numbers),
                jax.grad(lambda x: NUMBER.loss(x, soft_number, batch)[0])(of_numbers),
            ),
            has_label(CLASSES, labels),
        )

    values, gradients, present = losses(jnp.array(rng.normal(size=(2, 3, 3))), jnp.array(rng.normal(size=(2, 3, 1))))
    np.testing.assert_allclose(*values, rtol=1e-5)
    np.testing.assert_allclose(*gradients, rtol=1e-5, atol=1e-7)
    assert present.tolist() == [True, True, True, True, False, True]


def test_neighbours_are_near_and_of_their_source():
    vectors = jnp.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [1.0, 0.05], [1.0, 0.0]])
    groups, present = jnp.array([1, 1, 1, 1, 2, 1]), jnp.array([True] * 5 + [False])
    index, exists = map(np.asarray, jax.jit(lambda: nearest(vectors, groups, present, 2))())
    assert index[0].tolist()[0] == 1
    assert index[2].tolist() == [3, 1]
    assert not exists[4].any()
    assert exists[:4].all()
    batch = Batch(None, None, None, jnp.array([[0, 1, 2, 3, 4, -1]]), jnp.array([0]), {"c": jnp.array([[0, 1, 2, 2, -1, -1]])})
    outputs = {"c": np.random.default_rng(0).normal(size=(1, 6, 3)).astype(np.float32)}
    of_one = mixing.neighbour_loss(NeighbourSmoothing(neighbours=1), [CLASSES], None)
    value = jax.jit(lambda: of_one.loss({}, Encoded(pooled=vectors[None]), outputs, batch, of_one.count(batch), None))()
    logs = outputs["c"][0] - np.log(np.exp(outputs["c"][0]).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(value, -(logs[0, 1] + logs[1, 0] + logs[2, 2] + logs[3, 2]) / 4, rtol=1e-5)


class Layer(nn.Module):
    """x + tanh(W x)."""

    is_layer = True

    @nn.compact
    def __call__(self, x):
        return x + jnp.tanh(nn.Dense(4, use_bias=False)(x))


class Layers(nn.Module):
    """A trunk of two layers that look at each token alone."""

    def setup(self):
        self.word, self.layer_0, self.layer_1 = nn.Embed(9, 4), Layer(), Layer()

    def __call__(self, input_ids, attention_mask=None, *, position_ids=None, segment_ids=None, deterministic=True):
        return EncoderOutput(hidden=self.layer_1(self.layer_0(self.word(input_ids))))


def test_a_pass_through_the_trunk_mixes_in_front_of_its_layer():
    tokens = jnp.array([[3, 4, 5, 6, 7, 0], [8, 1, 2, 3, 4, 0]])
    segments, positions = (
        jnp.array([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 2, 0]]),
        jnp.array([[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 0]]),
    )
    index, labels = jnp.array([[0, 1], [2, 3]]), {"c": jnp.array([[0, 1], [2, 0]])}
    batch = Batch(tokens, segments, positions, index, jnp.array([0, 0]), labels)
    trunk, key = Layers(), jax.random.key(5)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: {"trunk": trunk.init(key, tokens)["params"], "heads": {"c": CLASSES.init(key, 4)}})
    trained = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes)
    frozen = jax.tree.map(lambda leaf: None, trained)
    mix = Mix(name="tmix", at="hidden", layer=1)
    inputs = StepInputs(batch, references={mixing.KEY: jax.random.key_data(key)})
    encode = encode_tokens(trunk, ("pooled",))
    passed = mixing.within_trunk(mix, [CLASSES], encode, trains_trunk=True, accumulate=1)
    pooled = mixing.pooled_loss(Mix(), [CLASSES], None)

    def in_the_step(trained):
        step = passed(trained, frozen, inputs, (key, key))
        assert (step.losses, step.counts) == ({}, {})
        encoded = encode(trained["trunk"], batch, None, None)
        of_texts = pooled.loss(trained["heads"], encoded, {}, batch, pooled.count(batch), inputs.references)
        return *step.pull({"tmix": jnp.float32(2.0)}, None, None), of_texts

    def by_hand(trained):
        partner, weight = mixing._draw(mix, key, batch)
        bound = trunk.bind({"params": trained["trunk"]})
        hidden = mixed_tokens(bound.layer_0(bound.word(tokens)), segments, positions, partner, weight)
        encoded = Encoded(pooled=segment_mean(bound.layer_1(hidden), segments, 2))
        outputs = CLASSES.apply(trained["heads"]["c"], encoded, batch, None)
        return soft_loss(CLASSES, outputs, labels["c"].reshape(-1), partner, weight, batch) / 4

    def of_texts_by_hand(trained):
        partner, weight = mixing._draw(Mix(), key, batch)
        vectors = encode(trained["trunk"], batch, None, None).pooled
        between = Encoded(pooled=mixed(vectors.reshape(4, 4), partner, weight).reshape(2, 2, 4))
        outputs = CLASSES.apply(trained["heads"]["c"], between, batch, None)
        return soft_loss(CLASSES, outputs, labels["c"].reshape(-1), partner, weight, batch) / 4

    @jax.jit
    def both(trained):
        return in_the_step(trained), (jax.value_and_grad(by_hand)(trained), of_texts_by_hand(trained))

    (gradient, losses, of_texts), ((value, expected), texts) = both(trained)
    np.testing.assert_allclose(of_texts, texts, rtol=1e-5)
    np.testing.assert_allclose(losses["tmix"], value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 2 * b, rtol=1e-4, atol=1e-6), gradient, expected)
    halves = mixing.within_trunk(mix, [CLASSES], encode, trains_trunk=True, accumulate=2)
    shapes = jax.eval_shape(lambda: halves(trained, frozen, inputs, (key, key)).pull({"tmix": jnp.float32(1.0)}, None, None))
    assert shapes[1]["tmix"].shape == ()


class Repeated(nn.Module):
    """A trunk whose one layer is called at three depths, as ALBERT's."""

    def setup(self):
        self.layer_0 = Layer()

    def __call__(self, hidden):
        for _ in range(3):
            hidden = self.layer_0(hidden)
        return hidden


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("remat", ["none", "layers"])
def test_a_layer_of_several_depths_is_mixed_at_one(depth, remat):
    """Among the rows' copies, and behind a prompt of two tokens, too."""
    segments, positions = jnp.array([[1, 1, 2, 0], [1, 2, 2, 2]]), jnp.array([[0, 1, 0, 0], [0, 0, 1, 2]])
    batch = Batch(segments, segments, positions, None, None, {})
    partner, weight = jnp.array([3, 2, 1, 0]), jnp.float32(0.3)
    hidden = jax.random.normal(jax.random.key(0), (2, 3, 6, 4))  # two rows, three copies of each
    trunk = Repeated()
    params = trunk.init(jax.random.key(1), hidden)
    with nn.intercept_methods(mixing._mixing(depth, batch, partner, weight)), rematerialised(remat):
        found = trunk.apply(params, hidden.reshape(6, 6, 4)).reshape(2, 3, 6, 4)
    layer = Layer()
    for copy in range(3):
        expected = hidden[:, copy]
        for number in range(3):
            if number == depth:
                own = mixed_tokens(expected[:, 2:], segments, positions, partner, weight)
                expected = jnp.concatenate([expected[:, :2], own], axis=1)
            expected = layer.apply({"params": params["params"]["layer_0"]}, expected)
        np.testing.assert_allclose(found[:, copy], expected, rtol=1e-5, atol=1e-6)


def test_tasks_with_vectors_of_their_own_mix_these():
    """Two tasks of one source, each with a copy of the rows."""
    other = dataclasses.replace(CLASSES, name="d")
    tasks, key = [CLASSES, other], jax.random.key(2)
    index, labels = jnp.array([[0, 1], [2, 3]]), jnp.array([[0, 1], [2, 0]])
    batch = Batch(None, None, None, index, jnp.array([0, 0]), {"c": labels, "d": labels})
    pooled = jax.random.normal(key, (2, 2, 2, 4))
    heads = {task.name: task.init(jax.random.key(n), 4) for n, task in enumerate(tasks)}
    references = {mixing.KEY: jax.random.key_data(key)}
    for make, part in ((mixing.pooled_loss, Mix()), (mixing.neighbour_loss, NeighbourSmoothing())):
        found = {}
        for chosen in ([CLASSES], [other], tasks):
            of_loss = make(part, chosen, None)
            both = Encoded(pooled=pooled, copies=Copies((("c", 0), ("d", 1))))
            outputs = {task.name: task.apply(heads[task.name], both.read_by(task.name), batch, None) for task in chosen}
            count = of_loss.count(batch)
            found[len(chosen), chosen[0].name] = of_loss.loss(heads, both, outputs, batch, count, references)
            if len(chosen) == 1:
                alone = Encoded(pooled=pooled[:, int(chosen[0] is other)])
                expected = of_loss.loss(heads, alone, outputs, batch, count, references)
                np.testing.assert_allclose(found[1, chosen[0].name], expected, rtol=1e-5)
        np.testing.assert_allclose(found[2, "c"], found[1, "c"] + found[1, "d"], rtol=1e-5)


@pytest.mark.long
def test_a_step_has_the_losses_beside_those_of_the_tasks(tmp_path):
    """Without compiling it: the names of losses and weights, under a rule that reads losses."""
    tiny.write_bert(tmp_path / "bert")
    tiny.write_data(tmp_path / "data", 60)
    mixes = (Mix(), Mix(name="tmix", at="hidden", layer=1), NeighbourSmoothing())
    prepared = prepare(tiny.experiment(tmp_path / "bert", tmp_path / "data", devices=1, only=("coarse",), regularisers=mixes))
    assert not any(plan.cached_features for plan in prepared.plans)  # token vectors are mixed within the trunk
    plan, state = prepared.plans[0], initial_state(prepared)
    batches = stream(prepared.corpus, prepared.experiment.batch, 0, mixture_phases(prepared.experiment))
    batch = next(batches)
    batches.close()
    trained, frozen = trees.split(state.params, plan.mask)
    step = jax.eval_shape(gradient_fn(prepared, plan), trained, frozen, StepInputs(jax.tree.map(jnp.asarray, batch)), state)
    assert set(step.losses) == set(step.weights) == {"coarse", "mix", "tmix", "neighbours"}
    assert set(step.counts) == {"coarse"}
    assert jax.tree.structure(step.gradient) == jax.tree.structure(trained)


def test_what_cannot_be_mixed_is_one_line():
    for wrong, words in (
        (Mix(at="pool"), r"unknown at of mix: 'pool' \(did you mean 'pooled'"),
        (Mix(alpha=0.0), "alpha of mix is 0.0; it must be above 0"),
        (Mix(at="hidden"), "layer of mix is 0; with at hidden it is 1 or more, else 0"),
        (NeighbourSmoothing(neighbours=0), "neighbours of neighbours is 0; it must be at least 1"),
    ):
        with pytest.raises(UserError, match=words):
            wrong.check()
    tagging = Tagging(name="t", source="a")
    with pytest.raises(UserError, match="mix mixes labels of texts, and task 't', a Tagging, has none"):
        mixing.tasks_of(Mix(tasks=("t",)), [tagging, CLASSES])
    with pytest.raises(UserError, match="mix: no task has a label for each text"):
        mixing.tasks_of(Mix(), [tagging])
    assert mixing.tasks_of(Mix(), [tagging, CLASSES]) == [CLASSES]
    with pytest.raises(UserError, match="mix mixes in front of layer 3, but the trunk has 2 layers; choose a smaller layer"):
        mixing.check_layer(Mix(at="hidden", layer=2), SimpleNamespace(module=Layers()))
    mixing.check_layer(Mix(at="hidden", layer=1), SimpleNamespace(module=Layers()))
