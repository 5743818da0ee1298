"""Commands before training: which tasks help which, what leaks, files without names, what a run needs on a pod."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import tyro

from mtl_jax.cli import scripts
from mtl_jax.core.errors import UserError
from mtl_jax.core.files import write_json
from mtl_jax.core.text_lines import print_lines


def affinity(
    script: Annotated[str, tyro.conf.Positional],
    /,
    target: str = "",
    estimators: tuple[str, ...] = (),
    rows: int = 512,
    layer: int = 0,
    runs: tuple[str, ...] = (),
    models: int = 0,
    resamples: int = 20,
    seed: int = 0,
    json: str = "",
) -> None:
    """Ranks the tasks of an experiment as sources for each other, by estimates that need no training of the trunk.

    Prints for every target a table of estimators and their first sources, with 90% intervals over the target's rows, the flags
    that train the advice, and the seconds of each estimator. Estimators that do not apply to a kind of task are listed with the
    reason.

    Args:
        script: A script that calls mtl_jax.main; its own flags come after --.
        target: The task to be helped. Default: each task in turn.
        estimators: Names of estimators, such as logme leep text_similarity. Default: all, and those of --import FILE.
        rows: The most training rows of a task that are used, chosen at random.
        layer: The layer of the trunk whose features are read, from 1; 0: its output.
        runs: Workdirs of finished runs of some of the tasks. Estimators of a source's features need them; for leep and nce they
            replace heads that are fitted on the trunk before training.
        models: The most models to divide the tasks among, by the gains of grad_tag, which needs a finished run of all tasks in
            runs; 0: no groups.
        resamples: Half-samples of the target's rows for the intervals; 0: no intervals.
        seed: Of the rows, half-samples and heads.
        json: A file to write everything to, as JSON.
    """
    from mtl_jax.affinity.experiment_affinity import of_experiment, table

    check_json(json)
    experiment = scripts.read(script, "rank")
    options = {"rows": rows, "layer": layer, "models": models, "resamples": resamples, "seed": seed}
    result = of_experiment(experiment, target, estimators, runs=runs, **options)
    print(table(result))
    if json:
        write_json(Path(json), result.as_json())
        print(f"everything is in {json}")


def audit(
    script: Annotated[str, tyro.conf.Positional],
    /,
    near: float = 0.7,
    embeddings: str = "",
    close: float = 0.9,
    json: str = "",
    texts: bool = False,
) -> None:
    """Copies of held-out rows in the training rows of all sources of an experiment, and copies under another label in train.

    Prints tables of counts, and ten examples of each by file and line. Nothing is trained or written.

    Args:
        script: A script that calls mtl_jax.main; its own flags come after --.
        near: The least similarity of near copies, above 0 and at most 1: one word in ten may differ at 0.7.
        embeddings: An encoder, to find rows that are close in meaning, too: minilm, or the path of a checkpoint.
        close: The least cosine of such rows, above 0 and at most 1.
        json: A file to write with the same as JSON.
        texts: Also show the texts of the examples.
    """
    from mtl_jax import audit as audits
    from mtl_jax.audit.copies import check

    check(near, "--near")
    check(close, "--close")
    check_json(json)
    result = audits.of_experiment(scripts.read(script, "audit"), near, embeddings=embeddings, close=close)
    if json:
        write_json(Path(json), result.to_json(texts))
    print_lines([result.table(texts)])


def deidentify(
    file: Annotated[str, tyro.conf.Positional],
    /,
    output: str,
    mode: str = "mask",
    kinds: tuple[str, ...] = (),
    names: str = "",
    seed: int = 0,
    key_file: str = "",
    language: str = "en_US",
    format: str = "",
    columns: tuple[str, ...] = (),
    text: tuple[str, ...] = (),
    labels: tuple[str, ...] = (),
    spans: str = "",
) -> None:
    """Writes a file in which e-mail addresses, numbers, names and the like are replaced, and prints how many by type.

    The new file has the same format. Labels of words and the characters of answers move with their text.

    Args:
        file: A file of jsonl, csv, tsv, CoNLL or lines of text; a name with .gz is unpacked.
        output: The file to write, whole or not at all.
        mode: mask: by the type, as [EMAIL]. surrogate: by another value of the type, the same for the same value. hash: by the
            type and a keyed hash.
        kinds: The types that are replaced, such as email user person. Default: all that can be found.
        names: Who finds persons, places and organisations: the workdir of a tagging run, or WORKDIR:TASK; or presidio. Default:
            names stay.
        seed: Of surrogates.
        key_file: A file with the key of hashes.
        language: Of surrogates, as Faker names it.
        format: jsonl, csv, tsv, conll or lines. Default: by the ending of the file's name.
        columns: Names of the columns of a csv or tsv file without header, and of CoNLL.
        text: The columns that change. Default: all but --labels; of CoNLL the first. A list is one of words; with spaces
            inside its entries, and without labels, one of texts.
        labels: Columns with a label for each word of the first text column; of CoNLL all others.
        spans: A file to write with each replaced place as JSON: row, column, type, and characters in the old and the new text.
    """
    from mtl_jax.audit.deidentified_files import deidentify as write

    source: dict[str, Any] = {"format": format, "columns": columns, "text": text, "labels": labels, "spans": spans}
    how: dict[str, Any] = {
        "mode": mode,
        "kinds": kinds,
        "names": names,
        "seed": seed,
        "key_file": key_file,
        "language": language,
    }
    print(f"{write(file, output, **how, **source)}; everything is in {output}")


def plan(
    script: Annotated[str, tyro.conf.Positional],
    /,
    topology: tuple[str, ...] = (),
    rows: int = 0,
    sharding: str = "",
    json: str = "",
) -> None:
    """What a run needs on devices that are not here: memory, time, operations and communication of a step of every phase.

    The compiler of those devices compiles the script's own steps; nothing is trained. Compilers are extras, mtl_jax[plan-tpu]
    and mtl_jax[plan-gpu]. A step of a small model compiles in seconds, of MiniLM's or BERT's in minutes. For GPUs there are
    memory, operations and kernels, but no times.

    Args:
        script: A script that calls mtl_jax.main; its own flags come after --.
        topology: Kinds of TPUs and blocks of them, as v5e:2x2 v5e:16x16 v5p:2x2x1 v6e:2x2 v4:2x2x1, or of GPUs and their
            number, as h100:8 h200:16 a100:8; several are shown side by side.
        rows: Rows of a batch over all devices. Default: as the script has it.
        sharding: replicated, fsdp (parameters, optimizer and references cut over the devices) or auto (fsdp where they would
            not fit). Default: as the script has it.
        json: A file to write the numbers to: an object for one topology, a list of objects for several.
    """
    import jax

    from mtl_jax import planning
    from mtl_jax.planning.plan_table import table

    check_json(json)
    jax.config.update("jax_platforms", "cpu")  # a compiler for devices that are not here must not look for them
    plans = planning.plan(scripts.read(script, "plan"), topology, rows, sharding)
    print(table(plans))
    if json:
        values = [item.as_json() for item in plans]
        write_json(Path(json), values[0] if len(values) == 1 else values)
        print(f"the numbers are in {json}")


def check_json(path: str) -> None:
    """Raises UserError, before any work, where a file cannot be written."""
    if path and (Path(path).is_dir() or not Path(path).resolve().parent.is_dir()):
        raise UserError(f"--json {path}: name a file in a directory that exists")
