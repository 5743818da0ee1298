"""A finished or running workdir as a model: texts in, predictions out."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from mtl_jax.data.examples import Examples, make_examples
from mtl_jax.data.parts import make_part, remarks, shortened
from mtl_jax.data.sources import NAMED, Row, Source, read_one
from mtl_jax.errors import UserError
from mtl_jax.tasks import Seq2Seq, Task
from mtl_jax.training import evaluation, generation
from mtl_jax.training import mesh as meshes
from mtl_jax.training.generation import Generated
from mtl_jax.training.runs import Run as Run
from mtl_jax.training.runs import is_workdir as is_workdir
from mtl_jax.training.runs import open_run as open_run
from mtl_jax.training.step import encode_tokens, needs

log = logging.getLogger(__name__)


def predict(workdir: str | Path, task: str, inputs: Sequence[str | Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Predictions of the best checkpoint of a run.

    Args:
        workdir: A workdir that has at least one evaluated checkpoint.
        task: A task of that run.
        inputs: Any number of texts, or of rows {column: text} with the text columns of the task's source, as pairs need; where
            texts are tagged, a text may be given as the list of its words. An empty text or row gets {"error": ...}.

    Returns:
        One JSON object for each input, in order; what is in it, the task kind's describe() says. "truncated": true is added
        where a text was longer than the model's rows and had to be cut.

    Raises:
        UserError: The directory is no workdir, has no checkpoint yet, the task is unknown, or a row lacks a text column or has
            something else than text there.
    """
    run = open_run(Path(workdir))
    asked, length, source = run.task(task), run.experiment.batch.row_length, run.source(task)
    as_words = any(other.words for other in run.beside(task))
    rows = [_row(source, value, number, as_words) for number, value in enumerate(inputs, start=1)]
    known = [i for i, row in enumerate(rows) if all(_joined(row.columns[name]).strip() for name in _text_columns(source))]
    results: list[dict[str, Any]] = [{"error": "empty text"} for _ in rows]
    if not known:
        return results
    found = [rows[i] for i in known]
    examples, cut = make_examples(source, run.beside(task), found, run.trunk.tokenizer, length, lenient=True)
    examples = examples._replace(place=run.place(task))
    texts: list[Generated] = []
    outputs: Any = ()
    if isinstance(asked, Seq2Seq):
        texts = generation.generate(asked, run.trunk, run.params, examples, asked.beams, devices=jax.local_devices())
    else:
        outputs = _apply(run, asked, examples).outputs[task]
    for number, group in enumerate(examples.groups()):
        place = examples.row_of[group[0]]
        if not all(len(examples.tokens[i]) for i in group):
            continue
        if texts:
            text, score, ended = texts[number]
            answer: dict[str, Any] = {"text": text, "score": round(score, 6)} | ({} if ended else {"unfinished": True})
        else:
            windows = [examples.window(i, group[0]) for i in group]
            answer = asked.describe([outputs[i] for i in group], windows, examples.data[place])
        truncated = place in cut or (len(group) > 1 and not asked.windows)
        results[known[place]] = answer | ({"truncated": True} if truncated else {})
    return results


def evaluate(workdir: str | Path, task: str, path: str, format: str = "") -> dict[str, Any]:
    """Loss and metrics of the best checkpoint of a run on rows that it may never have seen; of generated texts with signatures.

    Args:
        workdir: A workdir that has at least one evaluated checkpoint.
        task: A task of that run.
        path: Rows with the columns of the task's source, all of which count: whatever Source.path may be.
        format: Of a file, if it is another than the source's.

    Raises:
        UserError: As predict(), or a row or label cannot be read.
    """
    run = open_run(Path(workdir))
    asked, length, source = run.task(task), run.experiment.batch.row_length, run.source(task)
    kind = format or source.format
    source = dataclasses.replace(source, path=path, format=kind, limit=0, columns=source.columns if kind in NAMED else ())
    rows = read_one(source)
    examples, counts = make_part(source, run.beside(task), rows, run.trunk.tokenizer, length, path, labelled=(asked,))
    if counts.blank[task] == len(examples.data):
        raise UserError(f"{path}: no row has a label for task {task!r}")
    told = [shortened((asked,), counts, length)] if counts.cut or counts.extra else []
    told += [f"{counts.skipped} rows that cannot be read left out"] if counts.skipped else []
    told += remarks((asked,), counts) + [f"task {task}: {remark}" for remark in asked.remarks([examples])]
    for line in told:
        log.warning("%s: %s", path, line)
    examples = examples._replace(place=run.place(task))
    split = {source.name: examples}
    texts = generation.text_scores((asked,), run.trunk, run.params, split, lambda task: task.beams, devices=jax.local_devices())
    scores = evaluation.score((asked,), split, _apply(run, asked, examples), texts)
    for line in evaluation.undefined((asked,), scores, path).values():
        log.warning("the %s", line)
    signatures = asked.signatures(examples.data)
    return {
        "rows": len(examples.data),
        **evaluation.for_json(scores[task]),
        **({"signatures": signatures} if signatures else {}),
    }


def _apply(run: Run, task: Task, examples: Examples) -> evaluation.Found:
    """One task's outputs on examples of its source, on one device."""
    batch, mesh = run.experiment.batch, meshes.make(run.experiment.batch.rows, 1)
    apply = evaluation.make_outputs(encode_tokens(run.trunk.module, needs((task,))), (task,), mesh)
    return evaluation.run(apply, run.params, (task,), [examples], batch, mesh)


def _text_columns(source: Source) -> list[str]:
    return [name for name in (source.text, source.pair) if name]


def _joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else " ".join(text)


def _row(source: Source, value: str | Mapping[str, Any], number: int, as_words: bool) -> Row:
    names = _text_columns(source)
    columns = {names[0]: value} if isinstance(value, str) else dict(value) or dict.fromkeys(names, "")
    for name in names:
        text = columns.get(name)
        if as_words and isinstance(text, list) and all(isinstance(word, str) for word in text):
            continue
        if not isinstance(text, str):
            raise UserError(
                f"input {number}: source {source.name!r} needs the text columns {', '.join(names)}; {name!r} is missing"
                + ("" if text is None else f" or no text: {type(text).__name__}")
            )
    return Row(columns, f"input {number}")
