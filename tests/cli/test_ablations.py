"""The commands mtl-jax ablate and mtl-jax take, as a user types them; a real process, killed with a real signal."""

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from processes import CONSOLE, Process

from mtl_jax import Checkpoints
from mtl_jax.cli import scripts
from mtl_jax.cli.ablations import method_list, process_of
from mtl_jax.core.errors import UserError
from mtl_jax.training.checkpoint_store import Store

FLAGS = ["--vary", "weights=1/1/1,0.2/0.3/0.5", "--seeds", "2", "--methods", "dwa"]
SHORT = ["--", "--phases.0.steps", "9", "--phases.1.steps", "9", "--evaluation.every", "6", "--checkpoints.every", "3"]


def start(bert: Path, data: Path, folder: Path, *words: str) -> Process:
    for name, place in (("bert", bert), ("data", data)):
        if not (folder / name).exists():
            (folder / name).symlink_to(place)
    return Process("ablate", tiny.__file__, *words, code=CONSOLE, devices=8, TINY=str(folder))


def bits(chunk: Path) -> list[bytes]:
    store = Store(chunk, Checkpoints(), read_only=True)
    params = store.restore_params(store.steps()[-1])
    store.close()
    return [np.asarray(leaf).tobytes() for part in (params["trunk"], params["heads"]) for leaf in _leaves(part)]


def _leaves(tree: dict) -> list:
    return [leaf for _, value in sorted(tree.items()) for leaf in (_leaves(value) if isinstance(value, dict) else [value])]


@pytest.mark.long
def test_killed_and_started_again_it_goes_on_to_the_same_bits(bert, data, tmp_path):
    """SIGKILL in the second program, whose rule has state of its own; the first one is not trained again."""
    words = [*FLAGS, "--workdir", str(tmp_path / "killed"), *SHORT]
    process = start(bert, data, tmp_path, *words)
    checkpoints = tmp_path / "killed" / "programs" / "1" / "chunk-0" / "checkpoints"
    deadline = time.monotonic() + 240
    while not (checkpoints / "12").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output
    before = (tmp_path / "killed" / "runs" / "0000" / "results.json").stat().st_mtime_ns
    output, _ = (again := start(bert, data, tmp_path, *words)).communicate()
    assert again.returncode == 0, output
    assert "resuming from step 12" in output
    assert (tmp_path / "killed" / "runs" / "0000" / "results.json").stat().st_mtime_ns == before
    words[words.index(str(tmp_path / "killed"))] = str(tmp_path / "whole")
    output, _ = (whole := start(bert, data, tmp_path, *words)).communicate()
    assert whole.returncode == 0, output
    for program in ("0", "1"):
        killed, other = (bits(tmp_path / name / "programs" / program / "chunk-0") for name in ("killed", "whole"))
        assert killed == other
    record = json.loads((tmp_path / "whole" / "ablation.json").read_text())
    assert record["command"].endswith("--checkpoints.every 3")
    assert [(program["fixed"], program["runs"]) for program in record["programs"]] == [
        ({"weighting": "fixed"}, 4),
        ({"weighting": "dwa"}, 2),
    ]
    lines = [(tmp_path / name / "runs" / "0005" / "metrics.jsonl").read_text() for name in ("killed", "whole")]
    assert lines[0] == lines[1]


def test_a_dry_run_says_what_would_happen_and_writes_nothing(bert, data, tmp_path):
    process = start(bert, data, tmp_path, *FLAGS, "--dry-run", "--workdir", str(tmp_path / "run"), *SHORT)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "programs: 2, runs: 6, steps: 36 of many at once, in place of 108 of one" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--vary", "weights=simplex:0.5/0.6/0.1"], "0.5/0.6/0.1 is not on the simplex"),
        (["--vary", "evaluation.every=1,2"], "it cannot vary: runs are compared by it"),
        ([], "nothing varies"),
    ],
)
def test_bad_input_is_one_line_and_code_2(words, message, bert, data, tmp_path):
    process = start(bert, data, tmp_path, *words)
    output, _ = process.communicate()
    assert process.returncode == 2
    assert message in output.splitlines()[-1]
    assert output.startswith("error: ")


def test_a_script_is_read_with_its_flags(tmp_path, monkeypatch):
    monkeypatch.setenv("TINY", "nowhere")
    with scripts.given(["--phases.0.steps", "77", "--weighting", "famo"]):
        actual = scripts.read(tiny.__file__)
    assert (actual.phases[0].steps, actual.weighting) == (77, "famo")
    with scripts.given(["--distributed", "here:1,2,3"]):
        assert process_of(scripts.read_call(tiny.__file__, "ablate").distributed) == (2, 3)
        with pytest.raises(UserError, match="--distributed: leave it out of the script's flags"):
            scripts.read(tiny.__file__, "plan")
    assert process_of("") == (0, 1)
    (tmp_path / "idle.py").write_text("import mtl_jax\n")
    with pytest.raises(UserError, match="it did not call mtl_jax"):
        scripts.read(str(tmp_path / "idle.py"))
    with pytest.raises(UserError, match="no such script"):
        scripts.read(str(tmp_path / "none.py"))


def test_methods_keep_their_options():
    assert method_list("equal,cagrad:c=0.4, db_mtl:a=1,b=2") == ["equal", "cagrad:c=0.4", "db_mtl:a=1,b=2"]
    with pytest.raises(UserError, match="an option without a method"):
        method_list("equal,c=0.4")
