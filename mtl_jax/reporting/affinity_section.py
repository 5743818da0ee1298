"""The section on which tasks help which, from a file that mtl-jax affinity --json wrote."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtl_jax.core.errors import UserError
from mtl_jax.core.files import number_of, parse_json
from mtl_jax.core.json_shapes import list_of, mapping, number, object_of, text, whole
from mtl_jax.reporting import formatting
from mtl_jax.reporting.heat_maps import heat_map
from mtl_jax.reporting.page import Cell, Section, Table
from mtl_jax.reporting.page import number as number_cell
from mtl_jax.reporting.render import Figure
from mtl_jax.reporting.study import Study

FLAG = "--affinity"
_ESTIMATES = mapping(mapping(list_of(object_of({"source": text, "value": number}))))
_SHAPE = object_of(
    {"rankings": _ESTIMATES, "places": mapping(mapping(number)), "seconds": mapping(number)},
    advice=mapping(object_of({"source": text, "way": text})),
    copies=mapping(mapping(object_of({"rows": mapping(whole), "of": whole}))),
)


def read(path: str | Path) -> dict[str, Any]:
    """The content of a file of mtl-jax affinity --json.

    Raises:
        UserError: It cannot be read, or another program wrote it.
    """
    try:
        content = parse_json(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{FLAG} {path}: it cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{FLAG} {path}: it is not JSON; give a file that mtl-jax affinity --json wrote") from error
    if problem := _SHAPE(content):
        raise UserError(f"{FLAG} {path}: {problem.strip()}; give a file that mtl-jax affinity --json wrote")
    return content


def section(content: Mapping[str, Any], study: Study) -> Section:
    """Heat maps of sources and targets and of the estimators' agreement, copies, and costs.

    Args:
        content: The result of read().
        study: The study, for the seconds of a training.
    """
    targets = list(content["places"])
    sources = list(dict.fromkeys(source for places in content["places"].values() for source in places))
    places = np.array(
        [[number_of(content["places"][target].get(source)) for target in targets] for source in sources], np.float64
    ).reshape(len(sources), len(targets))
    parts: list[str | Table | Figure] = [
        "Estimates made before the training, from some training rows of each task. They are no proof: the runs below are."
    ]
    if copies := _copies(content):
        parts += ["Texts that a source shares with a target; such a source looks better than it is.", copies]
    if places.size:
        panel = heat_map("sources for targets", sources, targets, places, (0.0, 1.0), colours="viridis")
        caption = "The mean place of a source over all estimators, for each target: 0 is always first, 1 always last."
        parts += [Figure("affinity", "Which tasks help which", caption, (panel,)), _advice(content)]
    names, agreement = _agreement(content)
    if len(names) > 1:
        panel = heat_map("estimators", names, names, agreement, (-1.0, 1.0), colours="RdBu")
        caption = "Rank correlation of the sources between two estimators, averaged over the targets that both rank."
        parts.append(Figure("estimators", "Agreement of the estimators", caption, (panel,)))
    return Section("affinity", "Which tasks help which", [*parts, _costs(content, study)])


def _copies(content: Mapping[str, Any]) -> Table | None:
    rows = []
    for target, by_source in content.get("copies", {}).items():
        for source, copied in by_source.items():
            kinds = ", ".join(f"{number} {kind}" for kind, number in copied["rows"].items() if number)
            share = f"{sum(copied['rows'].values()):,} of {copied['of']:,}" if kinds else "the same rows"
            rows.append([Cell(target), Cell(source), Cell(share), Cell(kinds)])
    return (
        Table("Copies", [("target", ""), ("source", ""), ("training rows", "of the source"), ("kind", "")], rows)
        if rows
        else None
    )


def _advice(content: Mapping[str, Any]) -> Table:
    rows = [[Cell(target), Cell(advice["source"]), Cell(advice["way"])] for target, advice in content.get("advice", {}).items()]
    return Table("The first source of each target", [("target", ""), ("first source", ""), ("training", "")], rows)


def _agreement(content: Mapping[str, Any]) -> tuple[list[str], np.ndarray]:
    """The estimators, and the mean Spearman correlation of each two over the targets, f64[E, E]."""
    from scipy import stats

    names = list(dict.fromkeys(name for ranking in content["rankings"].values() for name in ranking))
    values = {
        (target, name): {estimate["source"]: number_of(estimate["value"]) for estimate in estimates}
        for target, ranking in content["rankings"].items()
        for name, estimates in ranking.items()
    }
    table = np.full((len(names), len(names)), np.nan)
    for row, column in itertools.product(range(len(names)), repeat=2):
        known = []
        for target in content["rankings"]:
            first, second = (values.get((target, names[number]), {}) for number in (row, column))
            both = [source for source in first if source in second and np.isfinite(first[source] + second[source])]
            ranks = [stats.rankdata([numbers[source] for source in both]) for numbers in (first, second)]
            if len(both) > 2 and all(np.ptp(rank) > 0 for rank in ranks):
                known.append(float(np.corrcoef(*ranks)[0, 1]))
        table[row, column] = np.mean(known) if known else np.nan
    kept = [number for number in range(len(names)) if np.isfinite(table[number]).any()]
    return [names[number] for number in kept], table[np.ix_(kept, kept)]


def _costs(content: Mapping[str, Any], study: Study) -> Table:
    training = [run.facts["seconds"] for run in study.runs if run.done and "seconds" in run.facts]
    mean = float(np.mean(training)) if training else None
    seconds = {name: number_of(value) for name, value in content["seconds"].items()}
    rows: list[Sequence[Cell]] = []
    for name, value in [*seconds.items(), ("all", sum(seconds.values()))]:
        rows.append([Cell(name), number_cell(value, 1), number_cell(100 * value / mean if mean else None, 1)])
    below = f"{formatting.duration(mean)} each" if mean else "no run has finished"
    return Table("Costs", [("estimator, or input of estimators", ""), ("seconds", ""), ("% of one training", below)], rows)
