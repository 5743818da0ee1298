"""The rows of a source with their labels: what cannot be read, and what had to be cut, is counted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mtl_jax.counting import count
from mtl_jax.data.examples import Examples, labels_of, make_examples
from mtl_jax.data.labels import Labels, Refused
from mtl_jax.data.sources import SHOWN, Row, Source
from mtl_jax.errors import UserError

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
        except Refused as error:
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
