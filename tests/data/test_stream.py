import collections
import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from two_sources import BATCHING, corpus

from mtl_jax.core.errors import UserError
from mtl_jax.data.batch_plan import rows_per_host
from mtl_jax.data.stream import MixturePhase, schedule, single_phase, stream


def take(count, data, batching=BATCHING, *, seed=0, steps=1000, host=0, hosts=1, state=None):
    batches = stream(data, batching, seed, single_phase(batching, steps), host, hosts)
    if state is not None:
        batches.set_state(state)
    found = [next(batches) for _ in range(count)]
    after = json.loads(json.dumps(batches.get_state()))
    batches.close()
    return found, after


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        for field in ("tokens", "segments", "positions", "index", "source"):
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
        for task in a.labels:
            np.testing.assert_array_equal(a.labels[task], b.labels[task])


def seen(batches):
    return collections.Counter(int(i) for batch in batches for i in batch.index.ravel() if i >= 0)


def test_a_row_holds_whole_examples_with_their_own_labels():
    data = corpus()
    tokens_of = {part.first_id + i: ids for part in data.splits["train"].values() for i, ids in enumerate(part.tokens)}
    for batch in take(20, data)[0]:
        assert batch.tokens.shape == batch.segments.shape == batch.positions.shape == (6, 16)
        assert batch.index.shape == batch.labels["a"].shape == (6, 4)
        assert batch.source.tolist() == [0, 0, 0, 1, 1, 1]
        for row in range(6):
            for slot, example in enumerate(batch.index[row]):
                inside = batch.segments[row] == slot + 1
                if example < 0:
                    assert not inside.any()
                    continue
                np.testing.assert_array_equal(batch.tokens[row][inside], tokens_of[example])
                np.testing.assert_array_equal(batch.positions[row][inside], np.arange(inside.sum()))
                first = batch.source[row] == 0
                assert (example < 40) == first
                assert batch.labels["a"][row, slot] == (example % 2 if first else -1)
                assert batch.labels["c"][row, slot] == (-1 if first else example % 2)
                expected = np.nan if first else np.float32(example / 7)
                np.testing.assert_array_equal(batch.labels["b"][row, slot], expected)
        empty = batch.index < 0
        assert (batch.labels["a"][empty] == -1).all()
        assert np.isnan(batch.labels["b"][empty]).all()


def test_rows_follow_the_schedule():
    data = corpus((400, 17))
    batching = dataclasses.replace(BATCHING, mixture="proportional", mixture_end="uniform")
    plan = schedule(data, batching, single_phase(batching, 60))
    for step, batch in enumerate(take(60, data, batching, steps=60)[0]):
        assert np.bincount(batch.source, minlength=2).tolist() == list(plan.counts(step).values())


def test_a_small_source_repeats_and_a_large_one_is_not_begun_again():
    """In one pass over the large source nothing of it is seen twice, while the small one goes round and round."""
    data = corpus((4000, 17))
    batching = dataclasses.replace(BATCHING, rows=8, mixture="fixed", shares={"first": 3, "second": 1})
    counts = seen(take(150, data, batching)[0])
    large, small = [counts[i] for i in range(4000)], [counts[i] for i in range(4000, 4017)]
    assert 2500 < sum(large) < 4000
    assert max(large) == 1
    assert min(small) > 30


def test_every_example_is_seen_equally_often():
    counts = seen(take(240, corpus())[0])
    for ids in (range(40), range(40, 57)):
        each = [counts[i] for i in ids]
        # Equal at every end of a chunk; within one, passes of a small source are mixed.
        assert min(each) > 10
        assert max(each) - min(each) <= 5


def test_every_pass_has_an_order_of_its_own():
    rows = [tuple(row) for batch in take(200, corpus((900, 900)))[0] for row in batch.index.tolist()]
    assert min(seen(take(200, corpus((900, 900)))[0]).values()) >= 1
    assert len(set(rows)) > 0.95 * len(rows)


def test_same_seed_same_batches_and_another_seed_others():
    first, again, other = (take(5, corpus(), seed=seed)[0] for seed in (0, 0, 1))
    assert_equal(first, again)
    assert any(not np.array_equal(a.index, b.index) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("at", [0, 1, 7, 33, 250])
def test_a_restored_stream_goes_on_with_the_same_batches(at):
    batching = dataclasses.replace(BATCHING, mixture="proportional", mixture_end="uniform")
    _, state = take(at, corpus(), batching)
    expected, end = take(10, corpus(), batching, state=state)
    whole, same_end = take(at + 10, corpus(), batching)
    assert_equal(expected, whole[at:])
    assert end == same_end


def test_a_stream_may_be_set_back():
    batches = stream(corpus(), BATCHING, 0, single_phase(BATCHING, 100))
    state = batches.get_state()
    first = [next(batches) for _ in range(7)]
    batches.set_state(state)
    assert_equal([next(batches) for _ in range(7)], first)
    batches.close()


def test_worker_processes_make_the_same_batches_and_positions():
    """From the start and from any step, in an order that does not depend on which of them is faster."""
    batching = dataclasses.replace(BATCHING, mixture="proportional", rows=7)
    expected, end = take(23, corpus(), batching)
    workers = dataclasses.replace(batching, workers=2)
    found, state = take(9, corpus(), workers)
    assert_equal(found, expected[:9])
    rest, same_end = take(14, corpus(), workers, state=state)
    assert_equal(rest, expected[9:])
    assert end == same_end


@pytest.mark.parametrize("hosts", [2, 3])
def test_hosts_read_parts_of_their_own_that_make_the_whole(hosts):
    data = corpus((40, 17))
    batching = dataclasses.replace(BATCHING, mixture="fixed", shares={"first": 0.97, "second": 0.03})
    plan = schedule(data, batching, single_phase(batching, 1000))
    by_host = [take(400, data, batching, host=host, hosts=hosts)[0] for host in range(hosts)]
    for step, batches in enumerate(zip(*by_host, strict=True)):
        assert all(len(batch.source) == 6 // hosts for batch in batches)
        rows = sum(np.bincount(batch.source, minlength=2) for batch in batches)
        assert rows.tolist() == list(plan.counts(step).values())
    counts = [seen(batches) for batches in by_host]
    for ids in (range(40), range(40, 57)):
        for host in range(hosts):
            assert {i for i in ids if counts[host][i]} == set(ids[host::hosts])
    # A source that is seldom seen goes round the hosts.
    rows = [sum(int((batch.source == 1).sum()) for batch in batches) for batches in by_host]
    assert max(rows) - min(rows) <= 1


def test_a_source_with_fewer_examples_than_hosts_is_read_by_all():
    for host in range(3):
        counts = seen(take(30, corpus((40, 2)), host=host, hosts=3)[0])
        assert counts[40] > 0
        assert counts[41] > 0


def test_hosts_go_on_where_each_of_them_was():
    batching = dataclasses.replace(BATCHING, mixture="proportional")
    for host in range(2):
        whole, _ = take(20, corpus(), batching, host=host, hosts=2)
        _, state = take(11, corpus(), batching, host=host, hosts=2)
        assert_equal(take(9, corpus(), batching, host=host, hosts=2, state=state)[0], whole[11:])
    with pytest.raises(UserError, match=r"saved by host 1 of 2 .*; this is host 0 of 1"):
        take(1, corpus(), batching, state=state)


@settings(max_examples=40)
@given(st.integers(1, 5), st.integers(1, 4), st.lists(st.integers(1, 20), min_size=1, max_size=5))
def test_what_is_dealt_is_what_there_is_and_nearly_equal(hosts, each, weights):
    rows, share = hosts * each, np.array(weights) / sum(weights)
    dealt = np.zeros((hosts, len(weights)), int)
    rng = np.random.default_rng(0)
    for _ in range(60):
        counts = rng.multinomial(rows, share)
        step = rows_per_host(counts, dealt, each)
        assert (step.sum(axis=1) == each).all()
        assert (step.sum(axis=0) == counts).all()
        dealt += step
    assert (dealt.max(axis=0) - dealt.min(axis=0)).max() <= 3


def test_without_packing_each_example_has_its_row_and_buckets_cut_it():
    batching = dataclasses.replace(BATCHING, packed=False, buckets=(4, 8))
    batches = take(50, corpus(), batching)[0]
    for batch in batches:
        longest = int((batch.segments > 0).sum(axis=1).max())
        assert batch.index.shape == (6, 1)
        assert (batch.index >= 0).all()
        assert batch.tokens.shape[1] == (4 if longest <= 4 else 8)
    with pytest.raises(UserError, match=r"batch\.buckets are for one host"):
        stream(corpus(), batching, 0, single_phase(batching, 1), 0, 2)


def test_rows_are_shared_by_hosts_evenly_or_not_at_all():
    with pytest.raises(UserError, match=r"batch\.rows is 6; it must be a multiple of the 4 hosts"):
        stream(corpus(), BATCHING, 0, single_phase(BATCHING, 1), 0, 4)


def test_rows_are_well_filled():
    """Lengths 1 to 8 in rows of 16: hardly any place is left empty."""
    batches = take(40, corpus((3000, 2000)), dataclasses.replace(BATCHING, rows=32, examples_per_row=16))[0]
    assert np.mean([batch.segments > 0 for batch in batches]) > 0.98


def test_a_phase_may_have_a_mixture_of_its_own():
    """Both sources by halves, then one alone, then halves again where they stopped: nothing is seen twice too early."""
    half, first = ("uniform", "", {}), ("fixed", "", {"first": 1.0, "second": 0.0})
    phases = (MixturePhase(10, *half), MixturePhase(5, *first), MixturePhase(10, *half))
    batches = stream(corpus((400, 400)), BATCHING, 0, phases)
    found = [next(batches) for _ in range(25)]
    batches.close()
    assert [(batch.source == 1).sum() for batch in found] == [3] * 10 + [0] * 5 + [3] * 10
    assert max(seen(found).values()) == 1
