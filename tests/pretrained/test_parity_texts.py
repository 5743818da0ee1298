"""Texts that transformers' own models and tokenizers give for texts are those that ours give."""

import pytest
import tiny_seq2seq

from mtl_jax import decoding
from mtl_jax.inference import generate_texts
from mtl_jax.inference.text_model import TextRequest, from_checkpoint
from mtl_jax.pretrained import language_codes

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXTS = [*tiny_seq2seq.sentences(tiny_seq2seq.ENGLISH, 6), "hello 123 , how ?"]


def theirs(folder, cls, texts, before=None, tokenizer_options=None, **options):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **(tokenizer_options or {}))
    model = getattr(transformers, cls).from_pretrained(folder).eval()
    found = []
    for text in texts:
        tokens = model.generate(**tokenizer([(before or "") + text], return_tensors="pt"), **options)
        found.append(tokenizer.decode(tokens[0], skip_special_tokens=True).strip())
    return found


def ours(folder, asked, **options):
    model = from_checkpoint(str(folder), asked)
    plan = generate_texts.make_plan(model, TEXTS, "cut", generate_texts.source_limit(model, None))
    assert not plan.long
    answers = generate_texts.generate(model, plan, generate_texts.configure(model, options, "model"), len(TEXTS), rows=4)
    return [answer.texts[0] for answer in answers]


@pytest.mark.filterwarnings("ignore:Recommended")
def test_marian(tmp_path):
    """The pieces of targets are put together with the target's vocabulary; these two vocabularies agree on how."""
    folder = tiny_seq2seq.write_marian(tmp_path / "marian", codes=("fra", "spa"))
    found = ours(folder, TextRequest("translation", target="fra"), num_beams=3, max_new_tokens=9)
    assert found == theirs(folder, "MarianMTModel", TEXTS, before=">>fra<< ", num_beams=3, max_new_tokens=9)
    assert len(set(found)) > 1


def test_t5(tmp_path):
    folder = tiny_seq2seq.write_t5(tmp_path / "t5", task_specific_params={"summarization": {"prefix": "a ", "num_beams": 2}})
    found = ours(folder, TextRequest("summarization"), max_new_tokens=9)
    assert found == theirs(folder, "T5ForConditionalGeneration", TEXTS, before="a ", num_beams=2, max_new_tokens=9)
    assert len(set(found)) > 1


@pytest.mark.parametrize(
    ("cls", "option"), [("MBartTokenizer", "decoder_start_token_id"), ("MBart50Tokenizer", "forced_bos_token_id")]
)
def test_mbart(tmp_path, cls, option):
    folder = tiny_seq2seq.write_mbart(tmp_path / "mbart", cls, decoder_start_token_id=2, max_position_embeddings=64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, src_lang="de_DE")
    # Most of so small a vocabulary are languages: without them there is some text.
    special = [[token] for token in range(len(tokenizer) + 1) if not tokenizer.decode([token], skip_special_tokens=True)]
    options = {"max_new_tokens": 9, "min_new_tokens": 8, "bad_words_ids": [token for token in special if token != [2]]}
    found = ours(folder, TextRequest("translation", "de_DE", "fr_XX"), **options)
    options[option] = tokenizer.convert_tokens_to_ids("fr_XX")
    assert found == theirs(folder, "MBartForConditionalGeneration", TEXTS, tokenizer_options={"src_lang": "de_DE"}, **options)
    assert all(found)


@pytest.mark.parametrize(
    ("cls", "source", "target"),
    [
        ("M2M100Tokenizer", "de", "fr"),
        pytest.param("NllbTokenizer", "deu_Latn", "fra_Latn", marks=pytest.mark.long),
    ],
)
def test_m2m_and_nllb_begin_with_the_language(tmp_path, cls, source, target):
    """Greedy search with the forced first token, token for token."""
    folder = tiny_seq2seq.write_m2m(tmp_path / "m2m", cls, max_position_embeddings=64)
    model = from_checkpoint(str(folder), TextRequest("translation", source, target))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, src_lang=source)
    codes = language_codes.ids(tokenizer)
    # Most of so small a vocabulary are languages: without them there is some text.
    options = {"max_new_tokens": 9, "bad_words_ids": [[token] for token in codes.values() if token != codes[target]]}
    config = generate_texts.configure(model, options, "model")
    assert (config.decoder_start_token_id, config.forced_bos_token_id) == (2, codes[target])
    reference = transformers.M2M100ForConditionalGeneration.from_pretrained(folder).eval()
    for answer in decoding.generate_all(model.model, model.params, model.encode(TEXTS[:3], None), config, rows=4):
        inputs = tokenizer([TEXTS[answer.index]], return_tensors="pt")
        assert inputs["input_ids"][0, 0] == codes[source]
        (tokens,) = reference.generate(**inputs, forced_bos_token_id=codes[target], **options).tolist()
        assert [2, *answer.tokens[0].tolist()] == tokens
        assert tokens[1] == codes[target]
        assert target not in model.decode(tokens)
