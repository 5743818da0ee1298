"""Metrics of labels (scikit-learn), of short answers (SQuAD), and of generated texts (sacrebleu, rouge-score).

The metrics of the TweetEval benchmark (Barbieri et al. 2020), with the benchmark's names of labels:

| data set | metric |
|---|---|
| emotion, hate, offensive, emoji | macro_f1 |
| irony | f1:1, the F1 of ironic tweets |
| stance | f1:1+2, the mean F1 of against and favor, over the five targets together |
| sentiment | macro_recall |
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from mtl_jax.core.errors import UserError, listed
from mtl_jax.core.parts import Registry
from mtl_jax.core.versions import installed

NAMES = ("accuracy", "macro_f1", "macro_recall", "matthews")
F1_OF = "f1:"
FAMILIES = (("bleu", "chrf"), ("rouge1", "rouge2", "rougeL"))  # metrics of texts that are computed together
TEXT_METRICS = tuple(name for names in FAMILIES for name in names)

# A metric of a script's own: (predictions, references) -> a number, higher is better; Task.compared() says what they are.
METRICS: Registry[Callable[[Any, Any], float]] = Registry("metric", {})
# @register_metric("mine") above such a function: Task.metric and Task.more_metrics may name it.
register_metric = METRICS.register

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def registered_scores(names: Iterable[str], predictions: Any, references: Any) -> dict[str, float]:
    """{metric: value} of the registered metrics among these names."""
    return {name: float(METRICS[name](predictions, references)) for name in names if name in METRICS}


def names(metric: str) -> tuple[str, ...]:
    """The metrics that can be the main one: the four, and `metric` itself if it is f1:LABEL or f1:LABEL+LABEL."""
    return (*NAMES, metric) if metric.startswith(F1_OF) and len(metric) > len(F1_OF) else NAMES


def f1_labels(metric: str, labels: tuple[str, ...]) -> list[int]:
    """Indices of the labels in f1:LABEL or f1:LABEL+LABEL; none for the other metrics.

    Raises:
        UserError: One of them is not in the label set.
    """
    if not metric.startswith(F1_OF):
        return []
    named = metric.removeprefix(F1_OF)
    parts = [named] if named in labels else named.split("+")
    for part in parts:
        if part not in labels:
            raise UserError(f"metric {metric!r}: {part!r} is not in the label set ({listed(labels)})")
    return [labels.index(part) for part in parts]


def scores(gold_N: np.ndarray, predicted_N: np.ndarray, metric: str, labels: tuple[str, ...]) -> dict[str, float]:
    """The four metrics, and `metric` if it is an F1 of labels; shares of 1, Matthews from -1 to 1.

    F1 and recall are averaged over the labels that occur in truth or prediction. A division by 0 gives 0.

    Args:
        gold_N: The true labels, indices into the label set.
        predicted_N: The predicted ones.
        metric: The task's metric.
        labels: The label set.
    """
    from sklearn.metrics import f1_score, matthews_corrcoef, recall_score

    one_label = len(np.unique(np.concatenate([gold_N, predicted_N]))) < 2  # scikit-learn warns where nothing varies
    result = {
        "accuracy": float((predicted_N == gold_N).mean()),
        "macro_f1": float(f1_score(gold_N, predicted_N, average="macro", zero_division=0)),
        "macro_recall": float(recall_score(gold_N, predicted_N, average="macro", zero_division=0)),
        "matthews": 0.0 if one_label else float(matthews_corrcoef(gold_N, predicted_N)),
    }
    if indices := f1_labels(metric, labels):
        result[metric] = float(f1_score(gold_N, predicted_N, labels=indices, average="macro", zero_division=0))
    return result


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


def generated_exact(predicted: str, gold: Iterable[str]) -> float:
    """1 if a generated text equals one of the gold answers, else 0.

    As exact(), but a gold answer that normalises to nothing is one, too: articles are kept to compare with it ("A"), and if
    nothing is left still, punctuation ("<").
    """
    return max(float(form(predicted) == form(answer)) for answer, form in _with_forms(gold))


def generated_f1(predicted: str, gold: Iterable[str]) -> float:
    """The best F1 of words of a generated text over the gold answers, compared as in generated_exact()."""
    return max(_shared_words(predicted, answer, form) for answer, form in _with_forms(gold))


ShortAnswers = dict[str, Callable[[str, Iterable[str]], float]]
SHORT_ANSWERS: ShortAnswers = {"exact": exact, "f1": f1}  # of SQuAD, where an article or a mark does not count as an answer
GENERATED_ANSWERS: ShortAnswers = {"exact": generated_exact, "f1": generated_f1}


def answer_scores(
    predicted: Sequence[str], gold: Sequence[Iterable[str]], scores: ShortAnswers = SHORT_ANSWERS
) -> dict[str, float]:
    """Means of exact and f1 over N questions, shares of 1.

    Args:
        predicted: N texts; "" means "no answer".
        gold: The gold answers of each, none or more.
        scores: The functions that compare: SHORT_ANSWERS, or GENERATED_ANSWERS.
    """
    pairs = list(zip(predicted, gold, strict=True))
    return {name: sum(score(text, answers) for text, answers in pairs) / len(pairs) for name, score in scores.items()}


def _known(gold: Iterable[str]) -> list[str]:
    """The answers that are more than punctuation and articles; if there is none, the empty text, which means "no answer"."""
    return [answer for answer in gold if normalise(answer)] or [""]


def _with_articles(text: str) -> str:
    return " ".join(text.lower().translate(_PUNCTUATION).split())


def _as_written(text: str) -> str:
    return " ".join(text.casefold().split())


def _with_forms(gold: Iterable[str]) -> list[tuple[str, Callable[[str], str]]]:
    """Each gold answer, with the first way to compare texts that leaves something of it."""
    forms = (normalise, _with_articles)
    return [(answer, next((form for form in forms if form(answer)), _as_written)) for answer in gold] or [("", _as_written)]


def _shared_words(predicted: str, gold: str, form: Callable[[str], str] = normalise) -> float:
    predicted_words, gold_words = form(predicted).split(), form(gold).split()
    if not predicted_words or not gold_words:
        return float(predicted_words == gold_words)
    shared = (Counter(predicted_words) & Counter(gold_words)).total()
    return 2 * shared / (len(predicted_words) + len(gold_words))


def family(name: str) -> tuple[str, ...]:
    """The text metrics that are computed together with this one; () for any other name."""
    return next((names for names in FAMILIES if name in names), ())


def text_scores(name: str, texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """The metrics of family(name).

    bleu, chrf: corpus BLEU and chrF of sacrebleu with its defaults, over all references of a text. rouge1, rouge2, rougeL: the
    mean over texts of ROUGE's F1 of rouge-score with stemming; of several references the best one counts, for each metric.

    Args:
        name: A metric.
        texts: Generated texts.
        references: For each of them one or more reference texts.
    """
    names = family(name)
    if not names or not texts:
        return dict.fromkeys(names, 0.0)
    if "bleu" in names:
        streams = _streams(references)
        return {key: metric.corpus_score(list(texts), streams).score / 100 for key, metric in _sacrebleu().items()}
    scorer = _rouge(names)
    results = [scorer.score_multi(list(targets), text) for text, targets in zip(texts, references, strict=True)]
    return {key: sum(result[key].fmeasure for result in results) / len(results) for key in names}


def text_statistics(name: str, texts: Sequence[str], references: Sequence[Sequence[str]]) -> list[list[float]]:
    """Of each text the numbers whose sums give a metric: sacrebleu's counts for bleu or chrf; for others its score, and 1.

    Args:
        name: As for text_scores(), or exact or f1; texts and references are as there, too.
    """
    if not texts:
        return []
    if name in GENERATED_ANSWERS:
        return [[GENERATED_ANSWERS[name](text, gold), 1.0] for text, gold in zip(texts, references, strict=True)]
    if name in FAMILIES[0]:
        return _sacrebleu()[name]._extract_corpus_statistics(list(texts), _streams(references))
    scorer = _rouge([name])
    scores = [scorer.score_multi(list(targets), text)[name] for text, targets in zip(texts, references, strict=True)]
    return [[score.fmeasure, 1.0] for score in scores]


def score_of_sums(name: str, sums: list[int]) -> float:
    """bleu or chrf, a share of 1, of the sums over texts of text_statistics()."""
    return float(_sacrebleu()[name]._compute_score_from_stats(sums).score) / 100


def signatures(name: str, references: Sequence[Sequence[str]]) -> dict[str, str]:
    """{metric: how text_scores(name, texts, references) computes it, and with which version of the library}."""
    names = family(name)
    if "bleu" in names:
        # A signature has the number of references, or that it varies; a metric learns it from texts, so it is given some.
        counts = sorted({len(targets) for targets in references}) or [1]
        few = [["a"] * count for count in (counts[0], counts[-1])]
        metrics = _sacrebleu()
        for metric in metrics.values():
            metric.corpus_score(["a"] * len(few), _streams(few))
        return {key: str(metric.get_signature()) for key, metric in metrics.items()}
    return {key: f"rouge-score:{installed('rouge-score')}|stemmer:yes|F1|refs:best" for key in names}


def _streams(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """References in the form of sacrebleu: the n-th list has each text's n-th reference, or None if it has fewer."""
    most = max(map(len, references))
    return [[targets[n] if n < len(targets) else None for targets in references] for n in range(most)]


def _sacrebleu() -> dict[str, Any]:
    from sacrebleu.metrics import BLEU, CHRF  # imported late: not every run has texts

    return {"bleu": BLEU(), "chrf": CHRF()}


def _rouge(names: Sequence[str]) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(names), use_stemmer=True)
