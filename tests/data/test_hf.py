import sys

import pytest

from mtl_jax.core.errors import UserError
from mtl_jax.data.formats.hf import open_hf
from mtl_jax.data.source import Source
from mtl_jax.data.splits import read


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A directory that save_to_disk wrote: two splits of rows with every kind of feature that texts come with."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["sad", "glad"]),
            "score": datasets.Value("float32"),
            "flag": datasets.Value("bool"),
            "tags": datasets.Sequence(datasets.ClassLabel(names=["O", "B-x"])),
            "said": datasets.Translation(languages=["de", "en"]),
            "answers": datasets.Sequence({"text": datasets.Value("string"), "answer_start": datasets.Value("int32")}),
        }
    )

    def rows(name, n, label):
        return datasets.Dataset.from_list(
            [
                {
                    "text": f"{name} {i}",
                    "label": label,
                    "score": 3.8,
                    "flag": None if i else False,
                    "tags": [0, 1, -1],
                    "said": {"de": "ja", "en": "yes"},
                    "answers": {"text": ["a"], "answer_start": [1]},
                }
                for i in range(n)
            ],
            features=features,
        )

    folder = tmp_path_factory.mktemp("hub")
    datasets.disable_progress_bars()
    datasets.DatasetDict(train=rows("train", 80, 1), test=rows("test", 10, -1)).save_to_disk(folder / "splits")
    rows("one", 80, 1).save_to_disk(folder / "whole")
    return folder


def test_every_feature_becomes_text(stored):
    assert open_hf(f"hf:{stored}/splits#train")[0].columns == {
        "text": "train 0",
        "label": "glad",
        "score": "3.8",
        "flag": "false",
        "tags": ["O", "B-x", None],
        "said.de": "ja",
        "said.en": "yes",
        "answers": [{"text": "a", "start": 1}],
    }
    row = open_hf(f"hf:{stored}/splits#test")[3]
    assert (row.columns["label"], row.columns["flag"]) == (None, None)
    assert row.where == f"hf:{stored}/splits#test: record 3"


def test_splits_stay_on_disk(stored):
    splits = read(Source(name="a", path=f"hf:{stored}/splits", test_path=f"hf:{stored}/splits#test"))
    assert len(splits.rows["test"]) == 10
    assert len(splits.rows["train"]) + len(splits.rows["dev"]) == 80
    assert all(row.columns["text"].startswith("train") for row in splits.rows["dev"])
    assert len(open_hf(f"hf:{stored}/whole")) == 80


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("hf:STORED/splits#dev", "no split 'dev'; splits: train, test"),
        ("hf:STORED/whole#train", "has one data set without splits; leave '#train' out"),
        ("hf:STORED/nothing", "not a data set written by save_to_disk"),
        ("hf:alone", "named hf:ORG/NAME or hf:ORG/NAME/CONFIG; a directory starts with / or ."),
        ("hf:no/such#train", "hf:no/such#train: not in the cache of `datasets`, and MTL_JAX_OFFLINE or HF_HUB_OFFLINE is set"),
    ],
)
def test_what_is_not_there_is_named(stored, path, message, monkeypatch):
    monkeypatch.setenv("MTL_JAX_OFFLINE", "1")
    with pytest.raises(UserError) as error:
        open_hf(path.replace("STORED", str(stored)))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_names_on_the_hub(stored, monkeypatch):
    import datasets
    import huggingface_hub

    asked = []

    def load(*names, split):
        asked.append((*names, split, datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE))
        return datasets.load_from_disk(str(stored / "whole"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("MTL_JAX_OFFLINE", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert len(open_hf("hf:org/name")) == 80
    open_hf("hf:org/name/config#validation[:10%]")
    monkeypatch.setenv("MTL_JAX_OFFLINE", "1")
    open_hf("hf:org/name")
    assert asked == [
        ("org/name", None, "train", False, False),
        ("org/name", "config", "validation[:10%]", False, False),
        ("org/name", None, "train", True, True),
    ]
    assert not datasets.config.HF_HUB_OFFLINE


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r'hf:org/name: needs the package `datasets`; pip install "mtl_jax\[hf\]"'):
        open_hf("hf:org/name")
