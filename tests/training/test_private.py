"""Private training: against a loop over rows written out, on devices, as a run, and what is refused."""

import dataclasses
import json
import math

import every_rule
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mtl_jax import (
    EWC,
    L2SP,
    Batching,
    Canaries,
    Classification,
    Embedding,
    Lora,
    Phase,
    Private,
    RDrop,
    Regression,
    memorisation,
    train,
    weighting,
)
from mtl_jax.core.errors import UserError
from mtl_jax.data.batches import Batch
from mtl_jax.experiment import data_seed_of
from mtl_jax.experiment_checks import check
from mtl_jax.models.trunk_output import Encoded, segment_mean
from mtl_jax.training import mesh as meshes
from mtl_jax.training import privacy
from mtl_jax.training.checkpoint_store import Store
from mtl_jax.training.experiment_json import from_json, to_json
from mtl_jax.training.gradient import make_backward
from mtl_jax.training.metrics_log import read_metrics
from mtl_jax.training.private_gradient import row_by_row
from mtl_jax.training.step import make_gradient_fn
from mtl_jax.training.train_state import StepInputs, create
from mtl_jax.transfer import accountants
from mtl_jax.transfer import optimizer as optimizers
from mtl_jax.transfer.param_rules import adapters_only
from mtl_jax.weighting import blind

TASKS = (
    Classification(name="kind", source="first", labels=("a", "b", "c")),
    Regression(name="number", source="second", scale=2.0),
    Regression(name="other", source="second"),
)
R, T, WIDTH = 16, 3, 4
EXPECTED = {"first": 6.0, "second": 2.0}


def a_batch():
    """Rows of both sources in any order; two rows lack a label, the last three are empty."""
    rng = np.random.default_rng(0)
    source = np.array([0, 0, 1, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, -1, -1, -1], np.int32)
    real = source >= 0
    tokens = np.where(real[:, None], rng.integers(1, 9, (R, T)), 0).astype(np.int32)
    kind = np.where(source == 0, rng.integers(0, 3, R), -1).astype(np.int32)
    number = np.where(source == 1, rng.normal(size=R), np.nan).astype(np.float32)
    other = np.where(source == 1, 3 * rng.normal(size=R), np.nan).astype(np.float32)
    kind[1], number[2] = -1, np.nan
    labels = {"kind": kind[:, None], "number": number[:, None], "other": other[:, None]}
    segments = np.where(real[:, None], 1, 0) * np.ones((R, T), np.int32)
    index = np.where(real, np.arange(R), -1).astype(np.int32)[:, None]
    return Batch(tokens, segments.astype(np.int32), np.tile(np.arange(T, dtype=np.int32), (R, 1)), index, source, labels)


def parameters():
    keys = jax.random.split(jax.random.key(1), 4)
    heads = {task.name: task.init(key, WIDTH) for task, key in zip(TASKS, keys, strict=False)}
    return {"trunk": {"table": jax.random.normal(keys[3], (9, WIDTH))}, "heads": heads}


def encode(params, batch, key, features):
    return Encoded(pooled=segment_mean(jnp.tanh(params["table"][batch.tokens]), batch.segments, 1))


def step_of(private, devices=1, weights=None, params=None):
    """The gradient of a step, and its losses and counts."""
    mesh = meshes.make(R, devices)
    backward = row_by_row(make_backward(encode, TASKS, trains_trunk=True), TASKS, private, EXPECTED, mesh)
    rule = blind.blind(weighting.fixed(weights or {"kind": 0.5, "number": 1.0, "other": 2.0}))
    params = parameters() if params is None else params
    state = create(params, (), (), 3)
    inputs = StepInputs(meshes.assemble(a_batch(), meshes.by_rows(mesh)))
    frozen = jax.tree.map(lambda leaf: None, params)
    result = jax.jit(make_gradient_fn(backward, rule))(params, frozen, inputs, state)
    return jax.device_get((result.gradient, result.losses, result.counts))


def test_it_is_a_loop_over_rows():
    """No noise: each row's gradient by jax.grad, clipped, summed, over the expected rows; on one device and on eight."""
    params, batch, clip = parameters(), a_batch(), 0.7

    def of_row(params, tokens, kind, number, other):
        vector = jnp.tanh(params["trunk"]["table"][tokens]).mean(axis=0)
        outputs = {name: vector @ head["output"]["kernel"] + head["output"]["bias"] for name, head in params["heads"].items()}
        of_kind = -jax.nn.log_softmax(outputs["kind"])[kind]
        of_number = (outputs["number"][0] - jnp.nan_to_num(number) / 2.0) ** 2
        of_other = (outputs["other"][0] - jnp.nan_to_num(other)) ** 2
        first = jnp.where(kind >= 0, 0.5 * 8 / 6 * of_kind, 0.0)
        return (
            first
            + jnp.where(jnp.isnan(number), 0.0, 8 / 2 * of_number)
            + jnp.where(jnp.isnan(other), 0.0, 2 * 8 / 2 * of_other)
        )

    total, norms, gradient_of = jax.tree.map(np.zeros_like, params), [], jax.jit(jax.grad(of_row))
    for row in np.flatnonzero(batch.source >= 0):
        gradient = gradient_of(params, batch.tokens[row], *(batch.labels[task.name][row, 0] for task in TASKS))
        norm = math.sqrt(sum(float(np.square(leaf).sum()) for leaf in jax.tree.leaves(gradient)))
        norms.append(norm)
        total = jax.tree.map(lambda sum, leaf, norm=norm: sum + leaf * min(1.0, clip / max(norm, 1e-9)), total, gradient)
    assert min(norm for norm in norms if norm) < clip < max(norms)
    alone = step_of(Private(clip=clip, micro_batch=4))
    over_devices = step_of(Private(clip=clip, micro_batch=8), devices=8)
    for gradient, losses, counts in (alone, over_devices):
        jax.tree.map(lambda ours, sum: np.testing.assert_allclose(ours, sum / 8.0, atol=2e-6), gradient, total)
        assert counts == {"kind": 8, "number": 3, "other": 4}
        np.testing.assert_allclose([*losses.values()], [*alone[1].values()], rtol=1e-5)


# --- a run


def private_experiment(bert, data, **changes):
    private = Private(clip=0.5, noise=1.0, epsilon=1.2, delta=1e-3, micro_batch=8)
    values = {
        "only": ("coarse",),
        "sources": tuple(
            dataclasses.replace(source, canaries=Canaries(count=2, repeats=2)) for source in tiny.experiment(bert, data).sources
        ),
        "adapters": (Lora(name="lora", rank=2),),
        "phases": (Phase("heads", 3, rules=tiny.HEADS_ONLY), Phase("lora", 30, rules=adapters_only())),
        "batch": Batching(rows=32, row_length=16, packed=False, sampling="poisson", expected_rows=5),
        "optimizer": optimizers.Optimizer(learning_rate=1e-2, private=private),
    }
    return tiny.experiment(bert, data, **(values | changes))


@pytest.fixture(scope="module")
def run(bert, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("private") / "run"
    experiment = private_experiment(bert, data)
    return experiment, folder, train(experiment, folder)


def last_parameters(folder):
    store = Store(folder, private_experiment("", "").checkpoints, read_only=True)
    params = store.restore_params(store.steps()[-1])
    store.close()
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]


def test_a_run_ends_within_its_budget_and_says_what_it_spent(run):
    """Heads on cached features, then LoRA: the budget ends the second phase early."""
    _, folder, results = run
    spent = results["privacy"]
    rows = spent["sources"]["questions"]["rows"]
    assert 6 < results["steps"] == spent["steps"] < 33
    steps = [(5 / rows, results["steps"])]
    assert spent["epsilon"] == pytest.approx(accountants.rdp(1.0, steps, 0.99e-3))
    assert spent["epsilon"] <= 1.2
    assert accountants.rdp(1.0, [(5 / rows, results["steps"] + 1)], 0.99e-3) > 1.2
    assert spent["overflow"] * (1 + math.exp(spent["epsilon"])) <= 0.01e-3
    assert {key: spent[key] for key in ("delta", "clip", "noise", "accountant", "secret")} == {
        "delta": 1e-3,
        "clip": 0.5,
        "noise": 1.0,
        "accountant": "rdp",
        "secret": False,
    }
    dev = [record for record in read_metrics(folder) if record["kind"] == "dev"]
    epsilons = [record["epsilon"] for record in dev]
    assert epsilons == sorted(epsilons)
    assert epsilons[-1] == spent["epsilon"]
    rates = [record["learning_rate"] for record in read_metrics(folder) if record["kind"] == "train"]
    assert rates[-1] < 0.4 * max(rates)  # the schedule ends where the run does
    assert json.loads((folder / "config.json").read_text())["phases"][1]["steps"] == 30


def test_its_canaries_are_ranked(run):
    _, folder, _ = run
    result = memorisation(folder, candidates=15, resamples=10)
    [exposures] = result.exposures.values()
    assert exposures.repeats == 2
    assert len(exposures.exposures) == 2
    assert all(0 <= bits <= 4 for bits in exposures.exposures)
    assert "| coarse | 2 |" in " ".join(result.table().split())


def test_it_resumes_with_the_same_noise(run, tmp_path):
    experiment, folder, _ = run
    tiny.cut(folder, tmp_path / "run", Store(folder, experiment.checkpoints, read_only=True).steps()[0])
    train(experiment, tmp_path / "run")
    assert last_parameters(tmp_path / "run") == last_parameters(folder)


def test_other_workdirs_do_not_change(bert, data):
    config = to_json(tiny.experiment(bert, data))
    assert "private" not in config["optimizer"]
    assert not {"sampling", "expected_rows"} & set(config["batch"])
    private = private_experiment(bert, data)
    assert from_json(json.loads(json.dumps(to_json(private)))) == private


# --- what is refused


def refused(bert, data, **changes):
    experiment = private_experiment(bert, data, **changes)
    check(experiment)
    privacy.check(experiment)


BATCH = Batching(rows=32, row_length=16, packed=False, sampling="poisson", expected_rows=5)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"batch": Batching(rows=16, row_length=16)}, r"batch\.sampling is shuffled, but the accountants assume"),
        ({"batch": dataclasses.replace(BATCH, accumulate=2)}, r"batch\.accumulate is not for private training"),
        ({"batch": dataclasses.replace(BATCH, rows=36)}, r"micro_batch is 8; it must divide batch\.rows, 36"),
        ({"weighting": "dwa"}, r"the weighting dwa is not private"),
        ({"weighting": "uncertainty"}, r"the weighting uncertainty is not private"),
        ({"weighting": "pcgrad"}, r"the weighting pcgrad is not private"),
        ({"weighting": "dwa", "combinators": ("normalized",)}, r"the weighting dwa with normalized is not private"),
        ({"regularisers": (RDrop(),)}, r"the regulariser r_drop \(RDrop\) is not private"),
        ({"regularisers": (EWC(source="questions", phase="lora"),)}, r"the regulariser ewc \(EWC\) is not private"),
        ({"trunk": Embedding(), "adapters": (), "phases": (Phase("all", 2),)}, r"the vocabulary of trunk Embedding is made"),
        (
            {"tasks": (Classification(name="coarse", source="questions", column="coarse", balanced=True),)},
            r"task 'coarse' counts labels of the training rows \(balanced\)",
        ),
    ],
)
def test_what_is_not_private_is_one_line(bert, data, changes, line):
    with pytest.raises(UserError, match=line):
        refused(bert, data, **changes)


def test_what_is_private_is_allowed(bert, data):
    refused(bert, data, regularisers=(L2SP(),), averaging="ema")
    refused(bert, data, weighting="scheduled", weights={"rating": 1.0, "coarse": "linear_schedule(1.0, 0.0, 9)", "fine": 2.0})
    refused(bert, data, combinators=("normalized",))


def test_a_secret_file_decides_the_key_of_a_run(tmp_path):
    (tmp_path / "key").write_bytes(bytes(32))
    of_private = {"optimizer": optimizers.Optimizer(private=Private(clip=1.0, noise=1.0, secret=str(tmp_path / "key")))}
    keys = [privacy.noise_key(private_experiment("", "", seed=seed, **of_private)) for seed in (0, 1)]
    assert keys[0].shape == (2,)
    assert keys[0].dtype == create({}, (), (), 0).key.dtype
    assert keys[0].tolist() != keys[1].tolist()
    data_seeds = {data_seed_of(private_experiment("", "", seed=seed, **of_private)) for seed in (0, 1)}
    assert len(data_seeds) == 2
    assert min(data_seeds) > 2**64


def test_rules_that_read_losses_are_found_by_their_programs():
    names = ("a", "b", "c")
    reading = {name for name in weighting.RULES if blind.reads_losses(every_rule.make(name, names), names)}
    assert set(weighting.RULES) - reading == {"equal", "fixed", "scheduled", "rlw"}

    def halved(state, signals):  # a rule of the user's own
        return dict.fromkeys(signals.losses, 0.5 + 0.0 * signals.losses["a"]), state

    assert blind.reads_losses(weighting.Rule(init=lambda names: (), update=halved), names)


def test_a_delta_above_one_over_the_rows_is_one_line(bert, data, tmp_path):
    private = Private(clip=1.0, noise=1.0, delta=0.02, micro_batch=8)
    with pytest.raises(UserError, match=r"delta is 0\.02, but source 'questions' has 1\d\d training rows: it must be below"):
        train(private_experiment(bert, data, optimizer=optimizers.Optimizer(private=private)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
