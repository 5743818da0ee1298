"""Entities as BIO tags: their meaning, valid sequences, the best valid one, precision and recall.

"B-X" begins an entity of type X, "I-X" continues it, "O" is outside (Ramshaw and Marcus 1995, in the variant where every
entity begins with B). Shapes in names: L words, O labels.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


class Entity(NamedTuple):
    """Words start..end of a sentence, end excluded."""

    type: str
    start: int
    end: int


def is_tag(label: str) -> bool:
    """Whether a label is O, B-something or I-something."""
    return label == "O" or (label.startswith(("B-", "I-")) and len(label) > 2)


def is_bio(labels: Sequence[str]) -> bool:
    """Whether a label set is one of BIO tags: every label is O, B-something or I-something."""
    return bool(labels) and all(map(is_tag, labels))


def has_entities(labels: Iterable[str]) -> bool:
    """Whether any label is B-something or I-something."""
    return any(label != "O" and is_tag(label) for label in labels)


def invalid_tags(tags: Sequence[str | None]) -> list[int]:
    """Indices of each I-X that follows neither B-X nor I-X. After an unknown tag, None, every tag is valid."""
    invalid = []
    for index, tag in enumerate(tags):
        before = tags[index - 1] if index else "O"
        if tag is not None and tag.startswith("I-") and before not in (None, tag, f"B-{tag[2:]}"):
            invalid.append(index)
    return invalid


def repaired(tags: Sequence[str | None]) -> list[str | None]:
    """The same tags where every I-X that follows neither B-X nor I-X is B-X."""
    invalid = set(invalid_tags(tags))
    return [f"B-{tag[2:]}" if tag is not None and index in invalid else tag for index, tag in enumerate(tags)]


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of a sentence, in order.

    An I-X that follows neither B-X nor I-X begins an entity too, as in conlleval (Tjong Kim Sang 2000) and seqeval.
    """
    result: list[Entity] = []
    begins = {index for index, tag in enumerate(tags) if tag.startswith("B-")} | set(invalid_tags(tags))
    for index, tag in enumerate(tags):
        if index in begins:
            result.append(Entity(tag[2:], index, index + 1))
        elif tag.startswith("I-"):
            result[-1] = result[-1]._replace(end=index + 1)
    return result


def decode(scores_LxO: np.ndarray, labels: tuple[str, ...]) -> np.ndarray:
    """The label sequence with the highest sum of scores; for a BIO label set, the highest among valid sequences.

    Viterbi's algorithm (1967) without transition scores. The only rule is that I-X follows B-X or I-X, so a word costs O steps
    and not O * O. If the best labels of the words already form a valid sequence, it is returned at once.

    Args:
        scores_LxO: Logits or log probabilities of the words; finite.
        labels: The label set.

    Returns:
        i64[L], indices into the label set.
    """
    best_L = scores_LxO.argmax(axis=-1)
    if not len(best_L) or not is_bio(labels):
        return best_L
    rules = _rules(labels)
    before_L = np.concatenate([[-1], rules.type_O[best_L[:-1]]])
    needed_L = rules.needs_O[best_L]
    if ((needed_L < 0) | (needed_L == before_L)).all():
        return best_L

    total_O = np.where(rules.needs_O >= 0, -np.inf, scores_LxO[0].astype(np.float64))
    back_LxO = np.zeros(scores_LxO.shape, np.int64)
    inside, begin = rules.inside, rules.begin
    for word in range(1, len(scores_LxO)):
        back_O = back_LxO[word]
        back_O[:] = total_O.argmax()
        back_O[inside] = np.where(total_O[begin] >= total_O[inside], begin, inside)
        total_O = total_O[back_O] + scores_LxO[word]
    best_L[-1] = total_O.argmax()
    for word in range(len(best_L) - 1, 0, -1):
        best_L[word - 1] = back_LxO[word, best_L[word]]
    return best_L


class _Rules(NamedTuple):
    """The label set as numbers: which labels may follow which.

    Attributes:
        type_O: Number of the entity type of each label, -1 for O.
        needs_O: The entity type that the label before must have; -1 if any label may be before it.
        inside: The labels I-X.
        begin: For each of them B-X; I-X itself where the label set lacks B-X, so that it is never reached.
    """

    type_O: np.ndarray
    needs_O: np.ndarray
    inside: np.ndarray
    begin: np.ndarray


@functools.lru_cache
def _rules(labels: tuple[str, ...]) -> _Rules:
    types = {name: number for number, name in enumerate(sorted({label[2:] for label in labels if label != "O"}))}
    indices = {label: index for index, label in enumerate(labels)}
    inside = [index for index, label in enumerate(labels) if label.startswith("I-")]
    return _Rules(
        type_O=np.array([-1 if label == "O" else types[label[2:]] for label in labels]),
        needs_O=np.array([types[label[2:]] if label.startswith("I-") else -1 for label in labels]),
        inside=np.array(inside, np.int64),
        begin=np.array([indices.get(f"B-{labels[index][2:]}", index) for index in inside], np.int64),
    )


class Scores(NamedTuple):
    """Shares of 1: an entity is right if its type and both ends are. 0 where the share would divide by 0."""

    precision: float
    recall: float
    f1: float


def entity_counts(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> np.ndarray:
    """f64[sentences, 3]: entities that are predicted rightly, predicted entities, and true ones.

    Args:
        gold: As for entity_scores(); so is predicted.
    """
    pairs = [(set(entities(truth)), set(entities(tags))) for truth, tags in zip(gold, predicted, strict=True)]
    return np.array([[len(truth & tags), len(tags), len(truth)] for truth, tags in pairs], np.float64).reshape(-1, 3)


def entity_scores(gold: Sequence[list[str]], predicted: Sequence[list[str]]) -> tuple[Scores, dict[str, Scores]]:
    """Precision, recall and F1 of the entities of a corpus, over all types together (micro) and of each type.

    seqeval counts them in its default mode, which is that of conlleval and of the published figures.

    Args:
        gold: The tags of each sentence.
        predicted: The predicted tags of each sentence, as many.
    """
    from seqeval.metrics.sequence_labeling import precision_recall_fscore_support

    types = sorted({tag[2:] for tags in (*gold, *predicted) for tag in tags if tag != "O"})
    if not types:
        return Scores(0.0, 0.0, 0.0), {}
    micro = precision_recall_fscore_support(gold, predicted, average="micro", zero_division=0)
    by_type = precision_recall_fscore_support(gold, predicted, average=None, zero_division=0)
    rows = zip(*(column.tolist() for column in by_type[:3]), strict=True)
    return Scores(*map(float, micro[:3])), {name: Scores(*row) for name, row in zip(types, rows, strict=True)}
