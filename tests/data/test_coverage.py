"""Tokens that a model has no row for, and how much of a text a vocabulary does not know."""

import json

import numpy as np
import pytest
import tiny_seq2seq
from hypothesis import given
from hypothesis import strategies as st
from vocabularies import bert_like, roberta_like

from mtl_jax import Classification, MaskedLM, Seq2Seq, Source, pretrained
from mtl_jax.core.errors import UserError
from mtl_jax.data import coverage
from mtl_jax.data.coverage import Tables
from mtl_jax.data.examples import read_examples
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.ragged import Ragged
from mtl_jax.models.seq2seq_layers import Seq2SeqConfig
from mtl_jax.models.trunk_output import TrunkFacts
from mtl_jax.pretrained.locate import languages

BERT, ROBERTA = bert_like(), roberta_like()
SIZE = len(BERT)


@given(st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=6), st.integers(0, 10), st.booleans())
def test_the_first_token_beyond_a_table(arrays, rows, ragged):
    wanted = {i: next(t for t in array if t >= rows) for i, array in enumerate(arrays) if any(t >= rows for t in array)}
    given_arrays = Ragged.of(arrays, np.int32) if ragged else [np.array(array, np.int32) for array in arrays]
    assert coverage.out_of_range(given_arrays, rows) == wanted


def part(texts, *, pair=None, tasks=(), tokenizer=BERT, length=64):
    columns = {"text": "", "pair": "", "target": None}
    rows = [
        Row({**columns, **(text if isinstance(text, dict) else {"text": text})}, f"f:{i}") for i, text in enumerate(texts, 1)
    ]
    return read_examples(
        Source(name="s", path="", text="text", pair=pair or ""), tasks, rows, tokenizer, length, "rows"
    ).examples


def facts(tokenizer, rows):
    return TrunkFacts(tokenizer, 8, (rows, 8), None, None, None, None)


def seq2seq(rows, **fields):
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_heads", "decoder_heads"), 1)
    sizes |= dict.fromkeys(("hidden_size", "encoder_feed_forward", "decoder_feed_forward"), 8)
    decoder = Seq2SeqConfig(vocab_size=rows, decoder_vocab_size=rows, max_positions=32, **sizes)
    return Seq2Seq(name="t", source="s", column="target", decoder=decoder, **fields)


def with_token(token="<ent>"):
    tokenizer = bert_like()
    tokenizer.add_tokens([token])
    return tokenizer


def test_a_token_beyond_the_table_is_named_with_its_line():
    examples = part(["ab", "a <ent>", "<ent>", "b"], tokenizer=with_token())
    found = coverage.unreadable_rows(examples, with_token(), Tables(SIZE))
    assert [*found] == [1, 2]
    assert found[1].startswith(f"the token '<ent>' has the id {SIZE}, but the token table of the trunk has {SIZE} rows; ")
    with pytest.raises(UserError, match="f:2: the token '<ent>'"):
        coverage.check([examples], (), with_token(), Tables(SIZE))
    coverage.check([examples], (), with_token(), Tables(SIZE + 1))
    coverage.check([part(["ab"], tokenizer=with_token())], (), with_token(), Tables(SIZE))  # it is not used


def test_a_type_of_token_beyond_its_table_is_refused():
    """A vocabulary like BERT's on a trunk like RoBERTa, which has one type only."""
    examples = part([{"text": "a", "pair": "b"}], pair="pair")
    with pytest.raises(UserError, match="f:1: a token has the type 1, but the trunk has 1 types of tokens"):
        coverage.check([examples], (), BERT, Tables(SIZE, 1))
    coverage.check([examples], (), BERT, Tables(SIZE, 2))
    coverage.check([examples], (), BERT, Tables(SIZE))


def test_a_target_beyond_the_decoder_is_refused():
    texts = [{"text": "a", "target": "b"}, {"text": "b", "target": "a <ent>"}]
    task = seq2seq(SIZE)
    examples = part(texts, tasks=(task,), tokenizer=with_token())
    with pytest.raises(UserError, match=r"f:2: task 't': the token '<ent>' .* the decoder's vocabulary has"):
        coverage.check([examples], (task,), with_token(), Tables(SIZE))
    coverage.check([examples], (seq2seq(SIZE + 1),), with_token(), Tables(SIZE))


def test_a_masked_lm_leaves_out_what_the_table_lacks():
    tokenizer = bert_like()
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    task = MaskedLM(name="lm", source="s")
    found = task.on(facts(tokenizer, SIZE + 1)).filled([], tokenizer)
    assert (found.vocabulary, found.mask) == (SIZE + 1, SIZE)
    assert SIZE + 1 not in found.special
    rng = np.random.default_rng(0)
    for _ in range(50):
        tokens, _ = found.corrupt(np.arange(4, SIZE, dtype=np.int32), rng)
        assert tokens.max() <= SIZE
    with pytest.raises(UserError, match=rf"task 'lm': the token '\[MASK\]' has the id {SIZE}"):
        task.on(facts(tokenizer, SIZE)).filled([], tokenizer)
    assert task.on(facts(tokenizer, 99)).filled([], tokenizer).vocabulary == len(tokenizer)


def test_unknown_tokens_are_a_line_with_a_word():
    texts = ["ab cd", "ab ไทย 电影", "a b", "cd"]
    (line,) = coverage.remarks("source s", [part(texts)], (), BERT, ["text"])
    # 电 and 影 are words of their own: 3 of ab c ##d ab ? ? ? a b c ##d
    assert line == "source s: the vocabulary does not know 27.3 % of the tokens, such as 'ไทย'"
    parts = [part(["ab cd"]), part(["电"]), part(["ab"])]
    (line,) = coverage.remarks("source s", parts, (), BERT, ["text"])
    assert line == "source s: the vocabulary does not know 0.0/100.0/0.0 % of the tokens (train/dev/test), such as '电'"
    assert coverage.remarks("source s", [part(["ab " * 60 + "电"] * 2 + ["a " * 60] * 9, length=99)], (), BERT, ["text"]) == []
    assert coverage.remarks("s", [part(["ไทย 电影"], tokenizer=ROBERTA)], (), ROBERTA, ["text"]) == []  # bytes know everything


def test_unknown_targets_are_a_line_too():
    task = seq2seq(SIZE)
    examples = part([{"text": "a", "target": "b 电"}], tasks=(task,))
    assert coverage.remarks("source s", [examples], (task,), BERT, ["text"]) == [
        "source s, targets of t: the vocabulary does not know 50.0 % of the tokens, such as '电'"
    ]


def test_a_word_of_a_list_or_of_a_slow_tokenizer(tmp_path):
    assert coverage.unknown_piece(BERT, ["ab", "电影", "cd"]) == "电"
    assert coverage.unknown_piece(BERT, None) is None
    slow = pretrained.load_tokenizer(tiny_seq2seq.write_marian(tmp_path / "marian"))
    assert not slow.is_fast
    assert coverage.unknown_piece(slow, "the film 电影") == "电影"


class Telling:
    """What a tokenizer says of languages."""

    def __init__(self, tokenizer, **said):
        self.tokenizer, self.init_kwargs = tokenizer, said
        self.src_lang = self.tgt_lang = "en_XX"
        self.lang_code_to_id = {f"l{i}_XX": i for i in range(25)}

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


def test_languages_that_nobody_chose_are_refused_or_said():
    """mBART takes English for both sides."""
    unsaid, said = Telling(BERT), Telling(BERT, src_lang="l1_XX", tgt_lang="l2_XX")
    task = Seq2Seq(name="t", source="s", column="target")
    with pytest.raises(UserError, match=r"none is set; .*; languages: l0_XX, .*, l9_XX and 15 more"):
        task.on(facts(unsaid, SIZE))
    with pytest.raises(UserError, match="none is set"):
        task.on(facts(Telling(BERT, src_lang="l1_XX"), SIZE))
    for tokenizer, lines in ((unsaid, ["s: the tokenizer marks every text as en_XX; "]), (said, []), (BERT, [])):
        found = coverage.language_remarks("s", [part(["a"])], (), tokenizer)
        assert [line[: len(lines[0])] for line in found] == lines


@pytest.mark.parametrize("cls", ["MBartTokenizer", "MBart50Tokenizer", "NllbTokenizer"])
def test_tokenizers_that_mark_languages(tmp_path, cls):
    (tmp_path / "sentencepiece.bpe.model").write_bytes(tiny_seq2seq.vocabulary(tiny_seq2seq.ENGLISH))
    for said, told in (({}, False), ({"tgt_lang": "fr_XX"}, False), ({"src_lang": "de_DE", "tgt_lang": "fr_XX"}, True)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": cls, **said}))
        assert bool(languages(pretrained.load_tokenizer(tmp_path))) != told


def test_texts_that_do_not_say_what_to_write(tmp_path):
    marian = pretrained.load_tokenizer(tiny_seq2seq.write_marian(tmp_path / "marian", codes=("fra", "spa")))
    texts = [">>fra<< the film", "a song", ">>spa<< the"]
    examples = part(texts, tokenizer=marian)
    (line,) = coverage.language_remarks("s", [examples], (seq2seq(SIZE),), marian)
    assert line == "s: 1 of 3 texts do not begin with the language that the checkpoint shall write (>>fra<<, >>spa<<)"
    assert coverage.language_remarks("s", [part([texts[0]], tokenizer=marian)], (seq2seq(SIZE),), marian) == []
    label = Classification(name="c", source="s", column="target")
    assert coverage.language_remarks("s", [examples], (label,), marian) == []
