"""Clipping, noise and accountants, in arrays."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_jax import Private
from mtl_jax.core.errors import UserError
from mtl_jax.transfer import accountants, private, private_gradient

# (noise, rate, steps, epsilon at delta 1e-5 by dp-accounting 0.6.0: RdpAccountant with orders 2 to 256, PLDAccountant)
GOLDENS = (
    (4.0, 0.01, 10_000, 1.0354900660362436, 0.9469993068930963),
    (1.1, 256 / 60_000, 14_040, 2.5948176752357233, 2.3796435199377344),
    (1.0, 0.05, 1000, 12.06293473282434, 10.986679174160777),
    (0.6, 0.004, 3000, 6.281899408836491, 5.115658315995554),
)


@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=4),
    st.sampled_from([1e-3, 1.0, 50.0]),
)
def test_no_row_is_longer_than_clip_and_short_ones_stay(values, clip):
    gradient = {"a": np.float32(values[:3]), "b": np.float32(values[3:])}
    norm = float(np.linalg.norm(np.float32(values).astype(np.float64)))
    after = private.clipped(gradient, clip)
    length = float(np.sqrt(sum(np.square(np.float64(leaf)).sum() for leaf in after.values())))
    assert length <= clip * (1 + 1e-5)
    if norm < clip * (1 - 1e-5):
        np.testing.assert_array_equal(after["a"], gradient["a"])
    elif norm > clip * (1 + 1e-5):
        assert length == pytest.approx(clip, rel=1e-4)
        np.testing.assert_allclose(np.asarray(after["a"]) * norm, gradient["a"] * clip, rtol=1e-3, atol=1e-3 * clip)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_counts_nothing(bad):
    rows = {"w": jnp.array([[bad, 0.0], [0.5, 0.0]])}
    assert private_gradient(rows, jax.random.key(0), clip=1.0, noise=0.0, expected=1.0)["w"].tolist() == [0.5, 0.0]


def test_the_noise_has_the_stated_deviation_and_is_independent():
    rows = {"a": jnp.zeros((1, 20_000)), "b": jnp.zeros((1, 20_000))}
    first = private_gradient(rows, jax.random.key(0), clip=2.0, noise=1.5, expected=10.0)
    second = private_gradient(rows, jax.random.key(1), clip=2.0, noise=1.5, expected=10.0)
    again = private_gradient(rows, jax.random.key(0), clip=2.0, noise=1.5, expected=10.0)
    for leaf in (first["a"], first["b"], second["a"]):
        assert float(leaf.std()) == pytest.approx(1.5 * 2.0 / 10.0, rel=0.02)
        assert abs(float(leaf.mean())) < 0.3 / math.sqrt(20_000) * 4
        standard = np.asarray(leaf) / 0.3
        assert np.mean(standard**4) == pytest.approx(3.0, rel=0.05)
    for other in (first["b"], second["a"]):
        assert abs(np.corrcoef(first["a"], other)[0, 1]) < 4 / math.sqrt(20_000)
    np.testing.assert_array_equal(first["a"], again["a"])


@pytest.mark.parametrize(("noise", "rate", "steps", "epsilon", "tighter"), GOLDENS)
def test_rdp_is_the_published_accountant(noise, rate, steps, epsilon, tighter):
    by_rdp = accountants.rdp(noise, [(rate, steps)], 1e-5)
    assert by_rdp == pytest.approx(epsilon, rel=1e-6)
    assert by_rdp >= tighter
    halves = accountants.rdp(noise, [(rate, steps // 2), (rate, steps - steps // 2)], 1e-5)
    assert halves == pytest.approx(by_rdp, rel=1e-9)


def test_rdp_gives_published_numbers():
    """Abadi et al., 2016: 1.26, converted as before Balle et al., 2020. The manual of Opacus: 2.39 at order 5."""
    bound_A = 10_000 * accountants._divergence(4.0, 0.01) + math.log(1e5) / (accountants.ORDERS - 1)
    assert bound_A.min() == pytest.approx(1.26, abs=0.005)
    [divergence] = 300 * accountants._divergence(1.0, 0.01)[accountants.ORDERS == 5]
    assert divergence + math.log(4 / 5) + (math.log(1e5) - math.log(5)) / 4 == pytest.approx(2.39, abs=0.005)
    assert accountants.rdp(1.0, [(0.01, 300)], 1e-5) < 2.395


def test_rdp_at_its_ends():
    assert accountants.rdp(0.0, [(0.1, 10)], 1e-5) == math.inf
    assert accountants.rdp(1.0, [(0.1, 0)], 1e-5) == 0.0
    assert accountants.rdp(1.0, [(0.0, 10)], 1e-5) == 0.0
    # Without sampling: the Gaussian mechanism, whose exact epsilon at sigma 1 and delta 1e-5 is 4.377 (Balle and Wang, 2018).
    assert 4.377 < accountants.rdp(1.0, [(1.0, 1)], 1e-5) < 4.8


def test_pld_is_that_of_dp_accounting():
    pytest.importorskip("dp_accounting")
    noise, rate, steps, _, epsilon = GOLDENS[0]
    assert accountants.pld(noise, [(rate, steps)], 1e-5) == pytest.approx(epsilon, rel=1e-6)


def test_noise_and_steps_stay_within_a_budget():
    def epsilon_of(noise):
        return 2.0 / noise**1.5

    noise = accountants.noise_for(epsilon_of, 3.0)
    assert epsilon_of(noise) <= 3.0 < epsilon_of(noise - 0.002)
    assert accountants.noise_for(epsilon_of, 0.03) == pytest.approx((2 / 0.03) ** (2 / 3), abs=0.001)

    def after(steps):
        return 0.3 * steps**0.5

    assert accountants.steps_within(after, 3.0, 1000) == 100
    assert accountants.steps_within(after, 1e3, 1000) == 1000
    assert accountants.steps_within(after, 1e-9, 1000) == 0
    with pytest.raises(UserError, match=r"optimizer\.private\.epsilon is 1e-09: no noise"):
        accountants.noise_for(epsilon_of, 1e-9)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"noise": 1.0}, r"optimizer\.private\.noise needs optimizer\.private\.clip"),
        ({"clip": -1.0}, r"optimizer\.private\.clip is -1\.0; it must be finite and not negative"),
        ({"clip": 1.0, "delta": 0.0}, r"optimizer\.private\.delta is 0\.0; it is a probability, above 0"),
        ({"clip": 1.0, "micro_batch": 0}, r"optimizer\.private\.micro_batch is 0"),
        ({"clip": 1.0, "accountant": "rpd"}, r"unknown optimizer\.private\.accountant 'rpd' \(did you mean 'rdp'\?\)"),
    ],
)
def test_wrong_fields_are_one_line(fields, line):
    with pytest.raises(UserError, match=line):
        private.check(Private(**fields))


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr(accountants.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pld needs the package dp-accounting: .*or choose rdp, which needs none"):
        private.check(Private(clip=1.0, accountant="pld"))


def test_a_secret_decides_noise_and_rows(tmp_path):
    (tmp_path / "key").write_bytes(bytes(range(32)))
    (tmp_path / "other").write_bytes(bytes(range(1, 33)))
    with_key, with_other = (Private(clip=1.0, secret=str(tmp_path / name)) for name in ("key", "other"))
    assert private.seed_of(Private(), 7, "rows", 16) == 7
    seeds = {
        private.seed_of(which, seed, use, 8) for which in (with_key, with_other) for seed in (0, 1) for use in ("rows", "noise")
    }
    assert len(seeds) == 8
    assert private.seed_of(with_key, 0, "rows", 8) == private.seed_of(with_key, 0, "rows", 8)
    (tmp_path / "short").write_bytes(b"0123")
    with pytest.raises(UserError, match=r"short: it has 4 bytes; write at least 16 random ones"):
        private.secret_of(Private(clip=1.0, secret=str(tmp_path / "short")))
    with pytest.raises(UserError, match=r"absent: cannot be read"):
        private.secret_of(Private(clip=1.0, secret=str(tmp_path / "absent")))
