"""A hook and a logger of one's own: which tasks' gradients conflict, as a table at the end; and every metric in a CSV file.

    python experiments/own/hooks.py --logger csv
    python experiments/own/hooks.py --logger csv --logger wandb

MTL_JAX_DATA names a folder with tweeteval/. The trunk is small and from scratch, so that a run takes a minute on a CPU. Hooks
and loggers are not part of the experiment: config.json does not have them, and predict, evaluate, convert and report need no
--import for them. A stopped run resumes from its last checkpoint, so that steps after it are in the CSV file twice; the last
row counts.
"""

import csv
import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mtl_jax import (
    Batching,
    Classification,
    Evaluation,
    Experiment,
    Hooks,
    Optimizer,
    Phase,
    Source,
    Transformer,
    main,
    register_logger,
)


def conflict_table() -> Hooks:
    """Collects the cosine of every two tasks' gradients, which metrics have under a rule that compares gradients."""
    cosines: dict[tuple[str, str], list[float]] = defaultdict(list)

    def collect(step: int, metrics: Mapping[str, Any]) -> None:
        tasks = [name.partition("/")[2] for name in metrics if name.startswith("gradient_norm/")]
        for (row, first), (column, second) in itertools.combinations(enumerate(tasks), 2):
            cosines[first, second].append(metrics["cosines"][row][column])

    def show(results: Mapping[str, Any]) -> None:
        print("tasks                    mean cosine  conflicts")
        for (first, second), values in cosines.items():
            below = sum(value < 0 for value in values) / len(values)
            print(f"{f'{first}, {second}':24} {sum(values) / len(values):11.3f} {below:10.0%}")

    return Hooks(after_metrics=collect, at_end=show)


@register_logger("csv")
def csv_logger(config: Mapping[str, Any], workdir: Path) -> Hooks:
    """Writes metrics.csv to the workdir: kind, step, name, value."""
    file = (workdir / "metrics.csv").open("a", newline="")
    writer = csv.writer(file)
    if file.tell() == 0:
        writer.writerow(["kind", "step", "name", "value"])

    def rows(kind: str) -> Callable[[int, Mapping[str, Any]], None]:
        return lambda step, values: writer.writerows(
            [kind, step, name, value] for name, value in values.items() if name != "cosines"
        )

    return Hooks(after_metrics=rows("train"), after_evaluation=rows("dev"), close=file.close)


def source(name: str) -> Source:
    path = f"data:tweeteval/{name}"
    return Source(
        name,
        path=f"{path}/train_{{text,labels}}.txt",
        dev_path=f"{path}/val_{{text,labels}}.txt",
        test_path=f"{path}/test_{{text,labels}}.txt",
        format="parallel",
        lenient=True,
    )


NAMES = ("emotion", "irony", "offensive")
EXPERIMENT = Experiment(
    name="hooks",
    trunk=Transformer(vocabulary=4000, layers=2, width=64, heads=4, feed_forward=128, max_length=64),
    sources=tuple(source(name) for name in NAMES),
    tasks=tuple(Classification(name=name, source=name, column="labels") for name in NAMES),
    phases=(Phase("everything", steps=200),),
    weighting="cagrad",
    optimizer=Optimizer(learning_rate=1e-3),
    batch=Batching(rows=16, row_length=64),
    evaluation=Evaluation(every=50),
)

if __name__ == "__main__":
    main(EXPERIMENT, hooks=conflict_table())
