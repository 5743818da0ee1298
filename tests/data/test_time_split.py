"""Sources that are divided by time: the newest rows are held out, and rows of one time stay together."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_jax import Classification, Embedding, Experiment, Phase, Source, UserError
from mtl_jax.core import row_texts
from mtl_jax.data import splits
from mtl_jax.data.cuts import Moment, by_time
from mtl_jax.training.experiment_json import from_json, to_json


def source(times, **fields):
    rows = [{"text": f"text {index}", "label": "ab"[index % 2], "at": time} for index, time in enumerate(times)]
    return Source("posts", rows=rows, time="at", **fields)


def times_of(parts):
    return {split: [row.columns["at"] for row in rows] for split, rows in parts.rows.items()}


YEARS = [str(year) for year in (2022, 2019, 2024, 2020, 2021, 2023, 2018, 2017, 2016, 2015)]


def test_the_oldest_rows_are_learned_from_and_the_newest_tested():
    parts = splits.read(source(YEARS))
    assert {split: sorted(years) for split, years in times_of(parts).items()} == {
        "train": [str(year) for year in range(2015, 2023)],
        "dev": ["2023"],
        "test": ["2024"],
    }
    assert times_of(parts)["train"] == [year for year in YEARS if year < "2023"]  # in the order of the file
    assert parts.remarks == ["divided by time: train from 2015 to 2022, dev from 2023 to 2023, test from 2024 to 2024"]
    with row_texts.hiding(True):
        assert splits.read(source(YEARS)).remarks == ["divided by time"]


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=30),
    st.floats(0, 0.4),
    st.floats(0, 0.4),
)
def test_no_row_is_older_than_one_that_is_learned_from(values, dev, test):
    targets = by_time([Moment(value, "") for value in values], {"dev": dev, "test": test})
    order = {"train": 0, "dev": 1, "test": 2}
    by_value = {}
    for value, target in zip(values, targets, strict=True):
        assert by_value.setdefault(value, target) == target
    ordered = [order[by_value[value]] for value in sorted(by_value)]
    assert ordered == sorted(ordered)
    assert targets.count("test") >= round(test * len(values))


def test_dates_of_several_forms_and_zones():
    times = ["2024-05", "2024-05-02", "2024-05-02T10:00:00+02:00", "2024-05-02 09:00", "2024-06-01T00:00:00Z", "2023", "1950"]
    parts = splits.read(source(times, cut_dev=1 / 7, cut_test=2 / 7))
    assert times_of(parts)["test"] == ["2024-05-02 09:00", "2024-06-01T00:00:00Z"]
    assert times_of(parts)["dev"] == ["2024-05-02T10:00:00+02:00"]


@pytest.mark.parametrize("others", [["2019-03-01"], ["2019-03"], ["2019-03-01T10:00+02:00"]])
def test_years_beside_dates_are_years(others):
    years = [*others, *(str(year) for year in range(2014, 2024)), "2024-01-01"]
    parts = splits.read(source(years))
    assert times_of(parts)["test"] == ["2024-01-01"]
    assert times_of(parts)["dev"] == ["2023"]
    assert parts.remarks[0].startswith("divided by time: train from 2014 to 2022, dev from 2023 to 2023, test from 2024-01-01")


def test_a_document_on_both_sides_is_named_and_a_pair_the_other_way_round_leaves_train():
    rows = [{"text": f"t{year}", "second": "x", "at": year, "user": "u" if year > "2022" else year} for year in YEARS]
    rows += [{"text": "x", "second": "t2024", "at": "2001", "user": "v"}]
    parts = splits.read(Source("posts", rows=rows, pair="second", time="at", group="user"))
    assert parts.repeated == 1
    assert "2001" not in times_of(parts)["train"]
    assert parts.remarks[1] == "1 document has rows on both sides of a cut, as time alone divides them"
    assert parts.remarks[2:] == ["1 pair is left out (1 of train): the same pair the other way round is held out"]


@pytest.mark.parametrize(
    ("times", "fields", "line"),
    [
        (["soon", "2024"], {}, r"posts.rows\[0\]: the time column 'at' has 'soon', which is neither a number nor an ISO date"),
        ([None, "2024"], {}, r"posts.rows\[0\]: the time column 'at' has None"),
        (YEARS, {"time": "when"}, "source 'posts' has no time column 'when'; columns: text, label, at"),
        (
            ["2024-05-01", "20240502"],
            {},
            "source .posts.: the time column .at. has dates, such as .2024-05-01., and numbers, such",
        ),
        (["1714521600", "2024-05"], {}, "as .1714521600., so their order is not known; write all as dates"),
        (["1"] * 9, {}, "split train is empty .*; of its 9 distinct texts none is left after dev and test"),
        (["1", *["2"] * 9], {}, "split dev is empty .* none is among the newest 0.1: rows of one time stay together"),
        (YEARS, {"cut_dev": 0, "cut_test": 0}, "time is given, but nothing is split off from path"),
    ],
)
def test_bad_input_is_one_line(times, fields, line):
    options = {"time": "at", **fields}
    rows = [{"text": f"text {index}", "label": "a", "at": time} for index, time in enumerate(times)]
    with pytest.raises(UserError, match=line):
        splits.read(Source("posts", rows=rows, **options))


def test_a_lenient_source_leaves_out_rows_without_a_time(caplog):
    assert splits.read(source(["soon", *YEARS], lenient=True)).skipped == 1
    assert "the time column 'at' has 'soon'" in caplog.text


def test_config_json_has_the_field_only_where_it_is_set():
    task = Classification(name="t", source="posts")
    experiment = Experiment("timed", Embedding(), (source(YEARS),), (task,), (Phase("a", 1),))
    stored = json.loads(json.dumps(to_json(experiment)))
    assert from_json(stored).sources[0].time == "at"
    del stored["sources"][0]["time"]
    assert from_json(stored).sources[0].time == ""
