"""Several devices give what one gives, and where repetition is not limited they talk of nothing but whether they are done."""

import collections
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from mtl_jax import pretrained
from mtl_jax.decoding import generate_all, prepare, resolve, search
from mtl_jax.decoding.batching import share_devices
from mtl_jax.decoding.config import split_options

MARIAN = str(Path(__file__).parent.parent / "pretrained" / "fixtures" / "marian")
SEARCHES = {
    "greedy": {"num_beams": 1, "no_repeat_ngram_size": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3},
    "drawn": {"num_beams": 1, "do_sample": True, "top_k": 0, "temperature": 3.0},
}


ENDS = (4, 9, 13, 21)  # several, so that texts of a random model have many lengths


@pytest.fixture(scope="module")
def model():
    return pretrained.load(MARIAN)


def config_of(options):
    return resolve({}, None, max_length=14, decoder_start_token_id=2, eos_token_id=ENDS, pad_token_id=1, **options)


@pytest.mark.parametrize("options", SEARCHES.values(), ids=SEARCHES)
def test_four_devices_are_one(model, options):
    rng = np.random.default_rng(0)
    sources = [rng.integers(4, 40, length).astype(np.int32) for length in rng.integers(2, 15, 21)]
    config = config_of(options)

    def answers(rows, devices):
        found = generate_all(model.model, model.params, sources, config, rows=rows, key=jax.random.key(0), devices=devices)
        return {answer.index: answer for answer in found}

    alone, shared = answers(16, ()), answers(4, jax.devices()[:4])
    assert sorted(shared) == sorted(alone) == list(range(21))
    assert len({len(answer.tokens[0]) for answer in alone.values()}) > 1
    for number, answer in alone.items():
        for one, other in zip(answer.tokens, shared[number].tokens, strict=True):
            np.testing.assert_array_equal(other, one)
        np.testing.assert_allclose(shared[number].scores, answer.scores, atol=1e-5)
        assert shared[number].ended == answer.ended


def test_no_more_devices_than_batches():
    assert (
        share_devices(jax.devices(), 1).number == share_devices((), 5).number == share_devices(jax.devices()[:1], 5).number == 1
    )
    assert share_devices(jax.devices(), 3).number == 3
    assert share_devices(jax.devices(), 99).number == len(jax.devices())


@pytest.mark.parametrize("beams", [1, 3])
def test_devices_tell_each_other_whether_rows_are_open_and_nothing_else(model, beams):
    static, traced = split_options(config_of({"num_beams": beams}))
    devices = share_devices(jax.devices(), 8)
    params, vocabulary = devices.replicate((model.params, prepare(model.model, model.params)))
    ids, keys = np.ones((16, 8), np.int32), np.zeros((16, 2), np.uint32)
    rows = devices.place_rows((ids, ids, keys, np.ones(16, bool)))
    lowered = search.begin.lower(model.model, params, vocabulary, *rows, traced, config=static, positions=13)
    collectives = r"= (\S+) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    assert set(collections.Counter(re.findall(collectives, lowered.compile().as_text()))) == {("pred[]", "all-reduce")}
