"""Words that a masked LM predicts: in the right places, whole words, and only of texts that stay similar."""

import dataclasses
import json

import numpy as np
import pytest
import tiny

from mtl_jax import Classification, Source, Tagging, UserError
from mtl_jax.augment import MaskedNeighbours, masked_neighbours
from mtl_jax.augment import similar_rows as similar
from mtl_jax.augment.masked_neighbours import MaskedModel, open_masked_model
from mtl_jax.data import augmentations
from mtl_jax.data.formats.rows import Row
from mtl_jax.pretrained import load_tokenizer

SAID = Source("said", rows=[])
MASK = tiny.WORDS.index("[UNK]")  # the tiny vocabulary has no mask token of its own


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    tiny.write_bert(folder)
    special = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**special, "mask_token": "[UNK]"}), encoding="utf-8")
    return load_tokenizer(folder)


@pytest.fixture
def predicts(tokenizer, monkeypatch):
    """A model that predicts, at every mask, these words in order; and a record of the texts that it read."""
    read = []

    def candidates(ids_BxT, mask_BxT):
        read.extend(
            [int(token) for token, real in zip(*row, strict=True) if real] for row in zip(ids_BxT, mask_BxT, strict=True)
        )
        tokens = [tiny.WORDS.index(word) for word in ("[SEP]", "good", "?", "fine", "city")]
        shape = (*ids_BxT.shape, len(tokens))
        return np.broadcast_to(np.array([0.4, 0.3, 0.1, 0.1, 0.1]), shape), np.broadcast_to(tokens, shape)

    model = MaskedModel(tokenizer, 16, candidates)
    monkeypatch.setattr(masked_neighbours, "open_masked_model", lambda path, top, where: model)
    return read


def test_words_are_hidden_and_replaced_in_their_places(predicts):
    rows = [
        Row({"text": "the good city was a song", "tags": "O O B-X O O O"}, "f:1"),
        Row({"text": "Bad film", "tags": ["O", "O"]}, "f:2"),
        Row({"text": "city", "tags": ["B-X"]}, "f:3"),
    ]
    about = augmentations.rows_of(SAID, [Tagging(name="t", source="said")], rows)
    augmentation = MaskedNeighbours(model="m", words=0.4, encoder="")
    made = augmentation.maker(about)(rows, [np.random.default_rng(n) for n in range(3)])
    assert made[2] == "no other word fits"
    first = made[0].columns["text"].split()
    old = rows[0].columns["text"].split()
    changed = [n for n in range(6) if first[n] != old[n]]
    assert len(first) == 6
    assert 1 <= len(changed) <= 2
    assert {first[n] for n in changed} <= {"good", "fine", "city"}
    assert first[2] == "city"
    assert made[0].columns["tags"] == ["O", "O", "B-X", "O", "O", "O"]
    (new,) = [word for word, before in zip(made[1].columns["text"].split(), ["Bad", "film"], strict=True) if word != before]
    assert new.lower() in ("good", "fine", "city")
    assert new.istitle() == (made[1].columns["text"].split()[0] == new)
    assert sum(ids.count(MASK) for ids in predicts) == 3
    assert all(ids[0] == tiny.WORDS.index("[CLS]") and ids[-1] == tiny.WORDS.index("[SEP]") for ids in predicts if ids)
    plain = augmentations.rows_of(
        SAID, [Tagging(name="t", source="said")], [Row({"text": "the song was", "tags": "A B C"}, "f")]
    )
    (row,) = augmentation.maker(plain)(plain.rows, [np.random.default_rng(0)])
    assert row.columns["tags"].count(None) == 1  # of another word the part of speech is not known


def test_rows_that_mean_something_else_are_left_out(monkeypatch):
    vectors = {"a b": [1.0, 0.0], "a c": [0.8, 0.6], "x": [0.0, 1.0], "a b x": [1.0, 0.0]}
    monkeypatch.setattr(similar, "open_encoder", lambda path: path)
    monkeypatch.setattr(similar, "embedder", lambda encoder: lambda texts: np.array([vectors[text] for text in texts]))
    source = augmentations.rows_of(Source("p", rows=[], pair="other"), [Classification(name="c", source="p", column="c")], [])
    row = Row({"text": "a b", "other": ["a", "b"]}, "f:1")
    made = [
        row._replace(columns={"text": "a c", "other": ["a", "b"]}),
        row._replace(columns={"text": "a c", "other": ["x"]}),
        "as it was",
        row._replace(columns={"text": "a b x", "other": ["a", "b"]}),
    ]
    kept = similar.keep_similar(source, "minilm", 0.7)([row] * 4, made)
    assert kept == [made[0], "not similar", "as it was", made[3]]
    assert similar.keep_similar(source, "", 0.7)([row] * 4, made) == made


def test_bad_input_is_one_line(tmp_path):
    task = Classification(name="c", source="said", column="c")
    for wrong, words in (
        (MaskedNeighbours(model="m", added=0), "added is 0, but a model makes its rows"),
        (MaskedNeighbours(model="m", similarity=2), "similarity is 2; it must be a cosine"),
        (MaskedNeighbours(model="m", words=-1), "words is -1; it must be at least 0"),
        (MaskedNeighbours(model="m", top=0), "top is 0; it must be at least 1"),
        (MaskedNeighbours(model=""), "model is empty; name a masked LM"),
    ):
        with pytest.raises(UserError, match=rf"source 'said': augment.0 \(MaskedNeighbours\): {words}"):
            augmentations.check([dataclasses.replace(SAID, augment=(wrong,))], [task])
    tiny.write_bert(tmp_path)
    with pytest.raises(UserError, match="has no head of a masked LM; name a checkpoint such as bert-base-uncased"):
        open_masked_model(str(tmp_path), 3, "x")
