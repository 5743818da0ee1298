"""Languages of text-to-text tasks: the tokens that mark sources and targets, how search begins, and what is refused."""

import dataclasses
import json

import pytest
import tiny_seq2seq

from mtl_jax import Classification, Experiment, Phase, Pretrained, Seq2Seq, Source, pretrained, trunks
from mtl_jax.core.errors import UserError
from mtl_jax.data.examples import read_examples
from mtl_jax.data.formats.rows import Row
from mtl_jax.experiment_checks import check
from mtl_jax.pretrained import language_codes
from mtl_jax.training import text_evaluation

ROWS = [Row({"text": "the film", "french": "a song", "german": "a man"}, "row 1")]
SOURCE = Source(name="s", path="none.jsonl", format="jsonl")


def written(kind, folder):
    write = tiny_seq2seq.write_m2m if kind.startswith(("M2M", "Nllb")) else tiny_seq2seq.write_mbart
    return write(folder, kind, decoder_start_token_id=2)


@pytest.mark.parametrize(
    ("kind", "codes", "begins"),
    [
        ("MBartTokenizer", ("en_XX", "fr_XX", "de_DE"), False),
        ("MBart50Tokenizer", ("en_XX", "fr_XX", "de_DE"), True),
        ("M2M100Tokenizer", ("en", "fr", "de"), True),
        ("NllbTokenizer", ("eng_Latn", "fra_Latn", "deu_Latn"), True),
    ],
)
def test_two_tasks_with_two_target_languages(tmp_path, kind, codes, begins):
    trunk = Pretrained(str(written(kind, tmp_path / "model"))).build([], "float32", decodes=True)
    facts, ids = trunks.facts(trunk), language_codes.ids(trunk.tokenizer)
    english, french, german = (ids[code] for code in codes)
    tasks = [
        Seq2Seq(name=name, source="s", column=name, target_length=16, source_language=codes[0], target_language=code).on(facts)
        for name, code in zip(("french", "german"), codes[1:], strict=True)
    ]
    examples = read_examples(SOURCE, tasks, ROWS, trunk.tokenizer, 16, "rows").examples
    source = examples.tokens[0].tolist()
    assert source[0 if kind != "MBartTokenizer" else -1] == english
    for task, language in zip(tasks, (french, german), strict=True):
        target = examples.labels[task.name][0].tolist()
        config = text_evaluation.generation_config(task, trunk, 1)
        assert target[0 if begins else -1] == language
        assert (config.decoder_start_token_id, config.forced_bos_token_id) == ((2, language) if begins else (language, None))
        assert task.start == target[-1]
    assert trunk.tokenizer.tgt_lang != codes[2]  # the trunk's tokenizer stays as it was


def test_what_is_refused(tmp_path):
    facts = trunks.facts(Pretrained(str(written("M2M100Tokenizer", tmp_path / "model"))).build([], "float32", decodes=True))
    task = Seq2Seq(name="t", source="s", column="french", target_length=16, source_language="en")
    with pytest.raises(
        UserError, match=r"marks target by language, and none is set; give target_language, or tgt_lang .*90 more"
    ):
        task.on(facts)
    with pytest.raises(UserError, match=r"unknown target_language of task 't': 'fra' .* and 90 more"):
        dataclasses.replace(task, target_language="fra").on(facts)
    with pytest.raises(UserError, match="source_language is 'en', but the trunk's tokenizer has no languages; leave it out"):
        task.on(facts._replace(tokenizer=object()))
    other = dataclasses.replace(task, name="u", source_language="de")
    declared = Experiment(
        name="e", trunk=Pretrained("m"), sources=(SOURCE,), tasks=(task, other), phases=(Phase("p", steps=1),)
    )
    with pytest.raises(
        UserError, match=r"source 's': a text has one language, but source_language is 'en' in task 't' and 'de'"
    ):
        check(declared)


def test_other_tasks_have_no_languages():
    assert Classification(name="c", source="s", column="label").languages == ("", "")


def test_bytes_need_no_vocabulary(tmp_path):
    """ByT5 is T5 over bytes; its directory has no vocabulary."""
    settings = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = pretrained.load_tokenizer(tmp_path)
    assert tokenizer("hé")["input_ids"] == [3 + byte for byte in "hé".encode()] + [1]
    tokenizer.save_pretrained(tmp_path / "again")
    assert pretrained.load_tokenizer(tmp_path / "again")("a")["input_ids"] == [100, 1]
