"""Is affinity true? Ten sources for ten targets with 64 and 512 rows, and how well every estimator foretells who helps.

    python experiments/affinity_matrix.py --workdir runs/affinity_matrix
    python experiments/affinity_matrix.py --scores docs/affinity_matrix.json

Over ten targets, two sizes and three seeds the first three sources of the combination lose 0.6 % of the best score, [0.2, 1.5],
and its nDCG is 88.0, [81.0, 92.3]; a linear probe has 1.7 % and 87.3, k nearest neighbours 1.7 % and 87.1, the cosine of mean
features 1.3 % and 84.1, a random order 4.9 % and 77.3. docs/affinity.md has the table of all estimators and the heat map of
gains, docs/affinity_matrix.json every score and estimate. It took an hour of a CPU core that other programs used, too.

The tasks are those of affinity_tasks.py. The trunk is MiniLM-L6; its first five layers are frozen and run once, and the sixth
trains with the head. A source trains on all its rows, at most 2,000; then the target trains from that layer, with a new head.
"Alone" starts from MiniLM. All trainings of a target with one seed have the same rows, order, steps and head at the start, and
test is read once, at the end. The rates are the best of three on dev, for three targets alone.

Training rows that are copies of held-out rows of any task are left out, and so are the rows of a source of which a text is a
copy, exact or near, of a text in a target's training rows: a leaked copy would be every estimator's favourite.

An estimator reads the target's training rows, and the source's rows, trained layer and head; of words and of a source's texts
at most 512. The truth is the mean of the target's test score over seeds. "other targets" is the mean over the other targets of
how much a source helps; "random" is a random order; "scores of one seed" are the target's own scores, with the mean over the
other seeds as truth: the noise of the matrix lets no estimator come further. Intervals hold 90 % of 1,000 bootstraps over
targets and seeds.

Every score, and the estimates for each target, are a file in WORKDIR: started again, the script resumes. WORKDIR/matrix.json
has everything; --scores evaluates such a file without any training. Table and figure are written to WORKDIR.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import affinity_evaluation
import affinity_tasks
import affinity_trainings
import flax.serialization
import jax
import tyro
from affinity_evaluation import ALONE
from affinity_trainings import Model, Rows, Trainer

import mtl_jax
from mtl_jax import affinity
from mtl_jax.affinity import estimators, pair_tables, source_models, task_features
from mtl_jax.affinity.task_features import TaskFeatures
from mtl_jax.core.errors import UserError, unknown
from mtl_jax.core.files import write_bytes, write_json, write_text
from mtl_jax.models.trunk_output import Encoded

TEST_ROWS = 500  # the most of a target
ESTIMATED_ROWS = 512  # the most texts of a source and words of a target that estimators read


@dataclasses.dataclass(frozen=True)
class Matrix:
    """The trainings of the matrix.

    Attributes:
        sources: Tasks that help.
        targets: Tasks that are helped.
        sizes: Numbers of training rows of a target.
        steps: Steps of a target, for each of sizes.
        source_steps: Steps of a source.
        seeds: Seeds of rows, heads and order. All is done for one before the next.
        rate: The highest learning rate of the layers that train.
        head_rate: That of heads.
        trained: Layers that train, from the top.
        split: The split that scores are of: test, or dev to choose steps and rates.
        limit: Rows read of each split of a source; 0: as in affinity_tasks.py.
        scores: A file matrix.json to evaluate; empty: the trainings of the workdir, after those that are missing.
        workdir: The directory of scores, table and figure.
    """

    sources: tuple[str, ...] = affinity_tasks.SOURCES
    targets: tuple[str, ...] = affinity_tasks.TARGETS
    sizes: tuple[int, ...] = (64, 512)
    steps: tuple[int, ...] = (20, 40)
    source_steps: int = 128
    seeds: tuple[int, ...] = (0, 1, 2)
    rate: float = 1e-3
    head_rate: float = 1e-2
    trained: int = 1
    split: str = "test"
    limit: int = 0
    scores: str = ""
    workdir: str = "runs/affinity_matrix"


def check(matrix: Matrix) -> None:
    """Raises UserError where a name is unknown, or a number is missing or out of range."""
    for field, known in (("sources", affinity_tasks.SOURCES), ("targets", affinity_tasks.TARGETS)):
        for name in getattr(matrix, field):
            if name not in known:
                raise unknown(field, name, known)
    for field in ("sources", "targets", "sizes", "seeds"):
        if not getattr(matrix, field):
            raise UserError(f"give at least one of {field}")
    if len(matrix.steps) != len(matrix.sizes):
        raise UserError(f"steps has {len(matrix.steps)} numbers; it must have one for each of sizes, {len(matrix.sizes)}")


def run(matrix: Matrix) -> dict[str, Any]:
    """Trains and estimates what is missing in the workdir; returns the content of matrix.json.

    Raises:
        UserError: The experiment is refused, or the workdir has scores of other settings.
    """
    folder = Path(matrix.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str((folder / "compiled").resolve()))
    _check_settings(matrix, folder)
    trainer = make_trainer(matrix)
    for seed in matrix.seeds:
        models = {source: _source(trainer, matrix, folder, source, seed) for source in matrix.sources}
        arrays_of = functools.cache(functools.partial(_of_source, trainer, models, seed))
        for target, (number, size) in itertools.product(matrix.targets, enumerate(matrix.sizes)):
            for source in (ALONE, *(source for source in matrix.sources if source != target)):
                path = folder / "scores" / f"{target}-{size}-{source}-{seed}.json"
                top = trainer.top if source == ALONE else models[source].top
                _once(path, functools.partial(_score, trainer, matrix, top, target, size, matrix.steps[number], seed))
            path = folder / "estimates" / f"{target}-{size}-{seed}.json"
            _once(path, functools.partial(_estimates, trainer, models, arrays_of, target, size, seed))
    content = collect(matrix, folder, trainer.copies)
    write_text(folder / "matrix.json", json.dumps(content, separators=(",", ":"), allow_nan=False) + "\n")
    return content


def make_trainer(matrix: Matrix) -> Trainer:
    """The trainer of the matrix's tasks."""
    names = tuple(dict.fromkeys((*matrix.sources, *matrix.targets)))
    sources = affinity_tasks.EXPERIMENT.sources
    if matrix.limit:
        sources = tuple(dataclasses.replace(source, limit=matrix.limit) for source in sources)
    experiment = dataclasses.replace(affinity_tasks.EXPERIMENT, sources=sources, only=names)
    rates = {"rate": matrix.rate, "head_rate": matrix.head_rate}
    return affinity_trainings.trainer(experiment, matrix.sources, matrix.targets, trained=matrix.trained, **rates)


def _check_settings(matrix: Matrix, folder: Path) -> None:
    """Raises UserError where the workdir has scores of trainings with other settings."""
    settings = {name: getattr(matrix, name) for name in ("source_steps", "rate", "head_rate", "trained", "split", "limit")}
    settings["steps"] = {str(size): steps for size, steps in zip(matrix.sizes, matrix.steps, strict=True)}
    path = folder / "settings.json"
    if not path.exists():
        write_json(path, settings)
    elif (before := json.loads(path.read_text(encoding="utf-8"))) != settings:
        raise UserError(f"{path} has {before}, and this command {settings}; choose another --workdir")


def _once(path: Path, compute: Callable[[], dict[str, Any]]) -> None:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        content = compute()
        write_json(path, content)
        print(path.stem, content.get("score", ""), flush=True)


def _source(trainer: Trainer, matrix: Matrix, folder: Path, source: str, seed: int) -> Model:
    """The model of a source, trained or from its file."""
    path = folder / "sources" / f"{source}-{seed}.msgpack"
    start = Model(trainer.top, trainer.head(source, seed))
    if path.exists():
        return flax.serialization.from_bytes(start, path.read_bytes())
    rows = trainer.rows(source, "train", affinity_tasks.SOURCE_ROWS, 0)
    started = time.perf_counter()
    model = jax.block_until_ready(trainer.fit(source, start, rows, matrix.source_steps, seed))
    _once(folder / "sources" / f"{source}-{seed}.json", lambda: {"seconds": time.perf_counter() - started})
    write_bytes(path, flax.serialization.to_bytes(model))
    return model


def _score(trainer: Trainer, matrix: Matrix, top: Any, target: str, size: int, steps: int, seed: int) -> dict[str, float]:
    rows, held_out = trainer.rows(target, "train", size, seed), trainer.rows(target, matrix.split, TEST_ROWS, 0)
    started = time.perf_counter()
    model = trainer.fit(target, Model(top, trainer.head(target, seed)), rows, steps, seed)
    return {"score": trainer.score(target, model, held_out), "seconds": time.perf_counter() - started}


def _read(trainer: Trainer, top: Any, rows: Rows, seed: int) -> tuple[TaskFeatures, list[Encoded]]:
    """The arrays of some rows in a trunk, and its output for them."""
    pairs = zip(rows.hidden, rows.batches, strict=True)
    outputs = [trainer.encode(top, hidden, batch._replace(labels={})) for hidden, batch in pairs]
    return task_features.read(rows.task, rows.examples, rows.batches, outputs, ESTIMATED_ROWS, seed), outputs


def _of_source(trainer: Trainer, models: dict[str, Model], seed: int, source: str, trained: bool) -> TaskFeatures:
    """A source's arrays in its own trunk if `trained`, else in the trunk before training."""
    top = models[source].top if trained else trainer.top
    return _read(trainer, top, trainer.rows(source, "train", ESTIMATED_ROWS, seed), seed)[0]


def _estimates(
    trainer: Trainer,
    models: dict[str, Model],
    arrays_of: Callable[[str, bool], TaskFeatures],
    target: str,
    size: int,
    seed: int,
) -> dict[str, Any]:
    """All estimates for a target, and their seconds."""
    rows = trainer.rows(target, "train", size, seed)
    sources = [source for source in models if source != target]
    tables = pair_tables.Tables(trainer.tasks, {}, {}, {}, {}, {}, {})
    with pair_tables.timed(tables.seconds, "features"):
        tables.arrays[target] = _read(trainer, trainer.top, rows, seed)[0]
        for source in sources:
            arrays, outputs = _read(trainer, models[source].top, rows, seed)
            tables.features[source, target] = arrays.features
            if not pair_tables.why_no_probabilities(trainer.tasks[source], trainer.tasks[target]):
                task = trainer.tasks[source]
                model = source_models.SourceModel(task, None, models[source].head, None)  # type: ignore[arg-type]
                by_batch = source_models.probabilities(model, rows.batches, outputs)
                chosen = task_features.rows_of_outputs(rows.task, rows.batches, by_batch, ESTIMATED_ROWS, seed)
                tables.probabilities[source, target] = chosen
    with pair_tables.timed(tables.seconds, "source texts"):
        tables.arrays.update({source: arrays_of(source, False) for source in sources})
    with pair_tables.timed(tables.seconds, "source features"):
        tables.own.update({source: arrays_of(source, True).features for source in sources})
    with pair_tables.timed(tables.seconds, "embeddings"):
        tables.embeddings.update({name: trainer.embedding(name, seed) for name in (*sources, target)})
    values: dict[str, dict[str, float]] = {}
    for name, function in affinity.ESTIMATORS.items():
        needed = estimators.reads(name, function)
        with pair_tables.timed(tables.seconds, name):
            for source in sources:
                try:
                    inputs = {what: pair_tables.input_of(what, source, target, tables) for what in needed}
                    values.setdefault(name, {})[source] = float(function(**inputs))
                except (UserError, pair_tables.NotApplicable):
                    continue
    return {"estimates": values, "seconds": tables.seconds}


def collect(matrix: Matrix, folder: Path, copies: dict[str, dict[str, int]]) -> dict[str, Any]:
    """The content of matrix.json: scores and estimates for each seed, and seconds."""

    def read(kind: str, *parts: object) -> dict[str, Any]:
        return json.loads((folder / kind / f"{'-'.join(map(str, parts))}.json").read_text(encoding="utf-8"))

    scores: dict[str, dict[str, dict[str, list[float]]]] = {}
    values: dict[str, dict[str, dict[str, dict[str, list[float | None]]]]] = {}
    trainings_of_sources = [read("sources", *pair) for pair in itertools.product(matrix.sources, matrix.seeds)]
    seconds = {"targets": 0.0, "sources": sum(training["seconds"] for training in trainings_of_sources)}
    pairs = 0
    for target, size in itertools.product(matrix.targets, matrix.sizes):
        cells = [read("estimates", target, size, seed) for seed in matrix.seeds]
        for cell in cells:
            for name, value in cell["seconds"].items():
                seconds[f"estimates/{name}"] = seconds.get(f"estimates/{name}", 0.0) + value
        for source in (ALONE, *(source for source in matrix.sources if source != target)):
            trainings = [read("scores", target, size, source, seed) for seed in matrix.seeds]
            seconds["targets"] += sum(training["seconds"] for training in trainings)
            reached = [_short(training["score"]) for training in trainings]
            scores.setdefault(target, {}).setdefault(str(size), {})[source] = reached
            pairs += len(trainings)
            for name in affinity.ESTIMATORS:
                numbers = [cell["estimates"].get(name, {}).get(source) for cell in cells]
                if any(number is not None for number in numbers):
                    by_size = values.setdefault(name, {}).setdefault(target, {}).setdefault(str(size), {})
                    by_size[source] = [None if number is None else _short(number) for number in numbers]
    settings = {name: value for name, value in dataclasses.asdict(matrix).items() if name not in ("workdir", "scores")}
    return {
        "settings": settings,
        "copies": copies,
        "trainings": {"targets": pairs, "sources": len(matrix.sources) * len(matrix.seeds)},
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "scores": scores,
        "estimates": values,
    }


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def compare(matrix: Matrix) -> str:
    """The table, after the trainings that are missing; also writes it, and the figure.

    Raises:
        UserError: As check() and run(), or a file of scores cannot be read.
    """
    check(matrix)
    folder = Path(matrix.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    if matrix.scores:
        try:
            content = json.loads(Path(matrix.scores).read_text(encoding="utf-8"))
            affinity_evaluation.trials_of(content)
        except (OSError, ValueError, KeyError, TypeError) as error:
            kind = type(error).__name__
            raise UserError(f"{matrix.scores} is not a matrix.json that this script wrote ({kind}: {error})") from error
    else:
        content = run(matrix)
    text = affinity_evaluation.evaluate(content)
    write_text(folder / "table.md", text + "\n")
    affinity_evaluation.draw(content, folder / "gains.png")
    return text


if __name__ == "__main__":
    mtl_jax.run(lambda: print(compare(tyro.cli(Matrix, description=__doc__))))
