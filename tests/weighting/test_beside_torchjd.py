"""Rules beside TorchJD 0.18 on random numbers; its results are stored here, and made by

python tests/weighting/test_beside_torchjd.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax import weighting
from mtl_jax.weighting import Signals

NAMES = tuple("abcde")
STEPS = 4
PREFERENCES = dict(zip(NAMES, (0.5, 1.0, 2.0, 0.25, 1.5), strict=True))
LOWEST = 0.05

# {case: the weights f[5] (of trimmed_mean the gradient) in the last of the steps}
GOLDEN = {
    "modo": [0.3443948, 0, 0.1276851, 0, 0.5279202],
    "sdmgrad": [0.1494186, 0.04615385, 0.2054088, 0.1709437, 0.4280751],
    "pcd": [1.055594, 0.4316363, 0, 0, 0],
    "imtl": [-0.1359602, 0.1003365, 0.28978, 0.1604144, 0.4567588],
    "excess_risk": [0.9965722, 0.0001688434, 0.000404519, 0.001682048, 0.001172421],
    "trimmed_mean 0": [0.5719613, 0.5650081, -0.3892593, 0.2758214, -0.5578124, 0.0883665],
    "trimmed_mean 1": [0.6825461, 0.5862762, -0.2028033, -0.09610682, -0.7574321, 0.05902635],
    "trimmed_mean 2": [0.7889452, 0.7142309, -0.1802515, -0.2727387, -0.7944229, 0.01164498],
    "cosmos": [0.5925865, 0.8569804, 1.785275, 0.407908, 1.492997],
    "cosmos plain": [1, 1, 1, 1, 1],
    "pbi": [1.614436, -0.5713265, -0.2264828, 2.087748, 1.630092],
    "pbi plain": [0.4472136, 0.4472136, 0.4472136, 0.4472136, 0.4472136],
}


def drawn(step):
    """Losses f64[5], and the gradients f64[5, 6] of two halves of a batch."""
    rng = np.random.default_rng(step)
    gradients = rng.normal(size=(5, 6)) * np.exp(rng.normal(size=(5, 1)))
    halves = [gradients + 0.5 * rng.normal(size=(5, 6)) for _ in range(2)]
    return rng.uniform(0.1, 3.0, 5), halves[0], halves[1]


def weigh(rule, steps=STEPS):
    """The weights f64[5] in the last step, or the changed gradient f64[6]."""
    state, update = rule.init(NAMES), jax.jit(rule.update)
    for step in range(steps):
        losses, first, second = (np.asarray(values, np.float32) for values in drawn(step))
        by_task = dict(zip(NAMES, losses, strict=True))
        if rule.transform is not None:
            rows = {name: jnp.asarray(row) for name, row in zip(NAMES, first, strict=True)}
            gradient, weights, state = weighting.gradient(rule, state, rows, by_task, step=0, key=jax.random.key(0))
            if rule.name == "trimmed_mean":
                return np.asarray(gradient)
            continue
        signals = Signals(by_task, first @ first.T, jnp.int32(step), jax.random.key(0), cross=first @ second.T)
        weights, state = update(state, signals)
    return np.array([float(weights[name]) for name in NAMES])


RULES = {
    "modo": lambda: weigh(weighting.modo()),
    "sdmgrad": lambda: weigh(weighting.sdmgrad(iterations=20, learning_rate=0.5), STEPS + 1),
    "pcd": lambda: weigh(weighting.pcd("a")),
    "imtl": lambda: weigh(weighting.imtl(learning_rate=0.1)),
    "excess_risk": lambda: weigh(weighting.excess_risk(learning_rate=0.5)),
    "trimmed_mean 0": lambda: weigh(weighting.trimmed_mean(trim=0)),
    "trimmed_mean 1": lambda: weigh(weighting.trimmed_mean(trim=1)),
    "trimmed_mean 2": lambda: weigh(weighting.trimmed_mean(trim=2)),
    "cosmos": lambda: weigh(weighting.cosmos(2.0, PREFERENCES)),
    "cosmos plain": lambda: weigh(weighting.cosmos(0.0)),
    "pbi": lambda: weigh(weighting.pbi(3.0, PREFERENCES, LOWEST)),
    "pbi plain": lambda: weigh(weighting.pbi(0.0)),
}


@pytest.mark.parametrize("case", RULES)
def test_the_numbers_are_those_of_torchjd(case):
    expected = np.array(GOLDEN[case])
    np.testing.assert_allclose(RULES[case](), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def torchjd_results():
    """{case: f64[5] or f64[6]}, by TorchJD."""
    import torch
    from torchjd import aggregation, scalarization

    def last(weighting, matrix_of):
        for step in range(STEPS):
            weights = weighting(torch.tensor(matrix_of(step)))
        return weights.numpy()

    def cross(step):
        return drawn(step)[1] @ drawn(step)[2].T

    def derivative(scalarizer):
        losses = torch.tensor(drawn(STEPS - 1)[0], requires_grad=True)
        scalarizer(losses).backward()
        return losses.grad.numpy()

    def imtl():
        """IMTLG of the scaled losses' gradients; their scales follow IMTLL by optax's Adam."""
        adam, log_scale = optax.adam(0.1), np.zeros(5)
        state = adam.init(jnp.zeros(5))
        for step in range(STEPS):
            losses, rows, _ = drawn(step)
            scale = np.exp(log_scale)
            scaled = scale[:, None] * rows
            weights = aggregation.IMTLGWeighting()(torch.tensor(scaled @ scaled.T)).numpy() * scale
            module = scalarization.IMTLL(5).double()
            module.log_scale.data = torch.tensor(log_scale)
            module(torch.tensor(losses)).backward()
            updates, state = adam.update(jnp.asarray(module.log_scale.grad.numpy(), jnp.float32), state)
            log_scale = log_scale + np.asarray(updates, np.float64)
        return weights

    def trimmed(number):
        return aggregation.TrimmedMean(number)(torch.tensor(drawn(0)[1])).numpy()

    preferences, ones = torch.tensor(list(PREFERENCES.values()), dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    lowest = torch.full((5,), LOWEST, dtype=torch.float64)
    return {
        "modo": last(aggregation.MoDoWeighting(), cross),
        "sdmgrad": last(aggregation.SDMGradWeighting(lr=0.5), cross),
        "pcd": last(aggregation.PCDWeighting(), lambda step: drawn(step)[1] @ drawn(step)[1].T),
        "imtl": imtl(),
        "excess_risk": last(aggregation.ExcessMTLWeighting(0.5, n_warmup_steps=1), lambda step: drawn(step)[1]),
        **{f"trimmed_mean {number}": trimmed(number) for number in (0, 1, 2)},
        "cosmos": derivative(scalarization.COSMOS(2.0, preferences)),
        "cosmos plain": derivative(scalarization.COSMOS(0.0, ones)),
        "pbi": derivative(scalarization.PBI(3.0, preferences, lowest)),
        "pbi plain": derivative(scalarization.PBI(0.0, ones)),
    }


if __name__ == "__main__":
    for case, values in torchjd_results().items():
        print(f"    {case!r}: [{', '.join(f'{value:.7g}' for value in values)}],")
