"""The files ablation.csv, with one score a row, and results.json, with the statistics."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from mtl_jax.reporting.statistics import Comparison, Group, Spread, leading, ranked, ties
from mtl_jax.reporting.study import SPLITS, Run, Scores, Study
from mtl_jax.training.run_settings import BY_NAME


def columns(study: Study, *fields: str) -> list[str]:
    """The columns of varied fields, by default of all: weights.a and weights.b for weights, other fields as they are."""
    names_of_columns = []
    for field in fields or study.fields:
        if field.rpartition(".")[2] in BY_NAME:
            names = dict.fromkeys(name for run in study.runs for name in run.values.get(field) or {})
            names_of_columns += [f"{field}.{name}" for name in names]
        else:
            names_of_columns.append(field)
    return names_of_columns


def cells(values: Mapping[str, Any]) -> dict[str, Any]:
    """{column: value} of the varied fields of a run or group; columns without a value are absent."""
    by_column: dict[str, Any] = {}
    for field, value in values.items():
        if field.rpartition(".")[2] in BY_NAME:
            by_column |= {f"{field}.{name}": number for name, number in (value or {}).items()}
        else:
            by_column[field] = value
    return by_column


def to_csv(study: Study) -> str:
    """The tidy table: run, seed, varied fields, status, split, task, metric, value.

    A run without scores has one row, which ends with its status. Numbers are written in full precision, lists and objects as
    JSON.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    varied = columns(study)
    writer.writerow(["run", "seed", *varied, "status", "split", "task", "metric", "value"])
    for run in study.runs:
        by_column = cells(run.values)
        start = [run.name, run.seed, *(_cell(by_column.get(column)) for column in varied), run.status]
        rows = [
            [split, task, metric, value]
            for split in SPLITS
            for task, metrics in run.scores.get(split, {}).items()
            for metric, value in metrics.items()
        ]
        writer.writerows([*start, *row] for row in rows or [[""] * 4])
    return text.getvalue()


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (list, dict, bool)) else value


def to_json(study: Study, groups: Sequence[Group], comparison: Comparison | None) -> dict[str, Any]:
    """The statistics as JSON: groups over seeds, those with a criterion first and the best of them first, then methods."""
    order = [*ranked(groups), *(group for group in groups if group.criterion is None)]
    best = leading(group.criterion for group in order if group.criterion)
    return {
        "name": study.name,
        "command": study.command,
        "varied": list(study.fields),
        "tasks": {task: {"metric": metric, "baselines": _baselines(study, task)} for task, metric in study.tasks.items()},
        "criterion": study.criterion,
        "groups": [_group(group, best) for group in order],
        "methods": [] if comparison is None else _methods(comparison),
        "reference": "" if comparison is None else comparison.reference,
        "programs": [dict(program) for program in study.programs],
        "devices": study.devices,
        "versions": dict(study.versions),
    }


def _baselines(study: Study, task: str) -> dict[str, dict[str, float | None]]:
    baselines: Scores = next((run.baselines[task] for run in study.runs if task in run.baselines), {})
    return {
        kind: {name: value if isfinite(value) else None for name, value in metrics.items()}
        for kind, metrics in baselines.items()
    }


def _group(group: Group, best: Spread | None) -> dict[str, Any]:
    return {
        "values": dict(group.values),
        "runs": [_run(run) for run in group.runs],
        "criterion": _spread(group.criterion),
        "ties_with_the_best": group.criterion is not None and best is not None and ties(group.criterion, best),
        **{
            split: {task: {metric: _spread(score) for metric, score in metrics.items()} for task, metrics in scores.items()}
            for split, scores in group.scores.items()
        },
    }


def _run(run: Run) -> dict[str, Any]:
    return {"run": run.name, "seed": run.seed, "status": run.status}


def _spread(score: Spread | None) -> dict[str, Any] | None:
    return None if score is None else score._asdict()


def _methods(comparison: Comparison) -> list[dict[str, Any]]:
    return [
        {
            "method": method.name,
            "values": dict(method.group.values),
            "change_percent": _spread(method.change),
            "changes_percent": dict(method.changes),
            "rank": method.rank,
            "ranks": dict(method.ranks),
        }
        for method in comparison.methods
    ]
