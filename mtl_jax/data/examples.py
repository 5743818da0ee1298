"""From rows to examples: tokens and labels as arrays, and a count of the rows and texts that were dropped or truncated."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mtl_jax.core.errors import UserError, count
from mtl_jax.data import targets, units
from mtl_jax.data import tokenize as tokenizing
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.labels import TOKEN_LEVELS, Labels, UnreadableTexts, Window, label_problem
from mtl_jax.data.source import Source
from mtl_jax.data.splits import SHOWN
from mtl_jax.data.tokenize import Ragged, RowError, starts_of
from mtl_jax.pretrained import language_codes

log = logging.getLogger(__name__)


class Examples(NamedTuple):
    """The examples of one source in one split: its rows, or the windows of long rows.

    Attributes:
        source: The source's name.
        first_id: The first example's id. Ids are consecutive, split by split and within a split source by source.
        tokens: N arrays i32[len], special tokens included.
        labels: {task: [N, *label_shape] in the task's dtype, or N arrays [len] for labels of words or tokens and for target
            texts}, for the tasks of this source.
        types: N arrays i32[len], token types of pairs; None where all are 0.
        words: N arrays i32[len], for texts read as words: the word's index at its first sub-word, else -1.
        offsets: N arrays i32[len, 2], where a task needs them: characters of each token in the row's last text.
        rows: i32[N], the index in data of each example's row, ascending; None: example i is row i.
        data: The rows.
        place: The source's number in the run's order.
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
        """i32[N], the index of each example's row."""
        return np.arange(len(self.tokens), dtype=np.int32) if self.rows is None else self.rows

    def window(self, i: int, first: int) -> Window:
        """Example i as a window of its row, whose first window is example `first`."""
        types, words, offsets = (None if x is None else x[i] for x in (self.types, self.words, self.offsets))
        return Window(i - first, self.tokens[i], types, words, offsets)

    def groups(self) -> list[range]:
        """The examples of each row, row by row; rows without examples are left out."""
        edges = np.flatnonzero(np.diff(self.row_of, prepend=-1)).tolist()
        ends = [*edges[1:], len(self.tokens)] if edges else []
        return [range(a, b) for a, b in zip(edges, ends, strict=True)]


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
    """Tokenises rows, without their labels; also returns the indices of truncated rows.

    Args:
        source: The source of the rows; it names the text columns.
        tasks: Its tasks; they decide whether texts are read as words, and whether long texts become several windows.
        rows: The rows.
        tokenizer: A transformers tokenizer.
        max_length: As for read_examples.
        first_id: Id of the first example.
        lenient: Whether a text without any token that the vocabulary knows becomes an empty example; else it is an error.
        cache: Directory of the token cache, for large amounts of text; None: no cache.

    Raises:
        UnreadableTexts: A text has no token that the vocabulary knows, is not valid Unicode, or leaves no room for the other
            text of its pair.
    """
    tokenizer = language_codes.marked(tokenizer, next((task.languages[0] for task in tasks if task.languages[0]), ""), "")
    as_words = any(task.words for task in tasks)
    reader = units.reader(tasks)
    if reader is None:
        first = [_text(row, source.text, as_words) for row in rows]
        second = [_text(row, source.pair, False) for row in rows] if source.pair else None
        row_of = None
    else:
        first, second, row_of = units.texts_of(reader, source, rows)
    max_length //= units.size(tasks)
    try:
        maker = next((task for task in tasks if task.makes_tokens), None)
        encoded = (
            maker.encode_rows(rows, source, tokenizer, max_length, cache)
            if maker is not None
            else tokenizing.encode(
                tokenizer,
                first,
                second,
                max_length=max_length,
                windows=any(task.windows for task in tasks),
                stride=max((task.stride for task in tasks), default=0),
                offsets=any(task.needs_offsets for task in tasks),
                cache=cache,
            )
        )
    except RowError as error:
        refused = error.rows if row_of is None else sorted({int(row_of[text]) for text in error.rows})
        raise UnreadableTexts(refused, f"{rows[refused[0]].where}: {error.reason}") from error
    truncated = encoded.truncated
    if row_of is not None:
        encoded = encoded._replace(rows=row_of)
        truncated = row_of[truncated]
    # The tagging task itself counts words without any token.
    special = 0 if as_words else tokenizer.num_special_tokens_to_add(pair=second is not None)
    empty = np.flatnonzero(encoded.tokens.lengths <= special)
    if row_of is not None:
        empty = np.array([i for i in empty if first[i]], np.int64)  # a row may lack the text
    if len(empty) and not lenient:
        indices = sorted(set(encoded.rows[empty].tolist()))
        raise UnreadableTexts(indices, f"{rows[indices[0]].where}: the text has no token that the vocabulary knows")
    examples = Examples(
        source.name, first_id, encoded.tokens, {}, encoded.types, encoded.words, encoded.offsets, encoded.rows, rows
    )
    return examples, set(truncated.tolist())


def _text(row: Row, column: str, as_words: bool) -> Any:
    value = row.columns[column]
    if as_words:
        return value.split() if isinstance(value, str) else value
    return value if isinstance(value, str) else " ".join(value)


class ExampleLabels(NamedTuple):
    """A task's labels of examples.

    Attributes:
        labels: As in Examples.
        blank: Number of rows without a label.
        truncated: Number of rows whose target text was truncated.
    """

    labels: Any
    blank: int = 0
    truncated: int = 0


def labels_of(task: Labels, examples: Examples, tokenizer: Any, cache: Path | None = None) -> ExampleLabels:
    """Labels of every window; a target text belongs to its row's first window.

    Args:
        task: The task.
        examples: The windows.
        tokenizer: A transformers tokenizer; it is used for target texts only.
        cache: As for make_examples.

    Raises:
        UserError: A label is wrong; names file and line.
    """
    if task.corrupts:
        return ExampleLabels(Ragged.of([np.full(len(ids), task.missing, task.dtype) for ids in examples.tokens], task.dtype))
    groups = examples.groups()
    rows = [examples.data[examples.row_of[group[0]]] for group in groups]
    if task.label_level == "target":
        encoded = targets.encode(task, rows, language_codes.marked(tokenizer, *task.languages), cache)
        lengths = np.zeros(len(examples.tokens), np.int64)
        lengths[[group[0] for group in groups]] = encoded.tokens.lengths
        return ExampleLabels(Ragged(encoded.tokens.values, starts_of(lengths)), encoded.blank, encoded.truncated)
    labels: list[np.ndarray] = []
    blank = 0
    for group, row in zip(groups, rows, strict=True):
        try:
            label = task.parse(row)
            labels += [task.window_label(label, examples.window(i, group[0])) for i in group]
        except ValueError as error:
            raise UserError(f"{row.where}: task {task.name!r}: {label_problem(task, error)}") from error
        blank += label is None
    if task.label_level in TOKEN_LEVELS:
        return ExampleLabels(Ragged.of(labels, task.dtype), blank)
    return ExampleLabels(np.array(labels, task.dtype).reshape(len(labels), *task.label_shape), blank)


class Counts(NamedTuple):
    """How many rows and texts were dropped, truncated or divided.

    Attributes:
        skipped: Rows that were left out; only a lenient source does that.
        truncated: Texts that were truncated.
        extra: Windows after the first one of their text.
        long: Texts with several windows.
        blank: {task: rows without a label}.
        truncated_targets: {task: target texts that were truncated}.
    """

    skipped: int
    truncated: int
    extra: int
    long: int
    blank: dict[str, int]
    truncated_targets: dict[str, int]

    def plus(self, other: Counts) -> Counts:
        """The sum of both."""
        skipped, truncated, extra, long = (a + b for a, b in zip(self[:4], other[:4], strict=True))
        blank, targets = ({task: a[task] + b[task] for task in a} for a, b in zip(self[4:], other[4:], strict=True))
        return Counts(skipped, truncated, extra, long, blank, targets)


class ReadExamples(NamedTuple):
    """Rows of one source as examples.

    Attributes:
        examples: The examples, with labels; their data are the rows that were not left out.
        counts: How many rows and texts were dropped, truncated or divided.
    """

    examples: Examples
    counts: Counts


def read_examples(
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
) -> ReadExamples:
    """Tokenises rows and parses their labels; of a lenient source, rows that cannot be read are left out and logged.

    Args:
        source: The source of the rows.
        tasks: Its tasks, label sets filled in; they decide how texts are read.
        rows: The rows.
        tokenizer: A transformers tokenizer.
        max_length: Longest example in tokens, special tokens included. Longer texts become several examples if a task of the
            source reads windows, else they are truncated.
        what: A name of these rows, for errors.
        labelled: The tasks whose labels are read; None: all of them.
        first_id: Id of the first example.
        cache: Directory of the token cache, for large amounts of text; None: no cache.

    Raises:
        UserError: A text or label cannot be read, with file and line; of a lenient source, no row can be read.
    """
    label_tasks = tasks if labelled is None else labelled
    kept: Sequence[Row] = rows
    if source.lenient:
        kept = readable(rows, label_tasks, lambda task, row: None if task.corrupts else task.parse(row))
        if not kept:
            raise UserError(f"source {source.name!r}: every row of {what} has a label that cannot be read")
    while True:
        try:
            examples, truncated = make_examples(source, tasks, kept, tokenizer, max_length, first_id=first_id, cache=cache)
            labels = {task.name: labels_of(task, examples, tokenizer, cache) for task in label_tasks}
            break
        except UnreadableTexts as error:
            if not source.lenient:
                raise
            log.warning("skipped %s, the first: %s", count(len(error.rows), "row"), error)
            refused = set(error.rows)
            kept = [row for index, row in enumerate(kept) if index not in refused]
            if not kept:
                raise UserError(f"source {source.name!r}: no text of {what} can be tokenised") from error
    examples.labels.update({name: result.labels for name, result in labels.items()})
    several = units.reader(tasks) is not None
    counts = Counts(
        skipped=len(rows) - len(kept),
        truncated=len(truncated),
        extra=0 if several else len(examples.tokens) - len(kept),
        long=0 if several else sum(len(group) > 1 for group in examples.groups()),
        blank={name: result.blank for name, result in labels.items()},
        truncated_targets={name: result.truncated for name, result in labels.items()},
    )
    return ReadExamples(examples, counts)


def readable(
    rows: Sequence[Row], tasks: Sequence[Labels], read: Callable[[Labels, Row], Any], quiet: bool = False
) -> list[Row]:
    """The rows that `read` can read for every task; of the others the first few are logged.

    Args:
        rows: Rows of one source.
        tasks: Its tasks.
        read: Reads a row for a task, or raises ValueError or UserError.
        quiet: Whether logging is off.
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
                where = "" if isinstance(error, UserError) else f"{row.where}: "
                log.warning("skipped: %s%s", where, error)
            continue
        kept.append(row)
    return kept
