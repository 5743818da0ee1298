"""How long Python takes to start with mtl_jax: CPU seconds of fresh processes, beside those of jax, flax and optax.

    python benchmarks/startup.py

Writes benchmarks/results/startup.md. Bytecode is compiled before the first measurement.
"""

from __future__ import annotations

import platform
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import tabulate

REPETITIONS = 5
PROGRAMS = {
    "import jax, flax.linen, optax": ["-c", "import jax, flax.linen, optax"],
    "import mtl_jax": ["-c", "import mtl_jax"],
    "import mtl_jax, and Experiment": ["-c", "import mtl_jax; mtl_jax.Experiment"],
    "from mtl_jax import weighting": ["-c", "from mtl_jax import weighting"],
    "mtl-jax --help": ["-c", "from mtl_jax.cli.main import console; console()", "--help"],
}


def cpu_seconds(arguments: list[str]) -> float:
    """User and system time of a fresh Python process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measures all programs in turn, and writes the table."""
    times: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for turn in range(REPETITIONS + 1):
        for name, arguments in PROGRAMS.items():
            seconds = cpu_seconds(arguments)
            if turn:  # the first compiles bytecode and fills the page cache
                times[name].append(seconds)
    rows = [[name, min(values), statistics.median(values), max(values)] for name, values in times.items()]
    table = tabulate.tabulate(rows, ["program", "least, s", "median, s", "most, s"], tablefmt="github", floatfmt=".2f")
    host = f"{platform.machine()}, Python {platform.python_version()}"
    text = f"`python benchmarks/startup.py` on {host}; CPU seconds of {REPETITIONS} fresh processes each.\n\n{table}\n"
    (Path(__file__).parent / "results" / "startup.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
