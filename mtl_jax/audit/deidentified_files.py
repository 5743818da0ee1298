"""De-identified files: mtl_jax.deidentify and the command mtl-jax deidentify.

The new file has the format of the old one. Only replaced places, and the labels and answers that move with them, change.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mtl_jax.audit.deidentification import Identifier
from mtl_jax.audit.deidentified_rows import Deidentify, DeidentifyTexts, edited_rows
from mtl_jax.core.errors import UserError, count, listed, unknown
from mtl_jax.core.files import check_regular, shown, to_json, write_bytes
from mtl_jax.core.row_texts import hiding_if
from mtl_jax.data.formats.conll import read_conll
from mtl_jax.data.formats.json_files import parse
from mtl_jax.data.formats.lines import lines
from mtl_jax.data.formats.records import columns as columns_of
from mtl_jax.data.formats.rows import Read, Row
from mtl_jax.data.formats.text_files import read_csv, read_tsv
from mtl_jax.data.source import Source, TextColumns

ENDINGS = {".jsonl": "jsonl", ".csv": "csv", ".tsv": "tsv", ".conll": "conll", ".conllu": "conll", ".txt": "lines"}
SPANS = ("row", "column", *Identifier._fields)
UNLABELLED = ("", "_")  # texts that mean that a row has no labels, as in Tagging


class Deidentified(NamedTuple):
    """The counts of deidentify().

    Attributes:
        rows: Number of rows.
        replaced: {type: number of places}.
    """

    rows: int
    replaced: dict[str, int]

    def __str__(self) -> str:
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in self.replaced.items())
        places = count(sum(self.replaced.values()), "place")
        return f"{places} replaced in {count(self.rows, 'row')}{f': {kinds}' if kinds else ''}"


class _Table(NamedTuple):
    """The rows of a file, and the function that writes them.

    Attributes:
        rows: The rows.
        write: From the changed rows to the file's text.
        extra: Other texts of the file, such as comments, which change separately.
    """

    rows: list[Row]
    write: Callable[[Sequence[Row], Sequence[str]], str]
    extra: Sequence[str] = ()


@hiding_if(lambda *args, **options: True)  # its error lines say where, not what
def deidentify(
    file: str | Path,
    output: str | Path,
    *,
    mode: str = "mask",
    kinds: Sequence[str] = (),
    names: str = "",
    seed: int = 0,
    key_file: str = "",
    language: str = "en_US",
    format: str = "",
    columns: Sequence[str] = (),
    text: Sequence[str] = (),
    labels: Sequence[str] = (),
    spans: str | Path = "",
) -> Deidentified:
    """Writes a file in which e-mail addresses, numbers, names and the like are replaced.

    Args:
        file: A file of jsonl, csv, tsv, CoNLL or lines of text; a name with .gz is unpacked.
        output: The file to write, whole or not at all, in the same format; packed if its name ends in .gz.
        mode: mask, surrogate or hash, as in mtl_jax.audit.Deidentify, which has this and the next five arguments.
        kinds: The types that are replaced; none: all.
        names: Who finds persons, places and organisations: the workdir of a tagging run, or WORKDIR:TASK.
        seed: Seed of surrogates.
        key_file: A file with the key of hashes.
        language: Language of surrogates.
        format: jsonl, csv, tsv, conll or lines; empty: by the ending of the name.
        columns: Names of the columns of a csv or tsv file without header, and of CoNLL.
        text: The columns that change. None: all but `labels`; in CoNLL the first. A list is one of words; but one with spaces
            inside its entries, and without labels, is a list of texts, and stays as long as it is.
        labels: Columns with a label for each word of the first text column; in CoNLL all others. Null, an empty text and _
            mean that the row has none.
        spans: A file to write with a JSON object for each replaced place: its row, column, type, and characters in the old and
            the new text. It has no texts.

    Raises:
        UserError: The file or a row cannot be read, a field makes no sense, or a file cannot be written.

    Examples:
        >>> _ = Path("mails.jsonl").write_text('{"text": "to jo@corp.com", "label": "a"}')
        >>> print(mtl_jax.deidentify("mails.jsonl", "masked.jsonl", kinds=("email",)))
        1 place replaced in 1 row: 1 email
    """
    file, output = str(file), Path(output)
    edit = Deidentify(mode, tuple(kinds), names, seed, key_file, language)
    kind = format or ENDINGS.get(Path(file.removesuffix(".gz")).suffix, "")
    if not kind:
        check_regular(file)
        raise UserError(f"{shown(file)}: its name does not tell its format; give --format, one of {listed(WRITERS)}")
    if kind not in WRITERS:
        raise unknown(f"format of {shown(file)}:", kind, WRITERS)
    _check(file, output, spans, kind, columns)
    edit.check("deidentify")
    table = WRITERS[kind](file, tuple(columns))
    text_columns = _text_columns(kind, table.rows, columns, text, labels, file)
    deidentified = edit.texts()
    rows, places = _edited(table, text_columns, deidentified)
    extra = deidentified(table.extra)
    written = table.write(rows, [new for new, _ in extra]).encode()
    counts = Counter(place.type for _, _, place in places) + Counter(place.type for _, found in extra for place in found)
    if spans:
        entries = [dict(zip(SPANS, (row, column, *place), strict=True)) for row, column, place in places]
        write_bytes(Path(spans), "".join(f"{json.dumps(entry)}\n" for entry in entries).encode())
    write_bytes(output, gzip.compress(written, mtime=0) if output.suffix == ".gz" else written)
    return Deidentified(len(rows), dict(sorted(counts.items())))


def _check(file: str, output: Path, spans: str | Path, kind: str, columns: Sequence[str]) -> None:
    """Raises UserError, before any work, if a file cannot be read or written."""
    check_regular(file)
    for flag, path in (("output", output), *((("spans", Path(spans)),) if spans else ())):
        if path.is_dir() or not path.resolve().parent.is_dir():
            raise UserError(f"{flag} {shown(path)}: name a file in a directory that exists")
        if path.exists() and path.samefile(file):
            raise UserError(f"{flag} {shown(path)}: this is the file that is read; name another")
    if spans and Path(spans).resolve() == output.resolve():
        raise UserError(f"spans {shown(spans)}: this is the output; name another")
    if kind == "conll" and not columns:
        raise UserError(f"{shown(file)}: format conll needs columns, for example words tags")


def _text_columns(
    kind: str, rows: Sequence[Row], columns: Sequence[str], text: Sequence[str], labels: Sequence[str], file: str
) -> TextColumns:
    present = list(dict.fromkeys(name for row in rows for name in row.columns))
    for name in (*text, *labels):
        if name not in present:
            raise UserError(f"{shown(file)}: there is no column {name!r}; columns: {listed(present)}")
    chosen = tuple(text) or (tuple(columns[:1]) if kind == "conll" else tuple(name for name in present if name not in labels))
    unlabelled = (UNLABELLED,) * len(labels)
    return TextColumns(chosen[0] if chosen else "", chosen, (), tuple(labels), unlabelled=unlabelled)


def _edited(
    table: _Table, columns: TextColumns, deidentified: DeidentifyTexts
) -> tuple[list[Row], list[tuple[str, str, Identifier]]]:
    """The changed rows, and (row, column, place) of each replaced place."""
    rows: list[Row] = []
    places: list[tuple[str, str, Identifier]] = []
    for old, (row, found) in zip(table.rows, edited_rows(table.rows, columns, deidentified), strict=True):
        if isinstance(row, UserError):
            raise row
        rows.append(row)
        places += [(old.where, name, place) for name, place in found]
    return rows, places


def _source(file: str, kind: str, columns: tuple[str, ...]) -> Source:
    return Source("file", file, format=kind, columns=columns, text="")


def _all(rows: Iterator[Read]) -> list[Row]:
    result = []
    for row in rows:
        if isinstance(row, UserError):
            raise row
        result.append(row)
    return result


def _csv(file: str, columns: tuple[str, ...]) -> _Table:
    return _with_header(_all(read_csv(file, _source(file, "csv", columns))), columns, _csv_text)


def _tsv(file: str, columns: tuple[str, ...]) -> _Table:
    return _with_header(_all(read_tsv(file, _source(file, "tsv", columns))), columns, _tsv_text)


def _with_header(rows: list[Row], columns: tuple[str, ...], text: Callable[[list[list[str]]], str]) -> _Table:
    def write(changed: Sequence[Row], extra: Sequence[str]) -> str:
        header = [] if columns or not changed else [list(changed[0].columns)]
        return text([*header, *(list(row.columns.values()) for row in changed)])

    return _Table(rows, write)


def _csv_text(table: list[list[str]]) -> str:
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerows(table)
    return written.getvalue()


def _tsv_text(table: list[list[str]]) -> str:
    return "".join("\t".join(fields) + "\n" for fields in table)


def _lines(file: str, columns: tuple[str, ...]) -> _Table:
    rows = []
    for line in lines(file):
        if line.error:
            raise line.error
        rows.append(Row({"text": line.text}, f"{file}:{line.number}"))
    return _Table(rows, lambda changed, extra: "".join(f"{row.columns['text']}\n" for row in changed))


def _jsonl(file: str, columns: tuple[str, ...]) -> _Table:
    values: list[tuple[Any, str]] = []  # an object, or an empty line
    for line in lines(file):
        where = f"{file}:{line.number}"
        if line.error:
            raise line.error
        try:
            value = parse(line.text) if line.text.strip() else None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON that can be read") from error
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{where}: not a JSON object")
        values.append((value, where))
    rows = [Row(columns_of(value), where) for value, where in values if value is not None]

    def write(changed: Sequence[Row], extra: Sequence[str]) -> str:
        new = iter(zip(rows, changed, strict=True))
        return "".join("\n" if value is None else _object_line(value, *next(new)) for value, _ in values)

    return _Table(rows, write)


def _object_line(value: Mapping[str, Any], old: Row, new: Row) -> str:
    different = {name: column for name, column in new.columns.items() if column != old.columns[name]}
    return to_json(_with_columns(value, different, "", old.where), ensure_ascii=False) + "\n"


def _with_columns(value: Mapping[str, Any], columns: Mapping[str, Any], prefix: str, where: str) -> dict[str, Any]:
    """A JSON object with new values of some columns, which are named as by records.columns()."""
    result = {}
    for name, part in value.items():
        path = f"{prefix}{name}"
        if path in columns:
            result[name] = _in_form(columns[path], part, where)
        else:
            result[name] = _with_columns(part, columns, f"{path}.", where) if isinstance(part, Mapping) else part
    return result


def _in_form(column: Any, old: Any, where: str) -> Any:
    """A column as JSON in its old form: answers and lists of objects, for example, are JSON texts as columns."""
    if isinstance(column, str) and isinstance(old, list | Mapping):
        try:
            return json.loads(column)
        except ValueError as error:
            raise UserError(
                f"{where}: a replaced place is not within a single text of a list of objects; give one text a column"
            ) from error
    if isinstance(old, Mapping):
        return {"text": [answer["text"] for answer in column], "answer_start": [answer["start"] for answer in column]}
    if isinstance(old, list) and old and isinstance(old[0], Mapping):
        starts = ["answer_start" if "answer_start" in answer else "start" for answer in old]
        return [
            {**before, "text": answer["text"], start: answer["start"]}
            for before, answer, start in zip(old, column, starts, strict=True)
        ]
    return column


def _conll(file: str, columns: tuple[str, ...]) -> _Table:
    rows = _all(read_conll(file, _source(file, "conll", columns)))
    texts = [line.text for line in lines(file)]
    row_of = {number: index for index, row in enumerate(rows) if row.words for number in row.words[1]}
    others = [number for number in range(1, len(texts) + 1) if number not in row_of]
    tabs = any("\t" in texts[number - 1] for number in row_of)

    def write(changed: Sequence[Row], extra: Sequence[str]) -> str:
        outside = dict(zip(others, extra, strict=True))
        result: list[str] = []
        done = -1
        for number in range(1, len(texts) + 1):
            if number in outside:
                result.append(outside[number])
            elif row_of[number] != done:
                done = row_of[number]
                _check_ids(rows[done], changed[done], columns)
                result += [("\t" if tabs else " ").join(fields) for fields in zip(*changed[done].columns.values(), strict=True)]
        return "".join(f"{line}\n" for line in result)

    return _Table(rows, write, [texts[number - 1] for number in others])


def _check_ids(old: Row, new: Row, columns: tuple[str, ...]) -> None:
    """Raises UserError if the number of words of a CoNLL-U sentence changes: its ids and heads would be wrong."""
    ids = old.columns[columns[0]]
    if (
        len(columns) == 10
        and ids == [str(number + 1) for number in range(len(ids))]
        and len(new.columns[columns[0]]) != len(ids)
    ):
        raise UserError(
            f"{old.where}: a place of several words is replaced, and the ids of CoNLL-U cannot change; leave its kind out"
        )


# From a file and the names of its columns to its rows and the function that writes them.
WRITERS: dict[str, Callable[[str, tuple[str, ...]], _Table]] = {
    "jsonl": _jsonl,
    "csv": _csv,
    "tsv": _tsv,
    "conll": _conll,
    "lines": _lines,
}
