"""Predictions and scores of the best checkpoint of a run, finished or not."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
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
from mtl_jax.core.text_lines import kind_of
from mtl_jax.data import coverage, row_edits
from mtl_jax.data.examples import Examples, label_remarks, length_remark, make_examples, read_examples
from mtl_jax.data.formats import READERS, names_columns
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.labels import UnreadableTexts
from mtl_jax.data.source import Source
from mtl_jax.data.splits import read_one
from mtl_jax.tasks import CausalLM, Seq2Seq, Task
from mtl_jax.training import evaluation, text_evaluation
from mtl_jax.training import mesh as meshes
from mtl_jax.training.experiment_json import check_metrics, check_registered
from mtl_jax.training.forward import encode_tokens, needed_fields
from mtl_jax.training.restore import TrainedRun as TrainedRun
from mtl_jax.training.restore import is_workdir as is_workdir
from mtl_jax.training.restore import open_run as open_run
from mtl_jax.training.text_evaluation import Generated

log = logging.getLogger(__name__)

Inputs = Sequence[str | Sequence[str] | Mapping[str, Any]]

NOT_FINITE = "the model's output is not finite: its parameters are damaged, or training diverged"


class Model(NamedTuple):
    """The best checkpoint of a run, opened once for many answers.

    Attributes:
        run: The run's trunk, tasks and parameters.
        workdir: Its workdir.
        outputs: From a task's name to its jitted function on batches, which is made once, and the device.

    Examples:
        >>> model = mtl_jax.load_model("runs/tiny")
        >>> len(model.predict("fine", ["who is the man ?", "where is the city ?"]))
        2
    """

    run: TrainedRun
    workdir: Path
    outputs: Callable[[str], tuple[evaluation.Apply, Mesh]]

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
    def outputs(name: str) -> tuple[evaluation.Apply, Mesh]:
        task, mesh = run.task(name), meshes.make(run.experiment.batch.rows, 1)
        return evaluation.make_outputs(encode_tokens(run.trunk.module, needed_fields((task,))), (task,), mesh), mesh

    return Model(run, Path(workdir), outputs)


def _model(workdir: str | Path | Model) -> Model:
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
    if isinstance(inputs, str | Mapping):
        raise UserError(f"inputs is {kind_of(inputs)}; it must be a list of texts or rows")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k is {top_k}; it must be at least 1")
    model = _model(workdir)
    with hiding(model.run.experiment.private):
        return _predict(model, task, inputs, top_k, deidentify)


def _predict(model: Model, task: str, inputs: Inputs, top_k: int | None, deidentify: bool) -> list[dict[str, Any]]:
    run = model.run
    chosen, source = run.task(task), run.source(task)
    if chosen.several_texts and all(isinstance(value, str) for value in inputs):
        source = dataclasses.replace(source, pair="")  # a text alone, for example for its vector
    as_words = any(other.words for other in run.tasks_of_same_source(task))
    edit = row_edits.editor(_edited_source(source, deidentify), run.tasks_of_same_source(task))
    rows = [_row(source, value, number, as_words) for number, value in enumerate(inputs, start=1)]
    rows = row_edits.all_edited(edit, rows)
    readable = [i for i, row in enumerate(rows) if all(_joined(row.columns[name]).strip() for name in _text_columns(source))]
    results: list[dict[str, Any]] = [{"error": "empty text"} for _ in rows]
    examples, cut, refused = _readable(run, task, source, [rows[i] for i in readable])
    for place, reason in refused.items():
        results[readable[place]] = {"error": reason}
    readable = [i for place, i in enumerate(readable) if place not in refused]
    if not readable:
        return results
    for line in coverage.remarks("texts", [examples], (), run.trunk.tokenizer, _text_columns(source)):
        log.warning("%s", line)
    generated: list[Generated] = []
    outputs: Any = ()
    if top_k is not None and (chosen.decodes or chosen.level != "example"):
        raise _no_top(chosen)
    if isinstance(chosen, Seq2Seq | CausalLM):
        generated = text_evaluation.generate(chosen, run.trunk, run.params, examples, chosen.beams, devices=jax.local_devices())
    else:
        outputs = _apply(model, chosen, examples).outputs[task]
    for number, group in enumerate(examples.groups()):
        place = examples.row_of[group[0]]
        if not all(len(examples.tokens[i]) for i in group):
            continue
        if generated:
            text, score, ended = generated[number]
            if not math.isfinite(score):
                results[readable[place]] = {"error": NOT_FINITE}
                continue
            answer: dict[str, Any] = {"text": text, "score": round(score, 6)} | ({} if ended else {"unfinished": True})
        else:
            windows = [examples.window(i, group[0]) for i in group]
            if not all(np.isfinite(outputs[i]).all() for i in group):
                results[readable[place]] = {"error": NOT_FINITE}
                continue
            answer = chosen.describe([outputs[i] for i in group], windows, examples.data[place])
            answer |= {} if top_k is None else {"top": _top(chosen, outputs[group[0]], top_k)}
        truncated = place in cut or (len(group) > 1 and not chosen.windows and not chosen.several_texts)
        results[readable[place]] = answer | ({"truncated": True} if truncated else {})
    return results


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
    model = _model(workdir)
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
    rows = read_one(_edited_source(source, deidentify), run.tasks_of_same_source(task))
    examples, counts = read_examples(
        source, run.tasks_of_same_source(task), rows, run.trunk.tokenizer, length, path, labelled=(chosen,)
    )
    if counts.blank[task] == len(examples.data):
        raise UserError(f"{path}: no row has a label for task {task!r}")
    lines = [length_remark((chosen,), counts, length)] if counts.truncated or counts.extra else []
    lines += [f"{count(counts.skipped, 'row')} that cannot be read left out"] if counts.skipped else []
    coverage.check([examples], (chosen,), run.trunk.tokenizer, trunks.tables(run.trunk))
    lines += coverage.remarks("texts", [examples], (chosen,), run.trunk.tokenizer, _text_columns(source))
    lines += label_remarks((chosen,), counts) + [f"task {task}: {remark}" for remark in chosen.remarks([examples])]
    for line in lines:
        log.warning("%s: %s", path, line)
    examples = examples._replace(place=run.source_index(task))
    split = {source.name: examples}
    texts = text_evaluation.text_scores(
        (chosen,), run.trunk, run.params, split, lambda task: task.beams, devices=jax.local_devices()
    )
    measured = _apply(model, chosen, examples)
    if not all(np.isfinite(outputs).all() for outputs in measured.outputs[task]):
        raise UserError(f"{path}: task {task!r}: {NOT_FINITE}")
    scores = evaluation.score((chosen,), split, measured, texts)
    for line in evaluation.undefined((chosen,), scores, path).values():
        log.warning("the %s", line)
    signatures = chosen.signatures(examples.data)
    return {
        "rows": len(examples.data),
        **evaluation.for_json(scores[task]),
        **({"signatures": signatures} if signatures else {}),
    }


def _edited_source(source: Source, deidentify: bool) -> Source:
    """The source with its change of rows, if it is asked for, else without.

    Raises:
        UserError: It is asked for, and the source has none.
    """
    if deidentify and source.deidentify is None:
        raise UserError(f"source {source.name!r} of this run does not de-identify its rows; leave deidentify out")
    return source if deidentify else dataclasses.replace(source, deidentify=None)


def _readable(run: TrainedRun, task: str, source: Source, rows: list[Row]) -> tuple[Examples, set[int], dict[int, str]]:
    """Examples of rows, without those that the model cannot read.

    Returns:
        The examples, the indices of their rows that were cut, and {index of a row that cannot be read: the reason}.
    """
    tokenizer, tables = run.trunk.tokenizer, trunks.tables(run.trunk)

    def make(subset: Sequence[Row]) -> tuple[Examples, set[int]]:
        return make_examples(
            source, run.tasks_of_same_source(task), subset, tokenizer, run.experiment.batch.row_length, lenient=True
        )

    refused: dict[int, str] = {}
    while True:
        remaining = [place for place in range(len(rows)) if place not in refused]
        try:
            examples, cut = make([rows[place] for place in remaining])
            bad = coverage.unreadable_rows(examples, tokenizer, tables)
        except UnreadableTexts as error:
            bad = {}
            for place in error.rows:  # one by one, for the reason of each
                try:
                    make([rows[remaining[place]]])
                except UnreadableTexts as single:
                    bad[place] = str(single).removeprefix(f"{rows[remaining[place]].where}: ")
            if not bad:
                raise
        if not bad:
            return examples._replace(place=run.source_index(task)), cut, refused
        refused |= {remaining[place]: reason for place, reason in bad.items()}


def _apply(model: Model, task: Task, examples: Examples) -> evaluation.Predictions:
    """Outputs of a task on examples of its source, on one device."""
    apply, mesh = model.outputs(task.name)
    return evaluation.predict(apply, model.run.params, (task,), [examples], model.run.experiment.batch, mesh)


def _top(task: Task, output: np.ndarray, count: int) -> list[dict[str, Any]]:
    """The most likely labels of an example, the first one first."""
    probabilities = task.probabilities(output)
    if probabilities is None:
        raise _no_top(task)
    ranked = sorted(probabilities.items(), key=lambda item: -item[1])
    names = dict(zip(task.labels, task.shown_labels, strict=True))
    return [{"label": names.get(label, label), "probability": round(probability, 6)} for label, probability in ranked[:count]]


def _no_top(task: Task) -> UserError:
    return UserError(f"task {task.name!r}: {type(task).__name__} has no probability for each label; leave top_k out")


def _text_columns(source: Source) -> list[str]:
    return [name for name in (source.text, source.pair) if name]


def _joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else " ".join(text)


def _pairs_hint(names: Sequence[str]) -> str:
    row = ", ".join(f'"{name}": "..."' for name in names)
    return f": --text gives one text; give pairs as --file FILE.jsonl with lines {{{row}}}"


def _row(source: Source, value: str | Sequence[str] | Mapping[str, Any], number: int, as_words: bool) -> Row:
    names = _text_columns(source)
    columns = dict(value) or dict.fromkeys(names, "") if isinstance(value, Mapping) else {names[0]: value}
    for name in names:
        text = columns.get(name)
        if as_words and isinstance(text, list | tuple) and all(isinstance(word, str) for word in text):
            columns[name] = list(text)
        elif not isinstance(text, str):
            requirement = f"source {source.name!r} needs the text columns {', '.join(names)}"
            actual = kind_of(text) if name in columns else "missing"
            kind = "a text or a list of words" if as_words else "a text"
            hint = _pairs_hint(names) if isinstance(value, str) and len(names) > 1 else ""
            raise UserError(f"input {number}: {requirement}; {name!r} is {actual}, where {kind} is needed{hint}")
    return Row(columns, f"input {number}")
