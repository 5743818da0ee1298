"""Models of one shape put together in the space of their parameters: averages, interpolation, task vectors.

Pure functions on parameter trees, on the host: numbers are taken in float64, leaf by leaf, and rounded once, to the type that
they came in. A task vector is what training added to the parameters that it started from, the base (Ilharco et al., 2023).
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

# A task vector: path -> f64 leaf, made when it is asked for, so that vectors of large models are never whole in memory.
Vector = Callable[[str], np.ndarray]


class Soup(NamedTuple):
    """What greedy_soup found.

    Attributes:
        params: The mean of those that were taken.
        score: Its score.
        scores: Of each tree by itself.
        tried: (number of the tree, score of the soup with it, whether it was taken), in the order in which they were tried.
    """

    params: Any
    score: float
    scores: list[float]
    tried: list[tuple[int, float, bool]]


def average(trees: Sequence[Any], weights: Sequence[float] = (), *, names: Sequence[str] = ()) -> Any:
    """The weighted mean of parameters; without weights the plain one, a uniform soup (Wortsman et al., 2022).

    Args:
        trees: Parameter trees of one shape.
        weights: One for each tree, none negative; what counts is their share of the sum.
        names: What errors call the trees.

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

    A tree is taken if the mean of those taken so far and of it scores no less than without it. Of equal ones the first goes
    first.

    Args:
        trees: Parameter trees of one shape.
        measure: Parameters -> score on held-out data; higher is better, NaN is the worst.
        names: What errors call the trees.

    Raises:
        UserError: The trees differ in structure or shape.
    """
    check_alike(trees, names)

    def score_of(params: Any) -> float:
        found = float(measure(params))
        return -math.inf if math.isnan(found) else found

    scores = [score_of(tree) for tree in trees]
    first, *others = sorted(range(len(trees)), key=lambda number: -scores[number])
    taken, score = [first], scores[first]
    tried = [(first, score, True)]
    for number in others:
        found = score_of(average([trees[other] for other in [*taken, number]]))
        tried.append((number, found, found >= score))
        if found >= score:
            taken, score = [*taken, number], found
    return Soup(average([trees[number] for number in taken]), score, scores, tried)


def interpolate(start: Any, end: Any, alpha: float, *, names: Sequence[str] = ()) -> Any:
    """(1 - alpha) start + alpha end: between a model and what it started from, as WiSE-FT (Wortsman et al., 2022).

    Args:
        start: Parameters.
        end: Parameters of the same shape.
        alpha: From 0, the start, to 1, the end: both to the last bit.
        names: What errors call start and end.

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
        base: What all of them started from.
        tuned: Parameter trees of the same shape.
        scale: Of all task vectors, or of each; a negative one forgets.
        names: What errors call the base and the others.

    Raises:
        UserError: The trees differ in structure or shape, or a scale is refused.
    """
    start, *flats = check_alike([base, *tuned], names)
    return _add(base, start, [_vector(start, flat) for flat in flats], scale)


def ties(base: Any, tuned: Sequence[Any], keep: float = 0.2, scale: float = 1.0, *, names: Sequence[str] = ()) -> Any:
    """TIES (Yadav et al., 2023): base + scale m, where m is put together of what the task vectors agree on.

    Trim: of each vector the share `keep` of its numbers stays, the largest over the whole vector (as many as are equal to the
    last of them stay, too); the others become 0. Elect: the sign of each number is that of the sum over the vectors, 0 where
    they cancel. Merge: the mean of those that are not 0 and have this sign; 0 where there is none.

    Args:
        base: What all of them started from.
        tuned: Parameter trees of the same shape.
        keep: Above 0, 1 at most.
        scale: Of what is added.
        names: What errors call the base and the others.

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
    """DARE (Yu et al., 2024): of each task vector the share `drop` becomes 0 by chance, the others grow by 1 / (1 - drop).

    Then the vectors are merged by task arithmetic, or by TIES.

    Args:
        base: What all of them started from.
        tuned: Parameter trees of the same shape.
        drop: From 0, below 1.
        key: Decides by chance; what is dropped depends on it, the place in `tuned`, the path and the shape.
        scale: As in arithmetic; for TIES one number.
        keep: As in ties; None: task arithmetic.
        names: What errors call the base and the others.

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
        found = vector(path)
        kept = jax.random.bernoulli(jax.random.fold_in(key, zlib.crc32(path.encode())), 1 - drop, found.shape)
        return np.where(kept, found / (1 - drop), 0.0)

    return leaf


def _trimmed(vector: Vector, like: Flat, keep: float) -> Vector:
    # float32 halves the memory of what is sorted; the same rounding on both sides of the comparison below.
    magnitudes = np.concatenate([np.abs(vector(path)).astype(np.float32).ravel() for path in like])
    count = max(1, round(keep * len(magnitudes)))
    least = np.partition(magnitudes, len(magnitudes) - count)[len(magnitudes) - count]

    def leaf(path: str) -> np.ndarray:
        found = vector(path)
        return np.where(np.abs(found).astype(np.float32) >= least, found, 0.0)

    return leaf


def _elected(vectors: Sequence[Vector]) -> Vector:
    def leaf(path: str) -> np.ndarray:
        found = np.stack([vector(path) for vector in vectors])
        agrees = (np.sign(found) == np.sign(found.sum(axis=0))) & (found != 0)
        return np.where(agrees, found, 0.0).sum(axis=0) / np.maximum(agrees.sum(axis=0), 1)

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
    """A tree of the same structure and types, from its paths."""

    def made(path: tuple[Any, ...], like: Any) -> np.ndarray:
        with np.errstate(over="ignore"):  # what is too large becomes infinite, as in any arithmetic
            return leaf(path_name(path)).astype(like.dtype)

    return jax.tree_util.tree_map_with_path(made, tree)


Flat = dict[str, np.ndarray]


def flat(tree: Any) -> Flat:
    """{path: leaf} of a tree, on the host; paths like those of parameter rules."""
    return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def check_alike(trees: Sequence[Any], names: Sequence[str] = ()) -> list[Flat]:
    """The leaves of trees of one shape, by path.

    Args:
        trees: The trees.
        names: What errors call them.

    Raises:
        UserError: There are none; a path is not in all of them; a leaf has not the same shape in all, or is no float.
    """
    if not trees:
        raise UserError("there is nothing to merge: no parameters were given")
    names = names or [f"tree {number}" for number in range(len(trees))]
    first, *others = flats = [flat(tree) for tree in trees]
    for name, other in zip(names[1:], others, strict=True):
        for path in [*first, *(path for path in other if path not in first)]:
            here, there = (leaves[path].shape if path in leaves else None for leaves in (first, other))
            if here != there:
                raise UserError(
                    f"{name}: {path} is {_shape(there)} there, and {_shape(here)} in {names[0]}; only models of one family and "
                    "shape can be merged"
                )
    for name, leaves in zip(names, flats, strict=True):
        for path, leaf in leaves.items():
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise UserError(f"{name}: {path} is of type {leaf.dtype}; only floating point numbers can be merged")
    return flats


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else f"of shape {shape}"


def check_weights(weights: Sequence[float], count: int) -> None:
    """Raises UserError where these are no weights of so many models."""
    if len(weights) != count:
        raise UserError(f"weights are {_listed(weights)}: one for each of the {number_of(count, 'model')} is needed")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not math.fsum(weights):
        raise UserError(f"weights are {_listed(weights)}; they must be finite, not negative, and not all 0")


def check_scales(scales: Sequence[float], count: int) -> None:
    """Raises UserError where these are no scales of so many task vectors."""
    if len(scales) != count:
        raise UserError(
            f"scale is {_listed(scales)}: give one number, or one for each of the {number_of(count, 'task vector')}"
        )
    if not all(math.isfinite(scale) for scale in scales):
        raise UserError(f"scale is {_listed(scales)}; it must be finite")


def check_share(what: str, value: float) -> None:
    """Raises UserError where alpha is outside 0..1."""
    if not 0 <= value <= 1:
        raise UserError(f"{what} is {value:g}; it must be from 0 to 1 (further than that goes task arithmetic, with a scale)")


def check_keep(keep: float) -> None:
    """Raises UserError where this is no share of a vector that stays."""
    if not 0 < keep <= 1:
        raise UserError(f"keep is {keep:g}; it is the share that stays, above 0 and 1 at most")


def check_drop(drop: float) -> None:
    """Raises UserError where this is no share of a vector that is dropped."""
    if not 0 <= drop < 1:
        raise UserError(f"drop is {drop:g}; it is the share that is dropped, at least 0 and below 1")


def _listed(numbers: Sequence[float]) -> str:
    return " ".join(f"{number:g}" for number in numbers)
