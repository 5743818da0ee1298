"""The audit of every experiment of this repository: how many held-out rows are copies of training rows, and which stay.

    MTL_JAX_DATA=DATA python benchmarks/audit_experiments.py

Each script is audited by `mtl-jax audit` in a process of its own; one whose data are not there is named and left out. Writes
results/audit_experiments.md and .json: numbers, no texts.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tabulate import tabulate

HERE = Path(__file__).resolve().parent
HEADS = [
    "experiment",
    "held-out rows",
    "exact",
    "letters",
    "near",
    "training rows",
    "of them dropped",
    "labels in conflict",
    "s",
]
PAIR_HEADS = ["experiment", "held out", "train", "compared", "exact", "letters", "near", "% of held out", "stay in train"]
SHARE = 0.01  # of a held-out split from which on a pair has a line of its own


def audited(script: Path) -> dict[str, Any] | None:
    """The JSON of `mtl-jax audit` and its seconds; None, with a line, where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "audit.json")
        started = time.monotonic()
        command = [sys.executable, "-m", "mtl_jax", "audit", str(script), "--json", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, check=False)
        if done.returncode:
            print(f"{script.name}: {(done.stderr.strip().splitlines() or ['failed'])[-1][:200]}", flush=True)
            return None
        return {**json.loads(file.read_text(encoding="utf-8")), "seconds": round(time.monotonic() - started, 1)}


def summary(name: str, audit: dict[str, Any]) -> list[Any]:
    """The row of an experiment: whole rows only, summed over pairs of a held-out split and a source of training rows."""
    whole = [overlap for overlap in audit["overlaps"] if overlap["view"] == "row"]
    kinds = [sum(overlap["rows"][kind] for overlap in whole) for kind in ("exact", "letters", "near")]
    held_out = sum(number for sizes in audit["sizes"].values() for split, number in sizes.items() if split != "train")
    train, dropped = (sum(overlap[field] for overlap in whole) for field in ("train_rows", "dropped"))
    conflicts = sum(sum(conflict["rows"].values()) for conflict in audit["conflicts"])
    return [name, held_out, *kinds, train, dropped, conflicts, audit["seconds"]]


def pairs(name: str, audit: dict[str, Any]) -> list[list[Any]]:
    """The rows of the pairs in which at least SHARE of the held-out rows are copies, the largest first."""
    rows = []
    for overlap in audit["overlaps"]:
        share = sum(overlap["rows"].values()) / max(overlap["of"], 1)
        if share >= SHARE:
            kinds = [overlap["rows"][kind] for kind in ("exact", "letters", "near")]
            where = [f"{overlap['source']} {overlap['split']}", overlap["train_source"], overlap["view"]]
            rows.append([name, *where, *kinds, round(100 * share, 1), overlap["train_rows"] - overlap["dropped"]])
    return sorted(rows, key=lambda row: -row[-2])


def main() -> None:
    """Audits all experiments, and writes both tables."""
    rows, lines = [], []
    for script in sorted((HERE.parent / "experiments").glob("*.py")):
        audit = audited(script)
        if audit is not None:
            rows.append(summary(script.stem, audit))
            lines += pairs(script.stem, audit)
            print(rows[-1], flush=True)
    host = f"{platform.machine()}, {os.cpu_count()} CPU cores, Python {platform.python_version()}"
    write({"host": host, "experiments": rows, "pairs": lines})


def write(content: dict[str, Any]) -> None:
    """Writes both tables, and their JSON with the seconds of each audit (wall time)."""
    text = (
        f"`python benchmarks/audit_experiments.py` on {content['host']}, near copies from 0.7 on. The first table counts whole "
        "rows, for each pair of a held-out split and a source of training rows; copies whose lower-cased text is the same are "
        f"dropped by every run. The second has the pairs in which at least {100 * SHARE:.0f} % of the held-out rows are "
        "copies.\n"
    )
    summaries = tabulate([row[:-1] for row in content["experiments"]], HEADS[:-1], "github", intfmt=",")
    tables = [summaries, tabulate(content["pairs"], PAIR_HEADS, "github", intfmt=",")]
    results = HERE / "results"
    (results / "audit_experiments.md").write_text("\n\n".join([text.strip(), *tables]) + "\n", encoding="utf-8")
    named = {"experiments": HEADS, "pairs": PAIR_HEADS}
    lines = {part: [dict(zip(heads, row, strict=True)) for row in content[part]] for part, heads in named.items()}
    (results / "audit_experiments.json").write_text(json.dumps({**content, **lines}, indent=2) + "\n", encoding="utf-8")
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
