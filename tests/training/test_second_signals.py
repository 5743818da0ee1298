"""Signals beside the Gram matrix: inner products over two halves of a batch, and the derivative on held-out rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import mtl_jax
from mtl_jax import Batching, Phase, weighting
from mtl_jax.data.stream import single_phase, stream
from mtl_jax.training import mesh as meshes
from mtl_jax.training.build_step import gradient_fn
from mtl_jax.training.forward import apply_heads, encode_tokens, label_counts, mean_losses
from mtl_jax.training.setup import held_out_batches, initial_state, prepare
from mtl_jax.training.train_state import StepInputs

TASKS = ("coarse", "fine", "rating")
WEIGHTS, RATE = dict(zip(TASKS, (0.5, 1.0, 2.0), strict=True)), 0.3


def probe():
    """A rule that needs both signals and returns them as its state."""

    def update(state, signals):
        weights = {task: jnp.float32(weight) for task, weight in WEIGHTS.items()}
        held_out = signals.held_out(weights, RATE)
        return weights, {"cross": signals.cross, "held_out": held_out}

    shapes = {"cross": jnp.zeros((3, 3)), "held_out": jnp.zeros(3)}
    held_out = weighting.HeldOut(("coarse",), 0.1)
    return weighting.Rule(lambda names: shapes, update, needs_cross=True, held_out=held_out, name="probe")


def experiment(data, **changes):
    whole = tiny.experiment("", data)
    values = {
        "trunk": mtl_jax.Embedding(vocabulary=100, dimension=8),
        "phases": (Phase("all", 6),),
        "tasks": tuple(dataclasses.replace(task, dropout=0.0) for task in whole.tasks),
        "batch": Batching(rows=16, row_length=24, examples_per_row=6),
        "optimizer": mtl_jax.Optimizer(learning_rate=1e-3),
    }
    return tiny.experiment("", data, **(values | changes))


class Measured:
    """The two signals of the first step, and what they are made of."""

    def __init__(self, data, **changes):
        self.prepared = prepared = prepare(experiment(data, weighting=probe(), **changes))
        batches = stream(prepared.corpus, prepared.experiment.batch, 0, single_phase(prepared.experiment.batch, 6))
        self.batch = next(batches)
        batches.close()
        self.held_out = held_out_batches(prepared)
        inputs = StepInputs(meshes.assemble(self.batch, meshes.by_rows(prepared.mesh)), held_out=self.held_out)
        frozen = jax.tree.map(lambda _: None, prepared.params)
        step = jax.jit(gradient_fn(prepared, prepared.plans[0]))
        self.step = step(prepared.params, frozen, inputs, initial_state(prepared))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tiny.write_data(folder)
    return folder


@pytest.fixture(scope="module")
def measured(data):
    return functools.cache(
        lambda devices=1, accumulate=1: Measured(
            data, devices=devices, batch=Batching(rows=16, row_length=24, examples_per_row=6, accumulate=accumulate)
        )
    )


def losses_of(run, batch):
    tasks, encode = run.prepared.corpus.tasks, encode_tokens(run.prepared.trunk.module)

    def losses(params, chosen=tasks):
        outputs = apply_heads(chosen, params["heads"], encode(params["trunk"], batch, None, None), batch, None)
        return mean_losses(chosen, outputs, batch, label_counts(chosen, batch))

    return losses


def test_held_out_is_the_derivative_of_the_loss_after_a_step(measured):
    """Beside reverse-mode differentiation through the whole step, in one program without this package's step."""
    run = measured()
    params, coarse = run.prepared.params, tuple(task for task in run.prepared.corpus.tasks if task.name == "coarse")
    train = losses_of(run, jax.tree.map(jnp.asarray, run.batch))
    assert len(run.held_out.tokens) == 1
    ahead = losses_of(run, jax.tree.map(lambda leaf: leaf[0], run.held_out))

    @jax.jit
    @jax.grad
    def expected(weights):
        gradient = jax.grad(lambda params: weighting.weighted_sum(weights, train(params)))(params)
        moved = jax.tree.map(lambda leaf, change: leaf - RATE * change, params, gradient)
        return ahead(moved, coarse)["coarse"]

    values = [float(value) / RATE for value in expected({task: jnp.float32(w) for task, w in WEIGHTS.items()}).values()]
    assert np.abs(values).min() > 1e-6
    np.testing.assert_allclose(run.step.rule_state["held_out"], values, rtol=1e-4)


def test_cross_is_over_every_other_row_of_each_source(measured):
    run = measured()
    place = np.concatenate([np.arange((run.batch.source == source).sum()) for source in (0, 1)])
    halves = [jax.tree.map(lambda leaf, half=half: jnp.asarray(leaf[place % 2 == half]), run.batch) for half in (0, 1)]
    rows = [jax.jacrev(losses_of(run, half))(run.prepared.params) for half in halves]
    flat = [[np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(by[task]["trunk"])]) for task in TASKS] for by in rows]
    expected = np.array(flat[0]) @ np.array(flat[1]).T
    np.testing.assert_allclose(run.step.rule_state["cross"], expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())
    assert np.abs(expected - expected.T).max() > 0.01 * np.abs(expected).max()


@pytest.mark.parametrize("changed", [{"accumulate": 2}, {"devices": 8}])
def test_parts_and_devices_change_no_signal(measured, changed):
    plain, other = measured().step, measured(**changed).step
    for field in ("held_out", "cross"):
        largest = np.abs(plain.rule_state[field]).max()
        np.testing.assert_allclose(other.rule_state[field], plain.rule_state[field], rtol=1e-4, atol=1e-5 * largest)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), other.gradient, plain.gradient)
