"""Made rows in files: mtl-jax augment writes them once, and Written trains on them.

Each line is a made row with its provenance: the augmentation and its fields, the row that it was made from, and the key of that
row's text. By this key a run finds the rows that were made from its own training rows; rows that were made from a row that is
now in dev or test are never used.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from mtl_jax.audit import at_start
from mtl_jax.core.errors import UserError, count, listed, unknown
from mtl_jax.core.files import shown, to_json, write_bytes
from mtl_jax.core.row_texts import hiding_if
from mtl_jax.data import augmentations, made_rows, row_keys, splits
from mtl_jax.data import corpus as corpora
from mtl_jax.data.formats.json_files import read_jsonl
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.made_rows import MADE, MadeRow
from mtl_jax.data.source import Augmentation, AugmentedRows, MakeRows, Source, TextColumns
from mtl_jax.experiment import Experiment, select
from mtl_jax.experiment_checks import check

log = logging.getLogger(__name__)

PROVENANCE = "augmented"  # the field of a written row that says how it was made
KEY = f"{PROVENANCE}.key"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written(Augmentation):
    """Rows that mtl-jax augment wrote, if they were made from a training row of this run.

    Attributes:
        share: As in all augmentations; by default all training rows, so that no row of the file is left out by chance.
        added: As in all augmentations: so many of the rows that were made from a row are added, in the order of the file; the
            log counts the others. 0: each pass draws one of them in place of the row.
        seed: As in all augmentations.
        path: The file.

    Examples:
        >>> source = mtl_jax.Source("reviews", "reviews.csv", augment=(mtl_jax.augment.Written(path="made.jsonl", added=1),))
    """

    share: float = 1.0
    path: str

    keeps: ClassVar[tuple[str, ...]] = ("example", "word", "token", "target", "answer")
    joins_rows: ClassVar[bool] = True
    growth: ClassVar[float] = 0.2

    def check(self, where: str) -> None:
        if not Path(self.path).is_file():
            raise UserError(f"{where}: path {shown(self.path)} is not a file; mtl-jax augment writes one")

    def maker(self, source: AugmentedRows) -> MakeRows:
        made: dict[str, list[Row]] = defaultdict(list)
        for item in read_jsonl(self.path, source.source):
            if isinstance(item, UserError):
                raise item
            key = item.columns.get(KEY)
            if not isinstance(key, str):
                raise UserError(f"{item.where}: there is no {KEY}: not a file that mtl-jax augment wrote")
            columns = {name: value for name, value in item.columns.items() if not name.startswith(f"{PROVENANCE}.")}
            made[key].append(item._replace(columns=columns))
        if self.added:
            self._note_left_out(source, made)
        used: Counter[str] = Counter()

        def make(rows: Sequence[Row], generators: Sequence[np.random.Generator]) -> list[Row | str]:
            results: list[Row | str] = []
            for row, rng in zip(rows, generators, strict=True):
                key = row_keys.digest(row_keys.key(source.source, row)).hex()
                choices = made.get(key, [])
                place = used[key] if self.added else int(rng.integers(max(1, len(choices))))
                used[key] += 1
                results.append(choices[place] if place < len(choices) else "not in the file")
            return results

        return make

    def _note_left_out(self, source: AugmentedRows, made: Mapping[str, Sequence[Row]]) -> None:
        """Logs how many rows of the file are not added, and why."""
        keys = {row_keys.digest(row_keys.key(source.source, row)).hex() for row in source.rows}
        foreign = sum(len(rows) for key, rows in made.items() if key not in keys)
        numbers = [len(rows) for key, rows in made.items() if key in keys]
        more = sum(max(0, number - self.added) for number in numbers)
        reasons = [f"{foreign:,} made from rows that are not training rows of this run"] if foreign else []
        if more:
            advice = f"up to {max(numbers)} were made from a row: set added to that"
            reasons.append(f"{more:,} because added is {self.added} ({advice})")
        if reasons:
            total = count(sum(map(len, made.values())), "row")
            where = f"source {source.source.name}: Written: of {total} in {shown(self.path)}"
            log.warning("%s these are left out: %s", where, "; ".join(reasons))


class Made(NamedTuple):
    """Rows that augmentations made.

    Attributes:
        rows: The rows.
        counts: {augmentation: {"made", and reasons why rows were not made: numbers}}.
        lines: The rows as JSON objects with their provenance.
    """

    rows: list[MadeRow]
    counts: dict[str, dict[str, int]]
    lines: list[str]

    def __str__(self) -> str:
        parts = []
        for name, numbers in self.counts.items():
            others = [f"{number:,} {reason}" for reason, number in numbers.items() if reason != MADE]
            parts.append(f"{name} made {count(numbers.get(MADE, 0), 'row')}{f' ({listed(others)})' if others else ''}")
        return "; ".join(parts)


@hiding_if(lambda experiment, *args, **options: experiment.private)
def of_experiment(experiment: Experiment, source: str = "", copies: int = 1) -> Made:
    """The rows that the augmentations of an experiment make from the training rows of a source, each augmentation alone.

    Args:
        experiment: The experiment.
        source: The source; empty: the only one with augmentations.
        copies: How many rows augmentations with added = 0 make from a row; the others make `added`.

    Raises:
        UserError: There is no such source, or something in it or its augmentations is wrong.
    """
    experiment = select(experiment)
    check(experiment)
    augmented = {part.name: part for part in experiment.sources if augmentations.of_source(part, experiment.augment)}
    if not augmented:
        raise UserError("no source of the experiment has augmentations; give one augment=(...)")
    if source and source not in augmented:
        raise unknown("source with augmentations:", source, augmented)
    if not source and len(augmented) > 1:
        raise UserError(f"several sources have augmentations, {listed(augmented)}; choose one by --source")
    chosen = augmented[source or next(iter(augmented))]
    data = at_start.examine(experiment.sources, corpora.read_sources(experiment.sources, experiment.tasks)).data
    if chosen.name not in data:
        raise UserError(f"source {chosen.name!r}: no task uses it, so nothing is made of its rows")
    about = augmentations.rows_of(chosen, experiment.tasks, data[chosen.name].rows["train"])
    source_augmentations = augmentations.of_source(chosen, experiment.augment)
    return _made(chosen, about, source_augmentations, augmentations.held_out_texts(data), copies)


def of_file(
    file: str,
    augmentation: Augmentation,
    *,
    format: str = "csv",
    columns: Sequence[str] = (),
    text: str = "text",
    pair: str = "",
    labels: Sequence[str] = (),
    held_out: Sequence[str] = (),
    copies: int = 1,
) -> Made:
    """The rows that an augmentation makes from the rows of a file, all of which are training rows.

    Args:
        file: The file, as Source.path.
        augmentation: The augmentation.
        format: As Source.format; columns, text and pair are also as in Source.
        columns: Names of columns.
        text: The column with the text.
        pair: The column with a second text.
        labels: Columns with a label for each word of the text.
        held_out: Files of the same format whose texts must not be made: dev and test.
        copies: How many rows are made from a row.

    Raises:
        UserError: The file or a row cannot be read, or a field of the augmentation makes no sense.
    """
    augmentations.check_one(augmentation, type(augmentation).__name__)
    source = Source("file", file, format=format, columns=tuple(columns), text=text, pair=pair)
    others = [splits.read_one(dataclasses.replace(source, path=path)) for path in held_out]
    keys = [row_keys.key(source, row) for rows in others for row in rows]
    forbidden = frozenset(augmentations.text_digest(source, key) for key in keys)
    texts = tuple(name for name in (text, pair, "context") if name)
    rows = splits.read_one(source)
    for name in labels:
        if name not in rows[0].columns:
            raise unknown(f"column of {shown(file)} in labels:", name, rows[0].columns)
    about = AugmentedRows(source, TextColumns(text, texts, (), tuple(labels), pair or "context"), (), rows)
    return _made(source, about, (augmentation,), forbidden, copies)


def _made(
    source: Source, about: AugmentedRows, chosen: Sequence[Augmentation], held_out: frozenset[bytes], copies: int
) -> Made:
    if copies < 1:
        raise UserError(f"copies is {copies}; it must be at least 1")
    adding = [dataclasses.replace(part, added=part.added or copies) for part in chosen]
    counts: dict[str, Counter[str]] = {}
    rows = list(made_rows.make(source, about, adding, held_out, counts))
    made_rows.check_counts(source, counts)
    fields = dict(zip(augmentations.names(adding), adding, strict=True))
    return Made(rows, {name: dict(numbers) for name, numbers in counts.items()}, [line_of(source, row, fields) for row in rows])


def line_of(source: Source, made: MadeRow, fields: Mapping[str, Augmentation]) -> str:
    """A made row as a JSON object: its columns, and its provenance.

    Args:
        source: The source.
        made: The row.
        fields: {name: augmentation}.
    """
    provenance = {
        "by": made.by,
        "fields": json.loads(to_json(dataclasses.asdict(fields[made.by]))),
        "from": made.origin.where,
        "number": made.number + 1,
        "key": row_keys.digest(row_keys.key(source, made.origin)).hex(),
    }
    return to_json({**made.row.columns, PROVENANCE: provenance}, ensure_ascii=False)


def write(made: Made, output: str | Path) -> None:
    """Writes made rows to a file, whole or not at all, a JSON object a line."""
    write_bytes(Path(output), "".join(f"{line}\n" for line in made.lines).encode())


def texts(augmentation: Augmentation, texts: Sequence[str], *, seed: int = 0) -> list[str]:
    """Texts as an augmentation changes them, to inspect it or for your own loop; others stay unchanged.

    Args:
        augmentation: The augmentation; its share is not used.
        texts: The texts.
        seed: Seed of the draws.

    Raises:
        UserError: A field of the augmentation makes no sense.
    """
    augmentations.check_one(augmentation, type(augmentation).__name__)
    source = Source("texts", text="text")
    rows = [Row({"text": text}, f"text {number}") for number, text in enumerate(texts, start=1)]
    about = AugmentedRows(source, TextColumns("text", ("text",)), (), rows)
    keys = [row_keys.digest(row_keys.key(source, row)) for row in rows]
    generators = [augmentations.generator(augmentation, source.name, 0, key, [seed]) for key in keys]
    made = augmentation.maker(about)(rows, generators)
    return [text if isinstance(row, str) else row.columns["text"] for text, row in zip(texts, made, strict=True)]
