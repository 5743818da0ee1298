import dataclasses
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_jax.core.errors import UserError
from mtl_jax.data import row_keys
from mtl_jax.data import splits as sources
from mtl_jax.data.source import Source
from mtl_jax.data.splits import read


def write(path, text):
    path.write_bytes(text.encode())
    return str(path)


def texts(splits):
    return {split: [row.columns["text"] for row in rows] for split, rows in splits.rows.items()}


def numbered(n):
    return "".join(f"{i % 2}\ttext number {i}\n" for i in range(n))


def test_csv_quotes_and_newlines_and_crlf(tmp_path):
    path = write(tmp_path / "a.csv", 'label,text\r\n1,"He said ""no"",\nthen left"\r\n0,plain\r\n')
    only = {"dev_path": path, "test_path": path}
    # With the same file as dev and test, every text is a test text and train is empty: read the rows from the error.
    with pytest.raises(UserError, match="split train is empty"):
        read(Source(name="a", path=path, **only))
    splits = read(
        Source(
            name="a",
            path=write(tmp_path / "b.csv", "label,text\n1,other\n"),
            dev_path=write(tmp_path / "c.csv", "label,text\n1,third\n"),
            test_path=path,
        )
    )
    assert texts(splits)["test"] == ['He said "no",\nthen left', "plain"]
    assert splits.rows["test"][1].where == f"{path}:4"


def test_tsv_keeps_quotes_as_they_are(tmp_path):
    path = write(tmp_path / "a.tsv", "label\ttext\n" + '1\t"unbalanced\n' + numbered(60))
    splits = read(Source(name="a", path=path, format="tsv"))
    assert sum('"unbalanced' in rows for rows in texts(splits).values()) == 1
    assert sum(len(rows) for rows in splits.rows.values()) == 61


def test_lines_with_a_pattern(tmp_path):
    path = write(tmp_path / "a.txt", "".join(f"HUM:ind Who is number {i} ?\n" for i in range(60)))
    source = Source(name="a", path=path, format="lines", pattern=r"(?P<fine>(?P<coarse>\w+):\w+) (?P<text>.+)")
    row = read(source).rows["train"][0]
    assert row.columns["coarse"] == "HUM"
    assert row.columns["fine"] == "HUM:ind"


def test_the_same_text_is_in_one_split_only(tmp_path):
    repeated = "".join(f"1\tTEXT   number {i}\n" for i in range(0, 200, 3))
    path = write(tmp_path / "a.tsv", "label\ttext\n" + numbered(200) + repeated)
    splits = read(Source(name="a", path=path, format="tsv"))
    found = [row_keys.normalise(text) for rows in texts(splits).values() for text in rows]
    assert len(found) == len(set(found)) == 200
    assert splits.repeated == 67
    assert 5 <= len(splits.rows["dev"]) <= 40
    assert 5 <= len(splits.rows["test"]) <= 40


def test_the_cut_does_not_depend_on_the_order_of_the_file(tmp_path):
    lines = numbered(200).splitlines(keepends=True)
    first = read(Source(name="a", path=write(tmp_path / "a.tsv", "label\ttext\n" + "".join(lines)), format="tsv"))
    second = read(Source(name="a", path=write(tmp_path / "b.tsv", "label\ttext\n" + "".join(lines[::-1])), format="tsv"))
    assert all(set(texts(first)[split]) == set(texts(second)[split]) for split in sources.SPLITS)
    other = read(Source(name="a", path=str(tmp_path / "a.tsv"), format="tsv", cut_seed=1))
    assert texts(first)["test"] != texts(other)["test"]


def test_a_document_stays_in_one_split(tmp_path):
    lines = "".join(f"{i // 4}_{i % 4}\ttext number {i}\n" for i in range(400))
    path = write(tmp_path / "a.tsv", "id\ttext\n" + lines)
    splits = read(Source(name="a", path=path, format="tsv", group="id", group_pattern=r"^\d+"))
    documents = {split: {row.columns["id"].split("_")[0] for row in rows} for split, rows in splits.rows.items()}
    assert not documents["train"] & documents["test"]
    assert not documents["train"] & documents["dev"]
    assert not documents["dev"] & documents["test"]


def test_a_text_of_the_test_file_leaves_the_training_rows(tmp_path):
    train = write(tmp_path / "train.tsv", "label\ttext\n" + numbered(50))
    test = write(tmp_path / "test.tsv", "label\ttext\n1\tText number 7\n")
    splits = read(Source(name="a", path=train, test_path=test, format="tsv", cut_dev=0.2))
    assert texts(splits)["test"] == ["Text number 7"]
    assert "text number 7" not in texts(splits)["train"] + texts(splits)["dev"]


@given(st.text(), st.integers(0, 5), st.floats(0, 0.5), st.floats(0, 0.49))
def test_a_cut_is_always_a_split(key, seed, dev, test):
    split = sources.split_of(key, seed, {"dev": dev, "test": test})
    assert split in sources.SPLITS
    assert not (split == "dev" and dev == 0)
    assert not (split == "test" and test == 0)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("label\tbody\n1\tx\n", {}, r"a\.tsv: source 'a' has no text column 'text'; columns: label, body"),
        ("label\ttext\n1\tx\textra\n", {}, r"a\.tsv:2: 3 columns, but there are 2 names: label, text"),
        ("label\ttext\n1\t \n", {}, r"a\.tsv:2: the text column 'text' is empty"),
        ("label\ttext\n1\tx\n", {}, r"split (test|dev|train) is empty"),
        ("label\ttext\n", {}, r"a\.tsv: the file has no rows"),
        ("", {}, r"a\.tsv: the file is empty"),
        ("label\ttext\ttext\n1\tx\ty\n", {}, r"a\.tsv: there are two columns 'text'"),
        ("label\ttext\n1\tx\n", {"pair": "other"}, r"has no pair column 'other'"),
        ("label\ttext\n1\tx\n", {"id": "key"}, r"has no id column 'key'"),
        ("label\ttext\n1\tx\n1\ty\n", {"id": "label"}, r"a\.tsv:3: the id '1' occurs already at .*a\.tsv:2"),
        ("label\ttext\n1\tx\n", {"limit": -1}, "limit is -1"),
        ("label\ttext\n1\tx\n", {"limit_train": -1}, "limit_train is -1"),
        ("1 x\n", {"format": "lines", "columns": ("a",)}, "columns cannot be given for format lines"),
        ("1 x\n", {"format": "conll"}, "format conll needs columns"),
        ("label\ttext\n1\tx\n", {"dev_path": "tfds:glue/sst2"}, "names no split; write tfds:glue/sst2#validation"),
        ("label\ttext\n1\t" + "x" * 1_000_001 + "\n", {}, r"a\.tsv:2: the line is longer than 1,000,000 bytes"),
        ("label\ttext\n1\tx\n", {"format": "xml"}, "unknown format of source 'a': 'xml'; choices: csv, tsv, lines"),
        ("label\ttext\n1\tx\n", {"cut_dev": 0.6, "cut_test": 0.6}, "sum below 1"),
        ("1 x\nbad\n", {"format": "lines", "pattern": r"(?P<l>\d) (?P<text>.+)"}, r"a\.tsv:2: the line does not match"),
        ("1 x\n", {"format": "lines", "pattern": "("}, "not a regular expression"),
        ("label\ttext\n1\tx\n", {"group": "doc"}, r"a\.tsv:2: source 'a' has no group column 'doc'"),
    ],
)
def test_bad_files_are_named(tmp_path, content, options, message):
    path = write(tmp_path / "a.tsv", content)
    with pytest.raises(UserError, match=message):
        read(Source(name="a", path=path, **({"format": "tsv"} | options)))


def test_not_utf8_names_the_line(tmp_path):
    (tmp_path / "a.tsv").write_bytes(b"label\ttext\n1\tfine\n0\tcaf\xe9\n")
    with pytest.raises(UserError, match=r"a\.tsv:3: not UTF-8"):
        read(Source(name="a", path=str(tmp_path / "a.tsv"), format="tsv"))


def test_broken_quotes_name_the_line(tmp_path):
    path = write(tmp_path / "a.csv", 'label,text\n1,"never closed\n')
    with pytest.raises(UserError, match=r"a\.csv:2: unexpected end"):
        read(Source(name="a", path=path))


def test_a_quote_that_is_never_closed_ends_the_run_even_if_lenient(tmp_path):
    # It swallows the rest of the file: to skip it as one bad row would lose many good ones.
    path = write(tmp_path / "a.csv", 'label,text\n1,fine\n1,"never closed\n' + "0,fine\n" * 20)
    with pytest.raises(UserError, match="a quote is not closed in the row that begins on line 3"):
        read(Source(name="a", path=path, lenient=True))


def test_official_dev_and_test_files_are_kept_whole(tmp_path):
    train = write(tmp_path / "train.tsv", "label\ttext\n" + numbered(50) + numbered(3))
    dev = write(tmp_path / "dev.tsv", "label\ttext\n1\ttext number 3\n0\ttext number 3\n1\ttext number 4\n")
    test = write(tmp_path / "test.tsv", "label\ttext\n1\tText number 4\n1\tText number 4\n1\tnew\n")
    splits = read(Source(name="a", path=train, dev_path=dev, test_path=test, format="tsv"))
    assert texts(splits)["dev"] == ["text number 3", "text number 3", "text number 4"]
    assert texts(splits)["test"] == ["Text number 4", "Text number 4", "new"]
    assert texts(splits)["train"] == [f"text number {i}" for i in range(50) if i not in (3, 4)]
    assert splits.repeated == 2 + 3


def test_a_pair_is_repeated_only_if_both_texts_are(tmp_path):
    lines = "".join(f"text\tother {i}\n" for i in range(100)) + "Text\tother  5\n"
    path = write(tmp_path / "a.tsv", lines)
    source = Source(name="a", path=path, format="tsv", columns=("text", "second"), pair="second")
    splits = read(source)
    assert sum(len(rows) for rows in splits.rows.values()) == 100
    assert splits.repeated == 1
    with pytest.raises(UserError, match=r"b\.tsv:2: the pair column 'second' is empty"):
        read(dataclasses.replace(source, path=write(tmp_path / "b.tsv", "one\ttwo\nthree\t\n")))


def test_lenient_counts_and_names_what_it_leaves_out(tmp_path, caplog):
    bad = b"1\t\n" + b"only one column\n" + b"1\tcaf\xe9\n" + b"1\t" + b"x" * 10_000_000 + b"\n" + b"1\t\n" * 4
    (tmp_path / "a.tsv").write_bytes(b"label\ttext\n" + bad + numbered(60).encode())
    path = str(tmp_path / "a.tsv")
    splits = read(Source(name="a", path=path, format="tsv", lenient=True))
    assert splits.skipped == 8
    assert sum(len(rows) for rows in splits.rows.values()) == 60
    assert [message.replace(path, "a.tsv") for message in caplog.messages] == [
        "skipped: a.tsv:2: the text column 'text' is empty",
        "skipped: a.tsv:3: 1 column, but there are 2 names: label, text",
        "skipped: a.tsv:4: not UTF-8 (invalid continuation byte); convert the file to UTF-8",
        "skipped: a.tsv:5: the line is longer than 1,000,000 bytes; is it one text?",
        "skipped: a.tsv:6: the text column 'text' is empty",
        "source a: 8 rows skipped, of which the first 5 are named above",
    ]


def test_nothing_but_skipped_rows_says_so(tmp_path):
    path = write(tmp_path / "a.tsv", "label\ttext\n1\t\n1\t\n")
    with pytest.raises(UserError, match=r"split train is empty .* 2 rows were skipped, the first: .*a\.tsv:2: the text column"):
        read(Source(name="a", path=path, format="tsv", lenient=True))


def test_wildcards_are_several_files_in_sorted_order(tmp_path, monkeypatch):
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "rows.tsv", "label\ttext\n" + "".join(f"1\t{name} {i}\n" for i in range(40)))
    splits = read(Source(name="a", path=str(tmp_path / "*" / "rows.tsv"), format="tsv"))
    assert texts(splits)["train"] == sorted(texts(splits)["train"], key=lambda text: (text[0], int(text[2:])))
    assert {text[0] for text in texts(splits)["train"]} == {"a", "b"}
    monkeypatch.setenv("MTL_JAX_DATA", str(tmp_path))
    row = read(Source(name="a", path="data:?/rows.tsv", format="tsv")).rows["train"][0]
    assert row.where.startswith("data:a/rows.tsv:")
    with pytest.raises(UserError, match=r"data:\*/no\.tsv: no file of such a name"):
        read(Source(name="a", path="data:*/no.tsv", format="tsv"))


def test_a_pair_the_other_way_round_stays_on_its_side(tmp_path):
    """Cut or given: a pair and its swapped self are two rows, never one to learn from and one to test on."""
    pairs = [(f"first {i}", f"second {i}") for i in range(200)]
    lines = [f"{a}\t{b}\n{b}\t{a}\n" for a, b in pairs]
    path = write(tmp_path / "a.tsv", "text\tother\n" + "".join(lines))
    splits = read(Source(name="a", path=path, format="tsv", pair="other"))
    assert splits.repeated == 0
    where = {(row.columns["text"], row.columns["other"]): split for split, rows in splits.rows.items() for row in rows}
    assert all(where[a, b] == where[b, a] for a, b in pairs)
    official = write(tmp_path / "test.tsv", "text\tother\n" + "".join(f"{b}\t{a}\n" for a, b in pairs[:20]))
    splits = read(Source(name="a", path=path, test_path=official, format="tsv", pair="other"))
    assert splits.repeated == 40
    assert len(splits.rows["test"]) == 20


def test_documents_part_no_pair_from_the_pair_the_other_way_round(tmp_path):
    """Where its two documents are in two splits, it is in the held-out one alone, in test before dev."""
    lines = "".join(f"first {i}\tsecond {i}\tx{i}\nsecond {i}\tfirst {i}\ty{i}\n" for i in range(300))
    path = write(tmp_path / "a.tsv", "text\tother\tdoc\n" + lines)
    splits = read(Source(name="a", path=path, format="tsv", pair="other", group="doc"))
    sides = {split: {min(row.columns["text"], row.columns["other"]) for row in rows} for split, rows in splits.rows.items()}
    assert sum(map(len, sides.values())) == len(set().union(*sides.values())) == 300
    where = [[sources.split_of(f"{doc}{i}", 0, {"dev": 0.1, "test": 0.1}) for doc in "xy"] for i in range(300)]
    left_out = [min(pair, key=sources.SPLITS.index) for pair in where if pair[0] != pair[1]]
    train, dev = left_out.count("train"), left_out.count("dev")
    assert dev
    assert splits.repeated == train + dev == 600 - sum(map(len, splits.rows.values()))
    assert splits.remarks == [
        f"{train + dev} pairs are left out ({train} of train, {dev} of dev): the same pair the other way round is held out"
    ]


def test_a_document_of_an_official_split_leaves_the_training_rows(tmp_path):
    train = write(tmp_path / "a.tsv", "id\ttext\n" + "".join(f"d{i // 4}_{i % 4}\ttext {i}\n" for i in range(400)))
    test = write(tmp_path / "b.tsv", "id\ttext\nd3_9\tone more text\n")
    splits = read(Source(name="a", path=train, test_path=test, format="tsv", group="id", group_pattern=r"^d\d+"))
    assert splits.repeated == 4
    assert not any(row.columns["id"].startswith("d3_") for split in ("train", "dev") for row in splits.rows[split])


def test_no_source_teaches_what_another_tests(tmp_path):
    """Tasks share a trunk: texts of one's dev and test rows leave the other's training rows, and are counted."""
    numbers = {"a": range(10), "a_dev": [50], "a_test": [3, 51], "b": range(20), "b_dev": [5], "b_test": [60]}
    files = {name: write(tmp_path / name, "text\n" + "".join(f"text {i}\n" for i in own)) for name, own in numbers.items()}
    read_both = {
        name: read(Source(name=name, path=files[name], dev_path=files[f"{name}_dev"], test_path=files[f"{name}_test"]))
        for name in "ab"
    }
    found = sources.without_shared_texts(read_both)
    assert texts(found["a"])["train"] == [f"text {i}" for i in range(10) if i not in (3, 5)]
    assert texts(found["b"])["train"] == [f"text {i}" for i in range(20) if i not in (3, 5)]
    assert [(found[name].repeated, found[name].shared) for name in "ab"] == [(1, 1), (1, 1)]
    assert texts(found["a"])["test"] == ["text 3", "text 51"]
    assert sources.without_shared_texts(found)["a"].shared == 0


def test_few_training_rows_beside_all_of_dev_and_test(tmp_path):
    path = write(tmp_path / "a.tsv", "label\ttext\n" + numbered(100))
    whole, few = (read(Source(name="a", path=path, format="tsv", **limits)) for limits in ({}, {"limit_train": 7}))
    assert len(few.rows["train"]) == 7
    assert [row for row in whole.rows["train"] if row in few.rows["train"]] == few.rows["train"] != whole.rows["train"][:7]
    assert (few.rows["dev"], few.rows["test"]) == (whole.rows["dev"], whole.rows["test"])
    few = read(Source(name="a", path=path, format="tsv", limit=3, limit_train=7))
    assert [len(few.rows[split]) for split in ("train", "dev", "test")] == [3, 3, 3]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("~nosuchuser/x.csv", "~nosuchuser/x.csv: the home directory '~nosuchuser' is unknown"),
        ("~nosuchuser/*.csv", "the home directory '~nosuchuser' is unknown"),
        ("~nosuchuser/{a,b}.csv", "the home directory '~nosuchuser' is unknown"),
        ("x" * 5000, "cannot be read \\(File name too long\\)"),
        ("x/" * 5000, "cannot be read \\(File name too long\\)"),
        ("*" + "x" * 5000, "no file of such a name"),
        ("a\0b", "cannot be read \\(embedded null byte\\)"),
        ("*\0b", "no file of such a name"),
        ("https://example.org/a.csv?b", "a URL, but only files are read; download it"),
        ("s3://bucket/*.csv", "a URL, but only files are read; download it"),
        ("", "path is empty"),
        ("{folder}", "a directory; a source needs a file"),
        ("{folder}/fifo", "fifo: not a regular file"),
        ("{folder}/fif?", "fifo: not a regular file"),
        ("/dev/zero", "not a regular file"),
    ],
    ids=lambda value: value[:20].replace("\0", "NUL"),
)
@pytest.mark.parametrize("format", ["csv", "conll"])
def test_paths_that_are_no_file_are_one_short_line(tmp_path, path, message, format):
    os.mkfifo(tmp_path / "fifo")
    columns = ("text", "label") if format == "conll" else ()
    if "{a,b}" in path:
        format, columns = "parallel", ("text", "b")
    with pytest.raises(UserError, match=message) as caught:
        read(Source(name="a", path=path.replace("{folder}", str(tmp_path)), format=format, columns=columns))
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


def test_a_path_that_may_not_be_looked_at(tmp_path, monkeypatch):
    def refused(path, *_, **__):
        raise PermissionError(13, "Permission denied", path)

    with monkeypatch.context() as patched:
        patched.setattr("mtl_jax.core.files.os.stat", refused)
        with pytest.raises(UserError, match=r"a\.csv: cannot be read \(Permission denied\)$"):
            read(Source(name="a", path="a.csv"))


@pytest.mark.parametrize("field", ["pattern", "group_pattern"])
@pytest.mark.parametrize(
    "pattern", ["[", "(" * 100_000, "a{1,99999999999}", r"\p{L}", "(?P<text>.)(?P<text>.)"], ids=lambda value: value[:20]
)
def test_patterns_that_do_not_compile(tmp_path, field, pattern):
    source = Source(name="a", path=write(tmp_path / "a.txt", "x\n"), format="lines", **{field: pattern})
    with pytest.raises(UserError, match=rf"source 'a': {field} is not a regular expression \(") as caught:
        read(source)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": Path("a.csv")}, "path is a PosixPath; it must be a str"),
        ({"path": "a.csv", "columns": "text"}, "columns is the text 'text'; it must be a tuple of names"),
    ],
)
def test_fields_of_another_type(fields, message):
    with pytest.raises(UserError, match=message):
        read(Source(name="a", **fields))


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (4, {"cut_dev": 0.9, "cut_test": 0.05}, "of its 4 distinct texts none is left after dev and test: give it more rows"),
        (4, {}, r"none fell into the share of 0\.1: give it more rows, a larger cut_test, another cut_seed, or"),
        (60, {"cut_dev": 0.0}, "split dev is empty .*; cut_dev is 0: make it a share of the texts, or name a dev_path"),
        (60, {"cut_test": 0.0}, "cut_test is 0: make it a share of the texts, or name a test_path"),
        (60, {"group": "label", "group_pattern": "."}, "of its 2 distinct documents none fell into"),
        (4, {"same": True}, "the texts of all its 4 rows are in dev or test: name another path"),
    ],
)
def test_an_empty_split_says_what_to_change(tmp_path, rows, options, message):
    path = write(tmp_path / "a.tsv", "label\ttext\n" + numbered(rows))
    options = {"dev_path": path, "test_path": path} if options == {"same": True} else options
    with pytest.raises(UserError, match=message):
        read(Source(name="a", path=path, format="tsv", **options))


def test_a_row_that_cannot_be_read_names_lenient_where_that_is_a_way(tmp_path, caplog):
    path = write(tmp_path / "a.tsv", "label\ttext\n1\t\n" + numbered(60))
    way = "the text column 'text' is empty (a source with lenient=True leaves such rows out, and counts them)"
    with pytest.raises(UserError) as caught:
        read(Source(name="a", path=path, format="tsv"))
    assert str(caught.value).endswith(f"a.tsv:2: {way}")
    read(Source(name="a", path=path, format="tsv", lenient=True))
    assert "lenient" not in caplog.text.replace(path, "")
    with pytest.raises(UserError, match=r"'text' is empty$"):  # a file to be measured on has no such field
        sources.read_one(Source(name="a", path=path, format="tsv"))


def test_what_is_left_out_of_universal_dependencies_is_counted(tmp_path, caplog):
    def sentence(n):
        lines = [f"1-2\tdu{n}", "1\tde", f"2\tle{n}", "2.1\tx"]
        return "".join(line + "\t_" * 8 + "\n" for line in lines) + "\n"

    names = ("id", "text", *(f"column{n}" for n in range(8)))
    path = write(tmp_path / "a.conllu", "".join(map(sentence, range(60))))
    source = Source(name="a", path=path, format="conll", columns=names)
    splits = read(source)
    assert splits.non_words == (60, 60)
    assert sources.non_word_remark(splits.non_words) == "60 ranges and 60 empty nodes are not words and left out"
    assert {len(row.columns["text"]) for rows in splits.rows.values() for row in rows} == {2}
    assert len(sources.read_one(source)) == 60
    assert caplog.messages == [f"{source.path}: 60 ranges and 60 empty nodes are not words and left out"]
