import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_jax.data import sources
from mtl_jax.data.sources import Source, read
from mtl_jax.errors import UserError


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
    found = [sources.normalise(text) for rows in texts(splits).values() for text in rows]
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
    split = sources._cut(key, seed, {"dev": dev, "test": test})
    assert split in sources.SPLITS
    assert not (split == "dev" and dev == 0)
    assert not (split == "test" and test == 0)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("label\tbody\n1\tx\n", {}, r"a\.tsv: source 'a' has no text column 'text'; columns: label, body"),
        ("label\ttext\n1\tx\textra\n", {}, r"a\.tsv:2: 3 columns, but the header has 2"),
        ("label\ttext\n1\t \n", {}, r"a\.tsv:2: the text column 'text' is empty"),
        ("label\ttext\n1\tx\n", {}, r"split (test|dev|train) is empty"),
        ("label\ttext\n", {}, "split train is empty"),
        ("", {}, "split train is empty"),
        ("label\ttext\n1\tx\n", {"format": "xml"}, "unknown format of source 'a': 'xml'; choices: csv, tsv, lines"),
        ("label\ttext\n1\tx\n", {"cut_dev": 0.6, "cut_test": 0.6}, "sum below 1"),
        ("1 x\nbad\n", {"format": "lines", "pattern": r"(?P<l>\d) (?P<text>.+)"}, r"a\.tsv:2: the line does not match"),
        ("1 x\n", {"format": "lines", "pattern": "("}, "no regular expression"),
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
