"""Commands after training: predictions and metrics of a run, exports, merged models, and tables and reports of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import tyro

from mtl_jax.cli.before_training import check_json
from mtl_jax.core.errors import UserError
from mtl_jax.core.files import to_json, write_json
from mtl_jax.core.text_lines import print_lines


def predict(
    workdir: Annotated[str, tyro.conf.Positional],
    /,
    task: Annotated[tuple[str, ...], tyro.conf.UseAppendAction],
    text: tuple[str, ...] = (),
    file: str = "",
    output: str = "",
    with_input: bool = False,
    field: str = "prediction",
    top_k: int | None = None,
    deidentify: bool = False,
    rows: int = 0,
    chunk: int = 4096,
) -> None:
    """Predictions of a run's best checkpoint: one JSON object per line, in the order of the input.

    Args:
        workdir: The run's workdir.
        task: The task whose head answers; may be given several times. Of several, a line is {task: prediction}; those that
            read a text in the same way share one pass over the trunk.
        text: Texts to predict.
        file: A UTF-8 file with one text per line, or, if its name ends in .jsonl, with one JSON object per line that has the
            text columns of the task's source; - for standard input. Every line gets an answer, an empty line an error object.
        output: The file to write; without it, or "-": standard output. The file is replaced when all answers are done. Until
            then OUTPUT.part keeps the finished chunks, and the same command, started again, resumes from them.
        with_input: Write all fields of the input's line, too, and the prediction as one field more.
        field: The name of that field.
        top_k: Also give the most likely labels, as many, with their probabilities.
        deidentify: Replace names and the like in the texts, as the source did in training.
        rows: Rows of a batch on each device. Default: those of the run's batches.
        chunk: Lines that are read, computed and kept at once.
    """
    from mtl_jax.inference.predict_file import Request, answer_file

    if with_input and not field:
        raise UserError("--field is empty; it names the prediction beside the fields of its line")
    tasks = (task,) if isinstance(task, str) else tuple(task)
    request = Request(tasks, tuple(text), file, top_k, deidentify, field if with_input else "", rows, chunk)
    answer_file(workdir, request, output, title="predict", signals=True)


def evaluate(
    workdir: Annotated[str, tyro.conf.Positional],
    /,
    task: str,
    path: str,
    format: str = "",
    deidentify: bool = False,
) -> None:
    """Loss and metrics of a run's best checkpoint on other rows: one JSON object, null where a metric is not defined.

    Args:
        workdir: The run's workdir.
        task: The task whose head answers.
        path: The rows, with the columns of the task's source: a file, data:REST, tfds:NAME#SPLIT or hf:ORG/NAME#SPLIT.
        format: The file's format, if it differs from the source's.
        deidentify: Replace names and the like in the rows, as the source did in training.
    """
    from mtl_jax.inference import predict as prediction

    print_lines([to_json(prediction.evaluate(workdir, task, path, format, deidentify=deidentify))])


def pseudo_label(
    workdir: Annotated[str, tyro.conf.Positional],
    path: Annotated[str, tyro.conf.Positional],
    /,
    output: str,
    task: str = "",
    format: str = "",
    choice: str = "confidence",
    threshold: float = 0.9,
    per_class: int = 0,
    passes: int = 10,
    seed: int = 0,
) -> None:
    """Labels rows by a run's best checkpoint; writes those with a good enough label as JSON lines, for another run.

    Rows that are copies of a dev or test row of the run are left out. Prints how many rows got each label, as JSON.

    Args:
        workdir: The run's workdir.
        path: The rows, with the text columns of the task's source: a file, data:REST, tfds:NAME#SPLIT or hf:ORG/NAME#SPLIT.
        output: The file to write.
        task: A task with one label for a text. Default: the run's only such task.
        format: The file's format, if it differs from the source's; a name in .jsonl says so itself.
        choice: confidence: all rows with enough of it. balanced: as many of each label. uncertainty: as many of each label, on
            which passes with dropout agree most.
        threshold: The least probability of a label.
        per_class: The most rows of a label; 0: for balanced and uncertainty as many as the rarest label has.
        passes: For uncertainty: passes with dropout.
        seed: For uncertainty: seed of the dropout.
    """
    from mtl_jax.inference import pseudo_label as labelling

    options: dict[str, Any] = {"threshold": threshold, "per_class": per_class, "passes": passes, "seed": seed}
    summary = labelling.pseudo_label(workdir, path, output, task=task, format=format, choice=choice, **options)
    print_lines([to_json(summary, ensure_ascii=False)])


def convert(
    source: Annotated[str, tyro.conf.Positional],
    target: Annotated[str, tyro.conf.Positional],
    /,
    task: str = "",
    overwrite: bool = False,
    peft: bool = False,
    stablehlo: bool = False,
) -> None:
    """A run's trunk, or any checkpoint, as a directory that transformers opens, with its tokenizer and a model card.

    Args:
        source: A run's workdir, or a checkpoint: a directory, pip:ASSET/MEMBER, or a hub id ORG/NAME.
        target: The directory to write.
        task: For a workdir: the task whose head is written with the trunk. A text task with head="family" opens in
            pipeline("text-classification"); others lie beside the trunk, in the format of sentence-transformers.
        overwrite: Replace an existing checkpoint.
        peft: Write only the run's adapters, as a directory for PEFT: LoRA and its relatives, IA3, prefix and prompt tuning.
        stablehlo: Write the task's predictor as a program that jax runs without mtl_jax, with tokenizer and parameters: of any
            trunk, also one that transformers has no class for.
    """
    from mtl_jax.inference import export

    if note := export.write(source, target, task, overwrite, peft, stablehlo):
        print(note)
    print(f"everything is in {target}")


def merge(
    target: Annotated[str, tyro.conf.Positional],
    sources: Annotated[tuple[str, ...], tyro.conf.Positional],
    /,
    method: str,
    base: str = "",
    weights: tuple[float, ...] = (),
    alpha: float | None = None,
    scale: tuple[float, ...] = (),
    keep: float | None = None,
    drop: float | None = None,
    seed: int | None = None,
    trunk_only: bool = False,
    overwrite: bool = False,
) -> None:
    """Merges models: finished runs into a workdir, or checkpoints of one family into a directory that transformers opens.

    For runs, the best checkpoints are merged. Heads of tasks that all runs have are merged like the trunk; the other heads are
    kept side by side. If the runs' data can be read, the result is evaluated on dev and test.

    Args:
        target: The directory to write; its merge.json records the sources and the method.
        sources: Workdirs; or checkpoints: directories, pip:ASSET/MEMBER, or hub ids ORG/NAME.
        method: soup: the mean. average: the mean weighted by --weights. greedy: the best run by dev, and in order of dev every
            other run that does not lower its score. wise: (1 - alpha) base + alpha source. arithmetic: base + scale * the sum
            of (source - base). ties: base + scale * the mean of the sources' largest changes that agree in sign. dare,
            dare_ties: changes are dropped at random and the others scaled up, then arithmetic or ties.
        base: For wise, arithmetic, ties and dare: the checkpoint or run that the sources started from.
        weights: For average: one for each source.
        alpha: For wise: from 0, the base, to 1, the source (0.5).
        scale: For arithmetic, ties and dare (1.0); for arithmetic and dare also one for each source. May be negative.
        keep: For ties: the share of each source's changes that is kept (0.2).
        drop: For dare: the share of each source's changes that is dropped (0.9).
        seed: For dare: the seed of what is dropped (0).
        trunk_only: For checkpoints with different heads: merge the bare models.
        overwrite: Replace the result of an earlier merge.
    """
    from mtl_jax import merging
    from mtl_jax.training import results_table

    numbers: dict[str, Any] = {"weights": weights, "alpha": alpha, "scale": scale, "keep": keep, "drop": drop, "seed": seed}
    scores = merging.merge(target, sources, method, base=base, **numbers, trunk_only=trunk_only, overwrite=overwrite)
    if scores is not None:
        print(results_table.table([scores]))
    print(f"everything is in {target}")


def memorisation(
    workdir: Annotated[str, tyro.conf.Positional],
    /,
    task: tuple[str, ...] = (),
    reference: str = "",
    held_out: str = "test",
    rows: int = 2000,
    candidates: int = 255,
    seed: int = 0,
    json: str = "",
) -> None:
    """What a run remembers of its training rows: membership inference by loss, and the exposure of canaries.

    Prints for each task how well losses tell training rows from held-out rows: AUC (0.5: not at all) with a 95 % interval, and
    the share of training rows above the score that 1 % of the others exceed; then how much the run knows about the canaries of
    its sources, in bits.

    Args:
        workdir: The run's workdir; its training rows are read again.
        task: Tasks of the run. Default: all.
        reference: The workdir of a run with the same tasks that was not trained on these rows, whose losses are subtracted.
        held_out: The rows that the run was not trained on: test or dev.
        rows: The most rows of each side, chosen at random.
        candidates: Rows that could have been planted, for each canary.
        seed: Of the chosen rows and the intervals.
        json: A file to write the same to, as JSON.
    """
    from mtl_jax.inference.memorisation import memorisation as measure

    check_json(json)
    result = measure(workdir, task, reference=reference, held_out=held_out, rows=rows, candidates=candidates, seed=seed)
    if json:
        write_json(Path(json), result.to_json())
    print(result)


def results(workdirs: tyro.conf.Positional[tuple[str, ...]], /) -> None:
    """The table of results of a finished run, or mean and standard deviation over several runs.

    Args:
        workdirs: Workdirs of finished runs. Each experiment and set of tasks has one table, and there each setting a column:
            runs that differ only in the seed.
    """
    from mtl_jax.training import results_table as module

    print(module.results(*workdirs))


def compare(
    joint: Annotated[str, tyro.conf.Positional],
    alone: Annotated[tuple[str, ...], tyro.conf.Positional],
    /,
    joint_too: Annotated[tuple[str, ...], tyro.conf.arg(name="joint")] = (),
    json: str = "",
    resamples: int = 2000,
    seed: int = 0,
) -> None:
    """Is anyone hurt? For every task joint minus alone on test, with 95 % intervals over rows and seeds.

    The outputs on the test rows are computed again, without training, and kept in the cache: a second call takes seconds.

    Args:
        joint: Joint runs: a workdir, an ablation, or a pattern such as "runs/hard*"; NAME=PATHS names its column. Runs that
            differ only in the seed are one setting, and every other setting has a column.
        alone: Runs of one task each, also as patterns; a run with several tasks is compared in each of them.
        joint_too: More joint settings, each NAME=PATHS with a column of its own.
        json: A file to write the same to, as JSON.
        resamples: Bootstrap samples.
        seed: Of these samples.
    """
    from mtl_jax import reporting
    from mtl_jax.ablation.compare_runs import compare as compared

    check_json(json)
    result = compared(reporting.named([joint, *joint_too]), alone, resamples=resamples, seed=seed)
    if json:
        write_json(Path(json), result.to_json())
    print(result)


def report(
    workdirs: tyro.conf.Positional[tuple[str, ...]],
    /,
    output: str = "",
    affinity: str = "",
    alone: tuple[str, ...] = (),
) -> None:
    """A report on an ablation, or on ordinary runs side by side: a page, a table of all values, statistics and figures.

    Writes report.html, which needs no other file, ablation.csv, results.json and figures/*.png.

    Args:
        workdirs: One ablation; or workdirs of runs with the same tasks, such as "runs/*". Runs that differ only in the seed
            are shown as mean and standard deviation.
        output: The directory to write. Default: the ablation's workdir; for runs, report/.
        affinity: A file that mtl-jax affinity --json wrote, for a section on which tasks help which.
        alone: Runs of one task each, for a section on which tasks the joint training helped and hurt, as mtl-jax compare.
    """
    from mtl_jax import reporting

    print(f"the report is {reporting.report(*workdirs, output=output, affinity=affinity, alone=alone)}")
