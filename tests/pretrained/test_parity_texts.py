"""Texts that transformers' own models and tokenizers give for texts are those that ours give."""

import pytest
import tiny_seq2seq

from mtl_jax.inference import generate_texts
from mtl_jax.inference.text_model import TextRequest, from_checkpoint

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
