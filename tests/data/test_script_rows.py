"""Rows that a script gives a Source: what they may be, and what is refused; and formats that a script registers."""

import dataclasses
import itertools
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from mtl_jax import Source, data
from mtl_jax.core.errors import UserError
from mtl_jax.data.formats import READERS, script_rows
from mtl_jax.data.splits import read, read_one

ROWS = [{"text": f"text number {n}", "label": n % 3, "score": n / 2, "ok": n % 2 == 0, "none": None} for n in range(60)]
COLUMNS = [
    {"text": f"text number {n}", "label": str(n % 3), "score": str(n / 2), "ok": str(n % 2 == 0).lower()} for n in range(60)
]


def written(tmp_path, rows=ROWS) -> Source:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source("a", str(path), format="jsonl")


def all_columns(source: Source) -> list[dict]:
    return [dict(row.columns) for row in read_one(source)]


def frame():
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame(ROWS)


def dataset():
    return pytest.importorskip("datasets").Dataset.from_list(ROWS)


@pytest.mark.parametrize("make", [lambda: ROWS, lambda: tuple(ROWS), lambda: lambda: iter(ROWS), frame, dataset])
def test_rows_are_read_as_those_of_a_file(make, tmp_path):
    source, file = Source("a", rows=make()), written(tmp_path)
    assert all_columns(source) == all_columns(file) == [{**columns, "none": None} for columns in COLUMNS]
    for limited in ({}, {"limit": 20}, {"group": "score"}, {"cut_dev": 0.3, "cut_seed": 4}):
        splits, of_file = (read(dataclasses.replace(one, **limited)) for one in (source, file))
        for split in ("train", "dev", "test"):
            assert [row.columns for row in splits.rows[split]] == [row.columns for row in of_file.rows[split]]
    assert script_rows.record(source, "train") == script_rows.record(Source("b", rows=ROWS), "train")


def test_a_frame_has_no_value_where_a_cell_is_missing():
    pandas = pytest.importorskip("pandas")
    cells = pandas.DataFrame({"text": ["a", "b", "c"], "label": [1, None, 2], "tag": ["x", None, float("nan")]})
    cells["label"] = cells["label"].astype("Int64")
    assert [row["label"] for row in all_columns(Source("a", rows=cells))] == ["1", None, "2"]
    assert [row["tag"] for row in all_columns(Source("a", rows=cells))] == ["x", None, None]


def test_a_data_set_gives_the_names_of_its_classes():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, -1]}, features=features)
    assert [row["label"] for row in all_columns(Source("a", rows=rows))] == ["yes", None]


def test_words_answers_and_numpy_values():
    answers = {"text": "b", "start": 2}
    row = {"text": ["a", "b"], "context": "a b", "answers": [answers], "n": np.float32(3.8), "labels": np.array(["x", "y"])}
    (columns,) = all_columns(Source("a", rows=[{**row, "nested": {"deep": 1}}]))
    assert columns == {**row, "n": "3.8", "labels": ["x", "y"], "nested.deep": "1"}


def test_splits_of_their_own_and_a_mixture_of_rows_and_files(tmp_path):
    held_out = [{"text": f"held out {n}"} for n in range(7)]
    source = Source("a", rows=ROWS, dev_rows=held_out[:3], test_path=written(tmp_path, held_out[3:]).path, format="jsonl")
    splits = read(source)
    assert [len(splits.rows[split]) for split in ("train", "dev", "test")] == [60, 3, 4]
    assert script_rows.records(source).keys() == {"rows", "dev_rows"}


def test_a_lenient_source_counts_the_rows_that_are_none():
    splits = read(Source("a", rows=[*ROWS, 7, {"text": ""}, {"text": "b", "label": {1, 2}}], lenient=True))
    assert splits.skipped == 3


def test_a_source_with_rows_can_be_hashed_compared_and_pickled():
    source = Source("a", rows=ROWS)
    assert source == Source("a", rows=ROWS) != Source("a", rows=list(ROWS))
    assert len({source, dataclasses.replace(source)}) == 1
    assert all_columns(pickle.loads(pickle.dumps(source))) == all_columns(source)
    assert "text number" not in repr(source)


def failing():
    yield ROWS[0]
    raise KeyError("x")


counter = itertools.count()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "source 'a': path is empty; it must name the training rows, or rows must give them"),
        ({"path": "x", "rows": ROWS}, "source 'a': both path and rows are given; leave one of them out"),
        ({"rows": ROWS, "test_path": "x", "test_rows": ROWS}, "both test_path and test_rows are given"),
        ({"path": ROWS}, r"path is a list; it must be a str \(rows of a script: rows=\)"),
        ({"rows": []}, "source 'a': rows has no rows"),
        ({"rows": failing()}, "rows is a generator, which can be read only once; give the function that makes it, without"),
        ({"rows": iter(ROWS)}, "rows is a list_iterator, which can be read only once"),
        ({"rows": {"text": ["a"]}}, "rows is a dict with the keys text; it must be a list of dicts, one a row"),
        ({"rows": "x.csv"}, "rows is a text; a file is named by path"),
        ({"rows": 3}, "rows is an int; it must be a list of dicts"),
        ({"rows": lambda: 3}, r"a.rows\[0\]: rows of source 'a' returned an int; it must return an iterable of dicts"),
        ({"rows": failing}, r"a.rows\[1\]: rows of source 'a' failed: KeyError: 'x' .*test_script_rows.py:"),
        ({"rows": [ROWS[0], ["a"]]}, r"a.rows\[1\]: the row is a list; it must be a dict of columns"),
        ({"rows": [{"txt": "a"}]}, r"a.rows\[0\]: source 'a' has no text column 'text'; columns: txt"),
        ({"rows": [{1: "a"}]}, "the column name 1 is not a text"),
        ({"rows": [{"text": float("nan")}]}, "column 'text' is NaN; give None where there is no value"),
        ({"rows": [{"text": "a", "label": object()}]}, "column 'label' is an object; give a text, a number, None"),
        ({"rows": [{"text": "\ud800"}]}, "half of a surrogate pair"),
        (
            {"rows": lambda: [{"text": f"a {next(counter)}"} for _ in range(30)]},
            "had 30 rows in its first pass, and other rows",
        ),
    ],
)
def test_what_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        read(Source("a", **fields))


def register(reader):
    data.register_format("mine")(reader)
    return reader


@pytest.mark.parametrize("takes_source", [False, True])
def test_a_format_of_a_script(takes_source, tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("\n".join(f"{n};{row['text']}" for n, row in enumerate(ROWS)))

    def rows(file: str, name: str):
        with open(file, encoding="utf-8") as opened:
            for line in opened:
                number, _, text = line.strip().partition(";")
                yield {name: text, "label": int(number) % 3, "words": text.split()}

    def with_source(file, source):
        return rows(file, source.columns[0])

    register(with_source if takes_source else lambda file: list(rows(file, "text")))
    source = Source("a", str(path), format="mine", columns=("text",) if takes_source else ())
    assert [row["label"] for row in all_columns(source)] == [row["label"] for row in COLUMNS]
    assert read_one(source)[4].where == f"{path}: row 5"
    if not takes_source:
        with pytest.raises(UserError, match="columns cannot be given for format mine"):
            read(dataclasses.replace(source, columns=("text",)))


def test_what_a_reader_of_a_script_does_wrong(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("a\n")

    def broken(file):
        yield {"text": "a"}
        raise ZeroDivisionError("division by zero")

    register(broken)
    message = r"row 2: the reader of format mine, .*test_script_rows\.py, failed: ZeroDivisionError: .*test_script_rows\.py:"
    with pytest.raises(UserError, match=message):
        read(Source("a", str(path), format="mine"))
    for result, message in (
        (3, "returned an int; it must return an iterable of dicts"),
        ([3], "rows.txt: row 1: the row is an int; it must be a dict of columns"),
        ([UserError("line 9 is odd")], "line 9 is odd"),
        ([], "the file has no rows"),
    ):
        register(lambda file, result=result: result)
        with pytest.raises(UserError, match=message):
            read(Source("a", str(path), format="mine"))
    with pytest.raises(UserError, match=r"nothing\.txt: no such file"):
        read(Source("a", str(tmp_path / "nothing.txt"), format="mine"))
    with pytest.raises(UserError, match="the name 'csv' is taken by mtl_jax's own format"):
        data.register_format("csv")(broken)


def test_the_guide_has_every_field_of_a_source():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    table = page.partition("All fields of a `Source`:\n\n")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == [field.name for field in dataclasses.fields(Source)]


@pytest.fixture(autouse=True)
def _formats_restored():
    before = dict(READERS)
    yield
    READERS._functions.clear()
    READERS._functions.update(before)
