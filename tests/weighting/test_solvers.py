import compiling
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from mtl_jax.weighting import solvers

min_norm = jax.jit(solvers.min_norm, compiler_options=compiling.PRECISELY)
into_dual_cone = jax.jit(solvers.into_dual_cone, compiler_options=compiling.PRECISELY)


def gram(K, P, seed):
    """A Gram matrix of K gradients of very different lengths in P dimensions, scaled as the solvers ask for."""
    rng = np.random.default_rng(seed)
    gradients = rng.normal(size=(K, P)) * np.exp(1.5 * rng.normal(size=(K, 1)))
    matrix = gradients @ gradients.T
    return (matrix / matrix.max()).astype(np.float32)


@pytest.mark.parametrize("K", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("P", [3, 300])
def test_min_norm_is_optimal(K, P):
    """Karush-Kuhn-Tucker: no task's gradient has a smaller inner product with the result than the result itself.

    The tolerance is in lengths of the two, so that it holds for the shortest gradient as for the longest.
    """
    for seed in range(3):
        matrix = gram(K, P, seed).astype(np.float64)
        w = np.asarray(min_norm(jnp.asarray(matrix, jnp.float32)), np.float64)
        assert w.sum() == pytest.approx(1.0, abs=1e-5)
        assert w.min() >= 0
        assert (matrix @ w).min() >= w @ matrix @ w - 1e-5 * matrix.max()
        length, lengths = np.sqrt(max(w @ matrix @ w, 0.0)), np.sqrt(np.diagonal(matrix))
        assert (matrix @ w - length**2 >= -2e-3 * lengths * np.maximum(length, 1e-3 * lengths.min())).all()


def test_min_norm_of_two_is_the_closed_form():
    for seed in range(20):
        matrix = gram(2, 2, seed)
        (aa, ab), (_, bb) = matrix
        first = np.clip((bb - ab) / (aa + bb - 2 * ab), 0, 1)
        np.testing.assert_allclose(min_norm(jnp.asarray(matrix)), [first, 1 - first], atol=2e-5)


@pytest.mark.parametrize("K", [1, 2, 8, 64])
@pytest.mark.parametrize("P", [3, 300])
def test_the_projection_is_that_of_an_exact_solver(K, P):
    """v = lower + s with the non-negative s that minimises |J^T (lower + s)|, by scipy in float64."""
    for seed in range(3):
        matrix = gram(K, P, seed).astype(np.float64)
        values, vectors = np.linalg.eigh(matrix)
        root = np.sqrt(np.maximum(values, 0))[:, None] * vectors.T  # root^T root is the Gram matrix
        lower = np.full(K, 1 / K)
        exact = root @ (lower + optimize.nnls(root, -root @ lower)[0])
        v = np.asarray(into_dual_cone(jnp.asarray(matrix, jnp.float32), jnp.asarray(lower, jnp.float32)), np.float64)
        assert (v >= lower - 1e-6).all()
        gain = matrix @ v / matrix.max()
        assert gain.min() >= -1e-4  # conflicts with no task
        assert np.abs((v - lower) * gain).max() <= 1e-3  # only what conflicted was added
        assert np.abs(root @ v - exact).max() <= 5e-3 * np.linalg.norm(exact) + 3e-3 * np.linalg.norm(root @ lower)


def test_solvers_vmap():
    matrices = jnp.stack([jnp.asarray(gram(4, 6, seed)) for seed in range(5)])
    together = jax.jit(jax.vmap(solvers.min_norm))(matrices)
    for matrix, weights in zip(matrices, together, strict=True):
        np.testing.assert_allclose(weights, min_norm(matrix), atol=1e-5)


@pytest.mark.parametrize("absent", [0, 2])
def test_without_a_task_the_problem_is_that_of_the_others(absent):
    matrix = gram(4, 6, 0)
    present = np.arange(4) != absent
    smaller = jnp.asarray(matrix[np.ix_(present, present)])
    actual = min_norm(jnp.asarray(matrix), present_K=jnp.asarray(present))
    assert actual[absent] == 0
    np.testing.assert_allclose(actual[present], min_norm(smaller), atol=1e-5)
    lower = jnp.asarray([0.1, 0.2, 0.3, 0.4])
    actual = into_dual_cone(jnp.asarray(matrix), lower, jnp.asarray(present))
    np.testing.assert_allclose(actual[present], into_dual_cone(smaller, lower[present]), rtol=1e-3)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e30])
def test_the_nearest_point_of_the_simplex(scale):
    """Against a search over a fine grid; however far away the values are."""
    values = np.array([0.3, -0.2, 0.5]) * scale
    actual = np.asarray(jax.jit(solvers.onto_simplex)(jnp.asarray(values, jnp.float32), jnp.ones(3, bool)), np.float64)
    assert actual.sum() == pytest.approx(1.0, abs=1e-6)
    grid = np.stack(np.meshgrid(np.linspace(0, 1, 201), np.linspace(0, 1, 201)), -1).reshape(-1, 2)
    grid = np.column_stack([grid, 1 - grid.sum(1)])
    distances = (np.square(grid[grid[:, 2] >= 0] - values) / scale**2).sum(1)
    assert (np.square(actual - values) / scale**2).sum() <= distances.min() + 1e-6
