"""Rows to numbers: token ids and labels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mtl_jax.core.errors import UserError, count
from mtl_jax.data import targets
from mtl_jax.data import tokenize as tokenizing
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.labels import TOKEN_LEVELS, Labels, UnreadableTexts, Window
from mtl_jax.data.source import Source
from mtl_jax.data.splits import SHOWN
from mtl_jax.data.tokenize import Ragged, RowError, starts_of


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
        UnreadableTexts: A text has no token that the vocabulary knows, is not valid Unicode, or leaves no room for the other
            text of its pair.
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
        raise UnreadableTexts(error.rows, f"{rows[error.rows[0]].where}: {error.reason}") from error
    # Words without any token are the tagging task's to count.
    special = 0 if as_words else tokenizer.num_special_tokens_to_add(pair=second is not None)
    empty = np.flatnonzero(found.tokens.lengths <= special)
    if len(empty) and not lenient:
        places = sorted(set(found.rows[empty].tolist()))
        raise UnreadableTexts(places, f"{rows[places[0]].where}: the text has no token that the vocabulary knows")
    examples = Examples(source.name, first_id, found.tokens, {}, found.types, found.words, found.offsets, found.rows, rows)
    return examples, set(found.cut.tolist())


def _text(row: Row, column: str, as_words: bool) -> Any:
    value = row.columns[column]
    if as_words:
        return value.split() if isinstance(value, str) else value
    return value if isinstance(value, str) else " ".join(value)


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
            placed += [task.window_label(label, examples.window(i, group[0])) for i in group]
        except ValueError as error:
            raise UserError(f"{row.where}: task {task.name!r}: {error}") from error
        blank += label is None
    if task.label_level in TOKEN_LEVELS:
        return Placed(Ragged.of(placed, task.dtype), blank)
    return Placed(np.array(placed, task.dtype).reshape(len(placed), *task.label_shape), blank)


log = logging.getLogger(__name__)


class Counts(NamedTuple):
    """What became of rows.

    Attributes:
        skipped: Rows that were left out, which only a lenient source does.
        cut: Texts that were cut.
        extra: Windows behind the first one of their text.
        long: Texts that have such windows.
        blank: {task: rows without a label}.
        shortened: {task: target texts that were cut}.
    """

    skipped: int
    cut: int
    extra: int
    long: int
    blank: dict[str, int]
    shortened: dict[str, int]

    def plus(self, other: Counts) -> Counts:
        """Both together."""
        skipped, cut, extra, long = (a + b for a, b in zip(self[:4], other[:4], strict=True))
        blank, shortened = ({task: a[task] + b[task] for task in a} for a, b in zip(self[4:], other[4:], strict=True))
        return Counts(skipped, cut, extra, long, blank, shortened)


class Part(NamedTuple):
    """Rows of one source, read.

    Attributes:
        examples: With the labels of the tasks that were asked for; its data are the rows that stayed.
        counts: What became of the rows.
    """

    examples: Examples
    counts: Counts


def make_part(
    source: Source,
    tasks: Sequence[Labels],
    rows: Sequence[Row],
    tokenizer: Any,
    max_length: int,
    what: str,
    *,
    labelled: Sequence[Labels] | None = None,
    first_id: int = 0,
    cache: Path | None = None,
) -> Part:
    """Tokenises rows and parses their labels; a lenient source leaves out rows where that is not possible, and says so.

    Args:
        source: The source that the rows are of.
        tasks: Its tasks, label sets filled in: they say how texts are read.
        rows: The rows.
        tokenizer: A transformers tokenizer.
        max_length: Longest example in tokens, special tokens included. Longer texts become several examples where a task of the
            source can take that, else they are cut.
        what: What these rows are, for errors.
        labelled: The tasks whose labels are read; None: all of them.
        first_id: Id of the first example.
        cache: Where the tokens of much text are kept for the next time; None: nowhere.

    Raises:
        UserError: A text or label cannot be read, with file and line; of a lenient source, none can.
    """
    asked = tasks if labelled is None else labelled
    kept: Sequence[Row] = rows
    if source.lenient:
        kept = readable(rows, asked, lambda task, row: None if task.corrupts else task.parse(row))
        if not kept:
            raise UserError(f"source {source.name!r}: every row of {what} has a label that cannot be read")
    while True:
        try:
            examples, cut = make_examples(source, tasks, kept, tokenizer, max_length, first_id=first_id, cache=cache)
            placed = {task.name: labels_of(task, examples, tokenizer, cache) for task in asked}
            break
        except UnreadableTexts as error:
            if not source.lenient:
                raise
            log.warning("skipped %s, the first: %s", count(len(error.rows), "row"), error)
            refused = set(error.rows)
            kept = [row for place, row in enumerate(kept) if place not in refused]
            if not kept:
                raise UserError(f"source {source.name!r}: no text of {what} can be tokenised") from error
    examples.labels.update({name: found.labels for name, found in placed.items()})
    counts = Counts(
        skipped=len(rows) - len(kept),
        cut=len(cut),
        extra=len(examples.tokens) - len(kept),
        long=sum(len(group) > 1 for group in examples.groups()),
        blank={name: found.blank for name, found in placed.items()},
        shortened={name: found.cut for name, found in placed.items()},
    )
    return Part(examples, counts)


def readable(
    rows: Sequence[Row], tasks: Sequence[Labels], read: Callable[[Labels, Row], Any], quiet: bool = False
) -> list[Row]:
    """The rows that `read` can read for every task; the first few others are logged.

    Args:
        rows: Rows of one source.
        tasks: Its tasks.
        read: Reads a row for a task, or raises ValueError or UserError.
        quiet: Whether nothing is logged.
    """
    kept: list[Row] = []
    skipped = 0
    for row in rows:
        try:
            for task in tasks:
                read(task, row)
        except (ValueError, UserError) as error:
            skipped += 1
            if skipped <= SHOWN and not quiet:
                place = "" if isinstance(error, UserError) else f"{row.where}: "
                log.warning("skipped: %s%s", place, error)
            continue
        kept.append(row)
    return kept


def shortened(tasks: Sequence[Labels], counts: Counts, max_length: int) -> str:
    """How texts came to fit into rows: "3 texts cut to 64 tokens".

    Args:
        tasks: The tasks that read the rows.
        counts: What became of them.
        max_length: As for make_part.
    """
    if not counts.extra:
        return f"{count(counts.cut, 'text')} cut to {count(max_length, 'token')}"
    told = f"{count(counts.long, 'long text')} read in {count(counts.extra, 'further window')} of {count(max_length, 'token')}"
    first = [task.name for task in tasks if not task.windows]
    sees = "sees" if len(first) == 1 else "see"
    return f"{told}, of which {', '.join(first)} {sees} the first one only" if first else told


def remarks(tasks: Sequence[Labels], counts: Counts) -> list[str]:
    """What is to be said of the tasks' labels, a line each.

    Args:
        tasks: The tasks whose labels were read.
        counts: What became of the rows.
    """
    lines = [f"task {name}: {count(blank, 'row has', 'rows have')} no label" for name, blank in counts.blank.items() if blank]
    for task in tasks:
        if counts.shortened[task.name]:
            texts = count(counts.shortened[task.name], "target text")
            lines.append(f"task {task.name}: {texts} cut to {count(task.target_length, 'token')}")
    return lines
