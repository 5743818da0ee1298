"""Pseudo-labels as a file: the labels that a run gives to rows without any, for another run to learn from."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mtl_jax.audit.copies import near_copies
from mtl_jax.core import log_lines
from mtl_jax.core.errors import UserError, count
from mtl_jax.core.files import to_json, write_text
from mtl_jax.core.row_texts import hiding
from mtl_jax.data.examples import make_examples
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.source import Source
from mtl_jax.data.splits import read, read_one
from mtl_jax.inference.predict import open_run
from mtl_jax.inference.resumable_output import check_writable
from mtl_jax.tasks import Classification, Ordinal, Task
from mtl_jax.training.regularisation import pseudo_rows
from mtl_jax.training.restore import TrainedRun
from mtl_jax.transfer.pseudo_labels import CHOICES, PseudoLabels, choose

log = logging.getLogger(__name__)

PROBABILITY, FROM = "probability", "from"  # columns that are added to a row


def pseudo_label(
    workdir: str | Path,
    path: str | Path | Sequence[Mapping[str, Any]],
    output: str | Path,
    *,
    task: str = "",
    format: str = "",
    choice: str = "confidence",
    threshold: float = 0.9,
    per_class: int = 0,
    passes: int = 10,
    seed: int = 0,
) -> dict[str, Any]:
    """Labels rows by the best checkpoint of a run, and writes those with a good enough label as JSON lines.

    A line has the row's columns, the label in the task's column, its "probability", and "from", the run and the row. Rows that
    are copies of a dev or test row of the run are left out.

    Args:
        workdir: A workdir that has at least one evaluated checkpoint.
        path: Rows with the text columns of the task's source, in any form that Source.path or Source.rows may have.
        output: The file to write; it is written whole, or not at all.
        task: A task of the run with one label for a text; empty: its only such task.
        format: The format of the file, if it differs from the source's.
        choice: As SelfTraining.choose: confidence, balanced, uncertainty, or one of the script's.
        threshold: The least probability of a label.
        per_class: As in SelfTraining.
        passes: For uncertainty: the number of passes with dropout.
        seed: For uncertainty: the seed of the dropout.

    Returns:
        {"rows": those read, "copies": those of dev or test rows, "labelled": those written, "labels": {label: rows}}.

    Raises:
        UserError: As mtl_jax.evaluate; the task gives no label; the output cannot be written, or is the input; or no row has a
            label that is good enough.

    Examples:
        >>> rows = [{"text": "who is the man ?"}, {"text": "where is the city ?"}]
        >>> summary = mtl_jax.pseudo_label("runs/tiny", rows, "labels.jsonl", task="coarse", threshold=0.1)
        >>> summary["labelled"]
        2
    """
    log_lines.show()
    CHOICES.find(choice)
    if not 0 <= threshold <= 1:
        raise UserError(f"threshold is {threshold}; it must be a probability")
    for name, number, least in (("passes", passes, 2), ("per_class", per_class, 0), ("seed", seed, 0)):
        if number < least:
            raise UserError(f"{name} is {number}; it must be at least {least}")
    target = check_writable(str(output), [str(path)] if isinstance(path, str | Path) else [])
    run = open_run(Path(workdir))
    chosen = _task(run, task)
    _check_columns(run.source(chosen.name), chosen)
    pseudo_rows.check_dropout(choice, run.trunk, [chosen], f"{workdir}")
    with hiding(run.experiment.private):
        source = _source(run.source(chosen.name), path, format)
        rows = read_one(source, run.tasks_of_same_source(chosen.name))
        kept = _without_copies(run, rows, source)
        examples, _ = make_examples(
            source,
            run.tasks_of_same_source(chosen.name),
            kept,
            run.trunk.tokenizer,
            run.experiment.batch.row_length,
            lenient=True,
        )
        examples = examples._replace(place=run.source_index(chosen.name))
        several = passes if choice == "uncertainty" else 1
        key = jax.random.key(seed)
        shares = pseudo_rows.probabilities(run.trunk.module, run.params, chosen, examples, run.experiment.batch, key, several)
        first = np.array([group[0] for group in examples.groups()], np.int64)
        labels = choose(shares[:, first], chosen.compared_as, choice, threshold=threshold, per_class=per_class)
        if not labels.weights.any():
            highest = labels.predicted.confidence.max(initial=0)
            raise UserError(
                f"no row of {source.place('train')} has a label of task {chosen.name!r} with a probability of {threshold:g}; "
                f"the highest is {highest:.3f}: lower the threshold"
            )
        lines = _lines(chosen, labels, kept, f"{workdir}")
        write_text(target, "".join(f"{to_json(line, ensure_ascii=False)}\n" for line in lines))
    log.info("%s", pseudo_rows.summary(chosen, labels))
    column = getattr(chosen, "column", "label")
    names = [line[column] for line in lines]
    numbers = {name: names.count(name) for name in sorted(set(names))}
    return {"rows": len(rows), "copies": len(rows) - len(kept), "labelled": len(lines), "labels": numbers}


def _task(run: TrainedRun, name: str) -> Task:
    labelling = [task for task in run.tasks if isinstance(task, Classification | Ordinal)]
    if name:
        task = run.task(name)
        if task not in labelling:
            raise UserError(f"task {name!r}, a {type(task).__name__}, gives no label to a text; Classification and Ordinal do")
        return task
    if len(labelling) != 1:
        names = ", ".join(task.name for task in labelling) or "none of its tasks"
        raise UserError(f"name the task that labels by --task: {names} can")
    return labelling[0]


def _check_columns(source: Source, task: Task) -> None:
    """Raises UserError where a column that is added would take the place of one that the task reads."""
    for name in (PROBABILITY, FROM):
        if name in (source.text, source.pair, getattr(task, "column", "label")):
            raise UserError(
                f"column {name!r} of source {source.name!r} has the name of one that is added to the rows; rename it"
            )


def _source(source: Source, path: str | Path | Sequence[Mapping[str, Any]], format: str) -> Source:
    cleared: dict[str, Any] = {"dev_path": "", "test_path": "", "dev_rows": None, "test_rows": None, "limit": 0, "id": ""}
    if isinstance(path, str | Path):
        kind = format or ("jsonl" if str(path).endswith(".jsonl") else source.format)
        columns = source.columns if kind == source.format else ()
        return dataclasses.replace(source, path=str(path), rows=None, format=kind, columns=columns, deidentify=None, **cleared)
    return dataclasses.replace(source, path="", rows=list(path), deidentify=None, **cleared)


def _text(source: Source, row: Row) -> str:
    values = [row.columns[name] for name in (source.text, source.pair) if name]
    return " ".join(value if isinstance(value, str) else " ".join(value) for value in values)


def _without_copies(run: TrainedRun, rows: Sequence[Row], source: Source) -> list[Row]:
    """The rows without copies of dev and test rows of the run; all of them where these cannot be read any more."""
    held_out: list[str] = []
    used = {task.source for task in run.tasks}
    for other in run.experiment.sources:
        if other.name not in used:
            continue
        try:
            splits = read(other, [task for task in run.tasks if task.source == other.name])
        except UserError as error:
            problem = "cannot be read, so copies of its dev and test rows are not looked for"
            log.warning("source %s of the run %s: %s", other.name, problem, error)
            continue
        held_out += [_text(other, row) for split in ("dev", "test") for row in splits.rows[split]]
    texts = [_text(source, row) for row in rows]
    copies = {place for place, _, _ in near_copies(texts, held_out, source.near)} if held_out else set()
    kept = [row for place, row in enumerate(rows) if place not in copies]
    if copies:
        log.warning("%s left out as copies of dev or test rows of the run", count(len(copies), "row"))
    if not kept:
        raise UserError(f"{source.place('train')}: every row is a copy of a dev or test row of the run")
    return kept


def _lines(task: Task, labels: PseudoLabels, rows: Sequence[Row], run: str) -> list[dict[str, Any]]:
    """The rows with a chosen label, with the label and where they are from."""
    shares = labels.predicted.probabilities
    places = labels.predicted.classes if task.compared_as == "softmax" else (shares > 0.5).sum(axis=1)
    column = getattr(task, "column", "label")
    return [
        {
            **row.columns,
            column: task.labels[int(places[n])],
            PROBABILITY: round(float(labels.predicted.confidence[n]), 6),
            FROM: f"{run} {row.where}",
        }
        for n, row in enumerate(rows)
        if labels.weights[n] > 0
    ]
