"""Rows to numbers: token ids and labels of every split."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mtl_jax import assets
from mtl_jax.data import targets
from mtl_jax.data import tokens as tokenizing
from mtl_jax.data.labels import Labels, Window
from mtl_jax.data.sources import SHOWN, SPLITS, Row, Source, Splits, apart, read
from mtl_jax.data.tokens import Ragged, RowError, starts_of
from mtl_jax.errors import UserError

log = logging.getLogger(__name__)


class Examples(NamedTuple):
    """The examples of one source in one split: its rows, or the windows that long rows are read in.

    Attributes:
        source: The source's name.
        first_id: Examples have consecutive ids, split by split and in it source by source; this is the first one's.
        tokens: N arrays i32[len], special tokens included.
        labels: {task: [N, *label_shape] in the task's dtype, or N arrays [len] where labels are of tokens or are target texts},
            for the tasks of this source.
        types: N arrays i32[len], token types of pairs; None where all are 0.
        words: N arrays i32[len], for texts given as words: the word's index at its first sub-word, else -1.
        offsets: N arrays i32[len, 2], where a task asks for them: characters of each token in the row's last text.
        rows: i32[N], the place in data of the row that each example comes from, ascending; None: example i is row i.
        data: The rows.
        place: The source's place in the run's order.
    """

    source: str
    first_id: int
    tokens: Sequence[np.ndarray]
    labels: dict[str, Any]
    types: Sequence[np.ndarray] | None = None
    words: Sequence[np.ndarray] | None = None
    offsets: Sequence[np.ndarray] | None = None
    rows: np.ndarray | None = None
    data: Sequence[Row] = ()
    place: int = 0

    @property
    def row_of(self) -> np.ndarray:
        """i32[N], the row that each example comes from."""
        return np.arange(len(self.tokens), dtype=np.int32) if self.rows is None else self.rows

    def window(self, i: int, first: int) -> Window:
        """Example i as a window of its row, whose first window is example `first`."""
        types, words, offsets = (None if x is None else x[i] for x in (self.types, self.words, self.offsets))
        return Window(i - first, self.tokens[i], types, words, offsets)

    def groups(self) -> list[range]:
        """The examples of each row that has any, row by row."""
        edges = np.flatnonzero(np.diff(self.row_of, prepend=-1)).tolist()
        return [range(a, b) for a, b in zip(edges, [*edges[1:], len(self.tokens)], strict=True)]


class Corpus(NamedTuple):
    """All data of a run.

    Attributes:
        splits: {split: {source: Examples}}, sources in the experiment's order.
        tasks: The tasks, filled with what was found in the data, such as label sets.
        notes: One line for each source: sizes, repeated texts, truncated texts.
    """

    splits: dict[str, dict[str, Examples]]
    tasks: tuple[Any, ...]
    notes: list[str]

    def describe(self) -> dict[str, Any]:
        """JSON-able: for each source and split the number of examples and a SHA-256 of their tokens and labels."""
        sources: dict[str, dict[str, Any]] = {}
        for split, parts in self.splits.items():
            for name, part in parts.items():
                digest = hashlib.sha256()
                fields = {"tokens": part.tokens, "types": part.types, **dict(sorted(part.labels.items()))}
                for key, values in fields.items():
                    if values is not None:
                        digest.update(key.encode() + b"\0")
                        _update(digest, values)
                sources.setdefault(name, {})[split] = {"examples": len(part.tokens), "sha256": digest.hexdigest()}
        return {"sources": sources}

    @property
    def size(self) -> int:
        """Number of examples over all splits and sources."""
        return sum(len(e.tokens) for split in self.splits.values() for e in split.values())

    @property
    def has_types(self) -> bool:
        """Whether any source has token types."""
        return any(e.types is not None for split in self.splits.values() for e in split.values())


def _update(digest: Any, values: Any) -> None:
    if not isinstance(values, np.ndarray):
        values = values if isinstance(values, Ragged) else Ragged.of(values, np.asarray(values[0]).dtype)
        digest.update(np.ascontiguousarray(values.starts).data)
        values = values.values
    digest.update(np.ascontiguousarray(values).data)


def read_sources(sources: Sequence[Source], tasks: Sequence[Labels]) -> dict[str, Splits]:
    """Reads the sources that the tasks use; no text is in one's training rows and in another's dev or test rows.

    Raises:
        UserError: A source cannot be read.
    """
    used = {task.source for task in tasks}
    return apart({source.name: read(source) for source in sources if source.name in used})


def texts(sources: Sequence[Source], tasks: Sequence[Labels], data: dict[str, Splits], split: str) -> list[str]:
    """The texts of one split over all sources, both of a pair, and what the tasks have of texts."""
    found = []
    for source in sources:
        own = [name for task in tasks if task.source == source.name for name in task.text_columns]
        for row in data[source.name].rows[split] if source.name in data else ():
            values = [row.columns[name] for name in (source.text, source.pair) if name]
            values += [row.columns.get(name) or "" for name in own]
            found += [value if isinstance(value, str) else " ".join(value) for value in values]
    return found


def make_corpus(
    sources: Sequence[Source], tasks: Sequence[Labels], data: dict[str, Splits], tokenizer: Any, max_length: int
) -> Corpus:
    """Fills the tasks with what is found in the data, parses every label and tokenises every text.

    Args:
        sources: The declared sources.
        tasks: The declared tasks.
        data: What read_sources returned.
        tokenizer: A transformers tokenizer.
        max_length: Longest example in tokens, special tokens included. Longer texts become several examples where a task of the
            source can take that, else they are cut and counted.

    Raises:
        UserError: A label column does not exist or a label is outside the label set; names file and line.
    """
    declared = {source.name: source for source in sources}
    filled = tuple(task.filled(_training_file(declared[task.source], data[task.source]), tokenizer) for task in tasks)
    own = {name: [task for task in filled if task.source == name] for name in data}
    data = {name: _readable(name, parts, own[name]) if declared[name].lenient else parts for name, parts in data.items()}
    splits: dict[str, dict[str, Examples]] = {split: {} for split in SPLITS}
    counts = {name: dict.fromkeys(("cut", "extra"), 0) for name in data}
    unlabelled = dict.fromkeys((task.name for task in filled), 0)
    shortened = dict.fromkeys((task.name for task in filled), 0)
    skipped = dict.fromkeys(data, 0)
    next_id = 0
    for split in SPLITS:
        for place, (name, parts) in enumerate(list(data.items())):
            examples, cut, refused = _examples(
                declared[name], own[name], split, parts.rows[split], tokenizer, max_length, next_id
            )
            skipped[name] += refused
            for task in own[name]:
                found = labels_of(task, examples, tokenizer, _cache())
                examples.labels[task.name] = found.labels
                unlabelled[task.name] += found.blank
                shortened[task.name] += found.cut
                if found.blank == len(examples.data):
                    raise UserError(f"task {task.name!r}: no row of split {split} of source {name!r} has a label")
            splits[split][name] = examples._replace(place=place)
            next_id += len(examples.tokens)
            counts[name]["cut"] += len(cut)
            counts[name]["extra"] += len(examples.tokens) - len(examples.data)
            data[name] = data[name]._replace(rows={**data[name].rows, split: examples.data})
    data = {name: parts._replace(skipped=parts.skipped + skipped[name]) for name, parts in data.items()}
    notes = [_note(own[name], name, parts, counts[name], max_length) for name, parts in data.items()]
    notes += [f"task {name}: {blank} rows have no label" for name, blank in unlabelled.items() if blank]
    for task in filled:
        if shortened[task.name]:
            notes.append(f"task {task.name}: {shortened[task.name]} target texts cut to {task.target_length} tokens")
    filled = tuple(task.fitted(splits["train"][task.source]) for task in filled)
    for task in filled:
        notes += [f"task {task.name}: {remark}" for remark in task.remarks([splits[split][task.source] for split in SPLITS])]
    return Corpus(splits, filled, notes)


def make_examples(
    source: Source,
    tasks: Sequence[Labels],
    rows: Sequence[Row],
    tokenizer: Any,
    max_length: int,
    *,
    first_id: int = 0,
    lenient: bool = False,
    cache: Path | None = None,
) -> tuple[Examples, set[int]]:
    """Tokenises rows, without their labels; and the places of those that were cut.

    Args:
        source: The source that the rows are of: it names the text columns.
        tasks: Its tasks: they say whether texts are read as words, and whether long ones are divided.
        rows: The rows.
        tokenizer: A transformers tokenizer.
        max_length: As in make_corpus.
        first_id: Id of the first example.
        lenient: Whether a text without any token that the vocabulary knows is left empty.
        cache: Where the tokens of much text are kept for the next time; None: nowhere.

    Raises:
        Refused: A text has no token that the vocabulary knows, is no valid Unicode, or leaves no room for the text beside it.
    """
    as_words = any(task.words for task in tasks)
    first = [_text(row, source.text, as_words) for row in rows]
    second = [_text(row, source.pair, False) for row in rows] if source.pair else None
    try:
        found = tokenizing.encode(
            tokenizer,
            first,
            second,
            max_length=max_length,
            windows=any(task.windows for task in tasks),
            stride=max((task.stride for task in tasks), default=0),
            offsets=any(task.needs_offsets for task in tasks),
            cache=cache,
        )
    except RowError as error:
        raise Refused([error.row], f"{rows[error.row].where}: {error.reason}") from error
    # Words without any token are the tagging task's to count.
    special = 0 if as_words else tokenizer.num_special_tokens_to_add(pair=second is not None)
    empty = np.flatnonzero(found.tokens.lengths <= special)
    if len(empty) and not lenient:
        places = sorted(set(found.rows[empty].tolist()))
        raise Refused(places, f"{rows[places[0]].where}: the text has no token that the vocabulary knows")
    examples = Examples(source.name, first_id, found.tokens, {}, found.types, found.words, found.offsets, found.rows, rows)
    return examples, set(found.cut.tolist())


class Refused(UserError):
    """Texts of which the tokenizer makes nothing.

    Attributes:
        rows: Their places, ascending; there may be more of them.
    """

    def __init__(self, rows: list[int], message: str):
        super().__init__(message)
        self.rows = rows


def _examples(
    source: Source, tasks: Sequence[Labels], split: str, rows: Sequence[Row], tokenizer: Any, max_length: int, first_id: int
) -> tuple[Examples, set[int], int]:
    """What make_examples makes of a split, and how many rows it leaves out, which only a lenient source does.

    Raises:
        UserError: A text cannot be tokenised, or none is left.
    """
    cache = _cache()
    before = len(rows)
    while True:
        try:
            examples, cut = make_examples(source, tasks, rows, tokenizer, max_length, first_id=first_id, cache=cache)
            return examples, cut, before - len(rows)
        except Refused as error:
            if not source.lenient:
                raise
            log.warning("skipped %d rows, the first: %s", len(error.rows), error)
            rows = [row for place, row in enumerate(rows) if place not in set(error.rows)]
            if not rows:
                raise UserError(f"source {source.name!r}: no text of split {split} can be tokenised") from error


def _cache() -> Path:
    return assets.cache_dir() / "tokens"


def _text(row: Row, column: str, as_words: bool) -> Any:
    value = row.columns[column]
    if as_words:
        return value.split() if isinstance(value, str) else value
    return value if isinstance(value, str) else " ".join(value)


def _training_file(source: Source, splits: Splits) -> list[Row]:
    """The training rows and those that were cut from the same file: what may be found in the data is found there."""
    rows = list(splits.rows["train"])
    rows += [] if source.dev_path else splits.rows["dev"]
    return rows + ([] if source.test_path else list(splits.rows["test"]))


def _readable(name: str, parts: Splits, tasks: Sequence[Labels]) -> Splits:
    """The rows whose labels can be read; the others are counted, and the first of them logged.

    Raises:
        UserError: No row of a split is left.
    """
    rows: dict[str, Sequence[Row]] = {}
    skipped = 0
    for split, found in parts.rows.items():
        kept = []
        for row in found:
            try:
                for task in tasks:
                    if not task.corrupts:
                        task.parse(row)
            except (ValueError, UserError) as error:
                skipped += 1
                if skipped <= SHOWN:
                    log.warning("skipped: %s", error if isinstance(error, UserError) else f"{row.where}: {error}")
                continue
            kept.append(row)
        if not kept:
            raise UserError(f"source {name!r}: every row of split {split} has a label that cannot be read")
        rows[split] = kept
    return parts._replace(rows=rows, skipped=parts.skipped + skipped)


class Placed(NamedTuple):
    """A task's labels of examples.

    Attributes:
        labels: As in Examples.
        blank: Rows without one.
        cut: Rows whose target text was cut.
    """

    labels: Any
    blank: int = 0
    cut: int = 0


def labels_of(task: Labels, examples: Examples, tokenizer: Any, cache: Path | None = None) -> Placed:
    """Labels of every window; a target text belongs to its row's first one.

    Args:
        task: The task.
        examples: The windows.
        tokenizer: A transformers tokenizer; it is asked where labels are target texts.
        cache: As for make_examples.

    Raises:
        UserError: A label is wrong; names file and line.
    """
    if task.corrupts:
        return Placed(Ragged.of([np.full(len(ids), task.missing, task.dtype) for ids in examples.tokens], task.dtype))
    groups = examples.groups()
    rows = [examples.data[examples.row_of[group[0]]] for group in groups]
    if task.label_level == "target":
        found = targets.encode(task, rows, tokenizer, cache)
        lengths = np.zeros(len(examples.tokens), np.int64)
        lengths[[group[0] for group in groups]] = found.tokens.lengths
        return Placed(Ragged(found.tokens.values, starts_of(lengths)), found.blank, found.cut)
    placed: list[np.ndarray] = []
    blank = 0
    for group, row in zip(groups, rows, strict=True):
        try:
            label = task.parse(row)
            placed += [task.place(label, examples.window(i, group[0])) for i in group]
        except ValueError as error:
            raise UserError(f"{row.where}: task {task.name!r}: {error}") from error
        blank += label is None
    if task.label_level == "token":
        return Placed(Ragged.of(placed, task.dtype), blank)
    return Placed(np.array(placed, task.dtype).reshape(len(placed), *task.label_shape), blank)


def _note(tasks: Sequence[Labels], name: str, parts: Splits, counts: dict[str, int], max_length: int) -> str:
    sizes = "/".join(str(len(parts.rows[split])) for split in SPLITS)
    note = f"source {name}: {sizes} train/dev/test, {parts.repeated} repeated texts dropped, "
    if parts.elsewhere:
        note += f"{parts.elsewhere} that stand in dev or test of another source, "
    if parts.skipped:
        note += f"{parts.skipped} rows that cannot be read left out, "
    if counts["extra"]:
        note += f"long texts read in {counts['extra']} further windows of {max_length} tokens"
        first = [task.name for task in tasks if not task.windows]
        return f"{note}, by {', '.join(first)} in the first one only" if first else note
    return note + f"{counts['cut']} texts cut to {max_length} tokens"
