"""What transfer does on encoder-decoders of several languages, and on those without positions: one run has all of it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_seq2seq
from safetensors.numpy import load_file, save_file

import mtl_jax
from mtl_jax import (
    Batching,
    Checkpoints,
    Classification,
    Distillation,
    Evaluation,
    Experiment,
    InitFrom,
    Lora,
    ParamRule,
    Phase,
    Pretrained,
    Seq2Seq,
    Source,
    pretrained,
)
from mtl_jax.core.trees import flat
from mtl_jax.inference.predict import open_run
from mtl_jax.inference.text_model import TextRequest, from_run
from mtl_jax.merging import Method
from mtl_jax.merging.checkpoints import merge_checkpoints
from mtl_jax.pretrained import language_codes

FIXTURES = Path(__file__).parents[1] / "pretrained" / "fixtures"
CODES = {
    "NllbTokenizer": ("eng_Latn", "fra_Latn", "deu_Latn"),
    "M2M100Tokenizer": ("en", "fr", "de"),
    "MBart50Tokenizer": ("en_XX", "fr_XX", "de_DE"),
    "T5Tokenizer": ("", "", ""),
}


def write(kind, folder):
    if kind == "T5Tokenizer":
        return tiny_seq2seq.write_t5(folder)
    make = tiny_seq2seq.write_m2m if kind.startswith(("M2M", "Nllb")) else tiny_seq2seq.write_mbart
    return make(folder, kind, decoder_start_token_id=2)


def other(source, folder, by=0.05):
    """A checkpoint of the family with other parameters; a tensor that the file has twice stays so."""
    shutil.copytree(source, folder)
    rng = np.random.default_rng(1)
    tensors = load_file(folder / "model.safetensors")
    changed = {key: (value + by * rng.normal(size=value.shape)).astype(np.float32) for key, value in tensors.items()}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    return folder


def trained(kind, folder, only, **changes):
    """A run of two steps in folder/run on some of its tasks, with LoRA, from another checkpoint's trunk."""
    source, french, german = CODES[kind]
    folder.mkdir(exist_ok=True)
    write(kind, folder / "model")
    other(folder / "model", folder / "other")
    texts = dict.fromkeys(tiny_seq2seq.sentences(tiny_seq2seq.ENGLISH, 40))
    rows = [{"text": text, "french": text[::-1], "german": text, "long": "yes" if len(text) > 20 else "no"} for text in texts]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    both = {"source": "rows", "target_length": 12, "source_language": source, "metric": "token_accuracy"}
    values = {
        "name": kind,
        "only": only,
        "trunk": Pretrained(str(folder / "model"), dropout=0.0),
        "sources": (Source(name="rows", path=str(folder / "rows.jsonl"), format="jsonl"),),
        "tasks": (
            Seq2Seq(name="french", column="french", target_language=french, **both),
            Seq2Seq(name="german", column="german", target_language=german, **both),
            Classification(name="long", source="rows", column="long"),
        ),
        "adapters": (Lora(name="lora", rank=2, target="layer_0/attention/(query|value)"),),
        "phases": (Phase("part", steps=2, rules=(ParamRule("trunk/embeddings/.*", train=False), ParamRule(".*"))),),
        "init_from": InitFrom(str(folder / "other"), subtree="trunk"),
        "batch": Batching(rows=8, row_length=24, target_length=14, examples_per_row=2),
        "evaluation": Evaluation(every=2, baseline="none"),
        "checkpoints": Checkpoints(every=2, keep=1),
    }
    mtl_jax.train(Experiment(**(values | changes)), folder / "run")
    return folder


def check(folder, kind):
    """What moved, what did not, and how each task's texts begin."""
    run = open_run(folder / "run", "last")
    begin = flat({"trunk": pretrained.load(str(folder / "other"), head=None).params["trunk"]})
    end = flat({"trunk": run.params["trunk"]})
    moved = {path for path, leaf in begin.items() if not np.array_equal(leaf, end[path])}
    assert moved
    assert not any(path.startswith("trunk/embeddings/") for path in moved)
    adapters = {path: leaf for path, leaf in end.items() if path.startswith("trunk/adapters/lora/")}
    assert not adapters or any(path.endswith("/b") and np.any(leaf) for path, leaf in adapters.items())
    results = json.loads((folder / "run" / "results.json").read_text())["tasks"]
    assert all(np.isfinite(results[task]["test"]["loss"]) for task in results)
    source, *targets = CODES[kind]
    if source:
        ids = language_codes.ids(run.trunk.tokenizer)
        for task, target in zip(("french", "german"), targets, strict=True):
            if task not in results:
                continue
            model = from_run(folder / "run", TextRequest("translation"), task)
            assert model.encode(["the film"], None)[0][0] == ids[source]
            assert model.setting.options["forced_bos_token_id"] == ids[target]


def test_languages_frozen_parts_and_another_start(tmp_path):
    """One task, as it is the cheapest."""
    check(trained("NllbTokenizer", tmp_path, ("french",), adapters=()), "NllbTokenizer")


@pytest.mark.long
@pytest.mark.parametrize("kind", CODES)
def test_every_family_with_a_teacher_of_its_own(kind, tmp_path):
    """Two target languages, and a label whose logits are imitated."""
    teacher = trained(kind, tmp_path / "teacher", ("french", "german", "long"))
    distillation = Distillation(teacher=str(teacher / "run"), tasks=("long",))
    folder = trained(kind, tmp_path / "student", ("french", "german", "long"), regularisers=(distillation,), seed=1)
    check(folder, kind)
    assert '"distillation"' in (folder / "run" / "metrics.jsonl").read_text()


@pytest.mark.long
@pytest.mark.parametrize("name", ["m2m_100", "mbart", "umt5_untied"])
def test_a_soup_is_the_mean(name, tmp_path):
    sources = [str(FIXTURES / name), str(other(FIXTURES / name, tmp_path / "other"))]
    merge_checkpoints(tmp_path / "soup", sources, "", Method("soup"))
    first, second, found = (flat(pretrained.load(str(path)).params) for path in (*sources, tmp_path / "soup"))
    for path, leaf in found.items():
        np.testing.assert_allclose(leaf, (first[path] + second[path]) / 2, atol=1e-6, err_msg=path)
