"""Adapters in an experiment: what trains, what it costs, what is written, and everything that training does beside."""

import dataclasses
import json
import shutil
import sys

import finished_runs
import jax
import jax.numpy as jnp
import numpy as np
import packing
import pytest
import tiny
from jitted import apply
from safetensors.numpy import load_file, save_file

import mtl_jax
from mtl_jax import (
    IA3,
    Batching,
    Bottleneck,
    Checkpoints,
    Lora,
    ParamRule,
    Phase,
    Pissa,
    Prefix,
    adapters_only,
    bitfit,
    pretrained,
)
from mtl_jax.cli import script_main
from mtl_jax.core.errors import UserError
from mtl_jax.core.trees import flat, nested
from mtl_jax.data.stream import single_phase, stream
from mtl_jax.inference import peft_export
from mtl_jax.inference.export import convert
from mtl_jax.inference.predict import evaluate, open_run, predict
from mtl_jax.sharing import TaskAdapters
from mtl_jax.training import experiment_json, sharding
from mtl_jax.training.build_step import gradient_fn
from mtl_jax.training.forward import apply_heads, encode_tokens, label_counts, mean_losses
from mtl_jax.training.frozen_params import untrained_hashes
from mtl_jax.training.metrics_log import read_metrics
from mtl_jax.training.phase_state import initial_state
from mtl_jax.training.restore import TrainedRun
from mtl_jax.training.setup import prepare
from mtl_jax.training.step import make_train_step
from mtl_jax.training.train_state import StepInputs
from mtl_jax.transfer import freezing
from mtl_jax.transfer.adapters import as_module, load_peft

LORA = Lora(name="lora", rank=2, alpha=4.0, dropout=0.1)
ALL = (
    LORA,
    IA3(name="ia3"),
    Bottleneck(name="bottleneck", width=4),
    Prefix(name="prefix", length=3),
)
ONLY = Phase("adapters", steps=6, rules=adapters_only())


def per_source(*adapters):
    return tuple(dataclasses.replace(adapter, per="source") for adapter in adapters)


def moved(prepared, by=0.3):
    """The run with adapters that already do something."""
    rng = np.random.default_rng(0)
    trunk = dict(prepared.params["trunk"])
    trunk["adapters"] = jax.tree.map(lambda leaf: leaf + by * rng.normal(size=leaf.shape).astype(np.float32), trunk["adapters"])
    return prepared._replace(params=prepared.params | {"trunk": trunk})


def without_dropout(bert, data, **changes):
    tasks = tuple(dataclasses.replace(task, dropout=0.0) for task in tiny.experiment(bert, data).tasks)
    return tiny.experiment(bert, data, **({"trunk": mtl_jax.Pretrained(str(bert), dropout=0.0), "tasks": tasks} | changes))


@pytest.fixture(scope="module")
def bert(shallow):
    return shallow


@pytest.mark.long
@pytest.mark.parametrize("own", [False, True])
def test_packed_is_unpacked(bert, data, own):
    """With every adapter at once, shared or each source its own."""
    adapters = (dataclasses.replace(LORA, dropout=0.0), *ALL[1:])
    few = tuple(dataclasses.replace(source, limit=22) for source in tiny.experiment(bert, data).sources)
    experiment = without_dropout(bert, data, sources=few, phases=(ONLY,), adapters=per_source(*adapters) if own else adapters)
    packing.assert_packing_changes_nothing(moved(prepare(experiment)))


def first_batch(prepared):
    batches = stream(prepared.corpus, prepared.experiment.batch, 0, single_phase(prepared.experiment.batch, 10))
    batch = jax.tree.map(jnp.asarray, next(batches))
    batches.close()
    return batch


def step_of(bert, data, rules, *adapters, **changes):
    prepared = prepare(tiny.experiment(bert, data, phases=(Phase("only", 5, rules=rules),), adapters=adapters, **changes))
    plan = prepared.plans[0]
    return (
        make_train_step(gradient_fn(prepared, plan), plan.optimizer, plan.mask),
        initial_state(prepared),
        first_batch(prepared),
    )


@pytest.fixture(scope="module")
def stepped(bert, data):
    """A step of adapters of every kind, each source its own: compiled, with a state and a batch for it."""
    step, state, batch = step_of(bert, data, adapters_only(), *per_source(*ALL))
    return jax.jit(step).lower(state, StepInputs(batch)).compile(), state, batch


def flops(step, state, batch):
    """As XLA counts them in the program before it is compiled."""
    return jax.jit(step).lower(state, StepInputs(batch)).cost_analysis()["flops"]


def test_the_rest_costs_nothing(bert, data, stepped):
    """No gradients, next to training everything; and no state of the optimizer, to the byte."""
    everything, part = (step_of(bert, data, rules, *per_source(*ALL)) for rules in ((ParamRule(".*"),), adapters_only()))
    assert flops(*part) < 0.85 * flops(*everything)
    _, state, _ = stepped
    trained = jax.tree.leaves((state.params["trunk"]["adapters"], state.params["heads"]))
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
    # Two moments and their age for each leaf that trains, and the number of the step.
    assert kept == 2 * sum(leaf.nbytes for leaf in trained) + 4 * len(trained) + 4


def test_the_rest_stays_as_it_is_to_the_bit(stepped):
    part, state, batch = stepped
    before = jax.device_get(state.params)
    for _ in range(3):
        state, _ = part(state, StepInputs(batch))
    same = jax.tree.map(lambda a, b: a.tobytes() == np.asarray(b).tobytes(), before, state.params)
    mask = freezing.trainable(before, adapters_only())
    assert jax.tree.all(jax.tree.map(lambda same, train: same != train, same, mask))


def test_a_source_s_adapters_have_gradients_from_its_rows_only(stepped):
    step, state, batch = stepped
    questions_only = batch._replace(labels=batch.labels | {"rating": jnp.full_like(batch.labels["rating"], jnp.nan)})
    after, _ = step(state, StepInputs(questions_only))
    moved = jax.tree.map(
        lambda a, b: [bool(half.any()) for half in np.split(np.asarray(a != b), 2)],
        state.params["trunk"]["adapters"],
        after.params["trunk"]["adapters"],
    )
    assert moved["lora"]["layer_0"]["attention"]["value"]["b"] == [False, True]
    assert moved["ia3"]["layer_0"]["feed_forward_out"]["scale"] == [False, True]
    assert moved["bottleneck"]["layer_0"]["attention"]["output"]["up_bias"] == [False, True]


def test_bitfit_trains_biases_and_heads(bert, data):
    params = prepare(tiny.experiment(bert, data, phases=(Phase("biases", 1, rules=bitfit()),))).params
    for path, trains in flat(freezing.trainable(params, bitfit())).items():
        assert trains == (path.startswith("heads/") or path.endswith("/bias")), path


@pytest.mark.long
def test_rules_over_the_gram_matrix_compare_the_adapters_gradients(bert, data):
    """Against a backward pass for each task; the adapter of a source with one task is this task's own."""
    adapters = (dataclasses.replace(LORA, dropout=0.0, per="source"), ALL[1])
    experiment = without_dropout(bert, data, phases=(ONLY,), weighting="mgda", adapters=adapters)
    prepared = moved(prepare(experiment))
    plan, state, batch = prepared.plans[0], initial_state(prepared), first_batch(prepared)
    _, metrics = jax.jit(make_train_step(gradient_fn(prepared, plan), plan.optimizer, plan.mask))(state, StepInputs(batch))
    tasks, trunk = prepared.corpus.tasks, prepared.params["trunk"]

    @jax.jit
    def losses(added):
        encoded = encode_tokens(prepared.trunk.module)(trunk | {"adapters": added}, batch, None, None)
        outputs = apply_heads(tasks, prepared.params["heads"], encoded, batch, None)
        return mean_losses(tasks, outputs, batch, label_counts(tasks, batch))

    rows, sources = jax.jacrev(losses)(trunk["adapters"]), list(prepared.corpus.splits["train"])
    for task in rows:
        alone = jax.tree.map(lambda leaf: np.reshape(leaf, (2, -1))[sources.index("questions")], rows[task][LORA.name])
        rows[task] = rows[task] | {LORA.name: alone}
    flat = [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(rows[task])]) for task in sorted(rows)]
    expected = np.array([[a @ b for b in flat] for a in flat])
    np.testing.assert_allclose(metrics.gram, expected, rtol=1e-3, atol=1e-4 * expected.max())


@pytest.mark.long
def test_one_and_eight_devices_agree(bert, data, tmp_path, monkeypatch):
    """With a state that is cut over the eight."""
    monkeypatch.setattr(sharding, "SMALLEST", 64)
    totals = {}
    adapters = per_source(dataclasses.replace(LORA, dropout=0.0), *ALL[1:])
    for devices in (1, 8):
        changes = {"devices": devices, "phases": (ONLY,), "adapters": adapters, "weighting": "upgrad"}
        mtl_jax.train(without_dropout(bert, data, sharding="fsdp", **changes), tmp_path / str(devices))
        records = [record for record in read_metrics(tmp_path / str(devices)) if record["kind"] == "train"]
        totals[devices] = [record["total"] for record in records]
    np.testing.assert_allclose(totals[8], totals[1], rtol=1e-3)


@pytest.mark.long
def test_cached_features_are_those_of_each_source_s_adapters(bert, data, tmp_path):
    """A phase that trains adapters, then one of heads on what the trunk with them gives: looked up or computed."""
    scores = []
    for cached in (True, False):
        heads = Phase("heads", 4, rules=tiny.HEADS_ONLY, cache_features=cached)
        tasks = tuple(dataclasses.replace(task, dropout=0.0) for task in tiny.experiment(bert, data).tasks)
        experiment = tiny.experiment(bert, data, phases=(ONLY, heads), adapters=per_source(*ALL), tasks=tasks)
        scores.append(mtl_jax.train(experiment, tmp_path / str(cached))["tasks"])
    for task, found in scores[0].items():
        for metric, value in found["test"].items():
            assert value == pytest.approx(scores[1][task]["test"][metric], abs=1e-4)


@pytest.fixture(scope="module")
def finished(bert, data, tmp_path_factory):
    """A run of adapters per source whose checkpoints hold no trunk, and an average; with a test file of its own."""
    folder = tmp_path_factory.mktemp("adapted")
    tiny.write_data(folder / "more", rows=40)
    shutil.copytree(bert, folder / "bert")
    first = tiny.experiment(
        folder / "bert",
        data,
        phases=(ONLY,),
        adapters=per_source(LORA, IA3(name="ia3")),
        checkpoints=Checkpoints(every=2, keep=3, frozen=False),
        averaging="ema:decay=0.5",
    )
    sources = (first.sources[0], dataclasses.replace(first.sources[1], test_path=str(folder / "more/questions.txt")))
    experiment = dataclasses.replace(first, sources=sources)
    return folder, mtl_jax.train(experiment, folder / "run"), experiment


def record_of(run, step):
    return json.loads((run / "checkpoints" / str(step) / "record" / "metadata").read_text())


def test_adapters_learn_and_each_source_its_own(finished):
    folder, results, experiment = finished
    assert results["steps"] == 6
    params, start = open_run(folder / "run").params, prepare(experiment).params
    for path in (("lora", "layer_0", "attention", "value", "b"), ("ia3", "layer_0", "feed_forward_out", "scale")):
        before, after = start["trunk"]["adapters"], params["trunk"]["adapters"]
        for name in path:
            before, after = before[name], after[name]
        first, second = np.split(np.asarray(after) - np.asarray(before), 2)
        assert first.any()
        assert second.any()
        assert not np.allclose(first, second)


def test_gone_on_with_the_same_bits(finished, tmp_path):
    """From a checkpoint in the middle of the run, which does not hold the trunk."""
    folder, expected, experiment = finished
    shutil.copytree(folder / "run", tmp_path / "cut")
    (tmp_path / "cut" / "results.json").unlink()
    for step in (4, 6):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / str(step))
    found = mtl_jax.train(experiment, tmp_path / "cut")
    assert found["tasks"] == expected["tasks"]
    records = [record_of(run, 6) for run in (folder / "run", tmp_path / "cut")]
    assert records[0]["arrays"] == records[1]["arrays"]  # shapes and sums of bits, of moments and averages, too
    jax.tree.map(np.testing.assert_array_equal, *(open_run(run).params for run in (folder / "run", tmp_path / "cut")))


def test_predictions_are_by_the_task_s_own_adapters(finished):
    folder, results, _ = finished
    found = evaluate(folder / "run", "coarse", str(folder / "more" / "questions.txt"))
    for metric, value in results["tasks"]["coarse"]["test"].items():
        assert found[metric] == pytest.approx(value, abs=1e-6)
    run = open_run(folder / "run")
    ids = np.array([run.trunk.tokenizer("who is the man ?")["input_ids"]])
    head = run.params["heads"]["coarse"]["output"]
    hidden = run.trunk.module.apply({"params": run.params["trunk"]}, ids, source=np.array([1])).hidden[0]
    probabilities = jax.nn.softmax(hidden.mean(0) @ head["kernel"] + head["bias"])
    (answer,) = predict(folder / "run", "coarse", ["who is the man ?"])
    assert answer["probability"] == pytest.approx(float(probabilities.max()), abs=1e-6)


def test_checkpoints_without_the_trunk(finished, bert, data, tmp_path):
    """Nothing frozen is in them; the trunk comes from where it was, and no other is taken."""
    folder, *_ = finished
    record = record_of(folder / "run", 6)
    for tree in ("params/", "average/mean/"):
        saved = {path.removeprefix(tree) for path in record["arrays"] if path.startswith(tree)}
        assert saved
        assert all(path.startswith(("trunk/adapters/", "heads/")) for path in saved)
    assert len(record["left_out"]) == len(jax.tree.leaves(pretrained.load(str(bert), head=None).params["trunk"]))

    shutil.copytree(folder, tmp_path / "copy")
    run = tmp_path / "copy" / "run"
    config = json.loads((run / "config.json").read_text())
    config["trunk"]["path"] = str(tmp_path / "copy" / "bert")
    (run / "config.json").write_text(json.dumps(config))
    expected = predict(folder / "run", "fine", ["a sad song"])
    assert predict(run, "fine", ["a sad song"]) == expected
    file = tmp_path / "copy" / "bert" / "model.safetensors"
    tensors = load_file(file)
    tensors["encoder.layer.0.output.dense.weight"][0, 0] += 1e-3
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"the same in trunk.path .*layer_0/feed_forward_out/kernel has changed there"):
        predict(run, "fine", ["a sad song"])
    (run / "results.json").unlink()
    with pytest.raises(UserError, match="put the trunk back that the run started from"):
        mtl_jax.train(experiment_json.from_json(config), run)
    assert not (run / "damaged").exists()


def test_parameters_that_differ_from_the_loaded_trunk_are_saved(bert, data):
    """Nor what trains in any phase, nor heads and adapters, which come from nowhere."""
    top = Phase("top", 2, rules=(ParamRule("trunk/layer_0/feed_forward_in/.*"), ParamRule(".*", train=False)))
    prepared = prepare(tiny.experiment(bert, data, phases=(ONLY, top), adapters=(LORA,)))
    params = jax.tree.map(np.array, prepared.params)
    params["trunk"]["layer_0"]["feed_forward_out"]["kernel"][0, 0] += 1e-3
    found = untrained_hashes([plan.mask for plan in prepared.plans], params, prepared.params)
    everything = set(flat(prepared.params))
    assert everything - set(found) == {
        path
        for path in everything
        if path.startswith(("heads/", "trunk/adapters/", "trunk/layer_0/feed_forward_in/"))
        or path == "trunk/layer_0/feed_forward_out/kernel"
    }


@pytest.mark.parametrize("task", ["coarse", "rating"])
def test_lora_goes_out_inside_the_kernels(finished, tmp_path, task):
    folder, *_ = finished
    convert(str(folder / "run"), tmp_path / "out", task=task)
    run, out = open_run(folder / "run"), pretrained.load(str(tmp_path / "out"))
    assert (out.head, out.unused, out.initialized) == (None, (), ())
    ids = np.array([run.trunk.tokenizer("who is the man ?")["input_ids"]])
    source = np.array([run.source_index(task)])
    expected = apply(run.trunk.module, run.params["trunk"], ids, source=source).hidden
    found = apply(out.model, out.params, ids).hidden
    np.testing.assert_allclose(found, expected, atol=1e-5)
    bare = apply(out.model, out.params | {"trunk": run.params["trunk"]}, ids).hidden
    assert not np.allclose(found, bare, atol=1e-5)


def test_adapters_by_source_go_out_for_a_task_only(finished, tmp_path):
    folder, *_ = finished
    with pytest.raises(UserError, match="adapter 'lora': each source has its own; say of which task"):
        convert(str(folder / "run"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_does_not_go_out_to_peft(finished, bert, tmp_path):
    folder, *_ = finished
    with pytest.raises(UserError, match=r"adapters lora, ia3: a PEFT directory has adapters of one kind"):
        convert(str(folder / "run"), tmp_path / "out", task="rating", peft=True)
    with pytest.raises(UserError, match="not the workdir of a run, so there are no adapters"):
        convert(str(bert), tmp_path / "out", peft=True)


def test_adapters_go_out_to_peft(bert, data, tmp_path):
    """Those of one source, on the checkpoint that the run started from."""
    pissa = Pissa(name="pissa", rank=2, per="source")
    prepared = moved(prepare(tiny.experiment(bert, data, phases=(ONLY,), adapters=(pissa,))))
    fixed = {path: leaf for path, leaf in flat(prepare(prepared.experiment).params).items() if "/fixed_" in path}
    params = nested(flat(prepared.params) | fixed)
    run = TrainedRun(prepared.experiment, tuple(prepared.corpus.tasks), prepared.trunk, params, 1, None)
    rating = run.task("rating")
    hint = peft_export.write(run, "run", tmp_path / "peft", rating, overwrite=False)
    assert "PEFT has no form for the head of rating" in hint
    loaded = load_peft(tmp_path / "peft", pretrained.load(str(bert), head=None))
    ids = np.array([run.trunk.tokenizer("who is the man ?")["input_ids"]])
    expected = run.trunk.module.apply({"params": params["trunk"]}, ids, source=np.array([run.source_index("rating")])).hidden
    np.testing.assert_allclose(loaded.model.apply({"params": loaded.params}, ids).hidden, expected, atol=1e-5)
    changed = flat(params) | {"trunk/embeddings/norm/bias": params["trunk"]["embeddings"]["norm"]["bias"] + 1}
    with pytest.raises(UserError, match=r"run: embeddings/norm/bias of its trunk is not that of the checkpoint"):
        peft_export.write(run._replace(params=nested(changed)), "run", tmp_path / "more", rating, overwrite=False)


def test_an_adapter_of_a_task_goes_out_beside_one_of_its_name(bert, data, tmp_path):
    """The name of the adapter in a sharing is not used; at a layer the two are one of the sum of their ranks."""
    lora = Lora(name="lora", rank=2)
    finished_runs.write(tmp_path / "run", tiny.experiment(bert, data, adapters=(lora,), sharing=TaskAdapters(adapter=lora)))
    convert(tmp_path / "run", tmp_path / "peft", task="rating", peft=True)
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["r"] == 4
    run, loaded = open_run(tmp_path / "run"), load_peft(tmp_path / "peft", pretrained.load(str(bert), head=None))
    ids = np.array([run.trunk.tokenizer("who is the man ?")["input_ids"]])
    module = as_module(run.trunk.module, run.source_index("rating"), "rating")
    expected = apply(module, run.params["trunk"], ids).hidden
    np.testing.assert_allclose(apply(loaded.model, loaded.params, ids).hidden, expected, atol=1e-5)


def test_flags_change_adapters(bert, data, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tiny.py", "--adapters.0.rank", "3", "--adapters.1.variant", "pfeiffer"])
    launched = []
    monkeypatch.setattr(script_main, "_launch", lambda flags, hooks: launched.append(flags))
    script_main.main(tiny.experiment(bert, data, phases=(ONLY,), adapters=(LORA, ALL[2])), description="tiny")
    (flags,) = launched
    config = experiment_json.to_json(flags.experiment)
    assert config["adapters"][0] == dataclasses.asdict(LORA) | {"rank": 3, "kind": "Lora"}
    assert config["adapters"][1]["variant"] == "pfeiffer"
    assert experiment_json.from_json(config) == flags.experiment
    prepared = prepare(flags.experiment)
    assert "adapter lora: Lora at 2 layers, 192 parameters, for all rows alike" in prepared.notes
    assert prepared.params["trunk"]["adapters"]["lora"]["layer_0"]["attention"]["query"]["a"].shape == (16, 3)


@pytest.mark.long
def test_other_adapters_than_lora_and_ia3_do_not_go_out(bert, data, tmp_path):
    phases = (dataclasses.replace(ONLY, steps=1),)
    mtl_jax.train(tiny.experiment(bert, data, phases=phases, adapters=(LORA, ALL[2])), tmp_path / "run")
    with pytest.raises(UserError, match=r"adapter 'bottleneck' is a Bottleneck, .* transformers has no class"):
        convert(str(tmp_path / "run"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapters": (dataclasses.replace(LORA, target="trunk/.*"),)}, "'trunk/.*' matches no layer; there are layer_N/att"),
        ({"adapters": (dataclasses.replace(LORA, rank=0),)}, "adapter 'lora': rank is 0"),
        ({"adapters": (LORA, LORA)}, "adapter names must differ"),
        ({"adapters": (dataclasses.replace(LORA, name="sharing"),)}, "this is where the parameters of a sharing are"),
        ({"adapters": ()}, r"the rule 'trunk/adapters/\.\*' matches no parameter"),
        ({"adapters": (LORA,), "trunk": mtl_jax.Embedding()}, "adapter 'lora' finds no place in this trunk"),
        (
            {"trunk": mtl_jax.Embedding(), "checkpoints": Checkpoints(frozen=False), "phases": (Phase("all", 1),)},
            "checkpoints.frozen is false, but a trunk from scratch",
        ),
        (
            {"trunk": mtl_jax.Pretrained("nowhere", fresh=True), "checkpoints": Checkpoints(frozen=False), "adapters": (LORA,)},
            "checkpoints.frozen is false, but a trunk from scratch",
        ),
    ],
)
def test_bad_input_is_found_before_anything_is_written(bert, data, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        mtl_jax.train(tiny.experiment(bert, data, **({"phases": (ONLY,)} | changes)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_accumulated_parts_are_the_whole_batch(bert, data):
    """The parts hold every so many rows of the batch, of all sources: each with its own adapters."""
    found = {}
    tasks = tuple(dataclasses.replace(task, dropout=0.0) for task in tiny.experiment(bert, data).tasks)
    for parts in (1, 2):
        batching = Batching(rows=8, row_length=24, examples_per_row=6, accumulate=parts)
        adapters = per_source(dataclasses.replace(LORA, dropout=0.0))
        trunk = mtl_jax.Pretrained(str(bert), dropout=0.0)
        step, state, batch = step_of(bert, data, adapters_only(), *adapters, batch=batching, tasks=tasks, trunk=trunk)
        _, found[parts] = jax.jit(step)(state, StepInputs(batch))
    np.testing.assert_allclose(found[2].total, found[1].total, rtol=1e-5)
    np.testing.assert_allclose(found[2].gradient_norm, found[1].gradient_norm, rtol=1e-4)
