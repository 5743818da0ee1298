"""Damaged and dangerous checkpoints: one line that names the file and says what to do; nothing runs, nothing is returned."""

import io
import json
import os
import pickle
import shutil
import zipfile

import ml_dtypes
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mtl_jax import pretrained
from mtl_jax.core.errors import UserError
from mtl_jax.pretrained.tensor_files import open_safetensors, open_tensors


@pytest.fixture(scope="module")
def bert(deep):
    return deep


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A safetensors file of three tensors."""
    file = tmp_path_factory.mktemp("small") / "model.safetensors"
    save_file({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.float16), "c": np.array(7)}, file)
    return file


def fails(path, match):
    with pytest.raises(UserError, match=match) as caught:
        pretrained.load(str(path))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def with_header(change, small, tmp_path):
    """The small file with another header."""
    data = small.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header = change(header) or header
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + length :])
    return file


def zipped(file):
    """The file as a compressed member of an archive, such as a wheel."""
    with zipfile.ZipFile(file.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(file, file.name)
    return zipfile.Path(file.with_suffix(".zip"), file.name)


def test_a_member_of_an_archive_has_the_tensors_of_the_file(tmp_path):
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, ml_dtypes.bfloat16), "c": np.array(7)}
    tensors |= {"d": np.zeros((0, 4), np.float16), "e": np.array([True, False]), "f": np.ones(3, ml_dtypes.float8_e4m3fn)}
    save_file(tensors, tmp_path / "model.safetensors")
    for file in (tmp_path / "model.safetensors", zipped(tmp_path / "model.safetensors")):
        opened = open_safetensors(file)
        assert opened.keys() == tensors.keys()
        for name, tensor in opened.items():
            assert (tensor.shape, tensor.dtype) == (tensors[name].shape, tensors[name].dtype)
            np.testing.assert_array_equal(tensor.read(), tensors[name], strict=True)


def test_a_file_cut_anywhere_is_damaged(small, tmp_path):
    whole = small.read_bytes()
    cut = tmp_path / "model.safetensors"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"model\.safetensors: damaged or not safetensors .*; fetch it again"):
            open_safetensors(cut)


def empty(**fields):
    return {"dtype": "F32", "shape": [0], "data_offsets": [0, 0], **fields}


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["a"].update(shape=[2, 4]), "damaged .*invalid shape"),
        (lambda h: h["a"].update(shape=[-2, -3]), "damaged .*invalid value: integer `-2`"),
        (lambda h: h["a"].update(shape=[True, 6]), "damaged .*invalid type: boolean `true`"),
        (lambda h: h["a"].update(data_offsets=[0, 24]), "damaged .*invalid offset for tensor `a`"),
        (lambda h: h["a"].update(data_offsets=[24]), "damaged .*invalid length 1"),
        (lambda h: h["a"].update(data_offsets=[10**30, 10**30 + 24]), "damaged .*invalid type"),
        (lambda h: h["a"].update(data_offsets=[10**9, 10**9 + 24]), "damaged .*invalid offset"),
        (lambda h: h["a"].update(dtype="F" + "\n\x1b" * 10_000), r"damaged .*unknown variant `F"),
        (lambda h: h["a"].update(dtype="F" + "\x1b" * 10_000), r"damaged .*unknown variant `F\?\?"),
        (lambda h: h["a"].update(dtype=[]), "damaged .*invalid type: sequence"),
        (lambda h: h.update({"z": empty(dtype="C64")}), "z has the type C64; known are F64"),
        (lambda h: h.update({"z\n" * 10_000: empty(dtype="F4")}), r"z.nz.n.* has the type F4; known are F64"),
        (lambda h: h["a"].update(shape=[2**62] * 20_000), "damaged .*overflow"),
        (lambda h: h["b"].update(shape=[3] + [1] * 32), "'b' has 33 dimensions"),
        (lambda h: h.update(z=empty(shape=[0, 2**62, 2**62])), "'z' has 3 dimensions, the longest of 4611686018427387904"),
        (lambda h: h["a"].update(shape=[10**30]), "damaged .*invalid type: floating point"),
        (lambda h: h.update({"b\n" * 10_000: {}}), "damaged .*missing field"),
        (lambda h: {f"x.{i}": empty() for i in range(100_001)} | h, "its header names 100004 tensors"),
        (lambda h: b" " * 25_000_001, "a header of 25000001 bytes"),
        (lambda h: h["a"].pop("dtype") and None, "damaged .*missing field `dtype`"),
        (lambda h: h.update(b=7) or h, "damaged .*invalid type: integer `7`"),
        (lambda h: h.pop("c") and None, "damaged .*(not fully covered|invalid offset)"),
        (lambda h: [h], "damaged .*invalid type: sequence"),
        (lambda h: b"{" * 50, "damaged .*invalid JSON"),
        (lambda h: b"[" * 100_000, "damaged .*invalid JSON"),
        (lambda h: json.dumps(h).replace('"b"', '"a"').encode(), "damaged .*invalid offset"),
        (lambda h: b"\xff\xfe{}", "damaged .*invalid UTF-8"),
    ],
)
def test_a_header_that_lies(small, tmp_path, change, message, archive):
    file = with_header(change, small, tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        open_safetensors(zipped(file) if archive else file)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


@given(st.data())
def test_any_changed_byte_gives_an_error_or_tensors(small, tmp_path_factory, data):
    whole = bytearray(small.read_bytes())
    whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.getbasetemp() / "changed.safetensors"
    file.write_bytes(whole)
    try:
        for tensor in open_safetensors(file).values():
            assert tensor.read().shape == tensor.shape
    except UserError:
        pass


@pytest.fixture
def sharded(bert, tmp_path):
    """The tiny BERT in several files."""
    pretrained.save(tmp_path / "sharded", pretrained.load(str(bert)), shard_size=8_000)
    return tmp_path / "sharded"


def change_index(folder, change):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    fails(sharded, r"model-00002-of-00003\.safetensors: a shard that model\.safetensors\.index\.json names is missing")


def test_a_shard_without_its_tensor(sharded):
    shutil.copy(sharded / "model-00001-of-00003.safetensors", sharded / "model-00002-of-00003.safetensors")
    fails(sharded, r"model-00002-of-00003\.safetensors: .* is not in it")


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "/etc/passwd", "a/../../b", "..\\b", "C:\\b", "", ".", "x" * 5000, "a\nb", "\0"]
)
def test_an_index_that_points_outside_is_refused(sharded, shard):
    save_file({"a": np.ones(1, np.float32)}, sharded.parent / "outside.safetensors")
    change_index(sharded, lambda index: index["weight_map"].update({"embeddings.LayerNorm.bias": shard}))
    fails(sharded, r"index\.json: the shard .* is not a file inside its directory; refused")


def test_a_shard_may_be_a_link(sharded):
    """As in the hub's cache, where every file is one."""
    shard = sharded / "model-00001-of-00003.safetensors"
    shard.rename(sharded.parent / "blob")
    os.symlink(sharded.parent / "blob", shard)
    pretrained.load(str(sharded))


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{"])
def test_an_index_that_is_none(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    fails(sharded, r"index\.json: ")


def to_pipe(file):
    os.mkfifo(file)


def to_device(file):
    file.symlink_to("/dev/zero")


def to_directory(file):
    file.mkdir()


@pytest.mark.parametrize("make", [to_pipe, to_device, to_directory])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"])
def test_only_regular_files_are_read(bert, tmp_path, name, make):
    """A pipe blocks whoever opens it, and a device has no end."""
    if name != "config.json":
        shutil.copy(bert / "config.json", tmp_path)
    make(tmp_path / name)
    fails(tmp_path, rf"{name}: not a regular file \((a pipe, a device or a socket|a directory)\)")


@pytest.mark.parametrize("make", [to_pipe, to_device, to_directory])
@pytest.mark.parametrize("name", ["tokenizer.json", "special_tokens_map.json"])
def test_only_regular_files_are_a_tokenizer(bert, tmp_path, name, make):
    shutil.copytree(bert, tmp_path / "bert")
    (tmp_path / "bert" / name).unlink(missing_ok=True)
    make(tmp_path / "bert" / name)
    with pytest.raises(UserError, match=rf"{name}: not a regular file"):
        pretrained.load_tokenizer(tmp_path / "bert")


@pytest.mark.parametrize("path", ["x" * 5000, "~nosuchuser/model", "a\0b"])
def test_a_path_that_cannot_be(path):
    with pytest.raises(UserError, match="no such file or directory") as caught:
        pretrained.load(path)
    assert len(str(caught.value)) < 400


def test_a_config_of_gigabytes_is_not_read(bert, tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(10**11)
    fails(tmp_path, r"config\.json: more than 100000000 bytes")


def test_the_order_in_which_files_are_looked_for(bert, tmp_path):
    shutil.copy(bert / "config.json", tmp_path)
    fails(tmp_path, r"no model\.safetensors, .*no pytorch_model\.bin\.index\.json")
    with (tmp_path / "pytorch_model.bin").open("wb") as file:
        file.write(b"nonsense")
    fails(tmp_path, r"pytorch_model\.bin")
    shutil.copy(bert / "model.safetensors", tmp_path)
    pretrained.load(str(tmp_path))


class Evil:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.mark.parametrize("form", ["legacy", "zip"])
def test_a_pickle_that_would_write_a_file_does_not(bert, tmp_path, form):
    shutil.copy(bert / "config.json", tmp_path)
    evil = pickle.dumps({"embeddings.word_embeddings.weight": Evil(tmp_path / "written")}, protocol=2)
    file = tmp_path / "pytorch_model.bin"
    if form == "zip":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("archive/data.pkl", evil)
            archive.writestr("archive/version", "3\n")
        file.write_bytes(buffer.getvalue())
    else:
        magic, version = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2), pickle.dumps(1001, protocol=2)
        file.write_bytes(magic + version + pickle.dumps({"little_endian": True}, protocol=2) + evil)
    fails(tmp_path, r"pytorch_model\.bin.*open")
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"hidden_size": "16"}, "hidden_size is '16'; it must be a whole number"),
        ({"num_attention_heads": 3}, "16 is not a multiple of the 3 attention heads"),
        ({"hidden_act": "relu6"}, "unknown hidden_act .*'relu6'"),
        ({"layer_norm_eps": -1}, "layer_norm_eps is -1"),
        ({"hidden_dropout_prob": 1.0}, "a dropout rate is below 1"),
        ({"position_embedding_type": "relative_key"}, "unknown position_embedding_type"),
        ({"is_decoder": True}, "is_decoder is true; only encoders"),
        ({"id2label": [1]}, "id2label is"),
        ({"architectures": "BertModel"}, "must be a list of class names"),
        ({"tie_word_embeddings": "yes"}, "must be true or false"),
        ({"model_type": "gpt2"}, "unknown model_type .*choices: bert, roberta, xlm-roberta, distilbert, electra"),
        ({"model_type": None}, "unknown model_type"),
        ({"vocab_size": 7}, r"word_embeddings\.weight has shape \(24, 16\), but config\.json asks for \(7, 16\)"),
        ({"num_hidden_layers": 3}, r"missing tensors: encoder\.layer\.2\..* and 11 more"),
    ],
)
def test_a_field_that_does_not_fit_is_named(bert, tmp_path, change, message):
    shutil.copytree(bert, tmp_path / "bert")
    raw = json.loads((bert / "config.json").read_text()) | change
    (tmp_path / "bert" / "config.json").write_text(json.dumps(raw))
    fails(tmp_path / "bert", message)


def test_a_missing_tensor_is_allowed_when_asked_for(tmp_path):
    tensors = {name: tensor for name, tensor in tiny.bert_tensors().items() if "layer.1.output.dense.bias" not in name}
    tiny.write_bert(tmp_path, tensors)
    fails(tmp_path, r"missing tensors: encoder\.layer\.1\.output\.dense\.bias \(our trunk/layer_1/feed_forward_out/bias\)")
    found = pretrained.load(str(tmp_path), allow_missing=True)
    assert found.initialized == ("trunk/layer_1/feed_forward_out/bias",)


def test_a_file_of_another_model_is_none_of_ours(bert, tmp_path):
    shutil.copy(bert / "config.json", tmp_path)
    save_file({"model.layers.0.weight": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    fails(tmp_path, r"no tensor of a bert model in it")
    with pytest.raises(UserError, match="no tensor of a bert model"):
        pretrained.load(str(tmp_path), allow_missing=True)


def test_quantised_tensors_are_refused(tmp_path):
    tensors = tiny.bert_tensors()
    tiny.write_bert(tmp_path, tensors | {"embeddings.LayerNorm.bias": np.ones(16, np.int8)})
    fails(tmp_path, r"embeddings\.LayerNorm\.bias has the type int8; only float checkpoints are read")


def test_what_is_no_checkpoint(bert, tmp_path):
    fails(tmp_path, r"config\.json is missing; a Hugging Face checkpoint directory is needed")
    fails(bert / "config.json", "a checkpoint is a directory with config.json")
    (tmp_path / "config.json").write_text("{")
    fails(tmp_path, r"config\.json: not JSON")
    (tmp_path / "config.json").write_text("[]")
    fails(tmp_path, r"config\.json: not a JSON object")


def test_a_missing_tokenizer_is_named_when_it_is_asked_for(bert, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(bert / name, tmp_path)
    checkpoint = pretrained.load(str(tmp_path))
    with pytest.raises(UserError, match=r"no tokenizer in it \(tokenizer\.json, .*\); copy it from"):
        _ = checkpoint.tokenizer
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="transformers cannot read the tokenizer"):
        _ = pretrained.load(str(tmp_path)).tokenizer


def test_tensors_are_not_read_before_they_are_asked_for(bert):
    tensors = open_tensors(bert)
    assert tensors["pooler.dense.weight"].shape == (16, 16)
    assert isinstance(tensors["pooler.dense.weight"].read(), np.memmap)
