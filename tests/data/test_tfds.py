"""TFDS without TensorFlow: a tiny real builder, and TFDS's own mock data for builders that would have to be downloaded."""

import pickle
import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from mtl_jax.core.errors import UserError
from mtl_jax.data.formats.records import Picked, Records
from mtl_jax.data.formats.tfds import open_tfds
from mtl_jax.data.source import Source
from mtl_jax.data.splits import read

TEXTS = 100


class TinyNews(tfds.core.GeneratorBasedBuilder):
    """Every kind of feature that a text builder has."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="plain"), tfds.core.BuilderConfig(name="broken")]  # noqa: RUF012

    def _info(self):
        f = tfds.features
        features = {
            "text": f.Text(),
            "label": f.ClassLabel(names=["sad", "glad"]),
            "nameless": f.ClassLabel(num_classes=3),
            "score": np.float32,
            "number": np.int64,
            "flag": np.bool_,
            "words": f.Sequence(f.Text()),
            "tags": f.Sequence(f.ClassLabel(names=["O", "B-x"])),
            "meta": {"url": f.Text(), "kind": f.ClassLabel(names=["blog"])},
            "said": f.Translation(languages=["de", "en"]),
            "answers": f.Sequence({"text": f.Text(), "answer_start": np.int32}),
        }
        return tfds.core.DatasetInfo(builder=self, features=f.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(TEXTS), "test": self._generate_examples(10)}

    def _generate_examples(self, n):
        if self.builder_config.name == "broken":
            raise ValueError("the page has moved\nand more")
        for i in range(n):
            yield (
                i,
                {
                    "text": f"häuser {i}" if n == TEXTS else f"test {i}",
                    "label": -1 if n == 10 else i % 2,
                    "nameless": 2,
                    "score": 3.8,
                    "number": i,
                    "flag": True,
                    "words": ["große", "b"],
                    "tags": ["O", "B-x"],
                    "meta": {"url": "u", "kind": "blog"},
                    "said": {"de": "ja", "en": "yes"},
                    "answers": {"text": ["ä"], "answer_start": [1]},
                },
            )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A TFDS data directory with the prepared builder."""
    folder = tmp_path_factory.mktemp("tfds")
    tfds.builder("tiny_news/plain", data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.fixture
def prepared(folder, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    monkeypatch.setenv("MTL_JAX_OFFLINE", "1")


@pytest.mark.usefixtures("prepared")
def test_every_feature_becomes_text():
    records = open_tfds("tfds:tiny_news/plain:1.0.0#train")
    assert len(records) == TEXTS
    row = records[0]
    number = row.columns["number"]
    assert row.where == "tfds:tiny_news/plain:1.0.0#train: record 0"
    assert row.columns == {
        "text": f"häuser {number}",
        "label": ("sad", "glad")[int(number) % 2],
        "nameless": "2",
        "score": "3.8",
        "number": number,
        "flag": "true",
        "words": ["große", "b"],
        "tags": ["O", "B-x"],
        "meta.url": "u",
        "meta.kind": "blog",
        "said.de": "ja",
        "said.en": "yes",
        "answers": [{"text": "ä", "start": 1}],
    }
    assert open_tfds("tfds:tiny_news#test")[0].columns["label"] is None
    assert "tensorflow" not in sys.modules


@pytest.mark.usefixtures("prepared")
def test_rows_stay_on_disk_and_are_read_by_number():
    test = "tfds:tiny_news#test"
    splits = read(Source(name="a", path="tfds:tiny_news", test_path=test, group="number"))
    # The test rows' numbers, taken as documents, leave the others.
    assert (len(splits.rows["train"]) + len(splits.rows["dev"]), splits.repeated) == (TEXTS - 10, 10)
    for rows in splits.rows.values():
        assert isinstance(rows, Picked)
        assert [rows[i] for i in range(len(rows))] == list(rows)
        assert list(rows[2:5]) == list(rows)[2:5]
        # Worker processes get a copy.
        assert list(pickle.loads(pickle.dumps(rows))) == list(rows)
    texts = [row.columns["text"] for split in ("train", "dev") for row in splits.rows[split]]
    assert sorted(texts) == sorted(f"häuser {i}" for i in range(10, TEXTS))
    assert len(splits.rows["train"][-1].columns) == 13


@pytest.mark.usefixtures("prepared")
def test_split_expressions():
    test = "tfds:tiny_news#test"
    splits = read(
        Source(
            name="a",
            path="tfds:tiny_news#train[:80%]",
            dev_path="tfds:tiny_news#train[80%:]",
            test_path=test,
        )
    )
    assert {split: len(rows) for split, rows in splits.rows.items()} == {"train": 80, "dev": 20, "test": 10}
    assert splits.repeated == 0
    # The words are the same in all: dev and test are given and stay whole, and leave nothing to train on.
    with pytest.raises(UserError, match="split train is empty"):
        read(
            Source(
                name="a", path="tfds:tiny_news", dev_path="tfds:tiny_news#test", test_path="tfds:tiny_news#test", text="words"
            )
        )


@pytest.mark.usefixtures("prepared")
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("tfds:no_such_thing", "TFDS has no text, translation or summarisation builder 'no_such_thing'"),
        ("tfds:tiny_news/other", "tfds:tiny_news/other: BuilderConfig other not found"),
        ("tfds:tiny_news:9.9.9", "Dataset tiny_news cannot be loaded at version 9.9.9, only: 1.0.0"),
        ("tfds:tiny_news#dev", r"Unknown split 'dev'. Should be one of \['train', 'test'\]"),
        ("tfds:tiny_news#train[:x]", r"Error parsing split 'train\[:x\]'"),
        ("tfds:glue/sst2", r"not in \S+glue/sst2/2.0.0, and MTL_JAX_OFFLINE is set; prepare it with `python -c .*glue/sst2"),
    ],
)
def test_what_is_not_there_is_named(path, message):
    with pytest.raises(UserError, match=message) as error:
        open_tfds(path)
    assert "\n" not in str(error.value)


def test_a_builder_is_prepared_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.delenv("MTL_JAX_OFFLINE", raising=False)
    assert len(open_tfds("tfds:tiny_news")) == TEXTS
    monkeypatch.setattr(TinyNews, "_generate_examples", None)
    assert len(open_tfds("tfds:tiny_news#test")) == 10


def test_a_builder_that_fails_says_why_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.delenv("MTL_JAX_OFFLINE", raising=False)
    with pytest.raises(UserError, match=r"tfds:tiny_news/broken: cannot be prepared \(.*the page has moved"):
        open_tfds("tfds:tiny_news/broken")


def test_a_builder_whose_code_needs_tensorflow():
    with pytest.raises(UserError, match=r"code of this builder does not load \(No module named 'tensorflow.* as JSONL"):
        open_tfds("tfds:super_glue/copa")


def test_files_that_cannot_be_read_by_number(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "copy")
    (info,) = (tmp_path / "copy").rglob("dataset_info.json")
    text = info.read_text(encoding="utf-8")
    assert '"fileFormat": "array_record"' in text
    info.write_text(text.replace('"fileFormat": "array_record"', '"fileFormat": "tfrecord"'), encoding="utf-8")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "copy"))
    monkeypatch.setenv("MTL_JAX_OFFLINE", "1")
    with pytest.raises(
        UserError, match=r"has tfrecord files, which cannot be read by number; prepare it with .* another directory"
    ):
        open_tfds("tfds:tiny_news")


def test_a_bad_record_is_named():
    records = Records("tfds:x", [{"text": b"fine"}, {"text": b"caf\xe9"}, {"text": b""}], None)
    one, two, three = records
    assert one == records[0]
    assert str(two).startswith("tfds:x: record 1: 'utf-8' codec can't decode")
    assert three.columns == {"text": ""}
    with pytest.raises(UserError, match="tfds:x: record 1"):
        records[1]


@pytest.mark.parametrize(
    ("path", "columns"),
    [
        ("tfds:glue/mrpc#validation", {"sentence1": str, "sentence2": str, "label": str, "idx": str}),
        ("tfds:conll2003", {"tokens": list, "pos": list, "chunks": list, "ner": list}),
        ("tfds:wmt14_translate/de-en#train[:50%]", {"de": str, "en": str}),
        ("tfds:cnn_dailymail", {"article": str, "highlights": str, "publisher": str, "id": str}),
    ],
)
def test_mock_data_of_public_builders(path, columns, monkeypatch):
    monkeypatch.delenv("MTL_JAX_OFFLINE", raising=False)
    with tfds.testing.mock_data(num_examples=20):
        rows = list(open_tfds(path))
        for row in rows:
            assert {name: type(value) for name, value in row.columns.items()} == columns
    if "conll2003" in path:
        assert {tag for row in rows for tag in row.columns["ner"]} == {
            "O",
            *(f"{side}-{kind}" for side in "BI" for kind in ("PER", "ORG", "LOC", "MISC")),
        }
    if "glue" in path:
        assert {row.columns["label"] for row in rows} == {"equivalent", "not_equivalent"}
    assert "tensorflow" not in sys.modules
