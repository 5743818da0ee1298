"""The command that writes made rows: of the training rows of an experiment's source, or of the rows of a file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from mtl_jax.cli import scripts
from mtl_jax.core import parts
from mtl_jax.core.errors import UserError, listed, unknown
from mtl_jax.core.files import shown
from mtl_jax.core.row_texts import hiding
from mtl_jax.core.text_lines import print_lines

SHOWN = 10  # made rows that are shown


def augment(
    rows: Annotated[str, tyro.conf.Positional],
    /,
    output: str,
    source: str = "",
    by: str = "",
    options: dict[str, str] = {},  # noqa: B006  tyro reads it and never changes it
    copies: int = 1,
    format: str = "",
    columns: tuple[str, ...] = (),
    text: str = "text",
    pair: str = "",
    labels: tuple[str, ...] = (),
    held_out: tuple[str, ...] = (),
) -> None:
    """Writes rows that augmentations make of training rows, a JSON object a line with its provenance, and prints ten.

    Of a script: of the training rows of its source, by the source's augmentations and those of the run; dev and test are not
    touched, and no text of theirs is made. Train on the result by augment=(Written(path=OUTPUT, added=N),), where N is how many
    rows were made of a row.

    Args:
        rows: A script that calls mtl_jax.main, whose own flags come after --; or a file with training rows.
        output: The file to write, whole or not at all.
        source: Of a script: the source. Default: the only one with augmentations.
        by: For a file: the augmentation, by the name of its class, such as Eda.
        options: For a file: fields of the augmentation and their values, such as swap 0.2 delete 0.
        copies: How many rows are made of a row, by each augmentation that has no `added` of its own.
        format: For a file: csv, tsv, jsonl, conll or another format of sources. Default: by the ending of its name.
        columns: For a file: names of its columns, where it has no header.
        text: For a file: the column with the text.
        pair: For a file: the column with a second text.
        labels: For a file: columns with a label for each word of the text.
        held_out: For a file: files of the same format whose texts must not be made, such as dev and test.
    """
    from mtl_jax import augment as augmenting
    from mtl_jax.data import made_rows

    if Path(output).is_dir() or not Path(output).resolve().parent.is_dir():
        raise UserError(f"--output {shown(output)}: name a file in a directory that exists")
    if rows.endswith(".py"):
        if by or options or labels or held_out:
            raise UserError("--by, --options, --labels and --held-out are for a file; a script's sources have augmentations")
        experiment = scripts.read(rows, "augment")
        private, made = experiment.private, augmenting.of_experiment(experiment, source, copies)
    else:
        private = False
        if source:
            raise UserError("--source is for a script; a file is one source")
        named: dict[str, Any] = {"columns": columns, "text": text, "pair": pair, "labels": labels, "held_out": held_out}
        made = augmenting.of_file(rows, augmentation(by, options), format=format or _format(rows), copies=copies, **named)
    augmenting.write(made, output)
    with hiding(private):
        print_lines(made_rows.shown(row) for row in made.rows[:: max(1, len(made.rows) // SHOWN)][:SHOWN])
    print(f"{made}; everything is in {output}")


def augmentation(name: str, options: dict[str, str]) -> Any:
    """An augmentation by the name of its class, with fields as a command line has them.

    Raises:
        UserError: There is no such class or field, or a value cannot be read.
    """
    from mtl_jax import augment as augmenting
    from mtl_jax.data import Augmentation

    for known in dir(augmenting):  # a kind is known by its name once its module is loaded
        getattr(augmenting, known)
    kinds: dict[str, Any] = dict(parts.kinds(Augmentation))
    if name not in kinds:
        if name:
            raise unknown("--by", name, sorted(kinds))
        raise UserError(f"--by is needed for a file: one of {listed(sorted(kinds))}")
    kind: Any = kinds[name]
    fields = {field.name: field for field in dataclasses.fields(kind)}
    values: dict[str, Any] = {"share": 1.0}
    for option, text in options.items():
        if option not in fields:
            raise unknown(f"field of {name} in --options:", option, fields)
        kind = getattr(fields[option].type, "__name__", str(fields[option].type))
        try:
            values[option] = int(text) if kind == "int" else float(text) if kind == "float" else _value(kind, text)
        except ValueError as error:
            raise UserError(f"--options {option}: {text!r} cannot be read as {kind}") from error
    return kinds[name](**values)


def _value(kind: str, text: str) -> Any:
    if kind == "bool":
        if text not in ("true", "false"):
            raise ValueError(text)
        return text == "true"
    return tuple(text.split(",")) if kind.startswith("tuple") else text


def _format(file: str) -> str:
    from mtl_jax.audit.deidentified_files import ENDINGS

    kind = ENDINGS.get(Path(file.removesuffix(".gz")).suffix, "")
    if not kind or kind == "lines":
        raise UserError(f"{shown(file)}: its name does not tell its format; give --format")
    return kind
