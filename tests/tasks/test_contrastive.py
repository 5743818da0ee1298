"""Losses of sentence vectors and metrics of orders against plain loops; units of texts in packed rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mtl_jax import Contrastive
from mtl_jax.data import units
from mtl_jax.data.batch_shape import Batching
from mtl_jax.data.batches import Batch, fill
from mtl_jax.data.examples import Examples
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.labels import Window
from mtl_jax.data.ragged import Ragged
from mtl_jax.data.source_arrays import SourceArrays
from mtl_jax.models.trunk_output import Encoded
from mtl_jax.tasks import cosine_losses, ranks
from mtl_jax.tasks.contrastive import unit_length
from mtl_jax.training.batch_parts import recomputed

RNG = np.random.default_rng(0)


def cosines(vectors, others):
    return unit_length(vectors) @ unit_length(others).T


def test_in_batch_leaves_equal_texts_out():
    """Against a loop over groups; text 1's negative is text 0's partner, and text 2 repeats text 0."""
    vectors = RNG.normal(size=(4, 3, 5)).astype(np.float32)
    keys = np.arange(12).reshape(4, 3)
    keys[1, 2], keys[2, 0] = keys[0, 1], keys[0, 0]
    known = np.ones((4, 3), bool)
    known[3] = False
    known[2, 2] = False
    in_batch = jax.jit(lambda vectors: cosine_losses.in_batch(vectors, known, jnp.stack([keys, keys], axis=-1), 7.0))
    total, count = in_batch(vectors)
    expected = 0.0
    for g in range(3):
        logits = {(g, 1): 7 * cosines(vectors[g, :1], vectors[g, 1:2])[0, 0]}
        for h in range(4):
            for n in (1, 2):
                equal = keys[h, n] in (keys[g, 0], keys[g, 1]) or (n == 1 and keys[h, 0] == keys[g, 0])
                if known[h, n] and not equal:
                    logits[h, n] = 7 * cosines(vectors[g, :1], vectors[h, n : n + 1])[0, 0]
        expected += np.log(sum(map(np.exp, logits.values()))) - logits[g, 1]
    np.testing.assert_allclose([total, count], [expected, 3], rtol=1e-5)


def test_losses_of_scores_and_classes():
    cosine, score = RNG.uniform(-1, 1, 6).astype(np.float32), np.array([0, 1, 2, 2, 5, np.nan], np.float32)
    vectors, keys = RNG.normal(size=(5, 4)).astype(np.float32), np.array([[n, 0] for n in (1, 2, 3, 4, 4)])
    classes, all_known = np.array([0, 0, 1, 1, 1]), np.ones(5, bool)
    of_classes = (cosine_losses.ordered_classes, cosine_losses.same_class)

    @jax.jit
    def losses(vectors):
        arguments = vectors, classes, all_known, keys
        pairs = [function(*arguments, 3.0) for function in of_classes]
        pairs += [cosine_losses.squared_classes(*arguments), cosine_losses.ordered(cosine, score, ~np.isnan(score), 20.0)]
        return jnp.array(pairs)

    (apart_loss, same_loss, squared_loss, ordered_loss), zeros = losses(vectors), jax.jacrev(losses)(jnp.zeros((5, 4)))
    assert np.isfinite(zeros).all()  # as in empty places
    pairs = [(a, b) for a in range(5) for b in range(5) if score[a] > score[b]]
    expected = np.log(1 + sum(np.exp(20 * (cosine[b] - cosine[a])) for a, b in pairs))
    np.testing.assert_allclose(ordered_loss, [5 * expected, 5], rtol=1e-5)
    cos = cosines(vectors, vectors)
    different_texts = [(i, j) for i in range(5) for j in range(5) if keys[i, 0] != keys[j, 0]]
    same, apart = ([cos[i, j] for i, j in different_texts if (classes[i] == classes[j]) == kind] for kind in (True, False))
    expected = np.log(1 + sum(np.exp(3 * (d - s)) for d in apart for s in same))
    np.testing.assert_allclose(apart_loss, [5 * expected, 5], rtol=1e-5)
    expected = (np.mean([(1 - s) ** 2 for s in same]) + np.mean(np.square(apart))) / 2
    np.testing.assert_allclose(squared_loss, [5 * expected, 5], rtol=1e-5)
    expected = 0.0
    for i in range(5):
        others = [j for a, j in different_texts if a == i]
        positives = [j for j in others if classes[j] == classes[i]]
        log_sum = np.log(sum(np.exp(3 * cos[i, j]) for j in others))
        expected += np.mean([log_sum - 3 * cos[i, j] for j in positives])
    np.testing.assert_allclose(same_loss, [expected, 5], rtol=1e-5)


def test_ranks():
    """Against numbers worked out by hand."""
    assert ranks.of_list(np.array([3.0, 2, 1]), np.array([0, 2, 1])) == pytest.approx(
        {"mrr": 1 / 2, "ndcg": (3 / np.log2(3) + 1 / 2) / (3 + 1 / np.log2(3)), "accuracy": 0.0}
    )
    assert ranks.of_list(np.zeros(3), np.array([1, 0, 0]))["mrr"] == 1 / 3  # a constant gains nothing
    assert ranks.of_list(np.arange(3.0), np.ones(3)) is None
    queries, candidates = np.eye(2, dtype=np.float32), np.array([[0.6, 0.8], [0.8, 0.6], [0, 1]], np.float32)
    relevant = np.array([[True, False, False], [False, False, True]])
    scores = ranks.of_search(queries, candidates, lambda part: relevant[part], lambda part: np.zeros((2, 3), bool))
    assert scores == pytest.approx({"mrr": 3 / 4, "ndcg": (1 / np.log2(3) + 1) / 2, "accuracy": 1 / 2})


def test_a_unit_is_in_consecutive_places_of_a_row():
    lengths = [3, 2, 4, 1, 2, 2]
    tokens = Ragged.of([np.full(n, i + 1) for i, n in enumerate(lengths)], np.int32)
    together = units.units_of(np.repeat(np.arange(3), 2), (), [Contrastive(name="a", source="s")])
    source = SourceArrays("s", 10, tokens, None, {}, (), together)
    batching = Batching(rows=2, row_length=10, examples_per_row=5)
    assert (len(source), source.slots(batching)) == (3, 2)
    np.testing.assert_array_equal(source.packing_lengths(batching), [5, 5, 4])
    batch = fill([source], [(0, np.array([4, 0])), (0, np.array([2]))], (), batching, 2, False, lambda *_: None)
    np.testing.assert_array_equal(batch.index, [[12, 13, 10, 11, -1], [14, 15, -1, -1, -1]])
    np.testing.assert_array_equal(batch.tokens[1], [5, 5, 6, 6, 0, 0, 0, 0, 0, 0])


def test_labels_of_texts():
    """Equal texts have equal keys, and a negative that a row lacks is not there."""
    task = Contrastive(name="a", source="s", negatives=("no",))
    label = task.parse(Row({"text": "x", "pair": "y", "no": None}, "there"))
    first, second, third = (
        task.window_label(label, Window(n, np.array(ids), None, None, None)) for n, ids in enumerate([[5, 7], [5, 8], [5, 7]])
    )
    assert (first[2:] == third[2:]).all()
    assert (first[2:] != second[2:]).any()
    assert [label[1] for label in (first, second, third)] == [1, 1, 0]


def test_recomputed_parts_give_the_same_gradient():
    """The whole batch's negatives, with a part of it in memory; 3 parts do not divide its 8 rows."""
    task, table = Contrastive(name="a", source="s", size=4), RNG.normal(size=(9, 4)).astype(np.float32)
    tokens = RNG.integers(9, size=(8, 4)).astype(np.int32)
    labels = np.stack([np.ones((8, 4)), np.ones((8, 4)), np.arange(32).reshape(8, 4), np.zeros((8, 4))], axis=-1)
    zeros = np.zeros((8, 4), np.int32)
    batch = Batch(tokens, zeros, zeros, zeros, np.zeros(8, np.int32), {"a": labels.astype(np.float32)})

    def encode(table, batch, key, features):
        return Encoded(pooled=jnp.tanh(table[batch.tokens]))

    def gradient(encode):
        def loss(table):
            return task.loss(encode(table, batch, None, None).pooled, batch.labels["a"])[0]

        return jax.jit(jax.value_and_grad(loss))(table)

    for a, b in zip(gradient(encode), gradient(recomputed(encode, 3)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_metrics_of_scores():
    task = Contrastive(name="sim", source="s", column="score", objective="cosent")
    vectors, scores = RNG.normal(size=(10, 4)).astype(np.float32), np.arange(5.0)
    labels = np.stack([np.repeat(scores, 2), np.ones(10), np.arange(10), np.zeros(10)], axis=1).astype(np.float32)
    examples = Examples("s", 0, [np.zeros(1)] * 10, {"sim": labels}, rows=np.repeat(np.arange(5), 2))
    measured = task.metrics(vectors, examples)
    expected = stats.spearmanr([cosines(vectors[i : i + 1], vectors[i + 1 : i + 2])[0, 0] for i in range(0, 10, 2)], scores)
    assert measured["spearman"] == pytest.approx(expected.statistic)
