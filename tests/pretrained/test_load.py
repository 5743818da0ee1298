import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mtl_jax import pretrained
from mtl_jax.core.errors import UserError


@pytest.fixture(scope="module")
def bert(deep):
    return deep


def renamed(change):
    return {change(name): tensor for name, tensor in tiny.bert_tensors().items()}


@pytest.mark.parametrize(
    "change",
    [
        lambda name: f"bert.{name}",
        lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"),
    ],
    ids=["prefix", "gamma and beta"],
)
def test_older_names_load_to_the_same_parameters(bert, tmp_path, change):
    tiny.write_bert(tmp_path, renamed(change))
    ids = jnp.array([[2, 5, 3]])
    expected, found = pretrained.load(str(bert)), pretrained.load(str(tmp_path))
    np.testing.assert_array_equal(
        found.model.apply({"params": found.params}, ids).hidden,
        expected.model.apply({"params": expected.params}, ids).hidden,
    )


def test_half_precision_files_load_as_float32(tmp_path):
    tiny.write_bert(tmp_path, {name: tensor.astype(np.float16) for name, tensor in tiny.bert_tensors().items()})
    kernel = pretrained.load(str(tmp_path)).params["trunk"]["layer_0"]["attention"]["query"]["kernel"]
    stored = tiny.bert_tensors()["encoder.layer.0.attention.self.query.weight"].astype(np.float16)
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, stored.T.astype(np.float32))


def test_tensors_without_a_place_are_named(tmp_path):
    stray = {"cls.seq_relationship.bias": np.zeros(2, np.float32), "embeddings.position_ids": np.arange(32)}
    tiny.write_bert(tmp_path, tiny.bert_tensors() | stray)
    assert pretrained.load(str(tmp_path)).unused == ("cls.seq_relationship.bias",)


def test_errors_name_the_file_and_the_tensor(tmp_path):
    tensors = tiny.bert_tensors()
    missing = {name: tensor for name, tensor in tensors.items() if "layer.1.output.dense.bias" not in name}
    tiny.write_bert(tmp_path / "missing", missing)
    with pytest.raises(UserError, match=r"missing tensors: encoder\.layer\.1\.output\.dense\.bias"):
        pretrained.load(str(tmp_path / "missing"))

    tiny.write_bert(tmp_path / "shape", tensors | {"embeddings.LayerNorm.weight": np.ones(7, np.float32)})
    with pytest.raises(UserError, match=r"LayerNorm\.weight has shape \(7,\), but config\.json asks for \(16,\)"):
        pretrained.load(str(tmp_path / "shape"))

    with pytest.raises(UserError, match="no such file or directory"):
        pretrained.load(str(tmp_path / "nowhere"))
