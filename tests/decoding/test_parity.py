"""Token for token what generate() of transformers gives, on random tiny models."""

import itertools
import random

import numpy as np
import pytest

import mtl_jax
from mtl_jax.decoding import generate

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BART = {
    "vocab_size": 60,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 64,
    "init_std": 0.3,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
MODELS = {
    "marian": lambda: transformers.MarianMTModel(
        transformers.MarianConfig(**BART | {"pad_token_id": 59, "eos_token_id": 0, "decoder_start_token_id": 59})
    ),
    "bart": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**BART | {"forced_eos_token_id": 2})),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=60,
            d_model=16,
            d_kv=6,
            d_ff=20,
            num_layers=2,
            num_heads=3,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=7,
            initializer_factor=1.0,
            decoder_start_token_id=0,
        )
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """The same model here and there; it ends its sentences at various lengths."""
    torch.manual_seed(1)
    model = MODELS[request.param]().eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.ndim == 1 and "norm" not in name:
                tensor.add_(0.3 * torch.randn(tensor.shape))
            if name == "final_logits_bias":
                tensor.add_(0.5 * torch.randn(tensor.shape))
                tensor[0, model.config.eos_token_id] += {"bart": 4.0, "marian": 4.2}[request.param]
            if name == "shared.weight" and request.param == "t5":
                tensor[model.config.eos_token_id] *= 3
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, mtl_jax.pretrained.load(str(folder))


def batch(seed=0, rows=4, longest=9):
    rng = np.random.default_rng(seed)
    ids, mask = rng.integers(3, 58, (rows, longest)).astype(np.int32), np.ones((rows, longest), np.int32)
    for row, length in enumerate(rng.integers(2, longest + 1, rows)):
        mask[row, length:] = 0
    return ids, mask


def assert_same(pair, ids, mask, **options):
    model, checkpoint = pair
    with torch.no_grad():
        theirs = model.generate(
            torch.from_numpy(ids).long(),
            attention_mask=torch.from_numpy(mask).long(),
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
    tokens, scores = generate(checkpoint, ids, mask, **options)
    np.testing.assert_array_equal(tokens, theirs.sequences.numpy())
    if options.get("num_beams", 1) > 1:
        expected = theirs.sequences_scores.numpy()
    else:  # the mean over the tokens up to the end
        each = model.compute_transition_scores(theirs.sequences, theirs.scores, normalize_logits=True).numpy()
        ends = np.isin(tokens[:, 1:], options.get("eos_token_id", model.config.eos_token_id))
        counted = np.cumsum(ends, axis=1) - ends == 0
        expected = np.where(counted, each, 0.0).sum(axis=1) / counted.sum(axis=1)
    np.testing.assert_allclose(scores, expected, atol=1e-4, rtol=1e-5)
    return tokens


GRID = list(itertools.product(MODELS, range(1, 7), (False, True)))  # model, beams, renormalize_logits
NUMBERS = list(itertools.product((1.0, 0.0, 2.0, -1.0), (True, False, "never")))  # length_penalty, early_stopping
CHOSEN = [case for model in MODELS for case in random.Random(model).sample([case for case in GRID if case[0] == model], 3)]


def assert_same_for_all_numbers(pair, beams, renormalise, numbers):
    """Where a search ends depends on early stopping and on the penalty of lengths; they are numbers of one program.

    Not only the limit ends a search, or the numbers would mean nothing.
    """
    lengths, rows = set(), 1 + beams % 4
    for number, (penalty, early) in numbers:
        ids, mask = batch(seed=number, rows=rows)
        options = {"num_beams": beams, "max_length": 18}
        if beams > 1:  # else they mean nothing, and transformers says so
            options |= {"early_stopping": early, "length_penalty": penalty}
        # What the penalty or what may not be said leaves is no distribution; and the others would say one word over and over.
        options |= {"repetition_penalty": 1.3} if pair[0].config.model_type == "marian" else {"no_repeat_ngram_size": 2}
        options |= {"renormalize_logits": renormalise}
        tokens = assert_same(pair, ids, mask, **options)
        lengths |= set((tokens[:, 1:] == pair[0].config.eos_token_id).argmax(axis=1).tolist())
    assert len(lengths) > (rows > 1)


@pytest.mark.parametrize(("pair", "beams", "renormalise"), CHOSEN, indirect=["pair"])
def test_beams(pair, beams, renormalise):
    """A part of the grid, with other numbers for each."""
    numbers = random.Random(f"{pair[0].config.model_type} {beams}").sample(list(enumerate(NUMBERS)), 5)
    assert_same_for_all_numbers(pair, beams, renormalise, numbers)


@pytest.mark.long
@pytest.mark.parametrize(("pair", "beams", "renormalise"), GRID, indirect=["pair"])
def test_all_of_the_grid(pair, beams, renormalise):
    assert_same_for_all_numbers(pair, beams, renormalise, list(enumerate(NUMBERS)))


OPTIONS = {
    "greedy": {},
    "renormalised": {"num_beams": 3, "renormalize_logits": True, "repetition_penalty": 1.3},
    "repetition": {"repetition_penalty": 1.7},
    "n-grams": {"num_beams": 2, "no_repeat_ngram_size": 2},
    "words": {"num_beams": 3, "bad_words_ids": [[5], [7, 8], [9], [11], [20, 21, 22], [33, 40], [40, 33]]},
    "least": {"num_beams": 2, "min_length": 9},
    "least_new": {"min_new_tokens": 6, "max_new_tokens": 9},
    "forced": {"num_beams": 3, "forced_bos_token_id": 17, "forced_eos_token_id": 2},
    "several": {"num_beams": 5, "num_return_sequences": 4},
    "two_ends": {"num_beams": 3, "eos_token_id": [2, 5, 7]},
    "after_the_start": {"bad_words_ids": [[59, 20], [59, 42], [0]]},  # the start token counts; an end cannot be forbidden
    "short_of_min": {"min_length": 12, "min_new_tokens": 3},  # new tokens go first
    "unigrams": {"no_repeat_ngram_size": 1},
}


@pytest.mark.parametrize("pair", ["marian"], indirect=True)  # what changes scores does not know the model
@pytest.mark.parametrize("name", OPTIONS)
def test_options(pair, name):
    options = OPTIONS[name]
    for seed in range(4):
        ids, mask = batch(seed=seed, rows=3)
        assert_same(pair, ids, mask, **{"max_length": 16} | options if "max_new_tokens" not in options else options)


@pytest.mark.parametrize("pair", ["bart", "t5"], indirect=True)  # positions as vectors and as a bias
def test_longer_than_the_first_cache(pair):
    """The cache grows; what is in it stays."""
    ids, mask = batch(rows=2)
    assert assert_same(pair, ids, mask, num_beams=3, min_length=50, max_length=60).shape[1] >= 50


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
@pytest.mark.parametrize("pair", ["t5"], indirect=True)
def test_nobody_says_how_long(pair):
    ids, mask = batch(rows=2)
    assert assert_same(pair, ids, mask).shape[1] == 21
