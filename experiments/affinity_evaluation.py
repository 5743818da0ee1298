"""The tables and the figure of affinity_matrix.py, from the content of its matrix.json."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tabulate

from mtl_jax import affinity
from mtl_jax.affinity import estimators
from mtl_jax.affinity.trials import MEASURES, Trial
from mtl_jax.core import plotting
from mtl_jax.core.files import write_bytes

ALONE, COMBINATION, ONE_SEED = "alone", "combination", "scores of one seed"
RANDOM_ORDERS = 50
# {part of the seconds of estimates: the inputs that it is spent on}
INPUTS = {
    "features": ("features", "probabilities", "source_labels"),
    "source texts": ("source_base_features", "source_texts"),
    "source features": ("source_features",),
    "embeddings": ("embedding", "source_embedding"),
}


def trials_of(content: dict[str, Any]) -> list[Trial]:
    """The trials in a matrix.json."""
    result = []
    for target, by_size in content["scores"].items():
        for size, by_source in by_size.items():
            for place, seed in enumerate(content["settings"]["seeds"]):
                estimates_by_name = {
                    name: {
                        source: numbers[place]
                        for source, numbers in by_target.get(target, {}).get(size, {}).items()
                        if numbers[place] is not None
                    }
                    for name, by_target in content["estimates"].items()
                }
                scores = {source: numbers[place] for source, numbers in by_source.items() if source != ALONE}
                result.append(Trial(target, size, seed, scores, estimates_by_name))
    return result


def measured(trials: Sequence[Trial]) -> dict[str, dict[str, affinity.Measured]]:
    """{estimator: {measure: its mean and interval}}, with combinations and the limits of what can be reached."""
    names = list(dict.fromkeys(name for trial in trials for name in trial.estimates))
    targets = {trial.target for trial in trials}
    if len(targets) > 2:
        trials = affinity.combined(trials, COMBINATION, names)
        trials = affinity.other_targets(trials)
    result = affinity.measure(trials)
    random = np.random.default_rng(0)
    names = [str(number) for number in range(RANDOM_ORDERS)]
    orders = [
        dataclasses.replace(trial, estimates={name: {source: random.random() for source in trial.scores} for name in names})
        for trial in trials
    ]
    by_order = affinity.measure(orders, resamples=0).values()
    means = {what: float(np.mean([values[what].value for values in by_order])) for what in MEASURES}
    result["random"] = {what: affinity.Measured(mean, math.nan, math.nan, len(targets)) for what, mean in means.items()}
    return result | _of_one_seed(trials)


def _of_one_seed(trials: Sequence[Trial]) -> dict[str, dict[str, affinity.Measured]]:
    """The scores of one seed as the estimate of the mean over the others: what the noise of the matrix allows."""
    seeds = sorted({trial.seed for trial in trials})
    if len(seeds) < 2:
        return {}
    cases = {(trial.target, trial.setting, trial.seed): trial.scores for trial in trials}
    parts = []
    for seed in seeds:
        others = [
            dataclasses.replace(trial, estimates={ONE_SEED: cases[trial.target, trial.setting, seed]})
            for trial in trials
            if trial.seed != seed
        ]
        parts.append(affinity.measure(others, resamples=0)[ONE_SEED])
    mean = {what: float(np.mean([part[what].value for part in parts])) for what in MEASURES}
    targets = len({trial.target for trial in trials})
    return {ONE_SEED: {what: affinity.Measured(value, math.nan, math.nan, targets) for what, value in mean.items()}}


def evaluate(content: dict[str, Any]) -> str:
    """The table of estimators, over all sizes and for each size, and the costs."""
    trials = trials_of(content)
    together = measured(trials)
    costs = _costs(content)
    heads = ["", "regret@1 %", "regret@3 %", "nDCG", "Spearman", "targets", "seconds a pair", "share of the matrix"]
    order = sorted(together, key=lambda name: -together[name]["nDCG"].value)
    rows = []
    for name in order:
        measures = together[name]
        cells = [_cell(what, measures[what]) for what in MEASURES]
        rows.append([name, *cells, measures["nDCG"].targets, *costs.get(name, ("", ""))])
    lines = [tabulate.tabulate(rows, heads, tablefmt="github", disable_numparse=True)]
    sizes = list(dict.fromkeys(trial.setting for trial in trials))
    by_size = [measured([trial for trial in trials if trial.setting == size]) for size in sizes]
    columns = ("regret@1", "regret@3", "nDCG")
    heads = ["", *(f"{what}, {size} rows" for size in sizes for what in columns)]
    rows = [[name, *(f"{_shown(what, values[name][what].value)}" for values in by_size for what in columns)] for name in order]
    lines += ["", tabulate.tabulate(rows, heads, tablefmt="github", disable_numparse=True)]
    seconds, trainings = content["seconds"], content["trainings"]
    spent = sum(value for name, value in seconds.items() if name.startswith("estimates/"))
    lines += [
        "",
        f"{trainings['targets']} trainings of targets in {seconds['targets']:.0f} s and {trainings['sources']} of sources in "
        f"{seconds['sources']:.0f} s; all estimates in {spent:.0f} s.",
        f"Rows of sources left out as copies of targets' training rows: {_copies(content['copies'])}.",
    ]
    return "\n".join(lines)


def _copies(copies: dict[str, dict[str, int]]) -> str:
    parts = [f"{number} of {source} in {target}" for source, by in copies.items() for target, number in by.items()]
    return ", ".join(parts) or "none"


def _shown(what: str, value: float) -> str:
    return "" if not math.isfinite(value) else f"{value:.2f}" if what == "Spearman" else f"{100 * value:.1f}"


def _cell(what: str, value: affinity.Measured) -> str:
    ends = f" [{_shown(what, value.low)}, {_shown(what, value.high)}]" if math.isfinite(value.low) else ""
    return f"{_shown(what, value.value)}{ends}"


def _costs(content: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """{estimator: seconds for a pair of tasks, and the share of the targets' trainings}, inputs included."""
    seconds, seeds = content["seconds"], len(content["settings"]["seeds"])
    sizes = [scores for by_size in content["scores"].values() for scores in by_size.values()]
    pairs = seeds * sum(len(scores.keys() - {ALONE}) for scores in sizes)
    result = {}
    whole = 0.0
    for name in content["estimates"]:
        needed = estimators.reads(name, affinity.ESTIMATORS[name])
        inputs = {part for what in needed for part, names in INPUTS.items() if what in names}
        spent = seconds[f"estimates/{name}"]
        whole += spent
        result[name] = _cost(spent + sum(seconds[f"estimates/{part}"] for part in inputs), pairs, seconds["targets"])
    result[COMBINATION] = _cost(whole + sum(seconds[f"estimates/{part}"] for part in INPUTS), pairs, seconds["targets"])
    return result


def _cost(spent: float, pairs: int, whole: float) -> tuple[str, str]:
    return f"{spent / pairs:.3f}", f"{100 * spent / whole:.1f} %"


def draw(content: dict[str, Any], path: Path) -> None:
    """A heat map for each size: the target's score with a source minus the score alone, x 100, mean over seeds."""
    from matplotlib.figure import Figure

    scores, settings = content["scores"], content["settings"]
    sizes, sources, targets = settings["sizes"], settings["sources"], list(scores)
    figure = Figure(figsize=(5 * len(sizes), 4.4), layout="constrained")
    panels = figure.subplots(1, len(sizes), squeeze=False)[0]
    gains = np.full((len(sizes), len(sources), len(targets)), math.nan)
    for number, row, column in np.ndindex(*gains.shape):
        reached = scores[targets[column]][str(sizes[number])]
        if sources[row] in reached:
            gains[number, row, column] = 100 * (np.mean(reached[sources[row]]) - np.mean(reached[ALONE]))
    most = float(np.nanmax(np.abs(gains)))
    for axes, size, table in zip(panels, sizes, gains, strict=True):
        image = axes.imshow(table, cmap="RdBu", vmin=-most, vmax=most)
        axes.set(title=f"targets with {size} rows", ylabel="source")
        axes.set_xticks(range(len(targets)), targets, rotation=60, ha="right")
        axes.set_yticks(range(len(sources)), sources)
        for row, column in np.ndindex(*table.shape):
            if math.isfinite(table[row, column]):
                dark = "white" if abs(table[row, column]) > 0.6 * most else "black"
                axes.text(column, row, f"{table[row, column]:.1f}", ha="center", va="center", fontsize=6, color=dark)
    figure.colorbar(image, ax=panels, label="gain over the target alone, score x 100", shrink=0.8)
    write_bytes(path, plotting.png(figure))
