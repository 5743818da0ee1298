"""Every experiment script, as a user starts it, for two steps."""

import json
import subprocess
from pathlib import Path

import processes
import pytest
import tiny_decoder

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
FLAGS = {
    "quickstart.py": [
        *("--phases.0.steps", "1", "--phases.1.steps", "1", "--batch.rows", "12"),
        *(flag for number in range(6) for flag in (f"--sources.{number}.limit", "8")),
    ],
    "shared_embedding.py": ["--phases.0.steps", "2"],
}


def limited(sources: int, limit: int) -> list[str]:
    return [flag for number in range(sources) for flag in (f"--sources.{number}.limit", str(limit))]


# These read public data sets that are not fetched.
ON_DATA = {
    "snips.py": limited(1, 300),
    "social_ner.py": limited(2, 400),
    "tweeteval.py": limited(5, 40),
    "questions.py": limited(1, 60),
    "multi30k.py": [*limited(1, 60), "--trunk.vocabulary", "700", "--trunk.width", "16", "--tasks.0.max-new-tokens", "9"],
}
SELDOM = {"shared_embedding.py"}  # the quickstart's code with a smaller trunk
TASKS = ("stsb", "mrpc", "rte", "cola")
COMPARISONS = {  # of several runs
    *("weighting_methods.py", "pairs.py", "summarize.py", "multi30k_transfer.py", "adapters.py", "few_shot_transfer.py"),
    *("ablate_weights.py", "target_rules.py", "deidentified.py", "private_training.py", "lora_variants.py", "dissimilar.py"),
    "decoder_multitask.py",
}
MATRIX = {f"affinity_{part}.py" for part in ("tasks", "trainings", "matrix", "evaluation")}  # test_affinity_matrix.py
FEW_LABELS = {f"few_labels{part}.py" for part in ("", "_methods", "_peer", "_sets", "_translate")}  # test_few_labels.py


def test_every_script_is_here():
    assert {path.name for path in EXPERIMENTS.glob("*.py")} == set(FLAGS) | set(ON_DATA) | COMPARISONS | MATRIX | FEW_LABELS


def start(script: str, *flags: str) -> subprocess.CompletedProcess:
    return processes.run(EXPERIMENTS / script, *flags, timeout=3600)  # some train dozens of runs


@pytest.mark.long
def test_weighting_methods(wheels, tmp_path):
    """One rule beside two tasks alone; started again, it has nothing left to train. A rule that is none is one line."""
    flags = ["--workdir", str(tmp_path), "--tasks", "tweets", "movies", "--steps", "2", "--limit", "60", "--seeds", "3"]
    done = start("weighting_methods.py", *flags, "--rules", "mgda")
    assert done.returncode == 0, done.stderr
    runs = ["alone-movies-3", "alone-tweets-3", "mgda-plain-3", "mgda-weighted-3"]
    assert sorted(p.name for p in tmp_path.glob("*-3")) == runs
    table = (tmp_path / "table.md").read_text()
    assert table in done.stdout
    cells = [[cell.strip() for cell in line.split("|")] for line in table.splitlines()]
    assert [row[1:3] for row in cells[2:]] == [["(each alone)", ""], ["mgda", "plain"]]
    assert cells[0][-3:-1] == ["change %, heads plain", "change %, heads weighted"]
    again = start("weighting_methods.py", *flags, "--rules", "mgda")
    assert table in again.stdout
    assert "is done" in again.stderr
    wrong = start("weighting_methods.py", *flags, "--rules", "mgd")
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1].startswith("error: unknown weighting 'mgd'")


@pytest.mark.long
def test_ablate_weights(wheels, tmp_path):
    """Two points of the simplex at once, and their page."""
    flags = ["--parts", "heads", "--points", "2", "2", "--seeds", "1", "1", "--heads-steps", "2", "--limit", "60"]
    done = start("ablate_weights.py", "--workdir", str(tmp_path), *flags)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in sorted(tmp_path.glob("heads/runs/*/results.json"))] == ["results.json"] * 2
    assert "editorials" in (tmp_path / "heads" / "report.html").read_text()
    wrong = start("ablate_weights.py", "--parts", "head")
    assert wrong.stderr.splitlines()[-1].startswith("error: unknown --parts 'head' (did you mean 'heads'?)")


@pytest.mark.long
def test_adapters(wheels, tmp_path):
    """Two ways on one task; started again, nothing is trained or measured anew. A way that is none is one line."""
    flags = ["--workdir", str(tmp_path), "--tasks", "trec_fine", "--steps", "2", "--limit", "60", "--timed", "1"]
    done = start("adapters.py", *flags, "--ways", "lora", "bitfit")
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "table.md").read_text()
    assert table in done.stdout
    assert [line.split("|")[2].strip() for line in table.splitlines()[2:]] == ["lora", "bitfit"]
    costs = json.loads((tmp_path / "lora-trec_fine-0" / "costs.json").read_text())
    assert costs["trained"] < 0.01
    assert costs["optimizer_bytes"] < costs["checkpoint_bytes"] < 4e6
    again = start("adapters.py", *flags, "--ways", "lora", "bitfit")
    assert table in again.stdout
    wrong = start("adapters.py", *flags, "--ways", "lroa")
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1].startswith("error: unknown ways 'lroa'")


@pytest.mark.long
def test_few_shot_transfer(wheels, tmp_path):
    """Two ways for two numbers of rows, of which the fewer are among the more; started again, it only draws."""
    flags = ["--workdir", str(tmp_path), "--rows", "4", "8", "--seeds", "3", "--limit", "60", "--source-steps", "1"]
    flags += ["--steps", "1", "--head-steps", "2"]
    done = start("few_shot_transfer.py", *flags, "--ways", "frozen", "sequential")
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "table.md").read_text()
    assert table in done.stdout
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == [
        "frozen features",
        "movies + tweets, then target",
    ]
    assert (tmp_path / "few_shot.png").stat().st_size > 1000
    runs = {path.parent.name for path in tmp_path.glob("*/results.json")}
    assert runs == {"source-3", *(f"{way}-{rows}-3" for way in ("frozen", "sequential") for rows in (4, 8))}
    assert json.loads((tmp_path / "sequential-4-3" / "init_from.json").read_text())["step"] == 1
    again = start("few_shot_transfer.py", *flags, "--ways", "frozen", "sequential")
    assert table in again.stdout
    assert again.stderr.count("is done") == 5
    wrong = start("few_shot_transfer.py", *flags, "--ways", "frosen")
    assert wrong.stderr.splitlines()[-1].startswith("error: unknown ways 'frosen' (did you mean 'frozen'?)")


@pytest.mark.long
def test_target_rules(wheels, tmp_path):
    """A rule with rows held out, on both kinds of sources; started again, it only writes the table."""
    flags = ["--workdir", str(tmp_path), "--rows", "16", "--seeds", "3", "--limit", "40", "--source-rows", "30"]
    flags += ["--steps", "2", "--ways", "alone", "auto_lambda"]
    done = start("target_rules.py", *flags)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "table.md").read_text()
    assert table in done.stdout
    names = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert names == ["target alone", "auto_lambda, movies + tweets", "auto_lambda, the same, ratings shuffled"]
    again = start("target_rules.py", *flags)
    assert table in again.stdout
    assert again.stderr.count("is done") == 3
    wrong = start("target_rules.py", *flags, "--sources", "helpfull")
    assert wrong.stderr.splitlines()[-1].startswith("error: unknown sources 'helpfull' (did you mean 'helpful'?)")


@pytest.mark.parametrize("script", [pytest.param(name, marks=pytest.mark.long) if name in SELDOM else name for name in FLAGS])
def test_two_steps(script, wheels, tmp_path):
    done = start(script, "--workdir", str(tmp_path / "run"), *FLAGS[script])
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["steps"] == 2
    assert all(task in done.stdout for task in results["tasks"])


@pytest.mark.long
@pytest.mark.parametrize("script", ON_DATA)
def test_two_steps_on_public_data(script, wheels, shared_data, tmp_path, monkeypatch):
    monkeypatch.setenv("MTL_JAX_DATA", str(shared_data))
    flags = ["--phases.0.steps", "2", "--batch.rows", "8", *ON_DATA[script]]
    done = start(script, "--workdir", str(tmp_path / "run"), *flags)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["steps"] == 2
    assert all(task in done.stdout for task in results["tasks"])


@pytest.mark.long
def test_pairs(wheels, shared_data, tmp_path, monkeypatch):
    """Alone, together, and from there by itself: nine runs of a step or two, and a table with a row for each task."""
    monkeypatch.setenv("MTL_JAX_DATA", str(shared_data))
    flags = ["--limit", "30", "--together", "1", "--alone", "1", "--then", "1", "--workdir", str(tmp_path)]
    done = start("pairs.py", *flags)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "table.md").read_text()
    assert table in done.stdout
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == ["stsb", "mrpc", "rte", "cola"]
    steps = {path.parent.name: json.loads(path.read_text())["steps"] for path in tmp_path.glob("*/results.json")}
    assert steps == {"together-0": 1} | {f"{way}-{task}-0": n for way, n in (("alone", 1), ("then", 2)) for task in TASKS}


@pytest.mark.long
def test_dissimilar(wheels, shared_data, tmp_path, monkeypatch):
    """Each task alone, two ways to share, and two that are made from earlier runs; every way fits the trunk."""
    monkeypatch.setenv("MTL_JAX_DATA", str(shared_data))
    ways = ["hard", "mmoe", "adapter fusion, frozen", "groups"]
    flags = ["--workdir", str(tmp_path), "--ways", *ways, "--alone", "1", "--limit", "30"]
    done = start("dissimilar.py", *flags)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "table.md").read_text()
    assert table in done.stdout
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == ["alone", *ways]
    wrong = start("dissimilar.py", "--ways", "mmo")
    assert wrong.returncode == 2
    assert "unknown way in ways: 'mmo' (did you mean 'mmoe'?)" in wrong.stderr


@pytest.mark.long
def test_lora_variants(wheels, shared_data, tmp_path, monkeypatch):
    """Two variants of a step; the table is made again without training."""
    monkeypatch.setenv("MTL_JAX_DATA", str(shared_data))
    flags = [
        "--workdir",
        str(tmp_path),
        "--tasks",
        "trec",
        "--steps",
        "1",
        "--rows",
        "40",
        "--seeds",
        "2",
        "--rates",
        "0.001",
        "0.01",
    ]
    done = start("lora_variants.py", *flags, "--variants", "lora", "pissa")
    assert done.returncode == 0, done.stderr
    again = start("lora_variants.py", *flags, "--variants", "lora", "pissa", "--only-table")
    assert again.stdout.splitlines()[-4:] == done.stdout.splitlines()[-4:]
    assert [line.split("|")[2].strip() for line in again.stdout.splitlines()[-2:]] == ["lora", "pissa"]


@pytest.mark.long
def test_decoder_multitask(wheels, shared_data, tmp_path, monkeypatch):
    """Every way for a step on a tiny decoder; the table is made again without training. A way that is none is one line."""
    monkeypatch.setenv("MTL_JAX_DATA", str(shared_data))
    tiny_decoder.write_llama(tmp_path / "llama")
    flags = ["--workdir", str(tmp_path / "runs"), "--model", str(tmp_path / "llama"), "--limit", "40", "--captions", "6"]
    done = start("decoder_multitask.py", *flags, "--steps", "1")
    assert done.returncode == 0, done.stderr
    again = start("decoder_multitask.py", *flags, "--steps", "1", "--only-table")
    assert again.stdout.splitlines()[-5:] == done.stdout.splitlines()[-5:]
    assert [line.split("|")[1].strip() for line in again.stdout.splitlines()[-3:]] == ["alone", "together", "own"]
    wrong = start("decoder_multitask.py", "--ways", "alon")
    assert wrong.stderr.splitlines()[-1].startswith("error: unknown ways 'alon' (did you mean 'alone'?)")


@pytest.mark.long
def test_private_training(wheels, shared_data, tmp_path, monkeypatch):
    """A budget and no privacy; a budget below 0 is one line."""
    monkeypatch.setenv("MTL_JAX_DATA", str(shared_data))
    flags = ["--limit", "60", "--steps", "3", "--epsilons", "8", "0", "--workdir", str(tmp_path)]
    done = start("private_training.py", *flags)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "table.md").read_text()
    assert table in done.stdout
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == ["8", "none"]
    privacy = json.loads((tmp_path / "epsilon-8-0" / "results.json").read_text())["privacy"]
    assert 7.9 < privacy["epsilon"] <= 8
    wrong = start("private_training.py", "--epsilons", "-1")
    assert wrong.stderr.splitlines()[-1].startswith("error: epsilons has -1; it must be above 0")


@pytest.mark.long
def test_summarize(wheels, shared_data, tmp_path, monkeypatch):
    """Both starts on both sets of data, a step each; a name that is none is one line."""
    monkeypatch.setenv("MTL_JAX_DATA", str(shared_data))
    flags = ["--limit", "20", "--steps", "1", "--workdir", str(tmp_path)]
    done = start("summarize.py", *flags)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "table.md").read_text()
    assert table in done.stdout
    assert [[cell.strip() for cell in line.split("|")[1:3]] for line in table.splitlines()[2:]] == [
        [data, begins] for data in ("scitldr", "aeslc") for begins in ("minilm", "scratch", "first sentence")
    ]
    wrong = start("summarize.py", *flags, "--starts", "minilmm")
    assert wrong.stderr.splitlines()[-1].startswith("error: unknown starts 'minilmm' (did you mean 'minilm'?)")


@pytest.mark.long
def test_multi30k_transfer(shared_data, tmp_path, monkeypatch):
    """Every way for a few pairs, and a figure."""
    monkeypatch.setenv("MTL_JAX_DATA", str(shared_data))
    flags = ["--pairs", "40", "--lambdas", "0.5", "--steps", "2", "--limit", "60", "--workdir", str(tmp_path)]
    done = start("multi30k_transfer.py", *flags)
    assert done.returncode == 0, done.stderr
    ways = [line.split("|")[1].strip() for line in (tmp_path / "table.md").read_text().splitlines()[2:]]
    last = "both of the target's captions"
    assert ways == ["target alone", "source, then target", "lambda 0.5", "lambda 0.5 falling", last]
    assert (tmp_path / "lambda.png").stat().st_size > 1000
    # Elsewhere, with these scores: nothing is left to train.
    scores, elsewhere = str(tmp_path / "scores.json"), tmp_path / "elsewhere"
    again = start("multi30k_transfer.py", *flags[:-1], str(elsewhere), "--scores", scores)
    assert again.stdout == done.stdout
    assert {path.name for path in elsewhere.iterdir()} == {"scores.json", "table.md", "lambda.png"}
    other = start("multi30k_transfer.py", "--scores", scores)
    assert other.stderr.splitlines()[-1] == f"error: {scores} is of 2 steps and limit 60, not of 1500 and 0"


def test_without_the_data_a_script_says_what_to_do(wheels, tmp_path, monkeypatch):
    monkeypatch.delenv("MTL_JAX_DATA", raising=False)
    done = start("snips.py", "--workdir", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "MTL_JAX_DATA" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_deidentified(wheels, shared_data, tmp_path, monkeypatch):
    """All parts on a few rows; started again, nothing is trained. A part that is none is one line."""
    pytest.importorskip("faker")
    monkeypatch.setenv("MTL_JAX_DATA", str(shared_data))
    flags = ["--workdir", str(tmp_path), "--ner-steps", "2", "--steps", "2", "--limit", "60", "--mails", "24"]
    done = start("deidentified.py", *flags)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "table.md").read_text() in done.stdout
    again = start("deidentified.py", *flags)
    assert again.stderr.count("is done") == 4
    wrong = start("deidentified.py", "--parts", "prices")
    assert wrong.stderr.splitlines()[-1].startswith("error: unknown parts 'prices'")
