"""Hosts that differ, or of which one fails: the comparison of facts, and two real processes over loopback.

As a script it is one of the two: python tests/training/test_hosts.py FOLDER ADDRESS INDEX
"""

import contextlib
import dataclasses
import json
import os
import re
import socket
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from processes import Process

import mtl_jax
from mtl_jax import Batching, Embedding, Experiment, Optimizer, Phase
from mtl_jax.cli.run_command import run as run_command
from mtl_jax.cli.scripts import import_parts
from mtl_jax.core import locks
from mtl_jax.core.errors import UserError
from mtl_jax.core.parts import kinds
from mtl_jax.training import fingerprint, hosts, loop, train
from mtl_jax.training import mesh as meshes
from mtl_jax.training.experiment_json import to_json
from mtl_jax.training.setup import prepare
from mtl_jax.trunks import TrunkConfig

FILES = {
    "questions": "data/questions.txt",
    "tokenizer": "bert/tokenizer.json",
    "config": "bert/config.json",
    "generation": "bert/generation_config.json",
}
OWN = """import dataclasses
import mtl_jax

@dataclasses.dataclass(frozen=True)
class Mine(mtl_jax.Embedding):
    scale = {scale}
"""
CASES = ("rate", "part", "missing", "fault", "locked", "apart")


def facts_of(experiment: Experiment, workdir: Path, whole: bool = False):
    """As the other hosts get them."""
    prepared = prepare(experiment) if whole else None
    return json.loads(json.dumps(fingerprint.facts(to_json(experiment), workdir, prepared)))


def write(folder: Path, **changed) -> Path:
    """A tiny checkpoint and data, with other lines of questions.txt or other contents of the checkpoint's files."""
    tiny.write_bert(folder / "bert", tiny.bert_tensors(seed=changed.pop("seed", 0), layers=1), layers=1)
    tiny.write_data(folder / "data", rows=60)
    for file, change in changed.items():
        path = folder / FILES[file]
        path.write_text(change(path.read_text() if path.exists() else ""))
    return folder


def swapped(text: str) -> str:
    """The lines in another order."""
    return "\n".join(reversed(text.splitlines())) + "\n"


def relabelled(text: str) -> str:
    """The first line with another of the labels."""
    other = "HUM:man" if text.startswith("LOC") else "LOC:city"
    return other + text[text.index(" ") :]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("first"))
    with contextlib.chdir(folder):  # this fixture comes before the one below, which would go back to where this one went
        return facts_of(experiment_in(folder), folder / "run", whole=True)


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Experiments name their files by relative paths: those of two hosts have the same."""
    monkeypatch.chdir(".")


def experiment_in(folder: Path, **changes) -> Experiment:
    os.chdir(folder)
    return tiny.experiment("bert", "data", **changes)


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"questions": relabelled}, "column (coarse|fine) of source questions, split (train|dev|test),"),
        ({"questions": swapped}, "column [a-z]+ of source questions, split train,"),
        ({"questions": lambda text: text.partition("\n")[2]}, "number of rows of source questions, split (train|dev|test),"),
        ({"questions": lambda text: text.replace(" the ", " The ")}, "column text of source questions, split train,"),
        ({"tokenizer": lambda text: text.replace('"film"', '"movie"')}, "tokenizer"),
        (
            {"config": lambda text: text.replace("1e-12", "1e-06")},
            r"trunk\.config\.json\.layer_norm_eps 1e-06,",
        ),
        ({"generation": lambda _: '{"num_beams": 3}'}, r"trunk\.generation_config\.json"),
        ({"seed": 1}, "parameter trunk/[a-z/]+"),
    ],
    ids=["label", "order", "fewer rows", "a text", "tokenizer", "config.json", "generation_config.json", "weights"],
)
def test_other_files_are_named(first, tmp_path, changed, field):
    other = facts_of(experiment_in(write(tmp_path, **changed)), tmp_path / "run", whole=True)
    assert re.match(rf"host 1 has {field} .*host 0 has .*: start the same command", hosts.difference([first, other]))


def test_the_same_files_are_the_same(first, tmp_path):
    assert facts_of(experiment_in(write(tmp_path)), tmp_path / "run", whole=True) == first


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"optimizer": Optimizer(learning_rate=3e-5)}, "optimizer.learning_rate 3e-05, host 0 has 0.01"),
        ({"seed": 3}, "seed 3, host 0 has 0"),
        ({"only": ("fine",)}, 'only ["fine"], host 0 has []'),
        ({"phases": (Phase("everything", steps=6),)}, 'phases ["everything"], host 0 has ["heads", "everything"]'),
        ({"batch": Batching(rows=16, row_length=24, examples_per_row=6)}, "batch.rows 16, host 0 has 8"),
        ({"dtype": "bfloat16"}, 'dtype "bfloat16", host 0 has "auto"'),
        ({"name": "x" * 1000}, f'name "{"x" * 99}..., host 0 has "tiny"'),
    ],
)
def test_another_configuration_is_named(tmp_path, changes, line):
    one, other = (facts_of(tiny.experiment("bert", "data", **each), tmp_path) for each in ({}, changes))
    assert hosts.difference([one, one, other]).startswith(f"host 2 has {line}: start")
    assert hosts.difference([one, other, other]).startswith(f"host 1 has {line} (1 more differs from host 0): start")


def test_tasks_are_told_apart_by_their_names(tmp_path):
    whole = tiny.experiment("bert", "data")
    fewer = dataclasses.replace(whole, tasks=whole.tasks[:2])
    line = hosts.difference([facts_of(whole, tmp_path), facts_of(fewer, tmp_path)])
    assert line.startswith('host 1 has tasks ["rating", "coarse"], host 0 has ["rating", "coarse", "fine"]:')


def test_other_versions_and_another_state_of_the_code_are_named(tmp_path, monkeypatch):
    one = facts_of(tiny.experiment("bert", "data"), tmp_path)
    assert dict(one)["version of jax"] == jax.__version__
    monkeypatch.setattr(fingerprint.workdirs, "versions", lambda: {"jax": "0.0.1", "platform": "Linux-1"})
    assert 'version of jax "0.0.1"' in hosts.difference([[each for each in one if each[0] == "version of jax"], versions()])
    (tmp_path / "loop.py").write_text("x = 1")
    monkeypatch.setattr(fingerprint.importlib.resources, "files", lambda _: tmp_path)
    before = fingerprint.versions()["code of mtl_jax"]
    (tmp_path / "loop.py").write_text("x = 2")
    assert fingerprint.versions()["code of mtl_jax"] != before


def versions():
    return [["version of jax", fingerprint.versions()["version of jax"]]]


def test_flags_that_change_numbers_are_compared_and_places_of_files_are_not():
    plain = fingerprint.environment({})
    assert plain == fingerprint.environment({"XLA_FLAGS": "--xla_dump_to=/tmp/1 --xla_gpu_per_fusion_autotune_cache_dir=/a"})
    flags = ("--xla_cpu_enable_fast_math=true", "--xla_gpu_deterministic_ops=true")
    assert fingerprint.environment({"XLA_FLAGS": " ".join(flags)}) == fingerprint.environment(
        {"XLA_FLAGS": " ".join(flags[::-1])}
    )
    for name in fingerprint.VARIABLES:
        assert fingerprint.environment({name: "--xla_other=1"}) != plain
    for name, value in (("jax_default_matmul_precision", "float32"), ("jax_enable_x64", True)):
        before = jax.config.values[name]
        jax.config.update(name, value)
        try:
            assert fingerprint.environment({}) == plain | {name: str(value)}
        finally:
            jax.config.update(name, before)
    assert plain["devices of a host"] == "8 x cpu cpu"


def test_a_workdir_that_is_not_the_same_is_named(tmp_path):
    experiment = tiny.experiment("bert", "data")
    for name, steps in (("one", (2, 4)), ("two", (2,)), ("three", (2, 4))):
        for step in steps:
            (tmp_path / name / "checkpoints" / str(step)).mkdir(parents=True)
    (tmp_path / "three" / "results.json").write_text("{}")
    one, two, three = (facts_of(experiment, tmp_path / name) for name in ("one", "two", "three"))
    assert hosts.difference([one, two]).startswith('host 1 has checkpoints in the workdir "2", host 0 has "2, 4":')
    assert hosts.difference([one, three]).startswith('host 1 has results.json in the workdir "sha256 ')
    assert hosts.difference([[*one, ["tokenizer", "a"]], one]).startswith('host 1 has tokenizer null, host 0 has "a":')


def test_digests_see_values_order_lengths_and_columns():
    one, two = np.array([1, 2], np.int32), np.array([3], np.int32)
    tokens = [
        fingerprint.array_digest(*each) for each in ([[one, two]], [[two, one]], [[one]], [[np.array([1]), np.array([2, 3])]])
    ]
    tokens += [fingerprint.array_digest([one, two], types) for types in (None, [one, two], [one * 0, two * 0])]
    tokens += [fingerprint.array_digest(np.array(labels)) for labels in ([0, 1, 1], [1, 0, 1], [[0, 1, 1]], [], [0.5])]
    assert len(set(tokens)) == len(tokens)
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": None}]
    assert fingerprint.column_digests(rows) == fingerprint.column_digests([dict(reversed(row.items())) for row in rows])
    for other in (rows[::-1], [rows[0], {"text": "b", "label": "None"}], [rows[0] | {"text": ["a"]}, rows[1]]):
        assert fingerprint.column_digests(other) != fingerprint.column_digests(rows)


@pytest.mark.parametrize(
    ("errors", "line"),
    [
        ([None, None], ""),
        (["x: no such file", "x: no such file"], "x: no such file"),
        ([None, "x: no such file", None], "host 1: x: no such file"),
        ([None, "x: no such file", "x: no such file"], "host 1, 2: x: no such file"),
        (["locked", "x: no such file", "locked"], "host 0, 2: locked (host 1: another error)"),
    ],
)
def test_what_failed_is_said_once_for_all(errors, line):
    assert hosts.failures(errors) == line


def test_one_process_compares_nothing():
    asked = []
    assert hosts.make_and_compare(lambda: 3, asked.append) == 3
    assert not asked
    assert hosts.gather({"a": 1}) == [{"a": 1}]
    with pytest.raises(UserError, match="bad"), hosts.fail_together():
        raise UserError("bad")


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """What two processes printed for each case, and their exit codes after the last."""
    folder = write(tmp_path_factory.mktemp("pair"))
    for case in (*CASES, "later"):
        write(folder / f"{case}-0")
        write(folder / f"{case}-1")
    (folder / "missing-1" / "data" / "questions.txt").unlink()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    pair = [Process(__file__, folder, address, index, devices=2, apart=True) for index in range(2)]
    outputs = [process.communicate() for process in pair]
    told = [dict(json.loads(line) for line in out.splitlines() if line.startswith('["')) for out, _ in outputs]
    assert all(each.keys() == set(CASES) for each in told), outputs
    return folder, told, [process.returncode for process in pair], [error for _, error in outputs]


@pytest.mark.parametrize(
    ("case", "line"),
    [
        ("rate", "host 1 has optimizer.learning_rate 0.0001, host 0 has 0.01: start"),
        ("part", 'host 1 has parts.Mine.sha256 "'),
        ("missing", "host 1: data/questions.txt: no such file or directory"),
        ("locked", "host 0: ../run-locked: process "),
    ],
)
def test_all_end_with_the_same_line_and_nothing_is_written(ended, case, line):
    folder, (first, second), *_ = ended
    assert first[case] == second[case]
    assert first[case].startswith(line)
    assert not (folder / f"run-{case}").exists()


def test_a_fault_of_one_host_ends_the_others_in_a_line(ended):
    _, (first, second), *_ = ended
    assert first["fault"] == "host 1: ZeroDivisionError: division by zero"
    assert second["fault"] == "ZeroDivisionError"


def test_a_workdir_that_hosts_do_not_share_is_refused(ended):
    folder, told, *_ = ended
    for index, each in enumerate(told):
        assert each["apart"] == (
            "run-apart: host 1 does not see the files that host 0 writes there; --workdir must be shared by all"
        )
        assert not (folder / f"apart-{index}" / "run-apart" / "config.json").exists()


def test_an_error_while_the_others_wait_in_collective_work_ends_them_too(ended):
    _, _, codes, errors = ended
    assert codes == [2, 2]
    assert errors[0].splitlines()[-1] == "error: host 1: the disk is full"
    assert errors[1].splitlines()[-1] == "error: the disk is full"


def main(folder: Path, address: str, index: int) -> None:
    """One of the two processes; the second one has something else in each case."""
    meshes.connect(f"{address},{index},2")
    hosts.SEEN_WITHIN = hosts.GRACE = 0.5
    for case in CASES:
        try:
            run(case, folder, index)
        except UserError as error:
            print(json.dumps([case, str(error)]), flush=True)
        except ZeroDivisionError as error:
            print(json.dumps([case, type(error).__name__]), flush=True)
    run_command(lambda: run("later", folder, index))


def run(case: str, folder: Path, index: int) -> None:
    experiment = experiment_in(folder / f"{case}-{index}", devices=0, trunk=Embedding(dimension=4))
    workdir = Path("run-apart" if case == "apart" else f"../run-{case}")
    if index and case == "rate":
        experiment = dataclasses.replace(experiment, optimizer=Optimizer(learning_rate=1e-4))
    if case == "part":
        (own := Path("own.py")).write_text(OWN.format(scale=index + 1.0))
        import_parts([str(own)])
        experiment = dataclasses.replace(experiment, trunk=kinds(TrunkConfig)["Mine"](dimension=4))
    if index and case == "later":
        loop.TrainingRun._baselines = full  # the others wait in it
    if case == "locked" and not index:
        with locks.workdir(workdir):
            mtl_jax.train(experiment, workdir)
    with pytest.MonkeyPatch.context() as patch:
        if index and case == "fault":
            patch.setattr(train, "prepare", lambda experiment: 1 / 0)
        mtl_jax.train(experiment, workdir)


def full(_) -> None:
    raise UserError("the disk is full")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
