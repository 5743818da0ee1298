import jax
import numpy as np
import optax
import pytest

from mtl_jax import Optimizer, ParamRule
from mtl_jax.core.errors import UserError
from mtl_jax.transfer import freezing
from mtl_jax.transfer import optimizer as optimizers


def rates(steps=40, **fields):
    schedule = optimizers.schedule(Optimizer(**fields), 2.0, steps)
    return np.array([float(schedule(step)) for step in range(steps)])


@pytest.mark.parametrize("name", [name for name in optimizers.SCHEDULES if name != "slanted_triangular"])
def test_every_schedule_but_the_slanted_one_rises_evenly_to_its_peak(name):
    np.testing.assert_allclose(rates(schedule=name, warmup=0.25)[:10], 2.0 * np.arange(1, 11) / 10, rtol=1e-6)


def test_inverse_square_root_of_the_steps():
    """Peak * sqrt(warm-up / steps), wherever the phase ends."""
    expected = [2.0 * np.sqrt(10 / max(10, step)) for step in range(10, 40)]
    np.testing.assert_allclose(rates(schedule="inverse_sqrt", warmup=0.25)[9:39], expected, rtol=1e-6)
    np.testing.assert_allclose(rates(steps=80, schedule="inverse_sqrt", warmup=0.125)[9:39], expected, rtol=1e-6)


@pytest.mark.parametrize("name", optimizers.SCHEDULES)
@pytest.mark.parametrize("warmup", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("steps", [1, 3, 40, 5_000_000])
def test_no_step_is_wasted(name, warmup, steps):
    """No rate is 0, and where there is a warm-up, its last step has the peak."""
    schedule = optimizers.schedule(Optimizer(schedule=name, warmup=warmup), 2.0, steps)
    looked_at = np.unique([*range(min(steps, 20)), *range(max(0, steps - 20), steps), max(0, round(warmup * steps) - 1)])
    actual = np.broadcast_to(jax.vmap(schedule)(looked_at), looked_at.shape)
    assert actual.min() > 0
    assert actual.max() == pytest.approx(2.0, rel=1e-6) or not round(warmup * steps)
    if round(warmup * steps) and name != "constant":
        assert looked_at[actual.argmax()] == round(warmup * steps) - 1


@pytest.mark.parametrize("warmup", [0.0, 0.25])
def test_linear_and_cosine_reach_0_in_the_step_after_the_last(warmup):
    left = np.linspace(1, 0, 32)[:-1] if warmup else np.linspace(1, 0, 41)[:-1]  # of 40 steps, from the peak on
    np.testing.assert_allclose(rates(schedule="linear", warmup=warmup)[-len(left) :], 2.0 * left, rtol=1e-5)
    cosine = rates(schedule="cosine", warmup=warmup)[-len(left) :]
    np.testing.assert_allclose(cosine, 1 + np.cos(np.pi * (1 - left)), rtol=1e-4)


# Where six steps of torch.optim.AdamW lead, gradients clipped by torch.nn.utils.clip_grad_norm_ where the setting says so.
KERNEL, BIAS = np.array([[0.5, -1.0, 2.0], [0.1, 0.0, -0.3]], np.float32), np.array([0.2, -0.4, 0.0], np.float32)
SETTINGS = {
    "linear": {"schedule": "linear", "warmup": 0.34, "weight_decay": 0.1, "clip_norm": 0.0},
    "cosine": {"schedule": "cosine", "warmup": 0.34, "weight_decay": 0.01, "clip_norm": 1.0, "b2": 0.98, "eps": 1e-6},
    "no warm-up": {"schedule": "linear", "warmup": 0.0, "weight_decay": 0.0, "clip_norm": 0.5, "b1": 0.8},
}
STORED = {
    "linear": [0.3229410, -0.9284576, 2.1871121, 0.2745434, -0.0000407, -0.5467306, -0.0274701, -0.4618313, -0.0326397],
    "cosine": [0.3308850, -0.9504053, 2.2699008, 0.2887719, -0.0077535, -0.5753297, -0.0433511, -0.4567933, -0.0428187],
    "no warm-up": [0.3267085, -1.0128347, 2.2703154, 0.2902727, 0.0414574, -0.5729792, -0.0346953, -0.4948581, -0.0878226],
}


def gradients(step):
    """Of KERNEL and BIAS."""
    return np.cos(np.arange(6, dtype=np.float32).reshape(2, 3) + step), np.sin(np.arange(1, 4, dtype=np.float32) * (step + 1))


def after_six_steps_of_torch(config):
    torch = pytest.importorskip("torch")
    kernel, bias = torch.nn.Parameter(torch.tensor(KERNEL)), torch.nn.Parameter(torch.tensor(BIAS))
    groups = [{"params": [kernel], "weight_decay": config.weight_decay}, {"params": [bias], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=(config.b1, config.b2), eps=config.eps)
    schedule = optimizers.schedule(config, config.learning_rate, 6)
    for step in range(6):
        kernel.grad, bias.grad = (torch.tensor(gradient) for gradient in gradients(step))
        if config.clip_norm:
            torch.nn.utils.clip_grad_norm_([kernel, bias], config.clip_norm)
        for group in adamw.param_groups:
            group["lr"] = float(schedule(step))
        adamw.step()
    return np.concatenate([kernel.detach().numpy().ravel(), bias.detach().numpy()])


@pytest.mark.parametrize("name", SETTINGS)
def test_six_steps_are_those_of_torch(name):
    config = Optimizer(learning_rate=0.1, **SETTINGS[name])
    params = {"trunk": {"kernel": KERNEL, "bias": BIAS}}
    optimizer = optimizers.build(config, freezing.decide(params, (ParamRule(".*"),)), config.learning_rate, 6)
    state = optimizer.init(params)
    for step in range(6):
        before = params
        kernel, bias = gradients(step)
        updates, state = optimizer.update({"trunk": {"kernel": kernel, "bias": bias}}, state, params)
        params = optax.apply_updates(params, updates)
        assert all((a != b).all() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(params), strict=True)), step
    actual = np.concatenate([np.ravel(params["trunk"]["kernel"]), params["trunk"]["bias"]])
    np.testing.assert_allclose(actual, STORED[name], atol=2e-6)
    np.testing.assert_allclose(actual, after_six_steps_of_torch(config), atol=2e-6)


@pytest.mark.parametrize(("steps", "cut_frac"), [(40, 0.25), (45, 0.1), (40, 0.0), (40, 1.0)])
def test_slanted_triangular_as_the_paper_has_it(steps, cut_frac):
    cut, ratio, expected = round(cut_frac * steps), 8.0, []
    for t in range(1, steps + 1):
        p = t / cut if t < cut else 1 - (t - cut) / max(1, steps - cut)
        if t >= cut and cut and cut == cut_frac * steps and cut < steps:
            assert p == pytest.approx(1 - (t - cut) / (cut * (1 / cut_frac - 1)))
        expected.append(2.0 * (1 + p * (ratio - 1)) / ratio)
    np.testing.assert_allclose(rates(steps, schedule="slanted_triangular", warmup=cut_frac, ratio=ratio), expected, rtol=1e-6)
    assert expected[-1] == (2.0 if cut == steps else 2.0 / ratio)
    assert cut == 0 or max(expected) == expected[cut - 1] == 2.0


def test_a_ratio_below_1():
    with pytest.raises(UserError, match=r"optimizer.ratio is 0\.5"):
        optimizers.check(Optimizer(schedule="slanted_triangular", ratio=0.5))


def test_a_schedule_that_is_none():
    with pytest.raises(UserError, match=r"unknown schedule 'inverse_sqr' .did you mean 'inverse_sqrt'"):
        optimizers.check(Optimizer(schedule="inverse_sqr"))
