"""The README.md of an exported model: how it is used, what was trained on which data, what the audit found, the licence.

It says what stands in the files of the run, and no row of its data. A private run gives no hashes and no counts of its rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tabulate

from mtl_jax.audit import at_start, earlier_runs
from mtl_jax.audit.copies import KINDS
from mtl_jax.core.errors import count
from mtl_jax.data.source import Source
from mtl_jax.data.units import size
from mtl_jax.experiment import rule_name
from mtl_jax.inference import card_snippets, front_matter
from mtl_jax.inference.front_matter import Base
from mtl_jax.models.trunk_output import pooling_of
from mtl_jax.sharing.base import Hard
from mtl_jax.tasks import Task
from mtl_jax.training import copy_scores
from mtl_jax.training import workdir as workdirs
from mtl_jax.training.experiment_json import COPIES
from mtl_jax.training.restore import TrainedRun
from mtl_jax.training.results import BASELINE_NAMES
from mtl_jax.transfer.adapters import Adapted

UNKNOWN_LICENCE = "unknown: look at the base model and the data"
SPLITS = ("train", "dev", "test")


class Files(NamedTuple):
    """What stands in the files of a run, beside its configuration.

    Attributes:
        data: data.json.
        results: results.json; None: the run is not finished.
        versions: versions.json; {} where there is none.
        audited: Whether the run looked for copies of held-out rows.
    """

    data: Mapping[str, Any]
    results: Mapping[str, Any] | None
    versions: Mapping[str, Any]
    audited: bool


def card(workdir: Path, run: TrainedRun, task: Task | None, raw: Mapping[str, Any]) -> str:
    """The text of the card.

    Args:
        workdir: The run's workdir.
        run: The run.
        task: The task whose head is in the directory; None: the trunk alone.
        raw: The config.json of the trunk.

    Raises:
        UserError: A file of the workdir is damaged.
    """
    files = Files(
        workdirs.read_json(workdir / "data.json") or {},
        workdirs.read_results(workdir),
        workdirs.read_json(workdir / "versions.json") or {},
        (workdir / earlier_runs.FILE).exists(),
    )
    base = front_matter.base_of(run, workdir)
    source = None if task is None else run.source(task.name)
    module = run.trunk.module.base if isinstance(run.trunk.module, Adapted) else run.trunk.module
    # The longest text in training, as rows of several texts are cut.
    length = run.experiment.batch.row_length // (1 if task is None else size(run.tasks_of_same_source(task.name)))
    usage = card_snippets.usage(task, source, length, pooling_of(module))
    head = "" if task is None else f" with the head of the task {task.name}, {_article(type(task).__name__)}"
    version = f" {files.versions['mtl_jax']}" if isinstance(files.versions.get("mtl_jax"), str) else ""
    name = run.experiment.name
    parts = [
        front_matter.of(run, base, usage, _hides(run)),
        f"# {name}{'' if task is None else f': {task.name}'}\n",
        f"Written by mtl_jax{version}: the trunk{head}, of the run {name}. The trunk is a {raw.get('model_type')} model.\n",
        usage.text,
        f"```python\n{usage.code}```\n",
        *_section("What was trained", _trained(run, files)),
        *_section("Data", _data(run, files)),
        *_section("Audit", _audit(run, files)),
        *_section("How it was trained", _training(run, files, base)),
        *_section("Licence", [_licence(base)]),
    ]
    return "\n".join(part for part in parts if part)


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}\n", *(f"{line}\n" for line in lines if line)] if any(lines) else []


def _hides(run: TrainedRun) -> bool:
    """Whether nothing may be said of the rows of a run."""
    return run.experiment.private or bool(run.experiment.optimizer.private.clip)


def _trained(run: TrainedRun, files: Files) -> list[str]:
    """The table of the tasks, and the rule that weighed their losses."""
    results = files.results
    scores: Mapping[str, Any] = {} if results is None else results["tasks"]
    baselines = (
        [] if _hides(run) else [kind for kind in BASELINE_NAMES if any(kind in scores[name]["baselines"] for name in scores)]
    )
    rows = []
    for task in run.tasks:
        of_task = scores.get(task.name)
        labels = f", {count(len(task.labels), 'label')}" if task.labels else ""
        values = [] if of_task is None else [of_task["test"], *(of_task["baselines"].get(kind, {}) for kind in baselines)]
        cells = [_score(value.get(task.metric), task.metric in value) for value in values]
        examples = [] if _hides(run) else [_train_examples(files, task.source)]
        rows.append([task.name, f"{type(task).__name__}{labels}", task.source, *examples, task.metric, *cells])
    measured = [] if results is None else ["test", *(BASELINE_NAMES[kind] for kind in baselines)]
    head = ["task", "kind", "source", *([] if _hides(run) else ["train examples"]), "metric", *measured]
    lines = [_table(head, rows)]
    if results is None:
        lines.append("The run is not finished: there are no test results.")
    else:
        lines += [copy_scores.line(name, of_task["metric"], [of_task]) for name, of_task in scores.items() if not _hides(run)]
    return [*lines, _weights(run)]


def _train_examples(files: Files, source: str) -> str:
    of_source = files.data.get("sources", {}).get(source, {})
    return f"{of_source['train']['examples']:,}" if "train" in of_source else ""


def _weights(run: TrainedRun) -> str:
    experiment = run.experiment
    options = {**experiment.weighting_options, **experiment.weights}
    given = f" ({', '.join(f'{name} {value}' for name, value in options.items())})" if options else ""
    around = f", {', '.join(experiment.combinators)}" if experiment.combinators else ""
    shared = (
        "" if isinstance(experiment.sharing, Hard) else f" The tasks share the trunk by {type(experiment.sharing).__name__}."
    )
    line = f"The losses are weighed by the rule {rule_name(experiment)}{given}{around}.{shared}"
    added = [f"{regulariser.name}, {_article(type(regulariser).__name__)}" for regulariser in experiment.regularisers]
    return line + (f" Regularisers: {'; '.join(added)}." if added else "")


def _data(run: TrainedRun, files: Files) -> list[str]:
    """The table of the sources, with the hashes of what was read."""
    splits: Mapping[str, Any] = files.data.get("sources", {})
    sources = [source for source in run.experiment.sources if source.name in splits]
    if _hides(run):
        return [
            "The run is private: nothing is said here of its rows.",
            _table(["source"], [[source.name] for source in sources]),
        ]
    rows = [
        [source.name, _origin(source), split, f"{parts[split]['examples']:,}", f"`{parts[split]['sha256']}`"]
        for source in sources
        for parts in [splits[source.name]]
        for split in SPLITS
        if split in parts
    ]
    note = "The SHA-256 is that of the tokens and labels of all examples, in order, as in data.json of the run."
    return [_table(["source", "from", "split", "examples", "SHA-256"], rows), note]


def _origin(source: Source) -> str:
    """Where the rows of a source are from, without a directory of this machine."""
    if not source.path:
        return "the script"
    named = source.path.startswith(("pip:", "data:", "tfds:")) or (
        source.path.startswith("hf:") and source.path[3:4] not in "./~"
    )
    return source.path if named else Path(source.path).name


def _audit(run: TrainedRun, files: Files) -> list[str]:
    """What the run found about copies of held-out rows, and what it changed in texts."""
    if _hides(run):
        return []
    record: Mapping[str, Any] = files.data.get(COPIES, {})
    overlaps, earlier = record.get("overlaps", []), record.get("earlier_runs", {})
    lines = []
    if overlaps:
        rows = [
            [
                entry["train_source"],
                entry["source"],
                entry["split"],
                f"{entry['of']:,}",
                *(f"{entry['rows'][kind]:,}" for kind in KINDS),
            ]
            for entry in overlaps
        ]
        lines += [
            "Held-out rows of which training rows are copies: the same text; the same letters and digits; near copies.",
            _table(["training rows of", "held-out rows of", "split", "rows", *KINDS], rows),
        ]
    elif files.audited and not _too_many(files):
        lines.append("No training row was found that is a copy of a held-out row.")
    else:
        lines.append("The run has no record of a search for training rows that are copies of held-out rows.")
    for name, number in record.get("dropped", {}).items():
        lines.append(f"{count(number, 'training row')} of {name} left out as copies.")
    for number, of_run in enumerate(earlier.values(), start=1):
        which = "an earlier run that it learned from" if len(earlier) == 1 else f"earlier run {number} that it learned from"
        for name, by_split in of_run.items():
            for split, kinds in by_split.items():
                lines.append(
                    f"{count(sum(kinds.values()), f'{split} row')} of {name} are probably copies of training rows of {which}."
                )
    for name, types in files.data.get("deidentified", {}).items():
        places = ", ".join(f"{number:,} {kind}" for kind, number in types.items())
        lines.append(f"Texts of {name} were de-identified: {places or 'nothing was found'}.")
    return lines


def _too_many(files: Files) -> bool:
    """Whether the rows of a run may have been too many to be compared at its start."""
    splits = [part for parts in files.data.get("sources", {}).values() for part in parts.values()]
    return sum(part["examples"] for part in splits) > at_start.MOST_ROWS


def _training(run: TrainedRun, files: Files, base: Base) -> list[str]:
    """Base model, phases, optimizer, batches, seed and versions."""
    experiment, results = run.experiment, files.results or {}
    optimizer, batch = experiment.optimizer, experiment.batch
    fresh = ", of which it has the sizes and the vocabulary only" if getattr(experiment.trunk, "fresh", False) else ""
    began = (
        f"The trunk began as {base.name}{fresh}."
        if base.name
        else f"The trunk is from scratch ({type(experiment.trunk).__name__})."
    )
    if experiment.init_from.path:
        began += f" Parameters were loaded from {Path(experiment.init_from.path).name}."
    merged = results.get("merged")
    if merged:
        began += f" {count(merged['sources'], 'run')} were merged by {merged['method']}."
    phases = [
        [phase.name, f"{phase.steps:,}", f"{optimizer.learning_rate if phase.learning_rate is None else phase.learning_rate:g}"]
        for phase in experiment.phases
    ]
    facts = [
        f"Optimizer {optimizer.name}, schedule {optimizer.schedule}",
        f"{count(batch.rows, 'row')} of {batch.row_length} tokens a batch",
    ]
    facts += [f"adapter {adapter.name} ({type(adapter).__name__})" for adapter in experiment.adapters]
    facts += [] if experiment.averaging == "none" else [f"averaging {experiment.averaging}"]
    facts += [] if _hides(run) else [f"seed {experiment.seed}"]  # from which the noise of private training follows
    dev = "" if run.dev is None else f", the best by the dev criterion {experiment.evaluation.criterion}"
    facts += [f"parameters of step {run.step:,}{dev}"]
    names = [name for name in ("mtl_jax", "jax", "flax", "optax") if name in files.versions]
    versions = ", ".join(f"{name} {files.versions[name]}" for name in names)
    devices = f" on {files.versions['devices']}" if "devices" in files.versions else ""
    trained = [_table(["phase", "steps", "learning rate"], phases), f"{'; '.join(facts)}."]
    lines = [began, *([] if merged else trained)]
    lines.append(f"Versions: {versions}{devices}." if versions else "")
    return [*lines, _privacy(results)]


def _privacy(results: Mapping[str, Any]) -> str:
    if "privacy" not in results:
        return ""
    privacy = results["privacy"]
    if privacy["epsilon"] is None:
        return "Trained with clipped and noisy gradients; no privacy is guaranteed."
    return f"Differentially private: epsilon {privacy['epsilon']:.3g} at delta {privacy['delta']:g}, {privacy['unit']}."


def _licence(base: Base) -> str:
    if not base.licence:
        return f"{UNKNOWN_LICENCE}.".capitalize()
    return f"{base.licence}, which is that of {base.name}; look at the licences of the data, too."


def _score(value: Any, measured: bool) -> str:
    if not measured:
        return ""
    return "undefined" if value is None or math.isnan(value) else f"{value:.4f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return tabulate.tabulate(cells, head, tablefmt="github", disable_numparse=True)


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
