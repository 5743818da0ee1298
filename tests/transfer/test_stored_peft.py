"""PEFT directories without torch: stored answers of PEFT, written and read again, several together, and bad input."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mtl_jax import Bottleneck, Lora, pretrained
from mtl_jax.core.errors import UserError
from mtl_jax.core.trees import flat
from mtl_jax.transfer.adapters import adapters_of, add_adapters, combine, load_peft, merged, only, save_peft, weighted

FIXTURES = Path(__file__).parent / "fixtures"
CHECKPOINTS = Path(__file__).parents[1] / "pretrained" / "fixtures"
BASES = {
    **dict.fromkeys(("lora", "dora", "pissa", "ia3", "prefix", "prompt"), "bert_rows"),
    **{"bart_lora": "bart", "t5_ia3": "t5"},
}


@functools.cache
def base(name):
    return pretrained.load(str(CHECKPOINTS / name))


@functools.cache
def opened(name):
    return load_peft(FIXTURES / f"peft_{name}", base(BASES[name]))


def stored(name):
    return np.load(FIXTURES / f"peft_{name}" / "expected.npz")


def logits(checkpoint, name="lora"):
    inputs = {key: array for key, array in stored(name).items() if key != "logits"}
    with jax.default_matmul_precision("highest"):
        return np.asarray(
            jax.jit(lambda params: checkpoint.model.apply({"params": params}, **inputs).logits)(checkpoint.params)
        )


@pytest.mark.parametrize("name", [name if name != "t5_ia3" else pytest.param(name, marks=pytest.mark.long) for name in BASES])
def test_stored_answers_and_the_way_back(name, tmp_path):
    """As PEFT answers; a directory that is written and read again has the same parameters, those of PiSSA as a difference."""
    checkpoint = opened(name)
    np.testing.assert_allclose(logits(checkpoint, name), stored(name)["logits"], rtol=0, atol=1e-5)
    save_peft(tmp_path / "out", checkpoint)
    again = load_peft(tmp_path / "out", base(BASES[name]))
    if name == "pissa":
        ((pissa,), (difference,)) = (adapters_of(one)["trunk"] for one in (checkpoint, again))
        assert (type(difference), difference.rank) == (Lora, 2 * pissa.rank)
        np.testing.assert_allclose(logits(again), logits(checkpoint), atol=1e-5)
        return
    expected = flat(checkpoint.params)
    assert flat(again.params).keys() == expected.keys()
    for path, leaf in flat(again.params).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


def test_ranks_and_alphas_by_pattern():
    query, value = sorted(adapters_of(opened("lora"))["trunk"], key=lambda lora: lora.target)
    assert (query.rank, query.alpha, value.rank, value.alpha) == (3, 8, 2, 5)
    assert query.dropout == value.dropout == 0.1


def test_several_together_switched_weighted_and_merged(tmp_path):
    """At a layer the changes of LoRAs add up; concatenated by weights they are one LoRA, which PEFT has a form for."""
    first, second = (
        opened("lora"),
        add_adapters(base("bert_rows"), [Lora(name="second", rank=2, target=".*/(key|query)")], seed=1),
    )
    params = flat(second.params)
    rng = np.random.default_rng(2)
    added = {path: rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in params.items() if path.endswith("/b")}
    second = dataclasses.replace(second, params=_nested({**params, **added}))
    both = combine({"one": first, "two": second})
    names = [adapter.name for adapter in adapters_of(both)["trunk"]]
    assert names == ["one_default", "one_default_2", "two_second"]
    np.testing.assert_allclose(logits(only(both, names[:2])), logits(first), atol=1e-6)
    np.testing.assert_allclose(logits(weighted(both, {"two_second": 0.0})), logits(first), atol=1e-6)
    plain = dataclasses.replace(base("bert_rows"), params={**base("bert_rows").params, "head": first.params["head"]})
    np.testing.assert_allclose(logits(only(both, [])), logits(plain), atol=1e-6)
    weights = dict(zip(names, (0.7, 0.7, 0.3), strict=True))
    expected = logits(weighted(both, weights))
    mixed = merged(both, weights, name="mix")
    np.testing.assert_allclose(logits(mixed), expected, atol=1e-5)
    save_peft(tmp_path / "mix", mixed)
    np.testing.assert_allclose(logits(load_peft(tmp_path / "mix", base("bert_rows"))), expected, atol=1e-5)
    twice = combine({"a": second, "b": weighted(second, {"second": 3.0})})
    mean = merged(twice, {"a_second": 1.0, "b_second": 1.0}, name="mean", method="average")
    for path, leaf in flat(mean.params["trunk"]["adapters"]["mean"]).items():
        factor = 2.0 if path.endswith("/b") else 1.0
        np.testing.assert_allclose(leaf, factor * flat(second.params)[f"trunk/adapters/second/{path}"], rtol=1e-6)


def _nested(leaves):
    from mtl_jax.core.trees import nested

    return nested(leaves)


def changed(folder, name="lora", tensors=None, **fields):
    """A copy of a stored directory with other fields or tensors."""
    shutil.copytree(FIXTURES / f"peft_{name}", folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    if tensors is not None:
        save_file(tensors(load_file(folder / "adapter_model.safetensors")), folder / "adapter_model.safetensors")
    return folder


QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rank_pattern": {"layer.7.attention.self.query": 3}},
            "rank_pattern 'layer.7.attention.self.query' matches no module",
        ),
        (
            {"alpha_pattern": {"keys": 3}},
            "alpha_pattern 'keys' matches no module with an adapter; there are modules such as bert",
        ),
        ({"rank_pattern": {"(": 3}}, r"rank_pattern '\(' is not a regular expression"),
        ({"rank_pattern": {"self.query": 3.0}}, r"rank_pattern is \{'self.query': 3.0\}; .* names and positive whole numbers"),
        ({"rank_pattern": {}}, r"rank_pattern is wrong: .*query.lora_A.weight has shape \(3, 16\), and \(2, 16\) is needed"),
        (
            {"target_modules": ["query", "value", "key"]},
            "target_modules names bert.encoder.layer.0.attention.self.key, which has no",
        ),
        ({"target_modules": r".*\.query"}, "self.value has tensors, but target_modules does not name it"),
        ({"layer_replication": [[0, 4]]}, r"layer_replication is \[\[0, 4\]\], a feature of PEFT that is not supported"),
        ({"bias": "all"}, "bias is 'all', a feature of PEFT"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora', which changes the base"),
        ({"peft_type": "LOHA"}, r"unknown peft_type in .*adapter_config.json: 'LOHA' \(did you mean 'LORA'\?\)"),
        ({"use_dora": True}, "the tensor bert.encoder.layer.0.attention.self.*lora_magnitude_vector is missing"),
        ({"modules_to_save": []}, "the tensors have the module classifier, which modules_to_save does not name"),
    ],
)
def test_fields_that_do_not_fit(tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        load_peft(changed(tmp_path / "peft", **fields), base("bert_rows"))


def test_tensors_that_do_not_fit(tmp_path):
    def narrow(tensors):
        return tensors | {f"{QUERY}.lora_A.weight": tensors[f"{QUERY}.lora_A.weight"][:, :8].copy()}

    with pytest.raises(UserError, match=r"for another base, .* has shape \(3, 8\), and \(3, 16\) is needed"):
        load_peft(changed(tmp_path / "narrow", tensors=narrow), base("bert_rows"))
    with pytest.raises(UserError, match=r"for another base: bert\.encoder.* is no linear map of it"):
        load_peft(FIXTURES / "peft_lora", base("distilbert_masked_lm"))
    embedding = {"base_model.model.bert.embeddings.word_embeddings.lora_embedding_A": np.zeros((2, 40), np.float32)}
    with pytest.raises(UserError, match="lora_embedding_A is of no linear map"):
        load_peft(changed(tmp_path / "embedding", tensors=lambda tensors: tensors | embedding), base("bert_rows"))
    folder = changed(tmp_path / "pickle")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is missing \(adapter_model\.bin is a pickle"):
        load_peft(folder, base("bert_rows"))
    with pytest.raises(UserError, match="not a directory"):
        load_peft(tmp_path / "nothing", base("bert_rows"))


def test_another_base_is_known_by_its_hash(tmp_path):
    save_peft(tmp_path / "out", opened("lora"))
    other = flat(base("bert_rows").params)
    other["trunk/embeddings/norm/bias"] = other["trunk/embeddings/norm/bias"] + 1
    with pytest.raises(UserError, match=r"for another base: the parameters of .*bert_rows have another SHA-256"):
        load_peft(tmp_path / "out", dataclasses.replace(base("bert_rows"), params=_nested(other)))
    with pytest.raises(UserError, match="it holds an adapter already"):
        save_peft(tmp_path / "out", opened("lora"))


def test_what_peft_has_no_form_for(tmp_path):
    bert = base("bert_rows")
    for adapters, message in (
        ([], "the checkpoint has no adapters to write"),
        ([Bottleneck(name="b")], "adapter 'b': PEFT has no form for a Bottleneck"),
        ([Lora(name="lora", rank=2), *adapters_of(opened("ia3"))["trunk"]], "adapters lora, default: .* adapters of one kind"),
        (
            [dataclasses.replace(adapters_of(opened("prefix"))["trunk"][0], shift=False)],
            "positions of a text begin after the pre",
        ),
        ([dataclasses.replace(adapters_of(opened("prompt"))["trunk"][0], keep=False)], "the head of a text reads the prompt's"),
    ):
        with pytest.raises(UserError, match=message):
            save_peft(tmp_path / "out", add_adapters(bert, adapters))
    with pytest.raises(UserError, match=r"unknown adapter 'lorra' \(did you mean 'lora'\?\)"):
        only(add_adapters(bert, [Lora(name="lora", rank=2)]), ["lorra"])
    with pytest.raises(UserError, match="'default' is a Dora, whose change cannot be multiplied"):
        weighted(opened("dora"), {"default": 0.5})
