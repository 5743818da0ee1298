import collections

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_jax.data.batches import Batching, eval_batches, rows_per_source, train_batches
from mtl_jax.data.examples import Corpus, Examples
from mtl_jax.errors import UserError
from mtl_jax.tasks import Classification, Regression

TASKS = (
    Classification(name="a", source="first", labels=("x", "y")),
    Regression(name="b", source="second"),
    Classification(name="c", source="second", labels=("x", "y")),
)


def corpus(sizes=(40, 17), seed=0):
    rng = np.random.default_rng(seed)
    train, next_id = {}, 0
    for source, size in zip(("first", "second"), sizes, strict=True):
        tokens = [rng.integers(1, 100, rng.integers(1, 9)).astype(np.int32) for _ in range(size)]
        # Labels follow from the id, so that a test can tell whether they stay with their example.
        ids = next_id + np.arange(size)
        labels = {t.name: (ids % 2 if t.labels else ids / 7).astype(t.dtype) for t in TASKS if t.source == source}
        train[source] = Examples(source, next_id, tokens, labels)
        next_id += size
    return Corpus({"train": train}, TASKS, [])


BATCHING = Batching(rows=6, row_length=16, examples_per_row=4)


def by_id(data):
    return {part.first_id + i: tokens for part in data.splits["train"].values() for i, tokens in enumerate(part.tokens)}


def test_a_row_holds_whole_examples_with_their_own_labels():
    data = corpus()
    tokens_of = by_id(data)
    stream = train_batches(data, BATCHING, seed=0)
    for _ in range(20):
        batch = next(stream)
        assert batch.tokens.shape == batch.segments.shape == batch.positions.shape == (6, 16)
        assert batch.index.shape == batch.labels["a"].shape == (6, 4)
        for row in range(6):
            for slot, example in enumerate(batch.index[row]):
                inside = batch.segments[row] == slot + 1
                if example < 0:
                    assert not inside.any()
                    continue
                np.testing.assert_array_equal(batch.tokens[row][inside], tokens_of[example])
                np.testing.assert_array_equal(batch.positions[row][inside], np.arange(inside.sum()))
                first = row < 3  # rows stand in blocks by source
                assert (example < 40) == first
                assert batch.labels["a"][row, slot] == (example % 2 if first else -1)
                assert batch.labels["c"][row, slot] == (-1 if first else example % 2)
                expected = np.nan if first else np.float32(example / 7)
                np.testing.assert_array_equal(batch.labels["b"][row, slot], expected)
        empty = batch.index < 0
        assert (batch.labels["a"][empty] == -1).all()
        assert np.isnan(batch.labels["b"][empty]).all()
    stream.close()


def test_every_example_is_seen_equally_often():
    data = corpus()
    stream = train_batches(data, BATCHING, seed=3)
    seen = collections.Counter()
    for _ in range(120):
        seen.update(i for i in next(stream).index.ravel().tolist() if i >= 0)
    stream.close()
    for ids in (range(40), range(40, 57)):
        counts = [seen[i] for i in ids]
        # Passes over a source do not mix by more than what is open in the packer.
        assert min(counts) > 5
        assert max(counts) - min(counts) <= 3


def test_same_seed_same_batches_and_another_seed_others():
    first, again, other = (train_batches(corpus(), BATCHING, seed) for seed in (0, 0, 1))
    different = False
    for _ in range(5):
        a, b, c = next(first), next(again), next(other)
        np.testing.assert_array_equal(a.index, b.index)
        different = different or not np.array_equal(a.index, c.index)
    assert different
    for stream in (first, again, other):
        stream.close()


@pytest.mark.parametrize("at", [0, 1, 7, 33])
def test_a_restored_stream_goes_on_with_the_same_batches(at):
    stream = train_batches(corpus(), BATCHING, seed=0)
    for _ in range(at):
        next(stream)
    state = stream.get_state()
    expected = [next(stream) for _ in range(10)]
    restored = train_batches(corpus(), BATCHING, seed=0)
    restored.set_state(state)
    for batch in expected:
        found = next(restored)
        np.testing.assert_array_equal(found.tokens, batch.tokens)
        np.testing.assert_array_equal(found.index, batch.index)
    stream.close()
    restored.close()


@pytest.mark.parametrize("sizes", [(40, 17), (1, 1), (2, 50)])
def test_evaluation_sees_every_example_once(sizes):
    data = corpus(sizes)
    batches = list(eval_batches(list(data.splits["train"].values()), BATCHING, TASKS))
    assert all(batch.tokens.shape == (6, 16) for batch in batches)
    seen = np.concatenate([batch.index.ravel() for batch in batches])
    assert sorted(seen[seen >= 0]) == list(range(sum(sizes)))


@given(st.integers(2, 64), st.tuples(st.integers(1, 50), st.integers(1, 50)), st.sampled_from(["uniform", "proportional"]))
def test_rows_are_shared_out_whole(rows, sizes, mixture):
    train = corpus(sizes).splits["train"]
    shares = rows_per_source(Batching(rows=rows, mixture=mixture), train)
    assert sum(shares.values()) == rows
    assert min(shares.values()) >= 1
    if mixture == "uniform":
        assert max(shares.values()) - min(shares.values()) <= 1


def test_proportional_follows_the_tokens():
    train = corpus().splits["train"]
    sizes = {name: sum(len(tokens) for tokens in part.tokens) for name, part in train.items()}
    shares = rows_per_source(Batching(rows=100, mixture="proportional"), train)
    assert shares["first"] == pytest.approx(100 * sizes["first"] / sum(sizes.values()), abs=1)


def test_fewer_rows_than_sources():
    with pytest.raises(UserError, match=r"batch\.rows is 1, but each of the 2 sources needs at least one"):
        rows_per_source(Batching(rows=1), corpus().splits["train"])
