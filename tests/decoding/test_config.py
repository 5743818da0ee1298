"""Options: whose word counts, and what is refused."""

import json

import jax
import numpy as np
import pytest

import mtl_jax
from mtl_jax.core.errors import UserError
from mtl_jax.decoding import GenerationConfig, fit_to_model, generate, generate_all, resolve

RAW = {"decoder_start_token_id": 2, "eos_token_id": 2, "pad_token_id": 1, "num_beams": 4, "length_penalty": 2.0}


@pytest.fixture(scope="module")
def checkpoint():
    return mtl_jax.pretrained.load("tests/pretrained/fixtures/bart")


def test_call_then_generation_config_then_config_then_defaults(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"num_beams": 3, "max_length": 50, "max_new_tokens": 9}))
    found = resolve(RAW, tmp_path, num_beams=2, length_penalty=None)
    assert (found.num_beams, found.length_penalty, found.length, found.top_k) == (2, 2.0, 10, 50)
    assert resolve(RAW, tmp_path).num_beams == 3
    assert resolve(RAW, None).num_beams == 4
    assert resolve(RAW, None).length == 21  # 20 new tokens, where nobody says a length
    assert resolve(RAW, tmp_path, max_length=30).length == 30  # the call's, not the file's max_new_tokens
    assert resolve({"bos_token_id": 5}, None).start == 5
    assert resolve(RAW, None, min_length=9, min_new_tokens=3).minimum_length == 4  # new tokens go first, as with max_length


def test_null_in_generation_config_takes_back_what_config_says(tmp_path):
    written = {"forced_bos_token_id": None, "num_beams": None, "decoder_start_token_id": None, "bos_token_id": 6}
    (tmp_path / "generation_config.json").write_text(json.dumps(written))
    found = resolve(RAW | {"forced_bos_token_id": 7, "bos_token_id": 5}, tmp_path)
    assert (found.forced_bos_token_id, found.num_beams, found.length_penalty, found.start) == (None, 1, 2.0, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beam": 2}, r"unknown generation option 'num_beam' \(did you mean 'num_beams'\?\)"),
        ({"num_beams": 0}, "num_beams is 0; it must be at least 1"),
        ({"num_beams": 2.5}, "num_beams is 2.5; it must be of type int"),
        ({"max_length": 1}, "max_length is 1, which leaves no room for a token after the start token"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, which leaves no room"),
        ({"early_stopping": "always"}, "early_stopping is 'always'"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"num_beams": 1, "num_return_sequences": 2}, "num_return_sequences is 2, more than num_beams, 1"),
        ({"num_beams": 3, "num_return_sequences": 5, "do_sample": True}, "num_return_sequences is 5, more than num_beams, 3"),
        ({"bad_words_ids": [[]]}, "bad_words_ids has an empty sequence"),
        ({"bad_words_ids": [5]}, "bad_words_ids holds 5; token ids are needed, which are whole numbers"),
        ({"bad_words_ids": "ab"}, "bad_words_ids is 'ab'; it must be a list of lists of token ids"),
        ({"eos_token_id": "</s>"}, r"eos_token_id holds \['</s>'\]; token ids are needed"),
        ({"early_stopping": 1}, "early_stopping is 1; it must be True, False or"),
        ({"min_new_tokens": -1}, "min_new_tokens is -1; it must be at least 0"),
        ({"length_penalty": float("nan")}, "length_penalty is nan; it must be a finite number"),
    ],
)
def test_refused(options, message):
    with pytest.raises(UserError, match=message):
        resolve(RAW, None, **options)


def test_refused_files(tmp_path):
    with pytest.raises(UserError, match="decoder_start_token_id is not known"):
        resolve({}, None)
    with pytest.raises(UserError, match=r"config\.json: diversity_penalty is 0\.5, which is not supported here"):
        resolve(RAW | {"diversity_penalty": 0.5}, None)
    with pytest.raises(UserError, match=r"config\.json: stop_strings is 'end', which is not supported here; set it to None"):
        resolve(RAW | {"stop_strings": "end"}, None)
    with pytest.raises(UserError, match=r"config\.json: max_length is 20\.0; it must be of type int"):
        resolve(RAW | {"max_length": 20.0}, None)
    # What only changes draws is nothing to greedy search, and a later file takes back what an earlier one says.
    resolve(RAW | {"min_p": 0.1}, None)
    with pytest.raises(UserError, match=r"config\.json: min_p is 0\.1, which is not supported here"):
        resolve(RAW | {"min_p": 0.1}, None, do_sample=True)
    (tmp_path / "generation_config.json").write_text('{"diversity_penalty": 0.0}')
    resolve(RAW | {"diversity_penalty": 0.5}, tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json: not JSON"):
        resolve(RAW, tmp_path)


def test_refused_with_a_model(checkpoint):
    model = checkpoint.model
    with pytest.raises(UserError, match="token 99 of the generation options is outside the vocabulary of 40"):
        fit_to_model(model, resolve(RAW, None, forced_bos_token_id=99))
    with pytest.raises(UserError, match="the least length, 16, is above the largest, 15 tokens"):
        fit_to_model(model, resolve(RAW, None, min_length=16, max_length=15))
    assert fit_to_model(model, resolve(RAW, None, min_length=15, max_length=15)).minimum_length == 15
    assert fit_to_model(model, resolve(RAW, None, max_length=500)).length == 16  # all positions that there are
    with pytest.raises(UserError, match="the least length, 17, is above the largest, 16 tokens"):
        fit_to_model(model, resolve(RAW, None, min_length=17, max_length=500))
    for token in (-1, 40):
        with pytest.raises(UserError, match=f"input_ids holds {token}; the model knows 40 tokens"):
            generate(checkpoint, np.array([[5, token]]))
    with pytest.raises(UserError, match="a source of 17 tokens is too long for this model; it has 16 positions"):
        generate(checkpoint, np.full((1, 17), 5))
    with pytest.raises(UserError, match="do_sample needs a key"):
        generate(checkpoint, np.full((1, 3), 5), do_sample=True)
    with pytest.raises(UserError, match=r"input_ids has the shape \(3,\)"):
        generate(checkpoint, np.full(3, 5))
    encoder = mtl_jax.pretrained.load("tests/pretrained/fixtures/bart", head=None)
    with pytest.raises(UserError, match=r"bart .* generates no text"):
        generate(encoder, np.full((1, 3), 5))
    with pytest.raises(UserError, match="source 1 has no tokens"):
        list(generate_all(model, checkpoint.params, [np.array([3]), np.array([], np.int32)], resolve(RAW, None)))
    assert list(generate_all(model, checkpoint.params, [], resolve(RAW, None))) == []


def test_a_draw_needs_its_key_only(checkpoint):
    """The same key gives the same texts, whatever stands beside them in a batch; another key gives others."""
    config = resolve(RAW, None, num_beams=1, do_sample=True, top_k=0, max_length=14, num_return_sequences=2)
    sources = [np.arange(3, 3 + length, dtype=np.int32) for length in (9, 3, 5, 7, 4)]

    def drawn(seed, rows):
        found = generate_all(checkpoint.model, checkpoint.params, sources, config, rows=rows, key=jax.random.key(seed))
        return {answer.index: [tokens.tolist() for tokens in answer.tokens] for answer in found}

    first = drawn(0, 2)
    assert sorted(first) == [0, 1, 2, 3, 4]
    assert first == drawn(0, 8)
    assert first != drawn(1, 2)
    assert all(one != other for one, other in first.values())


def test_defaults_are_those_of_transformers():
    import transformers

    theirs = transformers.GenerationConfig()._get_default_generation_params()
    ours = GenerationConfig()
    for name in ("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "temperature", "top_k", "top_p"):
        assert getattr(ours, name) == theirs[name]
    for name in ("repetition_penalty", "length_penalty", "no_repeat_ngram_size", "num_return_sequences"):
        assert getattr(ours, name) == theirs[name]
