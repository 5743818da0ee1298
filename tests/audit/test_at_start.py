"""What a run does at its start about copies of held-out rows in train: by default it says so, and learns the same."""

import dataclasses
import json
import logging

import pytest

import mtl_jax
from mtl_jax import Classification, Embedding, Experiment, Phase, Source, UserError
from mtl_jax.audit import at_start
from mtl_jax.data import splits
from mtl_jax.data.corpus import read_sources
from mtl_jax.training.experiment_json import from_json, to_json
from mtl_jax.training.setup import prepare

LONG = "an old dog sleeps under that red house by our river"
NEAR = LONG.replace("red", "blue")


def labelled(*texts):
    return [{"text": text, "label": "ab"[index % 2]} for index, text in enumerate(texts)]


def source(name, train, test, **fields):
    return Source(
        name=name, rows=labelled(*train), dev_rows=labelled("to choose", "by this"), test_rows=labelled(*test), **fields
    )


FILMS = source("films", ["A moore 's film", NEAR, "one more", "and another"], ["a Moore's film", LONG, "none"])
BOOKS = source("books", ["a  moores film!", "a book", "another book"], ["One, more?", "not a book"])


def experiment(*sources):
    tasks = tuple(Classification(name=f"{part.name}_task", source=part.name) for part in sources)
    return Experiment(name="audited", trunk=Embedding(), sources=sources, tasks=tasks, phases=(Phase("all", 2),))


def examined(*sources):
    return at_start.examine(sources, read_sources(sources, experiment(*sources).tasks))


def texts(result, name):
    return [row.columns["text"] for row in result.data[name].rows["train"]]


def test_the_default_reports_each_pair_of_sources_and_changes_nothing():
    result = examined(FILMS, BOOKS)
    assert texts(result, "films") == ["A moore 's film", NEAR, "one more", "and another"]
    assert texts(result, "books") == ["a  moores film!", "a book", "another book"]
    assert result.notes == [
        "copies: 1 training row of books is a copy of held-out rows of films: 1 of test (1 letters)",
        "copies: 1 training row of films is a copy of held-out rows of books: 1 of test (1 letters)",
        "copies: 2 training rows of films are copies of held-out rows of films: 2 of test (1 letters, 1 near)",
        'copies: mtl-jax audit SCRIPT lists them; a source with copies="drop" leaves them out',
    ]
    assert [(entry["train_source"], entry["source"], entry["train_rows"]) for entry in result.record["overlaps"]] == [
        ("books", "films", 1),
        ("films", "books", 1),
        ("films", "films", 2),
    ]


def test_drop_leaves_out_copies_of_all_sources_in_one_and_keeps_the_held_out_rows():
    result = examined(dataclasses.replace(FILMS, copies="drop"), BOOKS)
    assert texts(result, "films") == ["and another"]
    assert texts(result, "books") == ["a  moores film!", "a book", "another book"]
    assert [len(result.data["films"].rows[split]) for split in ("dev", "test")] == [2, 3]
    assert len(result.data["films"].text_digests["train"]) == 1
    assert "copies: 3 training rows of films left out as copies" in result.notes
    assert result.record["dropped"] == {"films": 3}
    assert texts(examined(dataclasses.replace(FILMS, copies="drop", near=0.9)), "films") == [NEAR, "one more", "and another"]


def test_fail_names_the_rows():
    with pytest.raises(UserError) as error:
        examined(dataclasses.replace(FILMS, copies="fail"), BOOKS)
    assert str(error.value) == (
        "source 'films': 3 training rows are copies of held-out rows: films.rows[0] of films.test_rows[0], films.rows[1] of "
        'films.test_rows[1], films.rows[2] of books.test_rows[0]; copies="drop" leaves them out'
    )
    alone = dataclasses.replace(BOOKS, copies="fail")
    assert examined(alone).notes == []


def test_without_copies_there_is_no_line_and_no_record():
    result = examined(BOOKS)
    assert (result.notes, result.record) == ([], {})


def test_a_source_of_which_nothing_is_left_is_one_line():
    copied = source("copied", ["a?", "b?"], ["a!", "b!"], copies="drop")
    with pytest.raises(UserError, match="source 'copied': every training row is a copy of a held-out row"):
        examined(copied)


def test_very_many_rows_are_compared_only_where_it_matters(monkeypatch):
    monkeypatch.setattr(at_start, "MOST_ROWS", 5)
    assert "are too many to be compared at every start" in examined(FILMS, BOOKS).notes[0]
    assert len(texts(examined(dataclasses.replace(FILMS, copies="drop"), BOOKS), "films")) == 1


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"copies": "remove"}, "unknown copies of source 'films': 'remove'; choices: report, drop, fail"),
        ({"near": 0.0}, "near"),
        ({"near": 1.5}, "near"),
    ],
)
def test_a_wrong_field_is_one_line(fields, line):
    with pytest.raises(UserError, match=line):
        prepare(experiment(dataclasses.replace(FILMS, **fields)))


def test_config_json_names_the_fields_only_where_they_are_set():
    plain = to_json(experiment(FILMS))
    assert not {"copies", "near"} & set(plain["sources"][0])
    changed = json.loads(json.dumps(to_json(experiment(dataclasses.replace(FILMS, copies="drop", near=0.8)))))
    read = from_json(changed).sources[0]
    assert (read.copies, read.near) == ("drop", 0.8)


def test_a_run_says_it_and_a_workdir_of_before_resumes(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    workdir = tmp_path / "run"
    results = mtl_jax.train(experiment(FILMS, BOOKS), workdir)
    assert "copies: 2 training rows of films are copies of held-out rows of films: 2 of test (1 letters, 1 near)" in caplog.text
    data = json.loads((workdir / "data.json").read_text())
    assert data["copies"]["overlaps"][0]["rows"] == {"exact": 0, "letters": 1, "near": 0}
    del data["copies"]  # as an earlier version wrote it
    (workdir / "data.json").write_text(json.dumps(data))
    (workdir / "results.json").unlink()
    again = mtl_jax.train(experiment(FILMS, BOOKS), workdir)
    assert again["tasks"] == results["tasks"]
    assert "copies" in json.loads((workdir / "data.json").read_text())


def test_batches_without_a_run_refuse_what_only_a_run_does():
    from mtl_jax.data.source_batches import batches_of

    with pytest.raises(UserError, match="source 'films': copies is 'drop', which only a run looks after"):
        batches_of(dataclasses.replace(FILMS, copies="drop"), (), tokenizer=None)


def test_rows_on_disk_stay_there(monkeypatch):
    from mtl_jax.data.formats.records import Picked, Records

    records = Records("hf:x", [{"text": text} for text in ("a?", "b", "c")], None)
    parts = splits.Splits({"train": Picked(records, [0, 1, 2])}, 0, text_digests={"train": [b"a", b"b", b"c"]})
    kept = at_start._without("x", parts, {0})
    assert isinstance(kept.rows["train"], Picked)
    assert [row.columns["text"] for row in kept.rows["train"]] == ["b", "c"]
