import collections
import dataclasses
import json

import numpy as np
import pytest
import tiny

import mtl_jax
from mtl_jax import Batching, Checkpoints, Evaluation, Optimizer, ParamRule, Phase, reporting
from mtl_jax.core.errors import UserError
from mtl_jax.core.progress import Progress
from mtl_jax.data.examples import Examples
from mtl_jax.training import evaluation, results_table
from mtl_jax.training.checkpoint_store import Store
from mtl_jax.training.counts import evaluations_and_checkpoints
from mtl_jax.training.evaluation import criterion, score_outputs, undefined
from mtl_jax.training.metrics_log import read_metrics


def records(workdir, kind):
    return [record for record in read_metrics(workdir) if record["kind"] == kind]


@pytest.fixture(scope="module")
def beside():
    """What the progress bar of the finished run was told of beside its steps."""
    return []


@pytest.fixture(scope="module")
def finished(trunk, data, tmp_path_factory, beside):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "beside", lambda self, work, times=1: beside.extend([work] * times))
        return workdir, mtl_jax.train(tiny.experiment(trunk, data), workdir)


def test_a_run_leaves_its_files(finished):
    workdir, found = finished
    names = {path.name for path in workdir.iterdir()}
    files = {"config.json", "versions.json", "data.json", "baselines.json", "metrics.jsonl", "results.json", "curves.png"}
    assert names == files | {"train_sketches.npz", "trunk", "tensorboard", "checkpoints"}
    assert json.loads((workdir / "results.json").read_text()) == found
    assert any(path.name.startswith("events") for path in (workdir / "tensorboard").iterdir())
    assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((workdir / "versions.json").read_text())["jax"]


def test_what_is_no_step_is_left_out_of_the_rate(finished, beside):
    expected = evaluations_and_checkpoints(tiny.experiment("", "")) | {"compilation": 2}  # of a phase each
    assert dict(collections.Counter(beside)) == expected == {"compilation": 2, "evaluation": 4, "checkpoint": 2}


def test_every_step_is_logged_once_and_evaluations_come_on_time(finished):
    workdir, _ = finished
    assert [record["step"] for record in records(workdir, "train")] == list(range(1, 13))
    assert [record["step"] for record in records(workdir, "dev")] == [4, 6, 8, 12]
    assert [record["phase"] for record in records(workdir, "train")] == [0] * 6 + [1] * 6
    assert all(record["weight/fine"] == 1.0 for record in records(workdir, "train"))


def test_what_was_seen_of_each_source_is_logged(finished):
    workdir, found = finished
    seen = found["seen"]
    assert list(seen) == ["ratings", "questions"]
    train = records(workdir, "train")
    for source, facts in seen.items():
        assert facts["rows"] == 4 * 12  # half of 8 in each of 12 steps
        assert facts["examples"] == train[-1][f"seen/{source}/examples"]
        assert facts["passes"] == train[-1][f"seen/{source}/passes"] == pytest.approx(facts["examples"] / 120, rel=0.1)
        assert [record[f"seen/{source}/rows"] for record in train] == list(range(4, 52, 4))
    assert seen["ratings"]["examples"] == sum(record["examples/rating"] for record in train)
    assert sum(facts["tokens"] for facts in seen.values()) == found["training_tokens"]
    assert found["padding"] == pytest.approx(1 - found["training_tokens"] / (12 * 8 * 24), abs=1e-4)


def test_the_best_checkpoint_is_kept_and_tested(finished):
    workdir, found = finished
    dev = {record["step"]: record["criterion"] for record in records(workdir, "dev")}
    assert found["best_criterion"] == max(dev.values())
    assert dev[found["best_step"]] == found["best_criterion"]
    steps = {int(path.name) for path in (workdir / "checkpoints").iterdir()}
    assert found["best_step"] in steps
    assert {12, 10, 8} <= steps <= {12, 10, 8, found["best_step"]}
    by_hand = np.mean(
        [found["tasks"][t]["dev"][m] for t, m in (("rating", "pearson"), ("coarse", "accuracy"), ("fine", "accuracy"))]
    )
    assert found["best_criterion"] == pytest.approx(by_hand, abs=1e-6)


def test_programs_are_compiled_once_each(finished):
    _, found = finished
    # features, two train steps (look-up and tokens), two evaluations
    assert found["compiled_programs"] == 5


def test_a_second_run_is_done_at_once(finished, trunk, data):
    workdir, found = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    assert mtl_jax.train(tiny.experiment(trunk, data), workdir) == found
    assert (workdir / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["results.json", "ablation.json"])
def test_a_report_or_an_ablation_is_not_a_finished_run(tmp_path, name):
    (tmp_path / name).write_text('{"tasks": {}}')
    with pytest.raises(UserError, match=rf"not the workdir of a run \({name} is there, config\.json is not\)"):
        mtl_jax.train(tiny.experiment("bert", "data"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_another_configuration_is_refused_with_the_difference(finished, trunk, data):
    workdir, _ = finished
    changed = tiny.experiment(trunk, data, optimizer=Optimizer(learning_rate=3e-5))
    with pytest.raises(UserError, match=r"another configuration: optimizer\.learning_rate was 0\.01, is 3e-05\. Choose"):
        mtl_jax.train(changed, workdir)


def test_a_changed_configuration_goes_on_when_asked_to(trunk, data, tmp_path):
    mtl_jax.train(tiny.experiment(trunk, data), tmp_path / "run")
    phases = (Phase("heads", steps=6, rules=tiny.HEADS_ONLY), Phase("everything", steps=10))
    longer = tiny.experiment(trunk, data, phases=phases)
    found = mtl_jax.train(longer, tmp_path / "run", allow_config_change=True)
    assert found["steps"] == 16
    assert [record["step"] for record in records(tmp_path / "run", "train")] == list(range(1, 17))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["phases"][1]["steps"] == 10


def test_training_learns(trunk, data, tmp_path):
    phases = (Phase("everything", steps=80),)
    seldom = {"evaluation": Evaluation(every=40), "checkpoints": Checkpoints(every=40)}
    found = mtl_jax.train(tiny.experiment(trunk, data, phases=phases, **seldom), tmp_path)
    assert found["tasks"]["coarse"]["test"]["accuracy"] == 1.0
    assert found["tasks"]["rating"]["test"]["pearson"] > 0.7


def test_one_and_eight_devices_agree(shallow, data, tmp_path):
    """20 steps, dropout off; sums and counts are divided once, after the sum over devices."""
    losses = {}
    for devices in (1, 8):
        experiment = tiny.experiment(
            mtl_jax.Pretrained(str(shallow), dropout=0.0),
            data,
            phases=(Phase("heads", steps=5, rules=tiny.HEADS_ONLY), Phase("everything", steps=15)),
            batch=Batching(rows=16, row_length=24, examples_per_row=6),
            evaluation=Evaluation(every=20),
            checkpoints=Checkpoints(every=20),
            devices=devices,
        )
        mtl_jax.train(experiment, tmp_path / str(devices))
        names = ("loss/rating", "loss/coarse", "loss/fine", "total", "gradient_norm")
        losses[devices] = [[record[name] for name in names] for record in records(tmp_path / str(devices), "train")]
    assert len(losses[1]) == 20
    np.testing.assert_allclose(losses[8], losses[1], rtol=2e-4)


def test_dropout_and_rules_with_state_run_too(trunk, data, tmp_path):
    found = mtl_jax.train(tiny.experiment(trunk, data, weighting="dwa"), tmp_path)
    weights = [record["weight/rating"] for record in records(tmp_path, "train")]
    assert weights[:2] == [1.0, 1.0]
    assert len(set(weights)) > 2
    assert found["weighting"] == "dwa"


def test_a_phase_may_have_its_own_weights(trunk, data, tmp_path):
    source_first = (
        Phase("source", steps=3, weights={"rating": 1.0, "coarse": 0.0, "fine": 0.0}),
        Phase("target", steps=3, weights={"rating": 0.0, "coarse": 1.0, "fine": 1.0}),
    )
    mtl_jax.train(tiny.experiment(trunk, data, phases=source_first), tmp_path)
    assert [record["weight/rating"] for record in records(tmp_path, "train")] == [1.0] * 3 + [0.0] * 3


def test_only_some_tasks(trunk, data, tmp_path):
    found = mtl_jax.train(tiny.experiment(trunk, data, only=("rating",)), tmp_path)
    assert list(found["tasks"]) == ["rating"]


def test_early_stopping(trunk, data, tmp_path):
    """With a rate of 0 dev never changes after the first evaluation: ties count as no worse, so make it fall."""
    experiment = tiny.experiment(
        trunk,
        data,
        phases=(Phase("everything", steps=200),),
        optimizer=Optimizer(name="sgd", learning_rate=3.0, clip_norm=0.1, schedule="constant", b1=0.0),
        evaluation=Evaluation(every=2, patience=2, baseline="none"),
    )
    found = mtl_jax.train(experiment, tmp_path)
    dev = [record["criterion"] for record in records(tmp_path, "dev")]
    assert found["steps"] == 2 * len(dev) < 200
    assert max(dev[-2:]) < max(dev[:-2]) == found["best_criterion"]


def test_a_loss_that_is_not_finite_stops_the_run(trunk, data, tmp_path):
    experiment = tiny.experiment(
        trunk,
        data,
        phases=(Phase("everything", steps=50),),
        optimizer=Optimizer(name="sgd", learning_rate=1e8, clip_norm=0.0, schedule="constant", warmup=1.0),
        checkpoints=Checkpoints(every=1, keep=3),
    )
    with pytest.raises(UserError, match=r"step \d+: (the loss of task '\w+' is (nan|inf)|the gradient is not finite)"):
        mtl_jax.train(experiment, tmp_path)
    assert not (tmp_path / "results.json").exists()
    last = records(tmp_path, "train")[-1]["step"]
    store = Store(tmp_path, experiment.checkpoints, read_only=True)
    assert store.steps()[-1] < last
    params = store.restore_params(store.steps()[-1])
    store.close()
    import jax

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_dev_scores_do_not_depend_on_the_batch_size(trunk, data, tmp_path):
    """Means are over examples, also with an uneven last batch."""
    found = {}
    for rows in (2, 8):
        experiment = tiny.experiment(trunk, data, batch=Batching(rows=8, row_length=24, examples_per_row=6))
        prepared = mtl_jax.training.setup.prepare(experiment)
        mesh = prepared.mesh
        from mtl_jax.training import evaluation
        from mtl_jax.training.forward import encode_tokens

        apply = evaluation.make_outputs(encode_tokens(prepared.trunk.module), prepared.corpus.tasks, mesh)
        dev = prepared.corpus.splits["dev"]
        batching = dataclasses.replace(experiment.batch, rows=rows)
        outputs = evaluation.predict(apply, prepared.params, prepared.corpus.tasks, list(dev.values()), batching, mesh)
        found[rows] = evaluation.score(prepared.corpus.tasks, dev, outputs)
    for task, metrics in found[2].items():
        assert metrics == pytest.approx(found[8][task], rel=1e-5)


def test_criteria():
    tasks = (tiny.experiment("", "").tasks)[:2]
    scores = {"rating": {"pearson": 0.5, "spearman": 0.1}, "coarse": {"accuracy": 0.9, "macro_f1": 0.7}}
    assert criterion("mean", tasks, scores) == pytest.approx(0.7)
    assert criterion("coarse", tasks, scores) == 0.9
    assert criterion("rating/spearman", tasks, scores) == 0.1


@pytest.mark.parametrize("name", ["mean", "rating", "rating/pearson"])
def test_a_metric_that_is_not_defined_counts_as_0_and_a_broken_model_as_nothing(name):
    """Constant predictions say as much as none; where the loss is not finite, nothing may look better than it."""
    tasks, nan = (tiny.experiment("", "").tasks)[:2], float("nan")
    scores = {"rating": {"loss": 1.0, "pearson": nan, "spearman": nan}, "coarse": {"loss": 1.0, "accuracy": 0.9}}
    assert criterion(name, tasks, scores) == pytest.approx(0.45 if name == "mean" else 0.0)
    (line,) = undefined(tasks, scores, "dev").values()
    assert line.startswith("dev pearson of task 'rating' is not defined")
    scores["rating"]["loss"] = nan
    assert np.isnan(criterion(name, tasks, scores))


def test_a_run_says_what_is_not_defined(trunk, data, tmp_path, monkeypatch, caplog):
    """The first evaluation is broken, the second has constant predictions: logged, null in the files, and never the best."""
    caplog.set_level("WARNING", logger="mtl_jax")
    kept, broken = evaluation.score, [{"loss": np.nan, "pearson": np.nan}, {"pearson": np.nan}]

    def score(*arguments):
        scores = kept(*arguments)
        return scores | {"rating": scores["rating"] | (broken.pop(0) if broken else {})}

    monkeypatch.setattr(evaluation, "score", score)
    experiment = tiny.experiment(trunk, data, evaluation=Evaluation(every=4, baseline="constant"))
    found = mtl_jax.train(experiment, tmp_path)
    told = [record.getMessage() for record in caplog.records if "defined" in record.message or "criterion" in record.message]
    assert told == [
        "step 4: the dev pearson of task 'rating' is not defined (its predictions or labels are constant, or not finite); "
        "it counts as 0 where checkpoints are compared",
        "step 4: the dev criterion is not a number, so this checkpoint cannot be the best",
    ]
    dev = records(tmp_path, "dev")
    assert [np.isnan(record["rating/pearson"]) for record in dev] == [True, True, False, False]
    assert [np.isnan(record["criterion"]) for record in dev] == [True, False, False, False]
    assert found["best_step"] > 4
    assert found["tasks"]["rating"]["baselines"]["constant"]["pearson"] is None  # the mean is a constant
    for name in ("results.json", "baselines.json"):
        assert "NaN" not in (tmp_path / name).read_text()
    assert "| undefined " in results_table.table([found])
    reporting.write([tmp_path], tmp_path / "report")
    assert "NaN" not in (tmp_path / "report" / "results.json").read_text()
    lost = json.loads(json.dumps(found))
    lost["tasks"]["rating"]["test"]["pearson"] = None
    assert "rating: test pearson is not defined" in results_table.table([lost])
    assert "Beats every baseline" not in results_table.table([lost])


def test_scores_leave_out_examples_without_a_label():
    task = tiny.experiment("", "").tasks[0]
    outputs, labels = np.array([[1.0], [2.0], [9.0]], np.float32), np.array([2.0, 4.0, np.nan], np.float32)
    examples = Examples(task.source, 0, [np.zeros(1, np.int32)] * 3, {task.name: labels})
    assert score_outputs(task, outputs, examples)["mean_absolute_error"] == 0.0


def test_the_table_says_what_was_lost(finished):
    _, found = finished
    found = json.loads(json.dumps(found))
    found["tasks"]["coarse"]["test"]["accuracy"] = 0.25
    found["tasks"]["coarse"]["baselines"]["constant"]["accuracy"] = 0.5
    text = results_table.table([found])
    assert "coarse: did not beat majority / mean (0.2500 against 0.5000)" in text
    found["tasks"]["coarse"]["baselines"]["constant"]["accuracy"] = 0.25
    assert "coarse: ties with majority / mean (0.2500 against 0.2500)" in results_table.table([found])
    found["tasks"]["coarse"]["baselines"]["constant"]["accuracy"] = 0.5
    other = json.loads(json.dumps(found))
    other["tasks"]["coarse"]["test"]["accuracy"] = 0.75
    assert "0.5000 ± 0.3536" in results_table.table([found, other])
    fewer = found | {"tasks": {"coarse": found["tasks"]["coarse"]}}
    both = results_table.table([found, other]), results_table.table([fewer])
    assert results_table.tables([found, fewer, other]) == "\n\n".join(both)


def test_parameter_rules_are_checked_before_anything_is_written(trunk, data, tmp_path):
    rules = (ParamRule("trunk/encoder/.*", train=False), ParamRule(".*"))
    with pytest.raises(UserError, match=r"'trunk/encoder/\.\*' matches no parameter"):
        mtl_jax.train(tiny.experiment(trunk, data, phases=(Phase("a", 1, rules=rules),)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
