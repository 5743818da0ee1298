"""The splits of a source: its rows, of files, data sets or scripts, deduplicated and divided into train, dev and test.

Training rows whose text occurred before are dropped; of repeated texts the first one is kept. Train, dev and test are divided
by a seeded hash of the text or of its document, so that a text is in one split, and in the same one after rows are added. Dev
or test rows from their own file are the official ones and are not changed: a training row with the text of one of them is
dropped. Where documents or times part a pair from the same pair the other way round, it stays in the held-out split alone.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from mtl_jax.core import assets
from mtl_jax.core.errors import NOT_A_PATTERN, UserError, count, unknown
from mtl_jax.core.files import shown
from mtl_jax.core.row_texts import quoted
from mtl_jax.data import row_edits, row_keys
from mtl_jax.data.cuts import (
    NO_MOMENT,
    Moment,
    by_time,
    drop_swapped_pairs,
    empty_split_advice,
    limited,
    moment_of,
    of_one_scale,
    split_of,
    split_shares,
    time_remarks,
)
from mtl_jax.data.formats import READERS, hf, names_columns, read_file, script_rows, text_files, tfds
from mtl_jax.data.formats.records import Picked, Records
from mtl_jax.data.formats.rows import Read, Row, no_column
from mtl_jax.data.labels import Labels
from mtl_jax.data.row_keys import text_of
from mtl_jax.data.source import COPIES, FIELDS, NAMED, SPLITS, Source

ADVICE = " (a source with lenient=True leaves such rows out, and counts them)"
SHOWN = 5  # skipped rows of a source that are logged one by one

log = logging.getLogger(__name__)

# A row; or a data set on disk, and the row's number in it.
RowRef = Row | tuple[Records, int]


class Splits(NamedTuple):
    """A source's rows by split name.

    Attributes:
        rows: {split: rows}. Rows of TFDS and the hub stay on disk and are read on access.
        repeated: Number of training rows that were dropped because their text occurred before.
        skipped: Number of rows that could not be read and were left out because the source is lenient.
        shared: Number of training rows that were dropped because their text is in dev or test of another source.
        text_digests: {split: for each row a digest of its text}; a pair and the swapped pair have the same one.
        all_rows: All rows of path that can be read: label sets come from them, even if few rows are trained on.
        repeats: The training rows that were dropped as repeated, each with the first row of the same text.
        non_words: Numbers of lines that are not words and were left out: CoNLL-U's ranges, and its empty nodes.
        replaced: {type: number of places} that the source's deidentify replaced; None where it has none.
        remarks: Lines for the log on how the rows were divided.
    """

    rows: dict[str, Sequence[Row]]
    repeated: int
    skipped: int = 0
    shared: int = 0
    text_digests: Mapping[str, list[bytes]] = MappingProxyType({})
    all_rows: Sequence[Row] = ()
    repeats: Sequence[tuple[RowRef, RowRef]] = ()
    non_words: tuple[int, int] = (0, 0)
    replaced: Mapping[str, int] | None = None
    remarks: Sequence[str] = ()


def read(source: Source, tasks: Sequence[Labels] = (), unlabelled: bool = False) -> Splits:
    """Reads, deduplicates and splits one source.

    Args:
        source: The source.
        tasks: Its tasks, which name columns that a change of its texts concerns.
        unlabelled: Whether no task has labels for it: all rows of path are then training rows, and there are no others.

    Raises:
        UserError: A file or column does not exist, a row cannot be read (and the source is not lenient), or a split is empty.
            Names file and line, or record.
    """
    if unlabelled:
        source = dataclasses.replace(source, cut_dev=0.0, cut_test=0.0, time="")
    _check(source)
    cuts = split_shares(source)
    edit, replaced = row_edits.editor(source, tasks), Counter[str]()
    opened = {split: row_edits.edited(edit, _open(source, split), replaced) for split in SPLITS if source.place(split)}
    kept: dict[str, list[Any]] = {split: [] for split in SPLITS}  # rows, or numbers of records that stay on disk
    digests: dict[str, list[bytes]] = {split: [] for split in SPLITS}
    first: dict[str, dict[bytes, Any]] = {split: {} for split in SPLITS}  # {file: {text: the first row with it}}
    all_rows: list[Any] = []
    repeats: list[tuple[RowRef, RowRef]] = []
    official: set[bytes] = set()
    official_documents: set[str] = set()
    distinct: set[str] = set()  # texts, or documents, of path
    moments: list[Moment] = []  # of the rows of path that are kept, where the source is divided by time
    documents: list[str] = []
    repeated, ranges, empty_nodes = 0, 0, 0
    skipped: list[str] = []
    # Test first: if files overlap, the repeated text is dropped from the training rows, not from the test rows.
    for split in (split for split in reversed(SPLITS) if split in opened):
        rows = opened[split]
        timed = bool(source.time) and split == "train"
        for number, row, key, group, moment in _readable(source, rows, skipped, grouped=True, timed=timed):
            # A pair and the swapped pair are two different rows, but they belong to the same split.
            unordered_key = min(key, row_keys.swapped(key)) if source.pair else key
            row_digest, text_digest, target = row_keys.digest(key), row_keys.digest(unordered_key), split
            entry = number if isinstance(rows, Records) else row
            ranges, empty_nodes = ranges + row.non_words[0], empty_nodes + row.non_words[1]
            if split == "train":
                all_rows.append(entry)
                if row_digest in first[split] or text_digest in official or (group and group in official_documents):
                    repeated += 1
                    before = next((other for other in reversed(SPLITS) if row_digest in first[other]), None)
                    if before:
                        repeats.append((_ref(rows, entry), _ref(opened[before], first[before][row_digest])))
                    continue
                distinct.add(unordered_key if timed else group or unordered_key)
                target = "train" if timed else split_of(group or unordered_key, source.cut_seed, cuts)
                if timed:
                    moments.append(moment)
                    documents.append(group)
            else:
                official.add(text_digest)
                official_documents.add(group)
            first[split].setdefault(row_digest, entry)
            digests[target].append(text_digest)
            kept[target].append(entry)
    remarks: list[str] = []
    if source.time:
        moments = of_one_scale(source, moments)
        targets = by_time(moments, cuts)
        entries = list(zip(targets, kept["train"], digests["train"], strict=True))
        kept["train"], digests["train"] = [], []
        for target, entry, digest in entries:
            kept[target].append(entry)
            digests[target].append(digest)
        remarks = time_remarks(moments, targets, documents)
    if source.pair:
        cut = [split for split in SPLITS if split == "train" or not source.place(split)]
        left_out, lines = drop_swapped_pairs(kept, digests, cut)
        repeated += left_out
        remarks += lines
    if len(skipped) > SHOWN:
        log.warning("source %s: %d rows skipped, of which the first %d are named above", source.name, len(skipped), SHOWN)
    result: dict[str, Sequence[Row]] = {}
    for split in SPLITS:
        if not kept[split] and unlabelled and split != "train":
            result[split] = []
            continue
        if not kept[split]:
            why = [f"source {source.name!r}: split {split} is empty ({shown(source.place(split) or source.place('train'))})"]
            why += [empty_split_advice(source, split, len(distinct), repeated)]
            why += [f"{count(len(skipped), 'row was', 'rows were')} skipped, the first: {skipped[0]}"] if skipped else []
            raise UserError("; ".join(filter(None, why)))
        indices = limited(digests[split], source, split)
        result[split] = _rows(opened.get(split, opened["train"]), [kept[split][index] for index in indices])
        digests[split] = [digests[split][index] for index in indices]
    whole = _rows(opened["train"], all_rows)
    counts = None if edit is None else dict(sorted(replaced.items()))
    return Splits(result, repeated, len(skipped), 0, digests, whole, repeats, (ranges, empty_nodes), counts, remarks)


def _rows(opened: Records | Iterator[Read], entries: list[Any]) -> Sequence[Row]:
    return Picked(opened, entries) if isinstance(opened, Records) else entries


def _ref(opened: Records | Iterator[Read], entry: Any) -> RowRef:
    return (opened, entry) if isinstance(opened, Records) else entry


def row_at(ref: RowRef) -> Row:
    """The row that a reference stands for, read from disk if it is not in memory."""
    return ref if isinstance(ref, Row) else ref[0][ref[1]]


def without_shared_texts(data: Mapping[str, Splits]) -> dict[str, Splits]:
    """The sources without training rows whose text is in dev or test of another source, because tasks share a trunk.

    Raises:
        UserError: A source has no training rows left.
    """
    held_out = {name: {d for split in ("dev", "test") for d in parts.text_digests[split]} for name, parts in data.items()}
    result = {}
    for name, parts in data.items():
        others = set().union(*(digests for other, digests in held_out.items() if other != name))
        rows, digests = parts.rows["train"], parts.text_digests["train"]
        indices = [index for index, digest in enumerate(digests) if digest not in others]
        if not indices:
            raise UserError(f"source {name!r}: every training text is in dev or test of another source")
        kept: Sequence[Row] = (
            Picked(rows.records, rows.numbers[indices]) if isinstance(rows, Picked) else [rows[index] for index in indices]
        )
        result[name] = parts._replace(
            rows={**parts.rows, "train": kept},
            text_digests={**parts.text_digests, "train": [digests[index] for index in indices]},
            shared=len(rows) - len(kept),
        )
    return result


def read_one(source: Source, tasks: Sequence[Labels] = ()) -> list[Row]:
    """All training rows of a source, before any is split off, as one split; none is dropped.

    Args:
        source: The source.
        tasks: As for read().

    Raises:
        UserError: As read().
    """
    _check(source)
    skipped: list[str] = []
    rows = row_edits.edited(row_edits.editor(source, tasks), _open(source, "train"), Counter())
    keyed = [(row, row_keys.digest(key)) for _, row, key, _, _ in _readable(source, rows, skipped, grouped=False)]
    place = source.place("train")
    if skipped:
        log.warning("%s: %d rows skipped", place, len(skipped))
    if not keyed:
        raise UserError(f"{shown(place)}: no row can be read")
    remark = non_word_remark([sum(row.non_words[kind] for row, _ in keyed) for kind in (0, 1)])
    if remark:
        log.warning("%s: %s", place, remark)
    return [keyed[index][0] for index in limited([digest for _, digest in keyed], source, "")]


def non_word_remark(non_words: Sequence[int]) -> str:
    """A clause on the lines that are not words and were left out; "" if there were none."""
    ranges, empty_nodes = non_words
    return f"{ranges} ranges and {empty_nodes} empty nodes are not words and left out" if ranges or empty_nodes else ""


def _check(source: Source) -> None:
    """Raises UserError for a field that makes no sense."""
    prefix = f"source {source.name!r}"
    for field in ("path", "dev_path", "test_path", "pattern"):
        if not isinstance(value := getattr(source, field), str):
            raise UserError(f"{prefix}: {field} is a {type(value).__name__}; it must be a str (rows of a script: rows=)")
    for path, rows in FIELDS.values():
        if getattr(source, path) and getattr(source, rows) is not None:
            raise UserError(f"{prefix}: both {path} and {rows} are given; leave one of them out")
    if isinstance(source.columns, str):
        raise UserError(f"{prefix}: columns is the text {shown(source.columns)!r}; it must be a tuple of names")
    if not source.place("train"):
        raise UserError(f"{prefix}: path is empty; it must name the training rows, or rows must give them")
    if source.format not in READERS:
        error = unknown(f"format of {prefix}:", source.format, READERS)
        raise UserError(f"{error}; for one of a script, --import FILE")
    for field in ("pattern", "group_pattern"):
        try:
            re.compile(getattr(source, field))
        except NOT_A_PATTERN as error:
            raise UserError(f"{prefix}: {field} is not a regular expression ({error})") from error
    cuts = split_shares(source).values()
    if not (min(cuts) >= 0 and sum(cuts) < 1):
        raise UserError(f"{prefix}: cut_dev and cut_test must be shares with a sum below 1")
    if source.time and not any(cuts):
        raise UserError(
            f"{prefix}: time is given, but nothing is split off from path; leave it out, or set cut_dev or cut_test"
        )
    for field in ("limit", "limit_train"):
        if getattr(source, field) < 0:
            raise UserError(f"{prefix}: {field} is {getattr(source, field)}; it must be a number of rows, or 0 for all")
    if source.copies not in COPIES:
        raise unknown(f"copies of {prefix}:", source.copies, COPIES)
    if source.columns and not names_columns(source.format):
        raise UserError(f"{prefix}: columns cannot be given for format {source.format}, only for {', '.join(NAMED)}")
    if source.format == "conll" and not source.columns:
        raise UserError(f'{prefix}: format conll needs columns, for example ("words", "tags")')
    for path in (source.dev_path, source.test_path):
        if path.startswith((tfds.SCHEME, hf.SCHEME)) and "#" not in path and not hf.is_directory(path):
            raise UserError(f"{prefix}: {path} names no split; write {path}#validation, or the name of another split")


def _open(source: Source, split: str) -> Records | Iterator[Read]:
    if source.script_rows(split) is not None:
        return script_rows.open_rows(source, split)
    path = source.place(split)
    if path.startswith(tfds.SCHEME):
        return tfds.open_tfds(path)
    if path.startswith(hf.SCHEME):
        return hf.open_hf(path)
    return _read_files(source, path)


def _read_files(source: Source, path: str) -> Iterator[Read]:
    for file in text_files.matches(path) if source.format == "parallel" else assets.matches(path):
        empty = True
        for item in read_file(file, source):
            empty = False
            yield item
        if empty:
            raise UserError(f"{file}: the file has no rows")


def _readable(
    source: Source, rows: Iterable[Read], skipped: list[str], *, grouped: bool, timed: bool = False
) -> Iterator[tuple[int, Row, str, str, Moment]]:
    """Each row that can be read: its number, the row, its key, if `grouped` its document, and if `timed` its time.

    Any other row is an error, or, if the source is lenient, its error line is added to `skipped`.
    """
    ids: dict[str, str] = {}
    for number, item in enumerate(rows):
        try:
            row = _checked(source, item, ids)
            group, moment = row_keys.group(source, row) if grouped else "", moment_of(source, row) if timed else NO_MOMENT
            result = number, row, row_keys.key(source, row), group, moment
        except UserError as error:
            if not source.lenient:
                raise UserError(f"{error}{ADVICE if grouped else ''}") from error
            skipped.append(str(error))
            if len(skipped) <= SHOWN:
                log.warning("skipped: %s", error)
            continue
        yield result


def _checked(source: Source, item: Read, ids: dict[str, str]) -> Row:
    """The row, if it has text, a new id, and answers at their stated characters; adds its id to `ids`."""
    if isinstance(item, UserError):
        raise item
    for kind in ("text", "pair") if source.pair else ("text",):
        text_of(source, item, kind)
    answers, context = item.columns.get("answers"), item.columns.get("context")
    if isinstance(answers, list) and isinstance(context, str):
        for answer in answers:
            row_keys.check_answer(answer, context, item.where)
    name = source.id or ("id" if source.format == "squad" else "")
    if name:
        if name not in item.columns:
            raise no_column(source, item.where, "id", item.columns)
        value = item.columns[name]
        if not isinstance(value, str):
            raise UserError(f"{item.where}: the id column {name!r} is empty or a list")
        if value in ids:
            raise UserError(f"{item.where}: the id {quoted(value)} occurs already at {ids[value]}")
        ids[value] = item.where
    return item
