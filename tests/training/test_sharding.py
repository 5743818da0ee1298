"""States that are cut over devices: which axis, who decides, gradients of gathered leaves, checkpoints."""

import contextlib
import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import mtl_jax
from mtl_jax import UserError
from mtl_jax.ablation import plan as plans
from mtl_jax.ablation import space
from mtl_jax.experiment_checks import check
from mtl_jax.training import mesh as meshes
from mtl_jax.training import phase_state, setup, sharding
from mtl_jax.training import workdir as workdirs
from mtl_jax.training.checkpoint_store import Store
from mtl_jax.training.experiment_json import to_json
from mtl_jax.training.sharding import Placement, axis_to_cut, decide
from mtl_jax.training.task_gradients import gram_matrix


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((512, 4096), 1),
        ((4096, 512), 0),
        ((1024, 1024), 0),  # the first of equal ones
        ((30522, 384), 1),  # 8 does not divide the larger axis
        ((510, 4095), None),
        ((65_536,), 0),
        ((65_528,), None),  # too small
        ((3, 0, 65_536), None),
        ((), None),
    ],
)
def test_the_axis_that_is_cut(shape, axis):
    assert axis_to_cut(shape, 8) == axis
    assert axis_to_cut(shape, 1) is None


@pytest.mark.parametrize(
    ("choice", "devices", "memory", "cut", "note"),
    [
        ("replicated", 8, 1e9, False, ""),
        ("fsdp", 8, None, True, "sharding fsdp: cut over 8 devices; state, gradients and references need 12.00 GB in all"),
        ("fsdp", 1, 1e9, False, "sharding fsdp: one device has everything, so nothing is cut; state"),
        ("auto", 8, None, False, "sharding auto: replicated, because the memory of these devices is not known (CPUs)"),
        ("auto", 8, 16e9, False, "need 12.00 GB, not more than 80% of a device's 16.00 GB"),
        (
            "auto",
            8,
            14e9,
            True,
            "auto: fsdp over 8 devices; state, gradients and references need 12.00 GB, more than 80%",
        ),
    ],
)
def test_who_decides(choice, devices, memory, cut, note):
    decision = decide(choice, 12_000_000_000, devices, memory)
    assert decision.cut == cut
    assert note in decision.note


@pytest.mark.parametrize("field", ["sharding", "remat"])
def test_unknown_choices_are_refused(bert, data, field):
    with pytest.raises(UserError, match=f"unknown {field} 'zero'"):
        check(tiny.experiment(bert, data, **{field: "zero"}))


def test_an_ablation_refuses(bert, data):
    experiment = tiny.experiment(bert, data, sharding="fsdp")
    with pytest.raises(UserError, match="sharding is fsdp, but an ablation trains different runs on different devices"):
        plans.runs(experiment, space.axes(experiment, ["optimizer.learning-rate=0.1,0.2"], ""))


def test_rows_for_fewer_devices(bert, data):
    experiment = tiny.experiment(bert, data, sharding="fsdp", devices=8, batch=mtl_jax.Batching(rows=4, row_length=24))
    with pytest.raises(UserError, match=re.escape("batch.rows is 4; it must be a multiple of the 8 devices")):
        setup.prepare(experiment)


@pytest.mark.parametrize("choice", ["replicated", "fsdp"])
def test_devices_have_the_state_alone(bert, data, choice):
    """The pretrained parameters, and those that training begins with, stay on the host."""
    prepared = setup.prepare(tiny.experiment(bert, data, devices=4, sharding=choice))
    for tree in (prepared.trunk.params, prepared.params):
        assert {type(leaf) for leaf in jax.tree.leaves(tree)} == {np.ndarray}


def test_old_configurations_stay_the_same(bert, data):
    """The fields are written where they are set, and runs that begin without them compare equal to those of before."""
    experiment = tiny.experiment(bert, data)
    assert not {"sharding", "remat"} & set(to_json(experiment))
    assert to_json(dataclasses.replace(experiment, sharding="auto", remat="dots"))["remat"] == "dots"


@pytest.fixture
def placement(monkeypatch):
    """Eight devices, over which every divisible leaf is cut."""
    monkeypatch.setattr(sharding, "SMALLEST", 1)
    return Placement(meshes.make(8, 8), cut=True)


def test_gradients_of_gathered_parameters(placement):
    """They are those of whole ones, and lie as the parameters do: by one task, by several at once, and along a direction."""
    dense = nn.Dense(8)
    x_8x4 = np.arange(32, dtype=np.float32).reshape(8, 4) / 32
    params = dense.init(jax.random.key(0), x_8x4)["params"]

    def loss(params, scale, gathered=lambda tree: tree):
        return (dense.apply({"params": gathered(params)}, scale * x_8x4) ** 2).sum()

    def everything(params, **options):
        by_scale = jax.vmap(lambda scale: jax.grad(loss)(params, scale, **options))(jnp.arange(1.0, 4.0))
        slope = jax.jvp(lambda params: loss(params, 1.0, **options), (params,), (params,))[1]
        return jax.grad(loss)(params, 1.0, **options), by_scale, slope

    placed = placement.place(params)
    assert sharding.bytes_of(placed) == sharding.bytes_of(placement.shapes(params)) == 4 * (4 * 8 + 8) / 8
    assert placed["kernel"].sharding.spec == jax.P(None, "data")
    expected = everything(params)
    gradient, by_scale, slope = jax.jit(lambda params: everything(params, gathered=placement.boxed))(placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), (gradient, by_scale, slope), expected)
    assert gradient["kernel"].sharding.shard_shape((4, 8)) == (4, 1)
    assert by_scale["kernel"].sharding.shard_shape((3, 4, 8)) == (3, 4, 1)


def test_the_gram_matrix_of_cut_gradients(placement):
    rows = np.random.default_rng(0).normal(size=(3, 5, 16)).astype(np.float32)
    cut = jax.device_put(rows, meshes.by_rows(placement.mesh, 2))
    found = jax.jit(lambda rows: gram_matrix([rows[:1], rows[1:]], ["a", "b", "c"]))(cut)
    flat = rows.reshape(3, -1)
    np.testing.assert_allclose(found, flat @ flat.T, rtol=1e-5)


def test_a_checkpoint_under_another_sharding(bert, data, tmp_path, monkeypatch):
    """A state that is cut is saved whole, and restored whole or cut, with the same bits."""
    monkeypatch.setattr(sharding, "SMALLEST", 64)
    experiment = tiny.experiment(bert, data, averaging="ema", devices=8)
    whole = setup.prepare(experiment)
    cut = whole._replace(cut=True)
    state = phase_state.initial_state(cut)
    assert state.opt_state[1].mu["heads"]["fine"]["hidden"]["kernel"].sharding.spec == jax.P("data")
    assert state.params["heads"]["fine"]["hidden"]["bias"].sharding.is_fully_replicated
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(phase_state.initial_state(whole)))
    record = {"step": 0, "counts": {"phase": 0, "places": 0, "seen": {}, "seconds": 0.0}, "data": [], "references": {}}
    with contextlib.closing(Store(tmp_path, experiment.checkpoints)) as store:
        store.save(0, state, record, 0.5)
        store.wait()
        for prepared in (whole, cut):
            restored = store.restore(0, lambda record, prepared=prepared: phase_state.template(prepared, 0, 0)).state
            kernel = restored.average.mean["heads"]["fine"]["hidden"]["kernel"]
            assert kernel.sharding.is_fully_replicated != prepared.cut
            jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))


def test_a_run_may_resume_under_another_sharding(tmp_path):
    workdirs.write_json(tmp_path / "config.json", {"seed": 0, "sharding": "fsdp"})
    assert not workdirs.config_changed(tmp_path, {"seed": 0, "remat": "layers"}, False)
