"""A metric from numbers of each row: exact on any resample of the rows, without the model and without the texts.

Most metrics follow from sums over rows: of right answers, of the counts behind F1, of the n-grams behind BLEU. A correlation
follows from each row's prediction and label. With how often each row was drawn, all resamples are measured at once.

Shapes in names: N rows, D numbers of a row, B resamples, C classes, M labelled examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mtl_jax.tasks import metrics

Measure = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (f64[N, D], how often each row counts f64[B, N]) -> f64[B]
FLAT = 1e-12  # a variance below this share of the mean square is one of rounding


class RowStatistics(NamedTuple):
    """What a metric needs to know of each row.

    Attributes:
        values: f64[N, D]; zeros, or NaN in a correlation, for a row without a label.
        measure: The name in MEASURES of the function from them to the metric.
    """

    values: np.ndarray
    measure: str

    def metric(self, counts_BxN: np.ndarray) -> np.ndarray:
        """The metric of each resample, f64[B]; NaN where it is not defined.

        Args:
            counts_BxN: f64[B, N], how often each resample has each row; a row of ones gives the metric itself.
        """
        return MEASURES[self.measure](self.values, counts_BxN)


def mean(values_Nx2: np.ndarray, counts_BxN: np.ndarray) -> np.ndarray:
    """The sum of the first column over the sum of the second, such as right words over words."""
    totals_Bx2 = counts_BxN @ values_Nx2
    return _divided(totals_Bx2[:, 0], totals_Bx2[:, 1], np.nan)


def f1(values: np.ndarray, counts_BxN: np.ndarray) -> np.ndarray:
    """The mean F1 of the classes that occur in truth or prediction; columns as in class_counts()."""
    right_BxC, predicted_BxC, gold_BxC = _class_sums(values, counts_BxN)
    return _over_present(_divided(2 * right_BxC, predicted_BxC + gold_BxC, 0.0), predicted_BxC + gold_BxC)


def f1_of_all(values: np.ndarray, counts_BxN: np.ndarray) -> np.ndarray:
    """The mean F1 of all classes; that of a class that does not occur is 0."""
    right_BxC, predicted_BxC, gold_BxC = _class_sums(values, counts_BxN)
    return np.asarray(_divided(2 * right_BxC, predicted_BxC + gold_BxC, 0.0).mean(axis=1))


def precision(values: np.ndarray, counts_BxN: np.ndarray) -> np.ndarray:
    """As f1, of precision."""
    right_BxC, predicted_BxC, gold_BxC = _class_sums(values, counts_BxN)
    return _over_present(_divided(right_BxC, predicted_BxC, 0.0), predicted_BxC + gold_BxC)


def recall(values: np.ndarray, counts_BxN: np.ndarray) -> np.ndarray:
    """As f1, of recall."""
    right_BxC, predicted_BxC, gold_BxC = _class_sums(values, counts_BxN)
    return _over_present(_divided(right_BxC, gold_BxC, 0.0), predicted_BxC + gold_BxC)


def matthews(values: np.ndarray, counts_BxN: np.ndarray) -> np.ndarray:
    """Matthews' correlation of C classes (Gorodkin, 2004); 0 where truth or prediction has one class only."""
    right_BxC, predicted_BxC, gold_BxC = _class_sums(values, counts_BxN)
    rows_B = gold_BxC.sum(axis=1)
    covariance_B = right_BxC.sum(axis=1) * rows_B - (predicted_BxC * gold_BxC).sum(axis=1)
    spread_B = [rows_B**2 - (counts**2).sum(axis=1) for counts in (predicted_BxC, gold_BxC)]
    return _divided(covariance_B, np.sqrt(spread_B[0] * spread_B[1]), 0.0)


def kappa(values: np.ndarray, counts_BxN: np.ndarray) -> np.ndarray:
    """Cohen's kappa with quadratic weights; columns: squared error, one for each predicted label, one for each true one."""
    sums_BxD = counts_BxN @ values
    labels = (values.shape[1] - 1) // 2
    predicted_BxC, gold_BxC = sums_BxD[:, 1 : 1 + labels], sums_BxD[:, 1 + labels :]
    squares_CxC = np.square(np.subtract.outer(np.arange(labels), np.arange(labels))).astype(np.float64)
    rows_B = gold_BxC.sum(axis=1)
    chance_B = ((predicted_BxC @ squares_CxC) * gold_BxC).sum(axis=1)
    return 1 - _divided(sums_BxD[:, 0] * rows_B, chance_B, np.nan)


def pearson(values_Nx2: np.ndarray, counts_BxN: np.ndarray) -> np.ndarray:
    """Pearson's correlation of both columns; NaN where one of them is constant or not finite."""
    labelled_Nx2, counts_BxM = _labelled(values_Nx2, counts_BxN)
    return _correlation(labelled_Nx2[:, 0], labelled_Nx2[:, 1], counts_BxM)


def spearman(values_Nx2: np.ndarray, counts_BxN: np.ndarray) -> np.ndarray:
    """Spearman's correlation of both columns: ranks are those within each resample, equal values share their mean rank."""
    labelled_Nx2, counts_BxM = _labelled(values_Nx2, counts_BxN)
    if not np.isfinite(labelled_Nx2).all():  # such numbers have no rank
        return np.full(len(counts_BxN), np.nan)
    return _correlation(_ranks(labelled_Nx2[:, 0], counts_BxM), _ranks(labelled_Nx2[:, 1], counts_BxM), counts_BxM)


def _ranks(values_N: np.ndarray, counts_BxN: np.ndarray) -> np.ndarray:
    """f64[B, N], the mean rank of each row in each resample."""
    _, place_N = np.unique(values_N, return_inverse=True)
    order_N = np.argsort(place_N, kind="stable")
    starts = np.flatnonzero(np.diff(place_N[order_N], prepend=-1))
    equal_BxG = np.add.reduceat(counts_BxN[:, order_N], starts, axis=1)
    rank_BxG = np.cumsum(equal_BxG, axis=1) - equal_BxG / 2 + 0.5
    return np.asarray(rank_BxG[:, place_N])


def _correlation(first: np.ndarray, second: np.ndarray, counts_BxN: np.ndarray) -> np.ndarray:
    """Pearson's correlation of f64[N] or f64[B, N]."""
    if not counts_BxN.shape[1] or not np.isfinite(first).all():
        return np.full(len(counts_BxN), np.nan)
    # Near 0, so that sums of squares keep their digits.
    first, second = (numbers - numbers.mean() for numbers in (first, second))
    rows_B = np.maximum(counts_BxN.sum(axis=1), 1.0)

    def product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return np.asarray((counts_BxN * left * right).sum(axis=1) / rows_B)

    ones = np.ones(counts_BxN.shape[1])
    means_B = product(first, ones), product(second, ones)
    squares_B = product(first, first), product(second, second)
    variances_B = [square - average**2 for square, average in zip(squares_B, means_B, strict=True)]
    varies_B = np.all([part > FLAT * square for part, square in zip(variances_B, squares_B, strict=True)], axis=0)
    covariance_B = product(first, second) - means_B[0] * means_B[1]
    spread_B = np.sqrt(np.where(varies_B, variances_B[0] * variances_B[1], 1.0))
    return np.where(varies_B, np.clip(covariance_B / spread_B, -1.0, 1.0), np.nan)


def _labelled(values_Nx2: np.ndarray, counts_BxN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both without the rows whose label, the second column, is NaN."""
    labelled_N = ~np.isnan(values_Nx2[:, 1])
    return values_Nx2[labelled_N], counts_BxN[:, labelled_N]


def _text_metric(name: str) -> Measure:
    """The corpus metric of sums of sacrebleu's statistics of each text."""

    def measure(values: np.ndarray, counts_BxN: np.ndarray) -> np.ndarray:
        sums_BxD = np.rint(counts_BxN @ values).astype(np.int64)
        return np.array([metrics.score_of_sums(name, sums) for sums in sums_BxD.tolist()], np.float64)

    return measure


MEASURES: Mapping[str, Measure] = {
    "mean": mean,
    "f1": f1,
    "f1_of_all": f1_of_all,
    "precision": precision,
    "recall": recall,
    "matthews": matthews,
    "kappa": kappa,
    "pearson": pearson,
    "spearman": spearman,
    **{name: _text_metric(name) for name in metrics.FAMILIES[0]},
}


def class_counts(gold_M: np.ndarray, predicted_M: np.ndarray, classes: int) -> np.ndarray:
    """f64[M, 3 C]: for each class whether it is predicted rightly, whether it is predicted, and whether it is true.

    Args:
        gold_M: The true class of each example.
        predicted_M: The predicted one.
        classes: C.
    """
    predicted_MxC, gold_MxC = (numbers[:, None] == np.arange(classes) for numbers in (predicted_M, gold_M))
    return np.concatenate([predicted_MxC & gold_MxC, predicted_MxC, gold_MxC], axis=1).astype(np.float64)


def of_labels(metric: str, gold_M: np.ndarray, predicted_M: np.ndarray, labels: Sequence[str]) -> RowStatistics:
    """Statistics of M examples for a metric of metrics.scores().

    Args:
        metric: Its name.
        gold_M: The true labels, indices into the label set.
        predicted_M: The predicted ones.
        labels: The label set.
    """
    if metric == "accuracy":
        return RowStatistics(shares(gold_M == predicted_M), "mean")
    counts_MxD = class_counts(gold_M, predicted_M, len(labels))
    if chosen := metrics.f1_labels(metric, tuple(labels)):
        columns = [part * len(labels) + label for part in range(3) for label in chosen]
        return RowStatistics(counts_MxD[:, columns], "f1_of_all")
    return RowStatistics(counts_MxD, {"macro_f1": "f1", "macro_recall": "recall", "matthews": "matthews"}[metric])


def of_texts(metric: str, texts: Sequence[str], references: Sequence[Sequence[str] | None]) -> RowStatistics:
    """Statistics of N rows for a metric of generated texts: bleu, chrf, ROUGE, exact or f1.

    Args:
        metric: Its name.
        texts: The generated text of each row.
        references: The reference texts of each row; none for a row that does not count.
    """
    rows = [row for row, gold in enumerate(references) if gold]
    pairs = [(texts[row], references[row] or ()) for row in rows]
    values = metrics.text_statistics(metric, [text for text, _ in pairs], [gold for _, gold in pairs])
    measure = metric if metric in metrics.FAMILIES[0] else "mean"
    return by_row(RowStatistics(np.array(values, np.float64), measure), rows, len(references))


def of_tokens(right: Sequence[np.ndarray], row_of: np.ndarray, rows: int) -> RowStatistics:
    """Statistics of rows for the share of right tokens.

    Args:
        right: For each example 1 or 0 for each of its tokens that count.
        row_of: The row of each example.
        rows: The number of rows.
    """
    sums = np.array([[tokens.sum(dtype=np.float64), len(tokens)] for tokens in right], np.float64).reshape(-1, 2)
    return by_row(RowStatistics(sums, "mean"), row_of, rows)


def shares(values_M: Any) -> np.ndarray:
    """f64[M, 2] for the mean of a number of each example."""
    values_M = np.asarray(values_M, np.float64)
    return np.stack([values_M, np.ones(len(values_M))], axis=1)


def by_row(statistics: RowStatistics, row_of_M: Any, rows: int) -> RowStatistics:
    """Statistics of N rows from those of M examples.

    Args:
        statistics: Of the examples: sums over a row's examples are those of the row; for a correlation one example a row.
        row_of_M: The row of each example.
        rows: N; a row without an example counts in nothing.
    """
    row_of_M = np.asarray(row_of_M, np.int64)
    if statistics.measure in ("pearson", "spearman"):
        values = np.full((rows, 2), np.nan)
        values[row_of_M] = statistics.values
    else:
        values = np.zeros((rows, statistics.values.shape[1]))
        np.add.at(values, row_of_M, statistics.values)
    return RowStatistics(values, statistics.measure)


def _class_sums(values: np.ndarray, counts_BxN: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """f64[B, C] each: right predictions, predictions, and true labels of each class."""
    sums_Bx3xC = (counts_BxN @ values).reshape(len(counts_BxN), 3, -1)
    return sums_Bx3xC[:, 0], sums_Bx3xC[:, 1], sums_Bx3xC[:, 2]


def _over_present(score_BxC: np.ndarray, occurs_BxC: np.ndarray) -> np.ndarray:
    """The mean over the classes that occur; 0 where none does."""
    present_BxC = occurs_BxC > 0
    return _divided((score_BxC * present_BxC).sum(axis=1), present_BxC.sum(axis=1), 0.0)


def _divided(numerator: np.ndarray, denominator: np.ndarray, otherwise: float) -> np.ndarray:
    """The quotient, and another number where the denominator is 0."""
    positive = denominator > 0
    return np.where(positive, numerator / np.where(positive, denominator, 1.0), otherwise)
