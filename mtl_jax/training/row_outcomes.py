"""How finished runs did on each row of their test splits, so that runs can be compared row by row.

The test rows are read again and must be those of the run; the outputs of the best checkpoint are computed again, without
training. What the metrics need of each row is kept in the cache of arrays, as tokens and features are: nothing is written into
a run's workdir.

Shapes in names: N test rows, B resamples.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mtl_jax.core import assets, digests
from mtl_jax.core.errors import UserError
from mtl_jax.core.row_texts import hiding
from mtl_jax.data import array_cache, row_keys
from mtl_jax.data import corpus as corpora
from mtl_jax.data.corpus import Corpus
from mtl_jax.data.examples import Examples, read_examples
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.source import Source
from mtl_jax.experiment import Experiment, select
from mtl_jax.tasks import Task
from mtl_jax.tasks.base import PerExample
from mtl_jax.tasks.metrics import METRICS
from mtl_jax.tasks.row_statistics import RowStatistics
from mtl_jax.training import evaluation, text_evaluation
from mtl_jax.training import mesh as meshes
from mtl_jax.training import workdir as workdirs
from mtl_jax.training.copy_scores import taken
from mtl_jax.training.experiment_json import from_json, tasks_from_json
from mtl_jax.training.forward import encode_tokens, needed_fields
from mtl_jax.training.restore import TrainedRun, is_workdir, open_run

log = logging.getLogger(__name__)

VERSION = 2  # of what is kept for each row
FAR = 0.005  # a metric that differs by more from results.json is worth a line
FILES = ("config.json", "data.json", "results.json")

# From how often each resample has each row, f64[B, N], to the metric of each resample, f64[B].
Measured = Callable[[np.ndarray], np.ndarray]


class FinishedRun(NamedTuple):
    """A finished run, without its parameters.

    Attributes:
        folder: Its workdir.
        config: The contents of config.json.
        experiment: Its configuration, tasks selected.
        tasks: {name: task}, with the label sets of its data.
        results: The contents of results.json.
    """

    folder: Path
    config: Mapping[str, Any]
    experiment: Experiment
    tasks: dict[str, Task]
    results: Mapping[str, Any]


class RowSet(NamedTuple):
    """The test rows of a task.

    Attributes:
        keys: u8[N, 16], a hash of each row's texts and label.
        units: i64[N], the unit of each row that is drawn as a whole: its document, or its list; else the row itself.
    """

    keys: np.ndarray
    units: np.ndarray


class Outcome(NamedTuple):
    """How a run did on the test rows of a task.

    Attributes:
        rows: The rows.
        measured: From how often each row counts to the task's main metric.
        exact: Whether all resamples are measured at once; else each costs a call of the task's metrics().
    """

    rows: RowSet
    measured: Measured
    exact: bool


def read_run(folder: Path) -> FinishedRun:
    """Opens a finished run without its parameters.

    Raises:
        UserError: The directory is not a workdir, or the run is not finished.
    """
    if not is_workdir(folder):
        raise UserError(f"{folder}: not the workdir of a run (config.json or data.json is missing)")
    results = workdirs.read_results(folder)
    if results is None:
        raise UserError(f"{folder}: the run is not finished (it has no results.json); let it end first")
    config, data = (workdirs.read_json(folder / name) for name in FILES[:2])
    experiment = select(from_json(config, str(folder / "config.json")))
    tasks = tasks_from_json(data["tasks"], str(folder / "data.json"))
    return FinishedRun(folder, config, experiment, {task.name: task for task in tasks}, results)


class Reader:
    """Reads test rows and outcomes of runs; sources that several runs share are read once.

    Args:
        sources: In place of those in config.json, where a script gave their rows.
        opened: From a workdir to its best checkpoint.
    """

    def __init__(self, sources: Sequence[Source] = (), opened: Callable[[Path], TrainedRun] = open_run):
        self._opened = opened
        self._given = {source.name: source for source in sources}
        self._splits: dict[str, Sequence[Row]] = {}

    def rows(self, run: FinishedRun, task: str) -> RowSet:
        """The test rows of a task, from the cache or read again.

        Raises:
            UserError: They cannot be read.
        """
        cached = _cached(run, task)
        if cached is not None:
            return cached.rows
        with hiding(run.experiment.private):
            source, chosen = self._source(run, task), run.tasks[task]
            return _test_rows(source, chosen, self._read(run, source))

    def outcomes(self, run: FinishedRun, tasks: Sequence[str]) -> dict[str, Outcome]:
        """{task: how the best checkpoint did on each test row}, from the cache or computed again.

        Args:
            run: The run.
            tasks: Some of its tasks.

        Raises:
            UserError: The run has no checkpoint, or its test rows cannot be read or have changed since.
        """
        kept = {task: outcome for task in tasks if (outcome := _cached(run, task)) is not None}
        missing = [task for task in tasks if task not in kept]
        if missing:
            log.info("%s: outputs on the test rows of %s ...", run.folder, ", ".join(missing))
            with hiding(run.experiment.private):
                kept |= self._computed(run, missing)
        return {task: kept[task] for task in tasks}

    def _computed(self, finished: FinishedRun, names: Sequence[str]) -> dict[str, Outcome]:
        run = self._opened(finished.folder)
        tasks = [run.task(name) for name in names]
        sources = list(dict.fromkeys(task.source for task in tasks))
        parts: dict[str, Examples] = {}
        for name in sources:
            first_id = sum(len(part.tokens) for part in parts.values())
            parts[name] = self._examples(finished, run, self._source_named(finished, name), first_id)
        outputs = _outputs(run, tasks, parts)
        outcomes = {}
        for task in tasks:
            examples = parts[task.source]
            rows = _test_rows(self._source_named(finished, task.source), task, examples.data)
            statistics = None if task.metric in METRICS else task.row_statistics(outputs[task.name], examples)
            if statistics is None:
                outcomes[task.name] = Outcome(rows, _again(task, outputs[task.name], examples), False)
            else:
                outcomes[task.name] = Outcome(rows, statistics.metric, True)
                _keep(finished, task.name, rows, statistics)
            value = float(outcomes[task.name].measured(np.ones((1, len(rows.keys))))[0])
            reported = finished.results["tasks"][task.name]["test"][task.metric]
            if reported is not None and not abs(value - reported) <= FAR:
                remark = f"{value:.4f} on this device, {reported:.4f} in results.json"
                log.warning("%s: task %s: test %s is %s", finished.folder, task.name, task.metric, remark)
        return outcomes

    def _examples(self, finished: FinishedRun, run: TrainedRun, source: Source, first_id: int) -> Examples:
        """The test rows of a source as the run reads them, with all labels.

        Raises:
            UserError: They are not those of data.json.
        """
        tasks = [task for task in run.tasks if task.source == source.name]
        rows, length = self._read(finished, source), run.experiment.batch.row_length
        examples, _ = read_examples(source, tasks, rows, run.trunk.tokenizer, length, "split test", first_id=first_id)
        present = Corpus({"test": {source.name: examples}}, tuple(tasks), []).describe()["sources"][source.name]["test"]
        stored = workdirs.read_json(finished.folder / "data.json")["sources"]
        if stored.get(source.name, {}).get("test") != present:
            raise UserError(
                f"{finished.folder}: split test of source {source.name!r} has changed since the run was trained (see data.json)"
            )
        return examples._replace(place=run.sources.index(source.name))

    def _read(self, run: FinishedRun, source: Source) -> Sequence[Row]:
        tasks = [task for task in run.tasks.values() if task.source == source.name]
        key = repr((source, tasks))
        if key not in self._splits:
            self._splits[key] = corpora.read_sources([source], tasks)[source.name].rows["test"]
        return self._splits[key]

    def _source(self, run: FinishedRun, task: str) -> Source:
        return self._source_named(run, run.tasks[task].source)

    def _source_named(self, run: FinishedRun, name: str) -> Source:
        return self._given.get(name) or next(source for source in run.experiment.sources if source.name == name)


def _outputs(run: TrainedRun, tasks: Sequence[Task], parts: dict[str, Examples]) -> dict[str, Any]:
    """{task: its outputs on the examples, or the text of each row where the metric is one of texts}."""
    writers: list[Any] = [task for task in tasks if task.scores_texts]
    texts = text_evaluation.generated_texts(writers, run.trunk, run.params, parts, lambda task: task.beams)
    outputs: dict[str, Any] = {}
    for task in writers:
        outputs[task.name] = _by_row(texts[task.name], parts[task.source])
    others = tuple(task for task in tasks if task not in writers)
    if others:
        mesh = meshes.make(run.experiment.batch.rows, 1)
        apply = evaluation.make_outputs(encode_tokens(run.trunk.module, needed_fields(others)), others, mesh)
        examples = [part for name, part in parts.items() if any(task.source == name for task in others)]
        outputs |= evaluation.predict(apply, run.params, others, examples, run.experiment.batch, mesh).outputs
    return outputs


def _by_row(texts: Sequence[tuple[Row, str]], examples: Examples) -> list[str]:
    """The text of each row by its place, as rows of the hub are other objects each time; "" of a row that was not read."""
    of_rows = [""] * len(examples.data)
    for group, (_, text) in zip(examples.groups(), texts, strict=True):
        of_rows[int(examples.row_of[group[0]])] = text
    return of_rows


def _test_rows(source: Source, task: Task, rows: Sequence[Row]) -> RowSet:
    keys = np.zeros((len(rows), 16), np.uint8)
    units: dict[Any, int] = {}
    unit_of = np.zeros(len(rows), np.int64)
    in_lists = type(task).unit_key is not Task.unit_key
    for number, row in enumerate(rows):
        texts = [row.columns.get(name) for name in (source.text, source.pair, *task.text_columns) if name]
        label = None if task.corrupts else _label(task, row)
        keys[number] = np.frombuffer(hashlib.blake2b(repr((texts, label)).encode(), digest_size=16).digest(), np.uint8)
        unit: Any = task.unit_key(row) if in_lists else row_keys.group(source, row)
        unit_of[number] = units.setdefault(unit or number, len(units))
    return RowSet(keys, unit_of)


def _label(task: Task, row: Row) -> Any:
    """A row's label in a form that two runs with other label sets share."""
    label = task.raw_label(row)
    label = task.parse(row) if label is None else label
    return label.tolist() if isinstance(label, np.ndarray) else label


def _again(task: Task, outputs: PerExample, examples: Examples) -> Measured:
    """The main metric of resampled rows by the task's own functions."""
    row_of = examples.row_of
    places_of = [np.flatnonzero(row_of == row) for row in range(len(examples.data))]

    def measured(counts_BxN: np.ndarray) -> np.ndarray:
        return np.array([_of_rows(np.repeat(np.arange(len(counts_N)), counts_N.astype(int))) for counts_N in counts_BxN])

    def _of_rows(rows: np.ndarray) -> float:
        data = [examples.data[row] for row in rows.tolist()]
        if task.scores_texts:
            writer: Any = task
            return writer.text_metrics([outputs[row] for row in rows.tolist()], data)[task.metric]
        places = np.concatenate([np.zeros(0, np.int64), *(places_of[row] for row in rows.tolist())])
        copies = np.repeat(np.arange(len(rows)), [len(places_of[row]) for row in rows.tolist()])
        fields = {name: taken(getattr(examples, name), places) for name in ("tokens", "types", "words", "offsets")}
        labels = {name: taken(values, places) for name, values in examples.labels.items()}
        resample = examples._replace(**fields, labels=labels, rows=copies.astype(np.int32), data=data)
        return task.all_metrics(taken(outputs, places), resample)[task.metric]

    return measured


def _name(run: FinishedRun, task: str) -> str:
    files = {name: digests.of_file(run.folder / name) for name in FILES}
    return digests.of_json({"version": VERSION, "task": task, **files})


def _cached(run: FinishedRun, task: str) -> Outcome | None:
    if run.experiment.private:
        return None
    arrays = array_cache.load(assets.cache_dir() / "outcomes", _name(run, task), "outcome")
    if arrays is None:
        return None
    statistics = RowStatistics(np.asarray(arrays["values"]), bytes(arrays["measure"]).decode())
    return Outcome(RowSet(arrays["keys"], arrays["units"]), statistics.metric, True)


def _keep(run: FinishedRun, task: str, rows: RowSet, statistics: RowStatistics) -> None:
    if run.experiment.private:
        return
    measure = np.frombuffer(statistics.measure.encode(), np.uint8)
    arrays = {"values": statistics.values, "measure": measure, "keys": rows.keys, "units": rows.units}
    about = {"workdir": str(run.folder), "task": task}
    array_cache.store(assets.cache_dir() / "outcomes", _name(run, task), arrays, about, "outcome")
