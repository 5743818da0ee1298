"""Rules that solve a problem, on gradients that are hard for float32: opposite, dependent, of very unlike lengths, zero."""

import functools

import compiling
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from mtl_jax import weighting
from mtl_jax.core.errors import UserError
from mtl_jax.weighting import Signals, solvers
from mtl_jax.weighting.solvers import TOLERANCE

MANY = 151
OPTIONS = {"cagrad": {"c": 0.4}, "fairgrad": {"alpha": 1.0}}  # their defaults, given to the program that varies them
SOLVING = ("mgda", "cagrad", "sdmgrad", "upgrad", "dualproj", "fairgrad", "nash", "imtl_g", "aligned", "config")


@functools.cache
def program(name, K, options=()):
    """A compiled function from Gram matrices [N, K, K] and values of the options to weights [N, K] and residuals [N]."""
    names = [f"t{i:02d}" for i in range(K)]

    def weigh(gram, values):
        rule = weighting.make(name, **dict(zip(options, values, strict=True)))  # as in an ablation: one program for all values
        signals = Signals(dict.fromkeys(names, jnp.float32(1)), gram, jnp.int32(0), jax.random.key(0))
        weights, _, residual = weighting.solve(rule, rule.init(names), signals)
        return jnp.stack([weights[name] for name in names]), residual

    return jax.jit(jax.vmap(weigh, in_axes=(0, None)), compiler_options=compiling.PRECISELY)


def weigh(name, gradients, **options):
    """Weights f64[N, K] and residuals of gradients [N, K, P]; of up to MANY where K <= 3: one program for every such N."""
    gradients = np.asarray(gradients, np.float64)
    N, K, _ = gradients.shape
    gram = np.einsum("nip,njp->nij", gradients, gradients).astype(np.float32)
    if K <= 3:
        gram = np.pad(gram, ((0, MANY - N), (0, 0), (0, 0)), mode="edge")
    options = OPTIONS.get(name, {}) | options
    weights, residual = program(name, K, tuple(options))(gram, [np.float32(value) for value in options.values()])
    return np.asarray(weights, np.float64)[:N], np.asarray(residual)[:N]


def turned(gradient, cosine, rng):
    """A vector of another length that has this cosine with the gradient."""
    unit = gradient / np.linalg.norm(gradient)
    across = rng.normal(size=len(gradient))
    across -= across @ unit * unit
    return rng.uniform(0.5, 2) * (cosine * unit + np.sqrt(1 - cosine**2) * across / np.linalg.norm(across))


def hard(kind, K, count=4):
    """Gradients f64[count, K, P] of a kind."""
    actual = []
    for seed in range(count):
        rng = np.random.default_rng(100 * K + seed)
        J = rng.normal(size=(K, 2 if kind == "plane" else K + 3))
        if kind.startswith("cosine"):
            J[1] = turned(J[0], -float(kind.split()[1]), rng)
        elif kind == "plane":
            J[1] = turned(J[0], -0.9995, rng)
        elif kind == "dependent":
            J[-1] = J[0] + J[1]
        elif kind == "identical":
            J[:] = J[0]
        elif kind.startswith("lengths"):
            J[1] = turned(J[0], -0.9, rng)
            J *= 10 ** rng.uniform(-float(kind.split()[1]), float(kind.split()[1]), size=(K, 1))
        elif kind == "zero":
            J[-1] = 0
        actual.append(J)
    return np.stack(actual)


KINDS = (
    "plain",
    "plane",
    "cosine 0.9995",
    "cosine 0.999999",
    "cosine 1",
    "dependent",
    "identical",
    "zero",
    "lengths 2",
    "lengths 4",
)


def shortest(J):
    """The shortest vector in the convex hull of the rows, as weights: non-negative least squares in float64."""
    scale = np.linalg.norm(J, axis=1).max()
    v, _ = optimize.nnls(np.vstack([J.T / scale, np.ones(len(J))]), np.append(np.zeros(J.shape[1]), 1.0), maxiter=1000)
    return v / v.sum()


def best_worst_gain(J, c):
    """The largest possible gain of the worst task, from the dual: every w of the simplex bounds it from above.

    The w are those of min |g_w + p g_0|, whose p a bisection takes to |g_w| = p c |g_0|.
    """
    mean, low, high, best = J.mean(axis=0), -12.0, 8.0, np.inf
    radius = c * np.linalg.norm(mean)
    for _ in range(36):
        p = 10 ** ((low + high) / 2)
        g = shortest(J + p * mean) @ J
        best = min(best, g @ mean + radius * np.linalg.norm(g))
        low, high = (low, (low + high) / 2) if np.linalg.norm(g) < p * radius else ((low + high) / 2, high)
    return best


@pytest.mark.parametrize(("c", "expected"), [(0.4, [4.758, 4.504, 1 / 3]), (0.6, [6.983, 6.618, 1 / 3])])
def test_cagrad_where_two_of_three_gradients_are_nearly_opposite(c, expected):
    weights, residual = weigh("cagrad", [[[-0.6701, -0.5292], [0.6635, 0.6063], [1.3952, -1.574]]], c=c)
    np.testing.assert_allclose(weights[0], expected, rtol=1e-3)
    assert residual[0] < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("K", [2, 7, pytest.param(16, marks=pytest.mark.long)])
def test_cagrad_helps_the_worst_task_most(kind, K):
    """Within 1e-5 of the exact optimum, in units of |g_0| and the longest gradient; 1e-3 where opposite ones are bounded."""
    for c in (0.4, 0.9):
        gradients = hard(kind, K)
        if kind == "dependent" and K == 2:
            continue  # the two rows would be each other's multiple
        weights, residual = weigh("cagrad", gradients, c=c)
        assert residual.max() < 1e-3
        for J, w in zip(gradients, weights, strict=True):
            mean, lengths = np.linalg.norm(J.mean(axis=0)), np.linalg.norm(J, axis=1)
            tolerance = (1e-3 if kind in ("cosine 0.999999", "cosine 1") else 5e-5) * mean * lengths.max()
            if lengths.min() > 0:
                assert (J @ (J.T @ w)).min() >= best_worst_gain(J, c) - tolerance
            assert np.linalg.norm(J.T @ w - J.mean(axis=0)) <= c * mean * (1 + 2e-2)
            nonzero = lengths > 0
            assert (w[nonzero] <= 1 / K + 1.1e3 * c * (mean + 1e-3 * lengths.max()) / lengths[nonzero]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_sdmgrad_is_the_shortest_vector_of_the_whole_simplex(kind):
    K, lam = 7, 0.3
    gradients = hard(kind, K)
    weights, residual = weigh("sdmgrad", gradients)
    assert residual.max() < 1e-3
    for J, w in zip(gradients, weights, strict=True):
        mean = J.mean(axis=0)
        exact = np.linalg.norm((J + lam * mean).T @ shortest(J + lam * mean))
        assert np.linalg.norm((1 + lam) * w @ J) <= exact + 1e-4 * np.linalg.norm(mean)


def test_sdmgrad_is_continuous_as_a_gradient_goes_to_0():
    gradients = np.stack([np.diag([1.0, 1.0, length]) for length in (0.0, 1e-30, 1e-12, 1e-6, 1e-3)])
    weights, _ = weigh("sdmgrad", gradients)
    np.testing.assert_allclose(weights, [[0.0769, 0.0769, 0.8462]] * 5, atol=1e-3)


@pytest.mark.parametrize("name", ["mgda", "dualproj", "upgrad"])
@pytest.mark.parametrize("kind", KINDS)
def test_projections_are_those_of_an_exact_solver(name, kind):
    K = 7
    gradients = hard(kind, K)
    weights, residual = weigh(name, gradients)
    assert residual.max() < 1e-3
    for J, w in zip(gradients, weights, strict=True):
        lengths = np.where(np.linalg.norm(J, axis=1) > 0, np.linalg.norm(J, axis=1), 1.0)
        g = J.T @ w
        if name == "mgda":
            assert np.linalg.norm(g) <= np.linalg.norm(J.T @ shortest(J)) + 1e-5 * np.linalg.norm(J, axis=1).min() + 1e-7
            continue
        size = np.linalg.norm(J.mean(axis=0) if name == "dualproj" else lengths.max())
        assert (J @ g / lengths).min() >= -2e-3 * size  # conflicts with no task, whatever its cosine
        if "0.999999" in kind or kind == "cosine 1":
            continue  # which way to turn is in digits that float32 does not have
        starts = [np.full(K, 1 / K)] if name == "dualproj" else list(np.eye(K))
        exact = [J.T @ (v + optimize.nnls((J / lengths[:, None]).T, -J.T @ v)[0] / lengths) for v in starts]
        np.testing.assert_allclose(g, np.mean(exact, axis=0), atol=2e-3 * size)


@pytest.mark.parametrize("alpha", [0.1, 0.25, 0.5, 1.0, 4.0, 5.0])
def test_fairgrad_solves_its_equation_for_every_alpha_it_accepts(alpha):
    """In u = w |g|: C u = |g|^(1/alpha - 1) u^(-1/alpha), each row over the terms that it adds up."""
    for kind in ("cosine 0.9995", "lengths 2", "lengths 3"):
        gradients = hard(kind, 7)
        gradients /= np.linalg.norm(gradients, axis=2).max(axis=1)[:, None, None]  # else powers leave float32
        weights, residual = weigh("fairgrad", gradients, alpha=alpha)
        assert residual.max() < 1e-3
        for J, w in zip(gradients, weights, strict=True):
            lengths = np.linalg.norm(J, axis=1)
            cosines, u = J @ J.T / np.outer(lengths, lengths), w * lengths
            aim = lengths ** (1 / alpha - 1) * u ** (-1 / alpha)
            assert (np.abs(cosines @ u - aim) / (np.abs(cosines) @ u + aim)).max() < 1e-3


@pytest.mark.parametrize("alpha", [0.01, 0.09, 5.1, 20.0])
def test_fairgrad_refuses_an_alpha_that_float32_does_not_hold(alpha):
    with pytest.raises(UserError, match=r"weighting fairgrad: alpha is .*at least 0\.1 and of at most 5"):
        weighting.make("fairgrad", alpha=alpha)


def test_aligned_follows_the_shortest_gradient_however_unlike():
    """|g| over what singular values in float64 give, for norm ratios from 1 to 10^6 past 3,000, where it once jumped."""
    unit = np.random.default_rng(0).normal(size=(3, 5))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    gradients = np.stack([unit * np.array([[1.0], [ratio**-0.5], [1 / ratio]]) for ratio in np.logspace(0, 6, 61)])
    weights, _ = weigh("aligned", gradients)
    for J, w in zip(gradients, weights, strict=True):
        u, s, vt = np.linalg.svd(J, full_matrices=False)
        exact = s[-1] * (u @ vt).T @ np.full(3, 1 / 3)
        assert np.linalg.norm(J.T @ w) == pytest.approx(np.linalg.norm(exact), rel=0.1)


@pytest.mark.parametrize(("name", "K"), [*((name, 3) for name in SOLVING), ("imtl_g", 2), ("config", 2), ("nash", 2)])
def test_nothing_jumps_on_the_way_to_opposition(name, K):
    """Two gradients turn from a right angle to opposite, ever slower; a third stays. Weights stay bounded, steps small."""
    angles = np.pi - np.append(np.logspace(0.19, -7, 150), 0.0)
    third = np.array([0.3, 0.5, 1.0])
    gradients = np.stack([[[1, 0, 0], [3 * np.cos(angle), 3 * np.sin(angle), 0], third][:K] for angle in angles])
    weights, _ = weigh(name, gradients)
    assert np.isfinite(weights).all()
    assert np.abs(weights).max() <= 2.5e3
    seen = angles < np.pi - 3e-3  # from here on float32 rounds the cosine to one of a few numbers
    directions = np.einsum("nk,nkp->np", weights, gradients)
    steps = np.linalg.norm(np.diff(directions, axis=0), axis=1)[seen[1:]]
    assert steps.max() <= 0.6 * max(1.0, np.linalg.norm(directions, axis=1).max())


@pytest.mark.parametrize("name", SOLVING)
def test_the_residual_says_whether_it_is_solved(name):
    _, residual = weigh(name, hard("plain", 3))
    assert (residual < TOLERANCE / 100).all()


@pytest.mark.parametrize("name", ["mgda", "dualproj", "nash"])
def test_the_residual_says_where_it_is_not_solved(name, monkeypatch):
    monkeypatch.setattr(solvers, "ITERATIONS", 1)
    gradients = hard("cosine 0.9995", 3)
    gram = jnp.asarray(np.einsum("nip,njp->nij", gradients, gradients), jnp.float32)
    _, residual = program.__wrapped__(name, 3)(gram, [])
    assert (residual > TOLERANCE).any()


def test_a_rule_that_solves_nothing_has_no_residual_and_combinators_hand_it_on():
    names, gram = ["a", "b"], jnp.asarray([[1.0, -0.5], [-0.5, 2.0]])
    signals = Signals(dict.fromkeys(names, jnp.float32(1)), gram, jnp.int32(0), jax.random.key(0))
    assert np.isnan(weighting.solve(weighting.pcgrad(), (), signals)[2])
    rule = weighting.mgda()
    for text in ("normalized", "clipped:high=5", "ema:decay=0.5", "every:k=2", "subset:s=2"):
        rule = weighting.combine(rule, text)
    state = rule.init(names)
    weights, state, residual = weighting.solve(rule, state, signals)
    assert residual < 1e-5
    assert weights == rule.update(rule.init(names), signals)[0]
    assert np.isnan(weighting.solve(rule, state, signals._replace(gram=None))[2])  # held: nothing was solved
    assert weighting.combine(weighting.pcgrad(), "normalized").solve is None
