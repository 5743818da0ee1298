"""What a run remembers of its training rows: membership inference by loss, and the exposure of its canaries.

Both look at the loss of each row under the best checkpoint, without dropout. The training rows are read again and must be those
that the run was trained on.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tabulate import tabulate

from mtl_jax.audit import at_start
from mtl_jax.audit.membership import FEWEST, Membership, exposure, membership, within_groups
from mtl_jax.core import log_lines
from mtl_jax.core.errors import UserError, count, unknown
from mtl_jax.core.row_texts import hiding_if
from mtl_jax.data import corpus as corpora
from mtl_jax.data import made_rows
from mtl_jax.data.batches import Batch, eval_batches
from mtl_jax.data.canaries import Maker
from mtl_jax.data.examples import Examples, read_examples
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.source import Source
from mtl_jax.tasks import Task
from mtl_jax.training import held_out as rows_held_out
from mtl_jax.training import workdir as workdirs
from mtl_jax.training.forward import encode_tokens, needed_fields
from mtl_jax.training.restore import TrainedRun, open_run

LENGTH_GROUPS = 4


class Exposure(NamedTuple):
    """What a task's loss tells of a source's canaries.

    Attributes:
        exposures: Of each canary, in bits: from 0, the least likely of all candidates, to log2 of the candidates and one.
        candidates: Rows that each is compared with.
        repeats: How often each was planted.
    """

    exposures: list[float]
    candidates: int
    repeats: int


class Memorisation(NamedTuple):
    """What a run remembers.

    Attributes:
        step: The step of its checkpoint.
        memberships: {task: {score: Membership}}. loss: minus the loss; label or length: beside rows of the same label, or of a
            similar length; reference: beside the loss of the reference run.
        exposures: {task: Exposure}, of tasks whose source has canaries.
        losses: {task: {"train" and the held-out split: mean loss}}.
    """

    step: int
    memberships: dict[str, dict[str, Membership]]
    exposures: dict[str, Exposure]
    losses: dict[str, dict[str, float]]

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "step": self.step,
            "losses": self.losses,
            "memberships": {
                task: {score: value._asdict() for score, value in scores.items()} for task, scores in self.memberships.items()
            },
            "exposures": {task: value._asdict() for task, value in self.exposures.items()},
        }

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """Two tables: membership by task and score, and the canaries of each task."""
        rows = []
        for task, scores in self.memberships.items():
            train, held_out = (f"{loss:.3f}" for loss in self.losses[task].values())
            for number, (score, value) in enumerate(scores.items()):
                rate = "" if value.true_positives is None else f"{value.true_positives:.3f}"
                interval = f"{value.low:.3f} to {value.high:.3f}"
                first = [task, train, held_out] if number == 0 else ["", "", ""]
                rows.append([*first, score, f"{value.auc:.3f}", interval, rate])
        heads = ["task", "train loss", "held-out loss", "score", "AUC", "95 % interval", "TPR at 1 % FPR"]
        lines = [tabulate(rows, heads, "github", disable_numparse=True)]
        if self.exposures:
            cells = [
                [
                    task,
                    len(value.exposures),
                    value.repeats,
                    f"{np.mean(value.exposures):.2f}",
                    f"{max(value.exposures):.2f}",
                    f"{np.log2(value.candidates + 1):.2f}",
                ]
                for task, value in self.exposures.items()
            ]
            heads = ["task", "canaries", "planted", "mean exposure", "highest", "most possible"]
            lines += ["", tabulate(cells, heads, "github", disable_numparse=True)]
        return "\n".join(lines)


def memorisation(
    workdir: str | Path,
    tasks: Sequence[str] = (),
    *,
    reference: str | Path = "",
    held_out: str = "test",
    rows: int = 2000,
    candidates: int = 255,
    resamples: int = 500,
    seed: int = 0,
    sources: Sequence[Source] = (),
) -> Memorisation:
    """How well the losses of a run tell its training rows from held-out rows, and how much it knows about its canaries.

    Args:
        workdir: A workdir that has at least one evaluated checkpoint.
        tasks: Names of its tasks; (): all.
        reference: The workdir of a run with the same tasks that was not trained on these rows, whose losses are compared with
            these; "": none.
        held_out: The rows that it was not trained on: test or dev.
        rows: The most rows of each side, chosen at random.
        candidates: The rows that could have been planted, for each canary.
        resamples: Bootstrap samples for the intervals.
        seed: Of the chosen rows and the samples.
        sources: In place of those in config.json, where a script gave their rows.

    Raises:
        UserError: The run has no checkpoint, its rows cannot be read or have changed since, or they are too few.

    Examples:
        >>> result = mtl_jax.memorisation("runs/tiny", ["coarse"])
        >>> list(result.memberships["coarse"])
        ['loss', 'label']
        >>> print(result)
        | task ...
    """
    log_lines.show()
    if held_out not in ("test", "dev"):
        raise unknown("held_out", held_out, ("test", "dev"))
    for name, number, least in (
        ("rows", rows, FEWEST),
        ("candidates", candidates, 1),
        ("resamples", resamples, 0),
        ("seed", seed, 0),
    ):
        if number < least:
            raise UserError(f"{name} is {number}; it must be at least {least}")
    run = open_run(Path(workdir))
    other = open_run(Path(reference)) if reference else None
    return _measured(run, other, Path(workdir), tasks, held_out, rows, candidates, resamples, seed, tuple(sources))


@hiding_if(lambda run, other, *_: run.experiment.private or (other is not None and other.experiment.private))
def _measured(
    run: TrainedRun,
    other: TrainedRun | None,
    workdir: Path,
    tasks: Sequence[str],
    held_out: str,
    rows: int,
    candidates: int,
    resamples: int,
    seed: int,
    sources: tuple[Source, ...],
) -> Memorisation:
    """As memorisation(), of runs that are open; no text of a private one is shown."""
    chosen = [run.task(name) for name in tasks] or list(run.tasks)
    if compared := [task.name for task in chosen if task.compares_examples]:
        raise UserError(f"{workdir}: the loss of task {compared[0]!r} is not one of single rows; name other tasks")
    if other is not None:
        for task in chosen:
            other.task(task.name)
    sides = _rows_of(run, workdir, held_out, sources)
    memberships: dict[str, dict[str, Membership]] = {}
    exposures: dict[str, Exposure] = {}
    losses: dict[str, dict[str, float]] = {}
    for task in chosen:
        rng = np.random.default_rng([seed, zlib.crc32(task.name.encode())])
        members, others = (_sample(part[task.source], rows, rng) for part in sides)
        for where, part in (("training", members), (held_out, others)):
            if len(part) < FEWEST:
                has = count(len(part), f"{where} row")
                raise UserError(f"{workdir}: source {task.source!r} has {has}, and membership needs {FEWEST}")
        row_losses = make_row_losses(run, task)
        examples = _examples(run, task, members), _examples(run, task, others)
        by_side = row_losses(examples[0]), row_losses(examples[1])
        labelled = np.isfinite(by_side[0]), np.isfinite(by_side[1])
        known = by_side[0][labelled[0]], by_side[1][labelled[1]]
        kind, groups = _groups(task, examples, labelled)
        scores = {"loss": (-known[0], -known[1]), kind: within_groups(-known[0], -known[1], groups)}
        if other is not None:
            reference_losses = make_row_losses(other, other.task(task.name))
            differences = [
                reference_losses(_examples(other, task, part)) - ours
                for part, ours in zip((members, others), by_side, strict=True)
            ]
            scores["reference"] = differences[0][labelled[0]], differences[1][labelled[1]]
        memberships[task.name] = {name: membership(*pair, resamples=resamples, seed=seed) for name, pair in scores.items()}
        losses[task.name] = {"train": float(known[0].mean()), held_out: float(known[1].mean())}
        source = _source(run, task, sources)
        if source.canaries.count:
            maker = Maker(source, run.tasks, sides[0][task.source])
            rows_of_canaries = [maker.row(n, trial) for n in range(source.canaries.count) for trial in range(candidates + 1)]
            exposures[task.name] = _exposure(source, row_losses(_examples(run, task, rows_of_canaries)), candidates)
    return Memorisation(run.step, memberships, exposures, losses)


def make_row_losses(run: TrainedRun, task: Task) -> Callable[[Examples], np.ndarray]:
    """A function from rows of a task's source, with its labels, to f64[rows]: the mean loss over a row's labels.

    The loss is without dropout, and NaN where a row has no label; of a long row the windows count together.

    Args:
        run: The run.
        task: A task of it.
    """
    encode = encode_tokens(run.trunk.module, needed_fields((task,)))
    batching = dataclasses.replace(run.experiment.batch, packed=False)

    @jax.jit
    def losses(params: Any, batch: Batch) -> Any:
        outputs = task.apply(
            params["heads"][task.name], encode(params["trunk"], batch, None, None).read_by(task.name), batch, None
        )

        def of_row(output: jax.Array, row: Batch) -> Any:
            alone = jax.tree.map(lambda leaf: leaf[None], row)
            return task.loss(output[None], alone.labels[task.name], alone)

        return jax.vmap(of_row)(outputs, batch)

    def row_losses(examples: Examples) -> np.ndarray:
        sums = np.zeros((len(examples.data), 2))
        for batch in eval_batches([examples], batching, (task,)):
            totals, counts = jax.device_get(losses(run.params, batch))
            present = batch.index[:, 0] >= 0
            places = examples.row_of[batch.index[present, 0] - examples.first_id]
            np.add.at(sums, places, np.stack([totals[present], counts[present]], axis=1))
        with np.errstate(invalid="ignore"):
            return sums[:, 0] / sums[:, 1]

    return row_losses


def _source(run: TrainedRun, task: Task, sources: Sequence[Source]) -> Source:
    return next(source for source in (*sources, *run.experiment.sources) if source.name == task.source)


def _rows_of(
    run: TrainedRun, folder: Path, held_out: str, given: tuple[Source, ...]
) -> tuple[dict[str, list[Row]], dict[str, list[Row]]]:
    """{source: its training rows without canaries}, and {source: its held-out rows}, as the run had them.

    Raises:
        UserError: They cannot be read, or are not those of data.json.
    """
    names = {source.name for source in given}
    sources = tuple(next((new for new in given if new.name == source.name), source) for source in run.experiment.sources)
    if unused := names - {source.name for source in sources}:
        raise unknown("source in sources:", min(unused), [source.name for source in sources])
    data, _ = rows_held_out.take(run.experiment, at_start.examine(sources, corpora.read_sources(sources, run.tasks)).data)
    length = run.experiment.batch.row_length
    as_trained = made_rows.add(sources, run.tasks, data, run.experiment.augment).data
    present = corpora.make_corpus(sources, run.tasks, as_trained, run.trunk.tokenizer, length).describe()["sources"]
    stored = workdirs.read_json(folder / "data.json")["sources"]
    for name, splits in present.items():
        for split in ("train", held_out):
            if stored.get(name, {}).get(split) != splits[split]:
                raise UserError(
                    f"{folder}: split {split} of source {name!r} has changed since the run was trained (see data.json), so its "
                    "training rows are not known"
                )
    planted = {source.name: source.canaries.count * source.canaries.repeats for source in sources}
    train = {name: list(parts.rows["train"]) for name, parts in data.items()}
    return (
        {name: rows[: len(rows) - planted[name]] for name, rows in train.items()},
        {name: list(parts.rows[held_out]) for name, parts in data.items()},
    )


def _sample(rows: Sequence[Row], most: int, rng: np.random.Generator) -> list[Row]:
    if len(rows) <= most:
        return list(rows)
    return [rows[n] for n in np.sort(rng.choice(len(rows), most, replace=False)).tolist()]


def _examples(run: TrainedRun, task: Task, rows: Sequence[Row]) -> Examples:
    """The rows as the run reads them, with the labels of a task."""
    source, length = run.source(task.name), run.experiment.batch.row_length
    examples, _ = read_examples(
        source, run.tasks_of_same_source(task.name), rows, run.trunk.tokenizer, length, "rows", labelled=(run.task(task.name),)
    )
    return examples._replace(place=run.source_index(task.name))


def _groups(
    task: Task, examples: Sequence[Examples], labelled: Sequence[np.ndarray]
) -> tuple[str, tuple[np.ndarray, np.ndarray]]:
    """What rows are alike in, and the group of each row: its label, where labels are names; else its length in tokens."""
    by_label = task.level == "example" and task.labels and not task.label_shape
    values = []
    for part, keep in zip(examples, labelled, strict=True):
        lengths = np.bincount(part.row_of, [len(tokens) for tokens in part.tokens], minlength=len(part.data))
        first = [group[0] for group in part.groups()]  # a long row's label is that of its first window
        values.append((np.asarray(part.labels[task.name])[first] if by_label else lengths)[keep])
    if by_label:
        return "label", (values[0], values[1])
    edges = np.quantile(np.concatenate(values), np.linspace(0, 1, LENGTH_GROUPS + 1)[1:-1])
    return "length", (np.searchsorted(edges, values[0]), np.searchsorted(edges, values[1]))


def _exposure(source: Source, losses: np.ndarray, candidates: int) -> Exposure:
    """From the losses of each canary and, after it, of its candidates."""
    by_canary = losses.reshape(source.canaries.count, candidates + 1)
    exposures = [exposure(losses_C[0], losses_C[1:]) for losses_C in by_canary if np.isfinite(losses_C[0])]
    if not exposures:
        raise UserError(f"source {source.name!r}: none of its canaries has a label")
    return Exposure(exposures, candidates, source.canaries.repeats)
