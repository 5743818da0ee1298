"""Damaged files of tokenizers: one short line, or a tokenizer that works; seldom anything else is right."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_seq2seq
from tokenizers import SentencePieceUnigramTokenizer
from vocabularies import bert_like, roberta_like

from mtl_jax.core.errors import UserError
from mtl_jax.data.tokenize import encode
from mtl_jax.inference.text_model import encoder
from mtl_jax.pretrained.locate import _without_panic_traces, foreign, load_tokenizer

TEXTS = ["the film is a b", "电 z\u200d ḟ", "<s> [MASK] </s>", "aab 12,3 don't"]
HUGE = 10**30


def write_fast(folder):
    """tokenizer.json and the files beside it, with a token that was added."""
    tokenizer = bert_like()
    tokenizer.add_tokens(["<ent>"])
    tokenizer.save_pretrained(folder)
    added = {"<ent>": len(tokenizer) - 1}
    (folder / "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")


def write_bytes(folder):
    """tokenizer.json of bytes, as RoBERTa's."""
    roberta_like().save_pretrained(folder)


def write_unigram(folder):
    """tokenizer.json with scores, as T5's and XLM-R's."""
    from transformers import PreTrainedTokenizerFast

    backend = SentencePieceUnigramTokenizer()
    words = tiny_seq2seq.sentences(tiny_seq2seq.ENGLISH, 50)
    backend.train_from_iterator(words, vocab_size=60, show_progress=False, unk_token="<unk>", special_tokens=["<unk>", "</s>"])
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)


def write_wordpiece(folder):
    """vocab.txt, as BERT had it."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "film", "a", "b", "##b"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}', encoding="utf-8")


def write_merges(folder):
    """vocab.json and merges.txt, as RoBERTa and BART had them."""
    backend = json.loads(roberta_like().backend_tokenizer.to_str())
    (folder / "vocab.json").write_text(json.dumps(backend["model"]["vocab"] | {"<unk>": 300, "<mask>": 301}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\nĠ a\na b\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "RobertaTokenizer"}', encoding="utf-8")


def write_marian(folder):
    """Two sentencepiece models and a vocab.json."""
    source, target = (tiny_seq2seq.vocabulary(words) for words in (tiny_seq2seq.ENGLISH, tiny_seq2seq.FRENCH))
    (folder / "source.spm").write_bytes(source)
    (folder / "target.spm").write_bytes(target)
    known = ["</s>", "<unk>", *dict.fromkeys(tiny_seq2seq.pieces(source) + tiny_seq2seq.pieces(target)), "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(known)}), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "MarianTokenizer"}', encoding="utf-8")


def write_t5(folder):
    """spiece.model."""
    options = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    (folder / "spiece.model").write_bytes(tiny_seq2seq.vocabulary(tiny_seq2seq.ENGLISH, **options))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 0}', encoding="utf-8")


def write_mbart(folder):
    """sentencepiece.bpe.model."""
    (folder / "sentencepiece.bpe.model").write_bytes(tiny_seq2seq.vocabulary(tiny_seq2seq.ENGLISH))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "MBartTokenizer"}', encoding="utf-8")


WRITERS = {
    "fast": write_fast,
    "bytes": write_bytes,
    "unigram": write_unigram,
    "wordpiece": write_wordpiece,
    "merges": write_merges,
    "marian": write_marian,
    "t5": write_t5,
    "mbart": write_mbart,
}
FILES = {
    "fast": ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"],
    "bytes": ["tokenizer.json", "tokenizer_config.json"],
    "unigram": ["tokenizer.json"],
    "wordpiece": ["vocab.txt", "tokenizer_config.json"],
    "merges": ["vocab.json", "merges.txt"],
    "marian": ["source.spm", "target.spm", "vocab.json", "tokenizer_config.json"],
    "t5": ["spiece.model", "tokenizer_config.json"],
    "mbart": ["sentencepiece.bpe.model", "tokenizer_config.json"],
}


def settings(data, rng):
    """A number of tokenizer_config.json that makes transformers add tokens without end."""
    try:
        value = json.loads(data)
    except ValueError:
        return b"{"
    return json.dumps({**value, "extra_ids": 10**9, "offset": 10**9} if isinstance(value, dict) else value).encode()


def deep(data, rng):
    return b"[" * 100_000


def deep_object(data, rng):
    return b'{"a":' * 500 + b"1" + b"}" * 500


def truncated(data, rng):
    return data[: rng.randrange(len(data))]


def flipped(data, rng):
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 4, 40])):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def _places(value, at=()):
    """Every place in a JSON value, as keys from the top."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value[:5]) if isinstance(value, list) else ()
    for key, below in [*items][:40]:
        yield from _places(below, (*at, key))


def mistyped(data, rng):
    """A value of a JSON file becomes one of another type; of other files, a line does."""
    other = rng.choice([None, [], {}, "", True, -1, 1.5, HUGE, "(", "[^", "\\p{", "x" * 5000, [[]], {"a": {}}, "\0"])
    try:
        value = json.loads(data)
    except ValueError:
        lines = data.split(b"\n")
        lines[rng.randrange(len(lines))] = json.dumps(other).encode()
        return b"\n".join(lines)
    at = rng.choice([*_places(value)])
    if not at:
        return json.dumps(other).encode()
    inside = value
    for key in at[:-1]:
        inside = inside[key]
    inside[at[-1]] = other
    return json.dumps(value).encode()


def bad_regex(data, rng):
    """A pattern that does not compile, or that fails only when a text is read."""
    try:
        value = json.loads(data)
    except ValueError:
        return b"(?P<"
    if isinstance(value, dict) and "pre_tokenizer" in value:
        pattern = rng.choice(["(", "(?<=a+)b", "(a+)+$", "\\g<0>", "[[:bad:]]", "(?i", "\\u{110000}", "(?:a|a)*\\1"])
        value["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return json.dumps(value).encode()


FIXED = {
    "empty": b"",
    "list": b"[]",
    "null": b"null",
    "object": b"{}",
    "number": b"1e999",
    "text": b'"x"',
    "zeros": bytes(4096),
}
DAMAGES = {
    **{name: lambda data, rng, content=content: content for name, content in FIXED.items()},
    **{damage.__name__: damage for damage in (settings, deep, deep_object, truncated, flipped, mistyped, bad_regex)},
}
CASES = [(kind, file, damage) for kind, files in FILES.items() for file in files for damage in DAMAGES]
SAMPLE = random.Random(1).sample(CASES, 60)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A directory of each kind, undamaged."""
    root = tmp_path_factory.mktemp("whole")
    for kind, write in WRITERS.items():
        (root / kind).mkdir()
        write(root / kind)
    return root


def use(folder):
    """Loads a tokenizer and reads texts with it, as training and translating do."""
    tokenizer = load_tokenizer(folder)
    encodings = encode(tokenizer, TEXTS, max_length=16)
    assert encodings.tokens.values.dtype == np.int32
    if tokenizer.is_fast:
        encode(tokenizer, [text.split() for text in TEXTS], max_length=16, windows=True)
    encode(tokenizer, TEXTS, max_length=16, target=True)
    encoder(tokenizer, 2**31)(TEXTS, 8)
    return tokenizer


def damaged(whole, folder, kind, file, damage, seed):
    """Why a damaged copy is refused, in one short line; None where it works."""
    shutil.copytree(whole / kind, folder)
    data = (folder / file).read_bytes()
    (folder / file).write_bytes(DAMAGES[damage](data, random.Random(seed)))
    refused = None
    try:
        use(folder)
    except UserError as error:
        refused = str(error)
    assert refused is None or ("\n" not in refused and len(refused) < 700), refused
    return refused


@pytest.mark.parametrize("kind", WRITERS)
def test_whole_ones_work(whole, kind):
    assert {path.name for path in (whole / kind).iterdir()} >= set(FILES[kind])
    use(whole / kind)


@pytest.mark.parametrize(("kind", "file", "damage"), SAMPLE)
def test_a_damaged_file_is_one_line(whole, tmp_path, kind, file, damage):
    damaged(whole, tmp_path / kind, kind, file, damage, 0)


@pytest.mark.parametrize(
    ("kind", "file", "damage"),
    [
        ("fast", "tokenizer_config.json", "list"),
        ("marian", "source.spm", "truncated"),
        ("fast", "tokenizer.json", "deep"),
        ("t5", "tokenizer_config.json", "settings"),
        ("t5", "spiece.model", "zeros"),
        ("marian", "vocab.json", "null"),
    ],
)
def test_a_damaged_file_is_refused(whole, tmp_path, kind, file, damage):
    assert damaged(whole, tmp_path / kind, kind, file, damage, 0)


@pytest.mark.long
@pytest.mark.parametrize(("kind", "file", "damage"), CASES)
def test_every_damage_is_one_line(whole, tmp_path, kind, file, damage):
    many = damage in ("truncated", "flipped", "mistyped", "bad_regex")
    for seed in range(40 if many else 1):
        damaged(whole, tmp_path / str(seed), kind, file, damage, seed)


class PanicException(BaseException):
    """As pyo3 names what a panic of Rust becomes."""


@pytest.mark.parametrize("error", [PanicException("a\nb"), RecursionError(), TypeError("x"), MemoryError(), KeyError("k")])
def test_what_a_tokenizer_raises_is_one_line(error):
    with pytest.raises(UserError, match=r"^it fails \(") as caught, foreign("it fails"):
        raise error
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), UserError("as it is")])
def test_what_is_not_a_tokenizer_failing_goes_through(error):
    with pytest.raises(type(error)) as caught, foreign("it fails"):
        raise error
    assert caught.value is error


def test_a_panic_at_the_first_text(tmp_path):
    class Panics:
        is_fast = True
        model_input_names = ()

        def __call__(self, **given):
            raise PanicException("index out of bounds")

    with pytest.raises(UserError, match=r"the tokenizer cannot read the texts; .* \(index out of bounds\)"):
        encode(Panics(), ["a"], max_length=8)


def test_a_panic_of_rust_is_one_line_on_standard_error_too(whole, tmp_path, capfd):
    """A template that names a special token which it does not have."""
    shutil.copytree(whole / "fast", tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    value = json.loads(file.read_text(encoding="utf-8"))
    special = value["post_processor"]["special_tokens"]
    special["[NONE]"] = special.pop("[CLS]")
    file.write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(UserError, match=r"transformers cannot read the tokenizer.* \(no entry found for key\)"):
        load_tokenizer(tmp_path / "model")
    assert "panicked" not in capfd.readouterr().err


def test_what_else_is_written_while_a_tokenizer_is_read_comes_out(capfd):
    def says(text, error=None):
        with _without_panic_traces():
            os.write(2, text)
            if error is not None:
                raise error

    says(b"a word\n")
    with pytest.raises(ValueError, match="x"):
        says(b"another\n", ValueError("x"))
    with pytest.raises(PanicException):
        says(b"a trace\n", PanicException())
    assert capfd.readouterr().err == "a word\nanother\n"


def test_paths_in_errors_are_the_checkpoints(whole, tmp_path):
    shutil.copytree(whole / "fast", tmp_path / "model")
    Path(tmp_path / "model" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=rf"^{tmp_path}/model: transformers cannot read the tokenizer"):
        load_tokenizer(tmp_path / "model")
