"""Adapters inside decoders: nothing changes at first, merged they give the same texts, and only they train."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_translation

import mtl_jax
from mtl_jax import IA3, Bottleneck, Dora, Lora, Optimizer, Phase, Pissa, Prefix, PromptTuning, adapters_only, pretrained
from mtl_jax.core.errors import UserError
from mtl_jax.core.trees import flat
from mtl_jax.decoding import generate
from mtl_jax.inference.export import convert
from mtl_jax.inference.predict import open_run, predict
from mtl_jax.tasks import Seq2Seq
from mtl_jax.training.experiment_json import from_json, to_json
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
    params["adapters"] = mtl_jax.core.trees.nested(added)
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


def test_a_prefix_in_a_decoder_is_seen_with_and_without_a_cache():
    """Teacher forcing of the text that greedy search finds gives its likeliest tokens."""
    loaded = adapted("bart", Prefix(name="prefix", length=3, shift=True, target=".*/attention"))
    tokens, _ = generate(loaded, IDS, MASK, num_beams=1, max_new_tokens=4)
    forced = loaded.model.apply({"params": loaded.params}, IDS, MASK, np.asarray(tokens)[:, :-1]).logits
    np.testing.assert_array_equal(np.argmax(forced, -1)[0, 1:3], np.asarray(tokens)[0, 2:4])
    assert not np.allclose(logits(loaded), logits(checkpoint("bart")), atol=1e-2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose decoder has adapters, and the rest of it is frozen."""
    folder = tmp_path_factory.mktemp("decoder")
    tiny_translation.write_data(folder, rows=60)
    first = tiny_translation.experiment(folder)
    task = dataclasses.replace(first.tasks[0], beams=1, adapters=(LORA,))
    experiment = dataclasses.replace(
        first,
        tasks=(task,),
        phases=(Phase("adapters", 2, rules=adapters_only(decoders=(task.name,), trunk=False)),),
        optimizer=Optimizer(learning_rate=0.05),
        evaluation=dataclasses.replace(first.evaluation, every=2, baseline="none"),
    )
    mtl_jax.train(experiment, folder / "run")
    return experiment, folder / "run"


def test_only_the_adapters_of_a_decoder_train(run, tmp_path):
    """And the run's texts are those of the decoder with the adapters inside."""
    experiment, workdir = run
    assert from_json(json.loads(json.dumps(to_json(experiment)))) == experiment
    opened = open_run(workdir, "last")
    name = experiment.tasks[0].name
    from mtl_jax.training.setup import initial_state, prepare

    start = flat(initial_state(prepare(experiment)).params["heads"][name])
    changed = {path for path, leaf in flat(opened.params["heads"][name]).items() if not np.array_equal(leaf, start[path])}
    assert changed
    assert all(path.startswith("adapters/lora/") for path in changed)
    (answer,) = predict(workdir, name, ["the dog sees"])
    convert(str(workdir), tmp_path / "out", task=name)
    converted = pretrained.load(str(tmp_path / "out"))
    ids = np.array([converted.tokenizer("the dog sees")["input_ids"]])
    _, scores = generate(converted, ids, np.ones_like(ids), num_beams=1, max_new_tokens=opened.task(name).target_length)
    assert scores[0] == pytest.approx(answer["score"], abs=1e-4)


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ((Lora(name="l", rank=2, per="source"),), "'l': per is source, but a decoder is of one task"),
        (
            (Lora(name="l", rank=2, target=".*/qurey"),),
            "'l' finds no place in this trunk: .* there are .*cross_attention/query",
        ),
        ((PromptTuning(name="p"),), "'p' finds no place"),
    ],
)
def test_bad_input(adapters, message):
    with pytest.raises(UserError, match=message):
        adapt_decoder(checkpoint("t5").model.head, adapters)
    assert "lm_head" not in layers_of(checkpoint("t5").model.head.config)
    assert Seq2Seq(name="s", source="s", column="c").adapters == ()
