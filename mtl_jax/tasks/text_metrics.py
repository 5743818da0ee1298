"""Metrics of generated texts by the libraries whose numbers are published: sacrebleu (Post, 2018) and rouge-score.

They are shares of 1, as all metrics here: a BLEU of 61.8 is 0.618.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

FAMILIES = (("bleu", "chrf"), ("rouge1", "rouge2", "rougeL"))
NAMES = tuple(name for names in FAMILIES for name in names)


def family(name: str) -> tuple[str, ...]:
    """The metrics that are computed together with this one; () for a name that is none."""
    return next((names for names in FAMILIES if name in names), ())


def scores(name: str, texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """The metrics of family(name).

    bleu, chrf: corpus BLEU and chrF of sacrebleu with its defaults, over all references of a text. rouge1, rouge2, rougeL: the
    mean over texts of ROUGE's F1 of rouge-score with stemming; of several references the nearest one counts, by each metric.

    Args:
        name: A metric.
        texts: Generated texts.
        references: For each of them one or more texts that would have been right.
    """
    names = family(name)
    if not names or not texts:
        return dict.fromkeys(names, 0.0)
    if "bleu" in names:
        streams = _streams(references)
        return {key: metric.corpus_score(list(texts), streams).score / 100 for key, metric in _sacrebleu().items()}
    scorer = _rouge(names)
    found = [scorer.score_multi(list(right), text) for text, right in zip(texts, references, strict=True)]
    return {key: sum(each[key].fmeasure for each in found) / len(found) for key in names}


def signatures(name: str, references: Sequence[Sequence[str]]) -> dict[str, str]:
    """{metric: how scores(name, texts, references) computed it, and by which version}."""
    from importlib.metadata import version

    names = family(name)
    if "bleu" in names:
        # A signature says how many references there were, which a metric knows once it has seen some: as many, or not as many.
        counts = sorted({len(found) for found in references}) or [1]
        few = [["a"] * count for count in (counts[0], counts[-1])]
        metrics = _sacrebleu()
        for metric in metrics.values():
            metric.corpus_score(["a"] * len(few), _streams(few))
        return {key: str(metric.get_signature()) for key, metric in metrics.items()}
    return {key: f"rouge-score:{version('rouge-score')}|stemmer:yes|F1|refs:best" for key in names}


def _streams(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """As sacrebleu takes references: one list for each place, with None, which it leaves out, where a text has fewer."""
    most = max(map(len, references))
    return [[found[place] if place < len(found) else None for found in references] for place in range(most)]


def _sacrebleu() -> dict[str, Any]:
    from sacrebleu.metrics import BLEU, CHRF  # imported late: not every run has texts

    return {"bleu": BLEU(), "chrf": CHRF()}


def _rouge(names: Sequence[str]) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(names), use_stemmer=True)
