"""Adapters inside decoders: nothing changes at first, and merged they give the same texts."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from mtl_jax import IA3, Bottleneck, Dora, Lora, Pissa, Prefix, PromptTuning, pretrained
from mtl_jax.core.errors import UserError
from mtl_jax.core.trees import flat, nested
from mtl_jax.decoding import generate
from mtl_jax.tasks import Seq2Seq
from mtl_jax.transfer.adapters.adapted_decoder import adapt_decoder, add_to_decoder, layers_of, merge_decoder

FIXTURES = Path(__file__).parents[1] / "pretrained" / "fixtures"
IDS, MASK = np.array([[5, 6, 7, 8, 3], [4, 6, 9, 0, 0]]), np.array([[1] * 5, [1, 1, 1, 0, 0]])
TARGET = np.array([[2, 5, 6, 7], [2, 7, 8, 4]])


@functools.cache
def checkpoint(family):
    return pretrained.load(str(FIXTURES / family))


def adapted(family, *adapters, moved=0.3):
    """The checkpoint with adapters in its decoder, moved away from where they start."""
    loaded = checkpoint(family)
    head = adapt_decoder(loaded.model.head, adapters)
    params = add_to_decoder(head, loaded.params["head"], jax.random.key(0))
    rng = np.random.default_rng(0)
    added = flat(params["adapters"])
    for path, leaf in added.items():
        if "fixed_" not in path:
            added[path] = leaf + moved * rng.normal(size=leaf.shape).astype(np.float32)
    params["adapters"] = nested(added)
    return dataclasses.replace(loaded, model=loaded.model.clone(head=head), params=loaded.params | {"head": params})


def logits(loaded):
    return loaded.model.apply({"params": loaded.params}, IDS, MASK, TARGET).logits


LORA = Lora(name="lora", rank=2, target=".*/(query|value)")


def test_at_the_start_the_logits_are_the_decoder_s_to_the_bit():
    adapters = (
        LORA,
        Dora(name="dora", rank=2, target=".*/key"),
        IA3(name="ia3", target=".*/(key|value)"),
        Bottleneck(name="b"),
    )
    fresh = adapted("t5", *adapters, Pissa(name="pissa", rank=2, target=".*/feed_forward_in"), moved=0.0)
    np.testing.assert_array_equal(logits(fresh), logits(checkpoint("t5")))
    paths = {path.rpartition("/")[0] for path in flat(fresh.params["head"]["adapters"]["lora"])}
    assert "layer_0/cross_attention/query" in paths
    assert "layer_0/attention/value" in paths


@pytest.mark.parametrize("family", ["t5", pytest.param("bart", marks=pytest.mark.long)])
def test_merged_gives_the_same_logits_and_texts(family):
    """Teacher forcing, and greedy and beam search with a cache, token for token."""
    loaded = adapted(family, LORA, Dora(name="dora", rank=2, target=".*/key"))
    head = merge_decoder(loaded.model.head, loaded.params["head"])
    merged = dataclasses.replace(checkpoint(family), params=loaded.params | {"head": head})
    np.testing.assert_allclose(logits(loaded), logits(merged), atol=1e-4)
    assert not np.allclose(logits(loaded), logits(checkpoint(family)), atol=1e-2)
    tokens, scores = generate(loaded, IDS, MASK, num_beams=2, max_new_tokens=5, decoder_start_token_id=0)
    expected_tokens, expected_scores = generate(merged, IDS, MASK, num_beams=2, max_new_tokens=5, decoder_start_token_id=0)
    np.testing.assert_array_equal(tokens, expected_tokens)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-4)


@pytest.mark.long
def test_a_prefix_in_a_decoder_is_seen_with_and_without_a_cache():
    """Teacher forcing of the text that greedy search finds gives its likeliest tokens."""
    loaded = adapted("bart", Prefix(name="prefix", length=3, shift=True, target=".*/attention"))
    tokens, _ = generate(loaded, IDS, MASK, num_beams=1, max_new_tokens=4)
    forced = loaded.model.apply({"params": loaded.params}, IDS, MASK, np.asarray(tokens)[:, :-1]).logits
    np.testing.assert_array_equal(np.argmax(forced, -1)[0, 1:3], np.asarray(tokens)[0, 2:4])
    assert not np.allclose(logits(loaded), logits(checkpoint("bart")), atol=1e-2)


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ((Lora(name="l", rank=2, per="source"),), "'l': per is source, but a decoder is of one task"),
        (
            (Lora(name="l", rank=2, target=".*/qurey"),),
            "'l' finds no place in this trunk: .* there are .*cross_attention/query",
        ),
        ((PromptTuning(name="p"),), "'p' finds no place"),
        ((Prefix(name="x", per="task"),), "'x': per is task, but a decoder is of one task"),
    ],
)
def test_bad_input(adapters, message):
    with pytest.raises(UserError, match=message):
        adapt_decoder(checkpoint("t5").model.head, adapters)
    assert "lm_head" not in layers_of(checkpoint("t5").model.head.config)
    assert Seq2Seq(name="s", source="s", column="c").adapters == ()
