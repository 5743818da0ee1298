"""Which decoder a task that writes texts has: the checkpoint's, a fresh one, or one that starts as the encoder."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from mtl_jax.core.errors import UserError, count
from mtl_jax.models import warm_start
from mtl_jax.models.seq2seq_layers import Seq2SeqConfig
from mtl_jax.models.trunk_output import TrunkFacts

if TYPE_CHECKING:
    from mtl_jax.tasks.seq2seq import Seq2Seq

LAYERS = 3  # of a decoder on an encoder-only checkpoint, unless the task says otherwise


def of_checkpoint(task: Seq2Seq, trunk: TrunkFacts) -> Seq2SeqConfig:
    """The sizes of the checkpoint's decoder.

    Raises:
        UserError: The task asks for other sizes, or for longer texts than it has positions for; or the checkpoint does not say
            what is read first.
    """
    for field in ("layers", "heads", "feed_forward", "begin"):
        if getattr(task, field) not in (0, "fresh"):
            raise UserError(f"task {task.name!r}: {field} is the checkpoint's, whose decoder this is; leave it out")
    if trunk.start is None:
        raise UserError(f"task {task.name!r}: the checkpoint does not say what its decoder reads first")
    assert trunk.decoder is not None
    return _long_enough(task, trunk.decoder, "checkpoint")


def fresh(task: Seq2Seq, trunk: TrunkFacts) -> Seq2SeqConfig:
    """The sizes of a decoder of the make of a trunk from scratch, or, on an encoder-only checkpoint, with norms in front.

    Raises:
        UserError: The trunk's token table does not fit, or sizes do not fit each other.
    """
    rows, _ = trunk.table
    own = task.table == "own"
    if not own:
        _as_wide(task, trunk)
    vocabulary = len(trunk.tokenizer) if own else rows
    if trunk.decoder is not None:
        decoder = trunk.decoder
    else:
        heads = task.heads or max(1, trunk.width // 64)
        decoder = Seq2SeqConfig(
            vocab_size=rows,
            decoder_vocab_size=vocabulary,
            hidden_size=trunk.width,
            encoder_layers=1,
            decoder_layers=LAYERS,
            encoder_heads=heads,
            decoder_heads=heads,
            encoder_feed_forward=4 * trunk.width,
            decoder_feed_forward=4 * trunk.width,
            max_positions=max(task.target_length, task.max_new_tokens) + 1,
            position_offset=0,
            pre_norm=True,
            dropout=task.dropout,
        )
    decoder = dataclasses.replace(
        decoder,
        decoder_vocab_size=vocabulary,
        shared_table=not own,
        decoder_layers=task.layers or decoder.decoder_layers,
        decoder_heads=task.heads or decoder.decoder_heads,
        decoder_feed_forward=task.feed_forward or decoder.decoder_feed_forward,
    )
    if decoder.hidden_size % decoder.decoder_heads:
        raise UserError(f"task {task.name!r}: {decoder.decoder_heads} heads do not divide the width {decoder.hidden_size}")
    return _long_enough(task, decoder, "trunk")


def like_the_encoder(task: Seq2Seq, trunk: TrunkFacts) -> Seq2SeqConfig:
    """The sizes of a decoder that starts as the trunk.

    Raises:
        UserError: The trunk is none of those whose blocks a decoder can have, or the task asks for other sizes than it has.
    """
    named, encoder = f'task {task.name!r}: begin is "encoder", but', trunk.encoder
    if encoder is None:
        raise UserError(f"{named} this trunk is no checkpoint of BERT, RoBERTa, XLM-R, DistilBERT or ELECTRA")
    for field in ("heads", "feed_forward"):
        if getattr(task, field):
            raise UserError(f"{named} {field} is {getattr(task, field)}; it is the encoder's, leave it out")
    if task.table != "trunk":
        raise UserError(f"{named} table is {task.table!r}; it reads the trunk's, as the encoder does: leave it out")
    _as_wide(task, trunk)
    layers, longest = task.layers or min(LAYERS, encoder.num_layers), max(task.target_length, task.max_new_tokens)
    if layers > encoder.num_layers:
        raise UserError(f"{named} layers is {layers}; the encoder has {encoder.num_layers}")
    if longest >= encoder.max_length:
        raise UserError(
            f"{named} texts of {count(longest, 'token')} and a start are longer than the encoder's {encoder.max_length}"
        )
    return warm_start.decoder_like(encoder, layers, longest + 1, task.dropout)


def _as_wide(task: Seq2Seq, trunk: TrunkFacts) -> None:
    _, width = trunk.table
    if width != trunk.width:
        raise UserError(
            f"task {task.name!r}: the trunk's token table is {width} wide and its output {trunk.width}, so the decoder cannot "
            'share the table: use table "own"'
        )


def _long_enough(task: Seq2Seq, decoder: Seq2SeqConfig, named: str) -> Seq2SeqConfig:
    if decoder.max_positions is not None and task.target_length > decoder.max_positions:
        raise UserError(
            f"task {task.name!r}: target_length is {task.target_length}; the {named} has "
            f"{count(decoder.max_positions, 'position')}"
        )
    return decoder
