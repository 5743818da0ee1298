import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import packing
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from mtl_jax import Checkpoints, Evaluation, MaskedLM, Phase, Pretrained, Regression, Source, train, weighting
from mtl_jax.core.errors import Interrupted, UserError
from mtl_jax.data.batches import Batch, eval_batches
from mtl_jax.data.stream import single_phase, stream
from mtl_jax.inference.predict import predict
from mtl_jax.models.trunk_output import Encoded
from mtl_jax.training.build_step import gradient_fn
from mtl_jax.training.checkpoint_store import Store
from mtl_jax.training.metrics_log import read_metrics
from mtl_jax.training.phase_state import initial_state
from mtl_jax.training.preemption import Stop
from mtl_jax.training.setup import prepare
from mtl_jax.training.train_state import StepInputs

LM = MaskedLM(name="lm", source="texts", mask=4, vocabulary=50, special=(0, 2, 3, 4, 49))
LENGTHS = st.lists(st.integers(0, 12), min_size=1, max_size=5)


def example(length, seed=0):
    ordinary = [i for i in range(LM.vocabulary) if i not in LM.special]
    return np.array([2, *np.random.default_rng(seed).choice(ordinary, length), 3], np.int32)


@given(st.integers(0, 200), st.floats(0.01, 1), st.integers(0, 5))
def test_a_share_of_the_tokens_is_hidden(length, rate, seed):
    task, tokens = dataclasses.replace(LM, rate=rate), example(length)
    before = tokens.copy()
    changed, labels = task.corrupt(tokens, np.random.default_rng(seed))
    np.testing.assert_array_equal(tokens, before)
    hidden = labels >= 0
    assert hidden.sum() == (max(1, round(rate * length)) if length else 0)
    np.testing.assert_array_equal(labels[hidden], tokens[hidden])
    np.testing.assert_array_equal(changed[~hidden], tokens[~hidden])
    assert not hidden[0]
    assert not hidden[-1]
    replaced = changed[hidden & (changed != LM.mask)]
    assert ((replaced >= 0) & (replaced < LM.vocabulary) & ~np.isin(replaced, LM.special)).all()


def test_eight_in_ten_are_masked_one_is_another_and_one_stays():
    tokens = example(40_000)
    changed, labels = LM.corrupt(tokens, np.random.default_rng(0))
    hidden = labels >= 0
    kept = (changed == tokens)[hidden].mean()
    masked = (changed == LM.mask)[hidden].mean()
    assert masked == pytest.approx(0.8, abs=0.02)
    assert kept == pytest.approx(0.1 + 0.1 / 45, abs=0.02)
    # What stands for others is drawn evenly from every id that is not special.
    others = changed[hidden & (changed != LM.mask) & (changed != tokens)]
    assert set(others) == set(range(LM.vocabulary)) - set(LM.special)


def rows_of(lengths, seed=0):
    """All examples in one row, packed tightly, as a Batch with this task's labels."""
    parts = [LM.corrupt(example(n, seed + i), np.random.default_rng(seed + i)) for i, n in enumerate(lengths)]
    ids, labels = (np.concatenate(p)[None] for p in zip(*parts, strict=True))
    segments = np.concatenate([np.full(n + 2, i + 1) for i, n in enumerate(lengths)])[None]
    positions = np.concatenate([np.arange(n + 2) for n in lengths])[None]
    index = np.arange(len(lengths))[None]
    return jax.tree.map(jnp.asarray, Batch(ids, segments, positions, index, np.zeros(1, np.int32), {"lm": labels}))


@given(LENGTHS, st.floats(0.01, 1))
def test_there_are_enough_places_for_the_hidden_tokens_of_any_row(lengths, rate):
    hidden = sum(max(1, round(rate * n)) if n else 0 for n in lengths)
    row = sum(lengths) + 2 * len(lengths)
    assert hidden <= dataclasses.replace(LM, rate=rate).max_hidden(row, len(lengths)) <= row


def encoded(batch, seed=0, width=6):
    keys = jax.random.split(jax.random.key(seed))
    hidden = jax.random.normal(keys[0], (*batch.tokens.shape, width))
    return Encoded(tokens=hidden, table=jax.random.normal(keys[1], (LM.vocabulary + 3, width)))


def by_hand(params, given, batch):
    """Logits for every token, log softmax, the label's."""
    x = given.tokens @ params["transform"]["kernel"] + params["transform"]["bias"]
    x = jax.nn.gelu(x, approximate=False)
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-12)
    x = x * params["norm"]["scale"] + params["norm"]["bias"]
    logits = x @ given.table[: LM.vocabulary].T + params["bias"]
    labels = batch.labels["lm"]
    loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(labels, 0)[..., None], -1)[..., 0]
    return jnp.where(labels >= 0, loss, 0.0), jnp.where(labels >= 0, logits.argmax(-1) == labels, -1)


@pytest.mark.parametrize("lengths", [[12, 0, 5, 9], [0], [1, 1, 1]])
def test_the_head_is_that_of_bert_at_the_hidden_tokens(lengths):
    batch = rows_of(lengths)
    params = LM.init(jax.random.key(0), 6)
    params["bias"] += jnp.linspace(-1, 1, LM.vocabulary)
    given = encoded(batch)
    outputs = jax.jit(lambda given: LM.apply(params, given, batch, None))(given)
    loss, right = jax.jit(by_hand)(params, given, batch)
    np.testing.assert_allclose(outputs[..., 0], loss, atol=1e-5)
    np.testing.assert_array_equal(outputs[..., 1], right)
    total, count = LM.loss(outputs, batch.labels["lm"], batch)
    np.testing.assert_allclose(total, loss.sum(), rtol=1e-5)
    assert count == (batch.labels["lm"] >= 0).sum()

    fast = jax.grad(lambda given: LM.loss(LM.apply(params, given, batch, None), batch.labels["lm"], batch)[0])
    plain = jax.grad(lambda given: by_hand(params, given, batch)[0].sum())
    gradient, expected = jax.jit(fast)(given), jax.jit(plain)(given)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, expected)


def test_no_logits_for_tokens_that_are_not_hidden():
    """Among all arrays of the program, forwards and backwards, none has R * T * V numbers."""
    batch = rows_of([60, 60, 60])
    params, given = LM.init(jax.random.key(0), 6), encoded(batch)
    program = jax.make_jaxpr(jax.grad(lambda p: LM.loss(LM.apply(p, given, batch, None), batch.labels["lm"], batch)[0]))(params)
    T, P = batch.tokens.shape[1], LM.max_hidden(batch.tokens.shape[1], 3)
    largest = max(variable.aval.size for equation in program.jaxpr.eqns for variable in equation.outvars)
    assert P < T / 4
    assert largest == P * LM.vocabulary


def test_metrics_by_hand():
    outputs = [np.array([[0, -1], [np.log(2), 1], [0, -1]]), np.array([[np.log(8), 0], [0, -1]])]
    assert LM.metrics(outputs, None) == {"accuracy": 0.5, "perplexity": pytest.approx(4.0)}


# Through the whole program.


@pytest.fixture(scope="module")
def masking_bert(tmp_path_factory):
    """The tiny BERT, of one layer, with a mask token, the last of its vocabulary."""
    folder = tmp_path_factory.mktemp("masking") / "bert"
    tensors = tiny.bert_tensors(layers=1)
    words = tensors["embeddings.word_embeddings.weight"]
    tensors["embeddings.word_embeddings.weight"] = np.concatenate([words, words[:1]])
    tiny.write_bert(folder, tensors, layers=1)
    for name, change in {
        "config.json": {"vocab_size": len(tiny.WORDS) + 1},
        "tokenizer_config.json": {"mask_token": "[MASK]"},
    }.items():
        values = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(values | change), encoding="utf-8")
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["vocab"]["[MASK]"] = len(tiny.WORDS)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder


def experiment(bert, data, **changes):
    """First the trunk is adapted to the texts of the ratings, then they are rated."""
    values = {
        "trunk": Pretrained(str(bert), dropout=0.0),
        "sources": (
            Source(name="texts", path=f"{data}/ratings.tsv", format="tsv"),
            Source(name="ratings", path=f"{data}/ratings.tsv", format="tsv"),
        ),
        "tasks": (
            MaskedLM(name="lm", source="texts"),
            Regression(name="rating", source="ratings", column="rating", minimum=-4, maximum=4, scale=2.0),
        ),
        "phases": (
            Phase("adapt", steps=6, weights={"lm": 1.0, "rating": 0.0}),
            Phase("tune", steps=6, weights={"lm": 0.0, "rating": 1.0}),
        ),
    }
    return tiny.experiment(bert, data, **(values | changes))


def texts_only(bert, path, steps=4):
    return tiny.experiment(
        bert,
        path.parent,
        trunk=Pretrained(str(bert), dropout=0.0),
        sources=(Source(name="texts", path=str(path), format="tsv"),),
        tasks=(MaskedLM(name="lm", source="texts"),),
        phases=(Phase("adapt", steps=steps),),
        evaluation=Evaluation(every=steps),
        checkpoints=Checkpoints(every=steps),
    )


@pytest.fixture(scope="module")
def finished(masking_bert, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(experiment(masking_bert, data), folder)
    return folder


def take(batches, count):
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def masks(batches):
    """{example id: its labels, once for each time that it was seen}."""
    seen = {}
    for batch in batches:
        for row, slot in zip(*np.nonzero(batch.index >= 0), strict=True):
            labels = batch.labels["lm"][row][batch.segments[row] == slot + 1]
            seen.setdefault(int(batch.index[row, slot]), []).append(tuple(labels.tolist()))
    return seen


def test_masks_differ_between_passes_and_agree_between_evaluations(masking_bert, data):
    prepared = prepare(experiment(masking_bert, data))
    batching, tasks = prepared.experiment.batch, prepared.corpus.tasks
    texts = prepared.corpus.splits["train"]["texts"]
    ids = range(texts.first_id, texts.first_id + len(texts.tokens))
    seen = masks(take(stream(prepared.corpus, batching, 0, single_phase(batching, 40)), 40))
    long = [seen[i] for i in ids if len(texts.tokens[i - texts.first_id]) > 7]
    assert min(len(found) for found in long) >= 3
    assert np.mean([len(set(found)) > 1 for found in long]) > 0.9
    evaluations = [masks(eval_batches([texts], batching, tasks)) for _ in range(2)]
    assert evaluations[0] == evaluations[1]
    assert set(evaluations[0]) == set(ids)


def test_packed_equals_unpacked(masking_bert, tmp_path_factory):
    """The same tokens are hidden in both, as in every evaluation."""
    folder = tmp_path_factory.mktemp("few")
    tiny.write_data(folder, rows=40)
    packing.assert_packing_changes_nothing(prepare(texts_only(masking_bert, folder / "ratings.tsv")))


@pytest.mark.parametrize("gram_over", ["trunk", "representation"])
def test_the_gradient_of_the_shared_table_reaches_the_trunk_under_the_gram_step(masking_bert, data, gram_over):
    phases = (Phase("both", steps=4),)
    prepared = prepare(experiment(masking_bert, data, phases=phases))
    batching = prepared.experiment.batch
    batch = jax.tree.map(jnp.asarray, take(stream(prepared.corpus, batching, 0, single_phase(batching, 4)), 1)[0])
    plan, state = prepared.plans[0], initial_state(prepared)
    frozen = jax.tree.map(lambda _: None, prepared.params)
    plain = jax.jit(gradient_fn(prepared, plan))(prepared.params, frozen, StepInputs(batch), state)
    rule = weighting.Rule(
        init=lambda names: (), update=lambda s, signals: ({t: jnp.ones(()) for t in signals.losses}, s), needs_gram=True
    )
    prepared = prepared._replace(experiment=dataclasses.replace(prepared.experiment, gram_over=gram_over))
    found = jax.jit(gradient_fn(prepared, plan._replace(rule=rule)))(prepared.params, frozen, StepInputs(batch), state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found.gradient, plain.gradient)

    def loss(params):
        """The plain way: trunk, head, sum over count."""
        hidden = prepared.trunk.module.apply(
            {"params": params["trunk"]},
            batch.tokens,
            batch.segments > 0,
            position_ids=batch.positions,
            segment_ids=batch.segments,
        ).hidden
        given = Encoded(tokens=hidden, table=params["trunk"]["embeddings"]["word"]["embedding"])
        task = prepared.corpus.tasks[0]
        total, count = task.loss(task.apply(params["heads"]["lm"], given, batch, None), batch.labels["lm"], batch)
        return total / count

    gradient = jax.jit(jax.grad(loss))(prepared.params)
    rating = jax.tree.map(jnp.subtract, plain.gradient["trunk"], gradient["trunk"])
    # What is left over is the rating's, which touches only the words that stand in its texts; [PAD] is in none.
    np.testing.assert_allclose(rating["embeddings"]["word"]["embedding"][0], 0.0, atol=1e-5)
    assert np.abs(gradient["trunk"]["embeddings"]["word"]["embedding"][0]).max() > 1e-4


def test_resume_is_bit_exact(masking_bert, data, tmp_path, monkeypatch, finished):
    """Stopped while it adapts: masks and data go on where they were."""
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "requested", lambda self, step: step == 3)
        with pytest.raises(Interrupted):
            train(experiment(masking_bert, data), tmp_path / "run")
    train(experiment(masking_bert, data), tmp_path / "run")
    assert read_metrics(tmp_path / "run") == read_metrics(finished)
    last = []
    for folder in (tmp_path / "run", finished):
        store = Store(folder, Checkpoints(), read_only=True)
        last.append(store.restore_params(store.steps()[-1]))
        store.close()
    jax.tree.map(np.testing.assert_array_equal, *last)


def test_there_is_no_prediction_for_a_text(finished):
    with pytest.raises(UserError, match="has no prediction for a text"):
        predict(finished, "lm", ["the film was good"])
    (answer,) = predict(finished, "rating", ["the film was good"])
    assert set(answer) == {"value"}


def test_the_trunk_learns_the_texts(masking_bert, tmp_path):
    """Texts of friendly words and texts of unfriendly ones: who sees the others guesses one of four words, not of twenty."""
    rng = np.random.default_rng(0)
    lines = {" ".join(rng.choice(words, rng.integers(6, 16))) for words in (tiny.GOOD, tiny.BAD) for _ in range(100)}
    (tmp_path / "texts.tsv").write_text("text\n" + "\n".join(sorted(lines)) + "\n", encoding="utf-8")
    results = train(texts_only(masking_bert, tmp_path / "texts.tsv", steps=50), tmp_path / "run")
    assert results["tasks"]["lm"]["test"]["perplexity"] < 6
    assert results["tasks"]["lm"]["test"]["accuracy"] > 0.15


def test_what_is_refused(bert, masking_bert, data):
    with pytest.raises(UserError, match="masked LM needs a trunk whose tokenizer has a mask token"):
        prepare(experiment(bert, data))
    shared = (MaskedLM(name="lm", source="ratings"), *experiment(masking_bert, data).tasks[1:])
    with pytest.raises(UserError, match="second source"):
        prepare(experiment(masking_bert, data, tasks=shared))
    with pytest.raises(UserError, match="rate is 0"):
        MaskedLM(name="lm", source="texts", rate=0.0).check()
    with pytest.raises(UserError, match="hidden is 8"):
        MaskedLM(name="lm", source="texts", hidden=8).check()
