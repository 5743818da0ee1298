"""The report of an ablation, or of ordinary runs: a page, a tidy table, statistics and figures."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from mtl_jax.core import locks
from mtl_jax.core.errors import UserError
from mtl_jax.core.files import write_json, write_text, writing
from mtl_jax.report.study import ABLATION
from mtl_jax.report.study import read as read


def find(patterns: Sequence[str]) -> list[Path]:
    """The workdirs that paths and patterns name: of a pattern, the runs among what fits it.

    Raises:
        UserError: No run fits a pattern.
    """
    found: list[Path] = []
    for pattern in patterns:
        fitting = [Path(pattern)]
        if glob.has_magic(pattern) and not fitting[0].exists():
            fitting = [Path(path) for path in sorted(glob.glob(pattern)) if (Path(path) / "config.json").exists()]
            if not fitting:
                raise UserError(f"{pattern}: no workdir of a run is there")
        found += fitting
    return found


def default_output(workdirs: Sequence[Path]) -> Path:
    """The ablation's own directory; of ordinary runs, report/ where the command is given."""
    return workdirs[0] if len(workdirs) == 1 and (workdirs[0] / ABLATION).exists() else Path("report")


def write(source: str | Path | Sequence[str | Path], out: str | Path, *, patience: float = 0.0) -> Path:
    """Writes report.html, ablation.csv, results.json and figures/*.png; the same runs give the same bytes.

    Files of an earlier report are replaced, each whole.

    Args:
        source: One ablation, or workdirs of ordinary runs.
        out: Where to; may be the ablation itself, but no workdir of a run, which has results of its own.
        patience: For how many seconds to wait for a process that writes a report there.

    Returns:
        The path of report.html.

    Raises:
        UserError: What is given is no workdir, the runs cannot be compared, `out` cannot be written, or another process writes
            a report there.
    """
    from mtl_jax.report import page, render, sections, statistics, tables  # imported late: matplotlib and scipy take a while

    study = read([Path(each) for each in ([source] if isinstance(source, (str, Path)) else source)])
    out = Path(out)
    if (out / "config.json").exists() and not (out / ABLATION).exists():
        raise UserError(f"{out}: the workdir of a run, whose results.json would be lost; choose another --output")
    with writing(out, "choose another --output"):
        (out / "figures").mkdir(parents=True, exist_ok=True)
    groups = statistics.groups(study)
    comparison = statistics.compare(study, groups)
    parts = sections.sections(study, groups, comparison)
    with locks.report(out, patience):
        for figure in sections.drawn(parts):
            render.png(figure, out / "figures" / f"{figure.slug}.png")
        write_text(out / "ablation.csv", tables.to_csv(study))
        write_json(out / "results.json", tables.to_json(study, groups, comparison))
        text = page.html(f"{study.name}: report", study.command, sections.facts(study), parts, sections.footer(study))
        write_text(out / "report.html", text)
    return out / "report.html"
