"""Checks of the arrays that estimators read; each error is one line that begins with the estimator's name."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mtl_jax.core.errors import UserError, count


class Labelled(NamedTuple):
    """Features and labels of N rows, checked.

    Attributes:
        features: f64[N, H].
        labels: f64[N] numbers, or i64[N] classes from 0 to classes - 1; each class has a row.
        classes: C, the number of classes; 0 for numbers.
    """

    features: np.ndarray
    labels: np.ndarray
    classes: int

    @property
    def targets(self) -> np.ndarray:
        """f64[N, C], a column of 0 and 1 for each class; for numbers f64[N, 1]."""
        if not self.classes:
            return self.labels[:, None]
        return (self.labels[:, None] == np.arange(self.classes)).astype(np.float64)


def labelled(estimator: str, features: Any, labels: Any, *, numbers: bool = False) -> Labelled:
    """Checks features and labels.

    Args:
        estimator: The estimator's name.
        features: [N, H], of any float dtype.
        labels: [N]: integers are classes, floats are numbers.
        numbers: Whether the estimator reads numbers, too.

    Raises:
        UserError: A shape, a dtype or a value is wrong, or the labels are all the same.
    """
    features_NxH = matrix(estimator, "features", features)
    labels_N = np.asarray(labels)
    check_rows(estimator, features=features_NxH, labels=labels_N)
    if numbers and np.issubdtype(labels_N.dtype, np.floating):
        numbers_N = labels_N.astype(np.float64)
        if not np.isfinite(numbers_N).all():
            raise UserError(f"{estimator}: row {_first(~np.isfinite(numbers_N))} has a label that is not finite")
        if np.ptp(numbers_N) == 0:
            raise UserError(f"{estimator}: all {count(len(numbers_N), 'label')} are {numbers_N[0]:g}; two values are needed")
        return Labelled(features_NxH, numbers_N, 0)
    classes_N, classes = class_numbers(estimator, "labels", labels_N)
    if classes < 2:
        rows = count(len(labels_N), "row has", "rows have")
        raise UserError(f"{estimator}: all {rows} label {labels_N[0]}; two classes are needed")
    return Labelled(features_NxH, classes_N, classes)


def class_numbers(estimator: str, name: str, labels: Any) -> tuple[np.ndarray, int]:
    """The classes of labels, numbered from 0 without gaps, i64[N]; and how many there are.

    Raises:
        UserError: The labels are not integers, have more than one axis, or there are none.
    """
    labels_N = np.asarray(labels)
    if labels_N.ndim != 1 or not len(labels_N):
        raise UserError(f"{estimator}: {name} has shape {labels_N.shape}; it must be [N] with at least one row")
    if not (np.issubdtype(labels_N.dtype, np.integer) or labels_N.dtype == np.bool_):
        raise UserError(f"{estimator}: {name} has dtype {labels_N.dtype}; integers are needed, the numbers of classes")
    values, classes_N = np.unique(labels_N, return_inverse=True)
    return classes_N.astype(np.int64).reshape(-1), len(values)


def matrix(estimator: str, name: str, values: Any) -> np.ndarray:
    """An array [N, H] of finite numbers as f64.

    Raises:
        UserError: It has another shape, no row or no column, or a number that is not finite.
    """
    try:
        values_NxH = np.asarray(values).astype(np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{estimator}: {name} is not an array of numbers ({error})") from error
    if values_NxH.ndim != 2 or 0 in values_NxH.shape:
        raise UserError(f"{estimator}: {name} has shape {values_NxH.shape}; it must be [N, H], a row for each example")
    finite_N = np.isfinite(values_NxH).all(axis=1)
    if not finite_N.all():
        raise UserError(f"{estimator}: row {_first(np.asarray(~finite_N))} of {name} has a number that is not finite")
    return values_NxH


def check_rows(estimator: str, **arrays: np.ndarray) -> None:
    """Raises UserError if arrays differ in their number of rows, or labels do not have one axis."""
    (first, rows), *others = [(name, array.shape) for name, array in arrays.items()]
    for name, shape in others:
        if shape[:1] != rows[:1]:
            raise UserError(f"{estimator}: {first} has shape {rows} and {name} {shape}; the first number must be the same")


def centred(features_NxH: np.ndarray) -> np.ndarray:
    """The features minus their mean; a column that is constant up to rounding becomes 0."""
    mean_H = features_NxH.mean(axis=0)
    centred_NxH = features_NxH - mean_H
    rounding_H = 8 * np.finfo(np.float64).eps * np.abs(mean_H)
    return np.where(np.abs(centred_NxH).max(axis=0) > rounding_H, centred_NxH, 0.0)


class Factors(NamedTuple):
    """The singular value decomposition U diag(s) V of a matrix, without the directions in which it is 0.

    Attributes:
        left: U, f64[N, R].
        values: s, f64[R], all above 0.
        right: V, f64[R, H].
    """

    left: np.ndarray
    values: np.ndarray
    right: np.ndarray


def factors(matrix_NxH: np.ndarray) -> Factors:
    """The singular value decomposition of a matrix of rank R; R may be 0."""
    left, values, right = np.linalg.svd(matrix_NxH, full_matrices=False)
    kept = values > values[0] * max(matrix_NxH.shape) * np.finfo(np.float64).eps
    return Factors(left[:, kept], values[kept], right[kept])


def _first(wrong_N: Any) -> int:
    return int(np.flatnonzero(wrong_N)[0])
