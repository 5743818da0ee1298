"""An adapter of one's own: its flags, config.json, what trains, resume, and every command on the run."""

import json

import numpy as np
import own_parts
import pytest
import tiny
from jitted import apply

from mtl_jax import ablate, pretrained, reporting, train
from mtl_jax.cli import script_main
from mtl_jax.core import parts
from mtl_jax.core.errors import UserError
from mtl_jax.core.trees import flat
from mtl_jax.inference.export import convert
from mtl_jax.inference.predict import evaluate, open_run, predict
from mtl_jax.transfer.adapters import Adapter

QUESTIONS = ["Who wrote Emma ?", "How far is it from Denver to Aspen ?"]


@pytest.fixture(scope="module")
def script(shared_data, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTL_JAX_DATA", str(shared_data))
        yield own_parts.copied("adapter.py", tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def flags(bert):
    return [
        *("--phases.0.steps", "4", "--batch.rows", "4", "--batch.row-length", "24", "--checkpoints.every", "2"),
        *("--sources.0.limit", "40", "--evaluation.every", "4", "--trunk.path", str(bert), "--adapters.0.rank", "4"),
        *("--devices", "1"),
    ]


@pytest.fixture(scope="module")
def workdir(script, flags):
    train(own_parts.experiment_of(script, *flags), script.parent / "run")
    return script.parent / "run"


def test_flags_config_and_what_trains(script, flags, workdir, capsys, monkeypatch):
    config = json.loads((workdir / "config.json").read_text())
    assert config["adapters"][0] == {
        **{"kind": "LoraFA", "name": "lora_fa", "per": "run", "rank": 4},
        **{"target": ".*/(query|value)", "projection_seed": 0},
    }
    assert config["parts"]["LoraFA"] | {"door": "adapter", "file": str(script)} == config["parts"]["LoraFA"]
    monkeypatch.setattr("sys.argv", [str(script), "--help-all"])
    with pytest.raises(SystemExit):
        script_main.main(own_parts.experiment_of(script, *flags))
    assert "--adapters.0.rank INT" in capsys.readouterr().out
    run, start = open_run(workdir, "last"), pretrained.load(config["trunk"]["path"], head=None)
    leaves, initial = flat(run.params["trunk"]), flat(start.params["trunk"])
    for path, leaf in initial.items():
        np.testing.assert_array_equal(leaves[path], leaf, err_msg=path)
    assert {path for path in leaves if path not in initial} == {
        f"adapters/lora_fa/layer_0/attention/{layer}/b" for layer in ("query", "value")
    }
    assert np.abs(leaves["adapters/lora_fa/layer_0/attention/query/b"]).max() > 0
    stored = sum(file.stat().st_size for file in (workdir / "checkpoints").rglob("*") if file.is_file())
    assert stored < 2e5  # the trunk is not in them


def test_commands(script, flags, workdir, tmp_path):
    assert all(0 < answer["probability"] <= 1 for answer in predict(workdir, "trec", QUESTIONS))
    (tmp_path / "rows.txt").write_text("1 What is an atom ?\n4 Where is Kiel ?\n")
    assert evaluate(workdir, "trec", str(tmp_path / "rows.txt"))["rows"] == 2
    assert "own_adapter" in reporting.write([workdir], tmp_path / "report.html").read_text()
    record = ablate(own_parts.experiment_of(script, *flags), tmp_path / "ablation", ["adapters.lora_fa.rank=2,3"])
    assert [run["status"] for run in record["runs"]] == ["done", "done"]


def test_convert_merges_it(script, workdir, tmp_path, monkeypatch):
    """The vectors are the same; without merged() it is refused."""
    convert(str(workdir), tmp_path / "out")
    run, merged = open_run(workdir), pretrained.load(str(tmp_path / "out"), head=None)
    ids = np.array([[2, 5, 9, 12, 3]])
    expected = apply(run.trunk.module, run.params["trunk"], ids).hidden
    np.testing.assert_allclose(apply(merged.model.trunk, merged.params["trunk"], ids).hidden, expected, atol=1e-5)
    monkeypatch.delattr(parts.kinds(Adapter)["LoraFA"], "merged")
    refused = r"'lora_fa' is a LoraFA, which .*: only Lora, its relatives, IA3 and classes that define merged\(\) can"
    with pytest.raises(UserError, match=refused):
        convert(str(workdir), tmp_path / "other")


def test_resume(script, flags, workdir, tmp_path):
    """Bit by bit; a file that has changed since is refused."""
    tiny.cut(workdir, tmp_path / "run", 2)
    train(own_parts.experiment_of(script, *flags), tmp_path / "run")
    expected, resumed = (flat(open_run(folder, "last").params) for folder in (workdir, tmp_path / "run"))
    for path, leaf in expected.items():
        np.testing.assert_array_equal(resumed[path], leaf, err_msg=path)
    tiny.cut(workdir, tmp_path / "changed", 2)
    text = script.read_text(encoding="utf-8")
    script.write_text(text + "# changed\n", encoding="utf-8")
    try:
        with pytest.raises(UserError, match=r"parts\.LoraFA\.sha256 was .[0-9a-f]{64}., is .[0-9a-f]{64}"):
            train(own_parts.experiment_of(script, *flags), tmp_path / "changed")
    finally:
        script.write_text(text, encoding="utf-8")
        own_parts.experiment_of(script, *flags)


@pytest.mark.parametrize("method", ["where", "init", "around"])
def test_a_class_that_lacks_a_method(workdir, method):
    half = type("Half", (parts.kinds(Adapter)["LoraFA"],), {method: getattr(Adapter, method)})
    with pytest.raises(UserError, match=f"class Half lacks {method}, which every adapter needs"):
        half(name="half")
