"""Accountants: the epsilon of private training steps, and the noise or the number of steps that keeps it within a budget.

A step adds up the clipped gradients of rows that were drawn independently, each with probability q, and adds Gaussian noise.
Two data sets are neighbours if one has one row more.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.special import gammaln, logsumexp

from mtl_jax.core.errors import UserError
from mtl_jax.core.parts import Registry

# (noise multiplier, [(q, number of steps)], delta) -> epsilon
Accountant = Callable[[float, Sequence[tuple[float, int]], float], float]

ORDERS = np.array([*range(2, 257), 320, 384, 512, 768, 1024])
MOST_NOISE = 1e5
GRID = 1e-3  # solved noise is rounded up to a multiple of it, so that every machine finds the same


def rdp(noise: float, steps: Sequence[tuple[float, int]], delta: float) -> float:
    """Epsilon by Renyi divergences of whole orders; needs no package.

    Args:
        noise: The standard deviation of the noise over the clipping norm.
        steps: [(the probability that a row is drawn, the number of such steps)].
        delta: The probability with which the guarantee may fail.

    References:
        Mironov et al., 2019, https://arxiv.org/abs/1908.10530, section 3.3; from Renyi divergence to epsilon: Balle et al.,
        2020, https://arxiv.org/abs/1905.09982, theorem 21.
    """
    if noise == 0:
        return math.inf if any(rate and number for rate, number in steps) else 0.0
    divergence_A = sum((number * _divergence(noise, rate) for rate, number in steps), np.zeros(len(ORDERS)))
    if not divergence_A.any():
        return 0.0
    epsilon_A = divergence_A + np.log1p(-1 / ORDERS) - (math.log(delta) + np.log(ORDERS)) / (ORDERS - 1)
    return max(0.0, float(epsilon_A.min()))


@functools.lru_cache(maxsize=1024)
def _divergence(noise: float, rate: float) -> np.ndarray:
    """f64[orders]: the Renyi divergence of one step at each order."""
    if rate == 0:
        return np.zeros(len(ORDERS))
    if rate == 1:
        return ORDERS / (2 * noise**2)
    divergences = []
    for order in ORDERS.tolist():
        k = np.arange(order + 1)
        binomials = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
        terms = binomials + (order - k) * math.log1p(-rate) + k * math.log(rate) + (k * k - k) / (2 * noise**2)
        divergences.append(logsumexp(terms) / (order - 1))
    return np.maximum(np.array(divergences), 0.0)


def pld(noise: float, steps: Sequence[tuple[float, int]], delta: float) -> float:
    """Epsilon by privacy loss distributions, with the package dp-accounting: smaller than by rdp, and almost exact.

    Args:
        noise: As for rdp; so are steps and delta.
    """
    if noise == 0:
        return rdp(noise, steps, delta)
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant()
    for rate, number in steps:
        if rate and number:
            step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
            accountant.compose(dp_accounting.SelfComposedDpEvent(step, number))
    return max(0.0, float(accountant.get_epsilon(delta)))


ACCOUNTANTS: Registry[Accountant] = Registry("accountant", {"rdp": rdp, "pld": pld})
PACKAGES = {"pld": "dp_accounting"}


def register_accountant(name: str) -> Callable[[Accountant], Accountant]:
    """A decorator for a function that says what private steps spend: --optimizer.private.accountant NAME then uses it.

    The function takes the noise multiplier, a list of (probability that a row is drawn, number of steps), and delta; it returns
    epsilon, a number of at least 0, which must not fall with more steps nor rise with more noise.

    Args:
        name: The accountant's name: letters, digits and "_".

    Raises:
        UserError: The name is taken.

    Examples:
        >>> import mtl_jax
        >>> @mtl_jax.transfer.register_accountant("doubled")
        ... def doubled(noise, steps, delta):
        ...     return 2 * mtl_jax.transfer.rdp(noise, steps, delta)
        >>> mtl_jax.Private(clip=1.0, noise=1.0, accountant="doubled").accountant
        'doubled'
    """
    return ACCOUNTANTS.register(name)


def check(name: str) -> None:
    """Raises UserError if there is no such accountant, or its package is not installed."""
    ACCOUNTANTS.find(name, "optimizer.private.accountant")
    package = PACKAGES.get(name)
    if package and importlib.util.find_spec(package) is None:
        raise UserError(
            f"optimizer.private.accountant {name} needs the package {package.replace('_', '-')}: "
            "pip install 'mtl_jax[private]', or choose rdp, which needs none"
        )


def noise_for(epsilon_of: Callable[[float], float], epsilon: float) -> float:
    """The least noise multiplier, a multiple of 0.001, that spends at most `epsilon`.

    Args:
        epsilon_of: Noise multiplier -> epsilon.
        epsilon: The budget.

    Raises:
        UserError: No noise is enough.
    """
    high = 1.0
    while epsilon_of(high) > epsilon:
        high *= 2
        if high > MOST_NOISE:
            raise UserError(
                f"optimizer.private.epsilon is {epsilon:g}: no noise keeps the run within it; raise it, or lower "
                "batch.expected_rows"
            )
    low, top = 0, round(high / GRID)
    while top - low > 1:
        middle = (low + top) // 2
        low, top = (low, middle) if epsilon_of(middle * GRID) <= epsilon else (middle, top)
    return round(top * GRID, 3)


def steps_within(epsilon_after: Callable[[int], float], epsilon: float, steps: int) -> int:
    """The largest number of steps, at most `steps`, that spends at most `epsilon`.

    Args:
        epsilon_after: Number of steps -> epsilon.
        epsilon: The budget.
        steps: The steps of the run.
    """
    low, high = 0, steps + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if epsilon_after(middle) <= epsilon else (low, middle)
    return low
