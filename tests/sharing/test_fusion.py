"""AdapterFusion against numpy and against its adapters alone; what it takes of other runs; a run without them afterwards."""

import dataclasses
import json
import shutil

import finished_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import tiny
from finished_runs import moved

import mtl_jax
from mtl_jax import Bottleneck, Lora, Phase, Prefix, adapters_only, sharing
from mtl_jax.core import trees
from mtl_jax.core.errors import UserError
from mtl_jax.inference.predict import open_run
from mtl_jax.models.encoder import Encoder, EncoderConfig
from mtl_jax.sharing import AdapterFusion, TaskAdapters, TrainedTrunk, fusion_only
from mtl_jax.transfer.adapters import ADAPTERS, IA3, adapt, routes

CONFIG = EncoderConfig(30, 8, 1, 2, 16, 8, type_vocab_size=0, dropout=0.0, attention_dropout=0.0)
ROUTES = routes.make([("a", "first"), ("b", "second"), ("c", "second")], ["first", "second"], {})
IDS, SOURCE, KEY = jnp.arange(12).reshape(3, 4), jnp.array([1, 0, 1]), jax.random.key(1)
PLACE = "layer_0/feed_forward_out"
DECLARED = Bottleneck(name="one", width=3, variant="pfeiffer")


@pytest.fixture(scope="module")
def plain():
    return jax.jit(Encoder(CONFIG).init)(jax.random.key(0), IDS)["params"]


def test_fusion_equals_numpy(plain):
    """Tasks b and c share a source, and read their own copies of its rows."""
    part = AdapterFusion(runs=("x", "y"), adapter=DECLARED)
    module = adapt(Encoder(CONFIG), (), 2, sharing=(part,), routes=ROUTES)
    params = jax.jit(module.add)(plain, KEY)
    params |= {ADAPTERS: moved(params[ADAPTERS])}
    apply = jax.jit(lambda params: module.apply({"params": params}, IDS, source=SOURCE).hidden)
    hidden = apply(params).reshape(3, 2, 4, 8)
    _, state = jax.jit(lambda: Encoder(CONFIG).apply({"params": plain}, IDS, capture_intermediates=True))()
    inside = state["intermediates"]["layer_0"]
    y, residual = (np.asarray(inside[name]["__call__"][0]) for name in ("feed_forward_out", "attention_norm"))
    added = jax.tree.map(np.asarray, params[ADAPTERS]["sharing"]["layer_0"]["feed_forward_out"])
    for row, copy, task in ((0, 0, 1), (0, 1, 2), (1, 0, 0), (2, 1, 2)):
        query, key, value = (added["own"][name][task] for name in ("query", "key", "value"))
        z = [bottleneck(added["fused"][f"run_{n}"], y[row]) for n in range(2)]
        scores = np.stack([((y[row] @ query) * (z_n @ key)).sum(-1) for z_n in z])
        weights = np.exp(scores) / np.exp(scores).sum(axis=0)
        fused = sum(weights[n][:, None] * z[n] @ value for n in range(2))
        x = residual[row] + y[row] + fused
        norm = plain["layer_0"]["feed_forward_norm"]
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + CONFIG.layer_norm_eps)
        np.testing.assert_allclose(hidden[row, copy], x * norm["scale"] + norm["bias"], atol=2e-5)


def bottleneck(params, y):
    inner = y @ params["down_kernel"] + params["down_bias"]
    return inner * (1 + scipy.special.erf(inner / 2**0.5)) / 2 @ params["up_kernel"] + params["up_bias"]


@pytest.mark.parametrize(
    "adapter", [IA3(name="one"), pytest.param(Lora(name="one", rank=2, dropout=0.5), marks=pytest.mark.long)]
)
def test_one_adapter_and_an_identity_are_the_adapter_alone(plain, adapter):
    """Also where it changes the input of a linear map (IA3)."""
    alone = adapt(Encoder(CONFIG), (adapter,))
    params = jax.jit(alone.add)(plain, KEY)
    params |= {ADAPTERS: moved(params[ADAPTERS])}
    fused = adapt(Encoder(CONFIG), (), sharing=(AdapterFusion(runs=("x",), adapter=adapter, own=False),), routes=ROUTES)
    assert fused.copies == fused.through == 1
    run = TrainedTrunk("x", alone, params, (adapter,), sharing.Hard(), {})
    added = fused.adapters[0].loaded(jax.jit(fused.add)(plain, KEY)[ADAPTERS]["sharing"], plain, [run])
    np.testing.assert_allclose(
        jax.jit(lambda: fused.apply({"params": plain | {ADAPTERS: {"sharing": added}}}, IDS, source=SOURCE).hidden)(),
        jax.jit(lambda: alone.apply({"params": params}, IDS).hidden)(),
        atol=2e-5,
    )


def trained(plain, *adapters, part=None):
    """The trunk of a run with such adapters, and a sharing."""
    parts = () if part is None else (part,)
    module = adapt(Encoder(CONFIG), adapters, 2, sharing=parts, routes=ROUTES if parts else None)
    params = moved(jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), jax.eval_shape(lambda: module.add(plain, KEY))))
    return TrainedTrunk("runs/x", module, params, adapters, part or sharing.Hard(), {"a": 0, "b": 1, "c": 1})


def loaded(plain, run, **fields):
    """What a fusion of one run has at its place."""
    part = AdapterFusion(runs=("runs/x",), **({"adapter": DECLARED} | fields))
    module = adapt(Encoder(CONFIG), (), 2, sharing=(part,), routes=ROUTES)
    return part.loaded(module.add(plain, KEY)[ADAPTERS]["sharing"], plain, [run])["layer_0"]["feed_forward_out"]["fused"][
        "run_0"
    ]


def test_the_adapter_of_a_task_or_of_its_source_is_taken(plain):
    run = trained(plain, part=TaskAdapters(adapter=dataclasses.replace(DECLARED, name="any")))
    stack = run.params[ADAPTERS]["sharing"]["layer_0"]["feed_forward_out"]["own"]
    taken = loaded(plain, run, tasks=("b",))
    np.testing.assert_array_equal(taken["down_kernel"], stack["down_kernel"][1])
    np.testing.assert_array_equal(taken["up_bias"], stack["up_bias"].reshape(3, 8)[1])
    run = trained(plain, dataclasses.replace(DECLARED, per="source"), Lora(name="lora"))
    stack = run.params[ADAPTERS]["one"]["layer_0"]["feed_forward_out"]
    np.testing.assert_array_equal(loaded(plain, run, tasks=("c",))["down_kernel"], stack["down_kernel"][1])
    twice = trained(plain, DECLARED, dataclasses.replace(DECLARED, name="two"))
    stack = twice.params[ADAPTERS]["two"]["layer_0"]["feed_forward_out"]
    taken = loaded(plain, twice, adapter=dataclasses.replace(DECLARED, name="two"))
    np.testing.assert_array_equal(taken["down_kernel"], stack["down_kernel"])


@pytest.mark.parametrize(
    ("adapters", "fields", "message"),
    [
        ((), {}, "runs of AdapterFusion: runs/x has no adapter; name runs that trained one"),
        ((Lora(name="lora"),), {}, "has another adapter than the one declared here: 'lora' is a Lora, not a Bottleneck"),
        ((dataclasses.replace(DECLARED, width=4),), {}, "width of 'one' is 4, not 3"),
        ((DECLARED,), {"tasks": ("a",)}, "runs/x has one adapter for all rows, and 'a' is named for it"),
        ((dataclasses.replace(DECLARED, per="source"),), {}, "has an adapter for each source; name one of a, b, c for it"),
        (
            (dataclasses.replace(DECLARED, per="source"),),
            {"tasks": ("d",)},
            "unknown task of runs/x in tasks of .*: 'd'",
        ),
        (
            (DECLARED, dataclasses.replace(DECLARED, name="two")),
            {"adapter": dataclasses.replace(DECLARED, name="three")},
            r"several such adapters \(one, two\)",
        ),
    ],
)
def test_a_run_without_the_adapter_is_one_line(plain, adapters, fields, message):
    with pytest.raises(UserError, match=message):
        loaded(plain, trained(plain, *adapters), **fields)


def test_wrong_fields_are_one_line():
    with pytest.raises(UserError, match="AdapterFusion needs runs"):
        AdapterFusion().check()
    with pytest.raises(UserError, match="tasks of AdapterFusion are 2, but 1 run"):
        AdapterFusion(runs=("a",), tasks=("x", "y")).check()
    with pytest.raises(UserError, match="is a Prefix, which is at layer_0/attention; only adapters at linear maps"):
        adapt(Encoder(CONFIG), (), sharing=(AdapterFusion(runs=("a",), adapter=Prefix(name="p")),), routes=ROUTES)


# Runs of the tiny experiment.


@pytest.fixture(scope="module")
def fused(bert, data, tmp_path_factory):
    """A finished fusion of two runs, one of which had an adapter for each task; those runs are gone when it resumes.

    The resumed run is as if it had been killed after two steps.
    """
    folder = tmp_path_factory.mktemp("fusion")
    adapter = Bottleneck(name="task", width=2, variant="pfeiffer")
    experiment = tiny.experiment(bert, data, phases=(Phase("fusion", 4, rules=adapters_only()),))
    added = [
        finished_runs.write(folder / "one", dataclasses.replace(experiment, adapters=(adapter,))),
        finished_runs.write(folder / "two", dataclasses.replace(experiment, sharing=TaskAdapters(adapter=adapter))),
    ]
    added = [params["trunk"][ADAPTERS] for params in added]
    part = AdapterFusion(runs=(str(folder / "one"), str(folder / "two")), adapter=adapter, tasks=("", "fine"))
    tiny.write_data(folder / "more", rows=30)
    phases = (dataclasses.replace(experiment.phases[0], rules=fusion_only()),)
    sources = (experiment.sources[0], dataclasses.replace(experiment.sources[1], test_path=str(folder / "more/questions.txt")))
    evaluation = mtl_jax.Evaluation(every=4, baseline="none")
    experiment = dataclasses.replace(experiment, sources=sources, sharing=part, phases=phases, evaluation=evaluation)
    mtl_jax.train(experiment, folder / "whole")
    for name in ("one", "two"):
        (folder / name).rename(folder / f"{name} was here")
    tiny.cut(folder / "whole", folder / "resumed", 2)
    mtl_jax.train(experiment, folder / "resumed")
    return folder, experiment, added


def leaves_of(folder):
    return trees.flat(jax.device_get(open_run(folder).params))


def test_the_adapters_are_those_of_the_runs_and_stay(fused):
    folder, _, (one, two) = fused
    leaves = leaves_of(folder / "whole")
    place = f"trunk/{ADAPTERS}/sharing/{PLACE}"
    for name, leaf in one["task"]["layer_0"]["feed_forward_out"].items():
        np.testing.assert_array_equal(leaves[f"{place}/fused/run_0/{name}"], leaf)
    for name, leaf in two["sharing"]["layer_0"]["feed_forward_out"]["own"].items():
        np.testing.assert_array_equal(leaves[f"{place}/fused/run_1/{name}"].ravel(), leaf.reshape(3, -1)[2])
    value = leaves[f"{place}/own/value"]
    assert value.shape == (3, tiny.HIDDEN, tiny.HIDDEN)
    assert 1e-4 < np.abs(value - np.eye(tiny.HIDDEN)).max() < 0.2  # it trains
    record = json.loads((folder / "whole" / "sharing.json").read_text())
    assert [(run["step"], run["differing"]) for run in record["runs"].values()] == [(2, []), (2, [])]


def test_it_resumes_to_the_bit_without_the_runs(fused):
    folder, _, _ = fused
    whole, resumed = leaves_of(folder / "whole"), leaves_of(folder / "resumed")
    for path, leaf in whole.items():
        assert leaf.tobytes() == resumed[path].tobytes(), path


def test_texts_are_answered_as_in_the_evaluation_without_the_runs(fused):
    """Of tasks that share a source, and have copies of its rows."""
    folder, _, _ = fused
    results = json.loads((folder / "whole" / "results.json").read_text())["tasks"]
    for task in ("coarse", "fine"):
        scores = mtl_jax.evaluate(folder / "whole", task, str(folder / "more/questions.txt"))
        for metric, score in results[task]["test"].items():
            assert scores[metric] == pytest.approx(score, abs=1e-5), (task, metric)


def test_another_sharing_does_not_resume(fused):
    folder, experiment, _ = fused
    with pytest.raises(UserError, match=r"sharing"):
        mtl_jax.train(dataclasses.replace(experiment, sharing=sharing.MMoE()), folder / "whole")


def test_runs_that_cannot_be_fused_are_one_line(fused, bert, data, tmp_path):
    folder, experiment, _ = fused
    with pytest.raises(UserError, match=r"runs of AdapterFusion: .*one is not the workdir of a run"):
        mtl_jax.train(experiment, tmp_path / "begins")
    shutil.copytree(folder / "one was here", folder / "one")
    (folder / "one" / "results.json").unlink()
    with pytest.raises(UserError, match=r"the run in .*one is not finished"):
        mtl_jax.train(experiment, tmp_path / "begins")
    (folder / "one" / "results.json").write_text("{}")
    other = tmp_path / "deep"
    tiny.write_bert(other, layers=2)
    with pytest.raises(UserError, match="num_layers is 1, and that of this experiment is 2; they cannot share parameters"):
        mtl_jax.train(dataclasses.replace(experiment, trunk=mtl_jax.Pretrained(str(other))), tmp_path / "begins")
    assert not (tmp_path / "begins").exists()
