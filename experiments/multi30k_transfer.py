"""The gain from English-German for English-French with few pairs: transfer between language pairs on Multi30k.

    python experiments/multi30k_transfer.py
    python experiments/multi30k_transfer.py --pairs 1000 --lambdas 0.3 1.0 --seeds 0 1 2
    python experiments/multi30k_transfer.py --scores here/scores.json there/scores.json

The target, English to French, has 1,000 or 5,000 pairs; the source, English to German, has all 29,000. These ways are compared,
all from scratch and with the same number of steps: the target alone; the source and then the target; both at once,
L_target + lambda L_source, with a constant lambda and with a lambda that falls to 0 over the run; and French and German of the
target's few captions, both at once. The vocabulary is made from all training texts of a run, so the last way has another
vocabulary than the others, which share one with all German captions, even if only the target is trained. Every run is an
ordinary workdir in WORKDIR: started again, the script resumes, and when all runs are done it only writes the table and the
figure, WORKDIR/table.md and WORKDIR/lambda.png. WORKDIR/scores.json has the scores: several machines can share the runs, one
with 1,000 pairs and another with 5,000, and --scores combines their files. MTL_JAX_DATA names a folder with multi30k/.

Test BLEU (sacrebleu's 13a, beam 5), seed 0; docs/multi30k_transfer.json has the scores. A run is about 8 minutes of one core of
a shared AMD EPYC, the last way 12 to 14.

|                               | 1,000 pairs   | 5,000 pairs   |
|-------------------------------|---------------|---------------|
| target alone                  | 16.4          | 28.4          |
| source, then target           | 16.1          | 23.7          |
| lambda 0.1                    | 15.6          | 23.2          |
| lambda 0.1 falling            | 15.6          | 23.1          |
| lambda 0.3                    | 16.3          | 24.2          |
| lambda 0.3 falling            | 16.2          | 24.3          |
| lambda 1                      | 16.7          | 23.1          |
| lambda 1 falling              | 16.5          | 24.1          |
| lambda 3                      | 15.2          | 21.3          |
| lambda 3 falling              | 16.2          | 23.1          |
| both of the target's captions | 17.7          | 28.5          |

All ways have the same number of steps, so a way with the source sees half as much of the target: 13 passes over 5,000 pairs in
place of 25, which costs more than 2.5 passes over the source gain. With 1,000 pairs the target alone has 108 passes, more than
it can use: half of them together with the source are as good. A second target of the same captions takes no rows away, and
gains 1.3 with 1,000 pairs. With one seed, differences of a few tenths mean nothing.
"""

import dataclasses
import json
import statistics
from pathlib import Path

import jax
import tabulate
import tyro

import mtl_jax
from mtl_jax import Batching, Evaluation, Experiment, Optimizer, Phase, Seq2Seq, Source, Transformer
from mtl_jax.core.errors import UserError


def _source(name: str, languages: str, limit: int = 0, pairs: int = 0) -> Source:
    return Source(
        name=name,
        path=f"data:multi30k/train.{languages}.gz",
        dev_path=f"data:multi30k/val.{languages}.gz",
        test_path=f"data:multi30k/test_2016_flickr.{languages}.gz",
        format="parallel",
        text="en",
        limit=limit,
        limit_train=pairs,
    )


FRENCH = Seq2Seq(name="fr", source="target", column="fr", label_smoothing=0.1)
GERMAN = Seq2Seq(name="de", source="source", column="de", label_smoothing=0.1, beams=1)
EXPERIMENT = Experiment(
    name="multi30k_transfer",
    trunk=Transformer(
        vocabulary=2000, layers=2, width=128, heads=4, feed_forward=256, pre_norm=True, dropout=0.3, max_length=256
    ),
    sources=(_source("target", "{en,fr}"), _source("source", "{en,de}")),
    tasks=(FRENCH, GERMAN),
    phases=(Phase("everything", steps=1500),),
    optimizer=Optimizer(learning_rate=5e-3, schedule="cosine", warmup=0.1, weight_decay=0.0, b2=0.98, eps=1e-9),
    batch=Batching(rows=32, row_length=64, target_length=72),
    evaluation=Evaluation(every=500, criterion="fr"),
)
ALONE, THEN, TOGETHER = "target alone", "source, then target", "both of the target's captions"
FALLING = "falling"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The runs to compare.

    Attributes:
        pairs: Numbers of pairs of the target; every way is trained with each.
        lambdas: Weights of the source's loss.
        falling: Whether each lambda is also tried with a fall to 0.
        seeds: Seeds; every way is trained with each.
        steps: Steps of every run, over all its phases.
        limit: Rows read from each split of target and source; 0: all.
        scores: Files scores.json of other workdirs with the same steps and limit; the runs in them are not trained again.
        workdir: The directory with the runs.
    """

    pairs: tuple[int, ...] = (1000, 5000)
    lambdas: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
    falling: bool = True
    seeds: tuple[int, ...] = (0,)
    steps: int = 1500
    limit: int = 0
    scores: tuple[str, ...] = ()
    workdir: str = "runs/multi30k_transfer"


# {(way, pairs, seed): test BLEU from English to French}
Scores = dict[tuple[str, int, int], float]


def variants(comparison: Comparison, pairs: int, seed: int) -> dict[str, Experiment]:
    """{way: the experiment} for a number of pairs of the target."""
    steps = comparison.steps
    sources = (_source("target", "{en,fr}", comparison.limit, pairs), _source("source", "{en,de}", comparison.limit))
    base = dataclasses.replace(EXPERIMENT, sources=sources, seed=seed, phases=(Phase("everything", steps=steps),))
    target, source = {"fr": 1.0, "de": 0.0}, {"fr": 0.0, "de": 1.0}
    target_shares, source_shares = {"target": 1.0, "source": 0.0}, {"target": 0.0, "source": 1.0}
    phases_of = {
        ALONE: (Phase("target", steps=steps, weights=dict(target), mixture="fixed", shares=target_shares),),
        THEN: (
            Phase("source", steps=steps // 2, weights=dict(source), mixture="fixed", shares=source_shares),
            Phase("target", steps=steps - steps // 2, weights=dict(target), mixture="fixed", shares=target_shares),
        ),
    }
    for number in comparison.lambdas:
        phases_of[f"lambda {number:g}"] = (Phase("both", steps=steps, weights={"fr": 1.0, "de": number}),)
        if comparison.falling:
            falls = f"linear_schedule({number:g}, 0.0, {steps})"
            phases_of[f"lambda {number:g} {FALLING}"] = (Phase("both", steps=steps, weights={"fr": 1.0, "de": falls}),)
    experiments = {way: dataclasses.replace(base, phases=phases) for way, phases in phases_of.items()}
    captions = _source("target", "{en,fr,de}", comparison.limit, pairs)
    both = (FRENCH, dataclasses.replace(GERMAN, source="target"))
    return experiments | {TOGETHER: dataclasses.replace(base, sources=(captions,), tasks=both)}


def compare(comparison: Comparison) -> str:
    """Trains the runs that are not done, draws the figure, and returns the table.

    Raises:
        UserError: A run cannot be resumed.
    """
    if not (comparison.seeds and comparison.pairs):
        raise UserError("give at least one of pairs, and one of seeds")
    scores = read(comparison)
    folder = Path(comparison.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    for pairs in comparison.pairs:
        for seed in comparison.seeds:
            for way, experiment in variants(comparison, pairs, seed).items():
                if (way, pairs, seed) not in scores:
                    name = "".join(letter if letter.isalnum() or letter == "." else "-" for letter in way)
                    results = mtl_jax.train(experiment, folder / f"{name}-{pairs}-{seed}")
                    scores[way, pairs, seed] = 100 * results["tasks"]["fr"]["test"]["bleu"]
                    write(scores, comparison, folder / "scores.json")
    write(scores, comparison, folder / "scores.json")
    text = table(scores, comparison.pairs)
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    draw(scores, comparison, folder / "lambda.png")
    return text


def read(comparison: Comparison) -> Scores:
    """The scores in the files of other workdirs.

    Raises:
        UserError: A file was not written by this script, or has scores of runs with other steps or another limit.
    """
    scores: Scores = {}
    for path in comparison.scores:
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            scores |= {(row["way"], row["pairs"], row["seed"]): float(row["bleu"]) for row in content["scores"]}
            steps, limit = content["steps"], content["limit"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a scores.json that this script wrote ({type(error).__name__}: {error})") from error
        if (steps, limit) != (comparison.steps, comparison.limit):
            raise UserError(f"{path} is of {steps} steps and limit {limit}, not of {comparison.steps} and {comparison.limit}")
    return scores


def write(scores: Scores, comparison: Comparison, path: Path) -> None:
    """Writes the file that read() reads."""
    rows = [{"way": way, "pairs": pairs, "seed": seed, "bleu": bleu} for (way, pairs, seed), bleu in scores.items()]
    content = {"steps": comparison.steps, "limit": comparison.limit, "scores": rows}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def of_seeds(scores: Scores, way: str, pairs: int) -> list[float]:
    """The score of each seed."""
    return [bleu for (a, b, _), bleu in scores.items() if (a, b) == (way, pairs)]


def table(scores: Scores, pairs: tuple[int, ...]) -> str:
    """Test BLEU of every way: mean and standard deviation over the seeds; pairs are the columns."""

    def cell(values: list[float]) -> str:
        deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1f}{deviation}" if values else ""

    rows = [[way, *(cell(of_seeds(scores, way, n)) for n in pairs)] for way in dict.fromkeys(way for way, _, _ in scores)]
    return tabulate.tabulate(rows, headers=["", *(f"{n:,} pairs" for n in pairs)], tablefmt="github", disable_numparse=True)


def draw(scores: Scores, comparison: Comparison, path: Path) -> None:
    """BLEU over lambda, constant and falling, one line for each number of pairs; a dotted line is the target alone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    for color, pairs in zip(("tab:blue", "tab:orange", "tab:green"), comparison.pairs, strict=False):
        for suffix, style in (("", "-o"), (f" {FALLING}", "--s")):
            values = [of_seeds(scores, f"lambda {number:g}{suffix}", pairs) for number in comparison.lambdas]
            if all(values):
                means, label = list(map(statistics.mean, values)), f"{pairs:,} pairs, lambda{suffix or ' constant'}"
                axes.plot(comparison.lambdas, means, style, color=color, label=label)
        axes.axhline(
            statistics.mean(of_seeds(scores, ALONE, pairs)), color=color, linestyle=":", label=f"{pairs:,} pairs alone"
        )
    axes.set(xscale="log", xlabel="lambda", ylabel="BLEU, English to French")
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    mtl_jax.run(lambda: print(compare(tyro.cli(Comparison, description=__doc__))))
