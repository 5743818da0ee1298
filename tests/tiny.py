"""A BERT of a few thousand parameters and two small sources: what tests train in seconds.

As a script it is an experiment, for tests that need a process of its own:
    TINY=FOLDER python tests/tiny.py --workdir WORKDIR
where FOLDER holds data, as write_data writes it, and bert, as write_bert does; without bert, the trunk is MATRIX.
"""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import safetensors.numpy
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from mtl_jax import (
    Batching,
    Checkpoints,
    Classification,
    Embedding,
    Evaluation,
    Experiment,
    Optimizer,
    ParamRule,
    Phase,
    Pretrained,
    Regression,
    Source,
    main,
)
from mtl_jax.trunks import TrunkConfig

HIDDEN, LAYERS, HEADS, FEED_FORWARD, POSITIONS = 16, 2, 2, 32, 32
GOOD, BAD = ["good", "fine", "great", "lovely"], ["bad", "poor", "awful", "sad"]
OTHER = ["the", "a", "film", "song", "was", "is", "who", "where", "city", "man", "?", "."]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *OTHER]

# A trunk for what is the same with every trunk: most of a test's time is compilation, and this one compiles in no time.
MATRIX = Embedding(vocabulary=30, dimension=8)
HEADS_ONLY = (ParamRule("heads/.*"), ParamRule("trunk/.*", train=False))


def bert_tensors(seed: int = 0, layers: int = LAYERS) -> dict[str, np.ndarray]:
    """Random tensors under the names of a Hugging Face BertModel, written out by hand."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.2, shape).astype(np.float32)

    tensors = {
        "embeddings.word_embeddings.weight": normal(len(WORDS), HIDDEN),
        "embeddings.position_embeddings.weight": normal(POSITIONS, HIDDEN),
        "embeddings.token_type_embeddings.weight": normal(2, HIDDEN),
        "embeddings.LayerNorm.weight": 1 + normal(HIDDEN),
        "embeddings.LayerNorm.bias": normal(HIDDEN),
        "pooler.dense.weight": normal(HIDDEN, HIDDEN),
        "pooler.dense.bias": normal(HIDDEN),
    }
    for layer in range(layers):
        at = f"encoder.layer.{layer}."
        for name, inputs, outputs in (
            ("attention.self.query", HIDDEN, HIDDEN),
            ("attention.self.key", HIDDEN, HIDDEN),
            ("attention.self.value", HIDDEN, HIDDEN),
            ("attention.output.dense", HIDDEN, HIDDEN),
            ("intermediate.dense", HIDDEN, FEED_FORWARD),
            ("output.dense", FEED_FORWARD, HIDDEN),
        ):
            tensors[f"{at}{name}.weight"] = normal(outputs, inputs)
            tensors[f"{at}{name}.bias"] = normal(outputs)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            tensors[f"{at}{name}.weight"] = 1 + normal(HIDDEN)
            tensors[f"{at}{name}.bias"] = normal(HIDDEN)
    return tensors


def write_bert(folder: Path, tensors: dict[str, np.ndarray] | None = None, layers: int = LAYERS) -> None:
    """A checkpoint directory: config.json, model.safetensors, tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "bert",
        "vocab_size": len(WORDS),
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "intermediate_size": FEED_FORWARD,
        "max_position_embeddings": POSITIONS,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    safetensors.numpy.save_file(bert_tensors(layers=layers) if tensors is None else tensors, folder / "model.safetensors")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    words.save(str(folder / "tokenizer.json"))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": POSITIONS, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")


def write_data(folder: Path, rows: int = 150) -> None:
    """ratings.tsv (rating, text) and questions.txt (COARSE:fine text), learnable from the words."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    seen: set[str] = set()

    def text(words: list[str]) -> str:
        while True:
            chosen = " ".join(rng.choice(words) for _ in range(rng.randint(2, 9)))
            if chosen not in seen:
                seen.add(chosen)
                return chosen

    lines = ["id\trating\ttext"]
    for i in range(rows):
        sentence = text(GOOD + BAD + OTHER)
        rating = sum(word in GOOD for word in sentence.split()) - sum(word in BAD for word in sentence.split())
        lines.append(f"{i // 3}_{i % 3}\t{max(-4, min(4, rating))}\t{sentence}")
    (folder / "ratings.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    lines = []
    for _ in range(rows):
        question = rng.choice(["who", "where"])
        rest = text([word for word in OTHER if word not in ("who", "where")])
        fine = ("HUM:man" if " man" in rest else "HUM:other") if question == "who" else "LOC:city"
        lines.append(f"{fine} {question} {rest}")
    (folder / "questions.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def experiment(trunk: Path | str | TrunkConfig, data: Path | str, /, **changes: object) -> Experiment:
    """Two sources, three tasks, a phase of heads and a phase of everything; of a trunk or of a checkpoint's."""
    values: dict = {
        "name": "tiny",
        "trunk": trunk if isinstance(trunk, TrunkConfig) else Pretrained(str(trunk)),
        "sources": (
            Source(name="ratings", path=f"{data}/ratings.tsv", format="tsv"),
            Source(
                name="questions",
                path=f"{data}/questions.txt",
                format="lines",
                pattern=r"(?P<fine>(?P<coarse>[A-Z]+):[a-z]+) (?P<text>.+)",
            ),
        ),
        "tasks": (
            Regression(name="rating", source="ratings", column="rating", minimum=-4, maximum=4, scale=2.0),
            Classification(name="coarse", source="questions", column="coarse"),
            Classification(name="fine", source="questions", column="fine", hidden=8, dropout=0.1),
        ),
        "phases": (Phase("heads", steps=6, rules=HEADS_ONLY), Phase("everything", steps=6)),
        "optimizer": Optimizer(learning_rate=1e-2),
        "batch": Batching(rows=8, row_length=24, examples_per_row=6),
        "evaluation": Evaluation(every=4),
        "checkpoints": Checkpoints(every=2, keep=3),
        "devices": 1,
    }
    return Experiment(**(values | changes))


def cut(whole: Path, workdir: Path, step: int) -> None:
    """A copy of a finished run, as if it had been killed when this checkpoint was its last."""
    shutil.copytree(whole, workdir)
    (workdir / "results.json").unlink()
    for path in (workdir / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)


if __name__ == "__main__":
    folder = Path(os.environ["TINY"])
    main(
        experiment(folder / "bert" if (folder / "bert").exists() else MATRIX, folder / "data"),
        description="The tiny experiment.",
    )
