"""Is anyone hurt? Joint runs against runs of each task alone, task by task, with intervals over test rows and seeds."""

from __future__ import annotations

import itertools
import statistics
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mtl_jax.core import log_lines
from mtl_jax.core.errors import UserError, count, listed
from mtl_jax.data.source import Source
from mtl_jax.reporting import formatting, paired_bootstrap
from mtl_jax.reporting import statistics as study_statistics
from mtl_jax.reporting import study as studies
from mtl_jax.reporting.compared import Alone, Column, Compared
from mtl_jax.reporting.series import cosine_name
from mtl_jax.reporting.study import ABLATION, DONE, Run
from mtl_jax.training.restore import TrainedRun, open_run
from mtl_jax.training.row_outcomes import FinishedRun, Outcome, Reader, read_run
from mtl_jax.training.run_settings import NOT_COMPARED
from mtl_jax.training.workdir import differences, read_json

Paths = str | Path | Sequence[str | Path]

JOINT = "joint"  # the name of the only joint setting
RESAMPLES, FEWEST = 2000, 100
MEASURED_AGAIN = 200  # resamples, where each costs a call of a task's metrics


class Joint(NamedTuple):
    """Joint runs that differ only in the seed.

    Attributes:
        label: Their name in tables.
        runs: The runs.
        studied: The same, with the curves of metrics.jsonl.
    """

    label: str
    runs: tuple[FinishedRun, ...]
    studied: tuple[Run, ...]


def compare(
    joint: Paths | Mapping[str, Paths],
    alone: Paths,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    sources: Sequence[Source] = (),
    opened: Callable[[Path], TrainedRun] = open_run,
) -> Compared:
    """As mtl_jax.compare, which also opens the runs of an ablation.

    Args:
        joint: As for mtl_jax.compare; so are alone, resamples, seed and sources.
        opened: From a workdir to its best checkpoint.

    Raises:
        UserError: As mtl_jax.compare.
    """
    log_lines.show()
    if resamples < FEWEST:
        raise UserError(f"resamples is {resamples}; it must be at least {FEWEST}")
    notes: list[str] = []
    columns = _columns(joint, notes)
    runs_alone = [read_run(folder) for folder in _folders(_listed(alone), notes)]
    if not runs_alone:
        raise UserError("no run alone is given")
    _check_twice([run for column in columns for run in column.runs], runs_alone)
    alone_of = _alone_of(columns, runs_alone, notes)
    reader = Reader(sources, opened)
    _check_rows(columns, alone_of, reader)
    uniform_B = paired_bootstrap.even(resamples, np.random.default_rng([seed, 3]))
    outcomes = {
        run.folder: reader.outcomes(run, [task for task in run.tasks if task in alone_of])
        for run in (*(run for column in columns for run in column.runs), *runs_alone)
    }
    sides = {
        task: Alone(
            metric=runs[0].tasks[task].metric,
            value=statistics.fmean(_values(task, runs, outcomes)),
            runs=tuple(str(run.folder) for run in runs),
        )
        for task, runs in alone_of.items()
    }
    drawn = _Draws(resamples, seed, uniform_B)
    result: dict[str, Column] = {}
    for column in columns:
        resampled = {
            task: drawn.differences(task, column.runs, runs, outcomes, runs_alone)
            for task, runs in alone_of.items()
            if task in column.runs[0].tasks
        }
        values = {task: statistics.fmean(_values(task, column.runs, outcomes)) for task in resampled}
        result[column.label] = _column(column, values, sides, resampled)
    inexact = [task for task in sides if any(not by_task[task].exact for by_task in outcomes.values() if task in by_task)]
    if inexact and resamples > MEASURED_AGAIN:
        notes.append(f"{listed(inexact)}: {MEASURED_AGAIN} resamples, as the metric has no row_statistics()")
    return Compared(sides, result, resamples, tuple(notes))


def of_report(workdirs: Sequence[Path], alone: Sequence[str | Path]) -> Compared:
    """compare() of the finished runs of a report; those that are also given as runs alone are left out.

    Args:
        workdirs: One ablation, or workdirs of runs.
        alone: As for compare().

    Raises:
        UserError: As compare().
    """
    runs_alone = {path.resolve() for path in _folders(_listed(alone), [])}
    single = workdirs[0] if len(workdirs) == 1 else None
    folders = _folders([str(single)], [], partly=True) if single and (single / ABLATION).exists() else list(workdirs)
    joint = [path for path in folders if path.resolve() not in runs_alone and (path / "results.json").exists()]
    return compare(joint, alone, opened=_opened)


def _opened(folder: Path) -> TrainedRun:
    """The best checkpoint of an ordinary run.

    Raises:
        UserError: It is one of an ablation.
    """
    if not (folder / "checkpoints").is_dir() and (folder.parent.parent / ABLATION).exists():
        raise UserError(
            f"{folder}: a run of an ablation has no checkpoints of its own; call mtl-jax compare with the same runs before, "
            "which keeps what the report needs"
        )
    return open_run(folder)


def _column(
    column: Joint, values: Mapping[str, float], sides: Mapping[str, Alone], resampled: Mapping[str, np.ndarray]
) -> Column:
    by_task = {task: paired_bootstrap.interval(values[task] - sides[task].value, drawn) for task, drawn in resampled.items()}
    defined = [task for task, difference in by_task.items() if difference.verdict != paired_bootstrap.UNDEFINED]
    mean = worst = None
    worst_task = ""
    if len(defined) > 1:
        average = statistics.fmean(by_task[task].value for task in defined)
        mean = paired_bootstrap.interval(average, np.mean([resampled[task] for task in defined], axis=0))
        worst_task = min(defined, key=lambda task: by_task[task].value)
        worst = paired_bootstrap.interval(by_task[worst_task].value, resampled[worst_task], len(defined))
    covers = paired_bootstrap.covered(len(column.runs), [len(sides[task].runs) for task in by_task])
    return Column(
        runs=tuple(str(run.folder) for run in column.runs),
        values=dict(values),
        differences=by_task,
        mean=mean,
        worst=worst,
        worst_task=worst_task,
        cosines=_cosines(column.studied),
        covers=covers,
    )


class _Draws(NamedTuple):
    """The draws of rows and seeds, the same for every column."""

    resamples: int
    seed: int
    uniform_B: np.ndarray

    def differences(
        self,
        task: str,
        joint: Sequence[FinishedRun],
        alone: Sequence[FinishedRun],
        outcomes: Mapping[Path, Mapping[str, Outcome]],
        runs_alone: Sequence[FinishedRun],
    ) -> np.ndarray:
        """f64[B], joint minus alone in each resample; NaN beyond MEASURED_AGAIN where a metric is slow."""
        of_runs = [outcomes[run.folder][task] for run in (*joint, *alone)]
        resamples = self.resamples if all(outcome.exact for outcome in of_runs) else min(self.resamples, MEASURED_AGAIN)
        # Tasks on one source draw the same rows.
        rng = np.random.default_rng([self.seed, 0, zlib.crc32(joint[0].tasks[task].source.encode())])
        parts = [
            [outcome.measured(counts_bxN) for outcome in of_runs]
            for counts_bxN in paired_bootstrap.row_counts(of_runs[0].rows.units, resamples, rng)
        ]
        values_SxB = np.full((len(of_runs), self.resamples), np.nan)
        values_SxB[:, :resamples] = np.concatenate(parts, axis=1)
        freedom = len(joint) + len(alone) - 2
        places = [number for number, run in enumerate(runs_alone) if any(run is other for other in alone)]
        weights = [
            paired_bootstrap.tails(
                paired_bootstrap.seed_weights(seeds, self.resamples, np.random.default_rng([self.seed, *key])),
                freedom,
                self.uniform_B,
            )
            for seeds, key in ((len(joint), (1,)), (len(alone), (2, *places)))
        ]
        return paired_bootstrap.differences(values_SxB[: len(joint)], values_SxB[len(joint) :], *weights)


def _values(task: str, runs: Iterable[FinishedRun], outcomes: Mapping[Path, Mapping[str, Outcome]]) -> list[float]:
    of_runs = [outcomes[run.folder][task] for run in runs]
    return [float(outcome.measured(np.ones((1, len(outcome.rows.keys))))[0]) for outcome in of_runs]


def _columns(joint: Paths | Mapping[str, Paths], notes: list[str]) -> list[Joint]:
    """The joint runs by setting.

    Raises:
        UserError: There is none, one is not finished, or runs under one name differ in more than the seed.
    """
    if isinstance(joint, Mapping):
        return [column for name, paths in joint.items() for column in _settings(_folders(_listed(paths), notes), name)]
    return _settings(_folders(_listed(joint), notes), "")


def _settings(folders: Sequence[Path], name: str) -> list[Joint]:
    if not folders:
        raise UserError(f"no joint run is given{f' for {name}' if name else ''}")
    runs = [read_run(folder) for folder in folders]
    study = studies.read(folders)
    groups = study_statistics.groups(study)
    if name and len(groups) > 1:
        raise UserError(f"{name}: its runs differ in {listed(study.fields)}; give a name to each setting")
    labels = [name or JOINT] if len(groups) == 1 else formatting.labels(groups, study.fields)
    # A setting at its defaults has no value that a label could show.
    labels = [
        formatting.runs(group) if label == formatting.NOTHING else label for label, group in zip(labels, groups, strict=True)
    ]
    place_of = {id(run): place for place, run in enumerate(study.runs)}
    return [
        Joint(label, tuple(runs[place_of[id(run)]] for run in group.runs), group.runs)
        for label, group in zip(labels, groups, strict=True)
    ]


def _listed(paths: Paths) -> list[str]:
    return [str(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]


def _folders(paths: Sequence[str], notes: list[str], *, partly: bool = False) -> list[Path]:
    """The workdirs that paths and patterns name; an ablation stands for its runs.

    Args:
        paths: The paths.
        notes: Gets a line for each ablation with runs that diverged.
        partly: Whether runs of an ablation that have not ended are left out.

    Raises:
        UserError: A run of an ablation has not ended.
    """
    folders: list[Path] = []
    for path in studies.find(paths):
        if not (path / ABLATION).exists():
            folders.append(path)
            continue
        entries = read_json(path / ABLATION)["runs"]
        diverged = [entry["run"] for entry in entries if entry["status"].startswith("diverged")]
        unfinished = [entry["run"] for entry in entries if entry["status"] != DONE and entry["run"] not in diverged]
        if unfinished and not partly:
            raise UserError(f"{path}: run {unfinished[0]} of the ablation is not finished; let it end first")
        notes += [f"{path}: {count(len(diverged), 'run')} that diverged left out"] if diverged else []
        folders += [path / "runs" / entry["run"] for entry in entries if entry["status"] == DONE]
    return folders


def _check_twice(joint: Sequence[FinishedRun], alone: Sequence[FinishedRun]) -> None:
    """Raises UserError where a run is given twice."""
    for name, runs in (("joint", joint), ("alone", alone)):
        folders = [run.folder.resolve() for run in runs]
        if twice := [run.folder for run, folder in zip(runs, folders, strict=True) if folders.count(folder) > 1]:
            raise UserError(f"{twice[0]}: the same run is given twice on the {name} side")
    both = {run.folder.resolve() for run in joint} & {run.folder.resolve() for run in alone}
    if both:
        raise UserError(f"{min(both)}: the same run is given as joint and as alone")


def _alone_of(columns: Sequence[Joint], alone: Sequence[FinishedRun], notes: list[str]) -> dict[str, list[FinishedRun]]:
    """{task of a joint run: the runs alone that have it}.

    Raises:
        UserError: A run alone has none of these tasks, the runs of a task differ in more than the seed, or a metric differs.
    """
    tasks = list(dict.fromkeys(task for column in columns for run in column.runs for task in run.tasks))
    for run in alone:
        if not run.tasks.keys() & set(tasks):
            raise UserError(
                f"{run.folder}: has no task of the joint runs; its tasks are {listed(run.tasks)}, theirs {listed(tasks)}"
            )
    by_task = {task: runs for task in tasks if (runs := [run for run in alone if task in run.tasks])}
    for column in columns:
        if not by_task.keys() & column.runs[0].tasks.keys():
            raise UserError(f"{column.runs[0].folder}: has no task in common with the runs alone ({listed(by_task)})")
    for task, runs in by_task.items():
        for run in runs[1:]:
            fields = {field for field, _, _ in differences(runs[0].config, run.config)}
            if other := sorted(field for field in fields if field.partition(".")[0] not in NOT_COMPARED):
                raise UserError(f"task {task}: {runs[0].folder} and {run.folder} differ in {listed(other)}; give one setting")
        metric = runs[0].tasks[task].metric
        for run in itertools.chain.from_iterable(column.runs for column in columns):
            if task in run.tasks and run.tasks[task].metric != metric:
                raise UserError(
                    f"task {task}: its metric is {run.tasks[task].metric} in {run.folder}, and {metric} in {runs[0].folder}"
                )
    if missing := [task for task in tasks if task not in by_task]:
        notes.append(f"no run alone has {listed(missing)}")
    return by_task


def _check_rows(columns: Sequence[Joint], alone_of: Mapping[str, Sequence[FinishedRun]], reader: Reader) -> None:
    """Raises UserError where two runs that are compared have other test rows."""
    for task, alone in alone_of.items():
        first = reader.rows(alone[0], task).keys
        joint = [run for column in columns for run in column.runs if task in run.tasks]
        for run in (*alone[1:], *joint):
            keys = reader.rows(run, task).keys
            if not np.array_equal(keys, first):
                equal = len({key.tobytes() for key in keys} & {key.tobytes() for key in first})
                sizes = f"{len(keys)} and {len(first)}, of which {equal} have the same texts and label"
                raise UserError(
                    f"task {task}: {run.folder} and {alone[0].folder} do not have the same test rows in the same order: {sizes}"
                )


def _cosines(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """{task: {other task: mean cosine of their gradients over steps and runs}}, the lowest first; {} where no run has them."""
    tasks = list(dict.fromkeys(task for run in runs for task in run.scores.get("test", {})))
    result: dict[str, dict[str, float]] = {}
    for task in tasks:
        means = {}
        for other in tasks:
            name = cosine_name(task, other)
            if other != task and (curves := [run.curves[name] for run in runs if name in run.curves]):
                means[other] = statistics.fmean(float(curve.values_N.mean()) for curve in curves)
        if means:
            result[task] = dict(sorted(means.items(), key=lambda item: item[1]))
    return result
