import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from transformers import AutoTokenizer
from vocabularies import bert_like, roberta_like

from mtl_jax.data import array_cache, corpus, tokenize
from mtl_jax.data.batches import eval_batches
from mtl_jax.data.tokenize import Ragged, encode

TEXTS = [" ".join("abcdef"[(i * j) % 6] * (j % 3 + 1) for j in range(i % 9)) for i in range(40)]
BERT = bert_like()


def same(a, b):
    """Bit for bit, as what one reads from them."""
    for x, y in zip(a, b, strict=True):
        assert (x is None) == (y is None)
        if isinstance(x, Ragged):
            assert x.equals(y)
        elif x is not None:
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)


@pytest.fixture(autouse=True)
def _however_little(monkeypatch):
    monkeypatch.setattr(tokenize, "CACHED_CHARACTERS", 0)


@pytest.fixture
def tokenised(monkeypatch):
    """How often texts were really tokenised."""
    calls, part = [], tokenize._part
    monkeypatch.setattr(tokenize, "_part", lambda *args: calls.append(1) or part(*args))
    return calls


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


KINDS = {
    "texts": ((TEXTS,), {"max_length": 8}),
    "pairs": ((TEXTS, TEXTS[::-1]), {"max_length": 40, "windows": True, "stride": 1, "offsets": True}),
    "words": (([text.split() for text in TEXTS],), {"max_length": 8, "windows": True}),
    "none": (([],), {"max_length": 8}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_hit_is_what_the_miss_was(kind, tmp_path, tokenised):
    args, options = KINDS[kind]
    without = encode(BERT, *args, **options)
    tokenised.clear()
    miss = encode(BERT, *args, **options, cache=tmp_path / "deep" / "cache")
    assert len(tokenised) == (kind != "none")
    hit = encode(BERT, *args, **options, cache=tmp_path / "deep" / "cache")
    assert len(tokenised) == (kind != "none")
    same(miss, without)
    same(hit, without)
    assert len(entries(tmp_path / "deep" / "cache")) == 1


def test_what_is_read_is_mapped_and_read_only(tmp_path):
    encode(BERT, TEXTS, max_length=8, cache=tmp_path)
    values = encode(BERT, TEXTS, max_length=8, cache=tmp_path).tokens.values
    assert isinstance(values.base, np.memmap)
    assert type(values) is np.ndarray
    with pytest.raises(ValueError, match="read-only"):
        values[0] = 1


def test_little_text_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize, "CACHED_CHARACTERS", sum(map(len, TEXTS)) + 1)
    encode(BERT, TEXTS, max_length=8, cache=tmp_path)
    assert entries(tmp_path) == []
    encode(BERT, [*TEXTS, "a"], max_length=8, cache=tmp_path)
    assert len(entries(tmp_path)) == 1


def changed(tokenizer, **settings):
    for name, value in settings.items():
        setattr(tokenizer, name, value)
    return tokenizer


OTHERS = {
    "one letter": lambda cache: encode(BERT, [*TEXTS[:-1], TEXTS[-1][:-1] + "f"], max_length=8, cache=cache),
    "a moved border": lambda cache: encode(
        BERT, [*TEXTS[:-2], TEXTS[-2] + TEXTS[-1][0], TEXTS[-1][1:]], max_length=8, cache=cache
    ),
    "one text less": lambda cache: encode(BERT, TEXTS[:-1], max_length=8, cache=cache),
    "as words": lambda cache: encode(BERT, [text.split() for text in TEXTS], max_length=8, cache=cache),
    "as pairs": lambda cache: encode(BERT, TEXTS, [""] * len(TEXTS), max_length=8, cache=cache),
    "max_length": lambda cache: encode(BERT, TEXTS, max_length=9, cache=cache),
    "windows": lambda cache: encode(BERT, TEXTS, max_length=8, windows=True, cache=cache),
    "stride": lambda cache: encode(BERT, TEXTS, max_length=8, stride=1, cache=cache),
    "offsets": lambda cache: encode(BERT, TEXTS, max_length=8, offsets=True, cache=cache),
    "another tokenizer": lambda cache: encode(roberta_like(), TEXTS, max_length=8, cache=cache),
    "side": lambda cache: encode(changed(bert_like(), truncation_side="left"), TEXTS, max_length=8, cache=cache),
    "inputs": lambda cache: encode(changed(bert_like(), model_input_names=["input_ids"]), TEXTS, max_length=8, cache=cache),
}


@pytest.mark.parametrize("change", OTHERS)
def test_whatever_changes_is_tokenised_anew(change, tmp_path, tokenised):
    encode(BERT, TEXTS, max_length=8, cache=tmp_path)
    OTHERS[change](tmp_path)
    assert len(tokenised) == 2
    assert len(entries(tmp_path)) == 2


def test_a_word_added_to_the_vocabulary(tmp_path, tokenised):
    tokenizer = bert_like()
    encode(tokenizer, TEXTS, max_length=8, cache=tmp_path)
    tokenizer.add_tokens(["aa"])
    encode(tokenizer, TEXTS, max_length=8, cache=tmp_path)
    assert len(tokenised) == 2


def test_other_versions(tmp_path, tokenised, monkeypatch):
    encode(BERT, TEXTS, max_length=8, cache=tmp_path)
    monkeypatch.setattr(tokenize, "installed", lambda name: "0")
    encode(BERT, TEXTS, max_length=8, cache=tmp_path)
    assert len(tokenised) == 2


def test_what_others_did_with_the_tokenizer_does_not_matter(tmp_path, tokenised):
    tokenizer = bert_like()
    encode(tokenizer, TEXTS, max_length=8, cache=tmp_path)
    tokenizer(TEXTS, truncation=True, max_length=5, padding="max_length")
    encode(tokenizer, TEXTS, max_length=8, cache=tmp_path)
    assert len(tokenised) == 1


# Damage


def only(folder: Path) -> Path:
    (entry,) = folder.iterdir()
    return entry


def cut_short(entry):
    with (entry / "tokens.npy").open("r+b") as file:
        file.truncate(200)


def one_bit(entry):
    data = bytearray((entry / "tokens.npy").read_bytes())
    data[-4] ^= 1
    (entry / "tokens.npy").write_bytes(data)


DAMAGE = {
    "tokens.npy has 200 bytes instead of": cut_short,
    "the SHA-256 of tokens.npy has changed": one_bit,
    "starts.npy has 0 bytes": lambda entry: (entry / "starts.npy").unlink(),
    "manifest.json is missing": lambda entry: (entry / "manifest.json").unlink(),
    "manifest.json is missing or not": lambda entry: (entry / "manifest.json").write_text('{"files": {"tokens": 3}}'),
    "manifest.json is missing or not readable": lambda entry: (entry / "manifest.json").write_text('{"fil'),
}


@pytest.mark.parametrize("line", DAMAGE)
def test_a_damaged_entry_is_set_aside_and_made_anew(line, tmp_path, tokenised, caplog):
    expected = encode(BERT, TEXTS, max_length=8, cache=tmp_path)
    expected = expected._replace(tokens=Ragged(np.array(expected.tokens.values), np.array(expected.tokens.starts)))
    name = only(tmp_path).name
    for _ in range(2):  # the second time, one has been set aside before
        DAMAGE[line](tmp_path / name)
        caplog.clear()
        same(encode(BERT, TEXTS, max_length=8, cache=tmp_path), expected)
        (said,) = caplog.messages
        assert line in said
        assert entries(tmp_path) == [name, f"{name}.damaged"]
    assert len(tokenised) == 3
    caplog.clear()
    same(encode(BERT, TEXTS, max_length=8, cache=tmp_path), expected)
    assert len(tokenised) == 3
    assert not caplog.messages


def test_a_cache_that_cannot_be_written(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    found = encode(BERT, TEXTS, max_length=8, cache=tmp_path / "file" / "cache")
    same(found, encode(BERT, TEXTS, max_length=8))
    assert "cannot write the token cache (Not a directory)" in caplog.text


def test_a_full_disk(tmp_path, caplog, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    same(encode(BERT, TEXTS, max_length=8, cache=tmp_path), encode(BERT, TEXTS, max_length=8))
    assert "cannot write the token cache (No space left on device)" in caplog.text
    assert entries(tmp_path) == []


# Several processes

WORKER = """
import sys, time
from pathlib import Path
import numpy as np
from transformers import AutoTokenizer
from mtl_jax.data import tokenize
tokenize.CACHED_CHARACTERS = 0
bert, cache, mode = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(bert)
if mode == "slow":
    save, saved = np.save, []
    def slow(*args, **kwargs):
        save(*args, **kwargs)
        print("saved", flush=True)
        time.sleep(60)
    np.save = slow
else:
    print("ready", flush=True)
    sys.stdin.readline()
print(tokenize.encode(tokenizer, ["the good film"] * 50, max_length=8, cache=Path(cache)).tokens.values.sum())
"""


def start(bert, cache, mode):
    """A process that has got as far as its first line; one that ends before shows why."""
    command = [sys.executable, "-c", WORKER, str(bert), str(cache), mode]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline(), process.communicate()[1]
    return process


def test_a_process_killed_while_it_writes(bert, tmp_path, tokenised, monkeypatch):
    process = start(bert, tmp_path, "slow")
    process.kill()
    assert process.communicate() == ("", "")
    (left,) = entries(tmp_path)
    assert left.endswith(array_cache.PART)
    tokenizer = AutoTokenizer.from_pretrained(bert)
    encode(tokenizer, ["the good film"] * 50, max_length=8, cache=tmp_path)
    encode(tokenizer, ["the good film"] * 50, max_length=8, cache=tmp_path)
    assert len(tokenised) == 1
    assert entries(tmp_path) == [left.split(".")[0], left]  # it might belong to a process that is still at work
    os.utime(tmp_path / left, (time.time() - 2 * array_cache.ABANDONED,) * 2)
    encode(tokenizer, ["another text"], max_length=8, cache=tmp_path)
    assert left not in entries(tmp_path)


def test_two_processes_at_once(bert, tmp_path):
    processes = [start(bert, tmp_path, "fast") for _ in range(2)]
    for process in processes:
        process.stdin.write("\n")  # go on, at nearly the same moment
        process.stdin.flush()
    (first, error), (second, other_error) = (process.communicate() for process in processes)
    assert first == second != ""
    assert error == other_error == ""
    manifest = json.loads((only(tmp_path) / "manifest.json").read_text())
    assert manifest["texts"] == 50


def test_another_process_was_first(tmp_path):
    arrays = {"tokens": np.arange(5)}
    array_cache.store(tmp_path, "key", arrays, {}, "token")
    again = array_cache.store(tmp_path, "key", arrays, {}, "token")
    np.testing.assert_array_equal(again["tokens"], arrays["tokens"])
    assert entries(tmp_path) == ["key"]


def test_a_run_starts_from_the_cache(bert, data, tmp_path, tokenised, monkeypatch):
    monkeypatch.setenv("MTL_JAX_CACHE", str(tmp_path))
    tokenizer, declared = AutoTokenizer.from_pretrained(bert), tiny.experiment(bert, data)
    rows = corpus.read_sources(declared.sources, declared.tasks)
    first, again = (
        (corpus.make_corpus(declared.sources, declared.tasks, rows, tokenizer, 24), len(tokenised)) for _ in range(2)
    )
    assert first[1] == again[1] == len(entries(tmp_path / "tokens")) == 6  # two sources, three splits
    assert first[0].describe() == again[0].describe()
    for before, after in zip(
        *(eval_batches(list(run[0].splits["dev"].values()), declared.batch) for run in (first, again)), strict=True
    ):
        np.testing.assert_array_equal(before.tokens, after.tokens)
