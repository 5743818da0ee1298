"""The sets of few_labels.py: a few labelled rows by draw, as many for dev, the same test and unlabelled rows for every draw.

MTL_JAX_DATA names a folder with sentences/, tweeteval/, mrpc/ and tweebank/. The test is at most TEST_ROWS rows, chosen by a
hash of the text. The training file is divided by such a hash, too: one half, at most UNLABELLED_ROWS rows, gives texts without
labels, and a draw takes its rows from the rest. So no draw sees a label of an unlabelled row.
"""

import functools
import hashlib
from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np

from mtl_jax import Source
from mtl_jax.core.errors import UserError
from mtl_jax.data.splits import read

TEST_ROWS, UNLABELLED_ROWS = 300, 2000
ROW_LENGTH = 64  # tokens of a row of a batch
ROWS_OF_NAMES = {16: 64, 64: 256}  # sentences of a set of names, for rows of a class


class FewLabelSet(NamedTuple):
    """A data set.

    Attributes:
        source: Where its rows come from.
        label: The column with the label, or with the labels of the words.
        metric: The metric on test.
        names: Whether words have labels.
        row_length: Tokens of a row of a batch.
    """

    source: Source
    label: str = "label"
    metric: str = "accuracy"
    names: bool = False
    row_length: int = ROW_LENGTH


class Rows(NamedTuple):
    """Rows with the columns text, pair (of pairs) and label.

    Attributes:
        pool: Those that draws take their rows from.
        test: Test rows.
        unlabelled: Rows without labels.
        labels: All labels of pool and test, in order.
    """

    pool: list[dict[str, Any]]
    test: list[dict[str, Any]]
    unlabelled: list[dict[str, Any]]
    labels: tuple[str, ...]


def _lines(name: str, train: str, test: str = "") -> Source:
    pattern = r"(?P<label>\d) (?P<text>.+)"
    path = f"data:sentences/{train}"
    return Source(name=name, path=path, test_path=test, format="lines", pattern=pattern, lenient=True)


SETS = {
    "trec": FewLabelSet(_lines("trec", "TREC.train.all", "data:sentences/TREC.test.all")),
    "sst2": FewLabelSet(_lines("sst2", "stsa.binary.train", "data:sentences/stsa.binary.test")),
    "subj": FewLabelSet(_lines("subj", "subj.all")),
    "emotion": FewLabelSet(
        Source(
            name="emotion",
            path="data:tweeteval/emotion/train_{text,labels}.txt",
            test_path="data:tweeteval/emotion/test_{text,labels}.txt",
            format="parallel",
            columns=("text", "label"),
        ),
        metric="macro_f1",
    ),
    "mrpc": FewLabelSet(
        Source(
            name="mrpc",
            path="data:mrpc/msr-para-train.tsv",
            test_path="data:mrpc/msr-para-test.tsv",
            format="tsv",
            text="#1 String",
            pair="#2 String",
        ),
        label="Quality",
        metric="macro_f1",
        row_length=128,
    ),
    "tweebank": FewLabelSet(
        Source(
            name="tweebank",
            path="data:tweebank/train.tsv",
            test_path="data:tweebank/test.tsv",
            format="conll",
            columns=("text", "pos", "entities"),
        ),
        label="entities",
        metric="entity_f1",
        names=True,
    ),
}


def _by_hash(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: hashlib.sha256(repr((row["text"], row.get("pair"))).encode()).digest())


@functools.cache
def rows_of(name: str) -> Rows:
    """The rows of a set.

    Raises:
        UserError: A file is not there or cannot be read.
    """
    few = SETS[name]
    columns = {"text": few.source.text, "label": few.label} | ({"pair": few.source.pair} if few.source.pair else {})
    splits = {
        split: _by_hash([{new: row.columns[old] for new, old in columns.items()} for row in rows])
        for split, rows in read(few.source).rows.items()
    }
    train = [*splits["train"], *splits["dev"]]
    count = min(UNLABELLED_ROWS, len(train) // 2)
    pool, test = train[count:], splits["test"][:TEST_ROWS]
    values = [row["label"] for row in (*train, *splits["test"])]
    labels = {label for value in values for label in (value if few.names else [value])}
    unlabelled = [{column: value for column, value in row.items() if column != "label"} for row in train[:count]]
    return Rows(pool, test, unlabelled, tuple(sorted(labels)))


def drawn(name: str, rows: int, draw: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The labelled rows of a draw, and as many for dev.

    Of a class with fewer rows than twice as many, train and dev have half each.

    Args:
        name: The set.
        rows: Rows of a class; ROWS_OF_NAMES says how many sentences of a set of names.
        draw: The draw.

    Raises:
        UserError: As rows_of(), or a class has a single row.
    """
    pool = rows_of(name).pool
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for place in np.random.default_rng([draw, len(pool)]).permutation(len(pool)).tolist():
        groups["" if SETS[name].names else pool[place]["label"]].append(pool[place])
    wanted = ROWS_OF_NAMES.get(rows, 4 * rows) if SETS[name].names else rows
    counts = {label: min(wanted, len(group) // 2) for label, group in groups.items()}
    if not all(counts.values()):
        raise UserError(f"{name}: a class has fewer than 2 rows, so that train and dev cannot both have one")
    train = [row for label, group in groups.items() for row in group[: counts[label]]]
    dev = [row for label, group in groups.items() for row in group[counts[label] : 2 * counts[label]]]
    return train, dev


def source_of(name: str, rows: int, draw: int) -> Source:
    """The source "few" of a draw, with the test rows of its set."""
    train, dev = drawn(name, rows, draw)
    pair = "pair" if SETS[name].source.pair else ""
    return Source(name="few", rows=train, dev_rows=dev, test_rows=rows_of(name).test, pair=pair)
