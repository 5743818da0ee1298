"""Estimators that compare a source with a target: their texts, the parameters that matter for them, and their features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mtl_jax.affinity.estimator_inputs import centred, check_rows, factors, matrix
from mtl_jax.affinity.from_features import logme
from mtl_jax.core.errors import UserError


def text_similarity(source_texts: Any, texts: Any) -> float:
    """The cosine of the mean features of two sets of texts, from -1 to 1.

    Args:
        source_texts: f[M, H], features of the source's texts.
        texts: f[N, H], features of the target's texts, from the same trunk.

    Raises:
        UserError: The widths differ, or a number is not finite.

    References:
        Vu et al., 2020, Exploring and Predicting Transferability across NLP Tasks (TextEmb), https://arxiv.org/abs/2005.00770
    """
    source_MxH, target_NxH = (
        matrix("text_similarity", name, values) for name, values in (("source_texts", source_texts), ("texts", texts))
    )
    if source_MxH.shape[1] != target_NxH.shape[1]:
        widths = f"{source_MxH.shape[1]} and {target_NxH.shape[1]}"
        raise UserError(f"text_similarity: source_texts and texts have {widths} dimensions; take both from one trunk")
    return _cosine(source_MxH.mean(axis=0), target_NxH.mean(axis=0))


def vocabulary_overlap(source_tokens: Sequence[Any], tokens: Sequence[Any]) -> float:
    """1 minus the Jensen-Shannon divergence, in bits, of the frequencies of tokens: 0 without common tokens, 1 if equal.

    Args:
        source_tokens: For each text of the source its token ids, i[length]; all ids are at least 0.
        tokens: The same for the target, from the same tokenizer.

    Raises:
        UserError: One of them has no token, or ids are not integers.

    References:
        Ruder and Plank, 2017, Learning to select data for transfer learning with Bayesian Optimization,
        https://arxiv.org/abs/1707.05246
    """
    counts = [_token_counts(name, ids) for name, ids in (("source_tokens", source_tokens), ("tokens", tokens))]
    size = max(len(count) for count in counts)
    source_V, target_V = (np.pad(count, (0, size - len(count))) / count.sum() for count in counts)
    middle_V = (source_V + target_V) / 2

    def divergence(share_V: np.ndarray) -> float:
        occurs_V = share_V > 0
        return float((share_V[occurs_V] * np.log2(share_V[occurs_V] / middle_V[occurs_V])).sum())

    return float(np.clip(1 - (divergence(source_V) + divergence(target_V)) / 2, 0.0, 1.0))


def _token_counts(name: str, texts: Sequence[Any]) -> np.ndarray:
    arrays = [np.asarray(ids).reshape(-1) for ids in texts]
    ids = np.concatenate([array for array in arrays if len(array)] or [np.zeros(0, np.int64)])
    if not len(ids):
        raise UserError(f"vocabulary_overlap: {name} has no token")
    if not np.issubdtype(ids.dtype, np.integer) or ids.min() < 0:
        raise UserError(f"vocabulary_overlap: {name} must be integers of at least 0, the ids of a tokenizer")
    return np.bincount(ids)


def task_embedding(fisher: Any) -> np.ndarray:
    """A task as a vector f64[D]: the diagonal of the Fisher information, averaged over the inputs of each output.

    Leaves with at least two axes are averaged over all axes but the last, as Task2Vec averages over a filter.

    Args:
        fisher: A tree of arrays of at least 0: transfer.fisher of a model of the task.

    Raises:
        UserError: The tree has no leaf, or a number that is negative or not finite.

    References:
        Achille et al., 2019, Task2Vec: Task Embedding for Meta-Learning, https://arxiv.org/abs/1902.03545
    """
    parts = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(fisher)[0]:
        values = np.asarray(leaf).astype(np.float64)
        if not (np.isfinite(values) & (values >= 0)).all():
            raise UserError(f"task_embedding: {jax.tree_util.keystr(path)} has a number that is negative or not finite")
        parts.append(values.reshape(-1, values.shape[-1]).mean(axis=0) if values.ndim > 1 else values.reshape(-1))
    if not parts:
        raise UserError("task_embedding: the tree has no array")
    return np.concatenate(parts)


def task_similarity(source_embedding: Any, embedding: Any) -> float:
    """Task2Vec's cosine of two task embeddings, each divided by their sum, from 0 to 1; it does not depend on their scale.

    The division gives every parameter the same influence, however large its Fisher information is in both tasks.

    Args:
        source_embedding: f[D], task_embedding of the source.
        embedding: f[D], task_embedding of the target.

    Raises:
        UserError: The lengths differ, or a number is negative or not finite.

    References:
        Achille et al., 2019, https://arxiv.org/abs/1902.03545, section 3.3
    """
    source_D, target_D = (np.asarray(values).astype(np.float64) for values in (source_embedding, embedding))
    if source_D.ndim != 1 or source_D.shape != target_D.shape:
        raise UserError(f"task_similarity: embeddings have shapes {source_D.shape} and {target_D.shape}; both must be [D]")
    for name, values in (("source_embedding", source_D), ("embedding", target_D)):
        if not (np.isfinite(values) & (values >= 0)).all():
            raise UserError(f"task_similarity: {name} has a number that is negative or not finite")
    total_D = source_D + target_D
    parts = [np.divide(values, total_D, out=np.zeros_like(total_D), where=total_D > 0) for values in (source_D, target_D)]
    return _cosine(*parts)


def esm(source_base_features: Any, source_features: Any, base_features: Any, labels: Any, ridge: float = 1e-3) -> float:
    """LogME of the target's features after an embedding space map: the change that fine-tuning on the source makes.

    The map is linear with an intercept, fitted by ridge regression from the base trunk's features of the source's rows to the
    fine-tuned trunk's features. So the target passes only the base trunk, however many sources there are.

    Args:
        source_base_features: f[M, H], the source's rows in the trunk before fine-tuning.
        source_features: f[M, H2], the same rows in the trunk after fine-tuning on the source.
        base_features: f[N, H], the target's rows in the trunk before fine-tuning.
        labels: i[N], the target's classes; or f[N], numbers.
        ridge: The penalty, over the mean squared singular value of the source's features; above 0.

    Raises:
        UserError: As in logme; shapes of the features do not fit, or ridge is not above 0.

    References:
        Schulte et al., 2024, Less is More: Parameter-Efficient Selection of Intermediate Tasks for Transfer Learning,
        https://arxiv.org/abs/2410.15148
    """
    if not ridge > 0:
        raise UserError(f"esm: ridge is {ridge}; it must be above 0")
    before_MxH = matrix("esm", "source_base_features", source_base_features)
    after_MxH = matrix("esm", "source_features", source_features)
    target_NxH = matrix("esm", "base_features", base_features)
    check_rows("esm", source_base_features=before_MxH, source_features=after_MxH)
    if before_MxH.shape[1] != target_NxH.shape[1]:
        widths = f"{before_MxH.shape[1]} and {target_NxH.shape[1]}"
        raise UserError(f"esm: source_base_features and base_features have {widths} dimensions; take both from one trunk")
    svd = factors(centred(before_MxH))
    penalty = ridge * (svd.values**2).mean() if len(svd.values) else 1.0
    scaled_RxM = (svd.values / (svd.values**2 + penalty))[:, None] * svd.left.T
    mapped_NxH = ((target_NxH - before_MxH.mean(axis=0)) @ svd.right.T) @ (scaled_RxM @ centred(after_MxH))
    try:
        return logme(mapped_NxH + after_MxH.mean(axis=0), labels)
    except UserError as error:
        raise UserError(str(error).replace("logme:", "esm:", 1)) from error


def _cosine(first: np.ndarray, second: np.ndarray) -> float:
    """The cosine of two vectors; 0 if one of them is 0."""
    norms = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(np.clip(first @ second / norms, -1.0, 1.0)) if norms > 0 else 0.0
