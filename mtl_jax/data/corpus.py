"""All data of a run: every split of every source, as examples."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from mtl_jax.core import assets, row_texts
from mtl_jax.core.errors import UserError, count
from mtl_jax.data import augmentations, canaries, made_rows, row_edits
from mtl_jax.data import redraw as redrawing
from mtl_jax.data.examples import Counts, Examples, read_examples, readable
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.label_notes import absent_labels, conflicting_labels, label_remarks, length_remark
from mtl_jax.data.labels import Labels
from mtl_jax.data.made_rows import Added
from mtl_jax.data.redraw import Redraw
from mtl_jax.data.source import SPLITS, Augmentation, Source
from mtl_jax.data.splits import Splits, non_word_remark, read, without_shared_texts
from mtl_jax.data.tokenize import Ragged


class Corpus(NamedTuple):
    """All data of a run.

    Attributes:
        splits: {split: {source: Examples}}, sources in the experiment's order.
        tasks: The tasks with the fields that the data decides, such as label sets.
        notes: Lines for the log: a line for each source on sizes, repeated and truncated texts; then remarks on tasks.
        replaced: {source: {type: number of places}} of the sources whose texts were de-identified.
        added: {source: {augmentation: {"made", and reasons: numbers of rows}}} of the sources with added rows.
        redraws: {source: its augmentations that draw in every pass}.
    """

    splits: dict[str, dict[str, Examples]]
    tasks: tuple[Any, ...]
    notes: list[str]
    replaced: Mapping[str, Mapping[str, int]] = MappingProxyType({})
    added: Mapping[str, Mapping[str, Mapping[str, int]]] = MappingProxyType({})
    redraws: Mapping[str, Redraw] = MappingProxyType({})

    def describe(self) -> dict[str, Any]:
        """JSON-able: for each source and split the number of examples and a SHA-256 of their tokens and labels.

        If texts were de-identified, also the number of places by source and type; if augmentations make rows, how many were
        added, and which draw in every pass.
        """
        sources: dict[str, dict[str, Any]] = {}
        for split, parts in self.splits.items():
            for name, part in parts.items():
                digest = hashlib.sha256()
                fields = {"tokens": part.tokens, "types": part.types, **dict(sorted(part.labels.items()))}
                for key, values in fields.items():
                    if values is not None:
                        digest.update(key.encode() + b"\0")
                        update_digest(digest, values)
                sources.setdefault(name, {})[split] = {"examples": len(part.tokens), "sha256": digest.hexdigest()}
        replaced = {name: dict(numbers) for name, numbers in self.replaced.items()}
        made: dict[str, Any] = {name: {"added": dict(numbers)} for name, numbers in self.added.items()}
        for name, redraw in self.redraws.items():
            made.setdefault(name, {})["in_passes"] = redraw.names
        return {
            "sources": sources,
            **({"deidentified": replaced} if replaced else {}),
            **({"augmented": made} if made else {}),
        }

    @property
    def size(self) -> int:
        """Number of examples over all splits and sources."""
        return sum(len(e.tokens) for split in self.splits.values() for e in split.values())

    @property
    def has_types(self) -> bool:
        """Whether any source has token types."""
        return any(e.types is not None for split in self.splits.values() for e in split.values())


def with_augmentations(
    corpus: Corpus,
    sources: Sequence[Source],
    run_augmentations: Sequence[Augmentation],
    added: Added,
    *,
    tokenizer: Any,
    token_rows: int,
    max_length: int,
    seed: int,
) -> Corpus:
    """The corpus with the augmentations that draw in every pass, and notes on all that is made.

    Args:
        corpus: The corpus, added rows included.
        sources: The declared sources.
        run_augmentations: The augmentations of the run.
        added: made_rows.add(...).
        tokenizer: A transformers tokenizer.
        token_rows: Rows of the trunk's token table.
        max_length: As for read_examples.
        seed: Seed of the data order, for the examples that are shown.
    """
    held_out = added.held_out
    redraws, notes = dict[str, Redraw](), made_rows.notes(added)
    for source in sources:
        chosen = augmentations.in_passes(augmentations.of_source(source, run_augmentations))
        examples = corpus.splits["train"].get(source.name)
        if examples is None or not chosen:
            continue
        tasks = tuple(task for task in corpus.tasks if task.source == source.name)
        places = (examples.data, np.asarray(examples.row_of))
        redraw = Redraw(source, tasks, chosen, *places, tokenizer, token_rows, max_length, held_out)
        redraws[source.name] = redraw
        notes.append(f"source {source.name}: in every pass rows are made anew by {', '.join(redraw.names)}")
        if redraw.divided:
            rows = count(len(redraw.rows), "row")
            notes.append(f"source {source.name}: {redraw.divided:,} of {rows} are read in several windows and stay as they are")
        notes += [f"source {source.name}: {made_rows.shown(made)}" for made in redrawing.examples(redraw, seed)]
    return corpus._replace(notes=[*corpus.notes, *notes], added=added.counts, redraws=redraws)


def update_digest(digest: Any, values: Any) -> None:
    """Adds an array, or arrays of different length, to a hash."""
    if not isinstance(values, np.ndarray):
        values = values if isinstance(values, Ragged) else Ragged.of(values, np.asarray(values[0]).dtype)
        digest.update(np.ascontiguousarray(values.starts).data)
        values = values.values
    digest.update(np.ascontiguousarray(values).data)


def read_sources(sources: Sequence[Source], tasks: Sequence[Labels], unlabelled: Collection[str] = ()) -> dict[str, Splits]:
    """Reads the sources that the tasks use; no text in dev or test of one source is a training text of another.

    The canaries of a source stand after its other training rows.

    Args:
        sources: The sources.
        tasks: The tasks.
        unlabelled: The names of further sources to read, for which no task has labels.

    Raises:
        UserError: A source cannot be read.
    """
    used = {task.source for task in tasks} | set(unlabelled)
    for source in sources:
        if source.name in used:
            row_edits.check(source)
    data = without_shared_texts(
        {source.name: read(source, tasks, source.name in unlabelled) for source in sources if source.name in used}
    )
    return {source.name: canaries.planted(source, tasks, data[source.name]) for source in sources if source.name in used}


def texts(sources: Sequence[Source], tasks: Sequence[Labels], data: dict[str, Splits], split: str) -> list[str]:
    """The texts of one split over all sources: both texts of a pair, and the tasks' target texts."""
    result = []
    for source in sources:
        task_columns = [name for task in tasks if task.source == source.name for name in task.text_columns]
        for row in data[source.name].rows[split] if source.name in data else ():
            values = [row.columns[name] for name in (source.text, source.pair) if name]
            values += [row.columns.get(name) or "" for name in task_columns]
            result += [value if isinstance(value, str) else " ".join(value) for value in values]
    return result


def make_corpus(
    sources: Sequence[Source], tasks: Sequence[Labels], data: dict[str, Splits], tokenizer: Any, max_length: int
) -> Corpus:
    """Fills in the tasks from the data, parses every label and tokenises every text.

    Args:
        sources: The declared sources.
        tasks: The declared tasks.
        data: The result of read_sources.
        tokenizer: A transformers tokenizer.
        max_length: As for read_examples.

    Raises:
        UserError: A label column does not exist or a label is outside the label set; names file and line.
    """
    declared = {source.name: source for source in sources}
    filled = tuple(task.filled(_labelled(declared[task.source], data[task.source], task), tokenizer) for task in tasks)
    tasks_of = {name: [task for task in filled if task.source == name] for name in data}
    splits: dict[str, dict[str, Examples]] = {split: {} for split in SPLITS}
    counts: dict[str, list[Counts]] = {name: [] for name in data}
    next_id = 0
    for split in SPLITS:
        for number, (name, parts) in enumerate(list(data.items())):
            if not parts.rows[split]:  # a source without labels has training rows only
                continue
            examples, part_counts = read_examples(
                declared[name],
                tasks_of[name],
                parts.rows[split],
                tokenizer,
                max_length,
                f"split {split}",
                first_id=next_id,
                cache=None if row_texts.are_hidden() else assets.cache_dir() / "tokens",
            )
            for task in tasks_of[name]:
                if part_counts.blank[task.name] == len(examples.data):
                    raise UserError(f"task {task.name!r}: no row of split {split} of source {name!r} has a label")
            splits[split][name] = examples._replace(place=number)
            next_id += len(examples.tokens)
            counts[name].append(part_counts)
            data[name] = data[name]._replace(rows={**data[name].rows, split: examples.data})
    totals = {name: functools.reduce(Counts.plus, parts) for name, parts in counts.items()}
    notes = [_note(tasks_of[name], name, parts, totals[name], max_length) for name, parts in data.items()]
    notes += [f"source {name}: {remark}" for name, parts in data.items() for remark in parts.remarks]
    notes += [row_edits.remark(name, parts.replaced) for name, parts in data.items() if parts.replaced is not None]
    for name, source_tasks in tasks_of.items():
        notes += label_remarks(source_tasks, totals[name])
        for task in source_tasks:
            notes += [*absent_labels(task, splits["train"][name]), *conflicting_labels(task, data[name].repeats)]
    filled = tuple(task.fitted(splits["train"][task.source]) for task in filled)
    for task in filled:
        notes += [f"task {task.name}: {remark}" for remark in task.remarks([splits[split][task.source] for split in SPLITS])]
    replaced = {name: parts.replaced for name, parts in data.items() if parts.replaced is not None}
    return Corpus(splits, filled, notes, replaced)


def _labelled(source: Source, splits: Splits, task: Labels) -> Sequence[Row]:
    """All rows of the training file, also those that are not trained on; of a lenient source, those with a readable label.

    The other rows of a lenient source are logged when all labels are read.
    """
    rows = splits.all_rows
    return readable(rows, [task], lambda task, row: task.raw_label(row), quiet=True) if source.lenient else rows


def _note(tasks: Sequence[Labels], name: str, parts: Splits, counts: Counts, max_length: int) -> str:
    sizes = "/".join(str(len(parts.rows[split])) for split in SPLITS)
    note = f"source {name}: {sizes} train/dev/test, {count(parts.repeated, 'repeated text')} dropped, "
    if parts.shared:
        note += f"{count(parts.shared, 'that is', 'that are')} in dev or test of another source, "
    if parts.skipped + counts.skipped:
        note += f"{count(parts.skipped + counts.skipped, 'row')} that cannot be read left out, "
    non_words = non_word_remark(parts.non_words)
    return note + length_remark(tasks, counts, max_length) + (f", {non_words}" if non_words else "")
