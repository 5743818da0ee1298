"""Predictions and scores of the best checkpoint of a run, finished or not."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from mtl_jax import trunks
from mtl_jax.core import log_lines
from mtl_jax.core.errors import UserError, count
from mtl_jax.core.row_texts import hiding
from mtl_jax.core.text_lines import as_list
from mtl_jax.data import coverage
from mtl_jax.data.examples import Examples, read_examples
from mtl_jax.data.formats import READERS, names_columns
from mtl_jax.data.label_notes import label_remarks, length_remark
from mtl_jax.data.splits import read_one
from mtl_jax.inference import answer_rows
from mtl_jax.inference.answer_rows import Value
from mtl_jax.tasks import Task
from mtl_jax.training import evaluation, text_evaluation
from mtl_jax.training import mesh as meshes
from mtl_jax.training.experiment_json import check_metrics, check_registered
from mtl_jax.training.forward import encode_tokens, needed_fields
from mtl_jax.training.restore import TrainedRun as TrainedRun
from mtl_jax.training.restore import is_workdir as is_workdir
from mtl_jax.training.restore import open_run as open_run

log = logging.getLogger(__name__)

Inputs = Sequence[Value]


class Model(NamedTuple):
    """The best checkpoint of a run, opened once for many answers.

    Attributes:
        run: The run's trunk, tasks and parameters.
        workdir: Its workdir.
        outputs: From the names of tasks, and devices=, their number, to the jitted function of these tasks on batches, which
            is made once, and its mesh.

    Examples:
        >>> model = mtl_jax.load_model("runs/tiny")
        >>> len(model.predict("fine", ["who is the man ?", "where is the city ?"]))
        2
    """

    run: TrainedRun
    workdir: Path
    outputs: Callable[..., tuple[evaluation.Apply, Mesh]]

    def predict(self, task: str, texts: Inputs, top_k: int | None = None, *, deidentify: bool = False) -> list[dict[str, Any]]:
        """As mtl_jax.predict."""
        return predict(self, task, texts, top_k, deidentify=deidentify)

    def evaluate(
        self, task: str, rows: str | Path | Sequence[Mapping[str, Any]], format: str = "", *, deidentify: bool = False
    ) -> dict[str, Any]:
        """As mtl_jax.evaluate."""
        return evaluate(self, task, rows, format, deidentify=deidentify)


def load_model(workdir: str | Path) -> Model:
    """Opens the best checkpoint of a run, finished or not, for predict, evaluate, translate and summarize.

    Args:
        workdir: A workdir that has at least one evaluated checkpoint.

    Raises:
        UserError: The directory is not a workdir, or has no checkpoint yet.

    Examples:
        >>> model = mtl_jax.load_model("runs/tiny")
        >>> len(model.predict("coarse", ["who is the man ?", "where is the city ?"]))
        2
        >>> len(mtl_jax.predict(model, "fine", ["who is the man ?"]))
        1
    """
    log_lines.show()
    run = open_run(Path(workdir))

    @functools.cache
    def outputs(*names: str, devices: int = 1) -> tuple[evaluation.Apply, Mesh]:
        tasks, mesh = tuple(run.task(name) for name in names), meshes.make(devices, devices)
        return evaluation.make_outputs(encode_tokens(run.trunk.module, needed_fields(tasks)), tasks, mesh), mesh

    return Model(run, Path(workdir), outputs)


def opened(workdir: str | Path | Model) -> Model:
    """The model of a workdir, or the model that is given."""
    return workdir if isinstance(workdir, Model) else load_model(workdir)


def predict(
    workdir: str | Path | Model, task: str, inputs: Inputs, top_k: int | None = None, *, deidentify: bool = False
) -> list[dict[str, Any]]:
    """Predictions of the best checkpoint of a run.

    Args:
        workdir: A workdir that has at least one evaluated checkpoint, or load_model() of it.
        task: A task of that run.
        inputs: Texts, or rows {column: text} with the text columns of the task's source, as pairs need; where texts are tagged,
            a text may also be the list of its words. A text that is empty, or that the model cannot read, gets
            {"error": ...} and does not change the other answers.
        top_k: Adds "top": the k most likely labels, each {"label": ..., "probability": ...}; None: without it.
        deidentify: Replace names and the like in the inputs, as in training; words and spans of answers are of the new texts.

    Returns:
        One JSON object for each input, in order; describe() of the task's kind documents its fields. "truncated": true is added
        where a text was longer than the model's rows and was cut.

    Raises:
        UserError: The directory is not a workdir or has no checkpoint yet, the task is unknown, a row has no text in a text
            column, `inputs` is a single text or row, or the task has no probabilities of labels for top_k.

    Examples:
        >>> [answer] = mtl_jax.predict("runs/tiny", "fine", ["who is the man ?"], top_k=2)
        >>> answer["top"][0]["label"] == answer["label"]
        True
    """
    log_lines.show()
    inputs = as_list(inputs, "inputs", "texts or rows")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k is {top_k}; it must be at least 1")
    model = opened(workdir)
    with hiding(model.run.experiment.private):
        alone = all(isinstance(value, str) for value in inputs)
        [reading] = answer_rows.readings(model.run, [task], deidentify=deidentify, texts_alone=alone)
        if top_k is not None:
            answer_rows.check_top(reading.tasks[0])
        numbered = enumerate(inputs, start=1)
        rows = [
            answer_rows.row_of(reading.source, value, number, reading.as_words, as_messages=reading.as_messages)
            for number, value in numbered
        ]
        answers = answer_rows.answer(
            model.run,
            reading,
            rows,
            lambda tasks, examples: _apply(model, tasks, examples).outputs,
            top_k=top_k,
            remark=functools.partial(log.warning, "%s"),
        )
        return [answer[task] for answer in answers]


def evaluate(
    workdir: str | Path | Model,
    task: str,
    path: str | Path | Sequence[Mapping[str, Any]],
    format: str = "",
    *,
    deidentify: bool = False,
) -> dict[str, Any]:
    """Loss and metrics of the best checkpoint of a run on any rows; for generated texts with signatures of the metrics.

    Args:
        workdir: A workdir that has at least one evaluated checkpoint, or load_model() of it.
        task: A task of that run.
        path: Rows with the columns of the task's source, in any form that Source.path or Source.rows may have, such as a list
            of dicts; all rows count.
        format: The format of the file, if it differs from the source's.
        deidentify: Replace names and the like in the rows as in training; else they are read as they are.

    Raises:
        UserError: As predict(), a row or label cannot be read, or the model's outputs are not finite.

    Examples:
        >>> rows = [{"text": "who is the man ?", "coarse": "HUM"}, {"text": "where is the city ?", "coarse": "LOC"}]
        >>> mtl_jax.evaluate("runs/tiny", "coarse", rows)["rows"]
        2
    """
    log_lines.show()
    model = opened(workdir)
    with hiding(model.run.experiment.private):
        return _evaluate(model, task, path, format, deidentify)


def _evaluate(
    model: Model, task: str, path: str | Path | Sequence[Mapping[str, Any]], format: str, deidentify: bool
) -> dict[str, Any]:
    run = model.run
    chosen, length, source = run.task(task), run.experiment.batch.row_length, run.source(task)
    check_metrics(model.workdir, (chosen,))
    if isinstance(path, str | Path):
        kind, path = format or source.format, str(path)
        check_registered(model.workdir, READERS, kind)
        columns = source.columns if kind in READERS and names_columns(kind) else ()
        source = dataclasses.replace(source, path=path, rows=None, format=kind, limit=0, columns=columns)
    else:
        source, path = dataclasses.replace(source, path="", rows=path, dev_rows=None, test_rows=None, limit=0), "rows"
    rows = read_one(answer_rows.edited_source(source, deidentify), run.tasks_of_same_source(task))
    examples, counts = read_examples(
        source, run.tasks_of_same_source(task), rows, run.trunk.tokenizer, length, path, labelled=(chosen,)
    )
    if counts.blank[task] == len(examples.data):
        raise UserError(f"{path}: no row has a label for task {task!r}")
    lines = [length_remark((chosen,), counts, length)] if counts.truncated or counts.extra else []
    lines += [f"{count(counts.skipped, 'row')} that cannot be read left out"] if counts.skipped else []
    coverage.check([examples], (chosen,), run.trunk.tokenizer, trunks.tables(run.trunk))
    lines += coverage.remarks("texts", [examples], (chosen,), run.trunk.tokenizer, answer_rows.text_columns(source))
    lines += label_remarks((chosen,), counts) + [f"task {task}: {remark}" for remark in chosen.remarks([examples])]
    for line in lines:
        log.warning("%s: %s", path, line)
    examples = examples._replace(place=run.source_index(task))
    split = {source.name: examples}
    texts = text_evaluation.text_scores(
        (chosen,), run.trunk, run.params, split, lambda task: task.beams, devices=jax.local_devices()
    )
    measured = _apply(model, (chosen,), examples)
    if not all(np.isfinite(outputs).all() for outputs in measured.outputs[task]):
        raise UserError(f"{path}: task {task!r}: {answer_rows.NOT_FINITE}")
    scores = evaluation.score((chosen,), split, measured, texts)
    for line in evaluation.undefined((chosen,), scores, path).values():
        log.warning("the %s", line)
    signatures = chosen.signatures(examples.data)
    return {
        "rows": len(examples.data),
        **evaluation.for_json(scores[task]),
        **({"signatures": signatures} if signatures else {}),
    }


def _apply(model: Model, tasks: tuple[Task, ...], examples: Examples) -> evaluation.Predictions:
    """Outputs of tasks on examples of their source, on one device."""
    apply, mesh = model.outputs(*(task.name for task in tasks))
    return evaluation.predict(apply, model.run.params, tasks, [examples], model.run.experiment.batch, mesh)
