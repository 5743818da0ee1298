"""Functions that write texts from texts: an encoder-decoder, a decoder-only model, a run, or a command of the user's."""

from __future__ import annotations

import functools
import logging
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mtl_jax import decoding, pretrained
from mtl_jax.core.errors import UserError, count
from mtl_jax.core.files import reason, shown
from mtl_jax.core.row_texts import plain
from mtl_jax.pretrained import locate
from mtl_jax.pretrained.tensor_files import read_json

log = logging.getLogger(__name__)

# (texts, seed of sampling, or one for each text) -> a text for each; "" where none was written.
Write = Callable[[Sequence[str], int | Sequence[int]], list[str]]


def check(where: str, field: str, model: str, command: Sequence[str]) -> None:
    """Raises UserError unless either a model or a command is given, and the command's program exists.

    Args:
        where: The beginning of the line.
        field: The name of the field with the model; that of the command is FIELD_command.
        model: The model.
        command: The command.
    """
    if isinstance(command, str):
        raise UserError(f"{where}: {field}_command is the text {shown(command)!r}; it must be a tuple of program and arguments")
    if bool(model) == bool(command):
        given = "both are given" if model else "neither is given"
        raise UserError(f"{where}: {field} or {field}_command must write the texts, and {given}")
    if command and shutil.which(command[0]) is None:
        raise UserError(f"{where}: {field}_command: there is no program {shown(command[0])}")
    if model and not is_run(model) and Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise UserError(f"{where}: {field} {shown(model)} is neither a checkpoint nor the workdir of a run")


def is_run(path: str) -> bool:
    """Whether a path is the workdir of a run."""
    return (Path(path) / "data.json").is_file()


def languages(model: str) -> tuple[str, str]:
    """The languages that a checkpoint reads and writes, if its tokenizer_config.json names them; else "".

    Names are cut to two letters of ISO 639: a checkpoint may have en, eng or en_XX.
    """
    if not model or is_run(model):
        return "", ""
    try:
        raw = read_json(locate.locate(model), "tokenizer_config.json")
    except UserError:
        return "", ""
    source, target = (str(raw.get(name) or "")[:2].lower() for name in ("source_lang", "target_lang"))
    return source, target


def by_model(model: str, options: dict[str, Any]) -> Write:
    """The writer of an encoder-decoder checkpoint or of a run.

    Args:
        model: A checkpoint, or the workdir of a run.
        options: Arguments of mtl_jax.translate: task, languages, prefix, and options of the search.

    Raises:
        UserError: It cannot be opened.
    """
    import mtl_jax  # opened by the public door, as a script opens it: models stand above this package

    return _of_different(model, functools.partial(mtl_jax.translate, _opened(model), **options))


def by_prompts(model: str, options: dict[str, Any]) -> Write:
    """The writer of any checkpoint or run that writes texts, also of a decoder-only one, whose texts are prompts.

    A decoder-only checkpoint continues a prompt until a line ends; a run has learned where a text ends. With do_sample each
    prompt has a draw of its own, which follows from its seed; else equal prompts have one answer.

    Args:
        model: A checkpoint, or the workdir of a run.
        options: Options of the search.

    Raises:
        UserError: It cannot be opened.
    """
    import mtl_jax

    opened = _opened(model)
    if not is_run(model) and opened.head == "causal_lm":
        # It has no token that starts a decoder, which an encoder-decoder needs: any number will do.
        declared = decoding.resolve(opened.raw, opened.location, decoder_start_token_id=0).eos_token_id
        ends = {*declared, opened.tokenizer.eos_token_id, *line_ends(opened.tokenizer)} - {None}
        options = {**options, "eos_token_id": tuple(sorted(ends))}
    answer: Callable[..., Sequence[Any]] = functools.partial(mtl_jax.generate, opened, **options)
    if not options.get("do_sample"):
        return _of_different(model, answer)

    def write(texts: Sequence[str], seed: int | Sequence[int]) -> list[str]:
        asked = list(zip(texts, [seed] * len(texts) if isinstance(seed, int) else seed, strict=True))
        # In sorted order, so that batches do not depend on the order of rows.
        different = sorted(set(asked))
        log.info("%s writes %s ...", shown(model), count(len(different), "text"))
        answers = answer([text for text, _ in different], seed=[number for _, number in different])
        written = {draw: str(new_text).strip() for draw, new_text in zip(different, answers, strict=True)}
        return [written[draw] for draw in asked]

    return write


def line_ends(tokenizer: Any) -> list[int]:
    """The tokens that begin with the end of a line, in order.

    Args:
        tokenizer: A tokenizer of transformers.
    """
    numbers = tokenizer.get_vocab()
    # A vocabulary has the end of a line as itself, as the letter of byte-level BPE, or as a byte.
    likely = sorted(number for token, number in numbers.items() if token.startswith(("\n", "\u010a", "<0x0A>")))
    return [number for number in likely if tokenizer.decode([number]).startswith("\n")]


def _opened(model: str) -> Any:
    import mtl_jax

    return mtl_jax.load_model(model) if is_run(model) else pretrained.load(model)


def _of_different(model: str, answer: Callable[..., Sequence[Any]]) -> Write:
    """The writer that answers each different text once."""

    def write(texts: Sequence[str], seed: int | Sequence[int]) -> list[str]:
        # In sorted order, so that the draws for a text do not depend on the order of rows.
        different = sorted(set(texts))
        log.info("%s writes %s ...", shown(model), count(len(different), "text"))
        answers = answer(different, seed=seed if isinstance(seed, int) else min(seed, default=0))
        written = {text: str(new_text).strip() for text, new_text in zip(different, answers, strict=True)}
        return [written[text] for text in texts]

    return write


def by_command(command: Sequence[str], where: str, *, each: bool = False) -> Write:
    """The writer of a command, which gets a text a line on standard input and writes a line for each; no shell is used.

    Args:
        command: The program and its arguments.
        where: The beginning of an error line.
        each: Whether it gets a line for each text, in the order of texts and seeds; else for each different text.
    """

    def write(texts: Sequence[str], seed: int | Sequence[int]) -> list[str]:
        on_lines = [" ".join(text.split()) for text in texts]
        seeds = seed if each and not isinstance(seed, int) else [0] * len(texts)
        asked = list(zip(on_lines, seeds, strict=True))
        # In sorted order, so that the lines do not depend on the order of rows.
        ordered = sorted(set(asked))
        different = [line for line, _ in ordered]
        try:
            lines = "".join(f"{text}\n" for text in different)
            done = subprocess.run(list(command), input=lines, capture_output=True, encoding="utf-8", check=False)
        except OSError as error:
            raise UserError(f"{where}: {shown(command[0])} cannot be started ({reason(error)})") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: {shown(command[0])} wrote what is not UTF-8") from error
        if done.returncode:
            last = plain(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "")
            raise UserError(f"{where}: {shown(command[0])} ended with exit code {done.returncode} ({shown(last)})")
        answers = done.stdout.splitlines()
        if len(answers) != len(different):
            raise UserError(
                f"{where}: {shown(command[0])} wrote {count(len(answers), 'line')} for {count(len(different), 'text')}; it "
                "must write one for each, in order, and an empty line where it has none"
            )
        written = dict(zip(ordered, answers, strict=True))
        return [written[line].strip() for line in asked]

    return write
