"""Answers to rows, for one task or for several in one pass over the trunk: what predict and predict_file share.

Tasks that read a row in the same way are a Reading: the row is tokenised once, the trunk runs once, and every head reads its
output.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mtl_jax import trunks
from mtl_jax.core.errors import UserError
from mtl_jax.core.text_lines import kind_of
from mtl_jax.data import coverage, row_edits, units
from mtl_jax.data.examples import Examples, make_examples
from mtl_jax.data.formats import records
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.labels import UnreadableTexts
from mtl_jax.data.source import EditRows, Source
from mtl_jax.sharing.base import Hard
from mtl_jax.tasks import CausalLM, Seq2Seq, Task
from mtl_jax.training import text_evaluation
from mtl_jax.training.restore import TrainedRun
from mtl_jax.transfer.adapters import Adapted
from mtl_jax.transfer.adapters.base import RUN

Value = str | Sequence[str] | Mapping[str, Any]  # one input: a text, its words, or a row

# (tasks, examples of their source) -> {task: their outputs, as in evaluation.Predictions}
Compute = Callable[[tuple[Task, ...], Examples], Mapping[str, Any]]

EMPTY = "empty text"
NO_TOKEN = "the text has no token that the vocabulary knows"
NOT_FINITE = "the model's output is not finite: its parameters are damaged, or training diverged"


class Reading(NamedTuple):
    """Tasks that read rows in the same way.

    Attributes:
        tasks: The tasks, each as a task of `source`.
        source: The source as which rows are read; it names the text columns.
        as_words: Whether a text may be given as the list of its words.
        edit: The source's change of rows; None: rows stay as they are.
        peers: All tasks of the source, by which its rows are read.
    """

    tasks: tuple[Task, ...]
    source: Source
    as_words: bool
    edit: EditRows | None
    peers: tuple[Task, ...]

    @property
    def as_messages(self) -> bool:
        """Whether the text is a conversation, which may be given as the list of its messages."""
        return any(isinstance(task, CausalLM) and task.messages for task in self.peers)


def readings(run: TrainedRun, names: Sequence[str], *, deidentify: bool = False, texts_alone: bool = False) -> list[Reading]:
    """Tasks, grouped by how they read a row.

    Tasks of one source are read together. So are tasks of several sources with the same text columns and the same way to
    divide or cut a text, if the trunk is the same for rows of all sources.

    Args:
        run: The run.
        names: The names of the tasks.
        deidentify: Whether rows are changed as their source changes them.
        texts_alone: Whether every input is a single text: a task that reads several texts of a row then reads it alone.

    Raises:
        UserError: The run has no such task, or a source does not de-identify.
    """
    groups: dict[tuple[Any, ...], list[Task]] = {}
    sources: dict[tuple[Any, ...], Source] = {}
    for name in names:
        task, source = run.task(name), edited_source(run.source(name), deidentify)
        if texts_alone and task.several_texts:
            source = dataclasses.replace(source, pair="")  # a text alone, for example for its vector
        way = _way_of_reading(run, task, source)
        sources.setdefault(way, source)
        groups.setdefault(way, []).append(task)
    return [_reading(run, tasks, sources[way]) for way, tasks in groups.items()]


def _way_of_reading(run: TrainedRun, task: Task, source: Source) -> tuple[Any, ...]:
    """What tasks have in common that are read together."""
    peers = run.tasks_of_same_source(task.name)
    only_rows_of_its_source = isinstance(run.trunk.module, Adapted) and not (
        isinstance(run.experiment.sharing, Hard) and all(adapter.per == RUN for adapter in run.experiment.adapters)
    )
    if only_rows_of_its_source or units.size(peers) > 1 or any(peer.makes_tokens for peer in peers):
        return source.name, source.pair
    return (
        *(source.text, source.pair, repr(source.deidentify)),
        *(any(peer.words for peer in peers), any(peer.windows for peer in peers), any(peer.needs_offsets for peer in peers)),
        *(max(peer.stride for peer in peers), next((peer.languages[0] for peer in peers if peer.languages[0]), "")),
    )


def _reading(run: TrainedRun, tasks: Sequence[Task], source: Source) -> Reading:
    peers = run.tasks_of_same_source(tasks[0].name)
    of_source = tuple(task if task.source == source.name else dataclasses.replace(task, source=source.name) for task in tasks)
    return Reading(of_source, source, any(peer.words for peer in peers), row_edits.editor(source, peers), tuple(peers))


def edited_source(source: Source, deidentify: bool) -> Source:
    """The source with its change of rows, if it is asked for, else without.

    Raises:
        UserError: It is asked for, and the source has none.
    """
    if deidentify and source.deidentify is None:
        raise UserError(f"source {source.name!r} of this run does not de-identify its rows; leave deidentify out")
    return source if deidentify else dataclasses.replace(source, deidentify=None)


def row_of(source: Source, value: Value, number: int, as_words: bool, file: str = "", *, as_messages: bool = False) -> Row:
    """An input as a row.

    Args:
        source: The source as which it is read.
        value: A text, the list of its words, or a row; an empty row has empty texts.
        number: The input's number, from 1, for errors.
        as_words: Whether a text may be the list of its words.
        file: The file that it is from, for errors.
        as_messages: Whether a text may be the list of the messages of a conversation.

    Raises:
        UserError: A text column is missing, or has something else than text.
    """
    where = f"{file}: input {number}" if file else f"input {number}"
    names = text_columns(source)
    columns = {names[0]: value}
    if isinstance(value, Mapping):
        columns = _columns(value, names) or dict.fromkeys(names, "")
    for name in names:
        text = columns.get(name)
        if as_words and isinstance(text, list | tuple) and all(isinstance(word, str) for word in text):
            columns[name] = list(text)
        elif as_messages and isinstance(text, list | tuple):
            columns[name] = json.dumps(text)
        elif not isinstance(text, str):
            requirement = f"source {source.name!r} needs the text columns {', '.join(names)}"
            actual = kind_of(text) if name in columns else "missing"
            lists = "a list of words" if as_words else "a list of messages" if as_messages else ""
            kind = f"a text or {lists}" if lists else "a text"
            hint = _pairs_hint(names) if isinstance(value, str) and len(names) > 1 else ""
            raise UserError(f"{where}: {requirement}; {name!r} is {actual}, where {kind} is needed{hint}")
    return Row(columns, where)


def _columns(value: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The columns of an object, made as those of training rows; but what stands in a text column must be a text."""
    try:
        made = records.columns(value)
    except (ValueError, TypeError):  # of a column with labels, which is not read here
        return dict(value)
    return made | {name: value[name] for name in names if name in value}


def check_row(reading: Reading, row: Row) -> None:
    """Checks whatever tasks read beside the text columns: choices, columns of a prompt, messages.

    Raises:
        UserError: The row lacks a column, or has something else in it.
    """
    if not _has_texts(row, reading.source):
        return  # its answer is an error
    several = units.reader(reading.peers)
    if several is not None:
        several.texts_of(row, reading.source)
    for task in reading.tasks:
        if isinstance(task, CausalLM):
            task.conversation(row, reading.source)


def text_columns(source: Source) -> list[str]:
    """The columns of a source that have texts."""
    return [name for name in (source.text, source.pair) if name]


def _pairs_hint(names: Sequence[str]) -> str:
    row = ", ".join(f'"{name}": "..."' for name in names)
    return f": --text gives one text; give pairs as --file FILE.jsonl with lines {{{row}}}"


def answer(
    run: TrainedRun,
    reading: Reading,
    rows: Sequence[Row],
    compute: Compute,
    *,
    top_k: int | None = None,
    remark: Callable[[str], None] = lambda line: None,
) -> list[dict[str, dict[str, Any]]]:
    """For each row {task: its prediction as a JSON object}, in order.

    Args:
        run: The run.
        reading: The tasks.
        rows: The rows, before the source's change.
        compute: Gives the outputs of those tasks that do not generate texts.
        top_k: As for predict().
        remark: Called with each line on tokens that the vocabulary does not know.
    """
    tasks, source = reading.tasks, reading.source
    rows, columns = row_edits.all_edited(reading.edit, rows), text_columns(reading.source)
    answers: list[dict[str, dict[str, Any]]] = [{task.name: {"error": EMPTY} for task in tasks} for _ in rows]
    readable = [i for i, row in enumerate(rows) if _has_texts(row, source)]
    read = [rows[i] for i in readable]
    for causal in (task for task in tasks if isinstance(task, CausalLM)):
        read = [causal.without_answer(row, source) for row in read]
    examples, cut, refused = _examples(run, tasks[0].name, source, read)
    for place, reason in refused.items():
        answers[readable[place]] = {task.name: {"error": reason} for task in tasks}
    readable = [i for place, i in enumerate(readable) if place not in refused]
    if not readable:
        return answers
    for line in coverage.remarks("texts", [examples], (), run.trunk.tokenizer, columns):
        remark(line)
    writers = [task for task in tasks if isinstance(task, Seq2Seq | CausalLM)]
    others = tuple(task for task in tasks if not isinstance(task, Seq2Seq | CausalLM))
    outputs = compute(others, examples) if others else {}
    for writer in writers:
        texts = text_evaluation.generate(writer, run.trunk, run.params, examples, writer.beams, devices=jax.local_devices())
        for number, group in enumerate(examples.groups()):
            if all(len(examples.tokens[i]) for i in group):
                place = examples.row_of[group[0]]
                written = _written(*texts[number])
                truncated = {} if "error" in written else _truncated(writer, group, place in cut)
                answers[readable[place]][writer.name] = written | truncated
    for group in examples.groups():
        place = examples.row_of[group[0]]
        if not all(len(examples.tokens[i]) for i in group):
            continue
        windows = [examples.window(i, group[0]) for i in group]
        for task in others:
            of_row = [outputs[task.name][i] for i in group]
            if not all(np.isfinite(output).all() for output in of_row):
                answers[readable[place]][task.name] = {"error": NOT_FINITE}
                continue
            described = task.describe(of_row, windows, examples.data[place])
            described |= {} if top_k is None else {"top": top(task, of_row[0], top_k)}
            answers[readable[place]][task.name] = described | _truncated(task, group, place in cut)
    return answers


def _written(text: str, score: float, ended: bool) -> dict[str, Any]:
    """The prediction of a task that generates texts."""
    if not math.isfinite(score):
        return {"error": NOT_FINITE}
    return {"text": text, "score": round(score, 6)} | ({} if ended else {"unfinished": True})


def _truncated(task: Task, group: range, is_cut: bool) -> dict[str, Any]:
    """{"truncated": true} where the task did not read all of a row's text."""
    return {"truncated": True} if is_cut or (len(group) > 1 and not task.windows and not task.several_texts) else {}


def _examples(run: TrainedRun, task: str, source: Source, rows: list[Row]) -> tuple[Examples, set[int], dict[int, str]]:
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
            bad = _without_tokens(source, run.tasks_of_same_source(task), examples, tokenizer)
            bad |= coverage.unreadable_rows(examples, tokenizer, tables)
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


def _without_tokens(source: Source, peers: Sequence[Task], examples: Examples, tokenizer: Any) -> dict[int, str]:
    """{index of a row of which only special tokens are left: the reason}; a word without a token is a task's own affair."""
    if units.reader(peers) is not None or any(peer.words or peer.makes_tokens for peer in peers):
        return {}
    special = tokenizer.num_special_tokens_to_add(pair=bool(source.pair))
    groups = (group for group in examples.groups() if all(len(examples.tokens[i]) <= special for i in group))
    return {int(examples.row_of[group[0]]): NO_TOKEN for group in groups}


def check_top(task: Task) -> None:
    """Raises UserError where a task has no probability for each label, which top_k needs."""
    if task.decodes or task.level != "example" or type(task).probabilities is Task.probabilities:
        raise _no_top(task)


def top(task: Task, output: np.ndarray, count: int) -> list[dict[str, Any]]:
    """The most likely labels of an example, the first one first.

    Raises:
        UserError: The task has no probability for each label.
    """
    probabilities = task.probabilities(output)
    if probabilities is None:
        raise _no_top(task)
    ranked = sorted(probabilities.items(), key=lambda item: -item[1])
    names = dict(zip(task.labels, task.shown_labels, strict=True))
    return [{"label": names.get(label, label), "probability": round(probability, 6)} for label, probability in ranked[:count]]


def _no_top(task: Task) -> UserError:
    return UserError(f"task {task.name!r}: {type(task).__name__} has no probability for each label; leave top_k out")


def _has_texts(row: Row, source: Source) -> bool:
    texts = (row.columns[name] for name in text_columns(source))
    return all((text if isinstance(text, str) else " ".join(text)).strip() for text in texts)
