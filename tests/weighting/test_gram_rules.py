import functools

import every_rule
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from mtl_jax import weighting
from mtl_jax.core.errors import UserError
from mtl_jax.weighting import Signals

# Those that need a target have tests of their own.
UNTARGETED = {name for name in weighting.RULES if not every_rule.needs_target(name)} - {"fixed", "scheduled"}
GRAM_RULES = tuple(name for name in weighting.RULES if name in UNTARGETED and weighting.make(name).needs_gram)
SCALE_FREE = tuple(sorted(set(GRAM_RULES) - {"fairgrad", "nash", "moco"}))
EXAMPLE = np.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])


make = functools.cache(weighting.make)  # one rule object, one compilation


def weights_of(rule, gradients, key=0, losses=None):
    """The weights for gradients f[K, P] in the first step."""
    losses = np.ones(len(gradients)) if losses is None else losses
    return history_of(rule, [(losses, gradients, None)], key)[0]


def history_of(rule, steps, key=0):
    """The weights in each of some steps (losses [K], gradients [K, P], counts [K] or None)."""
    names = [f"t{i:02d}" for i in range(len(steps[0][0]))]
    state, update, actual = rule.init(names), jax.jit(rule.update), []
    for step, (losses, gradients, counts) in enumerate(steps):
        gram = jnp.asarray(np.asarray(gradients, np.float64) @ np.asarray(gradients, np.float64).T, jnp.float32)
        losses = dict(zip(names, np.asarray(losses, np.float32), strict=True))  # an operation of jax would be compiled
        counts = None if counts is None else dict(zip(names, np.asarray(counts, np.float32), strict=True))
        told = every_rule.after_transform(rule, gram)
        weights, new_state = update(state, Signals(losses, gram, jnp.int32(step), jax.random.key(key), counts, told, gram))
        same = jax.tree.map(lambda a, b: jax.typeof(a) == jax.typeof(b), state, new_state)
        assert all(jax.tree.leaves(same)), "the state changed its type: the program would be compiled again"
        state = new_state
        actual.append(np.array([weights[name] for name in names], np.float64))
    return actual


def direction(rule, gradients, key=0):
    return np.asarray(gradients).T @ weights_of(rule, gradients, key)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (weighting.mgda(), [0, 1, 1]),
        (weighting.pcgrad(), [0.5848, 3.8012, 3.8012]),
        (weighting.pcgrad(order="sorted"), [0.5848, 3.8012, 3.8012]),
        (weighting.cagrad(c=0.5), [0.1835, 1.2041, 1.2041]),
        (weighting.cagrad(c=0.4), [0.3468, 1.1633, 1.1633]),
        (weighting.cagrad(c=0.0), [1, 1, 1]),
        (weighting.upgrad(), [0.2924, 1.9006, 1.9006]),
        (weighting.dualproj(), [0.5563, 1.1109, 1.1109]),
        (weighting.fairgrad(alpha=1.0), [0.0766, 0.9985, 0.9985]),
        (weighting.fairgrad(alpha=2.0), [0.0313, 0.7908, 0.7908]),
        (weighting.nash(max_norm=1.0), [0.0542, 0.7061, 0.7061]),
        (weighting.nash(max_norm=float("inf")), [0.0766, 0.9985, 0.9985]),
        (weighting.gradvac(), [0.5848, 3.8012, 3.8012]),
        (weighting.sdmgrad(lam=0.0), [0, 1, 1]),
        (weighting.imtl_g(), [0.0767, 1, 1]),
        (weighting.aligned(), [0.2133, 0.9673, 0.9673]),
        (weighting.config(), [0.1588, 2.0706, 2.0706]),
    ],
)
def test_published_example(rule, expected):
    """Two gradients that conflict; values of the papers' definitions, rounded."""
    np.testing.assert_allclose(direction(rule, EXAMPLE), expected, atol=2e-3)


def pcgrad_written_out(gradients, orders):
    total = np.zeros(gradients.shape[1])
    for i, order in enumerate(orders):
        g = gradients[i].copy()
        for j in order:
            if j != i and g @ gradients[j] < 0:
                g -= g @ gradients[j] / (gradients[j] @ gradients[j]) * gradients[j]
        total += g
    return total


def test_pcgrad_is_the_loop_written_out():
    rng = np.random.default_rng(0)
    for seed in range(5):
        gradients = rng.normal(size=(5, 4))
        sorted_orders = [range(5)] * 5
        expected = pcgrad_written_out(gradients, sorted_orders)
        np.testing.assert_allclose(direction(weighting.pcgrad(order="sorted"), gradients), expected, atol=1e-4)
        key = jax.random.key(seed)
        orders = np.array([jax.random.permutation(k, 5) for k in jax.random.split(key, 5)])
        actual = direction(weighting.pcgrad(), gradients, key=seed)
        np.testing.assert_allclose(actual, pcgrad_written_out(gradients, orders), atol=1e-4)


def gradvac_written_out(gradients, aims, beta):
    """Wang et al., algorithm 1, tasks in sorted order; changes the aims."""
    total = np.zeros(gradients.shape[1])
    for i in range(len(gradients)):
        g = gradients[i].copy()
        for j in range(len(gradients)):
            if j == i:
                continue
            other = gradients[j]
            c, t = g @ other / np.linalg.norm(g) / np.linalg.norm(other), aims[i, j]
            if c < t:
                factor = np.linalg.norm(g) * (t * np.sqrt(1 - c**2) - c * np.sqrt(1 - t**2))
                g = g + factor / (np.linalg.norm(other) * np.sqrt(1 - t**2)) * other
            aims[i, j] = (1 - beta) * t + beta * c
        total += g
    return total


def test_gradvac_is_the_loop_written_out():
    rng = np.random.default_rng(1)
    rule = weighting.gradvac(beta=0.5, order="sorted")
    names = [f"t{i}" for i in range(4)]
    state, aims = rule.init(names), np.zeros((4, 4))
    for step in range(4):
        gradients = rng.normal(size=(4, 6)) + 0.5
        losses = dict.fromkeys(names, jnp.float32(1.0))
        gram = jnp.asarray(gradients @ gradients.T, jnp.float32)
        weights, state = rule.update(state, Signals(losses, gram, jnp.int32(step), jax.random.key(0)))
        actual = gradients.T @ np.array([weights[name] for name in names])
        np.testing.assert_allclose(actual, gradvac_written_out(gradients, aims, 0.5), rtol=1e-3, atol=1e-3)


def test_krum_is_its_definition():
    rng = np.random.default_rng(2)
    for _ in range(5):
        gradients = rng.normal(size=(6, 4))
        distances = np.square(gradients[:, None] - gradients[None]).sum(-1)
        scores = np.sort(distances, axis=1)[:, 1 : 1 + 6 - 1 - 2].sum(1)
        expected = np.zeros(6)
        expected[np.argsort(scores)[:2]] = 0.5
        np.testing.assert_allclose(weights_of(weighting.krum(n_byzantine=1, n_selected=2), gradients), expected)


def test_sdmgrad_is_optimal():
    rng = np.random.default_rng(6)
    gradients, lam = rng.normal(size=(3, 5)), 0.5
    w = (weights_of(weighting.sdmgrad(lam=lam), gradients) * (1 + lam) - lam / 3).clip(0)
    mean = gradients.mean(0)

    def objective(w):
        return np.square(w @ gradients + lam * mean).sum()

    assert w.sum() == pytest.approx(1.0, abs=1e-4)
    assert objective(w) <= min(objective(w) for w in rng.dirichlet(np.ones(3), 2000)) + 1e-5


def test_gradnorm_lengthens_the_gradient_of_the_slow_task():
    """Equal gradients; one loss fell to a half, the other did not: its weight grows, and the weights go on summing to K."""
    rule = weighting.gradnorm()
    state = rule.init(["fast", "slow"])
    gram = jnp.asarray([[1.0, 0.0], [0.0, 1.0]])
    actual = []
    for step, fast in enumerate([2.0, 1.0, 1.0, 1.0]):
        losses = {"fast": jnp.float32(fast), "slow": jnp.float32(2.0)}
        weights, state = rule.update(state, Signals(losses, gram, jnp.int32(step), jax.random.key(0)))
        actual.append((float(weights["fast"]), float(weights["slow"])))
    assert actual[0] == actual[1] == (1.0, 1.0)
    assert actual[3][1] > actual[2][1] > 1.0
    np.testing.assert_allclose(np.sum(actual, axis=1), 2.0, rtol=1e-6)


def test_db_mtl_without_average_is_its_definition():
    gradients, losses = np.random.default_rng(7).normal(size=(3, 5)), np.array([0.5, 1.0, 4.0])
    logs = gradients / losses[:, None]
    lengths = np.linalg.norm(logs, axis=1)
    actual = gradients.T @ weights_of(weighting.db_mtl(beta=0.0), gradients, losses=losses)
    np.testing.assert_allclose(actual, lengths.max() * (logs / lengths[:, None]).sum(0), rtol=1e-4)


def test_moco_steps_towards_the_shortest_vector():
    gradients = np.random.default_rng(8).normal(size=(3, 5))
    gram, w = gradients @ gradients.T, np.full(3, 1 / 3)
    moved = w - 0.1 * gram @ w
    actual = weights_of(weighting.moco(gamma=0.1), gradients)
    shift = (moved - actual)[actual > 0]
    assert actual.sum() == pytest.approx(1.0, abs=1e-5)
    np.testing.assert_allclose(shift, shift[0], atol=1e-5)  # a projection onto the simplex moves all that stay alike
    steps = [(np.ones(3), gradients, None)] * 300
    many = gradients.T @ history_of(weighting.moco(gamma=0.1, sigma=0.0), steps)[-1]
    np.testing.assert_allclose(many, direction(weighting.mgda(), gradients), atol=1e-2)


def test_aligned_and_config_are_their_definitions():
    gradients = np.random.default_rng(1).normal(size=(4, 9))
    u, s, vt = np.linalg.svd(gradients, full_matrices=False)
    np.testing.assert_allclose(direction(weighting.aligned(), gradients), s.min() * (u @ vt).T @ np.full(4, 0.25), atol=1e-4)
    unit = gradients / np.linalg.norm(gradients, axis=1, keepdims=True)
    d = np.linalg.pinv(unit) @ np.ones(4)
    d /= np.linalg.norm(d)
    np.testing.assert_allclose(direction(weighting.config(), gradients), (gradients @ d).sum() * d, rtol=1e-3, atol=1e-4)


def unlike(K, P, seed):
    """Gradients f[K, P] of very different lengths."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(K, P)) * np.exp(1.5 * rng.normal(size=(K, 1)))


@pytest.mark.parametrize("alpha", [0.3, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("K", [2, 8, 64])
def test_fairgrad_solves_its_equation(alpha, K):
    gradients = unlike(K, 300, seed=2)
    w = weights_of(weighting.fairgrad(alpha=alpha), gradients)
    np.testing.assert_allclose(gradients @ gradients.T @ w, w ** (-1 / alpha), rtol=1e-2)


def test_fairgrad_solves_its_equation_for_gradients_of_like_lengths():
    for alpha in (0.5, 1.0, 2.0):
        gradients = np.random.default_rng(2).normal(size=(6, 20))
        w = weights_of(weighting.fairgrad(alpha=alpha), gradients)
        np.testing.assert_allclose(gradients @ gradients.T @ w, w ** (-1 / alpha), rtol=2e-3)


def test_nash_does_not_depend_on_the_length_of_any_one_gradient():
    gradients = np.diag([1.0, 1e-2, 1e-3])
    np.testing.assert_allclose(weights_of(weighting.nash(max_norm=float("inf")), gradients), [1, 1e2, 1e3], rtol=1e-3)


@pytest.mark.parametrize("K", [2, 8, 64])
def test_upgrad_conflicts_with_no_task_however_short_its_gradient(K):
    for seed in range(3):
        gradients = unlike(K, 300, seed)
        g = direction(make("upgrad"), gradients)
        cosines = gradients @ g / np.linalg.norm(gradients, axis=1) / np.linalg.norm(g)
        assert cosines.min() >= -2e-3
        exact = sum(gradients.T @ (unit + optimize.nnls(gradients.T, -gradients.T @ unit)[0]) for unit in np.eye(K)) / K
        np.testing.assert_allclose(g, exact, atol=1e-2 * np.linalg.norm(exact))


@pytest.mark.parametrize("name", ["upgrad", "dualproj"])
@pytest.mark.parametrize("gradients", [np.zeros((3, 2)), np.ones((3, 2)), np.diag([1.0, 0.0, 1.0]), np.diag([1.0, 1e-6, 1e-3])])
def test_without_conflict_the_projections_are_the_mean(name, gradients):
    np.testing.assert_allclose(weights_of(make(name), gradients), 1 / 3, rtol=2e-3)


def test_imtl_g_of_dependent_gradients():
    """The least-squares solution; a gradient of zero is left out."""
    rng = np.random.default_rng(9)
    gradients = rng.normal(size=(3, 8))
    gradients = np.vstack([gradients, gradients[0] + gradients[1]])
    unit = gradients / np.linalg.norm(gradients, axis=1, keepdims=True)
    w = np.linalg.pinv(unit @ unit.T) @ np.ones(4) / np.linalg.norm(gradients, axis=1)
    np.testing.assert_allclose(weights_of(weighting.imtl_g(), gradients), w / w.sum(), rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(weights_of(weighting.imtl_g(), np.diag([1.0, 2.0, 0.0])), [2 / 3, 1 / 3, 0], atol=1e-4)


def test_imtl_g_has_equal_projections():
    gradients = np.random.default_rng(3).normal(size=(4, 9))
    g = direction(weighting.imtl_g(), gradients)
    projections = gradients @ g / np.linalg.norm(gradients, axis=1)
    np.testing.assert_allclose(projections, projections[0], rtol=1e-3)
    assert weights_of(weighting.imtl_g(), gradients).sum() == pytest.approx(1.0, abs=1e-4)


def test_cagrad_is_optimal():
    """No w on a fine random sample of the simplex gives a smaller objective than the one that was found."""
    rng = np.random.default_rng(4)
    gradients = rng.normal(size=(3, 5))
    mean = gradients.mean(0)

    def objective(w):
        return w @ gradients @ mean + 0.5 * np.linalg.norm(mean) * np.linalg.norm(w @ gradients)

    w = (weights_of(weighting.cagrad(c=0.5), gradients) - 1 / 3).clip(0)
    best = objective(w / w.sum())
    assert best <= min(objective(w) for w in rng.dirichlet(np.ones(3), 2000)) + 1e-5


matrices = st.integers(0, 10_000).map(
    lambda seed: np.random.default_rng(seed).normal(size=(4, 6)) * np.exp(np.random.default_rng(seed + 1).normal(size=(4, 1)))
)


@pytest.mark.parametrize("name", ["upgrad", "dualproj", "mgda"])
@given(gradients=matrices)
@settings(max_examples=25)
def test_non_conflicting(name, gradients):
    g = direction(make(name), gradients)
    assert (gradients @ g).min() >= -1e-3 * np.square(gradients).sum(1).max()


@pytest.mark.parametrize("name", sorted(set(GRAM_RULES) - {"pcgrad", "gradvac"}))
@given(gradients=matrices, seed=st.integers(0, 100))
@settings(max_examples=15)
def test_the_order_of_the_tasks_does_not_matter(name, gradients, seed):
    order = np.random.default_rng(seed).permutation(4)
    rule = make(name)
    expected = direction(rule, gradients)
    np.testing.assert_allclose(direction(rule, gradients[order]), expected, rtol=1e-2, atol=1e-2 * np.abs(expected).max())


@pytest.mark.parametrize("name", GRAM_RULES)
@pytest.mark.parametrize(
    "gradients",
    [
        np.zeros((3, 2)),
        np.ones((3, 2)),
        np.array([[1.0, 0.0], [-1.0, 0.0]]),
        np.array([[1.0, 0.0], [0.0, 0.0]]),
        np.array([[1.0, 2.0]]),
        np.random.default_rng(0).normal(size=(3, 4)) * 1e-15,
        np.random.default_rng(0).normal(size=(3, 4)) * 1e15,
        np.random.default_rng(0).normal(size=(3, 4)) * np.array([[1e-6], [1.0], [1e6]]),
        np.diag([1e-7, 1.0, 1e7]),
    ],
    ids=["zero", "equal", "opposite", "one zero", "K = 1", "1e-15", "1e15", "unlike", "unlike and orthogonal"],
)
def test_weights_are_finite(name, gradients):
    assert np.isfinite(weights_of(make(name), gradients)).all()


@pytest.mark.parametrize("name", sorted(UNTARGETED - {"rlw"}))
@given(seed=st.integers(0, 10_000), absent=st.integers(0, 3))
@settings(max_examples=6)
def test_the_rule_sees_the_tasks_that_are_present(name, seed, absent):
    """With a task that never has examples, the others are weighed as if it did not exist; losses and gradients change."""
    options = {"order": "sorted"} if name in ("pcgrad", "gradvac") else {}
    rule = make(name, **options)
    rng = np.random.default_rng(seed)
    there = np.arange(4) != absent
    steps = [(rng.uniform(0.5, 3, size=4), rng.normal(size=(4, 6)) * np.exp(rng.normal(size=(4, 1)))) for _ in range(4)]
    alone = history_of(rule, [(losses[there], gradients[there], None) for losses, gradients in steps])
    beside = history_of(rule, [(losses * there, gradients * there[:, None], 5.0 * there) for losses, gradients in steps])
    for expected, actual in zip(alone, beside, strict=True):
        assert actual[absent] == 0
        np.testing.assert_allclose(actual[there], expected, rtol=2e-2, atol=2e-3 * np.abs(expected).max())


@pytest.mark.parametrize("name", sorted(UNTARGETED))
def test_a_rule_may_be_vmapped(name):
    """Several trainings in one program: each run's weights are those of the run alone."""
    rule, names = make(name), ("a", "b", "c")
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(2, 3, 5))
    grams = np.asarray(gradients @ gradients.transpose(0, 2, 1), np.float32)
    losses = dict(zip(names, np.asarray(rng.uniform(1, 2, size=(3, 2)), np.float32), strict=True))

    def update(losses, gram):
        told = every_rule.after_transform(rule, gram)
        signals = Signals(losses, gram, jnp.int32(0), jax.random.key(0), transformed=told, cross=gram)
        return rule.update(rule.init(names), signals)[0]

    together, update = jax.jit(jax.vmap(update))(losses, grams), jax.jit(update)
    for n in range(2):
        alone = update({name: loss[n] for name, loss in losses.items()}, grams[n])
        for task in names:
            np.testing.assert_allclose(together[task][n], alone[task], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", SCALE_FREE)
def test_the_weights_do_not_depend_on_a_common_scale(name):
    gradients = np.random.default_rng(5).normal(size=(4, 8))
    rule = weighting.make(name)
    for scale in (1e-8, 1e8):
        np.testing.assert_allclose(weights_of(rule, scale * gradients), weights_of(rule, gradients), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("maker", "message"),
    [
        (lambda: weighting.make("cagrad", c=-1.0), "c is -1.0; it must be a finite number of at least 0"),
        (lambda: weighting.make("cagrad", c=float("inf")), "c is inf; it must be a finite number"),
        (lambda: weighting.make("cagrad", d=1.0), "unknown option of weighting 'cagrad': 'd'.*choices: c"),
        (lambda: weighting.make("cagrad", c="half"), "c is 'half'; it must be a number"),
        (lambda: weighting.make("fairgrad", alpha=0.0), "alpha is 0.0; .* of at least 0.1 and of at most 5"),
        (lambda: weighting.make("pcgrad", order="size"), "order is 'size'; it must be random or sorted"),
        (lambda: weighting.make("gradvac", beta=2.0), "beta is 2.0; it must be a finite number of at least 0 and of at most 1"),
        (lambda: weighting.make("nash", max_norm=0.0), "max_norm is 0.0; it must be a number above 0"),
        (lambda: weighting.make("sdmgrad", lam=-1.0), "lam is -1.0"),
        (lambda: weighting.make("krum", n_selected=0.5), "n_selected is 0.5; it must be a whole number of at least 1"),
        (lambda: weighting.make("krum", n_byzantine=float("inf")), "n_byzantine is inf; it must be a whole number"),
        (lambda: weighting.make("krum", n_selected=3).init(["a", "b"]), "n_selected is 3, but there are 2 tasks"),
        (lambda: weighting.make("gradnorm", alpha=-1.0), "alpha is -1.0"),
        (lambda: weighting.make("db_mtl", beta=1.0), "beta is 1.0"),
        (lambda: weighting.make("moco", gamma=0.0), "gamma is 0.0"),
        (lambda: weighting.make("graddrop", leak=2.0), "leak is 2.0"),
    ],
)
def test_bad_options(maker, message):
    with pytest.raises(UserError, match=message):
        maker()
