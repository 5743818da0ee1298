"""Sentence embeddings: losses against plain loops, units of texts in packed rows, one trained run from end to end."""

import dataclasses
import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy import stats

from mtl_jax import Contrastive, Phase, Source, convert, evaluate, predict, train
from mtl_jax.core.errors import UserError
from mtl_jax.data import units
from mtl_jax.data.batches import Batching, SourceArrays, fill
from mtl_jax.data.ragged import Ragged
from mtl_jax.experiment import check
from mtl_jax.inference.predict import open_run
from mtl_jax.tasks import ranks, similarity
from mtl_jax.tasks.contrastive import unit_length
from mtl_jax.training.batch_parts import recomputed
from mtl_jax.training.forward import encode_tokens
from mtl_jax.training.setup import prepare

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
    total, count = similarity.in_batch(vectors, known, jnp.stack([keys, keys], axis=-1), 7.0)
    expected = 0.0
    for g in range(3):
        logits = {(g, 1): 7 * cosines(vectors[g, :1], vectors[g, 1:2])[0, 0]}
        for h in range(4):
            for n in (1, 2):
                equal = keys[h, n] in (keys[g, 0], keys[g, 1]) or (n == 1 and keys[h, 0] == keys[g, 0])
                if known[h, n] and not equal:
                    logits[h, n] = 7 * cosines(vectors[g, :1], vectors[h, n : n + 1])[0, 0]
        expected += np.log(sum(map(np.exp, logits.values()))) - logits[g, 1]
    assert float(count) == 3
    np.testing.assert_allclose(total, expected, rtol=1e-5)


def test_losses_of_scores_and_classes():
    cosine, score = RNG.uniform(-1, 1, 6).astype(np.float32), np.array([0, 1, 2, 2, 5, np.nan], np.float32)
    known = ~np.isnan(score)
    total, count = similarity.ordered(cosine, score, known, 20.0)
    pairs = [(a, b) for a in range(5) for b in range(5) if score[a] > score[b]]
    expected = np.log(1 + sum(np.exp(20 * (cosine[b] - cosine[a])) for a, b in pairs))
    np.testing.assert_allclose(total / count, expected, rtol=1e-5)
    vectors, keys = RNG.normal(size=(5, 4)).astype(np.float32), np.array([[n, 0] for n in (1, 2, 3, 4, 4)])
    classes, all_known = np.array([0, 0, 1, 1, 1]), np.ones(5, bool)
    cos = cosines(vectors, vectors)
    different_texts = [(i, j) for i in range(5) for j in range(5) if keys[i, 0] != keys[j, 0]]
    same, apart = ([cos[i, j] for i, j in different_texts if (classes[i] == classes[j]) == kind] for kind in (True, False))
    total, count = similarity.ordered_classes(vectors, classes, all_known, keys, 3.0)
    np.testing.assert_allclose(total / count, np.log(1 + sum(np.exp(3 * (d - s)) for d in apart for s in same)), rtol=1e-5)
    total, count = similarity.squared_classes(vectors, classes, all_known, keys)
    np.testing.assert_allclose(
        total / count, (np.mean([(1 - s) ** 2 for s in same]) + np.mean(np.square(apart))) / 2, rtol=1e-5
    )
    total, count = similarity.same_class(vectors, classes, all_known, keys, 3.0)
    expected = 0.0
    for i in range(5):
        others = [j for a, j in different_texts if a == i]
        positives = [j for j in others if classes[j] == classes[i]]
        log_sum = np.log(sum(np.exp(3 * cos[i, j]) for j in others))
        expected += np.mean([log_sum - 3 * cos[i, j] for j in positives])
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    for function in (similarity.same_class, similarity.ordered_classes):  # zeros, as in empty places, give no NaN
        slope = jax.grad(lambda x, f=function: f(x, classes, all_known, keys, 3.0)[0])(jnp.zeros((5, 4)))
        assert np.isfinite(slope).all()


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


def rows_of(count, seed=0):
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        topic = rng.choice([tiny.GOOD, tiny.BAD])
        first, second = (" ".join(rng.choice(topic + tiny.OTHER[:4]) for _ in range(rng.randint(2, 6))) for _ in range(2))
        rows.append({"text": f"{first} {tiny.OTHER[number % 9]}", "pair": second, "score": str(number % 5), "no": "who is"})
    rows[3]["no"] = ""
    return rows


SIM = Contrastive(name="sim", source="pairs", negatives=("no",), widths=(4,))


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    """A run of one task on pairs with a given negative."""
    folder = tmp_path_factory.mktemp("embedder")
    tiny.write_bert(folder / "bert")
    experiment = tiny.experiment(
        folder / "bert",
        "",
        sources=(Source(name="pairs", rows=rows_of(40), pair="pair"),),
        tasks=(SIM,),
        phases=(Phase("all", steps=2),),
    )
    results = train(experiment, folder / "run")
    return experiment, folder / "run", results


def test_a_run(embedder):
    _, folder, results = embedder
    assert {"mrr", "ndcg", "accuracy", "mrr_4", "loss"} <= results["tasks"]["sim"]["test"].keys()
    rows = rows_of(6, seed=1)
    pair, single = predict(folder, "sim", rows[:4]), predict(folder, "sim", [rows[0]["text"], rows[0]["pair"]])
    vectors = np.array([answer["vector"] for answer in single])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(vectors[0] @ vectors[1], pair[0]["cosine"], atol=1e-5)
    assert "negatives" in pair[0]
    assert "negatives" not in pair[3]
    assert "truncated" not in predict(folder, "sim", [{"text": "good", "pair": "fine"}])[0]
    assert evaluate(folder, "sim", rows)["rows"] == 6
    with pytest.raises(UserError, match="has no column 'no' for task 'sim'"):
        evaluate(folder, "sim", [{"text": "good", "pair": "fine"}])


def test_the_export_gives_our_vectors(embedder, tmp_path):
    """transformers opens the directory, and the mean of its vectors, of length 1, is ours."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    _, folder, _ = embedder
    hint = convert(folder, tmp_path / "out", task="sim")
    assert "sentence-transformers" in hint
    modules = json.loads((tmp_path / "out" / "modules.json").read_text())
    assert [module["type"].rpartition(".")[2] for module in modules] == ["Transformer", "Pooling", "Normalize"]
    assert json.loads((tmp_path / "out" / "1_Pooling" / "config.json").read_text())["pooling_mode_mean_tokens"]
    assert json.loads((tmp_path / "out" / "sentence_bert_config.json").read_text())["max_seq_length"] == 8
    model, tokenizer = (
        opener.from_pretrained(tmp_path / "out") for opener in (transformers.AutoModel, transformers.AutoTokenizer)
    )
    with torch.no_grad():
        hidden = model(**tokenizer("the film is great", return_tensors="pt")).last_hidden_state[0].numpy()
    expected = predict(folder, "sim", ["the film is great"])[0]["vector"]
    np.testing.assert_allclose(unit_length(hidden.mean(axis=0, keepdims=True))[0], expected, atol=2e-6)


def test_recomputed_parts_give_the_same_gradient(embedder):
    """The whole batch's negatives, with a part of it in memory; 3 parts do not divide its 8 rows."""
    experiment, folder, _ = embedder
    run = open_run(folder)
    prepared = prepare(experiment)
    from mtl_jax.data.batches import eval_batches

    batch = next(iter(eval_batches([prepared.corpus.splits["train"]["pairs"]], experiment.batch, run.tasks)))
    encode = encode_tokens(run.trunk.module)

    def gradient(encode):
        def loss(trunk):
            total, count = run.tasks[0].loss(encode(trunk, batch, None, None).pooled, batch.labels["sim"], batch)
            return total / count

        return jax.jit(jax.value_and_grad(loss))(run.params["trunk"])

    (value, expected), (other, parts) = gradient(encode), gradient(recomputed(encode, 3))
    np.testing.assert_allclose(value, other, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), expected, parts)


def test_metrics_of_scores():
    from mtl_jax.data.examples import Examples

    task = Contrastive(name="sim", source="s", column="score", objective="cosent")
    vectors, scores = RNG.normal(size=(10, 4)).astype(np.float32), np.arange(5.0)
    labels = np.stack([np.repeat(scores, 2), np.ones(10), np.arange(10), np.zeros(10)], axis=1).astype(np.float32)
    examples = Examples("s", 0, [np.zeros(1)] * 10, {"sim": labels}, rows=np.repeat(np.arange(5), 2))
    measured = task.metrics(vectors, examples)
    expected = stats.spearmanr([cosines(vectors[i : i + 1], vectors[i + 1 : i + 2])[0, 0] for i in range(0, 10, 2)], scores)
    assert measured["spearman"] == pytest.approx(expected.statistic)


def test_bad_input(embedder):
    experiment, _, _ = embedder

    def changed(batch=None, **fields):
        task = dataclasses.replace(SIM, metric="", **fields)
        return dataclasses.replace(experiment, tasks=(task,), batch=dataclasses.replace(experiment.batch, **(batch or {})))

    for change, message in (
        (changed(compare="words"), "unknown compare of task 'sim'"),
        (changed(compare="labels", negatives=()), "column must name the column with the label"),
        (changed(column="score", negatives=()), "which in_batch does not read"),
        (changed(objective="cosent"), "objective cosent needs the score"),
        (changed(hidden=3), "hidden and dropout are those of a projection"),
        (changed(batch={"accumulate": 2}), "set batch.recompute"),
        (changed(batch={"packed": False}), "needs packed rows"),
        (changed(batch={"examples_per_row": 2}), "raise it to 3"),
        (changed(batch={"row_length": 8}), "make it longer"),
        (changed(scale=0.0), "scale is 0"),
    ):
        with pytest.raises(UserError, match=message):
            check(change)
    second = dataclasses.replace(SIM, name="other")
    with pytest.raises(UserError, match="both keep texts together; declare the same file"):
        check(dataclasses.replace(experiment, tasks=(SIM, second)))
    with pytest.raises(UserError, match="names no second text"):
        check(dataclasses.replace(experiment, sources=(Source(name="pairs", rows=[]),)))
    with pytest.raises(UserError, match="widths has 16, but its vectors have 16"):
        prepare(changed(widths=(16,)))
