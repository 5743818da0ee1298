"""What the page holds, in order; a part for which there is no data is not there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mtl_jax.report import curves, figures, formatting, tables
from mtl_jax.report.page import Cell, Section, Table, number, spread
from mtl_jax.report.render import Figure
from mtl_jax.report.statistics import Comparison, Group, Spread, criterion, leading, ranked, ties
from mtl_jax.report.study import SPLITS, Study
from mtl_jax.training.results import BASELINE_NAMES

BEST = 5
WEIGHTS = 4  # of more tasks than that they share one column


def sections(study: Study, groups: Sequence[Group], comparison: Comparison | None) -> list[Section]:
    """The page's parts."""
    found = [_result(study, groups[0])] if len(groups) == 1 else [*_best(study, groups), _settings(study, groups)]
    if comparison is not None:
        found.append(_methods(study, comparison))
    drawn = [
        *figures.against(study, groups),
        *figures.fronts(study, groups),
        *figures.simplex(study, groups),
        *curves.learning(study, groups),
        *curves.weights(study, groups),
        *curves.agreement(study, groups),
    ]
    found += [Section(figure.slug, figure.title, [figure]) for figure in drawn]
    return [*found, _tried(study)]


def drawn(found: Sequence[Section]) -> list[Figure]:
    """The figures among the parts."""
    return [part for section in found for part in section.parts if isinstance(part, Figure)]


def facts(study: Study) -> list[tuple[str, str]]:
    """(what, how much) at the head of the page."""
    done = sum(run.done for run in study.runs)
    diverged = sum(run.diverged for run in study.runs)
    programs = sum(program.get(part, 0.0) for program in study.programs for part in ("compile_seconds", "seconds"))
    seconds = programs or sum(run.facts.get("seconds", 0.0) for run in study.runs)
    seeds = len({run.seed for run in study.runs})
    found = [_fact(len(study.runs), "run")]
    unfinished = len(study.runs) - done - diverged
    if done < len(study.runs):
        found.append(("done", str(done)))
    found += [(what, str(number)) for what, number in (("diverged", diverged), ("unfinished", unfinished)) if number]
    found += [_fact(len(study.programs), "program")] if study.programs else []
    found += [_fact(seeds, "seed"), _fact(len(study.tasks), "task"), ("time", formatting.duration(seconds))]
    return [*found, *([("devices", study.devices)] if study.devices else [])]


def _fact(number: int, noun: str) -> tuple[str, str]:
    much, _, what = formatting.count(number, noun).partition(" ")
    return what, much


def footer(study: Study) -> str:
    """Versions, in one line."""
    return "Made by mtl-jax report. Runs with " + ", ".join(f"{name} {own}" for name, own in study.versions.items()) + "."


def _result(study: Study, group: Group) -> Section:
    """One setting: a row for each task."""
    baselines = _baselines(study)
    kinds = [kind for kind in BASELINE_NAMES if any(kind in own for own in baselines.values())]
    rows = []
    for task, metric in study.tasks.items():
        own = baselines.get(task, {})
        compared = [number(own[kind].get(metric) if kind in own else None) for kind in kinds]
        dev, test = (spread(group.scores[split].get(task, {}).get(metric), top=split == "test") for split in SPLITS)
        rows.append([Cell(task, after=metric), test, *compared, dev])
    head = [("task", ""), ("test", ""), *((BASELINE_NAMES[kind], "test") for kind in kinds), ("dev", "")]
    seeds = len(group.done())
    note = f"Mean and standard deviation over {formatting.count(seeds, 'seed')}. " if seeds > 1 else ""
    unfinished = "" if seeds else "No run has come to its end. "
    return Section(
        "result", "Result", [f"{unfinished}{note}Of the checkpoint that is best on dev.", Table("Result", head, rows)]
    )


def _best(study: Study, groups: Sequence[Group]) -> list[Section]:
    order = ranked(groups)[:BEST]
    if not order:
        return []
    note = f"By the dev criterion ({study.criterion}), the mean over the seeds; test is only reported, not chosen by. "
    return [Section("best", "The best", [note + _tied(groups), _table(study, "The best settings", order, best=True)])]


def _tied(groups: Sequence[Group]) -> str:
    """What is not told apart from the best."""
    criteria = [group.criterion for group in groups if group.criterion]
    best = leading(criteria)
    tied = sum(best is not None and ties(found, best) for found in criteria)
    told = f"{formatting.count(tied, 'setting')} tie for the best" + (f", of which {BEST} are shown" if tied > BEST else "")
    if all(found.sd is None for found in criteria):
        return "Of one seed there is no deviation, so that only equal numbers tie" + (f": {told}." if tied > 1 else ".")
    if tied == 1:
        return "The others are more than one standard deviation below the first."
    return f"{told}: within one standard deviation of it, the larger of the two."


def _settings(study: Study, groups: Sequence[Group]) -> Section:
    note = (
        "Test metrics, mean and standard deviation over the seeds of runs that came to their end; bold is the best of a "
        "column, and what ties with it: within one standard deviation, the larger of the two. Press a heading to sort."
    )
    order = [*ranked(groups), *(group for group in groups if group.criterion is None)]
    remarks = [f"Program {each['program']}: {each['remark']}." for each in study.programs if each.get("remark")]
    return Section("settings", "All settings", [note, *remarks, _table(study, "All settings", order)])


def _table(study: Study, name: str, order: Sequence[Group], best: bool = False) -> Table:
    columns = _columns(study)
    scores = {
        task: {id(group): found for group in order if (found := group.scores["test"].get(task, {}).get(metric))}
        for task, metric in study.tasks.items()
    }
    decimals = {task: formatting.digits(list(own.values())) for task, own in scores.items()}
    top = {task: leading(own.values()) for task, own in scores.items()}
    criteria = [group.criterion for group in order if group.criterion]
    first = leading(criteria)
    rows = []
    for group in order:
        row = _values(group.values, columns)
        row.append(spread(group.criterion, formatting.digits(criteria), top=_leads(group.criterion, first)))
        for task in study.tasks:
            found = scores[task].get(id(group))  # among the best on dev the highest on test is not said to be better
            row.append(spread(found, decimals[task], top=not best and _leads(found, top[task])))
        done = len(group.done())
        row.append(
            Cell(formatting.runs(group), None, after=f"{done} of {len(group.runs)} done" if done < len(group.runs) else "")
        )
        rows.append(row)
    head = [*columns.values(), ("dev criterion", ""), *study.tasks.items(), ("runs", "")]
    return Table(name, head, rows, () if best else _below(study, len(columns)), sortable=not best)


def _leads(found: Spread | None, best: Spread | None) -> bool:
    return found is not None and best is not None and ties(found, best)


def _columns(study: Study) -> dict[str, tuple[str, str]]:
    """{column: its heading} of the varied fields; many weights share one column."""
    found: dict[str, tuple[str, str]] = {}
    for field in study.fields:
        own = tables.columns(study, field)
        if len(own) > WEIGHTS:
            found[field] = (field, "\N{NO-BREAK SPACE}/ ".join(column.removeprefix(f"{field}.") for column in own))
        else:
            whole = own == [field]
            found |= {column: (column, "") if whole else (column.removeprefix(f"{field}."), "weight") for column in own}
    return found


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
    """The baselines, below the settings."""
    baselines = _baselines(study)
    rows = []
    for kind, name in BASELINE_NAMES.items():
        if any(kind in own for own in baselines.values()):
            values = [number(baselines.get(task, {}).get(kind, {}).get(metric)) for task, metric in study.tasks.items()]
            rows.append([Cell(name), *[Cell("", "")] * columns, *values, Cell("", "")])
    return rows


def _baselines(study: Study) -> dict:
    return {task: own for run in reversed(study.runs) for task, own in run.baselines.items()}


def _value(found: object) -> Cell:
    if isinstance(found, (int, float)) and not isinstance(found, bool):
        return Cell(formatting.value(found), found, "n")
    return Cell(formatting.value(found), "" if found in (None, "", [], {}) else None)


def _methods(study: Study, comparison: Comparison) -> Section:
    others = [field for field in study.fields if field != "weighting"]
    left_out = [task for task in study.tasks if task in comparison.left_out]
    note = (
        f"Of each weighting rule the setting that is best on dev. Relative change of the mean test metric against "
        f"{comparison.reference}, in percent, bold the best and what ties with it; rank among the "
        f"{formatting.count(len(comparison.methods), 'rule')}, 1 the best, mean over the tasks."
    )
    if left_out:
        note += f" {', '.join(left_out)}: the reference is not above 0, so nothing is relative to it."
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


def _tried(study: Study) -> Section:
    """Every run, what became of it, and how long it took."""
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
        parts.append(f"{formatting.count(diverged, 'run')} diverged, which counts in no mean.")
    parts.append(Table("Every run", head, rows))
    if study.programs:
        parts += ["The programs that they were trained in:", _programs(study)]
    return Section("tried", "What was tried", parts)


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
