"""Every field of config.json and generation_config.json with values that make no sense: one short line, or a model."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_seq2seq
from safetensors.numpy import load_file, save_file

from mtl_jax import decoding, pretrained
from mtl_jax.core.errors import UserError
from mtl_jax.decoding.config import FIELDS
from mtl_jax.inference.text_model import TextRequest, from_checkpoint
from mtl_jax.pretrained import placing

FIXTURES = Path(__file__).parent / "fixtures"
FAMILIES = sorted(folder.name for folder in FIXTURES.iterdir() if folder.is_dir())
NUMBERS = [0, -1, 1.5, 10**6, 10**9, 2**31, 2**63, 10**30, 10**400, -(10**30), 1e-320, 1e308, float("nan"), float("inf")]
VALUES = [*NUMBERS, None, True, "", "x" * 5000, "a\nb", [], [[]], [1] * 10, {}, {"a": []}, {"summarization": [1]}]
EXTRA = ["dtype", "id2label", "num_labels", "architectures", "task_specific_params", "decoder_start_token_id", "hidden_act"]


def fields(family):
    return sorted({*json.loads((FIXTURES / family / "config.json").read_text()), *EXTRA})


CASES = [(family, field, value) for family in FAMILIES for field in fields(family) for value in VALUES]
SAMPLE = random.Random(0).sample(CASES, 60)
NAMED = [
    ("bert_rows", "hidden_act", []),
    ("bert_rows", "hidden_size", 2**63),
    ("bert_rows", "vocab_size", 10**30),
    ("bert_rows", "intermediate_size", 10**9),
    ("bert_rows", "num_hidden_layers", 10**9),
    ("bert_rows", "num_hidden_layers", 999),
    ("modernbert_rows", "num_hidden_layers", 10**9),
    ("marian", "max_position_embeddings", 10**9),
    ("t5", "d_kv", 10**9),
    ("t5", "relative_attention_max_distance", 10**9),
    ("bart", "id2label", []),
    ("marian", "id2label", ["a"]),
    ("bert_rows", "num_labels", 10**9),
]


def one_short_line(error):
    assert "\n" not in str(error)
    assert len(str(error)) < 700, str(error)


def opens(family, field, value, folder):
    """Opens a copy of a checkpoint with that value; the error, or None."""
    shutil.copytree(FIXTURES / family, folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, field: value}))
    try:
        checkpoint = pretrained.load(str(folder))
        assert len(checkpoint.labels) == checkpoint.config.num_labels
        if checkpoint.head == "seq2seq_lm":
            decoding.fit_to_model(checkpoint.model, decoding.resolve(checkpoint.raw, checkpoint.location))
            from_checkpoint(str(folder), TextRequest("summarization"))
    except UserError as error:
        one_short_line(error)
        return error
    return None


@pytest.mark.parametrize("case", range(len(SAMPLE)))
def test_a_field_of_nonsense(tmp_path, case):
    opens(*SAMPLE[case], tmp_path / "model")


@pytest.mark.parametrize(("family", "field", "value"), NAMED)
def test_a_field_that_is_refused(tmp_path, family, field, value):
    if field in ("id2label", "num_labels"):  # read last of all where the file has labels
        assert opens(family, field, value, tmp_path / "model") is not None
        return
    error = str(opens(family, field, value, tmp_path / "model"))
    assert field in error or "layers" in error
    assert error.startswith(f"{tmp_path / 'model'}/config.json: ") or "unknown hidden_act" in error


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_of_nonsense(tmp_path, family):
    for number, case in enumerate(case for case in CASES if case[0] == family):
        opens(*case, tmp_path / str(number))
        shutil.rmtree(tmp_path / str(number))


def test_no_size_is_built_that_the_file_does_not_have(tmp_path):
    """A file of other tensors, however many, vouches for no size."""
    shutil.copytree(FIXTURES / "bert_rows", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    empty = {"empty": np.zeros((0, 10**9), np.float32)}
    save_file(
        tensors | empty | {f"x.{i}": np.zeros(0, np.float32) for i in range(2000)}, tmp_path / "model" / "model.safetensors"
    )
    raw = json.loads((tmp_path / "model" / "config.json").read_text())
    for field in ("vocab_size", "intermediate_size", "max_position_embeddings", "type_vocab_size"):
        (tmp_path / "model" / "config.json").write_text(json.dumps({**raw, field: 10**9}))
        with pytest.raises(
            UserError, match=rf"config\.json: {field} is 1000000000, but no tensor of the file has a side longer"
        ):
            pretrained.load(str(tmp_path / "model"))


def test_a_wrapped_name_is_looked_up_in_one_pass():
    names = ["a.b.weight", "weight", "b.weight"]
    tensors = dict.fromkeys(["module.a.b.weight", "a.b.weight", "weight", "xa.b.weight", "m.n.b.weight", "b.weightx"])
    slow = {n: [t.removesuffix(n) for t in tensors if t == n or t.endswith(f".{n}")] for n in names}
    assert placing._prefixes(names, tensors) == slow


GENERATION = [(field, value) for field in FIELDS for value in [*VALUES, [10**30], [1] * 20_000, [[1]] * 20_000]]
SOME_GENERATION = [
    *random.Random(0).sample(GENERATION, 60),
    ("num_beams", 10**6),
    ("max_length", 10**9),
    ("temperature", 1e-320),
]


@pytest.fixture(scope="module")
def marian(tmp_path_factory):
    return tiny_seq2seq.write_marian(tmp_path_factory.mktemp("hostile") / "marian")


def resolved(folder, model, field, value):
    (folder / "generation_config.json").write_text(json.dumps({"decoder_start_token_id": 0, field: value}))
    try:
        config = decoding.fit_to_model(model, decoding.resolve({}, folder))
    except UserError as error:
        one_short_line(error)
        return None
    return config


@pytest.mark.parametrize("cases", [SOME_GENERATION, pytest.param(GENERATION, marks=pytest.mark.long)], ids=["some", "all"])
def test_options_of_generation_of_nonsense(marian, tmp_path, cases):
    model = pretrained.load(str(marian)).model
    for field, value in cases:
        config = resolved(tmp_path, model, field, value)
        assert config is None or (config.num_beams <= 1000 and config.length <= 100_000)
        if config is not None:
            numbers = [np.float32(getattr(config, name)) for name in ("temperature", "length_penalty", "repetition_penalty")]
            assert np.isfinite(numbers).all()
            assert numbers[0] > 0


def test_generation_config_that_is_no_file(marian, tmp_path):
    (tmp_path / "generation_config.json").mkdir()
    with pytest.raises(UserError, match=r"generation_config\.json: not a regular file"):
        decoding.resolve({}, tmp_path)
