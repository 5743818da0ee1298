"""Regularisers in a run: gradients beside hand-written ones, one training with all of them, what is refused."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import two_sources

import mtl_jax
from mtl_jax import EWC, L2SP, Distillation, Mixout, Multilabel, Ordinal, Phase, RDrop, Regression, transfer, trunks
from mtl_jax.core.errors import UserError
from mtl_jax.core.trees import leaves_of
from mtl_jax.data.batches import Batch
from mtl_jax.data.stream import single_phase, stream
from mtl_jax.experiment import select
from mtl_jax.models.layers import Head
from mtl_jax.models.trunk_output import Encoded
from mtl_jax.training import loop, restore, sharding
from mtl_jax.training import mesh as meshes
from mtl_jax.training.build_step import gradient_fn, jitted_step
from mtl_jax.training.checkpoint_store import Store
from mtl_jax.training.forward import apply_heads, encode_tokens
from mtl_jax.training.gradient import StepGradients
from mtl_jax.training.metrics_log import read_metrics
from mtl_jax.training.phase_state import initial_state
from mtl_jax.training.references import References
from mtl_jax.training.regularisation import fisher, output_losses, teachers, transforms
from mtl_jax.training.regularisation import prepare as regularised
from mtl_jax.training.setup import prepare
from mtl_jax.training.step import make_train_step
from mtl_jax.training.train_state import StepInputs, create

ALL = (Phase("all", 4),)
TRUNK = mtl_jax.Embedding(dimension=4)


@pytest.fixture(scope="module")
def taught(bert, data, tmp_path_factory):
    """A finished run on the same texts: a teacher."""
    folder = tmp_path_factory.mktemp("taught") / "run"
    evaluation = mtl_jax.Evaluation(every=9, baseline="none")
    mtl_jax.train(tiny.experiment(bert, data, trunk=TRUNK, phases=ALL, evaluation=evaluation), folder)
    return folder


def with_dropout(rate):
    return tuple(dataclasses.replace(task, dropout=rate) for task in tiny.experiment("", "").tasks)


def setup(bert, data, folder, **changes):
    """Without dropout by default: the run, its first phase, a batch, the state, the references."""
    values = {"phases": ALL, "tasks": with_dropout(0.0), "trunk": TRUNK} | changes
    prepared = prepare(tiny.experiment(bert, data, **values))
    batches = stream(prepared.corpus, prepared.experiment.batch, 0, single_phase(prepared.experiment.batch, 100))
    batch = jax.tree.map(jnp.asarray, next(batches))
    batches.close()
    state = initial_state(prepared)
    return prepared, prepared.plans[0], batch, state, References(prepared, folder).for_phase(prepared.plans[0], state, True)


def moved(state):
    return state._replace(params=jax.tree.map(lambda leaf: leaf * 1.1 + 0.01, state.params))


NOTHING = {"weighting": "fixed", "weights": {"rating": 0.0, "coarse": 0.0, "fine": 0.0}}


@pytest.mark.parametrize("rule", [NOTHING, pytest.param({"weighting": "pcgrad"}, marks=pytest.mark.long)], ids=["0", "pcgrad"])
def test_gradients_are_added_to_those_of_the_tasks(bert, data, taught, tmp_path, rule):
    """They are what jax.grad gives of the losses written out, beside tasks of weight 0 and under a rule of task gradients."""
    held = (
        L2SP(weight=2.0),
        EWC(weight="linear_schedule(3.0, 0.0, 6)", run=str(taught), source="questions", batches=1),
        Distillation(name="say", weight=0.7, teacher=str(taught), temperature=2.0),
        Distillation(name="see", weight=0.3, teacher=str(taught), of="hidden"),
    )
    prepared, plan, batch, state, references = setup(bert, data, tmp_path, **rule, regularisers=held)
    state = moved(state)._replace(step=jnp.int32(2))
    teacher, tasks = restore.open_run(taught), prepared.corpus.tasks

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
    shapes = References(prepared, tmp_path).shapes(plan)  # for plans, which make no references
    assert shapes == jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), references)
    frozen = jax.tree.map(lambda _: None, state.params)
    found = jax.jit(gradient_fn(prepared, plan))(state.params, frozen, StepInputs(batch, None, references), state)
    gradient = found.gradient
    if rule is not NOTHING:
        alone = jax.jit(gradient_fn(prepared, plan._replace(regularisers=())))(state.params, frozen, StepInputs(batch), state)
        gradient = jax.tree.map(jnp.subtract, gradient, alone.gradient)
        jax.tree.map(np.testing.assert_array_equal, {task: found.weights[task] for task in alone.weights}, alone.weights)
    for name, loss in losses.items():
        np.testing.assert_allclose(found.losses[name], loss, rtol=1e-4, err_msg=name)
    sums = [found.weights[name] * found.losses[name] for name in losses]
    np.testing.assert_allclose(sum(sums), total, rtol=1e-4)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda own, other: np.testing.assert_allclose(own, other, atol=1e-4 * scale), gradient, expected)


def program(prepared, plan, batch, state, references=None):
    step = make_train_step(gradient_fn(prepared, plan), plan.optimizer, plan.mask)
    return str(jax.make_jaxpr(step)(state, StepInputs(batch, None, references)))


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


@pytest.mark.parametrize(("weighting", "accumulate"), [("equal", 2), ("pcgrad", 1), ("graddrop", 2)])
def test_they_go_with_every_kind_of_rule(bert, data, tmp_path, weighting, accumulate):
    """By the shapes alone: what a step takes it gives back."""
    batch = dataclasses.replace(tiny.experiment(bert, data).batch, accumulate=accumulate)
    held = (L2SP(), EWC(source="ratings", batches=1), RDrop(weight=0.5))
    changes = {
        "weighting": weighting,
        "batch": batch,
        "trunk": mtl_jax.Embedding(dimension=4),
        "mixout": Mixout(0.5, "trunk/.*"),
    }
    tasks = tuple(dataclasses.replace(task, dropout=0.1) for task in tiny.experiment(bert, data).tasks)
    prepared, plan, rows, state, references = setup(bert, data, tmp_path, **changes, tasks=tasks, regularisers=held)
    step = make_train_step(gradient_fn(prepared, plan), plan.optimizer, plan.mask, 2)
    after, metrics = jax.eval_shape(step, state, StepInputs(rows, None, references))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    assert set(metrics.losses) == set(metrics.weights) == {"rating", "coarse", "fine", "l2sp", "ewc", "r_drop"}
    assert set(metrics.counts) == {"rating", "coarse", "fine"}


def test_all_of_them_train_and_a_stopped_run_goes_on_to_the_same_bits(bert, data, taught, tmp_path, monkeypatch):
    """Two phases: the first on one source, whose Fisher information is taken as the second begins. Dropout is on."""
    phases = (
        Phase("source", 2, weights={"rating": 0.0, "coarse": 1.0, "fine": 1.0}),
        Phase("target", 4, weights={"rating": 1.0, "coarse": 0.0, "fine": 0.0}),
    )
    experiment = tiny.experiment(
        bert,
        data,
        trunk=TRUNK,
        tasks=with_dropout(0.1),
        phases=phases,
        evaluation=mtl_jax.Evaluation(every=6, baseline="none", criterion="rating"),
        regularisers=(
            L2SP(weight="dann_schedule(1.0, 0.0, 6)"),
            EWC(source="questions", phase="target", batches=2),
            Distillation(teacher=str(taught), tasks=("fine",), temperature=2.0),
            RDrop(weight=0.5),
        ),
        mixout=Mixout(0.5, "trunk/.*"),
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


def test_vectors_of_a_checkpoint_are_seen_through_a_projection(bert, data, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "HIDDEN", 8)
    tiny.write_bert(tmp_path / "narrow", layers=1)
    see = Distillation(name="see", teacher=str(tmp_path / "narrow"), of="hidden")
    trunk = mtl_jax.Pretrained(str(bert))
    prepared, _, batch, _, references = setup(bert, data, tmp_path, trunk=trunk, regularisers=(see,))
    teacher, heads = prepared.teachers["see"], prepared.params["heads"]
    assert heads["see"]["projection"]["kernel"].shape == (16, 8)
    own = np.random.default_rng(0).normal(size=(*batch.tokens.shape, 16)).astype(np.float32)
    context = output_losses.LossContext(places={}, first_ids={}, teachers={"see": teacher}, phase="")
    each = output_losses.of_teacher(see, prepared.corpus.tasks, context)
    found = jax.jit(lambda own: each.loss(heads, Encoded(tokens=own), {}, batch, each.count(batch), references))(own)
    there = np.asarray(jax.jit(teacher.hidden)(teacher.params, batch))
    difference = (own @ heads["see"]["projection"]["kernel"] - there) ** 2
    np.testing.assert_allclose(found, difference.mean(axis=-1)[np.asarray(batch.segments) > 0].mean(), rtol=1e-4)


def test_a_token_classifier_teaches_a_tagger(bert, tmp_path):
    """Packed rows are read as every text by itself."""
    checkpoint = mtl_jax.pretrained.load(str(bert), head="token_classification", labels=["A", "B", "C"])
    mtl_jax.pretrained.save(tmp_path / "tagger", checkpoint)
    trunk = trunks.build(mtl_jax.Pretrained(str(bert)), (), np.float32)
    kind = Distillation(teacher=str(tmp_path / "tagger"), tasks=("tags",))
    tasks = {"tags": mtl_jax.Tagging(name="tags", source="s", labels=("A", "B", "C"))}
    teacher = teachers.open_teacher(kind, trunk, tasks, 24, ["good film ?"], np.float32)
    assert teachers.tasks_to_imitate(kind, teacher, tasks) == ["tags"]
    tokens, segments = np.array([[2, 5, 6, 3, 2, 7, 3, 0]]), np.array([[1, 1, 1, 1, 2, 2, 2, 0]])
    batch = Batch(tokens, segments, np.array([[0, 1, 2, 3, 0, 1, 2, 0]]), None, None, {})
    found = teacher.outputs(teacher.params, batch, ["tags"])["tags"]
    for n in (1, 2):
        alone = jax.jit(checkpoint.model.apply)({"params": checkpoint.params}, tokens[segments == n][None]).logits
        np.testing.assert_allclose(found[segments == n], alone[0], atol=1e-5)
    with pytest.raises(UserError, match="another label set for 'tags': A, B, C, and this run has A, B"):
        teachers.tasks_to_imitate(kind, teacher, {"tags": dataclasses.replace(tasks["tags"], labels=("A", "B"))})
    with pytest.raises(UserError, match="can be imitated only where it is a token classifier and tasks names"):
        teachers.open_teacher(dataclasses.replace(kind, tasks=()), trunk, tasks, 24, [], np.float32)
    with pytest.raises(UserError, match=r"takes rows of 32 tokens, but batch\.row_length is 64"):
        teachers.open_teacher(kind, trunk, tasks, 64, [], np.float32)


def test_tasks_that_are_left_out_are_looked_at_no_more():
    held = (RDrop(tasks=("rating", "fine")), Distillation(teacher="x"), RDrop(name="off", tasks=("fine",), weight=0.0))
    chosen = select(tiny.experiment("", "", regularisers=held, only=("rating",)))
    assert chosen.regularisers == (RDrop(tasks=("rating",)), Distillation(teacher="x"))
    assert select(tiny.experiment("", "", regularisers=held)).regularisers == held


def test_where_nothing_that_is_held_trains_there_is_nothing_to_keep(bert, data, tmp_path):
    phases = (Phase("heads", 2, rules=tiny.HEADS_ONLY),)
    _, plan, _, _, references = setup(bert, data, tmp_path, regularisers=(L2SP(beta=0.0),), phases=phases)
    assert references == {"start-heads": {}}
    assert plan.cached_features


def test_what_was_held_is_missed_and_compared(bert, data, tmp_path):
    prepared, plan, _, state, _ = setup(bert, data, tmp_path, regularisers=(L2SP(),))
    file = tmp_path / "reference" / "start-all.safetensors"
    references = References(prepared, tmp_path)
    references.digests["start-all"] = "another"
    with pytest.raises(UserError, match=r"start-all.safetensors has changed since this run began; put it back"):
        references.for_phase(plan, state, False)
    file.unlink()
    with pytest.raises(UserError, match=r"start-all.safetensors is missing, and a regulariser of this run needs it"):
        references.for_phase(plan, state, False)


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.long)])
def test_one_and_two_devices_agree(bert, data, taught, tmp_path, accumulate, monkeypatch):
    """Dropout is on: its bits do not depend on where a row lies, nor does what a row is compared with.

    The state and the teacher are cut over the two devices.
    """
    monkeypatch.setattr(sharding, "SMALLEST", 64)
    held = (
        RDrop(weight=0.5),
        Distillation(name="say", teacher=str(taught), temperature=2.0),
        Distillation(name="see", teacher=str(taught), of="hidden"),
    )
    batching = dataclasses.replace(tiny.experiment(bert, data).batch, accumulate=accumulate)
    changes = {"tasks": with_dropout(0.3), "regularisers": held, "batch": batching}
    found = []
    for devices in (1, 2):
        prepared, plan, batch, state, references = setup(bert, data, tmp_path, devices=devices, sharding="fsdp", **changes)
        step = jitted_step(prepared, plan)
        batch = meshes.place(jax.device_get(batch), meshes.by_rows(prepared.mesh))
        assert len(batch.tokens.devices()) == devices
        moved, first = step(state, StepInputs(batch, None, references))
        _, second = step(moved, StepInputs(batch, None, references))
        found.append([{"norm": each.gradient_norm, **each.losses} for each in (first, second)])
    assert set(found[0][1]) == {"norm", "rating", "coarse", "fine", "r_drop", "say", "see"}
    for one, two in zip(*found, strict=True):
        for name, loss in one.items():
            np.testing.assert_allclose(two[name], loss, rtol=2e-4, err_msg=name)
            assert loss > 0


def test_r_drop_compares_the_halves_of_a_batch_that_is_there_twice():
    """Of examples of the task's own source, labelled or not; tasks' counts are those of the batch as it is."""
    task = two_sources.TASKS[0]
    index, source = np.array([[0, -1], [1, 2]]), np.array([0, 1])
    batch = Batch(np.zeros((2, 3)), None, None, index, source, {"a": np.array([[-1, -1], [0, 1]])})
    doubled = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), batch)
    outputs = np.random.default_rng(0).normal(size=(4, 2, 2)).astype(np.float32)
    context = output_losses.LossContext(places={"first": 0, "second": 1}, first_ids={}, teachers={}, phase="")
    each = output_losses.of_r_drop(RDrop(), [task], context)
    found = each.loss({}, Encoded(), {"a": outputs}, doubled, each.count(doubled), None)
    np.testing.assert_allclose(found, transfer.r_drop(outputs[0, 0], outputs[2, 0]), rtol=1e-5)

    def counted(trained, frozen, inputs, state):
        return StepGradients(trained, {}, {"a": jnp.float32(len(inputs.batch.index))}, {}, ())

    assert transforms.every_row_twice(counted)({}, {}, StepInputs(batch), None).counts == {"a": 2}


def test_mixout_is_around_the_gradient_function():
    """The function sees mixed parameters; its gradient comes back through the mixing; a frozen leaf is left alone."""
    trained = {"trunk": {"kernel": jnp.full(1000, 2.0), "bias": None}, "heads": {"a": jnp.ones(2)}}
    state = create({}, (), (), 0)

    def three_times(trained, frozen, inputs, state):
        return StepGradients(jax.tree.map(lambda leaf: 3.0 * leaf, trained), {}, {}, {}, ())

    mixed = transforms.at_mixed_parameters(three_times, p=0.75, paths=("trunk/kernel",), start="start-all")
    inputs = StepInputs(None, None, {"start-all": {"trunk/kernel": jnp.zeros(1000)}})
    found = mixed(trained, {}, inputs, state).gradient
    own = np.asarray(found["trunk"]["kernel"]) != 0
    np.testing.assert_allclose(found["trunk"]["kernel"], np.where(own, 3.0 * 8.0 * 4.0, 0.0))
    assert 0.2 < own.mean() < 0.3
    np.testing.assert_array_equal(found["heads"]["a"], 3.0)
    again = mixed(trained, {}, inputs, state._replace(step=jnp.int32(1)))
    assert (np.asarray(again.gradient["trunk"]["kernel"] != 0) != own).any()


@pytest.mark.parametrize("labels", ["data", "model"])
def test_fisher_is_the_mean_of_squared_gradients_example_by_example(bert, data, labels):
    prepared = prepare(tiny.experiment(bert, data, trunk=TRUNK, only=("rating", "fine"), phases=ALL))
    tasks, train = prepared.corpus.tasks, prepared.corpus.splits["train"]
    kind = EWC(source="questions", labels=labels, batches=2)
    path, params, fine = "trunk/word/embedding", prepared.params, tasks[1]
    labels_N = train["questions"].labels["fine"].copy()
    labels_N[::3] = fine.missing  # such rows do not count with the data's labels; the model has labels for all
    examples = train["questions"]._replace(labels={"fine": labels_N})
    arguments = (kind, prepared.trunk.module, params, [fine], examples, prepared.experiment.batch, [path], 3, 1)
    found = fisher.diagonal(*arguments)
    np.testing.assert_array_equal(fisher.diagonal(*arguments)[path], found[path])
    assert found[path].shape == params["trunk"]["word"]["embedding"].shape
    if labels == "model":
        assert (found[path] > 0).any()
        return
    chosen = np.random.default_rng([3, 7]).permutation(len(train["questions"].tokens))[:16]
    chosen = chosen[labels_N[chosen] != fine.missing]
    assert 0 < len(chosen) < 16
    total = np.zeros_like(found[path])

    @jax.jit
    def loss(table, ids, there, label):
        vector = (table[ids] * there[:, None]).sum(axis=0) / there.sum()
        output = Head(fine.outputs, fine.hidden).apply({"params": params["heads"]["fine"]}, vector)
        return -jax.nn.log_softmax(output)[label]

    gradient = jax.jit(jax.grad(loss))
    for n in chosen:
        ids = np.zeros(24, np.int32)
        ids[: len(train["questions"].tokens[n])] = train["questions"].tokens[n]
        there = (np.arange(24) < len(train["questions"].tokens[n])).astype(np.float32)
        total += gradient(params["trunk"]["word"]["embedding"], ids, there, train["questions"].labels["fine"][n]) ** 2
    np.testing.assert_allclose(found[path], total / len(chosen), rtol=1e-3, atol=1e-7)


def test_labels_are_drawn_as_the_model_says():
    key, batch = jax.random.key(0), Batch(None, None, None, np.zeros((5000, 1), int), None, {})
    missing = np.full((5000, 1), -1, np.int32)
    drawn = fisher.draw(two_sources.TASKS[0], np.tile([0.0, np.log(3.0)], (5000, 1, 1)), missing, batch, key)
    np.testing.assert_allclose(drawn.mean(), 0.75, atol=0.03)
    unknown = np.full((5000, 1), np.nan, np.float32)
    numbers = fisher.draw(Regression(name="b", source="x", scale=2.0), np.ones((5000, 1, 1)), unknown, batch, key)
    np.testing.assert_allclose([numbers.mean(), numbers.std()], [2.0, 2.0 * 0.5**0.5], atol=0.06)
    decisions = Multilabel(name="m", source="x", labels=("x", "y"))
    some = fisher.draw(decisions, np.tile([0.0, 9.0], (5000, 1, 1)), np.full((5000, 1, 2), -1, np.int32), batch, key)
    np.testing.assert_allclose(some.mean(axis=(0, 1)), [0.5, 1.0], atol=0.03)
    stars = Ordinal(name="o", source="x", labels=("1", "2", "3", "4"))
    above = np.tile([9.0, 0.0, 0.0], (5000, 1, 1))  # surely above 1; above 2 and above 3 by halves, which is the same event
    ranks = fisher.draw(stars, above, missing, batch, key)
    np.testing.assert_allclose([(ranks == rank).mean() for rank in range(4)], [0.0, 0.5, 0.0, 0.5], atol=0.03)
    with pytest.raises(UserError, match=r"drawn from the model of shape \(5000, 1, 3\); set labels to data"):
        fisher.draw(stars, above, missing[..., None], batch, key)
    empty = batch._replace(index=np.full((5000, 1), -1))
    assert (fisher.draw(two_sources.TASKS[0], np.zeros((5000, 1, 2)), missing, empty, key) == -1).all()


def test_a_run_with_another_trunk_is_refused():
    own, other = {"trunk/word": np.zeros((20, 16)), "trunk/b": np.zeros(2)}, {"trunk/word": np.zeros((20, 8))}
    with pytest.raises(UserError, match=r"trunk/word is of shape \(20, 8\) in runs/x and of shape \(20, 16\) here"):
        regularised.check_shapes(EWC(run="runs/x"), ["trunk/word"], own, other)
    with pytest.raises(UserError, match=r"run of ewc: trunk/b is absent in runs/x"):
        regularised.check_shapes(EWC(run="runs/x"), ["trunk/b"], own, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"regularisers": (L2SP(weight=-1.0),)}, "regularisers: l2sp is -1.0 at step 0; it must be finite and not negative"),
        ({"regularisers": (L2SP(weight="linear_schedule(1, -1, 4)"),)}, "regularisers: the schedule of l2sp is -0.5 at step 3"),
        ({"regularisers": (L2SP(weight="x"),)}, "regularisers: l2sp is 'x'; write a number or a schedule"),
        ({"regularisers": (L2SP(alpha=-1.0),)}, "regularisers: alpha of l2sp is -1.0"),
        ({"regularisers": (L2SP(), L2SP())}, "'l2sp' is also the name of another one"),
        ({"regularisers": (L2SP(name="fine"),)}, "'fine' is also the name of a task"),
        ({"regularisers": (L2SP(phase="second"),)}, "unknown phase of l2sp: 'second'.*choices: all"),
        (
            {"regularisers": (L2SP(shared="trunk/laier.*"),)},
            "shared of l2sp, 'trunk/laier.*', matches no parameter; paths look like",
        ),
        ({"regularisers": (EWC(parameters="("),)}, "parameters of ewc is not a regular expression"),
        ({"regularisers": (EWC(),)}, "ewc needs a source"),
        ({"regularisers": (EWC(source="films"),)}, "unknown source of ewc: 'films'; choices: ratings, questions"),
        (
            {"regularisers": (EWC(source="films", run="WORKDIR"),)},
            "the run in .* has the sources questions, ratings, not 'films'",
        ),
        ({"regularisers": (EWC(source="ratings", run="UNFINISHED"),)}, "run of ewc: the run in .* is not finished"),
        ({"regularisers": (Distillation(),)}, "distillation needs a teacher"),
        ({"regularisers": (Distillation(teacher="UNFINISHED"),)}, "teacher of distillation: the run in .* is not finished"),
        ({"regularisers": (Distillation(teacher="nowhere"),)}, "teacher of distillation: nowhere is not the workdir of a run"),
        ({"regularisers": (Distillation(teacher="WORKDIR", tasks=("x",)),)}, "unknown task of distillation: 'x'"),
        (
            {"regularisers": (Distillation(teacher="OTHER_LABELS"),)},
            "has another label set for 'coarse': A, B, and this run has HUM, LOC",
        ),
        ({"regularisers": (Distillation(teacher="OTHER_WORDS"),)}, "has another vocabulary than this run's trunk"),
        ({"regularisers": (Distillation(teacher="WORKDIR", temperature=0.0),)}, "temperature of distillation is 0.0"),
        ({"regularisers": (Distillation(teacher="WORKDIR", of="attention"),)}, "unknown of of distillation"),
        ({"regularisers": (RDrop(),)}, "compares two passes that differ by dropout, but there is no dropout"),
        (
            {"regularisers": (RDrop(tasks=("fine",)),), "only": ("rating", "coarse")},
            "regularisers: r_drop is of fine, which only leaves out; name it there, or set the weight of r_drop to 0",
        ),
        ({"mixout": Mixout(1.0)}, "mixout.p is 1.0; it must be at least 0 and below 1"),
        ({"mixout": Mixout(0.5, "kernel")}, "mixout.parameters, 'kernel', matches no parameter"),
    ],
)
def test_what_is_refused_before_training(bert, data, taught, tmp_path, changes, message):
    def copied(change):
        folder = tmp_path / "copy"
        shutil.copytree(taught, folder)
        change(folder)
        return str(folder)

    def other_labels(folder):
        found = json.loads((folder / "data.json").read_text())
        found["tasks"]["coarse"]["labels"] = ["A", "B"]
        (folder / "data.json").write_text(json.dumps(found))

    def other_words(folder):
        file = folder / "trunk" / "tokenizer.json"
        file.write_text(file.read_text().replace('"city"', '"town"'))

    made = {
        "WORKDIR": lambda: str(taught),
        "UNFINISHED": lambda: copied(lambda folder: (folder / "results.json").unlink()),
        "OTHER_LABELS": lambda: copied(other_labels),
        "OTHER_WORDS": lambda: copied(other_words),
    }
    held = []
    for each in changes.get("regularisers", ()):
        for field in ("run", "teacher"):
            if getattr(each, field, "") in made:
                each = dataclasses.replace(each, **{field: made[getattr(each, field)]()})
        held.append(each)
    with pytest.raises(UserError, match=message):
        setup(bert, data, tmp_path, **changes | ({"regularisers": tuple(held)} if held else {}))
