"""Checkpoints out, and what else load() can be asked for; no torch needed."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from mtl_jax import pretrained
from mtl_jax.core.errors import UserError
from mtl_jax.pretrained import families, saving


@pytest.fixture(scope="module")
def bert(deep):
    return deep


def equal(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_everything_goes_out_and_comes_back(bert, tmp_path):
    shutil.copytree(bert, tmp_path / "in")
    generation = '{"max_length": 7}'
    (tmp_path / "in" / "generation_config.json").write_text(generation)
    raw = json.loads((bert / "config.json").read_text())
    (tmp_path / "in" / "config.json").write_text(json.dumps(raw | {"torch_dtype": "float16", "a_field_of_theirs": [1]}))
    loaded = pretrained.load(str(tmp_path / "in"))
    pretrained.save(tmp_path / "out", loaded)
    again = pretrained.load(str(tmp_path / "out"))
    assert equal(again.params, loaded.params)
    assert again.config == loaded.config
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert (tmp_path / "out" / "generation_config.json").read_text() == generation
    assert again.raw["a_field_of_theirs"] == [1]
    assert again.raw["architectures"] == ["BertModel"]
    assert (again.raw["dtype"], again.raw.get("torch_dtype")) == ("float32", None)
    assert again.tokenizer("good film")["input_ids"] == loaded.tokenizer("good film")["input_ids"]


def test_a_file_has_the_bytes_that_the_package_of_the_format_writes(bert, tmp_path):
    pretrained.save(tmp_path / "out", pretrained.load(str(bert)))
    file = tmp_path / "out" / "model.safetensors"
    save_file(load_file(file), tmp_path / "theirs", metadata={"format": "pt"})
    assert file.read_bytes() == (tmp_path / "theirs").read_bytes()


def test_nothing_half_written_remains(bert, tmp_path, monkeypatch):
    loaded = pretrained.load(str(bert))
    pretrained.save(tmp_path / "out", loaded)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "copy_files", full)
    changed = dataclasses.replace(loaded, params=jax.tree.map(lambda leaf: leaf + 1, loaded.params))
    for target in ("out", "new"):
        with pytest.raises(UserError, match=rf"{target}: cannot be written \(No space left on device\)"):
            pretrained.save(tmp_path / target, changed, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_what_is_there_is_replaced_only_if_it_is_a_checkpoint_and_asked_for(bert, tmp_path):
    loaded = pretrained.load(str(bert))
    (tmp_path / "empty").mkdir()
    pretrained.save(tmp_path / "empty", loaded)
    with pytest.raises(UserError, match="it holds a checkpoint already"):
        pretrained.save(tmp_path / "empty", loaded)
    changed = dataclasses.replace(loaded, params=jax.tree.map(lambda leaf: leaf + 1, loaded.params))
    pretrained.save(tmp_path / "empty", changed, overwrite=True)
    assert equal(pretrained.load(str(tmp_path / "empty")).params, changed.params)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="it is a file; choose another"):
        pretrained.save(tmp_path / "file", loaded, overwrite=True)
    with pytest.raises(UserError, match="cannot be written"):
        pretrained.save("/proc/checkpoint", loaded)


def test_a_checkpoint_may_replace_the_one_it_was_read_from(bert, tmp_path):
    shutil.copytree(bert, tmp_path / "bert")
    loaded = pretrained.load(str(tmp_path / "bert"))
    pretrained.save(tmp_path / "bert", loaded, overwrite=True)
    assert equal(pretrained.load(str(tmp_path / "bert")).params, loaded.params)


def test_new_heads(bert):
    loaded = pretrained.load(str(bert), head="sequence_classification", labels=5)
    assert loaded.initialized == ("head/classifier/bias", "head/classifier/kernel")
    assert loaded.labels == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3", "LABEL_4")
    assert loaded.params["head"]["classifier"]["kernel"].shape == (16, 5)
    np.testing.assert_array_equal(loaded.params["pooler"]["dense"]["bias"], tiny.bert_tensors()["pooler.dense.bias"])
    other = pretrained.load(str(bert), head="sequence_classification", labels=5, seed=1)
    assert not equal(loaded.params["head"], other.params["head"])
    for options, message in (
        ({"head": "tagging"}, r"unknown head for bert checkpoints: 'tagging'.*choices: auto, masked_lm"),
        ({"labels": 3}, "labels were given, but those of a head of kind None cannot be chosen"),
        ({"head": "token_classification", "labels": 0}, "labels is empty; a head needs at least one"),
    ):
        with pytest.raises(UserError, match=message):
            pretrained.load(str(bert), **options)


def test_a_head_of_the_file_stays_unless_its_labels_change(bert, tmp_path):
    three = pretrained.load(str(bert), head="sequence_classification", labels=["a", "b", "c"])
    pretrained.save(tmp_path / "three", three)
    again = pretrained.load(str(tmp_path / "three"))
    assert (again.head, again.labels, again.initialized) == ("sequence_classification", ("a", "b", "c"), ())
    assert equal(again.params, three.params)
    renamed = pretrained.load(str(tmp_path / "three"), labels=["x", "y", "z"])
    assert equal(renamed.params, three.params)
    assert pretrained.load(str(tmp_path / "three"), labels=4).initialized == ("head/classifier/bias", "head/classifier/kernel")
    # A classifier of rows is no classifier of tokens, though their tensors have one name.
    tags = pretrained.load(str(tmp_path / "three"), head="token_classification")
    assert tags.initialized == ("head/tags/bias", "head/tags/kernel")
    trunk = pretrained.load(str(tmp_path / "three"), head=None)
    assert set(trunk.params) == {"trunk", "pooler"}
    assert trunk.unused == ("classifier.bias", "classifier.weight")


def test_a_head_that_the_configuration_names_and_the_file_lacks(bert, tmp_path):
    shutil.copytree(bert, tmp_path / "bert")
    raw = json.loads((bert / "config.json").read_text()) | {"architectures": ["BertForMaskedLM"]}
    (tmp_path / "bert" / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"missing tensors: cls\.predictions\.bias .*; head=None loads the trunk alone"):
        pretrained.load(str(tmp_path / "bert"))
    assert pretrained.load(str(tmp_path / "bert"), head=None).unused == ()


def test_tensors_go_straight_to_their_devices(bert):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, "x"))

    def by_path(path):
        return split if path.endswith("/kernel") else whole

    loaded = pretrained.load(str(bert), sharding=by_path)
    kernel = loaded.params["trunk"]["layer_0"]["attention"]["query"]["kernel"]
    assert kernel.sharding == split
    assert kernel.addressable_shards[0].data.shape == (16, 4)
    assert loaded.params["trunk"]["embeddings"]["norm"]["scale"].sharding == whole
    assert equal(loaded.params, pretrained.load(str(bert)).params)
    everywhere = pretrained.load(str(bert), sharding=whole)
    assert {leaf.sharding for leaf in jax.tree.leaves(everywhere.params)} == {whole}


STORED = sorted(file.parent for file in (Path(__file__).parent / "fixtures").glob("*/model.safetensors"))


@pytest.mark.parametrize("head", ["auto", None])
@pytest.mark.parametrize("folder", STORED, ids=lambda folder: folder.name)
def test_every_family_comes_back_bit_for_bit(folder, head, tmp_path):
    loaded = pretrained.load(str(folder), head=head)
    if families.of(loaded.raw, "here").base is None and head is None:
        with pytest.raises(UserError, match=r"transformers has no class for a .* model without a head"):
            pretrained.save(tmp_path / "out", loaded)
        return
    pretrained.save(tmp_path / "out", loaded)
    again = pretrained.load(str(tmp_path / "out"))
    assert (again.head, again.unused, again.initialized) == (loaded.head, (), ())
    assert again.config == loaded.config
    assert equal(again.params, loaded.params)
