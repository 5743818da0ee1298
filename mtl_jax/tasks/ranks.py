"""Metrics of orders: reciprocal rank and discounted gain of lists, and of a search among texts; correlations.

Shapes in names: Q queries, C candidates, H width, M entries of a list.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mtl_jax.tasks.row_statistics import RowStatistics

CUTOFF = 10  # entries of a list that count for nDCG
CHUNK = 512  # queries that are compared at once


def of_list(scores_M: np.ndarray, gains_M: np.ndarray) -> dict[str, float] | None:
    """Reciprocal rank, nDCG at CUTOFF, and whether the first entry is one of the best; None where all gains are equal.

    Gains are 2^grade - 1 (Burges et al., 2005), discounted by log2(1 + rank). An entry is relevant if its grade is above the
    list's lowest one, for the reciprocal rank. Of equal scores the later entry comes first, so that a constant gains nothing
    from the order of a file.

    Args:
        scores_M: The score of each entry; the highest comes first.
        gains_M: Its grade, 0 or more.
    """
    if len(gains_M) < 2 or gains_M.max() == gains_M.min():
        return None
    order_M = np.argsort(-scores_M[::-1], kind="stable")
    grades_M = gains_M[::-1][order_M].astype(np.float64)
    discounts = 1 / np.log2(np.arange(2, min(CUTOFF, len(grades_M)) + 2))
    gain = ((2 ** grades_M[:CUTOFF] - 1) * discounts).sum()
    ideal = ((2 ** np.sort(grades_M)[::-1][:CUTOFF] - 1) * discounts).sum()
    first = int(np.flatnonzero(grades_M > grades_M.min())[0])
    return {"mrr": 1 / (first + 1), "ndcg": float(gain / ideal), "accuracy": float(grades_M[0] == grades_M.max())}


def of_lists(lists: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """The means of of_list() over the lists that have an order; NaN where none has.

    Args:
        lists: (scores, gains) of each.
    """
    measured = [scores for scores_M, gains_M in lists if (scores := of_list(scores_M, gains_M)) is not None]
    names = ("mrr", "ndcg", "accuracy")
    return {name: float(np.mean([scores[name] for scores in measured])) if measured else math.nan for name in names}


def statistics(metric: str, lists: Sequence[tuple[np.ndarray, np.ndarray]]) -> RowStatistics:
    """Of each list its metric, and whether it has an order and counts in the mean.

    Args:
        metric: mrr, ndcg or accuracy.
        lists: As for of_lists().
    """
    measured = [of_list(scores_M, gains_M) for scores_M, gains_M in lists]
    pairs = [(0.0, 0.0) if scores is None else (scores[metric], 1.0) for scores in measured]
    return RowStatistics(np.array(pairs, np.float64).reshape(-1, 2), "mean")


def of_search(
    query_QxH: np.ndarray,
    candidate_CxH: np.ndarray,
    relevant: Callable[[slice], np.ndarray],
    left_out: Callable[[slice], np.ndarray],
) -> dict[str, float]:
    """Metrics of a search by cosine: mrr, ndcg at CUTOFF with binary gains, and accuracy, the share with the first one right.

    Args:
        query_QxH: The queries, of length 1.
        candidate_CxH: The texts that are searched, of length 1.
        relevant: From a slice of queries to bool[q, C]: the right answers. A query without any is left out.
        left_out: From a slice of queries to bool[q, C]: candidates that are not compared with it.
    """
    totals, queries = np.zeros(3), 0
    for _, scores in search_scores(query_QxH, candidate_CxH, relevant, left_out):
        totals += [score_q.sum() for score_q in scores]
        queries += len(scores[0])
    mrr, ndcg, accuracy = totals / queries if queries else np.full(3, math.nan)
    return {"mrr": float(mrr), "ndcg": float(ndcg), "accuracy": float(accuracy)}


def search_scores(
    query_QxH: np.ndarray,
    candidate_CxH: np.ndarray,
    relevant: Callable[[slice], np.ndarray],
    left_out: Callable[[slice], np.ndarray],
) -> Iterator[tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """(queries, their reciprocal rank, gain and whether the first one is right) of each part of the queries that count.

    Args:
        query_QxH: As for of_search(); so are the others.
    """
    discounts = 1 / np.log2(np.arange(2, CUTOFF + 2))
    for start in range(0, len(query_QxH), CHUNK):
        part = slice(start, min(start + CHUNK, len(query_QxH)))
        out_qxC = left_out(part)
        relevant_qxC = relevant(part) & ~out_qxC
        counted = relevant_qxC.any(axis=1)
        if not counted.any():
            continue
        score_qxC = np.where(out_qxC, -np.inf, query_QxH[part] @ candidate_CxH.T)[counted]
        relevant_qxC = relevant_qxC[counted]
        best_q = np.where(relevant_qxC, score_qxC, -np.inf).max(axis=1)
        # Wrong answers with an equal score come first.
        rank_q = 1 + (~relevant_qxC & (score_qxC >= best_q[:, None])).sum(axis=1)
        top_qxk = np.lexsort((relevant_qxC, -score_qxC), axis=1)[:, :CUTOFF]
        hits_qxk = np.take_along_axis(relevant_qxC, top_qxk, axis=1)
        ideal_q = np.cumsum(discounts)[np.minimum(relevant_qxC.sum(axis=1), CUTOFF) - 1]
        gain_q = (hits_qxk * discounts[: hits_qxk.shape[1]]).sum(axis=1) / ideal_q
        yield start + np.flatnonzero(counted), (1 / rank_q, gain_q, rank_q == 1)


def correlations(first_N: np.ndarray, second_N: np.ndarray) -> dict[str, float]:
    """Pearson's and Spearman's correlation of N pairs of numbers.

    NaN where it is not defined: for numbers of which one is not finite, numbers that are all equal, and fewer than two pairs.

    Examples:
        >>> correlations(np.array([1, 2, 3]), np.array([1, 2, 9]))["spearman"]
        1.0
    """
    from scipy import stats

    both_2xN = np.stack([first_N, second_N]).astype(np.float64)
    defined = both_2xN.shape[1] > 1 and bool(np.isfinite(both_2xN).all() and (np.ptp(both_2xN, axis=1) > 0).all())
    return {
        "pearson": float(stats.pearsonr(*both_2xN).statistic) if defined else math.nan,
        "spearman": float(stats.spearmanr(*both_2xN).statistic) if defined else math.nan,
    }
