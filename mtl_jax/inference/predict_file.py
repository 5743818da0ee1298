"""Predictions of the lines of a file, chunk by chunk: memory holds one chunk, and a journal keeps those that are done.

The file is read twice. First every line is checked and hashed, before any work; then chunks are tokenised, divided over the
devices and answered. A chunk's answers depend on nothing outside of it, so a killed process resumes with the same bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from mtl_jax.core import digests, log_lines, text_lines
from mtl_jax.core.errors import Interrupted, UserError, count
from mtl_jax.core.files import to_json
from mtl_jax.core.json_shapes import list_of, object_of, text, whole
from mtl_jax.core.progress import Progress
from mtl_jax.core.row_texts import hiding
from mtl_jax.core.versions import installed
from mtl_jax.data.batch_shape import Batching, shorter_rows
from mtl_jax.data.examples import Examples
from mtl_jax.inference import answer_rows, predict_request
from mtl_jax.inference.answer_rows import Reading
from mtl_jax.inference.predict import Model, opened
from mtl_jax.inference.predict_request import CHUNK, FIELD, Line, Request
from mtl_jax.inference.resumable_output import Journal, check_writable
from mtl_jax.tasks import Task
from mtl_jax.training import evaluation, experiment_json
from mtl_jax.training import mesh as meshes
from mtl_jax.training.preemption import stop_on_signals

log = logging.getLogger(__name__)


# A finished chunk in a journal.
ITEM = object_of({"answers": list_of(object_of({})), "errors": whole, "first": text})


def predict_file(
    workdir: str | Path | Model,
    task: str | Sequence[str],
    path: str | Path,
    output: str | Path,
    *,
    top_k: int | None = None,
    deidentify: bool = False,
    with_input: bool = False,
    field: str = FIELD,
    rows: int = 0,
    chunk: int = CHUNK,
) -> dict[str, int]:
    """Predictions of the lines of a file as a file of JSON objects, in the order of the lines, on all local devices.

    Several tasks that read a text in the same way share one pass over the trunk. The answers are those of predict(), but for
    rounding, as batches may have another shape. While the output is made, OUTPUT.part keeps the finished chunks; the same call
    resumes it after a kill, and the bytes are those of a call that was not killed. An existing output is replaced at the end.

    Args:
        workdir: A workdir that has at least one evaluated checkpoint, or load_model() of it.
        task: A task of that run, or several.
        path: A UTF-8 file with a text in each line, or, if its name ends in .jsonl, with a JSON object in each line that has
            the text columns of the tasks' sources. Every line gets an answer, an empty one {"error": ...}.
        output: The file to write. A line is the prediction of the task; of several tasks {task: prediction}.
        top_k: As for predict().
        deidentify: As for predict().
        with_input: Whether a line of the output is the line of the input, its object with all of its fields, or {"text": ...},
            and the prediction as one field more.
        field: The name of that field.
        rows: Rows of a batch on each device; 0: those of the run's batches.
        chunk: Lines that are read, computed and kept at once.

    Returns:
        {"rows": lines, "errors": lines with an error in place of a prediction}.

    Raises:
        UserError: As for predict(), with the file and the number of the input; the output cannot be written, or its partial
            file was made from another input, model or setting.

    Examples:
        >>> _ = Path("in.jsonl").write_text('{"id": 7, "text": "who is the man ?"}\\n')
        >>> mtl_jax.predict_file("runs/tiny", ["coarse", "fine"], "in.jsonl", "out.jsonl", with_input=True)
        {'rows': 1, 'errors': 0}
        >>> import json
        >>> list(json.loads(Path("out.jsonl").read_text())["prediction"])
        ['coarse', 'fine']
    """
    log_lines.show()
    if with_input and not field:
        raise UserError("field is empty; it names the prediction beside the fields of its line")
    names = (task,) if isinstance(task, str) else tuple(task)
    request = Request(names, (), str(path), top_k, deidentify, field if with_input else "", rows, chunk)
    return answer_file(workdir, request, str(output))


def answer_file(
    workdir: str | Path | Model,
    request: Request,
    output: str,
    *,
    title: str = "",
    signals: bool = False,
) -> dict[str, int]:
    """As predict_file(), for the command, too.

    Args:
        workdir: As for predict_file().
        request: What is to be predicted.
        output: The file to write; "" or "-": standard output, chunk by chunk.
        title: The title of a progress bar; "": none.
        signals: Whether SIGTERM and SIGINT end the work after a chunk.

    Raises:
        UserError: As for predict_file(), or there is nothing to predict.
        Interrupted: A signal ended the work.
    """
    predict_request.check(request)
    to_file = output not in ("", text_lines.STANDARD_OUTPUT)
    target = check_writable(output, [request.file] if request.file else []) if to_file else None
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(text_lines.opened_twice(request.file)) if request.file else None
        model = opened(workdir)
        stack.enter_context(hiding(model.run.experiment.private))
        alone = not request.has_objects
        readings = answer_rows.readings(model.run, request.tasks, deidentify=request.deidentify, texts_alone=alone)
        for task in (task for reading in readings for task in reading.tasks if request.top_k is not None):
            answer_rows.check_top(task)
        total, digest = predict_request.checked(request, stream, readings)
        if not total and target is None:
            raise UserError("nothing to predict: give --text or --file")
        rows = request.rows or model.run.experiment.batch.rows
        devices = jax.local_device_count() if total > rows * model.run.experiment.batch.slots else 1  # one batch is enough
        journal: Journal | None = None
        if target is not None:
            journal = Journal(target, _made_from(model, request, digest, rows, devices), ITEM)
            stack.callback(journal.close)
        answers = functools.partial(_answers, model, request, readings, _compute(model, rows, devices))
        stopped = stack.enter_context(stop_on_signals()).flag.is_set if signals else lambda: False
        if journal is None:
            return _print(request, stream, total, answers, stopped)
        progress = None
        if title:
            done = min(total, len(journal.done) * request.chunk)
            progress = stack.enter_context(contextlib.closing(Progress(title, total, done, unit="row")))
        _fill(journal, request, stream, total, answers, progress, stopped)
        return _finish(journal, request, total)


def _compute(model: Model, rows: int, devices: int) -> answer_rows.Compute:
    """The function to the outputs of examples, from so many rows of a batch on each of so many devices."""
    run = model.run
    batching = dataclasses.replace(run.experiment.batch, rows=rows * devices, buckets=_buckets(model, run.experiment.batch))
    mesh = meshes.make(devices, devices)
    params = jax.device_put(run.params, meshes.replicated(mesh)) if devices > 1 else run.params

    def compute(tasks: tuple[Task, ...], examples: Examples) -> Mapping[str, Any]:
        apply, _ = model.outputs(*(task.name for task in tasks), devices=devices)
        return evaluation.predict(apply, params, tasks, [examples], batching, mesh).outputs

    return compute


def _buckets(model: Model, batching: Batching) -> tuple[int, ...]:
    """The lengths of rows where each text has one: longer ones first share batches, and batches of short ones are cut.

    A user's trunk keeps the lengths of the run: how it reads padding is its own affair.
    """
    if batching.packed or batching.buckets or model.run.trunk.is_users:
        return batching.buckets
    return shorter_rows(batching.row_length)


def _made_from(model: Model, request: Request, digest: str, rows: int, devices: int) -> dict[str, Any]:
    """All that the answers depend on, for a journal: JSON values by names that an error can show."""
    run = model.run
    parts = {
        "experiment": experiment_json.to_json(run.experiment),
        "tasks": experiment_json.tasks_to_json(run.tasks),
        "trunk": digests.of_directory(model.workdir / "trunk"),
        "params": digests.of_tree(run.params),
    }
    return {
        "command": "predict",
        "input": digest,
        "model": digests.of_json(parts),
        "task": list(request.tasks),
        "top_k": request.top_k,
        "deidentify": request.deidentify,
        "field": request.field,
        "mtl_jax": installed("mtl_jax"),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "devices": devices,
        "dtype": str(np.dtype(meshes.compute_dtype(run.experiment.dtype))),
        "rows": rows,
        "chunk": request.chunk,
    }


def _answers(
    model: Model, request: Request, readings: Sequence[Reading], compute: answer_rows.Compute, lines: Sequence[Line]
) -> dict[str, Any]:
    """The answers to a chunk of inputs as a JSON value: ITEM."""
    values = [predict_request.value_of(request, line) for line in lines]
    answers: list[dict[str, Any]] = [{} for _ in lines]
    # A remark on the vocabulary, once: other chunks have the same.
    remark = functools.partial(log.warning, "%s") if lines[0].number == 1 else lambda line: None
    for reading in readings:
        rows = [predict_request.row_of(request, reading, value, line.number) for value, line in zip(values, lines, strict=True)]
        of_rows = answer_rows.answer(model.run, reading, rows, compute, top_k=request.top_k, remark=remark)
        for answer, of_row in zip(answers, of_rows, strict=True):
            answer.update(of_row)
    errors = [
        f"input {line.number}: {error}"
        for line, answer in zip(lines, answers, strict=True)
        if (error := next((of_task["error"] for of_task in answer.values() if "error" in of_task), ""))
    ]
    ordered = [{name: answer[name] for name in request.tasks} for answer in answers]
    objects = [answer[request.tasks[0]] if len(request.tasks) == 1 else answer for answer in ordered]
    if request.field:
        objects = [
            {**predict_request.fields_of(value), request.field: item} for value, item in zip(values, objects, strict=True)
        ]
    return {"answers": objects, "errors": len(errors), "first": next(iter(errors), "")}


def _texts(item: Mapping[str, Any]) -> Iterator[str]:
    return (to_json(answer, ensure_ascii=False) for answer in item["answers"])


def _print(
    request: Request,
    stream: BinaryIO | None,
    total: int,
    answers: Callable[[Sequence[Line]], dict[str, Any]],
    stopped: Callable[[], bool],
) -> dict[str, int]:
    """Prints the answers, chunk by chunk."""
    errors = done = 0
    for _, lines in predict_request.chunks(request, stream, total):
        item = answers(lines)
        text_lines.print_lines(_texts(item))
        errors, done = errors + item["errors"], done + len(lines)
        if stopped() and done < total:
            raise Interrupted(f"stopped with {done:,} of {count(total, 'row')} printed; --output keeps what is done")
    return {"rows": total, "errors": errors}


def _fill(
    journal: Journal,
    request: Request,
    stream: BinaryIO | None,
    total: int,
    answers: Callable[[Sequence[Line]], dict[str, Any]],
    progress: Progress | None,
    stopped: Callable[[], bool],
) -> None:
    """Adds the chunks that a journal does not have."""
    for number, lines in predict_request.chunks(request, stream, total):
        if number in journal.done:
            continue
        journal.add(number, answers(lines))
        if progress is not None:
            progress.update(len(lines))
        done = min(total, len(journal.done) * request.chunk)
        if stopped() and done < total:
            kept = f"kept in {journal.part}; the same command resumes it"
            raise Interrupted(f"stopped with {done:,} of {count(total, 'row')} done, {kept}")


def _finish(journal: Journal, request: Request, total: int) -> dict[str, int]:
    """Writes the output from a journal that has all chunks, and logs how many inputs have an error."""
    errors, first = 0, ""

    def texts() -> Iterator[str]:
        nonlocal errors, first
        for number in sorted(journal.done):
            item = journal.done[number]
            errors, first = errors + item["errors"], first or item["first"]
            yield from _texts(item)

    journal.finish(texts())
    if errors:
        lines = count(errors, "row has an error", "rows have an error")
        log.warning("%s%s in place of a prediction, the first: %s", f"{request.file}: " if request.file else "", lines, first)
    return {"rows": total, "errors": errors}
