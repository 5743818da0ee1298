"""Sketches of training texts: a later run is compared with them, without the texts."""

import dataclasses
import json
import logging
import random

import numpy as np
import pytest

import mtl_jax
from mtl_jax import Classification, Embedding, Experiment, Phase, Source, UserError
from mtl_jax.audit import earlier_runs, text_sketches
from mtl_jax.audit.copies import near_copies
from mtl_jax.data import splits
from mtl_jax.data.formats.rows import Row
from mtl_jax.training.setup import earlier_workdirs, prepare
from mtl_jax.transfer import EWC, Distillation
from mtl_jax.transfer.loading import InitFrom

LONG = "an old dog sleeps under that red house by our river"


def sentence(rng, words=14):
    return " ".join(f"w{rng.randrange(400)}" for _ in range(words))


def test_estimates_find_what_the_texts_themselves_say():
    rng = random.Random(0)
    train = [sentence(rng) for _ in range(3000)]
    changed = [text.split() for text in train[:300]]
    for words in changed[:200]:
        words[rng.randrange(len(words))] = "other"
    held_out = [" ".join(words) for words in changed] + [sentence(rng) for _ in range(1500)]
    known = text_sketches.of_texts(train)
    found = text_sketches.copies_of(known, held_out, 0.7)
    assert found.letters.nonzero()[0].tolist() == list(range(200, 300))
    similarity = {j: value for _, j, value in near_copies(train, held_out, 0.6)}
    assert found.near[300:].sum() == 0
    assert min(similarity[j] for j in found.near.nonzero()[0].tolist()) >= 0.6
    far = [j for j in range(200) if similarity.get(j, 0) >= 0.8]
    assert found.near[far].mean() > 0.9
    assert text_sketches.copies_of(known, []).near.tolist() == []


def test_short_texts_pairs_and_empty_ones():
    known = text_sketches.of_texts(["A moore 's film", ("a b", "c"), "", "?!", "what is the weather in Paris"])
    texts = ["a Moore's film!", ("C", "a b"), " ", "?!", "what is the weather in Rome", "no"]
    found = text_sketches.copies_of(known, texts)
    assert found.letters.tolist() == [True, True, False, True, False, False]
    assert not found.near.any()


def test_a_sample_is_that_of_the_smallest_hashes_and_files_are_the_same():
    texts = [f"text number {number}" for number in range(50)]
    whole, sample = text_sketches.of_texts(texts), text_sketches.of_texts(texts, 20)
    assert (sample.of, whole.of, len(sample.letters)) == (50, 50, 20)
    assert (sample.letters == whole.letters[:20]).all()
    joined = text_sketches.joined([whole, sample._replace(of=20), text_sketches.of_texts(["more"])], 30)
    assert (len(joined.letters), joined.of) == (30, 51)
    assert 35 <= text_sketches.joined([sample, whole]).of <= 70  # estimated, as one is a sample
    data = text_sketches.to_bytes(whole)
    assert data == text_sketches.to_bytes(text_sketches.of_texts(texts[::-1]))
    assert all(np.array_equal(*pair) for pair in zip(text_sketches.from_bytes(data), whole, strict=True))
    assert b"number" not in data
    for damaged in (b"", b"PK no zip", data[:200], text_sketches.to_bytes(whole._replace(words=whole.words[:3]))):
        with pytest.raises(ValueError, match="sketches"):
            text_sketches.from_bytes(damaged)


def experiment(train, test, **fields):
    rows = [{"text": text, "label": "ab"[index % 2]} for index, text in enumerate(train)]
    held_out = [{"text": text, "label": "ab"[index % 2]} for index, text in enumerate(test)]
    source = Source("films", rows=rows, dev_rows=held_out[:2], test_rows=held_out[2:])
    task = Classification(name="films", source="films")
    return Experiment("sketched", Embedding(), (source,), (task,), (Phase("all", 1),), **fields)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The workdir of a run that learned from LONG."""
    workdir = tmp_path_factory.mktemp("first") / "run"
    mtl_jax.train(experiment([LONG, "one more", *(f"to {i}" for i in range(9))], ["dev a", "dev b", "no", "yes"]), workdir)
    return workdir


SECOND = experiment(["three", "four"], ["ONE, more", "b", LONG.replace("red", "blue"), "no"])


def test_a_later_run_names_held_out_rows_that_the_earlier_one_learned(first, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    second = dataclasses.replace(SECOND, init_from=InitFrom(str(first), subtree="heads"))
    workdir = tmp_path / "second"
    mtl_jax.train(second, workdir)
    line = f"copies: 1 of 2 dev rows of films are probably copies of training rows of {first} (init_from): 1 letters"
    assert line in caplog.text
    assert f"1 of 2 test rows of films are probably copies of training rows of {first} (init_from): 1 near" in caplog.text
    record = json.loads((workdir / "data.json").read_text())["copies"]["earlier_runs"][str(first)]
    assert record == {"films": {"dev": {"letters": 1, "near": 0}, "test": {"letters": 0, "near": 1}}}
    known, own = earlier_runs.read(first), earlier_runs.read(workdir)
    assert len(own.letters) == len(known.letters) + 2
    assert set(known.letters) < set(own.letters)  # a third run is compared with both


def test_other_rows_of_a_resumed_run_are_added(tmp_path):
    (source,) = SECOND.sources
    for train in ("a b", "c d", "c d"):
        earlier_runs.write(tmp_path, (source,), {"films": [Row({"text": train}, "f:1")]}, [])
    known = earlier_runs.read(tmp_path)
    assert (len(known.letters), known.of) == (2, 2)


def test_teachers_and_anchors_count_and_checkpoints_do_not(first, tmp_path):
    imitating = (Distillation(name="imitation", teacher=str(first)), Distillation(name="other", teacher="ORG/NAME"))
    anchored = (EWC(name="near", source="films", run=str(first)), EWC(name="own", source="films"))
    named = dataclasses.replace(SECOND, init_from=InitFrom(str(tmp_path)), regularisers=(*imitating, *anchored))
    workdirs = [("init_from", str(tmp_path)), ("imitation.teacher", str(first)), ("other.teacher", "ORG/NAME")]
    workdirs.append(("near.run", str(first)))
    assert earlier_workdirs(named) == workdirs
    compared = earlier_runs.compare(SECOND.sources, read(SECOND), workdirs)
    assert [line.split(" (")[1].split(")")[0] for line in compared.notes] == ["imitation.teacher"] * 2 + ["near.run"] * 2


def read(experiment):
    return {source.name: splits.read(source) for source in experiment.sources}


def test_a_run_without_sketches_and_a_damaged_file(first, tmp_path):
    (tmp_path / "data.json").write_text("{}")
    compared = earlier_runs.compare(SECOND.sources, read(SECOND), [("init_from", str(tmp_path))])
    assert compared.notes == [
        f"copies: {tmp_path} (init_from) has no train_sketches.npz, so it is not known whether it learned from held-out rows"
    ]
    (tmp_path / "train_sketches.npz").write_bytes(b"no")
    with pytest.raises(UserError, match=r"train_sketches.npz: cannot be read \(not a file of sketches\)"):
        prepare(dataclasses.replace(SECOND, init_from=InitFrom(str(tmp_path))))
