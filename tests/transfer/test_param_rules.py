"""Rules by depth, on the parameters of every family that has layers."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mtl_jax.core.errors import UserError
from mtl_jax.core.trees import path_name
from mtl_jax.pretrained import families
from mtl_jax.transfer import decide, discriminative, layerwise, top_layers
from mtl_jax.transfer.adapters import Lora, adapt

FIXTURES = Path(__file__).parents[1] / "pretrained" / "fixtures"
ENCODERS = ["bert_rows", "roberta_tokens", "xlm_roberta_rows", "distilbert_masked_lm", "electra_replaced", "modernbert_rows"]
ENCODERS += [
    "camembert_tokens",
    "mpnet_masked_lm",
    "albert_rows",
    "deberta_rows",
    "deberta_masked_lm",
    "nomic_masked_lm",
    "gte_rows",
]
DECODERS = ["marian", "bart", "mbart", "t5"]


def shapes(name):
    """A run's parameters on a tiny checkpoint of a family: a decoder where there is one, and a head of texts."""
    raw = json.loads((FIXTURES / name / "config.json").read_text())
    family = families.of(raw, name)
    decodes = name in DECODERS
    model = family.build(family.config(raw, name), "seq2seq_lm" if decodes else None, jnp.float32)
    ids = jnp.ones((1, 4), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), *[ids] * (3 if decodes else 1))["params"]
    heads = {"label": {"output": {"kernel": jax.ShapeDtypeStruct((8, 2), jnp.float32)}}}
    return {"trunk": params["trunk"], "heads": heads | ({"text": params["head"]} if decodes else {})}


def names(params):
    return [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]


@pytest.mark.parametrize("family", ENCODERS + DECODERS)
def test_every_parameter_of_every_family_is_in_one_group(family):
    params = shapes(family)
    layers = len([name for name in params["trunk"] if name.startswith("layer_")])
    for decoder_layers in (0, 1) if family in DECODERS else (0,):
        for rules in (layerwise(0.5, layers, decoder_layers), top_layers(0, layers, decoder_layers)):
            decide(params, rules)  # none is empty
            assert len(rules) == layers + decoder_layers + 2
            for name in names(params):
                assert len([rule for rule in rules if re.fullmatch(rule.pattern, name)]) == 1, name


def test_a_layer_has_the_rate_of_the_one_above_it_times_the_decay():
    params = shapes("modernbert_rows")
    rates = {
        name: rule.rate for name, rule in zip(names(params), jax.tree.leaves(decide(params, layerwise(0.5, 3))), strict=True)
    }
    expected = {"heads/": 1.0, "final_norm": 1.0, "layer_2": 0.5, "layer_1": 0.25, "layer_0": 0.125, "embeddings": 0.0625}
    for name, rate in rates.items():
        assert rate == next(value for part, value in expected.items() if part in name), name
    assert [rule.rate for rule in discriminative(2)] == [1, 1 / 2.6, (1 / 2.6) ** 2, (1 / 2.6) ** 3]


def test_a_decoder_stands_above_the_trunk():
    params = shapes("t5")
    rates = dict(zip(names(params), (rule.rate for rule in jax.tree.leaves(decide(params, layerwise(0.5, 1, 1)))), strict=True))
    assert rates["heads/label/output/kernel"] == rates["heads/text/norm/scale"] == 1
    assert rates["heads/text/relative_bias/table/embedding"] == 0.5
    assert rates["trunk/norm/scale"] == 1
    assert rates["trunk/layer_0/attention/key/kernel"] == 0.25
    assert rates["trunk/relative_bias/table/embedding"] == rates["trunk/embeddings/word/embedding"] == 0.125


def test_the_topmost_layers_train():
    params = shapes("modernbert_rows")
    mask = {
        name: rule.train for name, rule in zip(names(params), jax.tree.leaves(decide(params, top_layers(2, 3))), strict=True)
    }
    frozen = {"/".join(name.split("/")[:2]) for name, trains in mask.items() if not trains}
    assert frozen == {"trunk/layer_0", "trunk/embeddings"}
    assert mask["trunk/final_norm/scale"]
    assert not decide(params, top_layers(0, 3))["trunk"]["final_norm"]["scale"].train
    assert all(rule.train for rule in top_layers(4, 3))
    assert [rule.train for rule in top_layers(0, 3)] == [True, False, False, False, False]


def test_adapters_have_the_full_rate_and_train_whatever_stands_still():
    """They are fresh, at whichever layer they are; so is one on top of them all."""
    params = shapes("bert_rows")
    layers = len([name for name in params["trunk"] if name.startswith("layer_")])
    raw = json.loads((FIXTURES / "bert_rows" / "config.json").read_text())
    family = families.of(raw, "bert_rows")
    module = adapt(family.build(family.config(raw, "bert_rows"), None, jnp.float32).trunk, [Lora(name="lora", rank=2)])
    trunk = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]
    rules = (layerwise(0.5, layers), *(top_layers(count, layers) for count in range(layers + 2)))
    for decided in (decide(params | {"trunk": trunk}, each) for each in rules):
        own = jax.tree.leaves(decided["trunk"]["adapters"])
        assert len(own) == 4 * layers  # two matrices beside queries and values
        assert all(rule.train and rule.rate == 1 for rule in own)


def test_a_number_of_layers_that_does_not_fit():
    params = shapes("modernbert_rows")
    with pytest.raises(
        UserError, match=r"no rule covers the parameter trunk/layer_2/.* \(there are trunk/layer_0 to trunk/layer_2\)"
    ):
        decide(params, layerwise(0.9, 2))
    with pytest.raises(UserError, match=r"'trunk/layer_3/.\*' matches no parameter; there are trunk/layer_0 to trunk/layer_2"):
        decide(params, layerwise(0.9, 4))
    with pytest.raises(UserError, match=r"there are trunk/layer_0 to trunk/layer_1; depths that share a layer count once"):
        decide(shapes("albert_rows"), layerwise(0.9, 3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: layerwise(0.0, 2), "decay is 0.0; it must be above 0, and 1 at most"),
        (lambda: layerwise(1.1, 2), "decay is 1.1"),
        (lambda: layerwise(0.9, 0), "layers is 0; it must be at least 1"),
        (lambda: layerwise(0.9, 2, -1), "decoder_layers is -1"),
        (lambda: discriminative(2, 0.5), "factor is 0.5"),
        (lambda: top_layers(4, 2), "count is 4; there are 2 layers, and 3 stands for the embeddings, too"),
        (lambda: top_layers(-1, 2), "count is -1"),
    ],
)
def test_numbers_that_make_no_sense(make, message):
    with pytest.raises(UserError, match=message):
        make()
