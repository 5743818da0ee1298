import dataclasses
import functools

import flax.linen as nn
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import mtl_jax
from mtl_jax import Batching, Lora, ParamRule, Phase, weighting
from mtl_jax.core import trees
from mtl_jax.core.errors import UserError
from mtl_jax.data.batches import Batch
from mtl_jax.data.stream import single_phase, stream
from mtl_jax.models.encoder import EmbeddingConfig, SharedEmbedding
from mtl_jax.models.trunk_output import with_token_table
from mtl_jax.training import gram_gradient, step_checks, task_gradients
from mtl_jax.training import mesh as meshes
from mtl_jax.training.build_step import gradient_fn
from mtl_jax.training.forward import apply_heads, encode_tokens, label_counts, mean_losses
from mtl_jax.training.metrics_log import compare_gradients, read_metrics, step_record
from mtl_jax.training.phase_state import initial_state
from mtl_jax.training.prepared import Prepared
from mtl_jax.training.setup import prepare
from mtl_jax.training.step import make_train_step
from mtl_jax.training.train_state import StepInputs, StepMetrics, TrainState
from mtl_jax.transfer.adapters import OwnParts
from mtl_jax.transfer.adapters.stacks import SHARED
from mtl_jax.trunks import EncoderOutput, TrunkConfig

EVERYTHING = (Phase("everything", 4),)
BATCHINGS = {  # all of 8 rows: one program of K backward passes is for all of them
    "equal blocks": Batching(rows=8, row_length=24, examples_per_row=6),
    "unequal blocks": Batching(rows=8, row_length=24, examples_per_row=6, mixture="proportional"),
    "in parts": Batching(rows=8, row_length=24, examples_per_row=6, mixture="proportional", accumulate=4),
    "fluctuating": Batching(rows=8, row_length=24, examples_per_row=6, mixture="fixed", shares={"ratings": 9, "questions": 1}),
}


class TableAndLayer(SharedEmbedding):
    """A token table and a dense layer: both kinds of parameters by which gradients are compared, compiled in no time."""

    @nn.compact
    def __call__(self, *args, **kwargs):
        hidden = super().__call__(*args, **kwargs).hidden
        return EncoderOutput(jnp.tanh(nn.Dense(32, name="layer_0")(hidden)))


@dataclasses.dataclass(frozen=True)
class Small(TrunkConfig):
    def module(self, vocab_size, dtype):
        return TableAndLayer(EmbeddingConfig(vocab_size, 32), dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A prepared run of one phase, its first batch and state; what is compiled for it is compiled once."""

    prepared: Prepared
    batch: Batch
    state: TrainState

    @property
    def plan(self):
        return self.prepared.plans[0]

    @functools.cached_property
    def step(self):
        step = make_train_step(gradient_fn(self.prepared, self.plan), self.plan.optimizer, self.plan.mask)
        return jax.jit(step, out_shardings=meshes.replicated(self.prepared.mesh))

    def gradient(self, batch=None, rule=None):
        frozen = jax.tree.map(lambda _: None, self.prepared.params)
        inputs = StepInputs(self.batch if batch is None else batch)
        return self.gradient_fn(rule)(self.prepared.params, frozen, inputs, self.state)

    @functools.cache  # noqa: B019 (a handful of cases, of one module)
    def gradient_fn(self, rule):
        return jax.jit(gradient_fn(self.prepared, self.plan if rule is None else self.plan._replace(rule=rule)))


def set_up(trunk, data, **changes):
    """Dropout off; a batch, the state, the measure of the only phase."""
    tasks = tuple(dataclasses.replace(task, dropout=0.0) for task in tiny.experiment(trunk, data).tasks)
    prepared = prepare(tiny.experiment(trunk, data, tasks=tasks, **({"phases": EVERYTHING} | changes)))
    batches = stream(prepared.corpus, prepared.experiment.batch, 0, single_phase(prepared.experiment.batch, 100))
    batch = jax.tree.map(jnp.asarray, next(batches))
    batches.close()
    return Case(prepared, batch, initial_state(prepared))


@pytest.fixture(scope="module")
def encoder(shallow):
    return mtl_jax.Pretrained(str(shallow), dropout=0.0)


@pytest.fixture(scope="module")
def case(data):
    """A function from a name of BATCHINGS and hashable changes of the experiment to their Case, which is made once."""

    @functools.cache
    def case(batching="equal blocks", weights=(), trunk=Small(), **changes):
        return set_up(trunk, data, batch=BATCHINGS[batching], weights=dict(weights), **changes)

    return case


@pytest.fixture(scope="module")
def jacobian(case):
    """A function from a Case, whose tasks are those of all, to {task: gradient by the trunk, flat}, a backward pass each."""
    tasks = case().prepared.corpus.tasks

    @functools.partial(jax.jit, static_argnums=0)
    @functools.partial(jax.jacrev, argnums=1)
    def program(module, trunk, heads, batch):
        outputs = apply_heads(tasks, heads, encode_tokens(module)(trunk, batch, None, None), batch, None)
        return mean_losses(tasks, outputs, batch, label_counts(tasks, batch))

    def jacobian(case, batch=None):
        module, params = case.prepared.trunk.module, case.prepared.params
        rows = program(module, params["trunk"], params["heads"], case.batch if batch is None else batch)
        return {task: flat(row) for task, row in rows.items()}

    return jacobian


def flat(gradient):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient)])


@pytest.mark.parametrize("batching", ["equal blocks", "unequal blocks"])
def test_the_gram_matrix_is_that_of_k_backward_passes(case, encoder, jacobian, batching):
    """Three tasks on two sources, two of them on one; blocks of equal and of unequal length."""
    run = case(batching, weighting="mgda", trunk=encoder)
    rows = jacobian(run)
    expected = np.array([[rows[a] @ rows[b] for b in sorted(rows)] for a in sorted(rows)])
    np.testing.assert_allclose(run.gradient().gram, expected, rtol=1e-3, atol=1e-4 * expected.max())


@pytest.mark.parametrize("gram_over", ["trunk", "representation", "trunk/layer_0/.*"])
def test_equal_weights_through_the_gram_step_are_plain_training(case, encoder, gram_over):
    run = case(trunk=encoder)
    plan = run.plan
    plain, plain_metrics = run.step(run.state, StepInputs(run.batch))
    rule = weighting.Rule(
        init=lambda names: (), update=lambda s, signals: ({t: jnp.ones(()) for t in signals.losses}, s), needs_gram=True
    )
    prepared = run.prepared._replace(experiment=dataclasses.replace(run.prepared.experiment, gram_over=gram_over))
    step = make_train_step(gradient_fn(prepared, plan._replace(rule=rule)), plan.optimizer, plan.mask)
    found, metrics = jax.jit(step)(run.state, StepInputs(run.batch))
    np.testing.assert_allclose(metrics.total, plain_metrics.total, rtol=1e-5)
    np.testing.assert_allclose(metrics.gradient_norm, plain_metrics.gradient_norm, rtol=1e-4)
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), plain.opt_state, found.opt_state)
    assert max(jax.tree.leaves(moved)) < 1e-5


def test_the_combined_gradient_follows_the_weights(case, jacobian):
    run = case(weighting="pcgrad")
    found = run.gradient()
    expected = sum(float(found.weights[task]) * row for task, row in jacobian(run).items())
    np.testing.assert_allclose(flat(found.gradient["trunk"]), expected, atol=1e-4 * np.abs(expected).max())


def test_heads_may_keep_their_plain_gradient(case):
    """mgda's source leaves heads alone, which is what no flag says."""
    weighed, plain = case(weighting="mgda", weigh_heads=True).gradient(), case(weighting="mgda").gradient()
    for task, gradient in plain.gradient["heads"].items():
        weighted = jax.tree.map(lambda leaf, w=weighed.weights[task]: np.asarray(w) * np.asarray(leaf), gradient)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), weighed.gradient["heads"][task], weighted)


def test_the_gram_step_costs_what_plain_training_costs(data, tmp_path):
    """By XLA's count, where every task has rows of its own: no K backward passes, no second forward pass.

    Together the Gram matrix and the combination cost 2 K^2 + 2 K operations a parameter, which is much only for a tiny
    model: they are counted off. So would be what a rule itself computes; this one does nothing.
    """
    tiny.write_bert(tmp_path, layers=2)
    names = tuple(task.name for task in tiny.experiment(tmp_path, data).tasks[:2])
    run = set_up(
        mtl_jax.Pretrained(str(tmp_path), dropout=0.0),
        data,
        only=names,
        batch=Batching(rows=16, row_length=24, examples_per_row=6),
    )
    flops = {}
    for needs_gram in (False, True):
        plan = run.plan._replace(rule=weighting.equal()._replace(needs_gram=needs_gram))
        step = jax.jit(make_train_step(gradient_fn(run.prepared, plan), plan.optimizer, plan.mask))
        flops[needs_gram] = step.lower(run.state, StepInputs(run.batch)).compile().cost_analysis()["flops"]
    size = sum(leaf.size for leaf in jax.tree.leaves(run.prepared.params["trunk"]))
    assert flops[True] - 12 * size < 1.04 * flops[False]


def test_task_gradients_may_be_held_in_bfloat16(case):
    exact = np.asarray(case(weighting="mgda").gradient().gram)  # float32, where no flag says otherwise
    rounded = np.asarray(case(weighting="mgda", gram_dtype="bfloat16").gradient().gram)
    np.testing.assert_allclose(rounded, exact, atol=2e-2 * exact.max())
    assert (rounded != exact).any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_the_same_for_all_blocks_is_kept_once(dtype):
    """Of a dense layer the way back needs the kernel, in bfloat16 a cast of it, and the activations: only those by block."""

    def forward(kernel_HxF, x_TxH):
        y, pull = jax.vjp(
            lambda kernel: jnp.tanh(x_TxH.astype(dtype) @ kernel.astype(dtype)) @ kernel.astype(dtype).T, kernel_HxF
        )
        return y, jax.tree.leaves(pull)

    kernel_HxF, x_TxH = jnp.ones((3, 4)), jnp.ones((5, 3))
    flags = task_gradients.depends(forward, kernel_HxF, x_TxH)
    shapes = [leaf.shape for leaf in forward(kernel_HxF, x_TxH)[1]]
    assert flags[0]
    assert not any(by_block for shape, by_block in zip(shapes, flags[1], strict=True) if shape in ((3, 4), (4, 3)))
    assert any(flags[1])


def test_twelve_changed_gradients_keep_their_order():
    rows = {"a": np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)}
    np.testing.assert_allclose(task_gradients.gram_of_rows(rows), rows["a"] @ rows["a"].T, rtol=1e-5)


@pytest.mark.parametrize("flat", [False, True])
def test_what_single_tasks_have_of_a_stack_is_apart_from_what_tasks_share(flat):
    own, names = OwnParts({"lora": ("a", SHARED), "task": ("a", "b")}, ("a", "b")), ("a", "b")
    draw = np.random.default_rng(0).normal
    rows = {
        "adapters": {
            "lora": {"layer_0": {"a": draw(size=(2, 2, 3))}},
            "task": {"layer_0": {"a": draw(size=(2, 2, 3))}},
            "run": {"layer_0": {"own": {"a": draw(size=(2, 3))}, "b": draw(size=(2, 3))}},
        },
        "layer_0": {"kernel": draw(size=(2, 3, 2))},
    }
    rows = jax.tree.map(lambda leaf: jnp.asarray(leaf.reshape(2, -1) if flat else leaf, jnp.float32), rows)
    shared, apart = (trees.flat(part(rows, own)) for part in (task_gradients.shared_only, task_gradients.of_single_tasks))
    assert {path for path, leaf in shared.items() if leaf is not None} == {
        "adapters/lora/layer_0/a",
        "adapters/run/layer_0/b",
        "layer_0/kernel",
    }
    assert {path for path, leaf in apart.items() if leaf is not None} == {
        "adapters/lora/layer_0/a",
        "adapters/task/layer_0/a",
        "adapters/run/layer_0/own/a",
    }
    lora = rows["adapters"]["lora"]["layer_0"]["a"].reshape(2, 2, 3)
    np.testing.assert_array_equal(shared["adapters/lora/layer_0/a"].reshape(2, 2, 3), lora * np.array([0, 1])[:, None])
    np.testing.assert_array_equal(apart["adapters/lora/layer_0/a"].reshape(2, 2, 3), lora * np.array([1, 0])[:, None])

    weights = {"a": jnp.float32(-2), "b": jnp.float32(3)}
    combined = task_gradients.combine([rows], weights, names, own)
    parts = [
        task_gradients.combine([part(rows, own)], weights, names, own)
        for part in (task_gradients.shared_only, task_gradients.of_single_tasks)
    ]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), task_gradients.together(*parts, own), combined)
    np.testing.assert_allclose(
        combined["adapters"]["task"]["layer_0"]["a"], 3 * rows["adapters"]["task"]["layer_0"]["a"][1], rtol=1e-6
    )
    found = combined["adapters"]["lora"]["layer_0"]["a"].reshape(2, 3)
    np.testing.assert_allclose(found, [3 * lora[1, 0], 3 * lora[1, 1] - 2 * lora[0, 1]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("per", "shares"), [("task", False), ("source", True)])
def test_adapters_of_single_tasks_share_nothing(bert, data, per, shares):
    """Where only they train, no rule compares gradients; a source that has two tasks is shared by them."""
    only = Phase("adapters", 1, rules=(ParamRule("heads/.*"), ParamRule("trunk/adapters/.*"), ParamRule(".*", train=False)))
    lora = Lora(name="lora", rank=2, per=per)
    changes = {"adapters": (lora,), "phases": (only, Phase("all", 1)), "weighting": "mgda"}
    first, second = prepare(tiny.experiment(bert, data, **changes)).plans
    assert first.rule.needs_gram == shares
    assert second.rule.needs_gram
    if not shares:
        with pytest.raises(UserError, match="matches no trunk parameter that trains and that tasks share"):
            prepare(tiny.experiment(bert, data, gram_over="trunk/adapters/.*", **changes))


def test_each_adapter_of_a_source_with_one_task_is_the_task_s_own(bert, data):
    alone = tuple(task for task in tiny.experiment(bert, data).tasks if task.name != "coarse")
    changes = {"adapters": (Lora(name="lora", rank=2, per="source"),), "tasks": alone}
    assert prepare(tiny.experiment(bert, data, **changes)).plans[0].own.of("adapters/lora/layer_0/a") == (True,)


def cut(case, rows, batch=None, multiple=1):
    """The blocks of a batch, as arrays of numpy; and their layout."""
    tasks = case.prepared.corpus.tasks
    layout = task_gradients.layout(tasks, rows)
    blocks = jax.jit(lambda batch: task_gradients.cut(batch, layout, tasks, multiple))(case.batch if batch is None else batch)
    return jax.tree.map(np.asarray, blocks), layout


def test_blocks_of_unequal_length_end_in_empty_rows(data):
    batching = Batching(rows=9, row_length=24, examples_per_row=6, mixture="uniform")
    run = set_up(Small(), data, batch=batching)
    blocks, layout = cut(run, run.prepared.schedule.capacity(range(1)))
    assert layout.rows == (5, 5)
    np.testing.assert_array_equal(blocks.tokens[0], run.batch.tokens[:5])
    np.testing.assert_array_equal(blocks.tokens[1, :4], run.batch.tokens[5:])
    assert not blocks.tokens[1, 4].any()
    assert (blocks.index[1, 4] == -1).all()
    assert np.isnan(blocks.labels["rating"][1, 4]).all()


def test_rows_in_any_order_with_empty_ones_are_cut_by_source(case):
    """Against a loop over the rows; a block of a source that is not there is empty."""
    batch = jax.tree.map(np.asarray, case().batch)
    rng = np.random.default_rng(0)
    for source in (rng.permutation([0, 0, 0, 1, 1, 1, 1, -1]), np.array([1, -1, 1, 1, -1, 1, 1, -1]), np.full(8, -1)):
        shuffled = batch._replace(source=np.asarray(source, batch.source.dtype))
        blocks, _ = cut(case(), {"ratings": 6, "questions": 5}, shuffled, multiple=4)
        assert blocks.tokens.shape[:2] == (2, 8)
        for number in range(2):
            rows = [row for row in range(8) if source[row] == number]
            np.testing.assert_array_equal(blocks.tokens[number, : len(rows)], batch.tokens[np.array(rows, int)])
            np.testing.assert_array_equal(blocks.source[number], [number] * len(rows) + [-1] * (8 - len(rows)))
            assert not blocks.segments[number, len(rows) :].any()


def test_a_mixture_that_fluctuates_gives_the_gradients_of_k_backward_passes(case, jacobian):
    """Steps with 7 or 8 of 8 rows of one source, the other's absent in some; the same program for all of them."""
    run = case("fluctuating", weighting="mgda")
    params, plan, batching = run.prepared.params, run.plan, BATCHINGS["fluctuating"]
    step = jax.jit(make_train_step(gradient_fn(run.prepared, plan), optax.sgd(1.0), plan.mask))
    state = run.state._replace(opt_state=optax.sgd(1.0).init(params))
    batches = stream(run.prepared.corpus, batching, 0, single_phase(batching, 4))
    counts = set()
    for _ in range(4):
        batch = jax.tree.map(jnp.asarray, next(batches))
        counts.add(int((np.asarray(batch.source) == 1).sum()))
        rows = jacobian(run, batch)
        expected = np.array([[rows[a] @ rows[b] for b in sorted(rows)] for a in sorted(rows)])
        after, metrics = step(state, StepInputs(batch))
        np.testing.assert_allclose(metrics.gram, expected, rtol=1e-3, atol=1e-4 * expected.max())
        moved = flat(params["trunk"]) - flat(after.params["trunk"])
        wanted = sum(float(metrics.weights[task]) * row for task, row in rows.items())
        np.testing.assert_allclose(moved, wanted, atol=1e-4 * np.abs(wanted).max())
    batches.close()
    assert counts == {0, 1}
    assert step._cache_size() == 1


@pytest.mark.parametrize(
    "weighting_name", ["upgrad", pytest.param("pcgrad", marks=pytest.mark.long)]
)  # one that solves, one that draws
def test_a_gram_rule_trains(trunk, data, tmp_path, weighting_name):
    """Heads first on cached features, where nothing shared trains and every weight is 1; then everything by the rule."""
    found = mtl_jax.train(tiny.experiment(trunk, data, weighting=weighting_name), tmp_path)
    records = [record for record in read_metrics(tmp_path) if record["kind"] == "train"]
    assert all(record["weight/rating"] == 1.0 for record in records[:6])
    assert all("conflicts" in record for record in records[6:])
    solved = [record["solver_residual"] for record in records[6:] if "solver_residual" in record]
    assert len(solved) == (6 if weighting_name == "upgrad" else 0)
    assert max(solved, default=0.0) < 1e-4
    assert not any("solver_residual" in record for record in records[:6])
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert events.count(b"train/cosines") == 6
    assert events.count(b"train/conflicts") == 6
    assert found["steps"] == 12


def on_devices(trunk, data, count, rows, **mixture):
    """Records of 4 steps on so many devices, and XLA's count of a step's operations on each."""
    batching = Batching(rows=rows, row_length=24, examples_per_row=6, **mixture)
    run = set_up(trunk, data, weighting="upgrad", batch=batching, devices=count)
    batches = stream(run.prepared.corpus, batching, 0, single_phase(batching, 4))
    by_rows, step, records = meshes.by_rows(run.prepared.mesh), None, []
    state = run.state
    for _ in range(4):
        inputs = StepInputs(meshes.assemble(next(batches), by_rows))
        step = step or run.step.lower(state, inputs).compile()
        state, metrics = step(state, inputs)
        records.append(step_record(jax.device_get(metrics), {"seen": {}, "padding": 0.0}, 0.1, 0)[1])
    batches.close()
    return records, step.cost_analysis()["flops"]


@pytest.mark.parametrize("shares", [pytest.param({}, marks=pytest.mark.long), {"ratings": 9, "questions": 7}])
def test_one_and_eight_devices_see_the_same_gram_matrix(encoder, data, shares):
    """By XLA's count for each device they share the rows that are gathered by source, too: with a mixture that has no
    equal blocks, eight do not all do everything."""
    totals, flops = {}, {}
    for devices in (1, 8):
        mixture = {"mixture": "fixed", "shares": shares} if shares else {}
        records, flops[devices] = on_devices(encoder, data, devices, 64 if shares else 16, **mixture)
        totals[devices] = [[record["total"], record["gradient_norm/fine"], record["weight/fine"]] for record in records]
    np.testing.assert_allclose(totals[8], totals[1], rtol=1e-3)
    if shares:
        assert flops[8] < flops[1] / 3


@pytest.mark.parametrize(
    ("name", "over"),
    [
        ("dwa", "trunk"),
        pytest.param("equal", "trunk", marks=pytest.mark.long),
        ("upgrad", "trunk"),
        ("upgrad", "representation"),
        pytest.param("moco", "trunk", marks=pytest.mark.long),
    ],
)
def test_a_batch_in_parts_is_the_whole_batch(case, name, over):
    """Losses, weights, Gram matrix and gradient; 8 rows in blocks of unequal length, cut into 4 parts."""
    changes = {} if over == "trunk" else {"gram_over": over}
    whole, parts = (case(batching, weighting=name, **changes).gradient() for batching in ("unequal blocks", "in parts"))
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(jax.device_get(whole.gradient)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * scale), parts.gradient, whole.gradient)
    for field in ("losses", "counts", "weights"):
        for task, value in getattr(whole, field).items():
            assert getattr(parts, field)[task] == pytest.approx(float(value), rel=1e-3)


def test_loss_rules_may_leave_the_heads_alone(case):
    weights = {"rating": 3.0, "coarse": 0.0, "fine": 0.5}
    found = {
        weigh: jax.device_get(case(weighting="fixed", weights=tuple(weights.items()), weigh_heads=weigh).gradient().gradient)
        for weigh in (True, False)
    }
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found[True]["trunk"], found[False]["trunk"])
    for task, gradient in found[False]["heads"].items():
        weighted = jax.tree.map(lambda leaf, w=weights[task]: w * leaf, gradient)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found[True]["heads"][task], weighted)


@pytest.mark.parametrize("needs_gram", [False, True])
def test_no_head_climbs_its_loss(case, jacobian, needs_gram):
    """The trunk follows a negative weight; the head stands still then."""
    weights = {"rating": -3.0, "coarse": 2.0, "fine": 0.0}
    rule = weighting.Rule(
        init=lambda names: (),
        update=lambda state, signals: ({task: jnp.float32(weights[task]) for task in signals.losses}, state),
        needs_gram=needs_gram,
    )
    run = case()
    plain = jax.device_get(run.gradient().gradient["heads"])
    found = jax.device_get(run.gradient(rule=rule).gradient)
    expected = sum(weights[task] * row for task, row in jacobian(run).items())
    np.testing.assert_allclose(flat(found["trunk"]), expected, atol=1e-4 * np.abs(expected).max())
    for task, factor in {"rating": 0.0, "coarse": 2.0, "fine": 0.0}.items():
        expected = jax.tree.map(lambda leaf, w=factor: w * leaf, plain[task])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found["heads"][task], expected)


def test_graddrop_is_its_definition(case, jacobian):
    """On the gradients of K backward passes: every coordinate of the combined gradient is the sum of one sign."""
    run = case(weighting="graddrop")
    drawn = flat(run.gradient().gradient["trunk"])
    rows = np.stack(list(jacobian(run).values()))
    positive, negative = np.maximum(rows, 0).sum(0), np.minimum(rows, 0).sum(0)
    error = np.minimum(np.abs(drawn - positive), np.abs(drawn - negative))
    assert error.max() < 1e-4 * np.abs(rows).max()
    both = (positive > 1e-3 * np.abs(rows).max()) & (negative < -1e-3 * np.abs(rows).max())
    ups = np.abs(drawn - positive) < np.abs(drawn - negative)
    chance = positive / (positive - negative + 1e-30)
    assert ups[both].mean() == pytest.approx(chance[both].mean(), abs=0.05)


@pytest.mark.long
@pytest.mark.parametrize("name", ["graddrop", "moco", "db_mtl", "cagrad"])
def test_a_loop_of_ones_own_has_the_same_gradient(case, jacobian, name):
    """weighting.gradient on the gradients of K backward passes, with the step's own key."""
    run = case(weighting=name)
    found = run.gradient()
    rows, rule = jacobian(run), run.plan.rule
    key = jax.random.split(run.state.step_key(), 3)[2]
    _, unflatten = jax.flatten_util.ravel_pytree(run.prepared.params["trunk"])
    by_task = {task: unflatten(jnp.asarray(row)) for task, row in rows.items()}
    gradient, weights, _ = weighting.gradient(rule, rule.init(list(rows)), by_task, found.losses, step=0, key=key)
    for task, weight in found.weights.items():
        assert float(weights[task]) == pytest.approx(float(weight), rel=1e-3)
    trees = [gradient, found.gradient["trunk"]]
    if name == "graddrop":  # of the token table a step draws for the rows that are read
        trees = [with_token_table(tree, None) for tree in trees]
    by_hand, stepped = map(flat, trees)
    close = np.abs(by_hand - stepped) < 1e-3 * np.abs(stepped).max()
    assert close.mean() > 0.999  # a sign that is drawn may fall otherwise where rounding decides


def test_where_a_rule_is_not_due_the_step_is_plain(case):
    """every(k=2): a Gram step, then a plain one with the same weights, whose metrics say that nothing was compared."""
    run = case(weighting="mgda", combinators=("every:k=2",), weigh_heads=True)
    state, first = run.step(run.state, StepInputs(run.batch))
    _, second = run.step(state, StepInputs(run.batch))
    assert np.isfinite(first.gram).all()
    assert np.isnan(second.gram).all()
    assert first.residual < 1e-4
    assert np.isnan(second.residual)
    assert first.weights == second.weights
    weights = {task: float(weight) for task, weight in second.weights.items()}
    plain, plan = case().prepared, run.plan
    fixed = jax.jit(
        make_train_step(gradient_fn(plain, plan._replace(rule=weighting.fixed(weights))), plan.optimizer, plan.mask)
    )
    _, expected = fixed(state._replace(rule_state=()), StepInputs(run.batch))
    np.testing.assert_allclose(second.gradient_norm, expected.gradient_norm, rtol=1e-5)


def test_an_absent_task_is_not_compared(case):
    """Without labels for one task, the others are weighed as if it were not there, and its head keeps still."""
    run = case(weighting="mgda")
    found = run.gradient(
        run.batch._replace(labels=run.batch.labels | {"fine": np.full(run.batch.labels["fine"].shape, -1, np.int32)})
    )
    assert found.weights["fine"] == 0
    assert sum(found.weights.values()) == pytest.approx(1.0, abs=1e-4)
    assert all(weight > 0.01 for task, weight in found.weights.items() if task != "fine")
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(found.gradient["heads"]["fine"]))


@pytest.mark.parametrize(
    ("residual", "logged", "warns"), [(None, False, False), (np.nan, False, False), (1e-5, True, False), (0.5, True, True)]
)
def test_a_residual_is_logged_and_a_large_one_is_a_warning(residual, logged, warns):
    nothing = {"a": 1.0}
    residual = None if residual is None else np.float32(residual)
    metrics = StepMetrics(nothing, nothing, nothing, 1.0, 1.0, np.zeros((1, 3)), None, residual)
    _, record = step_record(metrics, {"seen": {}, "padding": 0.0}, 0.1, 0)
    assert ("solver_residual" in record) == logged
    assert ("a relative residual of 0.5" in step_checks.unsolved(metrics)) == warns
    assert bool(step_checks.unsolved(metrics)) == warns


def test_diagnostics_leave_absent_tasks_out():
    gram = np.array([[4.0, 0.0, -3.0], [0.0, 0.0, 0.0], [-3.0, 0.0, 9.0]])
    record = compare_gradients(gram, ["a", "b", "c"], [True, False, True])
    assert record["conflicts"] == 1.0
    assert record["cosines"] == [[1.0, -0.5], [-0.5, 1.0]]
    assert "gradient_norm/b" not in record


def test_diagnostics_by_hand():
    gram = np.array([[4.0, -3.0, 0.0], [-3.0, 9.0, 6.0], [0.0, 6.0, 16.0]])
    record = compare_gradients(gram, ["a", "b", "c"])
    assert record["gradient_norm/c"] == 4.0
    assert record["cosines"][0] == [1.0, -0.5, 0.0]
    assert record["cosine_min"] == -0.5
    assert record["conflicts"] == pytest.approx(1 / 3)
    assert record["cosine_mean"] == pytest.approx((-0.5 + 0.0 + 0.5) / 3)


@pytest.mark.parametrize(
    ("over", "message"), [("layer_1/.*", "matches no trunk parameter"), ("trunk/(", "not a regular expression")]
)
def test_what_the_gram_matrix_is_over_must_exist(bert, data, over, message):
    with pytest.raises(UserError, match=message):
        prepare(tiny.experiment(bert, data, weighting="mgda", gram_over=over))


ONE = {"rating": 1, "coarse": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weighting": "moco", "gram_over": "representation"}, "moco changes the trunk's task gradients: gram_over must be"),
        ({"combinators": ("evry:k=2",)}, "unknown combinator 'evry'"),
        ({"weighting": "scheduled", "weights": ONE | {"fine": "linear_schedule(1, -1, 4)"}}, "fine is -0.5 at step 3"),
        ({"weighting": "fixed", "weights": ONE | {"fine": "linear_schedule(1, 0, 4)"}}, "is for the weighting scheduled"),
        ({"weighting": "equal", "weights": ONE}, "weights are for --weighting fixed or scheduled"),
        ({"batch": Batching(rows=9, accumulate=2)}, "accumulate is 2; it must divide batch.rows, 9"),
    ],
)
def test_bad_weighting_is_found_before_training(bert, data, changes, message):
    with pytest.raises(UserError, match=message):
        prepare(tiny.experiment(bert, data, **changes))


def test_a_frozen_layer_cannot_carry_the_gram_matrix(bert, data):
    rules = (ParamRule("trunk/layer_0/.*", train=False), ParamRule(".*"))
    prepared = prepare(tiny.experiment(bert, data, phases=(Phase("top", 1, rules=rules),)))
    with pytest.raises(UserError, match="matches no trunk parameter that trains"):
        gram_gradient.check(prepared.params, prepared.plans[0].mask, "trunk/layer_0/.*")
