"""Pairs of texts, with token types and rows that lack a label: packed as by themselves."""

import json
import random

import packing
import tiny

from mtl_jax import Classification, Phase, Pretrained, Regression, Source
from mtl_jax.training.setup import prepare


def test_packed_equals_unpacked(tmp_path):
    tiny.write_bert(tmp_path / "bert", layers=1)
    config = json.loads((tmp_path / "bert" / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (tmp_path / "bert" / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    rng = random.Random(0)
    for split in ("train", "dev", "test"):
        lines = ["first\tsecond\tscore\tsame"]
        for number in range(20):
            first, second = (" ".join(rng.choices(tiny.GOOD + tiny.BAD + tiny.OTHER, k=rng.randint(2, 6))) for _ in range(2))
            lines.append(f"{first}\t{second}\t{'' if number == 3 else number / 4}\t{'' if number == 5 else number % 2}")
        (tmp_path / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    paths = [str(tmp_path / f"{split}.tsv") for split in ("train", "dev", "test")]
    source = Source(
        name="pairs", path=paths[0], dev_path=paths[1], test_path=paths[2], format="tsv", text="first", pair="second"
    )
    tasks = (
        Regression(name="score", source="pairs", column="score", scale=2.0),
        Classification(name="same", source="pairs", column="same"),
    )
    phases = (Phase("everything", steps=4),)
    trunk = Pretrained(str(tmp_path / "bert"), dropout=0.0)
    prepared = prepare(
        tiny.experiment("", "", trunk=trunk, sources=(source,), tasks=tasks, phases=phases, batch=packing.PACKED)
    )
    assert prepared.corpus.has_types
    packing.assert_packing_changes_nothing(prepared)
