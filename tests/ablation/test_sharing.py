"""Processes that share an ablation: who takes which chunk, and that all is done once, also where one of them is killed."""

import dataclasses
import json
import signal
import time

import pytest
import tiny
from processes import CONSOLE, Process

from mtl_jax import Embedding, Evaluation, Phase
from mtl_jax.ablation import ablate as ablations
from mtl_jax.ablation.ablate import ablate
from mtl_jax.ablation.plan import Program
from mtl_jax.ablation.sharing import Ledger, Sharing, check
from mtl_jax.core.errors import UserError
from mtl_jax.training.metrics_log import read_metrics

VARY = "optimizer.learning-rate=1e-2,1e-3,1e-4,1e-5"


def program(number: int, runs: int) -> Program:
    return Program(number, tuple(range(runs)), None)


def test_processes_begin_with_different_programs_and_chunks_are_small_enough_for_all():
    orders = ["".join(Sharing(process, 4).in_order("abcdef")) for process in range(4)]
    assert orders == ["abcdef", "bcdefa", "defabc", "efabcd"]
    assert Sharing().in_order([]) == []
    one = program(0, 8)
    assert [Sharing(0, count).at_once([one], one, 0) for count in (1, 2, 3, 16)] == [0, 4, 3, 1]
    assert Sharing(0, 4).at_once([one] * 4, one, 0) == 8
    assert Sharing(0, 3).at_once([one] * 2, one, 0) == 4
    assert Sharing(0, 2).at_once([one], one, 3) == 3
    with pytest.raises(UserError, match=r"share is \(2, 2\); give the number of this process, from 0"):
        check(2, 2)


def test_a_chunk_is_taken_by_one_process_and_free_after_it(tmp_path):
    ledgers = []
    for process in range(2):
        record = {"programs": [{"chunks": 2}]}
        ledgers.append(Ledger(Sharing(process, 2), tmp_path, [program(0, 2)], record))
    one, other = ledgers
    with one.sharing.taking(tmp_path, 0, 0) as mine, other.sharing.taking(tmp_path, 0, 0) as theirs:
        assert (mine, theirs) == (True, False)
        assert other.has_work(program(0, 2))  # the second chunk
        other.record["programs"][0]["ended"] = [1]
        assert not other.has_work(program(0, 2))
    assert other.has_work(program(0, 2))


def test_a_process_that_is_left_alone_trains_all_chunks_and_process_0_writes_the_report(bert, data, tmp_path, monkeypatch):
    phase = Phase("everything", steps=2)
    experiment = tiny.experiment(bert, data, phases=(phase,), trunk=Embedding(dimension=4))
    experiment = dataclasses.replace(experiment, evaluation=Evaluation(every=2, baseline="none"))
    record = ablate(experiment, tmp_path / "shared", [VARY], share=(1, 2))
    assert (record["programs"][0]["size"], record["programs"][0]["ended"]) == (2, [0, 1])
    assert {run["status"] for run in record["runs"]} == {"done"}
    assert not (tmp_path / "shared" / "report.html").exists()
    monkeypatch.setattr(ablations, "make_ready", None)  # nothing is left to be compiled
    ablate(experiment, tmp_path / "shared", [VARY], share=(0, 2))
    assert (tmp_path / "shared" / "report.html").exists()


def start(folder, workdir, process: int, count: int = 2) -> Process:
    words = ["--vary", VARY, "--workdir", workdir, "--", "--phases.0.steps", "4", "--phases.1.steps", "60"]
    words += ["--checkpoints.every", "2", "--evaluation.every", "20", "--distributed", f"here:1,{process},{count}"]
    return Process("ablate", tiny.__file__, *words, code=CONSOLE, devices=1, TINY=str(folder))


@pytest.mark.long
def test_two_real_processes_share_the_runs_and_one_takes_over_what_the_other_was_killed_in(tmp_path):
    tiny.write_bert(tmp_path / "bert", layers=1)
    tiny.write_data(tmp_path / "data")
    pair = [start(tmp_path, tmp_path / "shared", process) for process in range(2)]
    taken = tmp_path / "shared" / "programs" / "0" / "chunk-1" / "checkpoints"
    deadline = time.monotonic() + 240
    while not any(int(path.name) > 5 for path in taken.glob("[0-9]*") if path.name.isdecimal()):
        assert time.monotonic() < deadline
        assert pair[1].poll() is None, pair[1].communicate()
        time.sleep(0.01)
    pair[1].send_signal(signal.SIGKILL)
    pair[1].communicate()
    output, _ = pair[0].communicate()
    assert pair[0].returncode == 0, output
    assert "chunk-1: resuming from step" in output
    whole, _ = (alone := start(tmp_path, tmp_path / "alone", 0, 1)).communicate()
    assert alone.returncode == 0, whole
    record = json.loads((tmp_path / "shared" / "ablation.json").read_text())
    assert {run["status"] for run in record["runs"]} == {"done"}
    for run in record["runs"]:
        records, others = (read_metrics(tmp_path / name / "runs" / run["run"]) for name in ("shared", "alone"))
        assert len(records) == len(others)
        for one, other in zip(records, others, strict=True):
            assert one.get("total", 0) == pytest.approx(other.get("total", 0), rel=1e-4)
