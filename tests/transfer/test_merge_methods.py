"""Every way of merging beside the same written out by hand, on one long vector; and what must hold for any numbers."""

import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mtl_jax.core.errors import UserError
from mtl_jax.transfer import merge_methods
from mtl_jax.transfer.merge_methods import flat

SHAPES = {"trunk": {"kernel": (2, 3), "bias": (3,)}, "heads": {"a": {"bias": (1,)}}}
SIZE = 10
IS_SHAPE = {"is_leaf": lambda x: isinstance(x, tuple)}


def tree(numbers):
    """The shape of SHAPES, filled with 10 numbers: heads/a/bias, trunk/bias, trunk/kernel."""
    numbers = iter(np.asarray(numbers, np.float32))
    return jax.tree.map(lambda shape: np.reshape([next(numbers) for _ in range(math.prod(shape))], shape), SHAPES, **IS_SHAPE)


def vector(params):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(params)])


def by_chance(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, SIZE)).astype(np.float32)


def same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def close(params, expected):
    np.testing.assert_allclose(vector(params), expected, rtol=1e-6, atol=1e-6)


FLOATS = st.floats(-1e6, 1e6, width=32)
NUMBERS = arrays(np.float32, SIZE, elements=FLOATS)
MANY = arrays(np.float32, st.tuples(st.integers(1, 5), st.just(SIZE)), elements=FLOATS)
SHARE = st.floats(0, 1)


# Averages


def test_average_by_hand():
    numbers = by_chance(3)
    close(merge_methods.average([tree(n) for n in numbers]), numbers.mean(0))
    close(merge_methods.average([tree(n) for n in numbers], [1, 0, 3]), (numbers[0] + 3 * numbers[2]) / 4)


def test_averages_are_taken_in_float64():
    """In float32 the small numbers would vanish one after another."""
    numbers = [2.0**25, *[1.0] * 64]
    actual = merge_methods.average([{"a": np.float32([number])} for number in numbers])
    np.testing.assert_array_equal(actual["a"], np.float32((2**25 + 64) / 65))
    assert actual["a"].dtype == np.float32


@given(NUMBERS, st.lists(st.floats(0.01, 100), min_size=1, max_size=5))
def test_the_average_of_equals_is_each_of_them(numbers, weights):
    same_bits(merge_methods.average([tree(numbers)] * len(weights), weights), tree(numbers))


@given(MANY, st.randoms())
def test_an_average_knows_no_order(numbers, random):
    shuffled = list(numbers)
    random.shuffle(shuffled)
    actual = (vector(merge_methods.average([tree(n) for n in order])) for order in (numbers, shuffled))
    np.testing.assert_allclose(*actual, rtol=2e-7, atol=1e-9)


@given(MANY)
def test_an_average_lies_between(numbers):
    actual = vector(merge_methods.average([tree(n) for n in numbers]))
    low, high = (vector(tree(edge(numbers, axis=0))) for edge in (np.min, np.max))
    assert (actual >= low).all()
    assert (actual <= high).all()


# Greedy soup


def greedy_by_hand(numbers, score):
    order = sorted(range(len(numbers)), key=lambda i: score(numbers[i]), reverse=True)
    kept = [order[0]]
    for i in order[1:]:
        if score(numbers[[*kept, i]].mean(0)) >= score(numbers[kept].mean(0)):
            kept.append(i)
    return kept


@pytest.mark.parametrize("seed", range(5))
def test_greedy_soup_by_hand(seed):
    numbers, goal = by_chance(6, seed), by_chance(1, seed + 100)[0] / 3

    def score(point):
        return -float(np.abs(point - vector(tree(goal))).sum())

    actual = merge_methods.greedy_soup([tree(n) for n in numbers], lambda params: score(vector(params)))
    kept = greedy_by_hand(np.array([vector(tree(n)) for n in numbers]), score)
    assert [number for number, _, taken in actual.tried if taken] == kept
    same_bits(actual.params, merge_methods.average([tree(numbers[i]) for i in kept]))
    assert actual.score == pytest.approx(score(vector(actual.params)))
    assert actual.score >= max(actual.scores)
    assert len(actual.tried) == 6


def test_greedy_soup_takes_what_does_not_hurt_and_leaves_what_does():
    trees = [{"a": np.float32([x])} for x in (1.0, 1.0, 5.0, math.nan)]
    actual = merge_methods.greedy_soup(trees, lambda params: -abs(float(params["a"][0]) - 1))
    assert actual.tried[:2] == [(0, 0.0, True), (1, 0.0, True)]
    assert [(number, taken) for number, _, taken in actual.tried[2:]] == [(2, False), (3, False)]
    assert actual.params["a"] == 1


# Interpolation


@given(NUMBERS, NUMBERS, SHARE)
def test_interpolation_by_hand_and_its_ends(start, end, alpha):
    a, b = tree(start), tree(end)
    np.testing.assert_allclose(
        vector(merge_methods.interpolate(a, b, alpha)), (1 - alpha) * vector(a) + alpha * vector(b), rtol=1e-6, atol=1e-6
    )
    same_bits(merge_methods.interpolate(a, b, 0), a)
    same_bits(merge_methods.interpolate(a, b, 1), b)
    same_bits(merge_methods.interpolate(a, a, alpha), a)


# Task vectors


@given(NUMBERS, MANY, st.floats(-3, 3))
def test_task_arithmetic_by_hand(base, numbers, scale):
    actual = merge_methods.arithmetic(tree(base), [tree(n) for n in numbers], scale)
    expected = vector(tree(base)) + scale * sum(vector(tree(n)) - vector(tree(base)) for n in numbers)
    np.testing.assert_allclose(vector(actual), expected, rtol=1e-6, atol=1e-6)


def test_task_arithmetic_with_a_scale_for_each():
    base, *numbers = by_chance(3)
    actual = merge_methods.arithmetic(tree(base), [tree(n) for n in numbers], [0.5, -1])
    close(actual, base + 0.5 * (numbers[0] - base) - (numbers[1] - base))
    close(merge_methods.arithmetic(tree(base), [tree(numbers[0])]), numbers[0])
    same_bits(merge_methods.arithmetic(tree(base), [tree(numbers[0])], 0.0), tree(base))


def ties_by_hand(vectors, keep):
    """Loop by loop, as the paper's algorithm 1."""
    trimmed = []
    for v in vectors:
        count = max(1, round(keep * len(v)))
        least = sorted(abs(x) for x in v)[-count]
        trimmed.append([x if abs(x) >= least else 0.0 for x in v])
    merged = []
    for column in zip(*trimmed, strict=True):
        sign = np.sign(sum(column))
        agreeing = [x for x in column if x and np.sign(x) == sign]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return np.array(merged)


@given(NUMBERS, MANY, st.floats(0.01, 1), st.floats(-2, 2))
def test_ties_by_hand(base, numbers, keep, scale):
    actual = merge_methods.ties(tree(base), [tree(n) for n in numbers], keep, scale)
    vectors = [vector(tree(n)) - vector(tree(base)) for n in numbers]
    # What is sorted is rounded to float32; numbers that differ by less than that may stay or go.
    if all(len(set(np.abs(v).astype(np.float32).tolist())) == len(set(np.abs(v).tolist())) for v in vectors):
        expected = vector(tree(base)) + scale * ties_by_hand(vectors, keep)
        np.testing.assert_allclose(vector(actual), expected, rtol=1e-6, atol=1e-6)


def test_ties_on_numbers_that_can_be_followed():
    """Trimmed over the whole vector, not leaf by leaf; signs by sums; the mean of those that agree."""
    base = {"a": np.zeros(4, np.float32), "b": np.zeros(2, np.float32)}
    one = {"a": np.float32([8, 7, -6, 1]), "b": np.float32([0.1, 0.2])}
    two = {"a": np.float32([4, -9, -2, 1]), "b": np.float32([0.1, 5])}
    actual = merge_methods.ties(base, [one, two], keep=0.5)
    # one keeps 8 7 -6, two keeps 4 -9 and 5; sums 12 -2 -6 0, 0 5
    np.testing.assert_array_equal(actual["a"], np.float32([6, -9, -6, 0]))
    np.testing.assert_array_equal(actual["b"], np.float32([0, 5]))


@given(NUMBERS, NUMBERS, st.integers(1, 4))
def test_ties_of_equals_is_each_of_them(base, numbers, count):
    actual = merge_methods.ties(tree(base), [tree(numbers)] * count, keep=1.0)
    np.testing.assert_allclose(vector(actual), vector(tree(numbers)), rtol=1e-6, atol=1e-6)


@given(NUMBERS, MANY, st.randoms())
def test_task_vectors_know_no_order(base, numbers, random):
    shuffled = list(numbers)
    random.shuffle(shuffled)
    for merge in (merge_methods.arithmetic, merge_methods.ties):
        actual = (vector(merge(tree(base), [tree(n) for n in order])) for order in (numbers, shuffled))
        np.testing.assert_allclose(*actual, rtol=1e-6, atol=1e-6)


@given(NUMBERS, st.integers(1, 3))
def test_what_nobody_moved_keeps_its_bits(base, count):
    for merge in (merge_methods.arithmetic, merge_methods.ties):
        assert (vector(merge(tree(base), [tree(base)] * count)) == vector(tree(base))).all()


def dare_by_hand(base, numbers, drop, key):
    """The kept numbers are drawn leaf by leaf."""
    vectors = []
    for place, params in enumerate(numbers):
        leaves = []
        for path, leaf in flat(params).items():
            own = jax.random.fold_in(jax.random.fold_in(key, place), zlib.crc32(path.encode()))
            kept = np.asarray(jax.random.bernoulli(own, 1 - drop, leaf.shape))
            leaves.append(((leaf.astype(np.float64) - flat(base)[path]) * kept / (1 - drop)).ravel())
        vectors.append(np.concatenate(leaves))
    return vectors


@pytest.mark.parametrize("drop", [0.0, 0.3, 0.9])
def test_dare_by_hand(drop):
    base, *trees = (tree(n) for n in by_chance(4))
    key = jax.random.key(7)
    vectors = dare_by_hand(base, trees, drop, key)
    close(merge_methods.dare(base, trees, drop, key, 0.5), vector(base) + 0.5 * sum(vectors))
    close(merge_methods.dare(base, trees, drop, key, 0.5, keep=0.4), vector(base) + 0.5 * ties_by_hand(vectors, 0.4))


def test_dare_drops_as_much_as_it_says_and_keeps_the_mean():
    base, tuned = {"a": np.zeros(100_000, np.float32)}, {"a": np.ones(100_000, np.float32)}
    actual = merge_methods.dare(base, [tuned], 0.9, jax.random.key(0))["a"]
    assert set(np.unique(actual).tolist()) == {0.0, np.float32(10).item()}
    assert (actual == 0).mean() == pytest.approx(0.9, abs=0.005)
    assert actual.mean() == pytest.approx(1.0, abs=0.05)
    two = merge_methods.dare(base, [tuned, tuned], 0.9, jax.random.key(0))["a"]
    assert (two == 20).mean() == pytest.approx(0.01, abs=0.002)  # each is dropped by itself


def test_dare_follows_from_its_key():
    base, *trees = (tree(n) for n in by_chance(3))
    actual = [merge_methods.dare(base, trees, 0.5, jax.random.key(seed)) for seed in (1, 1, 2)]
    same_bits(actual[0], actual[1])
    assert (vector(actual[0]) != vector(actual[2])).any()
    same_bits(merge_methods.dare(base, trees, 0.0, jax.random.key(3)), merge_methods.arithmetic(base, trees))


# What is refused

ONE, OTHER = {"a": {"kernel": np.zeros((2, 3), np.float32)}}, {"a": {"kernel": np.zeros((3, 2), np.float32)}}
MORE = ONE | {"b": np.zeros(1, np.float32)}
WHOLE = {"a": {"kernel": np.zeros((2, 3), np.int32)}}


@pytest.mark.parametrize(
    "merge",
    [
        lambda trees, names: merge_methods.average(trees, names=names),
        lambda trees, names: merge_methods.greedy_soup(trees, lambda params: 0.0, names=names),
        lambda trees, names: merge_methods.interpolate(*trees, 0.5, names=names),
        lambda trees, names: merge_methods.arithmetic(trees[0], trees[1:], names=names),
        lambda trees, names: merge_methods.ties(trees[0], trees[1:], names=names),
        lambda trees, names: merge_methods.dare(trees[0], trees[1:], 0.5, jax.random.key(0), names=names),
    ],
)
def test_trees_of_another_shape_are_named_with_path_and_both_shapes(merge):
    with pytest.raises(UserError, match=r"runs/b: a/kernel is of shape \(3, 2\) there, and of shape \(2, 3\) in runs/a"):
        merge([ONE, OTHER], ["runs/a", "runs/b"])
    with pytest.raises(UserError, match=r"runs/b: b is of shape \(1,\) there, and absent in runs/a"):
        merge([ONE, MORE], ["runs/a", "runs/b"])
    with pytest.raises(UserError, match=r"runs/a: b is absent there, and of shape \(1,\) in runs/b"):
        merge([MORE, ONE], ["runs/b", "runs/a"])
    with pytest.raises(UserError, match="tree 1: a/kernel is of type int32"):
        merge([ONE, WHOLE], ())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: merge_methods.average([]), "there is nothing to merge"),
        (lambda: merge_methods.average([ONE, ONE], [1.0]), "weights are 1: one for each of the 2 models is needed"),
        (lambda: merge_methods.average([ONE, ONE], [1.0, -1.0]), "weights are 1 -1; they must be finite, not negative"),
        (lambda: merge_methods.average([ONE, ONE], [0.0, 0.0]), "not all 0"),
        (lambda: merge_methods.average([ONE, ONE], [1.0, math.inf]), "they must be finite"),
        (lambda: merge_methods.interpolate(ONE, ONE, 1.1), "alpha is 1.1; it must be from 0 to 1"),
        (lambda: merge_methods.interpolate(ONE, ONE, math.nan), "alpha is nan"),
        (lambda: merge_methods.arithmetic(ONE, [ONE], [1.0, 2.0]), "scale is 1 2: give one number, or one for each of the 1"),
        (lambda: merge_methods.arithmetic(ONE, [ONE], math.inf), "scale is inf; it must be finite"),
        (lambda: merge_methods.ties(ONE, [ONE], 0.0), "keep is 0; it is the share that is kept, above 0 and at most 1"),
        (lambda: merge_methods.ties(ONE, [ONE], 1.5), "keep is 1.5"),
        (lambda: merge_methods.dare(ONE, [ONE], 1.0, jax.random.key(0)), "drop is 1; it is the share that is dropped"),
        (lambda: merge_methods.dare(ONE, [ONE], -0.1, jax.random.key(0)), "drop is -0.1"),
    ],
)
def test_numbers_outside_their_bounds_are_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_other_floats_keep_their_type():
    trees = [{"a": jnp.asarray([1.0, 2.0], jnp.bfloat16)}, {"a": jnp.asarray([3.0, 5.0], jnp.bfloat16)}]
    actual = merge_methods.average(trees)["a"]
    assert actual.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(actual), [2.0, 3.5])
