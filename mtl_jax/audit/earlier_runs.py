"""Held-out rows that are copies of the training rows of an earlier run, from which a run starts or which it imitates.

The earlier run has learned from those rows, and its texts may no longer exist. Its workdir has sketches of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mtl_jax.audit import text_sketches
from mtl_jax.audit.row_views import Joined, Rows, views
from mtl_jax.audit.text_keys import Text
from mtl_jax.audit.text_sketches import TextSketches
from mtl_jax.core.errors import UserError, count
from mtl_jax.core.files import shown, write_bytes
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.source import Source
from mtl_jax.data.splits import Splits

FILE = "train_sketches.npz"  # in a workdir
HELD_OUT = ("dev", "test")
MOST_ROWS = 1_000_000  # that are read; of more, every second, third, ...


class Compared(NamedTuple):
    """The comparison of held-out rows with the training rows of earlier runs.

    Attributes:
        notes: Lines for the log.
        record: {workdir: {source: {split: {kind: number of rows}}}}, if there are copies.
    """

    notes: list[str]
    record: dict[str, Any]


def texts_of(source: Source, rows: Sequence[Row]) -> list[Text]:
    """The texts of whole rows, as copies are compared: a text, a pair, a question with its context."""
    if not len(rows):
        return []
    group = Rows([(source.name, "")], np.zeros(len(rows), np.int64), Joined([rows]), np.zeros(len(rows), bool))
    return views([source], (), group, ["row"])["row"].texts


def write(folder: Path, sources: Sequence[Source], train: Mapping[str, Sequence[Row]], earlier: Sequence[str]) -> None:
    """Writes the sketches of a run's training texts, with those of the runs that it learned from.

    Sketches that are already in the workdir stay, because it may resume with other rows.

    Args:
        folder: The workdir.
        sources: The sources.
        train: {source: its training rows}.
        earlier: Workdirs of these runs.

    Raises:
        UserError: The file cannot be written.
    """
    every = 1 + sum(map(len, train.values())) // MOST_ROWS
    texts = [text for source in sources if source.name in train for text in texts_of(source, train[source.name][::every])]
    of_run = text_sketches.of_texts(texts)
    known = [part for workdir in (folder, *map(Path, earlier)) if (part := read(workdir)) is not None]
    write_bytes(folder / FILE, text_sketches.to_bytes(text_sketches.joined([of_run._replace(of=of_run.of * every), *known])))


def read(folder: Path) -> TextSketches | None:
    """The sketches in a workdir; None if there are none.

    Raises:
        UserError: The file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        return text_sketches.from_bytes(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{shown(path)}: cannot be read ({error}); without it, the run is not compared: delete it") from error


def compare(sources: Sequence[Source], data: Mapping[str, Splits], earlier: Sequence[tuple[str, str]]) -> Compared:
    """Compares the held-out rows of a run with the sketches of earlier runs.

    Args:
        sources: The sources.
        data: {source: its splits}.
        earlier: (field that names it, workdir) of each run; a directory that does not exist, or is not a workdir, is left out.

    Raises:
        UserError: A file of sketches is damaged.
    """
    notes: list[str] = []
    record: dict[str, Any] = {}
    for field, workdir in earlier:
        if not (Path(workdir) / "data.json").is_file():
            continue
        known = read(Path(workdir))
        if known is None:
            notes.append(f"copies: {workdir} ({field}) has no {FILE}, so it is not known whether it learned from held-out rows")
            continue
        for source in (source for source in sources if source.name in data):
            for split in HELD_OUT:
                texts = texts_of(source, data[source.name].rows[split])
                copies = text_sketches.copies_of(known, texts, source.near)
                numbers = {"letters": int(copies.letters.sum()), "near": int(copies.near.sum())}
                if sum(numbers.values()):
                    record.setdefault(workdir, {}).setdefault(source.name, {})[split] = numbers
                    notes.append(_note(field, workdir, source.name, split, numbers, len(texts), known))
    return Compared(notes, record)


def _note(field: str, workdir: str, source: str, split: str, numbers: Mapping[str, int], of: int, known: TextSketches) -> str:
    kinds = ", ".join(f"{number:,} {kind}" for kind, number in numbers.items() if number)
    rows = f"{sum(numbers.values()):,} of {count(of, f'{split} row')} of {source}"
    sample = len(known.letters) / known.of
    share = f"; its sketches are those of {100 * sample:.0f} % of its texts" if sample < 1 else ""
    return f"copies: {rows} are probably copies of training rows of {workdir} ({field}): {kinds}{share}"
