"""The audit of an experiment: copies of its held-out rows in the training rows of all its sources, and copies within train."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from tabulate import tabulate

from mtl_jax.audit.copies import KINDS, check
from mtl_jax.audit.meaning import THRESHOLD, Meaning, meanings, open_encoder
from mtl_jax.audit.overlaps import Conflict, Example, Overlap, conflicts, overlaps
from mtl_jax.audit.row_views import collect, views
from mtl_jax.core.row_texts import hiding_if
from mtl_jax.data import splits
from mtl_jax.experiment import Experiment, select
from mtl_jax.experiment_checks import check as check_experiment


class Audit(NamedTuple):
    """The result of an audit.

    Attributes:
        near: The least similarity of near copies.
        sizes: {source: {split: number of rows}}; train includes the rows that a run drops.
        overlaps: Held-out rows with copies in train.
        conflicts: Training rows with copies under another label.
        meanings: Held-out rows that are close in meaning to training rows, if an encoder was given.
    """

    near: float
    sizes: dict[str, dict[str, int]]
    overlaps: tuple[Overlap, ...]
    conflicts: tuple[Conflict, ...]
    meanings: tuple[Meaning, ...] = ()

    def to_json(self, texts: bool = True) -> dict[str, Any]:
        """JSON values; with the texts of the rows if `texts`."""

        def examples(entry: Overlap | Conflict | Meaning) -> list[dict[str, Any]]:
            left_out = set() if isinstance(entry, Conflict) else {"labels"}
            left_out |= set() if texts else {"text", "train_text"}
            return [
                {name: value for name, value in example._asdict().items() if name not in left_out} for example in entry.examples
            ]

        return {
            "near": self.near,
            "sizes": self.sizes,
            "overlaps": [{**entry._asdict(), "examples": examples(entry)} for entry in self.overlaps],
            "conflicts": [{**entry._asdict(), "examples": examples(entry)} for entry in self.conflicts],
            **(
                {"meanings": [{**entry._asdict(), "examples": examples(entry)} for entry in self.meanings]}
                if self.meanings
                else {}
            ),
        }

    def __str__(self) -> str:
        return self.table()

    def table(self, texts: bool = False) -> str:
        """Two tables, and the examples by file and line; with their texts if `texts`."""
        lines = []
        if self.overlaps:
            heads = ["held out", "rows", "train", "compared", *KINDS, "training rows", "of them dropped"]
            rows = [
                [
                    f"{entry.source} {entry.split}",
                    entry.of,
                    entry.train_source,
                    entry.view,
                    *(entry.rows[kind] for kind in KINDS),
                    entry.train_rows,
                    entry.dropped,
                ]
                for entry in self.overlaps
            ]
            lines += [tabulate(rows, heads, "github", intfmt=","), ""]
        else:
            lines += ["No held-out row is a copy of a training row.", ""]
        if self.conflicts:
            heads = ["train", "rows", "another label of task", *KINDS]
            rows = [[entry.source, entry.of, entry.task, *(entry.rows[kind] for kind in KINDS)] for entry in self.conflicts]
            lines += [tabulate(rows, heads, "github", intfmt=","), ""]
        if self.meanings:
            heads = ["held out", "rows", "train", "close in meaning", "training rows"]
            rows = [
                [f"{entry.source} {entry.split}", entry.of, entry.train_source, entry.rows, entry.train_rows]
                for entry in self.meanings
            ]
            lines += [tabulate(rows, heads, "github", intfmt=","), ""]
        for overlap in self.overlaps:
            lines += [f"{overlap.source} {overlap.split} in {overlap.train_source}, {overlap.view}:"]
            lines += [*(_line(example, texts) for example in overlap.examples), ""]
        for conflict in self.conflicts:
            lines += [f"{conflict.source}, another label of task {conflict.task}:"]
            lines += [*(_line(example, texts) for example in conflict.examples), ""]
        for meaning in self.meanings:
            lines += [f"{meaning.source} {meaning.split} in {meaning.train_source}, close in meaning:"]
            lines += [*(_line(example, texts) for example in meaning.examples), ""]
        return "\n".join(lines).rstrip()


def _line(example: Example, texts: bool) -> str:
    kind = f"{example.kind} {example.similarity:.2f}" if example.kind in ("near", "meaning") else example.kind
    rows = [example.row, example.train_row]
    if texts:
        rows = [f"{row} {text!r}" for row, text in zip(rows, (example.text, example.train_text), strict=True)]
    if example.labels:
        rows = [f"{row} ({label})" for row, label in zip(rows, example.labels, strict=True)]
    return f"  {kind}: {rows[0]} and {rows[1]}"


@hiding_if(lambda experiment, *_, **__: experiment.private)
def of_experiment(experiment: Experiment, near: float = 0.7, *, embeddings: str = "", close: float = THRESHOLD) -> Audit:
    """Compares held-out rows with training rows of all sources, and the training rows of each source with each other.

    Training rows that a run drops before it trains, because their text occurred before or is held out, are compared, too.

    Args:
        experiment: The experiment; only sources that its tasks use are audited.
        near: The least similarity of near copies, above 0 and at most 1.
        embeddings: An encoder, to find rows that are close in meaning, too: minilm, or the path of a checkpoint; empty: none.
        close: The least cosine of such rows.

    Raises:
        UserError: `near` or `close` is outside its range, the encoder cannot be opened, or a source cannot be read.

    Examples:
        >>> print(mtl_jax.audit.of_experiment(EXPERIMENT))  # doctest: +SKIP
        | held out   |   rows | train   | compared   |   exact |   letters |   near |   training rows |   of them dropped |
    """
    check(near, "near")
    check(close, "close")
    experiment = select(experiment)
    check_experiment(experiment)
    used = {task.source for task in experiment.tasks}
    sources = [source for source in experiment.sources if source.name in used]
    encoder = open_encoder(embeddings) if embeddings else None
    data = {source.name: splits.read(source, experiment.tasks) for source in sources}
    rows = collect(data, splits.without_shared_texts(data))
    sizes: dict[str, dict[str, int]] = {}
    counts = np.bincount(rows.group_of, minlength=len(rows.groups)).tolist()
    for (name, split), count in zip(rows.groups, counts, strict=True):
        sizes.setdefault(name, {})[split] = count
    return Audit(
        near,
        sizes,
        tuple(overlaps(sources, experiment.tasks, rows, near)),
        tuple(conflicts(sources, experiment.tasks, rows, near)),
        () if encoder is None else tuple(meanings(encoder, views(sources, (), rows, ["row"])["row"], rows, close)),
    )
