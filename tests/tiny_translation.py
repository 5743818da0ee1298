"""A language of a few words and its translation, word by word in reverse order; and a transformer that learns it.

As a script it is an experiment, for tests that need a process of its own:
    TINY=FOLDER python tests/tiny_translation.py --workdir WORKDIR
where FOLDER holds what write_data writes.
"""

import json
import os
import random
from pathlib import Path

from mtl_jax import (
    Batching,
    Checkpoints,
    Classification,
    Evaluation,
    Experiment,
    Optimizer,
    Phase,
    Seq2Seq,
    Source,
    Transformer,
    main,
)

WORDS = {
    "the": "le",
    "dog": "chien",
    "cat": "chat",
    "sees": "voit",
    "eats": "mange",
    "small": "petit",
    "fish": "poisson",
    "red": "rouge",
}
TRUNK = Transformer(
    vocabulary=330, layers=1, width=16, heads=2, feed_forward=32, dropout=0.0, max_length=48, activation="swish"
)


def write_data(folder: Path, rows: int = 50, blank: int = 7) -> None:
    """pairs.jsonl: text, translation, long ("yes" of more than four words); every so many rows have no translation."""
    rng, seen = random.Random(0), set()
    lines = []
    while len(lines) < rows:
        words = rng.choices(list(WORDS), k=rng.randint(1, 7))
        if tuple(words) in seen:
            continue
        seen.add(tuple(words))
        row = {"text": " ".join(words), "translation": " ".join(WORDS[word] for word in reversed(words))}
        row["long"] = "yes" if len(words) > 4 else "no"
        if len(lines) % blank == blank - 1:
            row["translation"] = None
        lines.append(json.dumps(row))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def experiment(folder: Path, **changes: object) -> Experiment:
    """Translation, and a label on the same rows."""
    values: dict = {
        "name": "tiny_translation",
        "trunk": TRUNK,
        "sources": (Source(name="pairs", path=f"{folder}/pairs.jsonl", format="jsonl"),),
        "tasks": (
            Seq2Seq(name="translation", source="pairs", column="translation", target_length=24, label_smoothing=0.1, beams=2),
            Classification(name="long", source="pairs", column="long"),
        ),
        "phases": (Phase("everything", steps=6),),
        "optimizer": Optimizer(learning_rate=1e-2),
        "batch": Batching(rows=8, row_length=32, target_length=24, examples_per_row=4),
        "evaluation": Evaluation(every=3),
        "checkpoints": Checkpoints(every=2),
        "devices": 1,
    }
    return Experiment(**(values | changes))


if __name__ == "__main__":
    main(experiment(os.environ["TINY"]), description="The tiny translation.")
