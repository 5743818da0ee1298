"""Public data sets as they were published, where a workplace has them (shared/data): every format, and the numbers of rows."""

import pytest

from mtl_jax.data.source import SPLITS, Source
from mtl_jax.data.splits import read

PARALLEL = {"format": "parallel"}
WORDS = {"format": "conll", "columns": ("words", "tags"), "text": "words"}
FORMS = {"format": "conll", "columns": ("words", "upos", "tags"), "text": "words"}
JSONL = {"format": "jsonl", "text": "source"}


def files(pattern, *names):
    """path, dev_path and test_path from one pattern."""
    return {key: f"data:{pattern % name}" for key, name in zip(("path", "dev_path", "test_path"), names, strict=False)}


def tweets(task, *names):
    return files(f"tweeteval/{task}/%s_{{text,labels}}.txt", *names) | PARALLEL


SNIPS = files("snips/%s/{seq.in,seq.out,label}", "train", "valid", "test") | PARALLEL | {"text": "seq.in"}
STSB = files("stsb/stsb-en-%s.csv", "train", "dev", "test") | {"columns": ("text", "other", "score"), "pair": "other"}
MRPC = files("mrpc/msr-para-%s.tsv", "train", "val", "test") | {"format": "tsv", "text": "#1 String", "pair": "#2 String"}
RTE = files("rte/%s.tsv", "train", "dev") | {"format": "tsv", "text": "sentence1", "pair": "sentence2", "id": "index"}
COLA = files("cola/%s.tsv", "in_domain_train", "in_domain_dev", "out_of_domain_dev")
COLA |= {"format": "tsv", "columns": ("from", "label", "mark", "text")}
XQUAD = {"path": "data:xquad/xquad.en.json", "format": "squad", "text": "question", "pair": "context", "id": "id"}
MULTI30K = files("multi30k/%s.{en,fr,de}.gz", "train", "val", "test_2016_flickr") | PARALLEL | {"text": "en"}
LINES = {"format": "lines", "pattern": r"(?P<label>\d) (?P<text>.+)"}

# Rows in the train, dev and test files. Where there is no file, that split is cut from the training file.
CASES = {
    "snips": (SNIPS, (13084, 700, 700), {}),
    "wnut17": (
        files("wnut17/%s", "wnut17train.conll", "emerging.dev.conll", "emerging.test.annotated") | WORDS,
        (3394, 1009, 1287),
        {},
    ),
    "tweebank": (files("tweebank/%s.tsv", "train", "dev", "test") | FORMS, (1639, 710, 1201), {}),
    "ewt_pos": (files("ewt_pos/%s.tsv", "train", "dev") | FORMS, (12544, 2001), {}),
    "stsb": (STSB, (5749, 1500, 1379), {}),
    "mrpc": (MRPC, (3576, 500, 1725), {}),
    "rte": (RTE, (2490, 277), {}),
    "cola": (COLA, (8551, 527, 516), {}),
    "emotion": (tweets("emotion", "train", "val", "test"), (3257, 374, 1421), {}),
    "irony": (tweets("irony", "train", "val", "test"), (2862, 955, 784), {}),
    "offensive": (tweets("offensive", "train", "val", "test"), (11916, 1324, 860), {}),
    "hate": (tweets("hate", "train", "val") | {"lenient": True}, (9000, 1000), {"train": 7, "dev": 1}),
    "stance": (tweets("stance/*", "train", "val"), (2620, 294), {}),
    "banking77": ({"path": "data:banking77/train.csv", "test_path": "data:banking77/test.csv"}, (10003, None, 3080), {}),
    "xquad": (XQUAD, (1190,), {}),
    "multi30k": (MULTI30K, (29000, 1014, 1000), {}),
    "aeslc": (files("aeslc/%s.jsonl", "train", "dev") | JSONL, (14435, 1960), {}),
    "scitldr": (files("scitldr/%s.jsonl", "train", "dev", "test") | JSONL | {"id": "paper_id"}, (1992, 619, 618), {}),
    "sst5": (files("sentences/stsa.fine.%s", "train", "dev", "test") | LINES, (8544, 1101, 2210), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_public_data_sets(name, shared_data, monkeypatch):
    monkeypatch.setenv("MTL_JAX_DATA", str(shared_data))
    options, published, blank = CASES[name]
    splits = read(Source(name=name, **options))
    published = dict(zip(SPLITS, (*published, None, None), strict=False))
    found = {split: len(rows) for split, rows in splits.rows.items()}
    # What a file of its own holds stays whole; the training file has lost its repeated texts, and what was cut from it.
    for split in ("dev", "test"):
        if published[split] is not None:
            assert found[split] == published[split] - blank.get(split, 0)
    cut = sum(found[split] for split in SPLITS if split == "train" or published[split] is None)
    assert cut + splits.repeated == published["train"] - blank.get("train", 0)
    assert splits.skipped == sum(blank.values())
    for rows in splits.rows.values():
        for row in rows:
            if options.get("format") == "conll":
                assert len(row.columns["words"]) == len(row.columns["tags"]) > 0


def test_words_and_slots_of_snips_match(shared_data, monkeypatch):
    monkeypatch.setenv("MTL_JAX_DATA", str(shared_data))
    splits = read(Source(name="snips", **SNIPS))
    labels = {row.columns["label"] for row in splits.rows["train"]}
    tags = {tag for row in splits.rows["train"] for tag in row.columns["seq.out"].split()}
    assert (len(labels), len(tags)) == (7, 72)
    for rows in splits.rows.values():
        assert all(len(row.columns["seq.in"].split()) == len(row.columns["seq.out"].split()) for row in rows)


def test_hashtags_of_wnut17_are_words(shared_data, monkeypatch):
    monkeypatch.setenv("MTL_JAX_DATA", str(shared_data))
    splits = read(Source(name="wnut17", **CASES["wnut17"][0]))
    words = [word for row in splits.rows["test"] for word in row.columns["words"]]
    assert len(words) == 23394
    assert sum(word.startswith("#") for word in words) == 247
