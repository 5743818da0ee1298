"""What each family is told beside the text, and plain text out of each tokenizer."""

import json
import re

import finished_runs
import numpy as np
import pytest
import tiny_seq2seq
import tiny_translation

from mtl_jax import pretrained
from mtl_jax.core.errors import UserError
from mtl_jax.inference import answer_texts
from mtl_jax.inference.generate_texts import configure, make_plan
from mtl_jax.inference.text_model import TextRequest, from_checkpoint, from_run, of_checkpoint

TRANSLATE = TextRequest("translation")


def test_marian_puts_pieces_together_with_the_vocabulary_of_the_target(tmp_path):
    model = from_checkpoint(str(tiny_seq2seq.write_marian(tmp_path / "marian")), TRANSLATE)
    known = json.loads((tmp_path / "marian" / "vocab.json").read_text(encoding="utf-8"))
    tokens = [known["▁le"], known["▁film"], known["<pad>"], known["."], known["</s>"]]
    assert model.decode(np.array(tokens)) == "le film."
    (ids,) = model.encode(["the film"], None)
    assert ids.dtype == np.int32
    assert ids.tolist() == [known["▁the"], known["▁film"], known["</s>"]]
    assert model.encode(["the film"], 2)[0].tolist() == [known["▁the"], known["</s>"]]
    assert (model.max_positions, model.max_source) == (24, 24)


def test_marian_of_several_languages_reads_the_language_in_front_of_the_text(tmp_path):
    folder = str(tiny_seq2seq.write_marian(tmp_path / "marian", codes=("fra", "spa")))
    model = from_checkpoint(folder, TRANSLATE._replace(target="spa"))
    assert model.setting.prefix == ">>spa<< "
    known = json.loads((tmp_path / "marian" / "vocab.json").read_text(encoding="utf-8"))
    assert model.encode([model.setting.prefix + "the"], None)[0].tolist() == [known[">>spa<<"], known["▁the"], known["</s>"]]
    with pytest.raises(UserError, match=r"unknown target language of .*: 'spo' \(did you mean 'spa'\?\); choices: fra, spa"):
        from_checkpoint(folder, TRANSLATE._replace(target="spo"))


@pytest.mark.parametrize(
    ("cls", "source", "start"),
    [
        ("MBartTokenizer", ["the", "</s>", "de_DE"], {"decoder_start_token_id": "fr_XX"}),
        ("MBart50Tokenizer", ["de_DE", "the", "</s>"], {"decoder_start_token_id": "</s>", "forced_bos_token_id": "fr_XX"}),
    ],
)
def test_mbart_is_told_the_languages_by_tokens(tmp_path, cls, source, start):
    """As the documentation of both shows: mBART begins with the language, mBART-50 with </s> and then the language."""
    folder = tiny_seq2seq.write_mbart(tmp_path / "mbart", cls)
    tokenizer = pretrained.load_tokenizer(folder)
    model = from_checkpoint(str(folder), TRANSLATE._replace(source="de_DE", target="fr_XX"))
    pieces = tokenizer("the", add_special_tokens=False)["input_ids"]
    around = tokenizer.convert_ids_to_tokens([i for i in model.encode(["the"], None)[0].tolist() if i not in pieces])
    assert around == [token for token in source if token != "the"]
    config = configure(model, {}, "mbart")
    found = {name: tokenizer.convert_ids_to_tokens(getattr(config, name)) for name in start}
    assert found == start
    french = tokenizer.convert_tokens_to_ids("fr_XX")
    assert model.decode([2, french, *pieces, 2, 1]) == "the"
    with pytest.raises(UserError, match="the model writes several languages; choose one by --target-language: ar_AR, "):
        configure(from_checkpoint(str(folder), TRANSLATE), {}, "mbart")
    with pytest.raises(UserError, match=r"unknown language of .*: 'fr'"):
        from_checkpoint(str(folder), TRANSLATE._replace(target="fr"))


def test_an_open_checkpoint_keeps_its_own_languages(tmp_path):
    """Those of one request are not those of the next."""
    folder = tiny_seq2seq.write_mbart(tmp_path / "mbart", "MBartTokenizer")
    checkpoint, french = pretrained.load(str(folder)), TRANSLATE._replace(target="fr_XX")
    languages = checkpoint.tokenizer.src_lang, checkpoint.tokenizer.tgt_lang
    german = of_checkpoint(checkpoint, "mbart", french._replace(source="de_DE")).encode(["the"], None)[0].tolist()
    (found,), (expected,) = (
        model.encode(["the"], None)
        for model in (of_checkpoint(checkpoint, "mbart", french), from_checkpoint(str(folder), french))
    )
    assert found.tolist() == expected.tolist() != german
    assert (checkpoint.tokenizer.src_lang, checkpoint.tokenizer.tgt_lang) == languages


def test_mbart_that_was_tuned_to_one_pair_needs_no_language(tmp_path):
    size = 36  # of the first language
    folder = tiny_seq2seq.write_mbart(tmp_path / "mbart", "MBartTokenizer", decoder_start_token_id=size)
    model = from_checkpoint(str(folder), TRANSLATE)
    code = next(iter(model.setting.languages.values()))
    tuned = model._replace(raw={**model.raw, "decoder_start_token_id": code})
    assert configure(tuned, {}, "mbart").decoder_start_token_id == code


def test_t5_reads_its_task_in_front_of_the_text(tmp_path):
    folder = str(tiny_seq2seq.write_t5(tmp_path / "t5"))
    assert from_checkpoint(folder, TextRequest("summarization")).setting.prefix == "summarize: "
    german = from_checkpoint(folder, TextRequest("translation", "en", "de"))
    assert german.setting.prefix == "translate English to German: "
    assert configure(german, {"max_length": None}, "t5").num_beams == 3
    assert configure(german, {"num_beams": 1}, "t5").num_beams == 1
    assert from_checkpoint(folder, TextRequest("translation", prefix="say in Finnish: ")).setting.prefix == "say in Finnish: "
    with pytest.raises(UserError, match="choose by --source-language and --target-language"):
        from_checkpoint(folder, TextRequest("translation", "en", "fi"))
    assert (german.max_positions, german.max_source) == (None, 40)


def test_answers_stay_on_one_line(tmp_path):
    """Vocabularies of bytes can write line feeds."""
    from mtl_jax.inference.text_model import decoder

    class Bytes:
        def decode(self, tokens, skip_special_tokens):
            return bytes(tokens).decode()

    assert decoder(Bytes())(list(b" a\n\r\nb\x0b c\n")) == "a b c"


def test_a_tokenizer_of_another_model_is_noticed(tmp_path):
    folder = tiny_seq2seq.write_marian(tmp_path / "marian")
    known = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    known["▁the"] = 500
    (folder / "vocab.json").write_text(json.dumps(known), encoding="utf-8")
    model = from_checkpoint(str(folder), TRANSLATE)
    with pytest.raises(UserError, match=r"the token '▁the' has the id 500, but the model's token table has 1.. rows"):
        model.encode(["the"], None)
    whole = make_plan(model, ["film", "", "song"], "cut", None)
    plan = make_plan(model, ["film", "the film", "", "song"], "cut", None)
    assert [ids.tolist() for ids in plan.sources] == [ids.tolist() for ids in whole.sources]
    assert (plan.text_of, [*plan.refused], [*whole.refused]) == ([0, 3], [1], [])
    with pytest.raises(UserError, match="text 2: the token '▁the' has the id 500"):
        make_plan(model, ["", "the film"], "cut", None)
    with pytest.raises(UserError, match="prefix and special tokens: the token '▁the' has the id 500"):
        make_plan(model._replace(setting=model.setting._replace(prefix="the ")), ["film"], "cut", None)


def test_a_translation_says_what_its_vocabulary_does_not_know(tmp_path):
    model = from_checkpoint(str(tiny_seq2seq.write_marian(tmp_path / "marian")), TRANSLATE)
    assert make_plan(model, ["the film", "a song"], "cut", None).remarks == []
    (line,) = make_plan(model, ["the film", "the 电影"], "cut", None).remarks
    assert re.fullmatch(r"texts: the vocabulary does not know [\d.]+ % of the tokens, such as '电影'", line)


def test_the_log_of_a_private_run_has_no_texts(tmp_path, caplog):
    tiny_translation.write_data(tmp_path)
    finished_runs.write(tmp_path / "run", tiny_translation.experiment(tmp_path, private=True))
    assert from_run(tmp_path / "run", TRANSLATE).private
    model = from_checkpoint(str(tiny_seq2seq.write_marian(tmp_path / "marian")), TRANSLATE)
    for private in (True, False):
        caplog.clear()
        config = configure(model, {"max_new_tokens": 2}, "marian")
        answer_texts.generate(model._replace(private=private), ["the 电影"], config, "cut", None, rows=1, seed=0)
        assert "the vocabulary does not know" in caplog.text
        assert ("电影" in caplog.text) != private


def test_classes_that_cannot_write_are_named(tmp_path):
    folder = tiny_seq2seq.write_marian(tmp_path / "marian")
    raw = json.loads((folder / "config.json").read_text())
    for changed, message in (
        (
            {"model_type": "bart", "architectures": ["BartForSequenceClassification"]},
            "BartForSequenceClassification cannot",
        ),
        (
            {"architectures": []},
            "marian without a head cannot generate texts; one of MarianMTModel, MarianModel is needed",
        ),
    ):
        (folder / "config.json").write_text(json.dumps(raw | changed))
        with pytest.raises(UserError, match=message):
            from_checkpoint(str(folder), TRANSLATE)


def test_texts_and_choices_from_python(tmp_path):
    """An iterator of texts is a list of them; a choice that does not exist is refused before the model is opened."""
    folder = str(tiny_seq2seq.write_marian(tmp_path / "marian"))
    texts = ["the film", "the"]
    expected = answer_texts.translate(folder, texts, num_beams=1, max_new_tokens=3)
    assert answer_texts.translate(folder, iter(texts), num_beams=1, max_new_tokens=3) == expected
    with pytest.raises(UserError, match=r"unknown dtype 'float16'.*; choices: auto, float32, bfloat16"):
        answer_texts.translate(folder, texts, dtype="float16")
    with pytest.raises(UserError, match="unknown long 'split'; choices: divide, cut"):
        answer_texts.summarize("nowhere", texts, long="split")
