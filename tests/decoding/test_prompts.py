"""Decoder-only models: token for token what generate() of transformers gives, on random tiny models."""

import jax
import numpy as np
import pytest

import mtl_jax
from mtl_jax.core.errors import UserError
from mtl_jax.decoding import generate, generate_all, resolve
from mtl_jax.pretrained import Checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {"sliding_window": 4, "sliding_window_pattern": 2, "query_pre_attn_scalar": 5, "final_logit_softcapping": 2.0}
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**SIZES, **GEMMA)),
}
ENDS = [3, 9, 14, 30, 41]
GREEDY = {"max_new_tokens": 12, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
BEAMS = {"max_length": 20, "num_beams": 3, "num_return_sequences": 2, "length_penalty": 2.0, "early_stopping": "never"}
BEAMS |= {"min_length": 13, "bad_words_ids": [[5], [7, 8]]}
IDS = np.random.default_rng(0).integers(3, 60, (3, 9))
MASK = np.ones_like(IDS)
MASK[1, :3] = MASK[2, :6] = 0


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """name -> (their model, our checkpoint)."""
    made = {}
    for name, build in MODELS.items():
        torch.manual_seed(1)
        model, folder = build().eval(), tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        made[name] = model, mtl_jax.pretrained.load(str(folder))
    return made


def both(model, checkpoint, ids, mask, **options):
    with torch.no_grad():
        expected = model.generate(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), **options).numpy()
    return expected, generate(checkpoint, ids, mask, **options)[0]


@pytest.mark.parametrize(("name", "options"), [("llama", BEAMS), ("gemma3", GREEDY)])
def test_tokens_are_those_of_transformers(models, name, options):
    expected, tokens = both(*models[name], IDS, MASK, eos_token_id=ENDS, **options)
    np.testing.assert_array_equal(tokens, expected)


def test_padding_on_the_right_changes_no_token(models):
    """Gemma's, whose windows count columns; transformers gets the rows padded on the left."""
    model, checkpoint = models["gemma3"]
    options = {**GREEDY, "eos_token_id": ENDS}
    right = np.stack([np.roll(row, real.sum()) for row, real in zip(IDS, MASK, strict=True)])
    expected, tokens = both(model, checkpoint, IDS, MASK, **options)
    again, scores = generate(checkpoint, right, np.sort(MASK)[:, ::-1], **options)
    np.testing.assert_array_equal(again, tokens)

    config = resolve(checkpoint.raw, checkpoint.location, decoder_start_token_id=0, **options)
    prompts = [row[real.astype(bool)].astype(np.int32) for row, real in zip(IDS, MASK, strict=True)]
    for answer in generate_all(checkpoint.model, checkpoint.params, prompts, config, rows=4):
        kept = expected[answer.index, 9 : 9 + len(answer.tokens[0])]
        np.testing.assert_array_equal(answer.tokens[0], kept)
        assert answer.scores[0] == pytest.approx(scores[answer.index], abs=1e-5)


def test_a_sample_depends_on_the_key_alone(models):
    _, checkpoint = models["llama"]
    options = {"do_sample": True, "max_new_tokens": 6, "top_k": 0, "eos_token_id": 59}
    draws = [generate(checkpoint, IDS, key=jax.random.key(key), **options) for key in (0, 0, 1)]
    assert np.array_equal(draws[0][0], draws[1][0])
    assert not np.array_equal(draws[0][0], draws[2][0])
    drawn, scores = draws[0]
    logits = np.asarray(jax.jit(checkpoint.model.apply)({"params": checkpoint.params}, drawn).logits)[:, 8:14]
    chosen = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), drawn[:, 9:15, None], axis=2)
    np.testing.assert_allclose(scores, chosen.mean(axis=(1, 2)), atol=1e-5)


def test_what_cannot_be_generated_is_named(models):
    _, checkpoint = models["llama"]
    with pytest.raises(UserError, match="max_length is 9, and the prompts have 9 tokens"):
        generate(checkpoint, IDS, MASK, max_length=9)
    with pytest.raises(UserError, match="row 1 of input_ids has no real token"):
        generate(checkpoint, IDS, MASK * [[1], [0], [1]], max_new_tokens=2)
    headless = Checkpoint(checkpoint.model.clone(head=None), checkpoint.params, checkpoint.config, checkpoint.raw, None, None)
    with pytest.raises(UserError, match=r"llama \(CausalModel\) generates no text"):
        generate(headless, IDS, MASK)
