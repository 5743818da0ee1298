"""Rows that are close in meaning: cosines of an encoder's mean vectors, compared in blocks."""

import json

import jax
import numpy as np
import pytest

from mtl_jax import Classification, Embedding, Experiment, Phase, Source, UserError, audit, pretrained
from mtl_jax.audit import meaning
from mtl_jax.cli import main


@pytest.fixture(scope="module")
def encoder(bert):
    return meaning.open_encoder(str(bert))


def test_a_vector_is_the_mean_of_the_tokens_whatever_the_batch(encoder, monkeypatch):
    monkeypatch.setattr(meaning, "ROWS", 2)
    monkeypatch.setattr(meaning, "LENGTHS", (16,))
    texts = ["the man", "who was a good man in the city ?", "the man", ("sad", "film")]
    vectors = meaning.vectors(encoder, texts)
    ids = encoder.tokenizer(texts[1])["input_ids"]
    apply = jax.jit(lambda ids: encoder.model.apply({"params": encoder.params}, ids, np.ones(ids.shape, np.int32)).hidden)
    hidden = apply(np.array([ids], np.int32))[0]
    expected = hidden.mean(axis=0) / np.linalg.norm(hidden.mean(axis=0))
    np.testing.assert_allclose(vectors[1], expected, atol=1e-5)
    np.testing.assert_allclose(vectors[0], vectors[2], atol=1e-6)
    np.testing.assert_allclose(meaning.vectors(encoder, [("film", "sad")])[0], vectors[3], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_blocks_give_the_pairs_of_a_whole_product(monkeypatch):
    monkeypatch.setattr(meaning, "BLOCK", (3, 4))
    rng = np.random.default_rng(0)
    first, second = (rng.normal(size=(size, 2)) for size in (7, 11))
    first, second = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (first, second))
    pairs = [
        (int(i), int(j)) for left, right, _ in meaning.close_pairs(first, second, 0.9) for i, j in zip(left, right, strict=True)
    ]
    assert sorted(pairs) == [tuple(pair) for pair in np.argwhere(first @ second.T >= 0.9).tolist()]


def experiment(**fields):
    def rows(*texts):
        return [{"text": text, "label": "ab"[index % 2]} for index, text in enumerate(texts)]

    films = Source(
        "films", rows=rows("the man was sad", "a good film"), dev_rows=rows("where", "who"), test_rows=rows("the sad man was")
    )
    task = Classification(name="films", source="films")
    return Experiment("meant", Embedding(), (films,), (task,), (Phase("all", 1),), **fields)


def test_an_audit_names_them(bert, monkeypatch):
    def vectors(checkpoint, texts):
        angle = np.array(
            [0.3 * ("film" in text) + 0.1 * ("sad man" in text) + 2 * (text in ("where", "who")) for text in texts]
        )
        return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)

    monkeypatch.setattr(meaning, "vectors", vectors)
    result = audit.of_experiment(experiment(), embeddings=str(bert), close=0.99)
    (found,) = result.meanings
    assert (found.source, found.split, found.train_source, found.rows, found.of, found.train_rows) == (
        "films",
        "test",
        "films",
        1,
        1,
        1,
    )
    (example,) = found.examples
    assert (example.kind, example.similarity, example.row, example.train_row) == (
        "meaning",
        0.995,
        "films.test_rows[0]",
        "films.rows[0]",
    )
    table = result.table(texts=True)
    assert "| films test |      1 | films   |                  1 |               1 |" in table
    assert "meaning 0.99: films.test_rows[0] 'the sad man was' and films.rows[0] 'the man was sad'" in table
    assert "text" in json.dumps(result.to_json()["meanings"])
    private = audit.of_experiment(experiment(private=True), embeddings=str(bert), close=0.99)
    assert "sad" not in private.table(texts=True)
    assert audit.of_experiment(experiment(), embeddings=str(bert), close=1.0).meanings == ()


def test_bad_input_is_one_line(bert, tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match=r"close is 1.5; it must be a number above 0 and at most 1"):
        audit.of_experiment(experiment(), embeddings=str(bert), close=1.5)
    with pytest.raises(UserError, match="nowhere"):
        audit.of_experiment(experiment(), embeddings=str(tmp_path / "nowhere"))
    monkeypatch.setattr("sys.argv", ["mtl-jax", "audit", "script.py", "--close", "0"])
    with pytest.raises(SystemExit):
        main.console()
    assert "--close is 0.0; it must be a number above 0 and at most 1" in capsys.readouterr().err
    no_encoder = pretrained.load(bert, head=None)
    object.__setattr__(no_encoder, "config", object())
    monkeypatch.setattr(pretrained, "load", lambda *_, **__: no_encoder)
    with pytest.raises(UserError, match=r"embeddings ORG/NAME: not an encoder; take one such as minilm"):
        meaning.open_encoder("ORG/NAME")
