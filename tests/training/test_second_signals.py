"""Signals beside the Gram matrix: inner products over two halves of a batch, and the derivative on held-out rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import mtl_jax
from mtl_jax import Batching, Checkpoints, Phase, weighting
from mtl_jax.ablation import fields
from mtl_jax.core.errors import UserError
from mtl_jax.data.stream import single_phase, stream
from mtl_jax.training import mesh as meshes
from mtl_jax.training.build_step import gradient_fn
from mtl_jax.training.checkpoint_store import Store
from mtl_jax.training.forward import apply_heads, encode_tokens, label_counts, mean_losses
from mtl_jax.training.metrics_log import read_metrics
from mtl_jax.training.phase_state import initial_state
from mtl_jax.training.prepared import held_out_batches
from mtl_jax.training.setup import prepare
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
    return weighting.Rule(
        lambda names: shapes, update, needs_cross=True, held_out=held_out, head_weights=head_weights, name="probe"
    )


def head_weights(state):
    return jnp.array([3.0, 1.0, 0.5])


def experiment(data, **changes):
    whole = tiny.experiment("", data)
    values = {
        "trunk": mtl_jax.Embedding(vocabulary=100, dimension=8),
        "phases": (Phase("all", 4),),
        "tasks": tuple(dataclasses.replace(task, dropout=0.0) for task in whole.tasks),
        "batch": Batching(rows=16, row_length=24, examples_per_row=6),
        "optimizer": mtl_jax.Optimizer(learning_rate=1e-3),
        "evaluation": mtl_jax.Evaluation(every=4, baseline="none"),
    }
    return tiny.experiment("", data, **(values | changes))


class Measured:
    """The two signals of the first step, and what they are made of."""

    def __init__(self, data, rule=None, **changes):
        self.prepared = prepared = prepare(experiment(data, weighting=rule or probe(), **changes))
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
    jacobians = jax.jit(lambda params: [jax.jacrev(losses_of(run, half))(params) for half in halves])(run.prepared.params)
    flat = [
        [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(by_task[task]["trunk"])]) for task in TASKS]
        for by_task in jacobians
    ]
    expected = np.array(flat[0]) @ np.array(flat[1]).T
    np.testing.assert_allclose(run.step.rule_state["cross"], expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())
    assert np.abs(expected - expected.T).max() > 0.01 * np.abs(expected).max()


@pytest.mark.parametrize("setting", ["rule", False])
def test_heads_may_have_weights_of_their_own(measured, data, setting):
    """In the pass that compares gradients and in that of losses alone; --weigh-heads has the last word."""
    rule = weighting.Rule(lambda names: (), lambda state, signals: (WEIGHTS, state), head_weights=head_weights, name="own")
    scales = (3.0, 1.0, 0.5) if setting == "rule" else (1.0, 1.0, 1.0)
    for run in [Measured(data, rule, weigh_heads=setting), *([measured()] if setting == "rule" else [])]:
        losses = losses_of(run, jax.tree.map(jnp.asarray, run.batch))
        plain = jax.jit(jax.grad(lambda params, losses=losses: sum(losses(params).values())))(run.prepared.params)["heads"]
        for task, scale in zip(TASKS, scales, strict=True):
            expected = jax.tree.map(lambda leaf, scale=scale: scale * leaf, plain[task])
            heads = run.step.gradient["heads"][task]
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), heads, expected)


def test_parts_and_devices_change_no_signal(measured):
    plain, other = measured().step, measured(devices=8, accumulate=2).step
    for field in ("held_out", "cross"):
        largest = np.abs(plain.rule_state[field]).max()
        np.testing.assert_allclose(other.rule_state[field], plain.rule_state[field], rtol=1e-4, atol=1e-5 * largest)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), other.gradient, plain.gradient)


AUTO = {"weighting": "auto_lambda", "weighting_options": {"target": "coarse", "learning_rate": 0.01}}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A finished run under auto_lambda."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    mtl_jax.train(experiment(data, **AUTO), workdir)
    return workdir


def weights_of(workdir):
    records = [record for record in read_metrics(workdir) if record["kind"] == "train"]
    return np.array([[record[f"weight/{task}"] for task in TASKS] for record in records])


def params_of(workdir):
    store = Store(workdir, Checkpoints(), read_only=True)
    params = store.restore_params(store.steps()[-1])
    store.close()
    return params


@pytest.mark.long
def test_a_killed_run_ends_with_the_same_bits(data, whole, tmp_path):
    tiny.cut(whole, tmp_path / "run", 2)
    mtl_jax.train(experiment(data, **AUTO), tmp_path / "run")
    assert weights_of(tmp_path / "run").tolist() == weights_of(whole).tolist()
    jax.tree.map(np.testing.assert_array_equal, params_of(tmp_path / "run"), params_of(whole))


def test_held_out_rows_are_not_trained_on(data):
    """A fifth of the target's source; dev, test and the other source stay as they are."""
    plain, run = prepare(experiment(data)).corpus.splits, prepare(experiment(data, **AUTO))
    texts = {split: {row.columns["text"] for row in parts["questions"].data} for split, parts in plain.items()}
    left = {row.columns["text"] for row in run.corpus.splits["train"]["questions"].data}
    held_out = {row.columns["text"] for part in run.held_out for row in part.data}
    assert len(held_out) == round(0.2 * len(texts["train"]))
    assert not left & held_out
    assert left | held_out == texts["train"]
    for split, source in (("dev", "questions"), ("test", "questions"), ("train", "ratings")):
        assert len(run.corpus.splits[split][source].tokens) == len(plain[split][source].tokens)


def test_the_share_decides_the_rows_and_is_no_input_of_a_program(data):
    varied = experiment(data, **AUTO | {"weighting_options": AUTO["weighting_options"] | {"share": 0.3}})
    options = {path[1] for path in fields.numbers(varied) if path[0] == "weighting_options"}
    assert options == {"learning_rate"}


@pytest.mark.long
def test_an_ablation_trains_runs_that_differ_in_an_option_at_once(data, whole, tmp_path):
    """One program for two rates; the run with the rate of the run alone has its weights."""
    mtl_jax.ablate(experiment(data, **AUTO), tmp_path / "ablation", ["weighting-options.learning-rate=0.01,0.1"])
    first, second = (weights_of(tmp_path / "ablation" / "runs" / name) for name in ("0000", "0001"))
    np.testing.assert_allclose(first, weights_of(whole), rtol=1e-4)
    assert np.abs(second - first).max() > 0.1


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"weighting_options": {"target": "ner"}}, "unknown target of weighting auto_lambda: 'ner'"),
        (
            {"sources": "few"},
            "weighting auto_lambda: its share of 0.2 holds out 1 of the 5 training rows of source 'questions'; at least 2 must",
        ),
        (
            {"weighting": probe()._replace(held_out=weighting.HeldOut(("corse",), 0.1)), "weighting_options": {}},
            "unknown task in held_out of weighting probe: 'corse'.*did you mean 'coarse'",
        ),
        ({"weighting_options": {"target": "coarse", "share": 1.5}}, "weighting auto_lambda: share is 1.5"),
        (
            {"weighting": "modo", "weighting_options": {}, "batch": Batching(rows=3, row_length=24, examples_per_row=6)},
            "weighting modo needs two rows of every source in a step, .* and source 'ratings' has 1.5: raise batch.rows",
        ),
        (
            {"weighting": "modo", "weighting_options": {}, "regularisers": (mtl_jax.RDrop(name="r", weight=1.0),)},
            "weighting modo needs independent halves of a batch, and r has every row twice",
        ),
        ({"weighting": "trimmed_mean", "weighting_options": {"trim": 2}}, "trim is 2, which needs 5 tasks, but there are 3"),
        ({"weighting": "cosmos", "weighting_options": {}, "weights": {"coarse": 0.0}}, "the preference of coarse is 0.0"),
    ],
)
def test_bad_input_is_one_line_before_training(data, changes, problem):
    values = AUTO | changes
    if values.get("sources") == "few":
        ratings, questions = tiny.experiment("", data).sources
        values["sources"] = (ratings, dataclasses.replace(questions, limit_train=5))
    with pytest.raises(UserError, match=problem):
        prepare(experiment(data, **values))
