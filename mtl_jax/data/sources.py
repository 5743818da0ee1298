"""Where rows come from: text files with named columns, cut into splits.

A source reads a file into rows, drops repeated texts, and cuts train, dev and test by a seeded hash of the text or of its
document, so that a text stands in one split, and in the same one if rows are added. Of repeated texts the first stays.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import re
from collections.abc import Iterable
from typing import NamedTuple

from mtl_jax import assets
from mtl_jax.errors import UserError, unknown

FORMATS = ("csv", "tsv", "lines")
SPLITS = ("train", "dev", "test")


@dataclasses.dataclass(frozen=True)
class Source:
    """Rows with a text and any number of other columns.

    Attributes:
        name: The source's name; tasks refer to it.
        path: The file: a local path, or "pip:ASSET/MEMBER". The training rows, or all rows if dev or test are cut from it.
        dev_path: File of the dev rows; empty: cut from path.
        test_path: File of the test rows; empty: cut from path.
        format: csv (quoted, with header), tsv (never quoted, with header) or lines (see pattern).
        pattern: For lines: a regular expression with a named group for each column; it must match every line.
        text: The column that holds the text.
        pair: The column that holds the second text of a pair; empty: there is none.
        cut_dev: Share of the distinct texts that becomes dev where there is no dev_path.
        cut_test: Share of the distinct texts that becomes test where there is no test_path.
        cut_seed: Seed of that cut. Apart from the run's seed, so that runs with other seeds see the same splits.
        group: The column that names the document a row comes from: rows of one document are cut into one split, so that no
        document is both learned from and tested on. Empty: every text is cut by itself.
    group_pattern: A regular expression for the part of that column which names the document.
    limit: Use at most so many rows of each split, 0 for all: to try a script out.
    """

    name: str
    path: str
    dev_path: str = ""
    test_path: str = ""
    format: str = "csv"
    pattern: str = ""
    text: str = "text"
    pair: str = ""
    cut_dev: float = 0.1
    cut_test: float = 0.1
    cut_seed: int = 0
    group: str = ""
    group_pattern: str = ".+"
    limit: int = 0


class Row(NamedTuple):
    """One line of a file: its columns by name, and where it stands for error messages."""

    columns: dict[str, str]
    where: str


class Splits(NamedTuple):
    """A source's rows by split name, and how many rows were dropped because their text occurred before."""

    rows: dict[str, list[Row]]
    repeated: int


def read(source: Source) -> Splits:
    """Reads, deduplicates and cuts one source.

    Raises:
        UserError: A file or column does not exist, a line cannot be read, or a split is empty. Names file and line.
    """
    if source.format not in FORMATS:
        raise unknown(f"format of source {source.name!r}:", source.format, FORMATS)
    try:
        re.compile(source.group_pattern)
    except re.error as error:
        raise UserError(f"source {source.name!r}: group_pattern is no regular expression ({error})") from error
    given = {"train": source.path, "dev": source.dev_path, "test": source.test_path}
    cuts = {"dev": 0.0 if source.dev_path else source.cut_dev, "test": 0.0 if source.test_path else source.cut_test}
    if not (cuts["dev"] >= 0 and cuts["test"] >= 0 and cuts["dev"] + cuts["test"] < 1):
        raise UserError(f"source {source.name!r}: cut_dev and cut_test must be shares with a sum below 1")
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    seen: set[str] = set()
    repeated = 0
    # Test first: where files overlap, the repeated text leaves the training rows, not the test rows.
    for split in ("test", "dev", "train"):
        for row in _read_file(source, given[split]) if given[split] else ():
            key = normalise(row.columns[source.text])
            if key in seen:
                repeated += 1
                continue
            seen.add(key)
            rows[_cut(_group(source, row) or key, source.cut_seed, cuts) if split == "train" else split].append(row)
    for split in SPLITS:
        if not rows[split]:
            raise UserError(f"source {source.name!r}: split {split} is empty ({given[split] or source.path})")
        if source.limit:
            rows[split] = rows[split][: source.limit]
    return Splits(rows, repeated)


def normalise(text: str) -> str:
    """Lower case, single spaces: texts equal after this are one text."""
    return " ".join(text.lower().split())


def _group(source: Source, row: Row) -> str:
    """The document a row comes from, or "" where the source names none."""
    if not source.group:
        return ""
    if source.group not in row.columns:
        raise UserError(
            f"{row.where}: source {source.name!r} has no group column {source.group!r}; columns: {', '.join(row.columns)}"
        )
    match = re.search(source.group_pattern, row.columns[source.group])
    if match is None:
        raise UserError(f"{row.where}: {row.columns[source.group]!r} does not match {source.group_pattern!r}")
    return match.group()


def _cut(key: str, seed: int, cuts: dict[str, float]) -> str:
    """The split of a text: a hash of seed and text, as a number in [0, 1), falls into one of the shares."""
    digest = hashlib.sha256(f"{seed}\0{key}".encode()).digest()
    at = int.from_bytes(digest[:8], "big") / 2**64
    if at < cuts["test"]:
        return "test"
    return "dev" if at < cuts["test"] + cuts["dev"] else "train"


def _read_file(source: Source, path: str) -> Iterable[Row]:
    file = assets.locate(path)
    if file.is_dir():
        raise UserError(f"{path}: a directory; source {source.name!r} needs a file")
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    text = _decode(data, path)
    if source.format == "lines":
        yield from _read_lines(source, path, text)
        return
    # csv's own line splitting is needed where a quoted field spans lines, and accepts CRLF.
    lines = io.StringIO(text, newline="")
    if source.format == "csv":
        reader = csv.reader(lines, strict=True)
    else:
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
    header: list[str] = []
    try:
        for fields in reader:
            where = f"{path}:{reader.line_num}"
            if not header:
                header = fields
                _check_columns(source, path, header)
            elif fields:
                if len(fields) != len(header):
                    raise UserError(f"{where}: {len(fields)} columns, but the header has {len(header)}")
                yield _row(source, dict(zip(header, fields, strict=True)), where)
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: {error}") from error


def _read_lines(source: Source, path: str, text: str) -> Iterable[Row]:
    try:
        pattern = re.compile(source.pattern)
    except re.error as error:
        raise UserError(f"source {source.name!r}: pattern is no regular expression ({error})") from error
    _check_columns(source, path, pattern.groupindex)
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line:
            continue
        match = pattern.fullmatch(line)
        if match is None:
            raise UserError(f"{path}:{number}: the line does not match the pattern {source.pattern!r}")
        yield _row(source, match.groupdict(default=""), f"{path}:{number}")


def _check_columns(source: Source, path: str, columns: Iterable[str]) -> None:
    if source.text not in columns:
        raise UserError(f"{path}: source {source.name!r} has no text column {source.text!r}; columns: {', '.join(columns)}")


def _row(source: Source, columns: dict[str, str], where: str) -> Row:
    if not columns[source.text].strip():
        raise UserError(f"{where}: the text column {source.text!r} is empty")
    return Row(columns, where)


def _decode(data: bytes, path: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 ({error.reason}); convert the file to UTF-8") from error
