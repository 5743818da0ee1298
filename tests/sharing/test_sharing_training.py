"""Sharings in training: on several devices, under rules over the Gram matrix, exported, in config.json, as an ablation."""

import dataclasses
import json

import finished_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import mtl_jax
from mtl_jax import Evaluation, Lora, ParamRule, Phase, RDrop, adapters_only, pretrained, sharing, weighting
from mtl_jax.ablation import plan as plans
from mtl_jax.ablation import space
from mtl_jax.core import trees
from mtl_jax.core.errors import UserError
from mtl_jax.data.stream import single_phase, stream
from mtl_jax.inference.predict import open_run
from mtl_jax.training import initial_parameters, phase_state, setup
from mtl_jax.training import mesh as meshes
from mtl_jax.training.build_step import jitted_step
from mtl_jax.training.experiment_json import from_json, to_json
from mtl_jax.training.forward import apply_heads, encode_tokens, label_counts, mean_losses
from mtl_jax.training.train_state import StepInputs
from mtl_jax.transfer.adapters import ADAPTERS, as_module, is_own

TASK_LORA = sharing.TaskAdapters(adapter=Lora(name="task", rank=2))
ALL = Phase("all", steps=4)


def experiment(bert, data, part, **changes):
    """Dropout off; every parameter trains, for four steps."""
    tasks = tuple(dataclasses.replace(task, dropout=0.0) for task in tiny.experiment(bert, data).tasks)
    values = {"trunk": mtl_jax.Pretrained(str(bert), dropout=0.0), "tasks": tasks, "phases": (ALL,), "sharing": part}
    return tiny.experiment(bert, data, **(values | changes))


def step_of(prepared):
    """The state and metrics after one step from parameters of the sharing that do something; and its batch."""
    added = finished_runs.moved(jax.device_get(prepared.params["trunk"][ADAPTERS]), size=0.1)
    prepared = prepared._replace(params=prepared.params | {"trunk": prepared.params["trunk"] | {ADAPTERS: added}})
    batches = stream(prepared.corpus, prepared.experiment.batch, 0, single_phase(prepared.experiment.batch, 10))
    batch = next(batches)
    batches.close()
    inputs = StepInputs(meshes.assemble(batch, meshes.by_rows(prepared.mesh)))
    state, metrics = jitted_step(prepared, prepared.plans[0])(phase_state.initial_state(prepared), inputs)
    return jax.device_get((state.params, metrics)), batch, prepared


def one_step(bert, data, part, rule, devices):
    return step_of(setup.prepare(experiment(bert, data, part, weighting=rule, devices=devices)))


def test_the_gram_matrix_is_over_what_tasks_share(bert, data):
    """Of the tasks' gradients, one backward pass for each."""
    (_, metrics), batch, prepared = one_step(bert, data, sharing.MMoE(experts=2, width=2), "upgrad", 1)
    expected = gram_by_hand(task_gradients(prepared, batch))
    np.testing.assert_allclose(metrics.gram, expected, rtol=2e-3, atol=1e-4 * expected.max())


@pytest.mark.parametrize("per", ["source", pytest.param("task", marks=pytest.mark.long)])
def test_the_gram_matrix_is_not_over_adapters_of_single_tasks(bert, data, per):
    """Two tasks share a source, and so the adapter of this source; the third has a source and its adapter alone."""
    adapters = (Lora(name="lora", rank=2, per=per),)
    prepared = setup.prepare(experiment(bert, data, sharing.Hard(), weighting="upgrad", adapters=adapters, devices=1))
    (_, metrics), batch, prepared = step_of(prepared)
    of_source = [task.source for task in prepared.corpus.tasks]
    alone = [of_source.count(source) == 1 for source in prepared.corpus.splits["train"]]
    assert sorted(alone) == [False, True]

    def shared(path, row):
        if not path.startswith("adapters/lora/"):
            return np.ravel(row)
        return 0 * np.ravel(row) if per == "task" else np.reshape(row, (2, -1)) * (1 - np.array(alone))[:, None]

    gradients = task_gradients(prepared, batch)
    expected = gram_by_hand(gradients, shared)
    assert not np.allclose(expected, gram_by_hand(gradients), rtol=5e-3)
    np.testing.assert_allclose(metrics.gram, expected, rtol=2e-3, atol=1e-4 * expected.max())


@pytest.mark.parametrize(
    "rule",
    ["trimmed_mean", *(pytest.param(rule, marks=pytest.mark.long) for rule in ("graddrop", "moco", "db_mtl", "excess_risk"))],
)
@pytest.mark.parametrize(
    ("part", "adapters"),
    [
        (sharing.TopLayers(own=1), ()),
        pytest.param(sharing.Hard(), (Lora(name="lora", rank=2, per="source"),), marks=pytest.mark.long),
    ],
)
def test_rules_that_change_gradients_leave_those_of_single_tasks_as_they_are(bert, data, rule, part, adapters):
    """A task's own parameters follow its own gradient times its weight."""
    plain = mtl_jax.Optimizer(name="sgd", learning_rate=1.0, warmup=0.0, clip_norm=0.0)
    moves, weights = {}, {}
    for name in ("equal", rule):
        changes = {"weighting": name, "optimizer": plain, "adapters": adapters, "devices": 1}
        prepared = setup.prepare(experiment(bert, data, part, **changes))
        (params, metrics), _, prepared = step_of(prepared)
        start = trees.flat(jax.device_get(prepared.params["trunk"]))
        moves[name] = {path: leaf - start[path] for path, leaf in trees.flat(params["trunk"]).items()}
        weights[name] = metrics.weights
    tasks = [task.name for task in prepared.corpus.tasks]
    seen = 0
    for path, move in moves[rule].items():
        plain_move = moves["equal"][path]
        if is_own(path):
            of_tasks = {task: (move.reshape(3, -1)[n], plain_move.reshape(3, -1)[n]) for n, task in enumerate(tasks)}
        elif path.startswith("adapters/lora/"):
            n = list(prepared.corpus.splits["train"]).index("ratings")
            of_tasks = {"rating": (move.reshape(2, -1)[n], plain_move.reshape(2, -1)[n])}
        else:
            continue
        for task, (changed, unchanged) in of_tasks.items():
            seen += np.abs(unchanged).max() > 1e-3
            expected = float(weights[rule][task]) * unchanged
            np.testing.assert_allclose(changed, expected, rtol=1e-2, atol=2e-4 * np.abs(expected).max() + 1e-7, err_msg=path)
    assert seen > 2


def weighing(**fields):
    """A rule whose weight of one task is negative in every step."""
    weights = {"coarse": jnp.float32(1), "fine": jnp.float32(1), "rating": jnp.float32(-1)}
    return weighting.Rule(init=lambda names: (), update=lambda state, signals: (weights, state), **fields)


@pytest.mark.parametrize(
    ("fields", "changes"),
    [
        ({}, {}),
        pytest.param({"needs_gram": True}, {"gram_over": "trunk/layer_0/.*"}, marks=pytest.mark.long),
        ({"needs_gram": True, "due": lambda state: jnp.zeros((), bool)}, {}),
        pytest.param({"needs_gram": True}, {}, marks=pytest.mark.long),
        pytest.param(
            {}, {"batch": mtl_jax.Batching(rows=8, row_length=24, examples_per_row=6, accumulate=2)}, marks=pytest.mark.long
        ),
    ],
    ids=["losses", "part", "not due", "trunk", "in parts"],
)
@pytest.mark.parametrize("per", ["task", "source"])
def test_a_negative_weight_leaves_what_its_task_has_alone(bert, data, fields, changes, per):
    """Its head, and its adapter or that of its source; the tasks of the other source share the adapter of that."""
    plain = mtl_jax.Optimizer(name="sgd", learning_rate=1.0, warmup=0.0, clip_norm=0.0)
    adapters = (Lora(name="lora", rank=2, per=per),)
    tasks = tuple(dataclasses.replace(task, dropout=0.0) for task in tiny.experiment(bert, data).tasks)
    values = {"tasks": tasks, "optimizer": plain, "adapters": adapters, "devices": 1, **changes}
    prepared = setup.prepare(experiment(bert, data, sharing.Hard(), weighting=weighing(**fields), **values))
    (params, _), _, prepared = step_of(prepared)
    start, moved = trees.flat(jax.device_get(prepared.params)), {}
    for path, leaf in trees.flat(params).items():
        change = np.abs(leaf - start[path])
        if path.startswith("trunk/adapters/"):
            owners = [task.name for task in tasks] if per == "task" else list(prepared.corpus.splits["train"])
            for owner, part in zip(owners, change.reshape(len(owners), -1), strict=True):
                moved[owner] = max(moved.get(owner, 0), part.max())
        elif path.startswith("heads/"):
            moved[path.split("/")[1]] = max(moved.get(path.split("/")[1], 0), change.max())
    assert {owner for owner, size in moved.items() if size == 0} == {"rating"} | ({"ratings"} if per == "source" else set())


@pytest.mark.long
@pytest.mark.parametrize(
    ("part", "rule"),
    [
        (sharing.MMoE(experts=2, width=2), "upgrad"),
        (sharing.TopLayers(own=1), "upgrad"),
        (TASK_LORA, "equal"),
        (sharing.CGC(shared=1, own=1, width=2), "graddrop"),
        (sharing.Sluice(), "equal"),
    ],
)
def test_two_devices_do_what_one_does(bert, data, part, rule):
    (params, metrics), _, prepared = one_step(bert, data, part, rule, 1)
    (others, other), _, _ = one_step(bert, data, part, rule, 2)
    for name in ("losses", "weights", "total", "gradient_norm", "gram"):
        np.testing.assert_allclose(*map(values_of, (getattr(metrics, name), getattr(other, name))), rtol=1e-3, err_msg=name)
    start = trees.flat(jax.device_get(prepared.params))
    for path, leaf in trees.flat(params).items():
        if path.endswith("key/bias"):  # no weight of an attention depends on it
            continue
        change, other_change = leaf - start[path], trees.flat(others)[path] - start[path]
        # The first step of Adam is the sign of the gradient: where that is 0 up to rounding, it may be any.
        assert (np.abs(change - other_change) > 1e-4).mean() < 0.05, path


def values_of(tree):
    return np.array(jax.tree.leaves(tree))


def task_gradients(prepared, batch):
    """{task: {path: gradient}} of the parameters outside of .../own/."""
    tasks, trunk = prepared.corpus.tasks, trees.flat(prepared.params["trunk"])
    batch = jax.tree.map(jnp.asarray, batch)
    own = {path: leaf for path, leaf in trunk.items() if is_own(path)}
    assert own or prepared.experiment.adapters

    def losses(common):
        encoded = encode_tokens(prepared.trunk.module)(trees.nested(common | own), batch, None, None)
        outputs = apply_heads(tasks, prepared.params["heads"], encoded, batch, None)
        return mean_losses(tasks, outputs, batch, label_counts(tasks, batch))

    return jax.jit(jax.jacrev(losses))({path: leaf for path, leaf in trunk.items() if path not in own})


def gram_by_hand(rows, chosen=lambda path, row: row):
    """The Gram matrix of task_gradients(); `chosen` makes of a leaf's gradient what it is over."""
    flat = [np.concatenate([np.ravel(chosen(*item)) for item in rows[task].items()]) for task in sorted(rows)]
    return np.array([[a @ b for b in flat] for a in flat])


@pytest.mark.long
@pytest.mark.parametrize("part", [TASK_LORA, sharing.TopLayers(own=1)])
def test_a_task_s_trunk_is_a_plain_checkpoint(bert, data, tmp_path, part):
    run = tmp_path / "run"
    finished_runs.write(run, experiment(bert, data, part))
    mtl_jax.convert(run, tmp_path / "out", task="fine")
    checkpoint, opened = pretrained.load(str(tmp_path / "out"), head=None), open_run(run)
    ids = jnp.array([[2, 5, 9, 13, 3]])
    module = as_module(opened.trunk.module, opened.source_index("fine"), "fine")
    np.testing.assert_allclose(
        checkpoint.model.apply({"params": checkpoint.params}, ids).hidden,
        module.apply({"params": opened.params["trunk"]}, ids).hidden,
        atol=1e-5,
    )
    with pytest.raises(UserError, match="each task has its own; say of which task"):
        mtl_jax.convert(run, tmp_path / "none")


KINDS = (
    TASK_LORA,
    sharing.MMoE(gates="task"),
    sharing.CGC(own=2),
    sharing.DSelectK(gamma=0.5),
    sharing.MtlLora(rank=2, temperature=0.7),
    sharing.HydraLora(parts=2),
    sharing.MoeLora(alpha=2.0),
    sharing.TopLayers(own=2),
    sharing.CrossStitch(stay=0.8),
    sharing.Sluice(layers=1),
    sharing.MMoELayers(experts=2),
    sharing.PLE(levels=1),
    sharing.HyperFormer(embedding=8),
    sharing.Pal(heads=2),
    sharing.AdapterFusion(runs=("a", "b"), adapter=Lora(name="x"), tasks=("", "t"), own=False),
)


def test_config_json_has_every_sharing():
    plain = tiny.experiment("bert", "data")
    assert "sharing" not in to_json(plain)
    for part in KINDS:
        declared = dataclasses.replace(plain, sharing=part, regularisers=(sharing.Subspaces(),))
        values = to_json(declared)
        assert values["sharing"]["kind"] == type(part).__name__
        assert from_json(values) == declared


def test_fields_and_rates_can_be_varied():
    """A size of the sharing, and the rate of what it adds, make a program; the run's rate is a number of one."""
    rules = (ParamRule("trunk/adapters/.*", rate=2.0), ParamRule(".*"))
    plain = dataclasses.replace(
        tiny.experiment("bert", "data"), sharing=sharing.MtlLora(), phases=(Phase("a", 2, rules=rules),)
    )

    def programs(*vary):
        return [len(program.runs) for program in plans.programs(plans.runs(plain, space.axes(plain, vary)))]

    assert programs("sharing.rank=2,4", "optimizer.learning-rate=1e-3,1e-2") == [2, 2]
    assert programs("phases.0.rules.0.rate=1,2") == [1, 1]


@pytest.mark.long
def test_an_ablation_is_its_runs(bert, data, tmp_path):
    plain = experiment(bert, data, TASK_LORA, evaluation=Evaluation(every=4, baseline="none"))
    mtl_jax.ablate(plain, tmp_path / "ablation", vary=("optimizer.learning-rate=1e-3,1e-2",))
    alone = mtl_jax.train(dataclasses.replace(plain, optimizer=mtl_jax.Optimizer(learning_rate=1e-2)), tmp_path / "alone")
    run = json.loads((tmp_path / "ablation" / "runs" / "0001" / "results.json").read_text())
    for task, scores in alone["tasks"].items():
        for metric, score in scores["test"].items():
            assert run["tasks"][task]["test"][metric] == pytest.approx(score, abs=1e-3), (task, metric)


def test_rules_over_gradients_are_equal_where_nothing_shared_trains(bert, data):
    """The Gram matrix of parameters of single tasks alone would be 0."""
    phase = dataclasses.replace(ALL, rules=adapters_only())
    (plan,) = setup.prepare(experiment(bert, data, TASK_LORA, weighting="upgrad", phases=(phase,)), abstract=True).plans
    assert not plan.rule.needs_gram
    part = sharing.MMoE(experts=2, width=2)
    (plan,) = setup.prepare(experiment(bert, data, part, weighting="upgrad", phases=(phase,)), abstract=True).plans
    assert plan.rule.needs_gram


def test_dropout_of_a_sharing_is_enough_for_r_drop(bert, data):
    part = sharing.TaskAdapters(adapter=Lora(name="task", dropout=0.1))
    setup.prepare(experiment(bert, data, part, regularisers=(RDrop(),)), abstract=True)
    with pytest.raises(UserError, match="there is no dropout"):
        setup.prepare(experiment(bert, data, TASK_LORA, regularisers=(RDrop(),)), abstract=True)


def test_subspaces_against_a_loop():
    rng = np.random.default_rng(0)
    at = f"trunk/{ADAPTERS}/sharing/layer_1/columns"
    maps = {f"{at}/{name}/kernel": rng.normal(size=(3, 5, 4)).astype(np.float32) for name in ("attention/output", "other")}
    maps[f"{at}/feed_forward_out/kernel"] = rng.normal(size=(3, 6, 4)).astype(np.float32)
    maps[f"{at}/feed_forward_out/bias"] = np.ones(12, np.float32)
    expected = 0.0
    for path, stack in maps.items():
        if path.endswith(("output/kernel", "feed_forward_out/kernel")):
            for kernel in stack:
                for column in range(2):
                    for other in range(2, 4):
                        expected += (kernel[:, column] @ kernel[:, other]) ** 2
    assert sharing.Subspaces().penalty(maps, {}) == pytest.approx(expected, rel=1e-5)
    assert sharing.Subspaces().penalty({}, {}) == 0
    with pytest.raises(UserError, match="parameters of subspaces is not a regular expression"):
        sharing.Subspaces(parameters="(").check()


def test_subspaces_need_columns(bert, data):
    with pytest.raises(UserError, match=r"parameters of subspaces, .* matches no parameter"):
        setup.prepare(experiment(bert, data, TASK_LORA, regularisers=(sharing.Subspaces(),)), abstract=True)
    prepared = setup.prepare(experiment(bert, data, sharing.Sluice(), regularisers=(sharing.Subspaces(),)), abstract=True)
    leaves = trees.flat(prepared.params)
    assert len(trees.matching(sharing.Subspaces().parameters, leaves)) == 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelPart(sharing.Sharing):
    """The first columns of a kernel, as a sharing of one's own that begins from the trunk's."""

    columns: int = 2
    kept: int = 2

    def where(self, layers):
        return self.matching(layers, ".*/feed_forward_out")

    def init(self, key, layer):
        return {"columns": jnp.zeros((layer.inputs, self.columns))}

    def around(self, params, call):
        return call()

    def loaded(self, params, trunk, runs):
        assert not runs
        kernel = trunk["layer_0"]["feed_forward_out"]["kernel"]
        return {"layer_0": {"feed_forward_out": {"columns": kernel[:, : self.kept]}}}


def test_a_sharing_of_ones_own_begins_from_the_trunk(bert, data):
    prepared = setup.prepare(experiment(bert, data, KernelPart()))
    loaded = initial_parameters.load(prepared)
    trunk = loaded.prepared.params["trunk"]
    columns = trunk[ADAPTERS]["sharing"]["layer_0"]["feed_forward_out"]["columns"]
    np.testing.assert_array_equal(columns, trunk["layer_0"]["feed_forward_out"]["kernel"][:, :2])
    assert loaded.records == {"sharing.json": {"kind": "KernelPart", "runs": {}}}
    prepared = prepared._replace(experiment=dataclasses.replace(prepared.experiment, sharing=KernelPart(kept=3)))
    with pytest.raises(UserError, match=r"loaded\(\) of KernelPart must keep shapes.*from \(32, 2\) to \(32, 3\)"):
        initial_parameters.load(prepared)
