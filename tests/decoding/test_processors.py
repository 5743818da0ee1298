"""Each change of scores beside the same in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mtl_jax.decoding.batching import buckets
from mtl_jax.decoding.config import GenerationConfig, split_options
from mtl_jax.decoding.logits import BLOCK
from mtl_jax.decoding.processors import likely, process
from mtl_jax.decoding.state import State
from mtl_jax.decoding.steps import _drawn as drawn_candidates
from mtl_jax.decoding.steps import plain_step

V, L = 7, 6
PROCESS = jax.jit(process, static_argnums=3)


def by_hand(scores, tokens, length, config):
    """One beam, in Python lists."""
    scores, there = list(scores), list(tokens[:length])
    for token in set(there):
        factor = config.repetition_penalty
        scores[token] = scores[token] * factor if scores[token] < 0 else scores[token] / factor
    n = config.no_repeat_ngram_size
    for i in range(len(there) - n + 1) if n else ():
        if there[i : i + n - 1] == there[len(there) - n + 1 :]:
            scores[there[i + n - 1]] = -np.inf
    for *before, last in config.bad_words_ids:
        if not before or there[-len(before) :] == before:
            scores[last] = -np.inf
    if length < config.min_length:
        scores[config.eos_token_id[0]] = -np.inf
    return scores


@given(
    st.lists(st.integers(0, V - 1), min_size=L, max_size=L),
    st.integers(1, L),
    st.sampled_from([1.0, 1.5]),
    st.integers(0, 3),
    st.sampled_from([(), ((3,), (1, 2), (0, 1, 4))]),
    st.integers(0, 5),
)
@example([1, 0, 0, 0, 0, 0], 1, 1.0, 0, ((3,), (1, 2), (0, 1, 4)), 0)  # the start token may be the beginning of a word
def test_changes_of_scores(tokens, length, penalty, n, words, least):
    config = GenerationConfig(
        repetition_penalty=penalty, no_repeat_ngram_size=n, bad_words_ids=words, min_length=least, eos_token_id=(2,)
    )
    static, traced = split_options(config)
    scores = np.random.default_rng(length).normal(size=(1, 1, V)).astype(np.float32)
    found = PROCESS(scores, np.array([[tokens]]), np.int32(length), static, traced)
    expected = by_hand(scores[0, 0], tokens, length, config)
    np.testing.assert_allclose(found[0, 0], expected, rtol=1e-6)


@pytest.mark.parametrize(("top_k", "top_p", "temperature"), [(0, 1.0, 2.0), (3, 1.0, 1.0), (0, 0.6, 1.0), (4, 0.5, 0.7)])
def test_what_may_be_drawn(top_k, top_p, temperature):
    scores = np.full(BLOCK, -np.inf, np.float32)  # a vocabulary in whole blocks
    scores[:V] = np.random.default_rng(0).normal(size=V)
    config, traced = split_options(GenerationConfig(top_k=top_k, top_p=top_p, temperature=temperature))
    tokens, kept = likely(scores[None, None], config, traced)
    order = np.argsort(-scores, kind="stable")[: top_k or V]
    probability = np.exp(scores[order] / temperature)
    probability /= probability.sum()
    enough = int(np.searchsorted(np.cumsum(probability), top_p)) + 1  # the fewest that hold top_p together
    expected = scores[order] / temperature
    expected[enough:] = -np.inf
    best_first = np.argsort(-scores[tokens[0, 0]], kind="stable")[: len(order)]  # without top_k they come in their own order
    np.testing.assert_array_equal(tokens[0, 0][best_first], order)
    np.testing.assert_allclose(kept[0, 0][best_first], expected, rtol=1e-6)


ROWS = 10_000
PROBABILITY = np.array([0.5, 0.3, 0.15, 0.05])


def drawing(config, scores):
    """A state of many equal rows, each with a key of its own, and their logits, beside which others are unlikely."""
    tokens_BxKxL, false_BxK = np.zeros((ROWS, len(scores), 3), np.int32), np.zeros((ROWS, len(scores)), bool)
    scores_BxK = np.broadcast_to(np.array(scores, np.float32), false_BxK.shape)
    state = State(
        *(
            np.int32(1),
            tokens_BxKxL,
            scores_BxK,
            false_BxK,
            tokens_BxKxL,
            scores_BxK,
            tokens_BxKxL[..., 0],
            false_BxK,
            false_BxK,
        ),
        active=np.ones(ROWS, bool),
        ancestry=tokens_BxKxL[..., :2],
        cache=(),
        keys=jax.random.key_data(jax.random.split(jax.random.key(0), ROWS)),
    )
    logits_W = np.full(BLOCK, -1e9, np.float32)
    logits_W[:4] = np.log(PROBABILITY)
    return jax.tree.map(jnp.asarray, state), jnp.broadcast_to(logits_W, (ROWS, len(scores), BLOCK)), *split_options(config)


def test_draws_have_the_frequencies_of_their_scores():
    state, *arguments = drawing(GenerationConfig(do_sample=True, top_k=0, eos_token_id=(3,)), [0.0])
    after = plain_step(state, *arguments)
    drawn_B = np.asarray(after.tokens)[:, 0, 1]
    np.testing.assert_allclose(np.bincount(drawn_B, minlength=4) / ROWS, PROBABILITY, atol=0.015)
    np.testing.assert_allclose(after.scores[:, 0], np.log(PROBABILITY)[drawn_B], rtol=1e-5)
    np.testing.assert_array_equal(after.ended[:, 0], drawn_B == 3)


def test_beams_are_drawn_without_replacement_by_their_sums():
    """Two beams, one half as likely as the other: of eight pairs of beam and token four are drawn."""
    state, logits, config, traced = drawing(GenerationConfig(do_sample=True, num_beams=2, top_k=0), [0.0, np.log(0.5)])
    scores_BxC, beam_BxC, token_BxC = (np.asarray(x) for x in drawn_candidates(state, logits, config, traced, 4))
    pair_BxC = beam_BxC * 4 + token_BxC
    assert all(len(set(pairs)) == 4 for pairs in pair_BxC.tolist())
    sums = np.concatenate([PROBABILITY, 0.5 * PROBABILITY])
    np.testing.assert_allclose(scores_BxC, np.log(sums)[pair_BxC], rtol=1e-4)
    np.testing.assert_allclose(np.bincount(pair_BxC[:, 0], minlength=8) / ROWS, sums / sums.sum(), atol=0.015)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=60), st.integers(1, 4))
def test_buckets_have_the_least_padding(lengths, most):
    """Beside all choices of so many lengths."""
    import itertools

    lengths = np.array(lengths)
    found = buckets(lengths, most)
    sizes = sorted({-(-length // 8) * 8 for length in lengths.tolist()})

    def places(chosen):
        return sum(min(size for size in chosen if size >= length) for length in lengths.tolist())

    assert len(found) <= most
    assert found == sorted(found)
    assert found[-1] == sizes[-1]
    if len(sizes) <= 9:
        others = (
            {*chosen, sizes[-1]} for n in range(min(most, len(sizes))) for chosen in itertools.combinations(sizes[:-1], n)
        )
        assert places(found) == min(map(places, others))
