"""Reports of an ablation or of ordinary runs: a page, a tidy table, statistics and figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mtl_jax.core import locks, log_lines
from mtl_jax.core.errors import UserError, count
from mtl_jax.core.files import write_json, write_text, writing
from mtl_jax.reporting.study import ABLATION
from mtl_jax.reporting.study import find as find
from mtl_jax.reporting.study import read as read


def report(*workdirs: str | Path, output: str | Path = "", affinity: str | Path = "", alone: Sequence[str | Path] = ()) -> Path:
    """Writes a report on an ablation, or on runs side by side; returns the path of its page, report.html.

    Args:
        workdirs: One ablation; or workdirs of runs with the same tasks, also as patterns such as "runs/*".
        output: The directory to write. Default: the ablation's workdir; for runs, report/.
        affinity: A file that mtl-jax affinity --json wrote, for a section on which tasks help which.
        alone: Workdirs of runs of one task each, for a section on which tasks the joint runs helped and hurt, as compare().

    Raises:
        UserError: As write().

    Examples:
        >>> page = mtl_jax.report("runs/tiny", output="report")
        >>> page.name
        'report.html'
    """
    log_lines.show()
    folders = find([str(workdir) for workdir in workdirs])
    if not folders:
        raise UserError("no workdir given")
    return write(folders, output or default_output(folders), affinity=affinity, alone=alone)


def best_setting(ablation: Path) -> str:
    """A line on the setting of an ablation that is best by the dev criterion, as its report has it.

    Args:
        ablation: Its workdir.
    """
    from mtl_jax.reporting import formatting, statistics  # imported late: scipy takes a while

    study = read([ablation])
    ranked = statistics.ranked(statistics.groups(study))
    if not ranked:
        return "no run has a dev criterion"
    best, criterion = ranked[0], ranked[0].criterion
    assert criterion is not None  # else it has no rank
    label = formatting.setting(best.values, study.fields)
    return f"best on dev: {label} ({study.criterion} {criterion.mean:.4f}, {count(criterion.n, 'seed')})"


def named(paths: Sequence[str]) -> dict[str, list[str]] | list[str]:
    """{name: paths} where paths are given as NAME=PATHS; else the paths.

    Raises:
        UserError: Some have a name and some have none.
    """
    pairs = [path.partition("=")[::2] if "=" in path and not Path(path).exists() else ("", path) for path in paths]
    if not any(name for name, _ in pairs):
        return list(paths)
    if unnamed := [path for name, path in pairs if not name]:
        raise UserError(f"--joint {unnamed[0]}: give every joint setting a name, as NAME=PATHS")
    by_name: dict[str, list[str]] = {}
    for name, path in pairs:
        by_name.setdefault(name, []).append(path)
    return by_name


def default_output(workdirs: Sequence[Path]) -> Path:
    """The directory of the ablation; for ordinary runs, report/ in the current directory."""
    return workdirs[0] if len(workdirs) == 1 and (workdirs[0] / ABLATION).exists() else Path("report")


def write(
    source: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    patience: float = 0.0,
    affinity: str | Path = "",
    alone: Sequence[str | Path] = (),
) -> Path:
    """Writes report.html, ablation.csv, results.json and figures/*.png; the same runs give the same bytes.

    Files of an earlier report are replaced; each is written whole or not at all.

    Args:
        source: One ablation, or workdirs of ordinary runs.
        out: The directory to write. It may be the ablation itself, but not the workdir of a run, which has a results.json.
        patience: Seconds to wait for a process that writes a report there.
        affinity: As for report().
        alone: As for report().

    Returns:
        The path of report.html.

    Raises:
        UserError: A source is not a workdir, the runs cannot be compared, `out` cannot be written, or another process writes
            a report there, the file of affinity is of another kind, or the runs cannot be compared with those alone.
    """
    from mtl_jax.reporting import (  # imported late: matplotlib and scipy take a while
        affinity_section,
        compare,
        page,
        render,
        sections,
        statistics,
        tables,
    )

    content = affinity_section.read(affinity) if affinity else None
    folders = [Path(path) for path in ([source] if isinstance(source, (str, Path)) else source)]
    study = read(folders)
    compared = compare.of_report(folders, alone) if alone else None
    out = Path(out)
    if (out / "config.json").exists() and not (out / ABLATION).exists():
        raise UserError(f"{out}: the workdir of a run, whose results.json would be lost; choose another --output")
    with writing(out, "choose another --output"):
        (out / "figures").mkdir(parents=True, exist_ok=True)
    groups = statistics.groups(study)
    comparison = statistics.compare(study, groups)
    parts = sections.sections(study, groups, comparison, content, compared)
    with locks.report(out, patience):
        for figure in sections.figures_of(parts):
            render.png(figure, out / "figures" / f"{figure.slug}.png")
        write_text(out / "ablation.csv", tables.to_csv(study))
        write_json(out / "results.json", tables.to_json(study, groups, comparison))
        text = page.html(f"{study.name}: report", study.command, sections.facts(study), parts, sections.footer(study))
        write_text(out / "report.html", text)
    return out / "report.html"
