"""mtl-jax merge over workdirs: of one experiment, of different tasks, and what is refused."""

import contextlib
import dataclasses
import json
import logging
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import mtl_jax
from mtl_jax import IA3, Checkpoints, Lora, Phase, adapters_only, trunks
from mtl_jax.cli import main
from mtl_jax.core.errors import UserError
from mtl_jax.inference.predict import TrainedRun, evaluate, open_run, predict
from mtl_jax.merging import Method, merge
from mtl_jax.merging.runs import corpus_of
from mtl_jax.merging.union import Member, unite
from mtl_jax.training.checkpoint_store import Store
from mtl_jax.training.experiment_json import tasks_to_json, to_json
from mtl_jax.training.setup import prepare
from mtl_jax.training.train_state import create
from mtl_jax.transfer import merge_methods


@contextlib.contextmanager
def refused(*texts):
    """The error has all of these in its one line."""
    with pytest.raises(UserError) as caught:
        yield
    for text in texts:
        assert text in str(caught.value)


def rewrite(workdir, params):
    """Puts other parameters in place of a workdir's checkpoints, as if it had been trained to them."""
    shutil.rmtree(workdir / "checkpoints")
    with contextlib.closing(Store(workdir, Checkpoints())) as store:
        store.save(12, jax.tree.map(jnp.asarray, create(params, (), (), 0)), {"step": 12}, 0.5)
        store.wait()


def params_of(workdir):
    return jax.device_get(open_run(Path(workdir)).params)


def moved(params, seed, size=0.02):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + size * rng.normal(size=leaf.shape).astype(np.float32), params)


@pytest.fixture(scope="module")
def runs(workdir, tmp_path_factory):
    """Three runs of one experiment: a real one, one a little beside it, one that is spoilt."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("a", "b", "c"):
        shutil.copytree(workdir, folder / name)
    params = params_of(workdir)
    rewrite(folder / "b", moved(params, 1))
    rewrite(folder / "c", moved(params, 2, size=3.0))
    return [str(folder / name) for name in ("a", "b", "c")]


def as_if_trained(folder, experiment, seed=0):
    """The workdir of a finished run whose parameters moved by chance."""
    prepared = prepare(experiment)
    trunks.save(prepared.trunk, folder / "trunk")
    data = prepared.corpus.describe() | {"tasks": tasks_to_json(prepared.corpus.tasks)}
    for name, value in (("config", to_json(experiment)), ("data", data), ("results", {})):
        (folder / f"{name}.json").write_text(json.dumps(value))
    (folder / "checkpoints").mkdir()
    rewrite(folder, moved(jax.device_get(prepared.params), seed))
    return str(folder)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def start_of(bert, params):
    """The parameters that the base names: the trunk."""
    return {"trunk": mtl_jax.pretrained.load(str(bert), head=None).params["trunk"]}


def test_a_soup_is_a_workdir_like_any_other(runs, data, tmp_path):
    found = merge(tmp_path / "soup", runs[:2], Method("soup"))
    expected = merge_methods.average([params_of(run) for run in runs[:2]])
    same(params_of(tmp_path / "soup"), expected)
    assert found == json.loads((tmp_path / "soup" / "results.json").read_text())
    assert found["experiment"] == "tiny-soup"
    assert found["merged"] == {"method": "soup", "sources": 2}
    answers = predict(tmp_path / "soup", "coarse", ["who is the man ?", ""])
    assert answers[0]["label"] in ("HUM", "LOC")
    assert answers[1] == {"error": "empty text"}
    everywhere = evaluate(tmp_path / "soup", "coarse", str(data / "questions.txt"))
    assert everywhere["rows"] == 150
    assert not (tmp_path / "soup" / "curves.png").exists()


def test_what_is_measured_is_what_training_would_have_measured(runs, tmp_path):
    """A soup of a run and its twin is the run, so its dev and test scores are those of the run's results.json."""
    shutil.copytree(runs[0], tmp_path / "twin")
    found = merge(tmp_path / "soup", [runs[0], str(tmp_path / "twin")], Method("soup"))
    before = json.loads((tmp_path / "twin" / "results.json").read_text())
    same(params_of(tmp_path / "soup"), params_of(runs[0]))
    assert found["best_criterion"] == pytest.approx(before["best_criterion"], abs=1e-6)
    for task, scores in before["tasks"].items():
        for split in ("dev", "test"):
            assert found["tasks"][task][split] == pytest.approx(scores[split], abs=1e-5)
        assert found["tasks"][task]["baselines"] == scores["baselines"]


def test_the_record_names_sources_steps_and_what_became_of_each_part(runs, bert, tmp_path):
    merge(tmp_path / "average", runs[:2], Method("average", weights=(3.0, 1.0)))
    record = json.loads((tmp_path / "average" / "merge.json").read_text())
    assert record["method"] == {"name": "average", "weights": [3.0, 1.0]}
    assert [source["path"] for source in record["sources"]] == runs[:2]
    assert record["sources"][1]["step"] == 12
    assert record["sources"][1]["dev"] == 0.5
    assert record["parts"] == dict.fromkeys(["trunk", "heads/coarse", "heads/fine", "heads/rating"], "average")
    a, b = (params_of(run) for run in runs[:2])
    same(params_of(tmp_path / "average"), merge_methods.average([a, b], [3, 1]))
    merge(tmp_path / "wise", runs[:1], Method("wise", alpha=0.25), base=str(bert))
    record = json.loads((tmp_path / "wise" / "merge.json").read_text())
    assert record["method"] == {"name": "wise", "alpha": 0.25}
    assert list(record["base"]["files"]) == ["model.safetensors"]
    assert len(record["base"]["files"]["model.safetensors"]) == 64
    assert record["parts"]["heads/fine"] == f"as in {runs[0]}"


def test_wise_goes_between_the_start_and_the_run(runs, bert, tmp_path):
    run = params_of(runs[0])
    merge(tmp_path / "wise", runs[:1], Method("wise", alpha=0.25), base=str(bert))
    found = params_of(tmp_path / "wise")
    same(found["trunk"], merge_methods.interpolate(start_of(bert, run)["trunk"], run["trunk"], 0.25))
    same(found["heads"], run["heads"])  # a checkpoint has none to go from
    merge(tmp_path / "between", runs[1:2], Method("wise"), base=runs[0])
    same(params_of(tmp_path / "between"), merge_methods.interpolate(run, params_of(runs[1]), 0.5))


def test_greedy_soup_leaves_out_what_hurts_on_dev(runs, tmp_path):
    found = merge(tmp_path / "greedy", [runs[2], *runs[:2]], Method("greedy"))
    record = json.loads((tmp_path / "greedy" / "merge.json").read_text())
    taken = {trial["source"]: trial["taken"] for trial in record["tried"]}
    assert sorted(taken) == sorted(runs)
    assert not taken[runs[2]]
    chosen = [trial["source"] for trial in record["tried"] if trial["taken"]]
    same(params_of(tmp_path / "greedy"), merge_methods.average([params_of(run) for run in chosen]))
    last = [trial["dev"] for trial in record["tried"] if trial["taken"]][-1]
    assert found["best_criterion"] == pytest.approx(last, abs=1e-6)
    best = json.loads((Path(runs[0]) / "results.json").read_text())["best_criterion"]
    assert found["best_criterion"] >= best - 1e-6


@pytest.mark.parametrize(
    ("method", "by_hand"),
    [
        (Method("arithmetic", scale=(0.5,)), lambda base, runs: merge_methods.arithmetic(base, runs, 0.5)),
        (Method("arithmetic", scale=(0.5, -1.0)), lambda base, runs: merge_methods.arithmetic(base, runs, [0.5, -1.0])),
        (Method("ties"), lambda base, runs: merge_methods.ties(base, runs, 0.2)),
        (Method("ties", keep=0.5, scale=(2.0,)), lambda base, runs: merge_methods.ties(base, runs, 0.5, 2.0)),
        (Method("dare", drop=0.5, seed=3), lambda base, runs: merge_methods.dare(base, runs, 0.5, jax.random.key(3))),
        (Method("dare_ties"), lambda base, runs: merge_methods.dare(base, runs, 0.9, jax.random.key(0), keep=0.2)),
    ],
)
def test_task_vectors_from_a_checkpoint(runs, bert, tmp_path, method, by_hand):
    """The heads, of which the checkpoint has none, are averaged."""
    merge(tmp_path / "merged", runs[:2], method, base=str(bert))
    a, b = (params_of(run) for run in runs[:2])
    found = params_of(tmp_path / "merged")
    expected = by_hand(start_of(bert, a), [{"trunk": a["trunk"]}, {"trunk": b["trunk"]}])
    same(found["trunk"], expected["trunk"])
    same(found["heads"], merge_methods.average([a["heads"], b["heads"]]))


# Runs of different tasks


@pytest.fixture(scope="module")
def of_tasks(bert, data, tmp_path_factory):
    """Runs of one trunk: ratings, and questions."""
    folder = tmp_path_factory.mktemp("tasks")
    return [
        as_if_trained(
            folder / name,
            tiny.experiment(bert, data, name=name, only=only, weighting="fixed", weights=dict.fromkeys(only, 2.0)),
            seed,
        )
        for seed, (name, only) in enumerate({"ratings": ("rating",), "questions": ("coarse", "fine")}.items())
    ]


def test_runs_of_different_tasks_share_a_trunk_and_keep_their_heads(of_tasks, bert, tmp_path):
    found = merge(tmp_path / "both", of_tasks, Method("arithmetic", scale=(0.4,)), base=str(bert))
    ratings, questions = (params_of(run) for run in of_tasks)
    merged = params_of(tmp_path / "both")
    same(merged["heads"], {**ratings["heads"], **questions["heads"]})
    trunks = [{"trunk": run["trunk"]} for run in (ratings, questions)]
    same(merged["trunk"], merge_methods.arithmetic(start_of(bert, ratings), trunks, 0.4)["trunk"])
    assert list(found["tasks"]) == ["rating", "coarse", "fine"]
    assert found["experiment"] == "ratings+questions-arithmetic"
    assert "value" in predict(tmp_path / "both", "rating", ["a great film"])[0]
    assert predict(tmp_path / "both", "fine", ["who is the man ?"])[0]["label"].split(":")[0] in ("HUM", "LOC")
    again = merge(tmp_path / "again", [str(tmp_path / "both"), of_tasks[0]], Method("soup"))
    assert list(again["tasks"]) == ["rating", "coarse", "fine"]


def test_greedy_needs_the_same_tasks(of_tasks, tmp_path):
    with refused("all must have the same tasks; use soup"):
        merge(tmp_path / "both", of_tasks, Method("greedy"))


def test_one_name_for_two_tasks_is_refused(runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "other")
    data = json.loads((tmp_path / "other" / "data.json").read_text())
    data["tasks"]["coarse"]["column"] = "fine"
    (tmp_path / "other" / "data.json").write_text(json.dumps(data))
    with refused("other: task 'coarse' differs from that in ", "/a: column is 'fine', but 'coarse' in"):
        merge(tmp_path / "merged", [runs[0], str(tmp_path / "other")], Method("soup"))
    assert not (tmp_path / "merged").exists()


def test_other_dev_rows_under_one_name_are_refused(runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "other")
    data = json.loads((tmp_path / "other" / "data.json").read_text())
    data["sources"]["ratings"]["dev"]["sha256"] = "0" * 64
    (tmp_path / "other" / "data.json").write_text(json.dumps(data))
    with refused("other: source 'ratings' has other dev rows than in ", "/a: one of the runs may have trained on them"):
        merge(tmp_path / "merged", [runs[0], str(tmp_path / "other")], Method("soup"))


def test_training_rows_that_the_other_run_is_tested_on_are_said(bert, data, tmp_path, caplog):
    """Alone, each run may learn from what the other is tested on."""
    rows = (data / "ratings.tsv").read_text().splitlines()
    first, members = tiny.experiment(bert, data), []
    for name, part in (("mine", rows[:80]), ("other", [rows[0], *rows[2:120]])):
        (tmp_path / f"{name}.tsv").write_text("\n".join(part) + "\n")
        source = dataclasses.replace(first.sources[0], name=name, path=f"{tmp_path}/{name}.tsv", cut_seed=len(name))
        task = dataclasses.replace(first.tasks[0], name=f"rating_{name}", source=name)
        found = prepare(tiny.experiment(bert, data, sources=(source,), tasks=(task,)))
        run = TrainedRun(found.experiment, found.corpus.tasks, found.trunk, None, 0, 0.0)
        members.append(Member(name, run, found.corpus.describe()))
    caplog.set_level(logging.WARNING, logger="mtl_jax")
    corpus_of(unite(members, "soup"), members)
    assert "source mine: " in caplog.text
    assert "of its training rows occur in dev or test of another source, and a run has trained on them" in caplog.text


# Where the data is not there any more


def test_without_the_data_it_is_merged_and_not_measured(runs, data, tmp_path):
    for number in (0, 1):
        shutil.copytree(runs[number], tmp_path / str(number))
        config = (tmp_path / str(number) / "config.json").read_text()
        (tmp_path / str(number) / "config.json").write_text(config.replace(str(data), "/nowhere"))
    sources = [str(tmp_path / "0"), str(tmp_path / "1")]
    assert merge(tmp_path / "soup", sources, Method("soup")) is None
    assert "no such file" in json.loads((tmp_path / "soup" / "merge.json").read_text())["not_measured"]
    assert not (tmp_path / "soup" / "results.json").exists()
    assert predict(tmp_path / "soup", "coarse", ["who is the man ?"])[0]["label"] in ("HUM", "LOC")
    with refused("method greedy needs the runs' dev rows: ", "/nowhere/ratings.tsv: no such file"):
        merge(tmp_path / "greedy", sources, Method("greedy"))


# What is refused


def test_an_unfinished_run_is_refused(runs, bert, tmp_path):
    shutil.copytree(runs[0], tmp_path / "begun")
    (tmp_path / "begun" / "results.json").unlink()
    for sources, base in (([runs[0], str(tmp_path / "begun")], ""), ([runs[0]], str(tmp_path / "begun"))):
        with refused("begun: the run is not finished (results.json is missing); the command"):
            merge(tmp_path / "merged", sources, Method("wise" if base else "soup"), base=base)


def test_other_shapes_constants_and_vocabularies_are_refused(runs, tmp_path, monkeypatch):
    """Each is named with what differs, before anything is written."""

    def changed(name, config=lambda raw: raw, words=lambda text: text):
        folder = tmp_path / name
        tiny.write_bert(folder, layers=1)
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config(raw)))
        (folder / "tokenizer.json").write_text(words((folder / "tokenizer.json").read_text()))
        return str(folder)

    method = Method("wise")
    with monkeypatch.context() as wide:
        wide.setattr(tiny, "FEED_FORWARD", 64)
        wider = changed("wide")
    with refused("/a: trunk/layer_0/feed_forward_in/bias is of shape (32,) there, and of shape (64,) in "):
        merge(tmp_path / "x", runs[:1], method, base=wider)
    with refused("/a: its trunk's num_heads is 2, and that of ", " is 4; they cannot be merged"):
        merge(tmp_path / "x", runs[:1], method, base=changed("heads", lambda raw: raw | {"num_attention_heads": 4}))
    with refused("/a: its vocabulary differs from that of ", "the token 'god' is absent, but 4 in "):
        merge(tmp_path / "x", runs[:1], method, base=changed("words", words=lambda text: text.replace('"good"', '"god"')))
    roberta = changed("roberta", lambda raw: raw | {"model_type": "roberta", "pad_token_id": 0})
    with refused("/a: its trunk is of the family bert, and that of ", "roberta of roberta; only models of one"):
        merge(tmp_path / "x", runs[:1], method, base=roberta)
    assert not (tmp_path / "x").exists()


def test_numbers_that_are_not_finite_are_refused(runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "nan")
    params = params_of(runs[0])
    params["heads"]["coarse"]["output"]["bias"] = np.float32([np.nan, 0])
    rewrite(tmp_path / "nan", params)
    with refused("nan: heads/coarse/output/bias has numbers that are not finite"):
        merge(tmp_path / "merged", [runs[0], str(tmp_path / "nan")], Method("soup"))


ADAPTED = {"phases": (Phase("adapters", 1, rules=adapters_only()),)}
LORA, OWN = Lora(name="lora", rank=2), IA3(name="ia3", per="source")


def with_names(tasks):
    """The tasks, of which coarse has names of its labels for readers."""
    return tuple(dataclasses.replace(t, label_names={"HUM": "human"}) if t.name == "coarse" else t for t in tasks)


@pytest.fixture(scope="module")
def adapted(bert, data, tmp_path_factory):
    """Runs with adapters, by name."""
    folder, first = tmp_path_factory.mktemp("adapted"), tiny.experiment(bert, data, **ADAPTED)
    changes = {
        "lora": {"adapters": (LORA,)},
        "twin": {"adapters": (dataclasses.replace(LORA, dropout=0.1),), "tasks": with_names(first.tasks)},
        "stronger": {"adapters": (dataclasses.replace(LORA, alpha=4.0),)},
        "own": {"adapters": (OWN,)},
        "turned": {"adapters": (OWN,), "sources": first.sources[::-1]},
        "ratings": {"adapters": (OWN,), "only": ("rating",)},
        "questions": {"adapters": (OWN,), "only": ("coarse", "fine")},
    }
    return {name: as_if_trained(folder / name, dataclasses.replace(first, **change)) for name, change in changes.items()}


@pytest.mark.parametrize(
    ("first", "second", "texts"),
    [
        ("lora", "stronger", ("stronger: adapter 'lora' differs from that in ", "alpha is 4.0, but 16.0 in ")),
        (
            "lora",
            "own",
            ("own: its adapters are ia3, and those of ", "lora; mtl-jax convert merges Lora and IA3 into the kernels"),
        ),
        (
            "own",
            "turned",
            ("turned: each source has separate adapters (ia3), and its sources are questions, ratings, those of ",),
        ),
        ("ratings", "questions", ("its sources are questions, those of ", "/ratings ratings; with --task, mtl-jax convert")),
    ],
)
def test_adapters_of_one_shape_that_mean_something_else_are_refused(adapted, tmp_path, first, second, texts):
    with refused(*texts):
        merge(tmp_path / "x", [adapted[first], adapted[second]], Method("soup"))
    with refused(*texts):
        merge(tmp_path / "x", [adapted[first]], Method("wise"), base=adapted[second])


def test_adapters_that_mean_the_same_are_merged(adapted, bert, tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="mtl_jax")
    sources = [adapted["lora"], adapted["twin"]]
    merge(tmp_path / "soup", sources, Method("soup"))
    same(params_of(tmp_path / "soup"), merge_methods.average([params_of(source) for source in sources]))
    assert "lora: the two matrices are merged separately" in caplog.text
    with refused(f"{bert} is a checkpoint without adapters, but ", "/lora has lora: mtl-jax convert merges"):
        merge(tmp_path / "x", sources, Method("arithmetic"), base=str(bert))


def test_a_directory_counts_once_and_is_a_run_or_a_checkpoint(runs, bert, tmp_path):
    with refused("/a/: the same directory as ", "/a; each source counts once"):
        merge(tmp_path / "x", [runs[0], runs[0] + "/"], Method("soup"))
    with refused("/a: the same directory as "):
        merge(tmp_path / "x", [runs[0]], Method("wise"), base=runs[0])
    shutil.copytree(runs[0], tmp_path / "begun")
    (tmp_path / "begun" / "data.json").unlink()
    with refused("begun: neither a workdir of a run (data.json is missing) nor a checkpoint"):
        merge(tmp_path / "x", [runs[0], str(tmp_path / "begun")], Method("soup"))


def test_only_what_a_merge_wrote_is_replaced(runs, tmp_path):
    target = tmp_path / "soup"
    merge(target, runs[:2], Method("soup"))
    (target / "notes.txt").write_text("mine")
    with refused("soup: not written by a merge: notes.txt; move that away"):
        merge(target, runs[:2], Method("soup"), overwrite=True)
    (target / "notes.txt").unlink()
    shutil.copytree(runs[1], target / "trunk" / "run")
    with refused("soup: the source ", "/trunk/run is in it; choose another directory"):
        merge(target, [runs[0], str(target / "trunk" / "run")], Method("soup"), overwrite=True)
    (tmp_path / "link").symlink_to(target)
    merge(tmp_path / "link", runs[:2], Method("average", weights=(1.0, 0.0)), overwrite=True)
    same(params_of(target), params_of(runs[0]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "soup"]


def test_a_merged_model_is_not_trained_in_place(runs, bert, data, tmp_path):
    merge(tmp_path / "soup", runs[:2], Method("soup"))
    for allow in (False, True):
        with refused("soup: a merged model; to train it, begin from it in another --workdir by --init-from.path"):
            mtl_jax.train(tiny.experiment(bert, data), tmp_path / "soup", allow_config_change=allow)


def test_what_is_there_is_not_replaced_unasked(runs, tmp_path):
    with refused("/a: not empty, and not written by a merge"):
        merge(runs[0], runs[1:], Method("soup"), overwrite=True)
    with refused("/a: the source ", "/a is in it"):
        merge(runs[0], runs[:2], Method("soup"), overwrite=True)
    merge(tmp_path / "soup", runs[:2], Method("soup"))
    before = {path: path.read_bytes() for path in (tmp_path / "soup").rglob("*") if path.is_file()}
    with refused("it holds a merged model already; choose another directory, or give --overwrite"):
        merge(tmp_path / "soup", runs[:2], Method("soup"))
    assert {path: path.read_bytes() for path in (tmp_path / "soup").rglob("*") if path.is_file()} == before
    merge(tmp_path / "soup", runs[:2], Method("average", weights=(1.0, 0.0)), overwrite=True)
    same(params_of(tmp_path / "soup"), params_of(runs[0]))
    assert [path.name for path in tmp_path.iterdir()] == ["soup"]


def test_a_merge_that_fails_leaves_nothing(runs, tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mtl_jax.merging.runs.results.write", broken)
    with refused("soup: cannot be written (No space left on device)"):
        merge(tmp_path / "soup", runs[:2], Method("soup"))
    assert not list(tmp_path.iterdir())


def test_the_command(runs, bert, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mtl-jax", "merge", *arguments])
        try:
            main.console()
        except SystemExit as stopped:
            return stopped.code, *capsys.readouterr()
        return 0, *capsys.readouterr()

    code, output, log = run(str(tmp_path / "soup"), *runs[:2], "--method", "average", "--weights", "1", "2")
    assert code == 0, log
    assert "2 runs merged by average: dev criterion" in output
    assert "trunk: average" in log
    code, output, _ = run("--help")
    assert code == 0
    for flag in ("--method", "--base", "--weights", "--alpha", "--scale", "--keep", "--drop", "--trunk-only", "--overwrite"):
        assert flag in output
    code, _, log = run(str(tmp_path / "x"), runs[0], str(bert), "--method", "soup")
    assert code == 2
    assert log.splitlines()[-1].startswith(f"error: {runs[0]} is a workdir of a run, and {bert} is a checkpoint")
    code, _, log = run(str(tmp_path / "x"), *runs[:2], "--method", "tie")
    assert code == 2
    assert "unknown method 'tie' (did you mean 'ties'?)" in log
