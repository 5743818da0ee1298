"""Texts that a run's decoders give: for metrics on dev and test, and as predictions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from mtl_jax import decoding
from mtl_jax.core.errors import UserError
from mtl_jax.core.progress import Progress
from mtl_jax.data.examples import Examples
from mtl_jax.data.targets import decoder
from mtl_jax.decoding import GenerationConfig
from mtl_jax.models.encoder_decoder import Seq2Seq as EncoderDecoder
from mtl_jax.tasks import Seq2Seq
from mtl_jax.training import mesh as meshes
from mtl_jax.transfer.adapters import as_module
from mtl_jax.trunks import Trunk

ROWS = 32  # texts that are decoded at once, on each device


class Generated(NamedTuple):
    """What a decoder gave for a row.

    Attributes:
        text: The text.
        score: Log-probability over a power of its length, as in decoding.
        ended: Whether it came to an end; else the most tokens that it may have were not enough.
    """

    text: str
    score: float
    ended: bool


def config_of(task: Seq2Seq, trunk: Trunk, beams: int) -> GenerationConfig:
    """How a task's texts are searched for: as its checkpoint says, but for what the task says."""
    call: dict[str, Any] = {
        "num_beams": beams,
        "num_return_sequences": 1,
        "do_sample": False,
        "max_new_tokens": task.max_new_tokens or task.target_length,
        "length_penalty": task.length_penalty,
        "decoder_start_token_id": task.start,
    }
    if task.from_checkpoint:
        first = trunk.tokenizer(text_target="")["input_ids"][0] if hasattr(trunk.tokenizer, "tgt_lang") else task.end
        if first != task.end:  # mBART-50's texts begin with their language
            call["forced_bos_token_id"] = first
        return decoding.resolve(trunk.raw or {}, trunk.location, **call)
    return decoding.resolve({}, None, eos_token_id=task.end, pad_token_id=trunk.tokenizer.pad_token_id or 0, **call)


def check(tasks: tuple[Any, ...], trunk: Trunk) -> None:
    """Raises UserError where the texts of a task cannot be searched for, before anything is trained."""
    for task in tasks:
        if isinstance(task, Seq2Seq):
            for beams in (task.dev_beams, task.beams):
                try:
                    config = config_of(task, trunk, beams)
                    decoding.fit_to_model(EncoderDecoder(as_module(trunk.module, 0), task.module(trunk.module.dtype)), config)
                except UserError as error:
                    raise UserError(
                        f"task {task.name!r}: {error} (as target_length or max_new_tokens and the checkpoint's "
                        "generation_config.json or config.json say)"
                    ) from error


def generate(
    task: Seq2Seq,
    trunk: Trunk,
    params: Any,
    examples: Examples,
    beams: int,
    between: Callable[[], None] = lambda: None,
    *,
    devices: Sequence[jax.Device] = (),
    together: bool = False,
) -> list[Generated]:
    """The decoder's text for each row of a source; of a row in several windows, for its first one; "" where there is none.

    Args:
        task: The task, put on the trunk.
        trunk: The trunk.
        params: {"trunk": ..., "heads": ...}, which this process has the whole of.
        examples: The source's examples.
        beams: 1: greedy.
        between: Called after each text; what it raises ends the work.
        devices: Of this process, which share the work; none: the one where the parameters are.
        together: Whether all processes call this with the same examples, and each is to generate a part of the texts.
    """
    model = EncoderDecoder(as_module(trunk.module, examples.place), task.module(trunk.module.dtype))
    both = {"trunk": params["trunk"], "head": params["heads"][task.name]}
    rows = [examples.tokens[group[0]] for group in examples.groups()]
    places = [place for place, tokens in enumerate(rows) if len(tokens)]
    if together:  # each process has long ones and short ones
        places = sorted(places, key=lambda place: -len(rows[place]))[jax.process_index() :: jax.process_count()]
    text_of = decoder(trunk.tokenizer)
    sources = [rows[place] for place in places]
    found = [Generated("", 0.0, True)] * len(rows)
    with contextlib.closing(Progress(f"texts of {task.name}", len(sources), unit="text")) as progress:
        config = config_of(task, trunk, beams)
        for answer in decoding.generate_all(model, both, sources, config, rows=ROWS, devices=devices):
            found[places[answer.index]] = Generated(text_of(answer.tokens[0]), float(answer.scores[0]), bool(answer.ended[0]))
            progress.update(1)
            between()
    if together:
        for part in meshes.gather([(place, found[place]) for place in places]):
            for place, generated in part:
                found[place] = Generated(*generated)
    return found


def text_scores(
    tasks: tuple[Any, ...],
    trunk: Trunk,
    params: Any,
    split: dict[str, Examples],
    beams: Callable[[Seq2Seq], int],
    between: Callable[[], None] = lambda: None,
    *,
    devices: Sequence[jax.Device] = (),
    together: bool = False,
) -> dict[str, dict[str, float]]:
    """{task: {metric: value}} of what the tasks that decode generate.

    Args:
        tasks: The tasks of a run.
        trunk: The trunk.
        params: As for generate.
        split: {source: Examples}.
        beams: Of a task.
        between: As for generate.
        devices: As for generate.
        together: As for generate.
    """
    scores = {}
    for task in tasks:
        if isinstance(task, Seq2Seq):
            examples = split[task.source]
            found = generate(task, trunk, params, examples, beams(task), between, devices=devices, together=together)
            rows = [examples.data[examples.row_of[group[0]]] for group in examples.groups()]
            scores[task.name] = task.text_metrics([one.text for one in found], rows)
    return scores
