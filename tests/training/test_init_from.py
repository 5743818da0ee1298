"""Runs that begin with the parameters of another run, or of a checkpoint."""

import dataclasses
import json
import logging
import shutil

import finished_runs
import jax
import numpy as np
import pytest
import tiny
import tiny_seq2seq

import mtl_jax
from mtl_jax import Checkpoints, Classification, Evaluation, InitFrom, Phase, sharing
from mtl_jax.core.errors import UserError
from mtl_jax.core.trees import flat
from mtl_jax.inference.predict import open_run
from mtl_jax.training import init_from
from mtl_jax.training.setup import prepare

ONE = (Phase("heads", steps=4, rules=tiny.HEADS_ONLY),)


@pytest.fixture(scope="module")
def begun(bert, data, workdir):
    """Of the finished run: its trunk and its head of coarse, which is called kind here."""
    init = InitFrom(str(workdir), renames=(("heads/coarse/", "heads/kind/"),), leave_out=("heads/fine/.*",))
    experiment = tiny.experiment(bert, data, init_from=init)
    tasks = (experiment.tasks[0], dataclasses.replace(experiment.tasks[1], name="kind"))
    prepared = prepare(dataclasses.replace(experiment, tasks=tasks))
    return prepared, *init_from.load_parameters(prepared)


def test_what_is_in_the_source_is_loaded_and_everything_is_accounted_for(begun, workdir):
    before, after, record, line = begun
    source = {path: np.asarray(leaf) for path, leaf in flat(open_run(workdir).params).items()}
    for path, leaf in flat(after.params).items():
        old = path.replace("heads/kind/", "heads/coarse/")
        np.testing.assert_array_equal(leaf, source[old])
        assert record["loaded"][path] == old
    assert record["initialised"] == ()
    assert set(record["left_out"]) == {path for path in source if path.startswith("heads/fine/")}
    assert any((np.asarray(leaf) != flat(before.params)[path]).any() for path, leaf in flat(after.params).items())
    assert record["step"] == open_run(workdir).step
    assert f"beginning from {workdir}, step {record['step']}: {len(record['loaded'])} parameters loaded; 4 left out" in line


def test_from_a_checkpoint(bert, data, tmp_path):
    tiny.write_bert(tmp_path / "other", tiny.bert_tensors(seed=5, layers=1), layers=1)
    prepared = prepare(tiny.experiment(bert, data, init_from=InitFrom(str(tmp_path / "other"))))
    after, record, _ = init_from.load_parameters(prepared)
    expected = flat({"trunk": mtl_jax.pretrained.load(str(tmp_path / "other"), head=None).params["trunk"]})
    for path, leaf in expected.items():
        np.testing.assert_array_equal(flat(after.params)[path], leaf)
    heads = flat({"heads": prepared.params["heads"]})
    assert set(record["initialised"]) == set(heads)
    for path, leaf in heads.items():
        assert flat(after.params)[path] is leaf


def test_gone_on_without_the_source(bert, data, workdir, tmp_path, caplog):
    """The same bits; the frozen trunk is in the checkpoints, since it is not that of trunk.path."""
    source, whole, cut = tmp_path / "source", tmp_path / "whole", tmp_path / "cut"
    shutil.copytree(workdir, source)
    experiment = tiny.experiment(
        bert,
        data,
        phases=ONE,
        init_from=InitFrom(str(source), leave_out=("heads/.*",)),
        checkpoints=Checkpoints(every=2, keep=3, frozen=False),
        evaluation=Evaluation(every=4, baseline="none"),
    )
    with caplog.at_level(logging.INFO):
        expected = mtl_jax.train(experiment, whole)
    assert "beginning from" in caplog.text
    record = json.loads((whole / "init_from.json").read_text())
    assert record["path"] == str(source)
    trunk = flat({"trunk": open_run(workdir).params["trunk"]})
    for path, leaf in flat({"trunk": open_run(whole).params["trunk"]}).items():
        np.testing.assert_array_equal(leaf, trunk[path])

    shutil.copytree(whole, cut)
    (cut / "results.json").unlink()
    shutil.rmtree(cut / "checkpoints" / "4")
    shutil.rmtree(source)
    found = mtl_jax.train(experiment, cut)
    assert found["tasks"] == expected["tasks"]
    assert json.loads((cut / "init_from.json").read_text()) == record
    jax.tree.map(np.testing.assert_array_equal, open_run(cut).params, open_run(whole).params)


def test_what_cannot_begin_a_run_is_found_before_anything_is_written(bert, data, workdir, tmp_path):
    folder = tmp_path / "run"

    def refused(init, message, **changes):
        with pytest.raises(UserError, match=message):
            mtl_jax.train(tiny.experiment(bert, data, phases=ONE, init_from=init, **changes), folder)
        assert not folder.exists()

    unfinished = tmp_path / "unfinished"
    shutil.copytree(workdir, unfinished)
    (unfinished / "results.json").unlink()
    refused(InitFrom(str(unfinished)), r"unfinished is not finished .*or choose one of its steps by init_from.step")
    refused(InitFrom(str(workdir), step="7"), "there is no checkpoint of step 7; there are ")
    refused(InitFrom(str(tmp_path / "nothing")), "nothing")
    tiny.write_bert(tmp_path / "bert", layers=1)
    refused(InitFrom(str(tmp_path / "bert"), step="4"), "init_from.step is '4', but .* is not the workdir")
    other = tmp_path / "other"  # of the same shapes
    shutil.copytree(workdir, other)
    raw = json.loads((other / "trunk" / "config.json").read_text())
    (other / "trunk" / "config.json").write_text(json.dumps(raw | {"model_type": "roberta", "pad_token_id": 0}))
    refused(
        InitFrom(str(other)), "/other: its trunk is of the family roberta, and that of this experiment of bert; only models of"
    )
    marian = tiny_seq2seq.write_marian(tmp_path / "marian")
    refused(InitFrom(str(marian), leave_out=("head/.*",)), r"trunk/\S+ is \S+ here and \S+ in .*marian")

    words = json.loads((tmp_path / "bert" / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["good"], vocabulary["bad"] = vocabulary["bad"], vocabulary["good"]
    (tmp_path / "bert" / "tokenizer.json").write_text(json.dumps(words))
    refused(InitFrom(str(tmp_path / "bert")), "its vocabulary differs from that of this experiment: the token '(good|bad)'")
    tasks = (Classification(name="rating", source="questions", column="fine"), *tiny.experiment(bert, data).tasks[1:])
    refused(InitFrom(str(workdir)), r"heads/rating/output/\w+ is .* here and .* in", tasks=tasks)


COPIES = (
    sharing.TopLayers(own=1),
    sharing.CrossStitch(layers=1),
    sharing.Sluice(layers=1),
    sharing.MMoELayers(layers=1),
    sharing.PLE(levels=1),
)


@pytest.mark.parametrize("part", COPIES, ids=lambda part: type(part).__name__)
def test_copies_of_layers_are_copies_of_the_loaded_ones(bert, data, workdir, part):
    init = InitFrom(str(workdir), subtree="trunk")
    prepared = prepare(tiny.experiment(bert, data, phases=ONE, sharing=part, init_from=init))
    after, record, line = init_from.load_parameters(prepared)
    before, trunk = flat(prepared.params["trunk"]), flat(after.params["trunk"])
    expected = flat(prepared.trunk.module.add(after.params["trunk"], jax.random.key(0)))
    assert trunk.keys() == expected.keys()
    for path, leaf in trunk.items():
        np.testing.assert_array_equal(leaf, expected[path])
    changed = {f"trunk/{path}" for path in trunk if "adapters/" in path and not np.array_equal(trunk[path], before[path])}
    assert changed
    assert set(record["made_again"]) == changed
    assert not changed & {*record["loaded"], *record["initialised"]}
    assert f"{len(changed)} not in it and made again from the loaded trunk (trunk/adapters/...)" in line


def test_an_adapter_starts_from_the_loaded_trunk_unless_it_is_loaded(bert, data, workdir, tmp_path):
    experiment = tiny.experiment(bert, data, phases=ONE, adapters=(mtl_jax.Pissa(name="pissa", rank=2),))
    init = InitFrom(str(workdir), subtree="trunk")
    after, record, _ = init_from.load_parameters(prepare(dataclasses.replace(experiment, init_from=init)))
    layer = next(path.rpartition("/")[0] for path in record["made_again"] if path.endswith("fixed_a"))
    leaves = flat(after.params)
    kernel = leaves[layer.replace("adapters/pissa/", "") + "/kernel"]
    left, values, right = np.linalg.svd(kernel, full_matrices=False)
    product = experiment.adapters[0].scale * leaves[f"{layer}/fixed_a"] @ leaves[f"{layer}/fixed_b"]
    np.testing.assert_allclose(product, left[:, :2] * values[:2] @ right[:2], atol=1e-4)

    source = finished_runs.write(tmp_path / "pissa", experiment)
    init = InitFrom(str(tmp_path / "pissa"), subtree="trunk")
    after, record, _ = init_from.load_parameters(prepare(dataclasses.replace(experiment, init_from=init)))
    assert record["made_again"] == ()
    for path, leaf in flat(source["trunk"]).items():
        np.testing.assert_array_equal(flat(after.params["trunk"])[path], leaf)
