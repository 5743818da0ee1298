"""Where rows come from: files, TFDS builders or hub data sets with named columns, cut into splits.

A source reads rows, drops training rows whose text stood before, and cuts train, dev and test by a seeded hash of the text or
of its document, so that a text stands in one split, and in the same one if rows are added. Of repeated texts the first stays.
Dev or test rows that come from a file of their own are the official ones and stay as they are: a training row that repeats
one of them leaves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mtl_jax.data.source import FORMATS, NAMED, SPLITS

if TYPE_CHECKING:
    from mtl_jax.data.source import Source
import logging
import re
from collections.abc import Iterable, Iterator
from types import MappingProxyType
from typing import Any, NamedTuple

from mtl_jax.core import assets
from mtl_jax.core.errors import NOT_A_PATTERN, UserError, count, unknown
from mtl_jax.core.files import shown
from mtl_jax.data import row_keys
from mtl_jax.data.formats import READERS, hf, text_files, tfds
from mtl_jax.data.formats.records import Picked, Records
from mtl_jax.data.formats.rows import Read, Row, no_column
from mtl_jax.data.row_keys import text_of

ADVICE = " (a source with lenient=True leaves such rows out, and counts them)"
SHOWN = 5  # skipped rows of a source that are logged one by one

log = logging.getLogger(__name__)


# A row; or the data set on disk that it is in, and its number there.
Place = Row | tuple[Records, int]


class Splits(NamedTuple):
    """A source's rows by split name.

    Attributes:
        rows: {split: rows}. Those of TFDS and the hub stay on disk and are read when asked for.
        repeated: Training rows that were dropped because their text occurred before.
        skipped: Rows that could not be read and were left out because the source is lenient.
        elsewhere: Training rows that were dropped because their text stands in dev or test of another source.
        identities: {split: for each row a digest of its text}; the same for a pair and for the pair the other way round.
        file: All rows of path that can be read: labels are found in them, however few are trained on.
        again: Training rows that were dropped, each with the first row that has the same text.
        no_words: Lines that are not words and were left out: CoNLL-U's ranges, and its empty nodes.
    """

    rows: dict[str, Sequence[Row]]
    repeated: int
    skipped: int = 0
    elsewhere: int = 0
    identities: Mapping[str, list[bytes]] = MappingProxyType({})
    file: Sequence[Row] = ()
    again: Sequence[tuple[Place, Place]] = ()
    no_words: tuple[int, int] = (0, 0)


def read(source: Source) -> Splits:
    """Reads, deduplicates and cuts one source.

    Raises:
        UserError: A file or column does not exist, a row cannot be read (and the source is not lenient), or a split is empty.
            Names file and line, or record.
    """
    _check(source)
    given = {"train": source.path, "dev": source.dev_path, "test": source.test_path}
    cuts = shares(source)
    opened = {split: _open(source, path) for split, path in given.items() if path}
    kept: dict[str, list[Any]] = {split: [] for split in SPLITS}  # rows, or numbers of records that stay on disk
    identities: dict[str, list[bytes]] = {split: [] for split in SPLITS}
    first: dict[str, dict[bytes, Any]] = {split: {} for split in SPLITS}  # {file: {text: the first row that has it}}
    file: list[Any] = []
    again: list[tuple[Place, Place]] = []
    official: set[bytes] = set()
    documents: set[str] = set()  # of the official rows
    cut_from: set[str] = set()
    repeated, ranges, empty_nodes = 0, 0, 0
    skipped: list[str] = []
    # Test first: where files overlap, the repeated text leaves the training rows, not the test rows.
    for split in (split for split in reversed(SPLITS) if split in opened):
        rows = opened[split]
        for number, row, key, group in _good(source, rows, skipped, grouped=True):
            # A pair and the same pair the other way round are two rows, but of one split.
            either = min(key, row_keys.turned(key)) if source.pair else key
            digest, identity, into = row_keys.digest(key), row_keys.digest(either), split
            place = number if isinstance(rows, Records) else row
            ranges, empty_nodes = ranges + row.no_words[0], empty_nodes + row.no_words[1]
            if split == "train":
                file.append(place)
                if digest in first[split] or identity in official or (group and group in documents):
                    repeated += 1
                    before = next((other for other in reversed(SPLITS) if digest in first[other]), None)
                    if before:
                        again.append((_place(rows, place), _place(opened[before], first[before][digest])))
                    continue
                cut_from.add(group or either)
                into = cut(group or either, source.cut_seed, cuts)
            else:
                official.add(identity)
                documents.add(group)
            first[split].setdefault(digest, place)
            identities[into].append(identity)
            kept[into].append(place)
    if len(skipped) > SHOWN:
        log.warning("source %s: %d rows skipped, of which the first %d are named above", source.name, len(skipped), SHOWN)
    result: dict[str, Sequence[Row]] = {}
    for split in SPLITS:
        if not kept[split]:
            why = [advice(source, split, len(cut_from), repeated)]
            why += [f"{count(len(skipped), 'row was', 'rows were')} skipped, the first: {skipped[0]}"] if skipped else []
            path = shown(given[split] or source.path)
            raise UserError("; ".join([f"source {source.name!r}: split {split} is empty ({path})", *filter(None, why)]))
        chosen = drawn(identities[split], source, split)
        result[split] = _rows(opened.get(split, opened["train"]), [kept[split][place] for place in chosen])
        identities[split] = [identities[split][place] for place in chosen]
    whole = _rows(opened["train"], file)
    return Splits(result, repeated, len(skipped), 0, identities, whole, again, (ranges, empty_nodes))


def _rows(opened: Records | Iterator[Read], chosen: list[Any]) -> Sequence[Row]:
    return Picked(opened, chosen) if isinstance(opened, Records) else chosen


def _place(opened: Records | Iterator[Read], chosen: Any) -> Place:
    return (opened, chosen) if isinstance(opened, Records) else chosen


def row_at(place: Place) -> Row:
    """The row, read from disk if it is there."""
    return place if isinstance(place, Row) else place[0][place[1]]


def apart(data: Mapping[str, Splits]) -> dict[str, Splits]:
    """The same sources without training rows whose text stands in dev or test of another one: tasks share a trunk.

    Raises:
        UserError: Nothing is left to train on.
    """
    held = {name: {i for split in ("dev", "test") for i in parts.identities[split]} for name, parts in data.items()}
    result = {}
    for name, parts in data.items():
        others = set().union(*(found for other, found in held.items() if other != name))
        rows, identities = parts.rows["train"], parts.identities["train"]
        stay = [number for number, identity in enumerate(identities) if identity not in others]
        if not stay:
            raise UserError(f"source {name!r}: every training text stands in dev or test of another source")
        left: Sequence[Row] = (
            Picked(rows.records, rows.numbers[stay]) if isinstance(rows, Picked) else [rows[number] for number in stay]
        )
        result[name] = parts._replace(
            rows={**parts.rows, "train": left},
            identities={**parts.identities, "train": [identities[number] for number in stay]},
            elsewhere=len(rows) - len(left),
        )
    return result


def read_one(source: Source) -> list[Row]:
    """All rows of a source's path, none dropped: the file is one split.

    Raises:
        UserError: As read().
    """
    _check(source)
    skipped: list[str] = []
    keyed = [
        (row, row_keys.digest(key)) for _, row, key, _ in _good(source, _open(source, source.path), skipped, grouped=False)
    ]
    if skipped:
        log.warning("%s: %d rows skipped", source.path, len(skipped))
    if not keyed:
        raise UserError(f"{shown(source.path)}: no row can be read")
    no_words = left_out([sum(row.no_words[kind] for row, _ in keyed) for kind in (0, 1)])
    if no_words:
        log.warning("%s: %s", source.path, no_words)
    return [keyed[place][0] for place in drawn([digest for _, digest in keyed], source, "")]


def left_out(no_words: Sequence[int]) -> str:
    """What is to be said of lines that are not words; "" where there were none."""
    ranges, empty_nodes = no_words
    return f"{ranges} ranges and {empty_nodes} empty nodes are not words and left out" if ranges or empty_nodes else ""


def _check(source: Source) -> None:
    """Raises UserError for a field that makes no sense."""
    named = f"source {source.name!r}"
    for field in ("path", "dev_path", "test_path", "pattern"):
        if not isinstance(getattr(source, field), str):
            raise UserError(f"{named}: {field} is a {type(getattr(source, field)).__name__}; it must be a str")
    if isinstance(source.columns, str):
        raise UserError(f"{named}: columns is the text {shown(source.columns)!r}; it must be a tuple of names")
    if not source.path:
        raise UserError(f"{named}: path is empty; it must name the training rows")
    if source.format not in FORMATS:
        raise unknown(f"format of {named}:", source.format, FORMATS)
    for field in ("pattern", "group_pattern"):
        try:
            re.compile(getattr(source, field))
        except NOT_A_PATTERN as error:
            raise UserError(f"{named}: {field} is no regular expression ({error})") from error
    cuts = shares(source).values()
    if not (min(cuts) >= 0 and sum(cuts) < 1):
        raise UserError(f"{named}: cut_dev and cut_test must be shares with a sum below 1")
    for field in ("limit", "limit_train"):
        if getattr(source, field) < 0:
            raise UserError(f"{named}: {field} is {getattr(source, field)}; it is a number of rows, or 0 for all")
    if source.columns and source.format not in NAMED:
        raise UserError(f"{named}: columns cannot be given for format {source.format}, only for {', '.join(NAMED)}")
    if source.format == "conll" and not source.columns:
        raise UserError(f'{named}: format conll needs columns, for example ("words", "tags")')
    for path in (source.dev_path, source.test_path):
        if path.startswith((tfds.SCHEME, hf.SCHEME)) and "#" not in path and not hf.is_directory(path):
            raise UserError(f"{named}: {path} names no split; write {path}#validation, or what the split is called")


def _open(source: Source, path: str) -> Records | Iterator[Read]:
    if path.startswith(tfds.SCHEME):
        return tfds.open_tfds(path)
    if path.startswith(hf.SCHEME):
        return hf.open_hf(path)
    return _read_files(source, path)


def _read_files(source: Source, path: str) -> Iterator[Read]:
    for file in text_files.matches(path) if source.format == "parallel" else assets.matches(path):
        empty = True
        for item in READERS[source.format](file, source):
            empty = False
            yield item
        if empty:
            raise UserError(f"{file}: the file has no rows")


def _good(source: Source, rows: Iterable[Read], skipped: list[str], *, grouped: bool) -> Iterator[tuple[int, Row, str, str]]:
    """Each row that can be read: its number, itself, its key, and where `grouped` its document. The others are an error, or,
    where the source is lenient, entered in `skipped`."""
    ids: dict[str, str] = {}
    for number, item in enumerate(rows):
        try:
            row = _checked(source, item, ids)
            found = number, row, row_keys.key(source, row), row_keys.group(source, row) if grouped else ""
        except UserError as error:
            if not source.lenient:
                raise UserError(f"{error}{ADVICE if grouped else ''}") from error
            skipped.append(str(error))
            if len(skipped) <= SHOWN:
                log.warning("skipped: %s", error)
            continue
        yield found


def _checked(source: Source, item: Read, ids: dict[str, str]) -> Row:
    """The row, if it has text, an id of its own, and answers that stand where they say; enters its id."""
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
            raise UserError(f"{item.where}: the id {shown(value)!r} stands already at {ids[value]}")
        ids[value] = item.where
    return item


def shares(source: Source) -> dict[str, float]:
    """The shares of the source's path that become dev and test; 0 where a split has a file of its own."""
    return {"dev": 0.0 if source.dev_path else source.cut_dev, "test": 0.0 if source.test_path else source.cut_test}


def cut(key: str, seed: int, cuts: Mapping[str, float]) -> str:
    """The split of a text: a hash of seed and text, as a number in [0, 1), falls into one of the shares."""
    digest = hashlib.sha256(f"{seed}\0{key}".encode()).digest()
    at = int.from_bytes(digest[:8], "big") / 2**64
    if at < cuts["test"]:
        return "test"
    return "dev" if at < cuts["test"] + cuts["dev"] else "train"


def drawn(identities: Sequence[bytes], source: Source, split: str) -> Sequence[int]:
    """The places, ascending, of the rows that the source's limits leave in a split: drawn by a hash of cut_seed and text.

    So they are of all classes, also where the file is sorted, and the rows of a smaller limit are among those of a larger one.

    Args:
        identities: A digest of each row's text.
        source: The source.
        split: The split that the rows are of.
    """
    limits = (source.limit, source.limit_train if split == "train" else 0)
    most = min((limit for limit in limits if limit), default=len(identities))
    if most >= len(identities):
        return range(len(identities))
    seed = f"{source.cut_seed}\0limit\0".encode()

    def rank(place: int) -> tuple[bytes, int]:
        return hashlib.blake2b(seed + identities[place], digest_size=8).digest(), place

    return sorted(sorted(range(len(identities)), key=rank)[:most])


def advice(source: Source, split: str, distinct: int, dropped: int) -> str:
    """Why a split is empty and what to do, as far as that is known.

    Args:
        source: The source.
        split: The empty split.
        distinct: Texts that were cut from the source's path, or its documents where it has a group.
        dropped: Training rows that were dropped because their text occurred before, or in dev or test.
    """
    what = "document" if source.group else "text"
    count = f"{distinct} distinct {what}{'' if distinct == 1 else 's'}"
    if split == "train":
        if distinct:
            return f"of its {count} none is left beside dev and test: give it more rows, or make cut_dev and cut_test smaller"
        return f"the {what}s of all its {dropped} rows stand in dev or test: name another path" if dropped else ""
    if getattr(source, f"{split}_path"):
        return ""
    share = getattr(source, f"cut_{split}")
    if not share:
        return f"cut_{split} is 0: make it a share of the {what}s, or name a {split}_path"
    return (
        f"of its {count} none fell into the share of {share:g} that is drawn: "
        f"give it more rows, a larger cut_{split}, another cut_seed, or a {split}_path"
    )
