"""Each change of scores beside the same in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mtl_jax.decoding.best import BLOCK
from mtl_jax.decoding.config import GenerationConfig, divided
from mtl_jax.decoding.generate import buckets
from mtl_jax.decoding.processors import likely, process

V, L = 7, 6


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
    shape, numbers = divided(config)
    scores = np.random.default_rng(length).normal(size=(1, 1, V)).astype(np.float32)
    found = process(jnp.array(scores), jnp.array([[tokens]]), jnp.int32(length), shape, numbers)
    expected = by_hand(scores[0, 0], tokens, length, config)
    np.testing.assert_allclose(found[0, 0], expected, rtol=1e-6)


@pytest.mark.parametrize(("top_k", "top_p", "temperature"), [(0, 1.0, 2.0), (3, 1.0, 1.0), (0, 0.6, 1.0), (4, 0.5, 0.7)])
def test_what_may_be_drawn(top_k, top_p, temperature):
    scores = np.full(BLOCK, -np.inf, np.float32)  # a vocabulary in whole blocks
    scores[:V] = np.random.default_rng(0).normal(size=V)
    config, numbers = divided(GenerationConfig(top_k=top_k, top_p=top_p, temperature=temperature))
    tokens, kept = likely(scores[None, None], config, numbers)
    order = np.argsort(-scores, kind="stable")[: top_k or V]
    probability = np.exp(scores[order] / temperature)
    probability /= probability.sum()
    enough = int(np.searchsorted(np.cumsum(probability), top_p)) + 1  # the fewest that hold top_p together
    expected = scores[order] / temperature
    expected[enough:] = -np.inf
    best_first = np.argsort(-scores[tokens[0, 0]], kind="stable")[: len(order)]  # without top_k they come in their own order
    np.testing.assert_array_equal(tokens[0, 0][best_first], order)
    np.testing.assert_allclose(kept[0, 0][best_first], expected, rtol=1e-6)


def test_draws_have_the_frequencies_of_their_scores():
    probability = np.array([0.5, 0.3, 0.15, 0.05])
    noise = jax.random.gumbel(jax.random.key(0), (20_000, 4))
    found = np.bincount(np.argmax(np.log(probability) + noise, axis=1), minlength=4) / 20_000
    np.testing.assert_allclose(found, probability, atol=0.01)


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
