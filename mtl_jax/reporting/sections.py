"""The sections of the page, in order; a section without data is left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mtl_jax.audit.copies import KINDS
from mtl_jax.reporting import affinity_section, compare_section, curves, figures, formatting, heat_maps, tables
from mtl_jax.reporting.compared import Compared
from mtl_jax.reporting.page import Cell, Section, Table, number, spread
from mtl_jax.reporting.render import Figure
from mtl_jax.reporting.sharing_section import usage_sections
from mtl_jax.reporting.statistics import Comparison, Group, Spread, criterion, leading, ranked, ties
from mtl_jax.reporting.study import SPLITS, Study
from mtl_jax.training.copy_scores import NUMBERS, SCORES
from mtl_jax.training.results import BASELINE_NAMES

BEST = 5  # settings in the table of the best
WEIGHTS = 4  # most weights with separate columns; more share one column


def sections(
    study: Study,
    groups: Sequence[Group],
    comparison: Comparison | None,
    estimates: Mapping[str, Any] | None = None,
    compared: Compared | None = None,
) -> list[Section]:
    """All sections of the page.

    Args:
        study: The study.
        groups: Its settings.
        comparison: Of its weighting rules, if there are several.
        estimates: The content of a file of mtl-jax affinity --json, or None.
        compared: Joint runs against runs alone, or None.
    """
    parts = [_result(study, groups[0])] if len(groups) == 1 else [*_best(study, groups), _settings(study, groups)]
    parts += [] if compared is None else [compare_section.section(compared)]
    if comparison is not None:
        parts.append(_methods(study, comparison))
    drawn = [
        *figures.against(study, groups),
        *figures.fronts(study, groups),
        *figures.simplex(study, groups),
        *curves.learning(study, groups),
        *curves.weights(study, groups),
        *curves.agreement(study, groups),
        *heat_maps.conflicts(study, groups),
    ]
    parts += [Section(figure.slug, figure.title, [figure]) for figure in drawn]
    tasks_that_help = [] if estimates is None else [affinity_section.section(estimates, study)]
    parts += usage_sections(study, groups)
    return [*parts, *tasks_that_help, *_copies(study), *_labels(study), _all_runs(study)]


def _copies(study: Study) -> list[Section]:
    """Test scores without the test rows that are copies of training rows, of the runs that have some."""
    rows = []
    pairs = [(run, task) for run in study.runs for task in run.copies if task in study.tasks]
    for run, task in pairs:
        numbers, metric = run.copies[task][NUMBERS], study.tasks[task]
        scores = run.scores["test"][task], run.copies[task][SCORES]
        counts = [Cell(f"{numbers.get(kind, 0):.0f}", numbers.get(kind, 0), "n") for kind in (*KINDS, "rows")]
        rows.append([Cell(run.name), Cell(task, after=metric), *counts, *(number(score.get(metric)) for score in scores)])
    head = [
        ("run", ""),
        ("task", ""),
        *((kind, "copies") for kind in KINDS),
        ("rows", "of test"),
        ("test", "all"),
        ("test", "others"),
    ]
    note = "Some test rows are copies of training rows. The last column is the score on the other test rows."
    return [Section("copies", "Copies", [note, Table("Copies", head, rows)])] if rows else []


def _labels(study: Study) -> list[Section]:
    """The names of the tasks' labels; metrics such as f1:1 call a label as the data does."""
    rows = [
        [Cell(task), Cell(", ".join(f"{label} = {name}" for label, name in names.items()))]
        for task, names in study.labels.items()
        if task in study.tasks
    ]
    note = "Metrics such as f1:1 call labels as the data does."
    return (
        [Section("labels", "Names of labels", [note, Table("Names of labels", [("task", ""), ("labels", "")], rows)])]
        if rows
        else []
    )


def figures_of(sections: Sequence[Section]) -> list[Figure]:
    """The figures in sections."""
    return [part for section in sections for part in section.parts if isinstance(part, Figure)]


def facts(study: Study) -> list[tuple[str, str]]:
    """(name, value) of the facts at the top of the page."""
    done = sum(run.done for run in study.runs)
    diverged = sum(run.diverged for run in study.runs)
    programs = sum(program.get(part, 0.0) for program in study.programs for part in ("compile_seconds", "seconds"))
    seconds = programs or sum(run.facts.get("seconds", 0.0) for run in study.runs)
    seeds = len({run.seed for run in study.runs})
    entries = [_fact(len(study.runs), "run")]
    unfinished = len(study.runs) - done - diverged
    if done < len(study.runs):
        entries.append(("done", str(done)))
    entries += [(name, str(number)) for name, number in (("diverged", diverged), ("unfinished", unfinished)) if number]
    entries += [_fact(len(study.programs), "program")] if study.programs else []
    entries += [_fact(seeds, "seed"), _fact(len(study.tasks), "task"), ("time", formatting.duration(seconds))]
    return [*entries, *([("devices", study.devices)] if study.devices else [])]


def _fact(number: int, noun: str) -> tuple[str, str]:
    value, _, name = formatting.count(number, noun).partition(" ")
    return name, value


def footer(study: Study) -> str:
    """The versions that the runs used, in one line."""
    return (
        "Made by mtl-jax report. Runs with " + ", ".join(f"{name} {version}" for name, version in study.versions.items()) + "."
    )


def _result(study: Study, group: Group) -> Section:
    """The result of a single setting: a row for each task."""
    baselines = _baselines(study)
    kinds = [kind for kind in BASELINE_NAMES if any(kind in by_kind for by_kind in baselines.values())]
    rows = []
    for task, metric in study.tasks.items():
        by_kind = baselines.get(task, {})
        compared = [number(by_kind[kind].get(metric) if kind in by_kind else None) for kind in kinds]
        dev, test = (spread(group.scores[split].get(task, {}).get(metric), top=split == "test") for split in SPLITS)
        rows.append([Cell(task, after=metric), test, *compared, dev])
    head = [("task", ""), ("test", ""), *((BASELINE_NAMES[kind], "test") for kind in kinds), ("dev", "")]
    seeds = len(group.done())
    note = f"Mean and standard deviation over {formatting.count(seeds, 'seed')}. " if seeds > 1 else ""
    unfinished = "" if seeds else "No run has finished yet. "
    return Section(
        "result",
        "Result",
        [f"{unfinished}{note}Scores are those of the checkpoint that is best on dev.", Table("Result", head, rows)],
    )


def _best(study: Study, groups: Sequence[Group]) -> list[Section]:
    order = ranked(groups)[:BEST]
    if not order:
        return []
    note = f"Chosen by the dev criterion ({study.criterion}), averaged over the seeds; test scores are only reported. "
    return [Section("best", "The best", [note + _tied(groups), _table(study, "The best settings", order, best=True)])]


def _tied(groups: Sequence[Group]) -> str:
    """A sentence on the settings that tie with the best."""
    criteria = [group.criterion for group in groups if group.criterion]
    best = leading(criteria)
    tied = sum(best is not None and ties(criterion, best) for criterion in criteria)
    text = f"{formatting.count(tied, 'setting')} tie for the best" + (f", of which {BEST} are shown" if tied > BEST else "")
    if all(criterion.sd is None for criterion in criteria):
        return "One seed has no deviation, so only equal numbers tie" + (f": {text}." if tied > 1 else ".")
    if tied == 1:
        return "The others are more than one standard deviation below the first."
    return f"{text}: they are within one standard deviation of it, the larger of the two."


def _settings(study: Study, groups: Sequence[Group]) -> Section:
    note = (
        "Test metrics: mean and standard deviation over the seeds of finished runs. Bold marks the best of a column and "
        "those that tie with it: within one standard deviation, the larger of the two. Press a heading to sort."
    )
    order = [*ranked(groups), *(group for group in groups if group.criterion is None)]
    remarks = [f"Program {program['program']}: {program['remark']}." for program in study.programs if program.get("remark")]
    return Section("settings", "All settings", [note, *remarks, _table(study, "All settings", order)])


def _table(study: Study, name: str, order: Sequence[Group], best: bool = False) -> Table:
    columns = _columns(study)
    scores = {
        task: {id(group): score for group in order if (score := group.scores["test"].get(task, {}).get(metric))}
        for task, metric in study.tasks.items()
    }
    decimals = {task: formatting.digits(list(by_group.values())) for task, by_group in scores.items()}
    top = {task: leading(by_group.values()) for task, by_group in scores.items()}
    criteria = [group.criterion for group in order if group.criterion]
    first = leading(criteria)
    rows = []
    for group in order:
        row = _values(group.values, columns)
        row.append(spread(group.criterion, formatting.digits(criteria), top=_leads(group.criterion, first)))
        for task in study.tasks:
            score = scores[task].get(id(group))
            # Settings that were chosen on dev are not compared on test.
            row.append(spread(score, decimals[task], top=not best and _leads(score, top[task])))
        done = len(group.done())
        row.append(
            Cell(formatting.runs(group), None, after=f"{done} of {len(group.runs)} done" if done < len(group.runs) else "")
        )
        rows.append(row)
    head = [*columns.values(), ("dev criterion", ""), *study.tasks.items(), ("runs", "")]
    return Table(name, head, rows, () if best else _below(study, len(columns)), sortable=not best)


def _leads(score: Spread | None, best: Spread | None) -> bool:
    return score is not None and best is not None and ties(score, best)


def _columns(study: Study) -> dict[str, tuple[str, str]]:
    """{column: its heading and the line below it} of the varied fields; many weights share one column."""
    headings: dict[str, tuple[str, str]] = {}
    for field in study.fields:
        columns = tables.columns(study, field)
        if len(columns) > WEIGHTS:
            headings[field] = (field, "\N{NO-BREAK SPACE}/ ".join(column.removeprefix(f"{field}.") for column in columns))
        elif columns == [field]:
            headings[field] = (field, "")
        else:
            headings |= {column: (column.removeprefix(f"{field}."), "weight") for column in columns}
    return headings


def _values(values: Mapping[str, Any], columns: Iterable[str]) -> list[Cell]:
    cells = tables.cells(values)
    return [
        Cell(
            formatting.numbers(values[column]) if values[column] else formatting.NOTHING, None if values[column] else "", "wrap"
        )
        if column in values and column not in cells
        else _value(cells.get(column))
        for column in columns
    ]


def _below(study: Study, columns: int) -> list[list[Cell]]:
    """Rows of the baselines, below those of the settings."""
    baselines = _baselines(study)
    rows = []
    for kind, name in BASELINE_NAMES.items():
        if any(kind in by_kind for by_kind in baselines.values()):
            values = [number(baselines.get(task, {}).get(kind, {}).get(metric)) for task, metric in study.tasks.items()]
            rows.append([Cell(name), *[Cell("", "")] * columns, *values, Cell("", "")])
    return rows


def _baselines(study: Study) -> dict:
    return {task: by_kind for run in reversed(study.runs) for task, by_kind in run.baselines.items()}


def _value(value: object) -> Cell:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return Cell(formatting.value(value), value, "n")
    return Cell(formatting.value(value), "" if value in (None, "", [], {}) else None)


def _methods(study: Study, comparison: Comparison) -> Section:
    others = [field for field in study.fields if field != "weighting"]
    left_out = [task for task in study.tasks if task in comparison.left_out]
    note = (
        f"Each weighting rule with its setting that is best on dev. Changes are those of the mean test metric against "
        f"{comparison.reference}, in percent; bold marks the best and those that tie with it. Ranks are among the "
        f"{formatting.count(len(comparison.methods), 'rule')}, averaged over the tasks; 1 is the best."
    )
    if left_out:
        note += f" {', '.join(left_out)}: the reference is not above 0, so there is no relative change."
    rows = []
    best = leading(method.change for method in comparison.methods if method.change)
    for method in comparison.methods:
        top = _leads(method.change, best)
        changes = [number(method.changes.get(task), 1, plus=True) for task in study.tasks]
        setting = [Cell(formatting.setting(method.group.values, others))] if others else []
        rows.append(
            [Cell(method.name), spread(method.change, 2, plus=True, top=top), number(method.rank, 1), *changes, *setting]
        )
    head = [("method", ""), ("average change", "%"), ("rank", ""), *((task, "%") for task in study.tasks)]
    head += [("setting", "")] if others else []
    return Section("methods", "Methods", [note, Table("Methods", head, rows), *figures.methods(comparison)])


def _all_runs(study: Study) -> Section:
    """Every run with its status, its criterion and its time."""
    columns = _columns(study)
    timed = any("seconds" in run.facts for run in study.runs)
    rows = []
    for run in study.runs:
        row = [Cell(run.name), *_values(run.values, columns), _value(run.seed)]
        row.append(Cell(run.status, None, "bad wrap" if run.diverged else "wrap" if len(run.status) > 20 else ""))
        row += [number(criterion(study, run)), _value(run.facts.get("best_step")), _value(run.facts.get("steps"))]
        seconds = run.facts.get("seconds")
        at_once = run.facts.get("runs_at_once", 1)
        row += [_time(seconds, f"with {formatting.count(at_once - 1, 'other')}" if at_once > 1 else "")] if timed else []
        rows.append(row)
    head = [("run", ""), *columns.values(), ("seed", "")]
    head += [("status", ""), ("dev criterion", ""), ("best step", ""), ("steps", ""), *([("time", "")] if timed else [])]
    parts: list[str | Table | Figure] = []
    if diverged := sum(run.diverged for run in study.runs):
        parts.append(f"{formatting.count(diverged, 'run')} diverged and count in no mean.")
    parts.append(Table("Every run", head, rows))
    if study.programs:
        parts += ["The compiled programs that trained them:", _programs(study)]
    return Section("tried", "All runs", parts)


def _time(seconds: float | None, after: str = "") -> Cell:
    return Cell(formatting.NOTHING, "", "n") if seconds is None else Cell(formatting.duration(seconds), seconds, "n", after)


def _programs(study: Study) -> Table:
    rows = [
        [
            Cell(str(program["program"]), program["program"]),
            Cell(formatting.setting(program["fixed"], list(program["fixed"])), None, "wrap"),
            *(_value(program.get(name)) for name in ("runs", "chunks", "steps")),
            *(_time(program.get(name)) for name in ("compile_seconds", "seconds")),
        ]
        for program in study.programs
    ]
    head = ["program", "the same for all", "runs", "chunks", "steps", "compiling", "training"]
    return Table("Programs", [(name, "") for name in head], rows)
