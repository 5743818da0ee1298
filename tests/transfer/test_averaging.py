import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

import mtl_jax
from mtl_jax import Checkpoints, Evaluation
from mtl_jax.core.errors import UserError
from mtl_jax.training import checkpoint_files
from mtl_jax.training.checkpoint_store import Store
from mtl_jax.training.metrics_log import read_metrics
from mtl_jax.transfer import averaging

SMALL = st.floats(-100, 100, width=32, allow_subnormal=False)  # XLA takes those for 0


def steps_of(values):
    """A leaf that trains and one that is frozen, after each step."""
    return [{"a": jnp.asarray(value, jnp.float32), "b": None} for value in values]


@given(st.lists(st.tuples(SMALL, SMALL), min_size=1, max_size=8), st.floats(0.01, 0.999))
def test_ema_is_the_debiased_recursion(values, decay):
    rule = averaging.ema(decay)
    average, moment = rule.init(steps_of([(1.0, -1.0)])[0]), np.zeros(2)
    for n, leaves in enumerate(steps_of(values), start=1):
        average = rule.follow(average, leaves)
        moment = decay * moment + (1 - decay) * np.asarray(leaves["a"], np.float64)
        np.testing.assert_allclose(average.mean["a"], moment / (1 - decay**n), rtol=1e-4, atol=1e-3)
    assert average.mean["b"] is None
    assert int(average.times) == len(values)


@given(st.lists(st.tuples(SMALL, SMALL), min_size=1, max_size=8), st.integers(2, 5))
def test_last_is_the_mean_of_as_many(values, n):
    rule = averaging.last(n)
    average = rule.init(steps_of([(1.0, -1.0)])[0])
    for number, leaves in enumerate(steps_of(values), start=1):
        average = rule.collect(average, leaves)
        expected = np.mean(np.asarray(values[max(0, number - n) : number], np.float64), axis=0)
        np.testing.assert_allclose(average.mean["a"], expected, rtol=1e-4, atol=1e-4)
    assert average.mean["b"] is average.kept["b"] is None


@given(st.lists(SMALL, min_size=1, max_size=5), st.integers(1, 6))
def test_what_does_not_move_keeps_its_bits(value, times):
    leaves = steps_of([value])[0]
    for rule in (averaging.ema(0.7), averaging.last(3)):
        average = rule.init(leaves)
        for _ in range(times):
            average = rule.follow(average, leaves)
            average = rule.collect(average, leaves) if rule.collect else average
        np.testing.assert_array_equal(average.mean["a"], leaves["a"])


def test_a_decay_near_one_loses_no_digits_at_the_start():
    """1 - 0.999999^2 in float32 would be off by 3 %."""
    rule = averaging.ema(0.999999)
    average = rule.init({"a": jnp.zeros(1)})
    for value in (1.0, 3.0):
        average = rule.follow(average, {"a": jnp.full(1, value)})
    np.testing.assert_allclose(average.mean["a"], 2.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("emma", "unknown averaging 'emma' (did you mean 'ema'?); choices: none, ema, last"),
        ("ema:decay=1", "averaging is 'ema:decay=1'; decay must be a number above 0 and below 1"),
        ("ema:decay=x", "decay must be a number above 0 and below 1"),
        ("ema:n=3", "averaging is 'ema:n=3'; write none, ema[:decay=D] or last:n=N"),
        ("last", "averaging is 'last'; write none"),
        ("last:n=1", "n must be a whole number of at least 2"),
        ("last:n=2.5", "n must be a whole number of at least 2"),
        ("last:n=inf", "n must be a whole number of at least 2"),
        ("none:n=2", "write none"),
    ],
)
def test_other_texts_are_refused(trunk, data, tmp_path, text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        mtl_jax.train(tiny.experiment(trunk, data, averaging=text), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def params_of(workdir):
    """{step: parameters that were measured}."""
    store = Store(workdir, Checkpoints(), read_only=True)
    actual = {step: store.restore_params(step) for step in store.steps()}
    store.close()
    return actual


@pytest.fixture(scope="module")
def runs(trunk, data, tmp_path_factory):
    """The same run three times, with a checkpoint after each of its 12 steps: 6 of the heads alone, 6 of everything.

    An average knows nothing of what it is of: a trunk of one matrix does, and compiles in no time.
    """
    folder, actual = tmp_path_factory.mktemp("averaged"), {}
    for text in ("none", "ema:decay=0.8", "last:n=2"):
        keep, every = Checkpoints(every=1, keep=20), Evaluation(every=2, baseline="none")
        experiment = tiny.experiment(trunk, data, averaging=text, checkpoints=keep, evaluation=every)
        actual[text] = folder / text[:3], mtl_jax.train(experiment, folder / text[:3])
    return actual


def test_training_itself_is_the_same(runs):
    train = [[r for r in read_metrics(workdir) if r["kind"] == "train"] for workdir, _ in runs.values()]
    assert train[0] == train[1] == train[2]


@pytest.mark.parametrize("text", ["ema:decay=0.8", "last:n=2"])
def test_the_average_of_a_phase_is_what_is_measured_and_kept(runs, text):
    plain, averaged = (params_of(runs[name][0]) for name in ("none", text))
    for start, end, trained in ((0, 6, lambda params: params["heads"]), (6, 12, lambda params: params)):
        for step in range(start + 2, end + 1, 2):
            if text.startswith("ema"):
                weights = {at: 0.8 ** (step - at) for at in range(start + 1, step + 1)}
            else:
                weights = dict.fromkeys(range(start + 2, step + 1, 2)[-2:], 1.0)
            counts = list(weights.values())
            expected = jax.tree.map(
                lambda *leaves, counts=counts: np.average(np.float64(leaves), axis=0, weights=counts),
                *(trained(plain[at]) for at in weights),
            )
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), trained(averaged[step]), expected)
    jax.tree.map(np.testing.assert_array_equal, plain[6]["trunk"], averaged[6]["trunk"])  # frozen: to the last bit
    assert any(np.any(a != b) for a, b in zip(*(jax.tree.leaves(p[12]["trunk"]) for p in (plain, averaged)), strict=True))


def test_results_say_so_and_are_of_the_average(runs, trunk, data):
    """The test score is that of the parameters that predict() opens."""
    from mtl_jax.inference.predict import open_run, predict

    for text, (workdir, actual) in runs.items():
        assert actual["averaging"] == json.loads((workdir / "results.json").read_text())["averaging"] == text
        opened, best = open_run(workdir).params, params_of(workdir)[actual["best_step"]]
        jax.tree.map(np.testing.assert_array_equal, opened, best)
    assert predict(runs["last:n=2"][0], "coarse", ["who is the man ?"])[0]["label"] in ("HUM", "LOC")
    dev = {text: [r["criterion"] for r in read_metrics(workdir) if r["kind"] == "dev"] for text, (workdir, _) in runs.items()}
    assert len(dev["none"]) == 6
    assert dev["none"] != dev["ema:decay=0.8"] != dev["last:n=2"]


def test_without_an_average_nothing_of_it_is_kept(runs):
    for text, (workdir, _) in runs.items():
        store = Store(workdir, Checkpoints(), read_only=True)
        arrays = checkpoint_files.read_record(store.folder / "12")["arrays"]
        store.close()
        assert any(path.startswith("average/") for path in arrays) == (text != "none")
