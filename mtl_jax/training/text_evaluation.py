"""Texts that a run's decoders generate: for metrics on dev and test, and as predictions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from mtl_jax import decoding
from mtl_jax.core.errors import UserError
from mtl_jax.core.progress import Progress
from mtl_jax.data.examples import Examples
from mtl_jax.data.formats.rows import Row
from mtl_jax.data.targets import decoder
from mtl_jax.decoding import GenerationConfig
from mtl_jax.pretrained import language_codes
from mtl_jax.tasks import CausalLM, Seq2Seq
from mtl_jax.training import mesh as meshes
from mtl_jax.transfer.adapters import as_module
from mtl_jax.trunks import Trunk

ROWS = 32  # texts that are decoded at once, on each device


# {task: (row, generated text) of each row}
Texts = dict[str, list[tuple[Row, str]]]


class Generated(NamedTuple):
    """The text that a decoder generated for a row.

    Attributes:
        text: The text.
        score: Log-probability over a power of its length, as in decoding.
        ended: Whether the decoder ended it; else it was cut at the largest number of tokens.
    """

    text: str
    score: float
    ended: bool


def generation_config(task: Seq2Seq | CausalLM, trunk: Trunk, beams: int) -> GenerationConfig:
    """The generation options of a task: those of its checkpoint, replaced by those that the task sets."""
    call: dict[str, Any] = {
        "num_beams": beams,
        "num_return_sequences": 1,
        "do_sample": False,
        "max_new_tokens": task.max_new_tokens or task.target_length,
        "length_penalty": task.length_penalty,
        "decoder_start_token_id": task.start,
    }
    if isinstance(task, CausalLM):  # trained to end as its answers do, whatever the checkpoint's options say
        return decoding.resolve({}, None, eos_token_id=task.end, pad_token_id=task.padding, **call)
    if task.from_checkpoint:
        marks = language_codes.target_marks(language_codes.marked(trunk.tokenizer, *task.languages))
        if marks is not None and marks.first is not None:
            call["forced_bos_token_id"] = marks.first
        return decoding.resolve(trunk.raw or {}, trunk.location, **call)
    return decoding.resolve({}, None, eos_token_id=task.end, pad_token_id=trunk.tokenizer.pad_token_id or 0, **call)


def check(tasks: tuple[Any, ...], trunk: Trunk) -> None:
    """Raises UserError where texts cannot be generated with the options of a task; called before training."""
    for task in tasks:
        if task.decodes:
            sizes = getattr(trunk.module, "config", None)
            if not hasattr(trunk.module, "dtype") or not all(hasattr(sizes, name) for name in ("vocab_size", "max_length")):
                raise UserError(
                    f"task {task.name!r} writes texts, which needs the sizes of the trunk: give the linen module of "
                    f"{type(trunk.declared).__name__} the attributes dtype and config, with vocab_size and max_length"
                )
            for beams in (task.dev_beams, task.beams):
                try:
                    config = generation_config(task, trunk, beams)
                    decoding.fit_to_model(task.generator(as_module(trunk.module, 0, task.name)), config)
                except UserError as error:
                    raise UserError(
                        f"task {task.name!r}: {error} (by target_length or max_new_tokens and the checkpoint's "
                        "generation_config.json or config.json)"
                    ) from error


def generate(
    task: Seq2Seq | CausalLM,
    trunk: Trunk,
    params: Any,
    examples: Examples,
    beams: int,
    after_text: Callable[[], None] = lambda: None,
    *,
    devices: Sequence[jax.Device] = (),
    share_work: bool = False,
) -> list[Generated]:
    """The decoder's text for each row of a source, for a row in several windows from its first; "" for an empty row.

    Args:
        task: The task, put on the trunk.
        trunk: The trunk.
        params: {"trunk": ..., "heads": ...}, whole on this process.
        examples: The source's examples.
        beams: The number of beams; 1: greedy search.
        after_text: Called after each text; an error that it raises ends the work.
        devices: This process's devices that share the work; none: the one where the parameters are.
        share_work: Whether all processes call this with the same examples, and each generates a part of the texts.
    """
    model = task.generator(as_module(trunk.module, examples.place, task.name))
    model_params = {"trunk": params["trunk"], "head": params["heads"][task.name]}
    rows = [task.prompt_of(examples, group[0]) for group in examples.groups()]
    places = [place for place, tokens in enumerate(rows) if len(tokens)]
    if share_work:  # sorted by length first, so that each process gets long rows and short ones
        places = sorted(places, key=lambda place: -len(rows[place]))[jax.process_index() :: jax.process_count()]
    text_of = decoder(trunk.tokenizer)
    sources = [rows[place] for place in places]
    texts = [Generated("", 0.0, True)] * len(rows)
    with contextlib.closing(Progress(f"texts of {task.name}", len(sources), unit="text")) as progress:
        config = generation_config(task, trunk, beams)
        for answer in decoding.generate_all(model, model_params, sources, config, rows=ROWS, devices=devices):
            text, score, ended = text_of(answer.tokens[0]), float(answer.scores[0]), bool(answer.ended[0])
            texts[places[answer.index]] = Generated(text, score, ended)
            progress.update(1)
            after_text()
    if share_work:
        for part in meshes.gather([(place, texts[place]) for place in places]):
            for place, generated in part:
                texts[place] = Generated(*generated)
    return texts


def text_scores(
    tasks: tuple[Any, ...],
    trunk: Trunk,
    params: Any,
    split: dict[str, Examples],
    beams: Callable[[Any], int],
    after_text: Callable[[], None] = lambda: None,
    *,
    devices: Sequence[jax.Device] = (),
    share_work: bool = False,
) -> dict[str, dict[str, float]]:
    """scores_of() the texts of generated_texts(), whose arguments these are."""
    texts = generated_texts(tasks, trunk, params, split, beams, after_text, devices=devices, share_work=share_work)
    return scores_of(tasks, texts)


def generated_texts(
    tasks: Sequence[Any],
    trunk: Trunk,
    params: Any,
    split: Mapping[str, Examples],
    beams: Callable[[Any], int],
    after_text: Callable[[], None] = lambda: None,
    *,
    devices: Sequence[jax.Device] = (),
    share_work: bool = False,
) -> Texts:
    """The texts that the tasks with a decoder generate.

    Args:
        tasks: The tasks of a run.
        trunk: The trunk.
        params: As for generate.
        split: {source: Examples}.
        beams: From a task to its number of beams.
        after_text: As for generate; so are devices and share_work.
    """
    texts: Texts = {}
    for task in tasks:
        if task.generates:
            examples = split[task.source]
            answers = generate(task, trunk, params, examples, beams(task), after_text, devices=devices, share_work=share_work)
            rows = [examples.data[examples.row_of[group[0]]] for group in examples.groups()]
            texts[task.name] = [(row, answer.text) for row, answer in zip(rows, answers, strict=True)]
    return texts


def scores_of(tasks: Sequence[Any], texts: Texts) -> dict[str, dict[str, float]]:
    """{task: {metric: value}} of generated texts.

    Args:
        tasks: The tasks; those without texts are left out.
        texts: The texts.
    """
    kept = [(task, texts[task.name]) for task in tasks if task.name in texts]
    return {task.name: task.text_metrics([text for _, text in pairs], [row for row, _ in pairs]) for task, pairs in kept}
