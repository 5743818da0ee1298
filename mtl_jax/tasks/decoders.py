"""The sizes of a text task's decoder: the checkpoint's, a new one's, or those of the encoder that it starts as."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from mtl_jax.core.errors import UserError, count, listed, unknown
from mtl_jax.models import warm_start
from mtl_jax.models.seq2seq_layers import Seq2SeqConfig
from mtl_jax.models.trunk_output import TrunkFacts
from mtl_jax.pretrained import language_codes
from mtl_jax.pretrained.locate import languages

LAYERS = 3  # blocks of a decoder on an encoder-only checkpoint, unless the task has another number


class DecoderOptions(Protocol):
    """The fields of a text task that decide about its decoder; tasks.seq2seq.Seq2Seq explains them."""

    @property
    def name(self) -> str: ...
    @property
    def begin(self) -> str: ...
    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def feed_forward(self) -> int: ...
    @property
    def table(self) -> str: ...
    @property
    def dropout(self) -> float: ...
    @property
    def target_length(self) -> int: ...
    @property
    def max_new_tokens(self) -> int: ...
    @property
    def languages(self) -> tuple[str, str]: ...


def with_languages(task: DecoderOptions, tokenizer: Any) -> Any:
    """The trunk's tokenizer with the languages of a task.

    Raises:
        UserError: The tokenizer marks languages, and source or target has none; or it does not know the task's.
    """
    codes = language_codes.ids(tokenizer)
    for field, code in zip(("source_language", "target_language"), task.languages, strict=True):
        if code and not codes:
            raise UserError(
                f"task {task.name!r}: {field} is {code!r}, but the trunk's tokenizer has no languages; leave it out"
            )
        if code and code not in codes:
            raise unknown(f"{field} of task {task.name!r}:", code, codes)
    marked = language_codes.marked(tokenizer, *task.languages)
    if choices := languages(marked):
        keys = {"source": "src_lang", "target": "tgt_lang"}
        unset = [side for side, key in keys.items() if not marked.init_kwargs.get(key)]
        raise UserError(
            f"task {task.name!r}: the trunk's tokenizer marks {' and '.join(unset)} by language, and none is set; give "
            f"{' and '.join(f'{side}_language' for side in unset)}, or {' and '.join(keys[side] for side in unset)} in the "
            f"checkpoint's tokenizer_config.json; languages: {listed(choices)}"
        )
    return marked


def checkpoint_decoder(task: DecoderOptions, trunk: TrunkFacts) -> Seq2SeqConfig:
    """The sizes of the checkpoint's decoder.

    Raises:
        UserError: The task asks for other sizes, or for longer texts than the decoder has positions; or the checkpoint does not
            name the token that the decoder reads first.
    """
    for field in ("layers", "heads", "feed_forward", "begin"):
        if getattr(task, field) not in (0, "fresh"):
            raise UserError(f"task {task.name!r}: {field} is that of the checkpoint's decoder; leave it out")
    if trunk.start is None:
        raise UserError(f"task {task.name!r}: the checkpoint does not name the token that its decoder reads first")
    assert trunk.decoder is not None
    return _check_length(task, trunk.decoder, "checkpoint")


def new_decoder(task: DecoderOptions, trunk: TrunkFacts) -> Seq2SeqConfig:
    """The sizes of a new decoder: of a trunk from scratch its architecture, on an encoder-only checkpoint norms in front.

    Raises:
        UserError: The trunk's token table does not fit, or sizes do not fit each other.
    """
    rows, _ = trunk.table
    own_table = task.table == "own"
    if not own_table:
        _check_width(task, trunk)
    vocabulary = len(trunk.tokenizer) if own_table else rows
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
        shared_table=not own_table,
        decoder_layers=task.layers or decoder.decoder_layers,
        decoder_heads=task.heads or decoder.decoder_heads,
        decoder_feed_forward=task.feed_forward or decoder.decoder_feed_forward,
    )
    if decoder.hidden_size % decoder.decoder_heads:
        raise UserError(f"task {task.name!r}: {decoder.decoder_heads} heads do not divide the width {decoder.hidden_size}")
    return _check_length(task, decoder, "trunk")


def encoder_as_decoder(task: DecoderOptions, trunk: TrunkFacts) -> Seq2SeqConfig:
    """The sizes of a decoder that starts as the trunk.

    Raises:
        UserError: A decoder cannot have the trunk's blocks, or the task asks for sizes other than the trunk's.
    """
    prefix, encoder = f'task {task.name!r}: begin is "encoder", but', trunk.encoder
    if encoder is None:
        raise UserError(f"{prefix} this trunk is not a checkpoint of BERT, RoBERTa, XLM-R, DistilBERT or ELECTRA")
    for field in ("heads", "feed_forward"):
        if getattr(task, field):
            raise UserError(f"{prefix} {field} is {getattr(task, field)}; it is the encoder's, leave it out")
    if task.table != "trunk":
        raise UserError(f"{prefix} table is {task.table!r}; such a decoder reads the trunk's table: leave it out")
    _check_width(task, trunk)
    layers, longest = task.layers or min(LAYERS, encoder.num_layers), max(task.target_length, task.max_new_tokens)
    if layers > encoder.num_layers:
        raise UserError(f"{prefix} layers is {layers}; the encoder has {encoder.num_layers}")
    if longest >= encoder.max_length:
        raise UserError(
            f"{prefix} texts of {count(longest, 'token')} and a start are longer than the encoder's {encoder.max_length}"
        )
    return warm_start.decoder_like(encoder, layers, longest + 1, task.dropout)


def _check_width(task: DecoderOptions, trunk: TrunkFacts) -> None:
    _, width = trunk.table
    if width != trunk.width:
        raise UserError(
            f"task {task.name!r}: the trunk's token table is {width} wide and its output {trunk.width}, so the decoder cannot "
            'share the table: use table "own"'
        )


def _check_length(task: DecoderOptions, decoder: Seq2SeqConfig, owner: str) -> Seq2SeqConfig:
    if decoder.max_positions is not None and task.target_length > decoder.max_positions:
        raise UserError(
            f"task {task.name!r}: target_length is {task.target_length}; the {owner} has "
            f"{count(decoder.max_positions, 'position')}"
        )
    return decoder
