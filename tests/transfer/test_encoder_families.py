"""What transfer does on encoders whose blocks are not BERT's: distances, shared layers, rotary positions."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

import mtl_jax
from mtl_jax import Batching, Checkpoints, Distillation, Evaluation, InitFrom, Lora, Phase, pretrained
from mtl_jax.core.trees import flat
from mtl_jax.inference.predict import open_run, predict
from mtl_jax.merging import Method
from mtl_jax.merging.checkpoints import merge_checkpoints
from mtl_jax.transfer import top_layers

FIXTURES = Path(__file__).parents[1] / "pretrained" / "fixtures"
FAMILIES = [
    "mpnet_masked_lm",
    "albert_rows",
    "deberta_rows",
    "deberta_masked_lm",
    "nomic_masked_lm",
    "gte_rows",
    "eurobert_rows",
]
OFTEN = ("albert_rows", "deberta_rows")
MERGED = [name if name in OFTEN else pytest.param(name, marks=pytest.mark.long) for name in FAMILIES]
TRAINED = [name if name == "deberta_rows" else pytest.param(name, marks=pytest.mark.long) for name in FAMILIES]


def other(name, folder, by=0.05):
    """A checkpoint of the family with other parameters."""
    shutil.copytree(FIXTURES / name, folder)
    rng = np.random.default_rng(1)
    tensors = load_file(folder / "model.safetensors")
    changed = {key: (value + by * rng.normal(size=value.shape)).astype(np.float32) for key, value in tensors.items()}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("name", MERGED)
def test_a_soup_is_the_mean(name, tmp_path):
    sources = [str(FIXTURES / name), str(other(name, tmp_path / "other"))]
    merge_checkpoints(tmp_path / "soup", sources, "", Method("soup"))
    first, second, found = (flat(pretrained.load(str(path)).params) for path in (*sources, tmp_path / "soup"))
    for path, leaf in found.items():
        np.testing.assert_allclose(leaf, (first[path] + second[path]) / 2, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("name", TRAINED)
def test_a_run_begins_elsewhere_learns_from_a_teacher_and_keeps_what_is_frozen(name, workdir, bert, data, tmp_path):
    """One run with init_from, distillation, LoRA, rates by depth and a frozen embedding."""
    shutil.copytree(FIXTURES / name, tmp_path / "checkpoint")
    for folder in (tmp_path / "checkpoint", other(name, tmp_path / "other")):
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(bert / file, folder)
    layers = sum(path.startswith("layer_") for path in pretrained.load(str(tmp_path / "other")).params["trunk"])
    experiment = tiny.experiment(
        tmp_path / "checkpoint",
        data,
        init_from=InitFrom(str(tmp_path / "other"), subtree="trunk"),
        adapters=(Lora(name="lora", rank=2, dropout=0.1),),
        regularisers=(Distillation(teacher=str(workdir)),),
        phases=(Phase("top", steps=2, rules=top_layers(layers, layers, decay=0.5)),),
        checkpoints=Checkpoints(every=2, keep=1),
        evaluation=Evaluation(every=2, baseline="none"),
        batch=Batching(rows=8, row_length=14, examples_per_row=4),  # MPNet has two positions fewer than its table
    )
    mtl_jax.train(experiment, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "init_from.json").read_text())["path"] == str(tmp_path / "other")
    begin = flat({"trunk": pretrained.load(str(tmp_path / "other"), head=None).params["trunk"]})
    run = open_run(tmp_path / "run")
    end = flat({"trunk": run.params["trunk"]})
    moved = {path for path, leaf in begin.items() if (np.asarray(leaf) != np.asarray(end[path])).any()}
    assert not any(path.startswith("trunk/embeddings/") for path in moved)
    assert {path for path in begin if path.startswith("trunk/layer_0/")} <= moved | {p for p in begin if p.endswith("key/bias")}
    assert any(path.startswith("trunk/adapters/lora/layer_0/") and np.any(leaf) for path, leaf in end.items())
    assert predict(tmp_path / "run", "coarse", ["who is the man ?"])[0]["label"] in ("HUM", "LOC")
