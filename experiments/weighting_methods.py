"""All weighting rules on the quickstart's seven tasks, with several seeds, against each task trained alone.

    python experiments/weighting_methods.py
    python experiments/weighting_methods.py --trunk minilm --rules equal upgrad cagrad --seeds 0 1 2 --workdir runs/minilm

Every rule is trained twice, with heads that follow their plain losses and with heads whose gradients are multiplied by their
tasks' weights: papers and programs differ in this, and it must not decide a comparison of rules. Each run is an ordinary
workdir, WORKDIR/RULE-HEADS-SEED (or alone-TASK-SEED): started again, the script resumes, and when all runs are done it only
prints the table, which is also written to WORKDIR/table.md. With the shared embedding, a network from scratch that trains in
seconds on a laptop, rules can be compared over many seeds; minilm fine-tunes the quickstart's trunk. The first command's table,
two seeds so far, is in docs/weighting_methods.md.
"""

import dataclasses
import itertools
import statistics
from pathlib import Path

import jax
import quickstart
import tabulate
import tyro

import mtl_jax
from mtl_jax import Embedding, Evaluation, Experiment, Optimizer, Phase, weighting
from mtl_jax.core.errors import UserError, unknown
from mtl_jax.core.files import number_of
from mtl_jax.reporting.statistics import relative_change

TASKS = {task.name: task for task in quickstart.EXPERIMENT.tasks}
EQUAL = dict.fromkeys(TASKS, 1.0)
HEADS = {"plain": False, "weighted": True}  # {name: weigh_heads}
# Settings of the rules that have no defaults.
SETTINGS: dict[str, dict] = {
    "fixed": {"weights": EQUAL | {"trec_fine": 2.0}},
    "scheduled": {"weights": EQUAL | {"trec_coarse": "linear_schedule(2.0, 0.0, 600)"}},
}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The runs to compare.

    Attributes:
        rules: Names of weighting rules.
        heads: How heads are trained: plain (by their losses), weighted (by their losses times the weights), or both.
        seeds: Seeds; each experiment is trained with every seed.
        tasks: Tasks of the quickstart.
        trunk: embedding (from scratch, seconds per run) or minilm (the quickstart's, pretrained).
        steps: Steps of the last phase, in which all parameters train; 0: as many as the trunk needs.
        limit: Rows read from each source; 0: all.
        normalized: Scale the weights of every rule to a sum of K, so that all have the same learning rate.
        workdir: The directory with the runs.
    """

    rules: tuple[str, ...] = tuple(name for name in weighting.RULES if "target" not in weighting.required_options(name))
    heads: tuple[str, ...] = tuple(HEADS)
    seeds: tuple[int, ...] = (0, 1, 2)
    tasks: tuple[str, ...] = tuple(TASKS)
    trunk: str = "embedding"
    steps: int = 0
    limit: int = 0
    normalized: bool = True
    workdir: str = "runs/weighting_methods"


BASES: dict[str, Experiment] = {
    "embedding": dataclasses.replace(
        quickstart.EXPERIMENT,
        name="weighting_methods",
        trunk=Embedding(vocabulary=10_000, dimension=100),
        tasks=tuple(dataclasses.replace(task, hidden=64) for task in quickstart.EXPERIMENT.tasks),
        phases=(Phase("everything", steps=600),),
        optimizer=Optimizer(learning_rate=5e-3),
        evaluation=Evaluation(every=100, baseline="none"),
    ),
    "minilm": dataclasses.replace(
        quickstart.EXPERIMENT, name="weighting_methods", evaluation=Evaluation(every=75, baseline="none")
    ),
}


def experiments(comparison: Comparison) -> dict[tuple[str, int], Experiment]:
    """{(name, seed): experiment}: each task alone, then each rule with each way to train heads."""
    named: dict[tuple[str, int], Experiment] = {}
    base = BASES[comparison.trunk]
    if comparison.steps:
        last = dataclasses.replace(base.phases[-1], steps=comparison.steps)
        base = dataclasses.replace(base, phases=(*base.phases[:-1], last))
    if comparison.limit:
        base = dataclasses.replace(base, sources=tuple(dataclasses.replace(s, limit=comparison.limit) for s in base.sources))
    single_batch = dataclasses.replace(base.batch, rows=base.batch.rows // len(base.sources))
    only = () if comparison.tasks == tuple(TASKS) else comparison.tasks
    for seed in comparison.seeds:
        for task in comparison.tasks:  # a step has as many rows of its source as a step of all tasks
            named[f"alone-{task}", seed] = dataclasses.replace(base, only=(task,), batch=single_batch, seed=seed)
        for rule, heads in itertools.product(comparison.rules, comparison.heads):
            combinators = ("normalized",) if comparison.normalized else ()
            changes = {"combinators": combinators, "weigh_heads": HEADS[heads]} | SETTINGS.get(rule, {})
            named[f"{rule}-{heads}", seed] = dataclasses.replace(base, weighting=rule, only=only, seed=seed, **changes)
    return named


def heads_of(rule: str, comparison: Comparison) -> str:
    """How heads are trained in the row of a rule: as in the rule's source, if that is among the compared ways."""
    default = "weighted" if weighting.make(rule, **SETTINGS.get(rule, {})).weighs_heads else "plain"
    return default if default in comparison.heads else comparison.heads[0]


def table(comparison: Comparison, scores: dict[tuple[str, int], dict[str, float]]) -> str:
    """Test metric of every task, mean and standard deviation over the seeds, best rule first.

    The tasks' columns and the order of the rows are for heads that are trained as in the rule's source, which the row names.
    The last columns are the average over tasks of the relative change against single-task training, in percent, for heads
    trained in each way.

    Args:
        comparison: The compared runs.
        scores: {(name of the experiment, seed): {task: test metric}}.
    """
    alone = {
        task: statistics.mean(scores[f"alone-{task}", seed][task] for seed in comparison.seeds) for task in comparison.tasks
    }

    def spread(values: list[float], digits: int) -> str:
        deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{deviation}"

    def metrics(name: str, task: str) -> list[float]:
        return [scores[name, seed][task] for seed in comparison.seeds]

    def changes(name: str) -> list[float]:
        return [relative_change(scores[name, seed], alone) for seed in comparison.seeds]

    default = {rule: heads_of(rule, comparison) for rule in comparison.rules}
    rows = [["(each alone)", "", *[spread(metrics(f"alone-{task}", task), 3) for task in comparison.tasks]]]
    rows[0] += ["0" for _ in comparison.heads]
    for rule in sorted(comparison.rules, key=lambda rule: -statistics.mean(changes(f"{rule}-{default[rule]}"))):
        rows.append([rule, default[rule], *[spread(metrics(f"{rule}-{default[rule]}", task), 3) for task in comparison.tasks]])
        rows[-1] += [spread(changes(f"{rule}-{heads}"), 2) for heads in comparison.heads]
    head = ["rule", "heads", *[f"{task} ({TASKS[task].metric})" for task in comparison.tasks]]
    head += [f"change %, heads {heads}" for heads in comparison.heads]
    return tabulate.tabulate(rows, headers=head, tablefmt="pipe", disable_numparse=True)


def compare(comparison: Comparison) -> str:
    """Trains the runs that are not done, and returns the table.

    Raises:
        UserError: A rule, a way to train heads or the trunk is unknown, or a run cannot be resumed.
    """
    for rule in comparison.rules:
        if rule not in weighting.RULES:
            raise unknown("weighting", rule, weighting.RULES)
    for heads in comparison.heads:
        if heads not in HEADS:
            raise unknown("heads", heads, HEADS)
    if comparison.trunk not in BASES:
        raise unknown("trunk", comparison.trunk, BASES)
    for task in comparison.tasks:
        if task not in TASKS:
            raise unknown("task", task, TASKS)
    for field in ("rules", "heads", "seeds", "tasks"):
        if not getattr(comparison, field):
            raise UserError(f"give at least one of {field}")
    folder = Path(comparison.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    # Runs that differ only in the seed are the same program.
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    todo = experiments(comparison)
    scores = {}
    for done, ((name, seed), experiment) in enumerate(todo.items(), 1):
        print(f"{done}/{len(todo)} {name} seed {seed}", flush=True)
        results = mtl_jax.train(experiment, folder / f"{name}-{seed}")
        scores[name, seed] = {task: number_of(values["test"][TASKS[task].metric]) for task, values in results["tasks"].items()}
    text = table(comparison, scores)
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    return text


if __name__ == "__main__":
    mtl_jax.run(lambda: print(compare(tyro.cli(Comparison, description=__doc__))))
