"""Texts against texts, as question answering is scored: exact match and F1 of shared words.

The normalisation and both scores are those of SQuAD (Rajpurkar et al., 2016); a question without an answer is that of SQuAD 2.0
(Rajpurkar et al., 2018): the answer is then the empty text.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation, then without articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact(predicted: str, gold: Iterable[str]) -> float:
    """1 if the text equals one of the gold answers after normalisation, else 0; no gold answer: the empty text is right."""
    return max(float(normalise(predicted) == normalise(answer)) for answer in _known(gold))


def f1(predicted: str, gold: Iterable[str]) -> float:
    """The best F1 of words, as multisets after normalisation, over the gold answers; no gold answer: the empty text is right.

    Where one of two texts has no word, the score is 1 if the other has none either, else 0.
    """
    return max(_shared_words(predicted, answer) for answer in _known(gold))


def score(predicted: Sequence[str], gold: Sequence[Iterable[str]]) -> dict[str, float]:
    """Means of exact and f1 over N questions, shares of 1.

    Args:
        predicted: N texts; "" says that there is no answer.
        gold: The gold answers of each, none or more.
    """
    pairs = list(zip(predicted, gold, strict=True))
    return {
        "exact": sum(exact(text, answers) for text, answers in pairs) / len(pairs),
        "f1": sum(f1(text, answers) for text, answers in pairs) / len(pairs),
    }


def _known(gold: Iterable[str]) -> list[str]:
    """The answers that are more than punctuation and articles; if there is none, the empty text, which says "no answer"."""
    return [answer for answer in gold if normalise(answer)] or [""]


def _shared_words(predicted: str, gold: str) -> float:
    predicted_words, gold_words = normalise(predicted).split(), normalise(gold).split()
    if not predicted_words or not gold_words:
        return float(predicted_words == gold_words)
    shared = (Counter(predicted_words) & Counter(gold_words)).total()
    return 2 * shared / (len(predicted_words) + len(gold_words))
