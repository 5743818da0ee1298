"""Rows that augmentations make before training: added to the training rows of a source, or written to a file.

They are made of training rows alone. A made text that stands in dev or test of any source is left out, and so is one that is
the text of a training row, or that was made before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mtl_jax.core.errors import UserError, count
from mtl_jax.core.row_texts import are_hidden, quoted
from mtl_jax.data import row_keys
from mtl_jax.data.augmentations import generator, held_out_texts, names, of_source, problem, rows_of, text_digest
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.labels import Labels
from mtl_jax.data.source import Augmentation, AugmentedRows, Source
from mtl_jax.data.splits import Splits

AT_ONCE = 4096  # rows that an augmentation gets at once: a model has few programs to compile for so many
EXAMPLES = 10  # made rows that are shown
MADE = "made"  # beside the reasons why rows were not made


class MadeRow(NamedTuple):
    """A made row and where it is from.

    Attributes:
        row: The made row.
        origin: The training row.
        by: The name of the augmentation.
        number: Which of the rows that it made of this one, from 0.
    """

    row: Row
    origin: Row
    by: str
    number: int


class Added(NamedTuple):
    """The data of a run with its added rows.

    Attributes:
        data: {source: its splits}.
        counts: {source: {augmentation: {"made", and reasons: numbers of rows}}}, only of sources with added rows.
        examples: {source: some of the made rows}.
        held_out: Digests of the texts of dev and test, which are never made.
    """

    data: dict[str, Splits]
    counts: dict[str, dict[str, dict[str, int]]]
    examples: dict[str, list[MadeRow]]
    held_out: frozenset[bytes]


def add(
    sources: Sequence[Source],
    tasks: Sequence[Labels],
    data: Mapping[str, Splits],
    run_augmentations: Sequence[Augmentation] = (),
) -> Added:
    """The sources with the rows that their augmentations add, after their other training rows.

    Args:
        sources: The sources.
        tasks: The tasks.
        data: {source: its splits}, without the training rows that are held out.
        run_augmentations: The augmentations of the run.

    Raises:
        UserError: None of the rows that an augmentation made can be used.
    """
    if not any(of_source(source, run_augmentations) for source in sources):
        return Added(dict(data), {}, {}, frozenset())
    held_out = held_out_texts(data)
    result = Added(dict(data), {}, {}, held_out)
    for source in sources:
        augmentations = of_source(source, run_augmentations)
        if source.name not in data or not any(augmentation.added for augmentation in augmentations):
            continue
        parts, counts = data[source.name], dict[str, Counter[str]]()
        about = rows_of(source, tasks, parts.rows["train"])
        made = list(make(source, about, augmentations, held_out, counts))
        check_counts(source, counts)
        digests = [text_digest(source, row_keys.key(source, item.row)) for item in made]
        result.data[source.name] = parts._replace(
            rows={**parts.rows, "train": [*parts.rows["train"], *(item.row for item in made)]},
            text_digests={**parts.text_digests, "train": [*parts.text_digests["train"], *digests]},
        )
        result.counts[source.name] = {name: dict(sorted(numbers.items())) for name, numbers in counts.items()}
        result.examples[source.name] = made[:: max(1, len(made) // EXAMPLES)][:EXAMPLES]
    return result


def make(
    source: Source,
    about: AugmentedRows,
    augmentations: Sequence[Augmentation],
    held_out: frozenset[bytes],
    counts: dict[str, Counter[str]],
) -> Iterator[MadeRow]:
    """The rows that augmentations make of training rows, each made row of one augmentation alone.

    Args:
        source: The source.
        about: Its training rows, and what augmentations know of them.
        augmentations: The augmentations; those with added = 0 make none.
        held_out: Digests of texts that must not be made.
        counts: Gets {augmentation: how many rows were made, and why others were not}.
    """
    rows = about.rows
    keys = [row_keys.key(source, row) for row in rows]
    taken = {row_keys.digest(key) for key in keys}
    for place, (name, augmentation) in enumerate(zip(names(augmentations), augmentations, strict=True)):
        counter = counts.setdefault(name, Counter()) if augmentation.added else Counter[str]()
        make_rows = augmentation.maker(about) if augmentation.added else None
        for number in range(augmentation.added):
            chosen: list[tuple[int, Any]] = []
            for index, key in enumerate(keys):
                rng = generator(augmentation, source.name, place, row_keys.digest(key), [number])
                if rng.random() < augmentation.share:
                    chosen.append((index, rng))
            for start in range(0, len(chosen), AT_ONCE):
                part = chosen[start : start + AT_ONCE]
                assert make_rows is not None
                results = make_rows([rows[index] for index, _ in part], [rng for _, rng in part])
                for (index, _), result in zip(part, results, strict=True):
                    reason = result if isinstance(result, str) else problem(source, result, held_out)
                    key = "" if reason else row_keys.key(source, result)
                    if not reason and row_keys.digest(key) in taken:
                        reason = "a text that is there"
                    counter[reason or MADE] += 1
                    if not reason:
                        taken.add(row_keys.digest(key))
                        where = f"{rows[index].where} ({name} {number + 1})"
                        yield MadeRow(result._replace(where=where), rows[index], name, number)


def check_counts(source: Source, counts: Mapping[str, Counter[str]]) -> None:
    """Raises UserError where an augmentation made no row that can be used."""
    for name, numbers in counts.items():
        if not numbers[MADE]:
            reasons = ", ".join(f"{number:,} {reason}" for reason, number in numbers.items() if number) or "no row was chosen"
            raise UserError(f"source {source.name!r}: {name} made no row that can be trained on ({reasons}); leave it out")


def notes(added: Added) -> list[str]:
    """Lines for the log: what was made, and ten examples of each source."""
    lines = []
    for source, counts in added.counts.items():
        for name, numbers in counts.items():
            others = [f"{number:,} {reason}" for reason, number in numbers.items() if reason != MADE]
            left_out = f"; not made: {', '.join(others)}" if others else ""
            lines.append(f"source {source}: {count(numbers.get(MADE, 0), 'training row')} added by {name}{left_out}")
        lines += [f"source {source}: {line}" for line in map(shown, added.examples[source])]
    return lines


def shown(made: MadeRow) -> str:
    """A made row beside its origin: the columns that changed."""
    changed = [name for name, value in made.row.columns.items() if value != made.origin.columns.get(name)]
    if are_hidden():
        return f"{made.by} of {made.origin.where}"
    values = "; ".join(f"{name} {_text(made.origin.columns.get(name))} -> {_text(made.row.columns[name])}" for name in changed)
    return f"{made.by} of {made.origin.where}: {values}"


def _text(value: Any) -> str:
    is_words = isinstance(value, list) and all(isinstance(word, str) for word in value)
    return quoted(" ".join(value) if is_words else value)
