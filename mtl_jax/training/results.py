"""The results of a run: baselines, results.json with its figure, and the dev scores in the log."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from mtl_jax.core.errors import UserError
from mtl_jax.data.corpus import Corpus
from mtl_jax.data.examples import Examples
from mtl_jax.data.row_keys import text_of
from mtl_jax.data.source import SPLITS, Source
from mtl_jax.experiment import Experiment, rule_name
from mtl_jax.tasks import Task
from mtl_jax.tasks.reading import known_rows
from mtl_jax.training import workdir as workdirs
from mtl_jax.training.evaluation import for_json, score_outputs
from mtl_jax.training.experiment_json import with_defaults
from mtl_jax.training.metrics_log import read_metrics

log = logging.getLogger(__name__)

BASELINE_NAMES = {"constant": "majority / mean", "lead": "first sentence", "probe": "linear probe"}


def compute_baselines(
    corpus: Corpus, sources: Sequence[Source], kind: str, features_NxH: np.ndarray | None
) -> dict[str, dict[str, dict[str, float | None]]]:
    """{task: {baseline: {metric: value}}} on test; None where a metric is not defined.

    Args:
        corpus: The data.
        sources: The declared sources of it.
        kind: none; constant: the majority class or the mean, and for texts the first sentence of the input; or probe: these,
            and a linear model on the features. Features that are not finite are logged, and have no probe.
        features_NxH: For probe: the untrained trunk's vector of every example, by id.
    """
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for task in corpus.tasks if kind != "none" else ():
        split = {name: corpus.splits[name][task.source] for name in SPLITS}
        scores[task.name] = {}
        constant = task.constant(split["train"], split["test"])
        if constant is not None:
            scores[task.name]["constant"] = score_outputs(task, constant, split["test"])
        if task.decodes:
            (source,) = (source for source in sources if source.name == task.source)
            rows = split["test"].data
            lead = task.lead([text_of(source, row) for row in rows], rows)
            if lead is not None:
                scores[task.name]["lead"] = lead
        if features_NxH is not None and task.level == "example":
            features = {name: features_NxH[_ids(examples)] for name, examples in split.items()}
            labels = {name: examples.labels[task.name] for name, examples in split.items()}
            not_finite = {name: int((~np.isfinite(rows)).any(axis=1).sum()) for name, rows in features.items()}
            if any(not_finite.values()):
                log.warning(
                    "task %s: no linear probe, the trunk's features of %s examples are not finite",
                    task.name,
                    ", ".join(f"{count} {name}" for name, count in not_finite.items() if count),
                )
                continue
            for name in ("train", "dev"):
                labelled = known_rows(task, split[name])
                features[name], labels[name] = features[name][labelled], labels[name][labelled]
            outputs = task.probe(features, labels)
            if outputs is not None:
                scores[task.name]["probe"] = score_outputs(task, outputs, split["test"])
    return for_json(scores)


def _ids(examples: Examples) -> slice:
    return slice(examples.first_id, examples.first_id + len(examples.tokens))


def write(
    folder: Path,
    experiment: Experiment,
    tasks: Sequence[Task],
    scores: dict[str, dict[str, dict[str, float]]],
    signatures: dict[str, dict[str, str]],
    facts: dict[str, Any],
    figure: bool = True,
    without_copies: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Writes results.json and curves.png; returns the contents of the first.

    Args:
        folder: The workdir.
        experiment: The experiment.
        tasks: Its tasks.
        scores: {"dev" and "test": {task: {metric: value}}} of the best checkpoint.
        signatures: {task: {metric: how it was computed}}, on test.
        facts: Steps, seconds and the like.
        figure: Whether to write curves.png.
        without_copies: {task: what copy_scores.without_copies() says of it}.
    """
    baselines = workdirs.numbers(workdirs.read_json(folder / "baselines.json") or {})
    for task in tasks:
        if any(task.metric not in metrics for metrics in baselines.get(task.name, {}).values()):
            raise workdirs.damaged(folder / "baselines.json", f"{task.name} lacks {task.metric}")
    contents = {
        "experiment": experiment.name,
        "seed": experiment.seed,
        "weighting": rule_name(experiment),
        "averaging": experiment.averaging,
        **for_json(facts),
        "tasks": {
            task.name: {
                "metric": task.metric,
                "dev": for_json(scores["dev"][task.name]),
                "test": for_json(scores["test"][task.name]),
                "baselines": baselines.get(task.name, {}),
                **without_copies.get(task.name, {}),
                **({"signatures": signatures[task.name]} if signatures[task.name] else {}),
            }
            for task in tasks
        },
        "versions": workdirs.versions(),
    }
    records = read_metrics(folder) if figure else []
    if records and jax.process_index() == 0:  # merged runs took no steps
        from mtl_jax.core import plotting  # imported late: matplotlib takes a while

        # Before results.json, which marks the run as finished.
        plotting.curves(records, [(task.name, task.metric) for task in tasks], folder / "curves.png")
    workdirs.write_json(folder / "results.json", contents)
    return contents


class RunResults(dict[str, Any]):
    """The contents of a results.json, beside the configuration of its run.

    Attributes:
        folder: The workdir.
        config: Its config.json, with fields that are newer than the run at their defaults, and of a merged run its method;
            {} where there is none.
    """

    def __init__(self, contents: Mapping[str, Any], folder: Path, config: Mapping[str, Any]):
        super().__init__(contents)
        self.folder = folder
        self.config = config


def read(folder: Path) -> RunResults:
    """results.json of a workdir.

    Raises:
        UserError: There is none, or it is not what mtl_jax wrote.
    """
    contents: dict[str, Any] | None = workdirs.read_results(folder)
    if contents is None:
        raise UserError(f"{folder}: no results.json; the run is not finished, or this is not a workdir")
    config = with_defaults(workdirs.read_json(folder / "config.json") or {})
    if config and "merged" in contents:
        record = workdirs.read_json(folder / workdirs.MERGED) or {}
        config = {**config, "merged": record.get("method", contents["merged"]["method"])}
    return RunResults(contents, folder, config)


SHOWN_TASKS = 8  # in a row of the dev table


class DevTable:
    """A table of dev scores that grows by a row with each evaluation, for the log.

    Args:
        tasks: The tasks of the run.
    """

    def __init__(self, tasks: Sequence[Task]):
        metrics = {task.name: task.metric for task in tasks[:SHOWN_TASKS]}
        self._metrics = metrics
        names = [f"{name} {metric}" for name, metric in metrics.items()]
        if len(set(metrics.values())) == 1:  # it is then in the first row alone
            names = list(metrics)
        more = [f"and {len(tasks) - len(metrics)} more"] if len(tasks) > len(metrics) else []
        self._columns = ["step", *names, *more, "criterion"]
        self._titled = False
        self._metric = next(iter(metrics.values())) if len(set(metrics.values())) == 1 else ""

    def rows(self, step: int, scores: Mapping[str, Mapping[str, float]], criterion: float, best: bool) -> list[str]:
        """The lines of an evaluation, at the first one also the title.

        Args:
            step: Steps done.
            scores: {task: {metric: value}} on dev.
            criterion: The number by which checkpoints are compared.
            best: Whether it is the best so far, which is marked by a star.
        """
        values = [f"{scores[task][metric]:.4f}" for task, metric in self._metrics.items()]
        values += [""] * (len(self._columns) - len(values) - 2)
        cells = [str(step), *values, f"{criterion:.4f}"]
        widths = [max(len(name), 7) for name in self._columns]
        row = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        title = f"dev {self._metric}".strip()
        head = "  ".join(name.rjust(width) for name, width in zip(self._columns, widths, strict=True))
        titles = [] if self._titled else [f"{title}, * is the best so far", head]
        self._titled = True
        return [*titles, f"{row} *" if best else row]
