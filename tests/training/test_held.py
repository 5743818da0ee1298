"""Regularisers in a run: gradients beside hand-written ones, one training with all of them, what is refused."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import mtl_jax
from mtl_jax import EWC, L2SP, Distillation, Mixout, Phase, RDrop, transfer
from mtl_jax.data.stream import one_stretch, stream
from mtl_jax.errors import UserError
from mtl_jax.training import loop, runs
from mtl_jax.training.checkpoint import Store
from mtl_jax.training.holding import leaves_of
from mtl_jax.training.logs import read_metrics
from mtl_jax.training.prepare import initial_state, measure, prepare
from mtl_jax.training.references import References
from mtl_jax.training.step import apply_heads, encode_tokens, make_train_step

ALL = (Phase("all", 4),)


def setup(bert, data, folder, **changes):
    """Without dropout, unless said otherwise: the run, its only phase, a batch, the state, what it holds on to."""
    tasks = tuple(dataclasses.replace(task, dropout=0.0) for task in tiny.experiment(bert, data).tasks)
    values = {"phases": ALL, "tasks": tasks, "trunk": mtl_jax.Pretrained(str(bert), dropout=0.0)} | changes
    prepared = prepare(tiny.experiment(bert, data, **values))
    batches = stream(prepared.corpus, prepared.experiment.batch, 0, one_stretch(prepared.experiment.batch, 100))
    batch = jax.tree.map(jnp.asarray, next(batches))
    batches.close()
    state = initial_state(prepared)
    return prepared, prepared.plans[0], batch, state, References(prepared, folder).enter(prepared.plans[0], state, True)


def moved(state):
    return state._replace(params=jax.tree.map(lambda leaf: leaf * 1.1 + 0.01, state.params))


@pytest.mark.parametrize("weighting", ["equal", "pcgrad"])
def test_gradients_are_added_to_those_of_the_tasks(bert, data, workdir, tmp_path, weighting):
    """The whole gradient less that of the same run without regularisers is what jax.grad gives of the losses written out."""
    held = (
        L2SP(weight=2.0),
        EWC(weight="linear_schedule(3.0, 0.0, 6)", run=str(workdir), source="questions", batches=1),
        Distillation(name="say", weight=0.7, teacher=str(workdir), temperature=2.0),
        Distillation(name="see", weight=0.3, teacher=str(workdir), of="hidden"),
    )
    prepared, plan, batch, state, references = setup(bert, data, tmp_path, weighting=weighting, regularisers=held)
    state = moved(state)._replace(step=jnp.int32(2))
    teacher, tasks = runs.open_run(workdir), prepared.corpus.tasks

    def written_out(params):
        def model(params, module):
            encoded = encode_tokens(module, ("tokens", "pooled"))(params["trunk"], batch, None, None)
            return encoded.tokens, apply_heads(tasks, params["heads"], encoded, batch, None)

        (own_seen, own), (seen, said) = model(params, prepared.trunk.module), model(teacher.params, teacher.trunk.module)
        leaves, start = leaves_of(params), leaves_of(prepared.params)
        trunk = [path for path in leaves if path.startswith("trunk/")]
        l2 = 0.05 * sum(((leaves[path] - start[path]) ** 2).sum() for path in trunk)
        l2 += 0.005 * sum((leaves[path] ** 2).sum() for path in leaves if path not in trunk)
        anchor, fisher = leaves_of(teacher.params), references["ewc-fisher"]
        ewc = 0.5 * sum((fisher[path] * (leaves[path] - anchor[path]) ** 2).sum() for path in trunk)
        real = batch.segments > 0
        hidden = (((own_seen - seen) ** 2).mean(axis=-1) * real).sum() / real.sum()
        distilled = 0.0
        for task in tasks:
            there = (batch.index >= 0) & (batch.source == ("ratings", "questions").index(task.source))[:, None]
            kind = "number" if task.name == "rating" else "softmax"
            distilled += (transfer.distill(own[task.name], said[task.name], 2.0, kind) * there).sum() / there.sum()
        losses = {"l2sp": l2, "ewc": ewc, "say": distilled, "see": hidden}
        return 2.0 * l2 + 2.0 * ewc + 0.7 * distilled + 0.3 * hidden, losses

    (total, losses), expected = jax.jit(jax.value_and_grad(written_out, has_aux=True))(state.params)
    frozen = jax.tree.map(lambda _: None, state.params)
    found = jax.jit(measure(prepared, plan))(state.params, frozen, batch, None, state, references)
    alone = jax.jit(measure(prepared, plan._replace(held=())))(state.params, frozen, batch, None, state, None)
    for name, loss in losses.items():
        np.testing.assert_allclose(found.held[name], loss, rtol=1e-4, err_msg=name)
    sums = [found.held_weights[name] * loss for name, loss in found.held.items()]
    np.testing.assert_allclose(sum(sums), total, rtol=1e-4)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    jax.tree.map(
        lambda both, own, held: np.testing.assert_allclose(both - own, held, atol=1e-4 * scale),
        found.gradient,
        alone.gradient,
        expected,
    )
    jax.tree.map(np.testing.assert_array_equal, found.weights, alone.weights)


def program(prepared, plan, batch, state, references=None):
    step = make_train_step(measure(prepared, plan), plan.optimizer, plan.mask)
    return str(jax.make_jaxpr(step)(state, batch, None, references))


def test_a_weight_of_0_is_the_run_without(bert, data, tmp_path):
    """To the last instruction of the program. What never counts is not even opened."""
    nothing = (
        L2SP(weight=0.0),
        EWC(weight="constant_schedule(0.0)", run="nowhere", source="x"),
        Distillation(weight="0", teacher="nowhere"),
        RDrop(weight="linear_schedule(0.0, 0.0, 4)"),
    )
    prepared, plan, batch, state, references = setup(bert, data, tmp_path, regularisers=nothing, mixout=Mixout(0.0))
    assert references is None
    assert not (tmp_path / "reference").exists()
    without, plan_without, *_ = setup(bert, data, tmp_path)
    assert program(prepared, plan, batch, state) == program(without, plan_without, batch, state)
    held, plan_held, *_, start = setup(bert, data, tmp_path, regularisers=(L2SP(),))
    assert program(held, plan_held, batch, state, start) != program(without, plan_without, batch, state)


def test_all_of_them_train_and_a_stopped_run_goes_on_to_the_same_bits(bert, data, workdir, tmp_path, monkeypatch):
    """Two phases: the first on one source, whose Fisher information is taken as the second begins. Dropout is on."""
    phases = (
        Phase("source", 2, weights={"rating": 0.0, "coarse": 1.0, "fine": 1.0}),
        Phase("target", 4, weights={"rating": 1.0, "coarse": 0.0, "fine": 0.0}),
    )
    experiment = tiny.experiment(
        bert,
        data,
        phases=phases,
        evaluation=mtl_jax.Evaluation(every=6, baseline="none", criterion="rating"),
        regularisers=(
            L2SP(weight="dann_schedule(1.0, 0.0, 6)"),
            EWC(source="questions", phase="target", batches=2),
            Distillation(teacher=str(workdir), tasks=("fine",), temperature=2.0),
            RDrop(weight=0.5),
        ),
        mixout=Mixout(0.5),
    )

    def last(folder):
        store = Store(folder, experiment.checkpoints, read_only=True)
        params = store.restore_params(6)
        store.close()
        return [leaf.tobytes() for leaf in jax.tree.leaves(params)]

    mtl_jax.train(experiment, tmp_path / "whole")
    records = [record for record in read_metrics(tmp_path / "whole") if record["kind"] == "train"]
    for name, first in {"l2sp": 0, "ewc": 2, "distillation": 0, "r_drop": 0}.items():
        assert [f"loss/{name}" in record for record in records] == [n >= first for n in range(6)]
        assert records[-1][f"loss/{name}"] > 0
    names = ("rating", "coarse", "fine", "l2sp", "ewc", "distillation", "r_drop")
    total = sum(records[-1][f"weight/{name}"] * records[-1][f"loss/{name}"] for name in names)
    np.testing.assert_allclose(records[-1]["total"], total, rtol=1e-5)
    assert records[-1]["examples/fine"] > 0  # of weight 0, and looked at by the distillation
    assert records[-1]["examples/coarse"] == 0

    monkeypatch.setattr(loop.Stop, "requested", lambda stop, step: step == 5)
    with pytest.raises(mtl_jax.Interrupted):
        mtl_jax.train(experiment, tmp_path / "stopped")
    monkeypatch.undo()
    fisher = tmp_path / "stopped" / "reference" / "ewc-fisher.safetensors"
    before = fisher.read_bytes()
    mtl_jax.train(experiment, tmp_path / "stopped")
    assert fisher.read_bytes() == before
    assert last(tmp_path / "stopped") == last(tmp_path / "whole")
