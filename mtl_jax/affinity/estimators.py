"""Estimators by name: ESTIMATORS, and register() for your own.

The names of a function's parameters say what it reads. READS explains each; parameters with a default are its options.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from mtl_jax.affinity import from_features, from_gradients, from_source_labels, linear_losses, probes, similarity
from mtl_jax.core.errors import UserError, listed
from mtl_jax.core.parts import Registry, origin_of

Estimator = Callable[..., float]

READS: Mapping[str, str] = {
    "features": "f[N, H], the target's rows in the source's trunk",
    "labels": "i[N] classes or f[N] numbers of the target's rows",
    "probabilities": "f[N, Z], the source's probabilities of its classes on the target's rows",
    "source_labels": "i[N], the source's most likely class on the target's rows",
    "base_features": "f[N, H], the target's rows in the trunk before training",
    "source_base_features": "f[M, H], the source's rows in the trunk before training",
    "source_features": "f[M, H], the source's rows in the source's trunk",
    "texts": "f[T, H], the target's texts in the trunk before training",
    "source_texts": "f[S, H], the source's texts in the trunk before training",
    "tokens": "T arrays i[length], the token ids of the target's texts",
    "source_tokens": "S arrays i[length], the token ids of the source's texts",
    "embedding": "f[D], task_embedding of the target",
    "source_embedding": "f[D], task_embedding of the source",
    "signals": "f[N, 4], step_signals of source and target in a run of both under a rule that compares gradients",
    "gradients": "f[N, 2 + D], linear_rows of the target in a run of both tasks",
    "source_gradients": "f[M, 2 + D], linear_rows of the source in the same run",
}

OWN_ESTIMATORS: dict[str, Estimator] = {
    # the source's trunk on the target's rows
    "logme": from_features.logme,
    "h_score": from_features.h_score,
    "regularised_h_score": from_features.regularised_h_score,
    "transrate": from_features.transrate,
    "linear_probe": probes.linear_probe,
    "knn": probes.knn,
    "n_leep": from_source_labels.n_leep,
    # the source's labels on the target's rows
    "leep": from_source_labels.leep,
    "nce": from_source_labels.nce,
    # source and target compared
    "esm": similarity.esm,
    "text_similarity": similarity.text_similarity,
    "vocabulary_overlap": similarity.vocabulary_overlap,
    "task_similarity": similarity.task_similarity,
    # a joint run of both
    "grad_tag": linear_losses.grad_tag,
    "gradient_cosine": from_gradients.gradient_cosine,
    "tag": from_gradients.tag,
}


ESTIMATORS: Registry[Estimator] = Registry("affinity estimator", OWN_ESTIMATORS)


def register(name: str) -> Callable[[Any], Any]:
    """A decorator that adds a function to the estimators, for --estimators and of_experiment().

    Args:
        name: Its name.

    Raises:
        UserError: The name is taken, or the function has a parameter without a default that is not in READS.

    Examples:
        >>> @mtl_jax.affinity.register("spread")
        ... def spread(features, labels):
        ...     return float(features.std())
        >>> mtl_jax.affinity.ESTIMATORS["spread"] is spread
        True
    """
    add = ESTIMATORS.register(name)

    def checked(function: Any) -> Any:
        reads(name, function)
        return add(function)

    return checked


def reads(name: str, estimator: Estimator) -> tuple[str, ...]:
    """The parameters without a default: what an estimator reads.

    Args:
        name: Its name, for the error.
        estimator: The function.

    Raises:
        UserError: It has none, or one that is not in READS.
    """
    parameters = inspect.signature(estimator).parameters.values()
    needed = tuple(parameter.name for parameter in parameters if parameter.default is inspect.Parameter.empty)
    wrong = [parameter for parameter in needed if parameter not in READS]
    if wrong or not needed:
        origin = origin_of(estimator)
        where = f"{origin.file}: " if origin else ""
        problem = f"no estimator can read {wrong[0]!r}" if wrong else "it reads nothing"
        raise UserError(f"{where}affinity estimator {name!r}: {problem}; its parameters must be among {listed(READS)}")
    return needed
