"""L_target + lambda L_source: lambda by a schedule, and a lambda of 0 that is the target by itself."""

import compiling
import jax
import pytest
import tiny
import two_sources

from mtl_jax import L2SP, Batching, Optimizer, Phase
from mtl_jax.core.errors import UserError
from mtl_jax.data.stream import stream
from mtl_jax.experiment_checks import check
from mtl_jax.training.batch_parts import weighted_rows
from mtl_jax.training.build_step import gradient_fn
from mtl_jax.training.phase_state import initial_state
from mtl_jax.training.setup import mixture_phases, prepare
from mtl_jax.training.step import make_train_step
from mtl_jax.training.train_state import StepInputs

STEPS = 3
JOINT = Batching(rows=6, row_length=24, examples_per_row=6, mixture="fixed", shares={"ratings": 2.0, "questions": 1.0})
ALONE = Batching(rows=4, row_length=24, examples_per_row=6)


@pytest.fixture(scope="module")
def bert(shallow):
    return shallow


def trained(bert, data, **changes):
    """The state after a few steps, and what the last one reported. Dropout is on; SGD, as its programs compile sooner."""
    sgd = Optimizer(name="sgd", learning_rate=0.05)
    prepared = prepare(tiny.experiment(bert, data, phases=(Phase("all", STEPS),), optimizer=sgd, **changes))
    plan, state = prepared.plans[0], initial_state(prepared)
    step = jax.jit(
        make_train_step(gradient_fn(prepared, plan), plan.optimizer, plan.mask, len(prepared.corpus.splits["train"])),
        compiler_options=compiling.PRECISELY,  # two programs agree to the bit only as far as XLA makes the same of both
    )
    batches = stream(prepared.corpus, prepared.experiment.batch, 0, mixture_phases(prepared.experiment))
    for _ in range(STEPS):
        state, metrics = step(state, StepInputs(next(batches)))
    batches.close()
    return jax.device_get(state), jax.device_get(metrics), prepared


def bits(tree):
    return [leaf.tobytes() for leaf in jax.tree.leaves(tree)]


def test_a_lambda_of_0_is_the_target_by_itself(bert, data):
    """The target has four rows a step in both runs; in one of them the source stands before it."""
    alone, alone_metrics, _ = trained(bert, data, only=("rating",), batch=ALONE)
    sources = tiny.experiment(bert, data).sources[::-1]
    weights = {"rating": 1.0, "coarse": 0.0, "fine": "linear_schedule(0.0, 0.0, 10)"}
    joint, metrics, prepared = trained(bert, data, sources=sources, batch=JOINT, weighting="scheduled", weights=weights)
    assert bits(joint.params["trunk"]) == bits(alone.params["trunk"])
    assert bits(joint.params["trunk"]) != bits(prepared.params["trunk"])
    assert bits(joint.params["heads"]["rating"]) == bits(alone.params["heads"]["rating"])
    assert metrics.losses["rating"] == alone_metrics.losses["rating"] == metrics.total
    assert metrics.gradient_norm == alone_metrics.gradient_norm
    assert metrics.losses["fine"] == metrics.counts["fine"] == metrics.weights["fine"] == 0
    assert metrics.seen[:, 0].tolist() == [2, 4]
    assert "phase all: coarse, fine weigh 0 throughout and are not computed" in prepared.notes


def test_who_is_idle(bert, data):
    weights = {"rating": 1.0, "coarse": 0.0, "fine": 0.0}

    def idle(weights, **changes):
        return prepare(tiny.experiment(bert, data, weighting="fixed", weights=weights, **changes)).plans[0].zero_weight_tasks

    assert idle(weights) == ("coarse", "fine")
    assert idle(weights, weigh_heads=True) == ("coarse", "fine")
    assert idle(weights, weigh_heads=False) == ()  # heads learn by their plain losses
    assert idle(dict.fromkeys(weights, 0.0), regularisers=(L2SP(name="start", weight=0.1),)) == ()


@pytest.mark.parametrize(
    ("idle", "rows", "multiple", "expected"),
    [
        (("b", "c"), {"first": 4, "second": 2}, 2, (slice(0, 4),)),
        (("a",), {"first": 4, "second": 2}, 2, (slice(4, 6),)),
        (("b",), {"first": 4, "second": 2}, 2, ()),  # c is of the same source
        (("a",), {"first": 4, "second": 2}, 4, ()),  # two rows cannot be shared by four devices
        (("a",), None, 1, ()),
    ],
)
def test_rows_that_count(idle, rows, multiple, expected):
    assert weighted_rows(two_sources.TASKS, idle, rows, multiple) == expected


ZERO = dict.fromkeys(("rating", "coarse", "fine"), 0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weighting": "fixed", "weights": ZERO}, r"weights: every task's weight is 0 in all steps of phase 'heads'"),
        ({"weighting": "scheduled", "weights": ZERO | {"fine": "linear_schedule(1.0, 0.0, 6)"}}, r"of phase 'everything'"),
        ({"phases": (Phase("all", 4, weights=ZERO),)}, r"phases.all.weights: every task's weight is 0"),
        ({"phases": (Phase("all", 4, weights=ZERO),), "combinators": ("normalized",)}, r"phases.all.weights"),
    ],
)
def test_weights_that_are_all_0_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        check(tiny.experiment("bert", "data", **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"weigh_heads": False},  # heads learn by their plain losses
        {"combinators": ("normalized",)},  # makes equal ones of them
        {"regularisers": (L2SP(name="start", weight=0.1),)},
        {"weights": ZERO | {"fine": "linear_schedule(0.0, 1.0, 12)"}, "weighting": "scheduled"},
    ],
)
def test_weights_of_0_that_leave_something_to_learn(changes):
    check(tiny.experiment("bert", "data", **{"weighting": "fixed", "weights": ZERO} | changes))


@pytest.mark.parametrize("weight", [-0.1, "-0.1", "linear_schedule(0.5, -0.5, 12)", "sigmoid_schedule(0, -1, 12)"])
def test_a_negative_lambda_is_refused(bert, data, weight):
    weights = {"rating": 1.0, "coarse": weight, "fine": 1.0}
    with pytest.raises(UserError, match=r"weights: (the schedule of )?coarse is -.*must be finite and not negative"):
        prepare(tiny.experiment(bert, data, weighting="scheduled", weights=weights))
