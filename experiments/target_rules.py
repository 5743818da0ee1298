"""Which rule keeps the gain from a helpful source, and which avoids the loss from a harmful one?

    python experiments/target_rules.py
    python experiments/target_rules.py --ways alone fixed gcs --rows 16 --seeds 0

The target and its rows are those of few_shot_transfer.py: ratings of product reviews, Pearson's correlation on test. The
helpful source is that script's, movie review snippets and tweets. The harmful one has the same texts, and their ratings dealt
out to them at random by the seed: there is nothing to learn from it, and every step on it fits noise. (Ratings with the
opposite sign would not do harm: a source has a head of its own, which learns the other sign from the same features.)

Ways: the target alone; joint training with sources of weight 1 (fixed); with a weight that falls to 0 over the run (annealed);
and rules that know their target, with their defaults: gcs, pcd, auto_lambda. Half of the rows of a batch are the target's. To
be cheap on a CPU, only the topmost layers of MiniLM train, on batches of 4 rows of 64 tokens, and each source has 2,000
training rows. The whole of dev chooses between two checkpoints. auto_lambda trains on a fifth fewer rows: it holds them out.

Every run is an ordinary workdir in WORKDIR: started again, the script resumes, and when all runs are done it only writes
WORKDIR/table.md from their results.json. Checkpoints of a finished run are removed.

Mean and standard deviation of seeds 0, 1 and 2, float32, two CPU cores; a run takes about 37 seconds of one core:

|                                         | 16 rows       | 64 rows       |
|-----------------------------------------|---------------|---------------|
| target alone                            | 0.473 ± 0.038 | 0.625 ± 0.035 |
| fixed, movies + tweets                  | 0.511 ± 0.027 | 0.669 ± 0.012 |
| fixed, the same, ratings shuffled       | 0.476 ± 0.018 | 0.650 ± 0.015 |
| annealed, movies + tweets               | 0.506 ± 0.023 | 0.663 ± 0.012 |
| annealed, the same, ratings shuffled    | 0.476 ± 0.026 | 0.651 ± 0.017 |
| gcs, movies + tweets                    | 0.497 ± 0.003 | 0.657 ± 0.016 |
| gcs, the same, ratings shuffled         | 0.473 ± 0.008 | 0.644 ± 0.035 |
| pcd, movies + tweets                    | 0.482 ± 0.012 | 0.642 ± 0.024 |
| pcd, the same, ratings shuffled         | 0.477 ± 0.013 | 0.639 ± 0.035 |
| auto_lambda, movies + tweets            | 0.504 ± 0.020 | 0.635 ± 0.016 |
| auto_lambda, the same, ratings shuffled | 0.462 ± 0.020 | 0.618 ± 0.029 |

Nothing here is a gain beyond chance: of the differences to the target alone with the same seed, each 95 % interval
includes 0. The order of the means is that of how much a way lets a source in: fixed weights gain most from the helpful source,
pcd least. The shuffled source does no harm in this setting, so that there is no loss to avoid; auto_lambda, which holds out a
fifth of the target's rows, is lowest with it.
"""

import dataclasses
import shutil
from pathlib import Path

import few_shot_transfer as few_shot
import jax
import numpy as np
import tyro

import mtl_jax
from mtl_jax import Batching, Checkpoints, Evaluation, Experiment, Optimizer, Phase, Source
from mtl_jax.core.errors import UserError, unknown
from mtl_jax.core.files import number_of
from mtl_jax.data.splits import read
from mtl_jax.transfer import top_layers

LAYERS = 6  # of MiniLM
HELD_OUT_ROWS = 16  # dev and test rows of a source: it is trained on, and its scores are not looked at
TARGET = few_shot.TASK.name
WAYS = ("alone", "fixed", "annealed", "gcs", "pcd", "auto_lambda")
SOURCES = {"helpful": "movies + tweets", "harmful": "the same, ratings shuffled"}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The runs to compare.

    Attributes:
        ways: alone, fixed, annealed, gcs, pcd, auto_lambda, or some of them.
        sources: helpful, harmful, or both.
        rows: Numbers of training rows of the target.
        seeds: Seeds; every way is trained with each.
        steps: Steps of a run.
        layers: Topmost layers that train.
        source_rows: Training rows of each source.
        limit: Rows read from each split of the target; 0: all.
        workdir: The directory with the runs.
    """

    ways: tuple[str, ...] = WAYS
    sources: tuple[str, ...] = tuple(SOURCES)
    rows: tuple[int, ...] = (16, 64)
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 100
    layers: int = 2
    source_rows: int = 2000
    limit: int = 0
    workdir: str = "runs/target_rules"


def alone(comparison: Comparison, rows: int, seed: int) -> Experiment:
    """The target alone."""
    drawn = few_shot.drawn(few_shot.Comparison(workdir=comparison.workdir, limit=comparison.limit), seed)
    half = max(1, comparison.steps // 2)
    return Experiment(
        name="target_rules",
        trunk=few_shot.MINILM,
        sources=(dataclasses.replace(drawn, limit_train=rows),),
        tasks=(few_shot.TASK,),
        phases=(Phase("top", steps=comparison.steps, rules=top_layers(comparison.layers, LAYERS)),),
        optimizer=Optimizer(learning_rate=few_shot.RATE),
        batch=Batching(rows=4, row_length=64),
        evaluation=Evaluation(every=half, criterion=TARGET, baseline="none"),
        checkpoints=Checkpoints(every=half, keep=1, frozen=False),
        seed=seed,
    )


def source_of(source: Source, kind: str, rows: int, seed: int) -> Source:
    """A source of the kind, its rows drawn by the seed; harmful: with ratings of other rows."""
    column = few_shot.TASK.column
    splits = read(source).rows
    rng = np.random.default_rng([seed, len(source.name)])
    given = {}
    for split, most in (("train", rows), ("dev", HELD_OUT_ROWS), ("test", HELD_OUT_ROWS)):
        chosen = rng.permutation(len(splits[split]))[:most].tolist()
        columns = [{name: splits[split][i].columns[name] for name in (source.text, column)} for i in chosen]
        dealt = rng.permutation(len(columns)).tolist() if kind == "harmful" else range(len(columns))
        given[split] = [row | {column: columns[i][column]} for row, i in zip(columns, dealt, strict=True)]
    return Source(name=source.name, rows=given["train"], dev_rows=given["dev"], test_rows=given["test"])


def with_sources(comparison: Comparison, way: str, kind: str, rows: int, seed: int) -> Experiment:
    """The target with both sources, by one of the ways."""
    experiment = alone(comparison, rows, seed)
    sources = tuple(source_of(source, kind, comparison.source_rows, seed) for source in few_shot.SOURCES)
    shares = {experiment.sources[0].name: 2.0} | dict.fromkeys((source.name for source in sources), 1.0)
    joint = dataclasses.replace(
        experiment,
        sources=(*experiment.sources, *sources),
        tasks=(few_shot.TASK, *few_shot.SOURCE_TASKS),
        batch=dataclasses.replace(experiment.batch, mixture="fixed", shares=shares),
    )
    names = [task.name for task in few_shot.SOURCE_TASKS]
    if way == "fixed":
        return dataclasses.replace(joint, weighting="fixed", weights={TARGET: 1.0, **dict.fromkeys(names, 1.0)})
    if way == "annealed":
        falling = f"linear_schedule(1.0, 0.0, {comparison.steps})"
        return dataclasses.replace(joint, weighting="scheduled", weights={TARGET: 1.0, **dict.fromkeys(names, falling)})
    return dataclasses.replace(joint, weighting=way, weighting_options={"target": TARGET})


def compare(comparison: Comparison) -> str:
    """Trains the runs that are not done, and returns the table.

    Raises:
        UserError: A way or kind of source is unknown, a number is out of range, or a run cannot be resumed.
    """
    for field, chosen, choices in (("ways", comparison.ways, WAYS), ("sources", comparison.sources, tuple(SOURCES))):
        for given in chosen:
            if given not in choices:
                raise unknown(field, given, choices)
    for field in ("ways", "sources", "rows", "seeds"):
        if not getattr(comparison, field):
            raise UserError(f"give at least one of {field}")
    if min(comparison.rows) < 2:
        raise UserError(f"rows is {' '.join(map(str, comparison.rows))}; a correlation needs at least 2")
    folder = Path(comparison.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))  # runs of one way are one program
    kinds = [(way, kind) for way in comparison.ways for kind in (comparison.sources if way != "alone" else ("none",))]
    scores: dict[str, dict[int, list[float]]] = {name(*kind): {rows: [] for rows in comparison.rows} for kind in kinds}
    total, done = len(comparison.seeds) * len(comparison.rows) * len(kinds), 0
    for seed in comparison.seeds:
        for rows in comparison.rows:
            for way, kind in kinds:
                done += 1
                print(f"{done}/{total} {way}, {kind} source, {rows} rows, seed {seed}", flush=True)
                workdir = folder / f"{way}-{kind}-{rows}-{seed}"
                scores[name(way, kind)][rows].append(score(comparison, way, kind, rows, seed, workdir))
    text = few_shot.table(scores, comparison.rows)
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    return text


def score(comparison: Comparison, way: str, kind: str, rows: int, seed: int, workdir: Path) -> float:
    """Pearson's correlation of a run on test; trains it where it is not done."""
    by_way = alone(comparison, rows, seed) if way == "alone" else with_sources(comparison, way, kind, rows, seed)
    results = mtl_jax.train(by_way, workdir)
    shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
    return number_of(results["tasks"][TARGET]["test"]["pearson"])


def name(way: str, kind: str) -> str:
    """The name of a way with a kind of source in the table."""
    return "target alone" if way == "alone" else f"{way}, {SOURCES[kind]}"


if __name__ == "__main__":
    mtl_jax.run(lambda: print(compare(tyro.cli(Comparison, description=__doc__))))
