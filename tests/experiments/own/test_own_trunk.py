"""A trunk of one's own: its flags, config.json, resume, packed rows, and every command on the run."""

import json
import re

import numpy as np
import own_parts
import pytest
import tiny

from mtl_jax import ablate, reporting, train
from mtl_jax.cli import script_main
from mtl_jax.core import parts
from mtl_jax.core.errors import UserError
from mtl_jax.core.trees import flat
from mtl_jax.inference.export import convert
from mtl_jax.inference.predict import evaluate, open_run, predict
from mtl_jax.trunks import TrunkConfig

FLAGS = [
    *("--phases.0.steps", "4", "--batch.rows", "4", "--batch.row-length", "24", "--checkpoints.every", "2"),
    *("--sources.0.limit", "40", "--sources.1.limit", "40", "--evaluation.every", "4", "--trunk.width", "8"),
    *("--trunk.layers", "1", "--devices", "1"),
]


@pytest.fixture(scope="module")
def script(shared_data, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTL_JAX_DATA", str(shared_data))
        yield own_parts.copied("trunk.py", tmp_path_factory.mktemp("own"))


def experiment_of(script, *flags):
    return own_parts.experiment_of(script, *FLAGS, *flags)


@pytest.fixture(scope="module")
def workdir(script):
    train(experiment_of(script), script.parent / "run")
    return script.parent / "run"


def test_flags_and_config(script, workdir, capsys, monkeypatch):
    config = json.loads((workdir / "config.json").read_text())
    assert config["trunk"] | {"kind": "Convolutions", "width": 8, "window": 1} == config["trunk"]
    (record,) = config["parts"].items()
    assert record == ("Convolutions", {"door": "trunk", "file": str(script), "sha256": record[1]["sha256"]})
    monkeypatch.setattr("sys.argv", [str(script), "--help-all"])
    with pytest.raises(SystemExit):
        script_main.main(experiment_of(script))
    assert "--trunk.window INT" in capsys.readouterr().out
    assert open_run(workdir).params["trunk"]["layer_0"]["kernel"].shape == (3 * 8, 8)


def test_commands(script, workdir, tmp_path):
    questions = ["Who wrote Emma ?", "How far is it from Denver to Aspen ?"]
    together = predict(workdir, "trec", questions)
    alone = [predict(workdir, "trec", [question])[0] for question in questions]
    for answer, expected in zip(together, alone, strict=True):
        assert answer["probability"] == pytest.approx(expected["probability"], abs=1e-6)
    (tmp_path / "rows.txt").write_text("1 What is an atom ?\n4 Where is Kiel ?\n")
    assert evaluate(workdir, "trec", str(tmp_path / "rows.txt"))["rows"] == 2
    with pytest.raises(UserError, match="its trunk is a Convolutions, and transformers has no class for it"):
        convert(str(workdir), tmp_path / "out")
    assert "own_trunk" in reporting.write([workdir], tmp_path / "report.html").read_text()
    record = ablate(experiment_of(script), tmp_path / "ablation", ["trunk.window=0,1"])
    assert [run["status"] for run in record["runs"]] == ["done", "done"]


def test_resume(script, workdir, tmp_path):
    """Bit by bit; a file that has changed since is refused."""
    tiny.cut(workdir, tmp_path / "run", 2)
    train(experiment_of(script), tmp_path / "run")
    expected, resumed = (flat(open_run(folder, "last").params) for folder in (workdir, tmp_path / "run"))
    for path, leaf in expected.items():
        np.testing.assert_array_equal(resumed[path], leaf, err_msg=path)
    tiny.cut(workdir, tmp_path / "changed", 2)
    text = script.read_text(encoding="utf-8")
    script.write_text(text + "# changed\n", encoding="utf-8")
    try:
        hashes = r"parts\.Convolutions\.sha256 was .[0-9a-f]{64}., is .[0-9a-f]{64}"
        with pytest.raises(UserError, match=hashes):
            train(experiment_of(script), tmp_path / "changed")
    finally:
        script.write_text(text, encoding="utf-8")
        experiment_of(script)


def test_a_workdir_without_its_class(script, workdir, monkeypatch):
    monkeypatch.setitem(parts._KINDS, TrunkConfig, {})
    with pytest.raises(UserError, match=re.escape(f"the trunk Convolutions is a class of {script}, which is not imported")):
        open_run(workdir)


def test_without_the_mask_of_segments(script, tmp_path):
    """It is refused with packed rows; without them it trains, and each text is read alone in predictions, too."""
    leaky = tmp_path / "leaky.py"
    text = (own_parts.FOLDER / "trunk.py").read_text(encoding="utf-8").replace("Convolutions", "Leaky")
    blind = text.replace(
        "jnp.where(same[..., None], padded[:, start : start + length], 0)", "padded[:, start : start + length]"
    )
    assert blind != text
    leaky.write_text(blind, encoding="utf-8")
    advice = "respect segment_ids, position_ids and attention_mask in the module, or set batch.packed to False"
    with pytest.raises(UserError, match=advice):
        train(experiment_of(leaky), tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    alone = experiment_of(leaky, "--batch.no-packed", "--phases.0.steps", "2", "--evaluation.every", "2", "--only", "trec")
    assert not alone.batch.packed
    train(alone, tmp_path / "alone")
    questions = ["Who wrote Emma ?", "Where is Kiel ?"]
    together = predict(tmp_path / "alone", "trec", questions)
    for question, answer in zip(questions, together, strict=True):
        (expected,) = predict(tmp_path / "alone", "trec", [question])
        assert answer["probability"] == pytest.approx(expected["probability"], abs=1e-6)
