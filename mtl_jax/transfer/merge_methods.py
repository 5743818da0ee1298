"""Merging the parameters of models of one shape: averages, interpolation, task vectors.

Pure functions on parameter trees, on the host: they compute in float64, leaf by leaf, and round once, to the dtype of the leaf.
A task vector is the difference between trained parameters and those that training started from, the base (Ilharco et al.,
2023).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.core.errors import UserError
from mtl_jax.core.errors import count as number_of
from mtl_jax.core.trees import path_name

# Leaves of a tree by path, on the host.
Flat = dict[str, np.ndarray]
# A task vector, path -> f64 leaf: computed leaf by leaf, so that vectors of large models are never whole in memory.
Vector = Callable[[str], np.ndarray]


class Soup(NamedTuple):
    """The result of greedy_soup.

    Attributes:
        params: The mean of the chosen trees.
        score: Its score.
        scores: The score of each tree alone.
        tried: (number of the tree, score of the soup with it, whether it was chosen), in the order in which they were tried.
    """

    params: Any
    score: float
    scores: list[float]
    tried: list[tuple[int, float, bool]]


def average(trees: Sequence[Any], weights: Sequence[float] = (), *, names: Sequence[str] = ()) -> Any:
    """The weighted mean of parameters; without weights the plain one, a uniform soup (Wortsman et al., 2022).

    Args:
        trees: Parameter trees of one shape.
        weights: One for each tree, none negative; they are divided by their sum.
        names: Names of the trees in errors.

    Raises:
        UserError: The trees differ in structure or shape, or the weights are refused.
    """
    flats = check_alike(trees, names)
    weights = list(weights) or [1.0] * len(trees)
    check_weights(weights, len(trees))
    total = math.fsum(weights)

    def mean(path: str) -> np.ndarray:
        first, *others = (flat[path].astype(np.float64) * weight for flat, weight in zip(flats, weights, strict=True))
        return sum(others, first) / total

    return _like(trees[0], mean)


def greedy_soup(trees: Sequence[Any], measure: Callable[[Any], float], *, names: Sequence[str] = ()) -> Soup:
    """The greedy soup of Wortsman et al. (2022): the best model, and in order of score every other that does not hurt.

    A tree is chosen if the mean of it and the trees chosen so far scores no less than without it. Trees with equal scores are
    tried in the given order.

    Args:
        trees: Parameter trees of one shape.
        measure: Parameters -> score on held-out data; higher is better, NaN is worst.
        names: Names of the trees in errors.

    Raises:
        UserError: The trees differ in structure or shape.
    """
    check_alike(trees, names)

    def score_of(params: Any) -> float:
        score = float(measure(params))
        return -math.inf if math.isnan(score) else score

    scores = [score_of(tree) for tree in trees]
    first, *others = sorted(range(len(trees)), key=lambda number: -scores[number])
    chosen, score = [first], scores[first]
    tried = [(first, score, True)]
    for number in others:
        with_it = score_of(average([trees[other] for other in [*chosen, number]]))
        tried.append((number, with_it, with_it >= score))
        if with_it >= score:
            chosen, score = [*chosen, number], with_it
    return Soup(average([trees[number] for number in chosen]), score, scores, tried)


def interpolate(start: Any, end: Any, alpha: float, *, names: Sequence[str] = ()) -> Any:
    """(1 - alpha) start + alpha end: between a model and its start, as in WiSE-FT (Wortsman et al., 2022).

    Args:
        start: Parameters.
        end: Parameters of the same shape.
        alpha: From 0 to 1; 0 gives the start and 1 the end, both bit by bit.
        names: Names of start and end in errors.

    Raises:
        UserError: The trees differ in structure or shape, or alpha is outside 0..1.
    """
    check_share("alpha", alpha)
    first, second = check_alike([start, end], names)
    if alpha in (0, 1):
        return _like(start, lambda path: (second if alpha else first)[path].copy())
    return _like(start, lambda path: (1 - alpha) * first[path].astype(np.float64) + alpha * second[path].astype(np.float64))


def arithmetic(base: Any, tuned: Sequence[Any], scale: float | Sequence[float] = 1.0, *, names: Sequence[str] = ()) -> Any:
    """Task arithmetic (Ilharco et al., 2023): base + sum over i of scale_i (tuned_i - base).

    Args:
        base: The parameters that all of them started from.
        tuned: Parameter trees of the same shape.
        scale: The factor of all task vectors, or of each; a negative factor forgets.
        names: Names of the base and the others in errors.

    Raises:
        UserError: The trees differ in structure or shape, or a scale is refused.
    """
    start, *flats = check_alike([base, *tuned], names)
    return _add(base, start, [_vector(start, flat) for flat in flats], scale)


def ties(base: Any, tuned: Sequence[Any], keep: float = 0.2, scale: float = 1.0, *, names: Sequence[str] = ()) -> Any:
    """TIES (Yadav et al., 2023): base + scale m, where m is merged from the numbers whose sign most task vectors share.

    Trim: each vector keeps the share `keep` of its numbers, the largest over the whole vector, and all that equal the smallest
    of these; the others become 0. Elect: the sign of each number is that of the sum over the vectors, 0 if they cancel. Merge:
    the mean of the numbers that are not 0 and have this sign; 0 if there is none.

    Args:
        base: The parameters that all of them started from.
        tuned: Parameter trees of the same shape.
        keep: Above 0, 1 at most.
        scale: The factor of m.
        names: Names of the base and the others in errors.

    Raises:
        UserError: The trees differ in structure or shape, or keep or scale are refused.
    """
    check_keep(keep)
    start, *flats = check_alike([base, *tuned], names)
    return _add(base, start, [_elected([_trimmed(_vector(start, flat), start, keep) for flat in flats])], scale)


def dare(
    base: Any,
    tuned: Sequence[Any],
    drop: float,
    key: jax.Array,
    scale: float | Sequence[float] = 1.0,
    keep: float | None = None,
    *,
    names: Sequence[str] = (),
) -> Any:
    """DARE (Yu et al., 2024): in each task vector a random share `drop` becomes 0, and the rest is divided by 1 - drop.

    The vectors are then merged by task arithmetic, or by TIES.

    Args:
        base: The parameters that all of them started from.
        tuned: Parameter trees of the same shape.
        drop: From 0, below 1.
        key: PRNG key; it decides what is dropped, with the place in `tuned`, the path and the shape of a leaf.
        scale: As in arithmetic; for TIES one number.
        keep: As in ties; None: task arithmetic.
        names: Names of the base and the others in errors.

    Raises:
        UserError: The trees differ in structure or shape, or a number is refused.
    """
    check_drop(drop)
    start, *flats = check_alike([base, *tuned], names)
    vectors = [_dropped(_vector(start, flat), drop, jax.random.fold_in(key, number)) for number, flat in enumerate(flats)]
    if keep is None:
        return _add(base, start, vectors, scale)
    check_keep(keep)
    return _add(base, start, [_elected([_trimmed(vector, start, keep) for vector in vectors])], scale)


def _vector(base: Flat, tuned: Flat) -> Vector:
    return lambda path: tuned[path].astype(np.float64) - base[path]


def _dropped(vector: Vector, drop: float, key: jax.Array) -> Vector:
    def leaf(path: str) -> np.ndarray:
        values = vector(path)
        kept = jax.random.bernoulli(jax.random.fold_in(key, zlib.crc32(path.encode())), 1 - drop, values.shape)
        return np.where(kept, values / (1 - drop), 0.0)

    return leaf


def _trimmed(vector: Vector, like: Flat, keep: float) -> Vector:
    # float32 halves the memory of the sort; both sides of the comparison below are rounded alike.
    magnitudes = np.concatenate([np.abs(vector(path)).astype(np.float32).ravel() for path in like])
    count = max(1, round(keep * len(magnitudes)))
    least = np.partition(magnitudes, len(magnitudes) - count)[len(magnitudes) - count]

    def leaf(path: str) -> np.ndarray:
        values = vector(path)
        return np.where(np.abs(values).astype(np.float32) >= least, values, 0.0)

    return leaf


def _elected(vectors: Sequence[Vector]) -> Vector:
    def leaf(path: str) -> np.ndarray:
        values = np.stack([vector(path) for vector in vectors])
        agrees = (np.sign(values) == np.sign(values.sum(axis=0))) & (values != 0)
        return np.where(agrees, values, 0.0).sum(axis=0) / np.maximum(agrees.sum(axis=0), 1)

    return leaf


def _add(base: Any, start: Flat, vectors: Sequence[Vector], scale: float | Sequence[float]) -> Any:
    scales = [scale] * len(vectors) if isinstance(scale, (int, float)) else list(scale)
    check_scales(scales, len(vectors))

    def moved(path: str) -> np.ndarray:
        total = start[path].astype(np.float64)
        for vector, factor in zip(vectors, scales, strict=True):
            total = total + factor * vector(path)
        return total

    return _like(base, moved)


def _like(tree: Any, leaf: Callable[[str], np.ndarray]) -> Any:
    """A tree with the structure and dtypes of another one, with leaves by path."""

    def made(path: tuple[Any, ...], like: Any) -> np.ndarray:
        with np.errstate(over="ignore"):  # a number that is too large becomes infinite, as in any arithmetic
            return leaf(path_name(path)).astype(like.dtype)

    return jax.tree_util.tree_map_with_path(made, tree)


def flat(tree: Any) -> Flat:
    """{path: leaf} of a tree, on the host; paths like those of parameter rules."""
    return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def check_alike(trees: Sequence[Any], names: Sequence[str] = ()) -> list[Flat]:
    """The leaves of trees of one shape, by path.

    Args:
        trees: The trees.
        names: Their names in errors.

    Raises:
        UserError: There is no tree, a path is not in all trees, or a leaf differs in shape or is not of floats.
    """
    if not trees:
        raise UserError("there is nothing to merge: no parameters were given")
    names = names or [f"tree {number}" for number in range(len(trees))]
    first, *others = flats = [flat(tree) for tree in trees]
    for name, other in zip(names[1:], others, strict=True):
        for path in [*first, *(path for path in other if path not in first)]:
            shape, other_shape = (leaves[path].shape if path in leaves else None for leaves in (first, other))
            if shape != other_shape:
                raise UserError(
                    f"{name}: {path} is {_shape(other_shape)} there, and {_shape(shape)} in {names[0]}; only models of one "
                    "family and shape can be merged"
                )
    for name, leaves in zip(names, flats, strict=True):
        for path, leaf in leaves.items():
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise UserError(f"{name}: {path} is of type {leaf.dtype}; only floating point numbers can be merged")
    return flats


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else f"of shape {shape}"


def check_weights(weights: Sequence[float], count: int) -> None:
    """Raises UserError unless these are the weights of so many models."""
    if len(weights) != count:
        raise UserError(f"weights are {_listed(weights)}: one for each of the {number_of(count, 'model')} is needed")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not math.fsum(weights):
        raise UserError(f"weights are {_listed(weights)}; they must be finite, not negative, and not all 0")


def check_scales(scales: Sequence[float], count: int) -> None:
    """Raises UserError unless these are the scales of so many task vectors."""
    if len(scales) != count:
        raise UserError(
            f"scale is {_listed(scales)}: give one number, or one for each of the {number_of(count, 'task vector')}"
        )
    if not all(math.isfinite(scale) for scale in scales):
        raise UserError(f"scale is {_listed(scales)}; it must be finite")


def check_share(name: str, value: float) -> None:
    """Raises UserError if a number is outside 0..1."""
    if not 0 <= value <= 1:
        raise UserError(f"{name} is {value:g}; it must be from 0 to 1 (task arithmetic with a scale goes further)")


def check_keep(keep: float) -> None:
    """Raises UserError unless this is a share of a vector that can be kept."""
    if not 0 < keep <= 1:
        raise UserError(f"keep is {keep:g}; it is the share that is kept, above 0 and at most 1")


def check_drop(drop: float) -> None:
    """Raises UserError unless this is a share of a vector that can be dropped."""
    if not 0 <= drop < 1:
        raise UserError(f"drop is {drop:g}; it is the share that is dropped, at least 0 and below 1")


def _listed(numbers: Sequence[float]) -> str:
    return " ".join(f"{number:g}" for number in numbers)
