"""From token ids to generated token ids: a batch as it stands, or any number of texts in batches of similar length.

Shapes in names: B rows, K sequences of a row, T source tokens, L places of a target, U tokens of the longest.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Container, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.core.errors import UserError, count
from mtl_jax.decoding import search
from mtl_jax.decoding.batching import AS_THEY_ARE, Devices, buckets, share
from mtl_jax.decoding.config import TOKENS, GenerationConfig, divided, resolve
from mtl_jax.decoding.logits import Vocabulary, prepare
from mtl_jax.decoding.state import State
from mtl_jax.models.encoder_decoder import Seq2Seq
from mtl_jax.models.seq2seq_decoder import Decoder, Source
from mtl_jax.pretrained.checkpoint import Checkpoint

FEWEST_PLACES = 32  # of the first cache, which has as many as the source, in powers of two
MORE_PLACES = (128, 512, 2048)  # of the caches after it, the last before as many as may be needed
BUCKETS = 3  # most lengths that sources are padded to


@dataclasses.dataclass(frozen=True)
class Answer:
    """What was generated for one source.

    Attributes:
        index: Its place among the sources.
        tokens: Sequences i32[length], the best first, without start token, end token and padding.
        scores: Of each, the log-probability over length ** length_penalty.
        ended: Of each, whether it came to its end; else the length limit cut it.
    """

    index: int
    tokens: tuple[np.ndarray, ...]
    scores: tuple[float, ...]
    ended: tuple[bool, ...]


class Found(NamedTuple):
    """Sequences of a batch, on the host, the best of each row first.

    Attributes:
        tokens: i32[B, K, L], start token first, padded; at least as long as the longest.
        scores: f32[B, K].
        lengths: i32[B, K], tokens after the start token.
        ended: bool[B, K].
        length: Tokens of the longest that was looked at, the start token included.
    """

    tokens: np.ndarray
    scores: np.ndarray
    lengths: np.ndarray
    ended: np.ndarray
    length: int


def generate(
    checkpoint: Checkpoint,
    input_ids: Any,
    attention_mask: Any = None,
    *,
    key: jax.Array | None = None,
    vocabulary: Vocabulary | None = None,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """The token ids that generate() of transformers 5 gives for a batch.

    Args:
        checkpoint: An encoder-decoder with an LM head.
        input_ids: i32[B, T].
        attention_mask: [B, T], 1 at real tokens; None: all are real.
        key: For do_sample.
        vocabulary: prepare(checkpoint.model, checkpoint.params), which many calls with few rows may share; None: it is made.
        options: Fields of GenerationConfig; what is not given, the checkpoint's generation_config.json and config.json say.

    Returns:
        i32[B * num_return_sequences, U], the start token first, padded after the end; and f32[B * num_return_sequences], the
        log-probability of the tokens over their number ** length_penalty.

    Raises:
        UserError: The checkpoint predicts no tokens, or not these; an option is refused; or rows are longer than the model's
            positions.
    """
    model = require_seq2seq(checkpoint.model, str(checkpoint.raw.get("model_type")))
    config = fitted(model, resolve(checkpoint.raw, checkpoint.location, **options))
    ids_BxT = np.asarray(input_ids, np.int32)
    if ids_BxT.ndim != 2 or not ids_BxT.size:
        raise UserError(f"input_ids has the shape {ids_BxT.shape}; rows of token ids are needed, i32[B, T]")
    mask_BxT = np.ones_like(ids_BxT) if attention_mask is None else np.asarray(attention_mask, np.int32)
    if mask_BxT.shape != ids_BxT.shape:
        raise UserError(f"attention_mask has the shape {mask_BxT.shape}, input_ids {ids_BxT.shape}")
    known = model.trunk.config.vocab_size
    for token in (int(ids_BxT.min()), int(ids_BxT.max())):
        if not 0 <= token < known:
            raise UserError(f"input_ids holds {token}; the model knows {count(known, 'token')}")
    _check_source(model, ids_BxT.shape[1])
    keys = _keys(config, key, np.arange(len(ids_BxT)))
    vocabulary = vocabulary or prepare(model, checkpoint.params)
    on = _On(model, checkpoint.params, vocabulary, config, ids_BxT.shape[1], AS_THEY_ARE)
    found = on.finish(on.start(ids_BxT, mask_BxT, keys, np.ones(len(ids_BxT), bool)))
    n = config.num_return_sequences
    longest = 1 + int(found.lengths[:, :n].max()) if config.num_beams > 1 else found.length
    tokens = found.tokens[:, :n, :longest]
    return tokens.reshape(-1, longest), found.scores[:, :n].reshape(-1)


def generate_all(
    model: Seq2Seq,
    params: Any,
    sources: Sequence[np.ndarray],
    config: GenerationConfig,
    *,
    rows: int = 32,
    key: jax.Array | None = None,
    done: Container[int] = (),
    devices: Sequence[jax.Device] = (),
) -> Iterator[Answer]:
    """Generates for any number of sources, batch by batch, the longest first.

    Sources of similar length share a batch, padded to one of a few lengths, which are chosen so that padding is least. What is
    generated for a source does not depend on the others, but for rounding; nor does what is drawn, with one key.

    Args:
        model: Encoder and decoder.
        params: {"trunk": ..., "head": ...}.
        sources: Token ids i32[T] with special tokens, none empty.
        config: The options, from resolve().
        rows: Sources in a batch, on each device.
        key: For do_sample.
        done: Numbers of sources that have their answers already. Batches of nothing else are left out; the others are what they
            would have been, so that answers are equal to the bit wherever one begins.
        devices: Of this process, which share every batch, as many of them as there are batches for. They tell each other
            whether rows are left that are not done; with no_repeat_ngram_size or repetition_penalty also their tokens. None
            given: the one where the parameters are.

    Yields:
        An answer for each source of a batch that is not left out, in the order in which the batches are done.

    Raises:
        UserError: As generate().
    """
    if rows < 1:
        raise UserError(f"rows is {rows}; it must be at least 1")
    config.check()
    config = fitted(require_seq2seq(model, "this model"), config)
    lengths = np.array([len(source) for source in sources], np.int64)
    if not len(lengths):
        return
    _check_source(model, int(lengths.max()))
    if not lengths.min():
        raise UserError(f"source {int(lengths.argmin())} has no tokens")
    shared = share(devices, -(-len(lengths) // rows))
    rows = min(rows, 1 << (len(lengths) - 1).bit_length()) * shared.number
    order = np.argsort(-lengths, kind="stable")
    limit = model.trunk.config.max_length
    sizes = buckets(lengths, BUCKETS, limit)
    params = shared.place_whole(params)
    on = _On(model, params, prepare(model, params), config, sizes[-1], shared)
    waiting: tuple[np.ndarray, Any] | None = None
    for first in range(0, len(order), rows):
        members = order[first : first + rows]
        if all(int(member) in done for member in members):
            continue
        T = next(size for size in sizes if size >= lengths[members[0]])
        ids_BxT, mask_BxT = np.zeros((rows, T), np.int32), np.zeros((rows, T), np.int32)
        mask_BxT[:, 0] = 1  # a row that is not there has one token, so that nothing is divided by 0
        for row, member in enumerate(members):
            ids_BxT[row, : lengths[member]] = sources[member]
            mask_BxT[row, : lengths[member]] = 1
        real_B = np.arange(rows) < len(members)
        keys = _keys(config, key, np.pad(members, (0, rows - len(members))))
        started = members, on.start(ids_BxT, mask_BxT, keys, real_B)
        if waiting is not None:  # the device is at work on the next batch while the host takes this one apart
            yield from _answers(waiting[0], on.finish(waiting[1]), config)
        waiting = started
    if waiting is not None:
        yield from _answers(waiting[0], on.finish(waiting[1]), config)


def require_seq2seq(model: Any, name: str) -> Seq2Seq:
    """The model, if it is one that predicts tokens.

    Raises:
        UserError: It is something else; names what.
    """
    if not isinstance(model, Seq2Seq) or not isinstance(model.head, Decoder):
        kind = type(getattr(model, "head", None) or model).__name__
        raise UserError(f"{name} ({kind}) generates no text; an encoder-decoder with an LM head is needed (Marian, BART, T5)")
    return model


def fitted(model: Seq2Seq, config: GenerationConfig) -> GenerationConfig:
    """The options with the length cut to the decoder's positions, which a sequence cannot be longer than.

    Raises:
        UserError: A forced or forbidden token is outside the vocabulary, or the least length is above the largest.
    """
    assert isinstance(model.head, Decoder)
    sizes = model.head.config
    if sizes.max_positions is not None and config.length > sizes.max_positions:
        config = dataclasses.replace(config, max_length=sizes.max_positions, max_new_tokens=None)
    if config.least > config.length and config.eos_token_id:
        raise UserError(f"the least length, {config.least}, is above the largest, {count(config.length, 'token')}")
    named = [(name, getattr(config, name)) for name in TOKENS]
    named += [("eos_token_id", token) for token in config.eos_token_id]
    named += [("bad_words_ids", token) for word in config.bad_words_ids for token in word]
    for name, token in named:
        if token is not None and not 0 <= token < sizes.decoder_vocab_size:
            raise UserError(
                f"token {token} of the generation options is outside the vocabulary of {sizes.decoder_vocab_size} ({name})"
            )
    return config


def _check_source(model: Seq2Seq, length: int) -> None:
    limit = model.trunk.config.max_length
    if limit is not None and length > limit:
        raise UserError(f"a source of {count(length, 'token')} is too long for this model; it has {count(limit, 'position')}")


def _keys(config: GenerationConfig, key: jax.Array | None, numbers: np.ndarray) -> np.ndarray:
    """u32[B, 2], key data for each row by its number."""
    if not config.do_sample:
        return np.zeros((len(numbers), 2), np.uint32)
    if key is None:
        raise UserError("do_sample needs a key, for example jax.random.key(0)")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    fold = jax.vmap(functools.partial(jax.random.fold_in, key))
    return np.asarray(jax.random.key_data(fold(jnp.asarray(numbers))))


class _On(NamedTuple):
    """A search with one model and one set of options.

    Attributes:
        model: Encoder and decoder.
        params: {"trunk": ..., "head": ...}.
        vocabulary: From vocabulary.prepare().
        config: The options.
        longest: Source tokens of the widest batch: searches that need a longer cache are padded to it and share a program.
        devices: Where batches lie.
    """

    model: Seq2Seq
    params: Any
    vocabulary: Vocabulary
    config: GenerationConfig
    longest: int
    devices: Devices

    def start(self, ids: np.ndarray, mask: np.ndarray, keys: np.ndarray, real: np.ndarray) -> tuple[Source, State]:
        """Sends a batch to the device."""
        shape, numbers = divided(self.config)
        places = min(max(FEWEST_PLACES, 1 << (ids.shape[1] - 1).bit_length()), self.config.length - 1)
        rows = self.devices.place_rows((ids, mask, keys, real))
        return search.begin(self.model, self.params, self.vocabulary, *rows, numbers, config=shape, places=places)

    def finish(self, started: tuple[Source, State]) -> Found:
        """Goes on with longer caches until every row is done."""
        source, state = started
        config = self.config
        shape, numbers = divided(config)
        while bool(state.open.any()) and int(state.length) < config.length:
            if source.real.shape[1] < self.longest:
                source = search.widened(source, self.longest)
            longer = (places for places in MORE_PLACES if state.ancestry.shape[-1] < places < config.length - 1)
            places = next(longer, config.length - 1)
            state = search.go_on(self.model, self.params, self.vocabulary, source, state, numbers, config=shape, places=places)
        beam = config.num_beams > 1
        tokens, scores = (state.found, state.found_scores) if beam else (state.tokens, state.scores)
        lengths, means = np.asarray(state.found_lengths), np.asarray(scores)
        if not beam:
            means = means / np.maximum(lengths, 1).astype(np.float32) ** config.length_penalty
        return Found(np.asarray(tokens), means, lengths, np.asarray(state.by_end), int(state.length))


def _answers(members: np.ndarray, found: Found, config: GenerationConfig) -> Iterator[Answer]:
    for row, member in enumerate(members):
        n = range(config.num_return_sequences)
        spans = [(1, 1 + int(found.lengths[row, k]) - int(found.ended[row, k])) for k in n]
        yield Answer(
            int(member),
            tuple(found.tokens[row, k, a:b] for k, (a, b) in zip(n, spans, strict=True)),
            tuple(float(found.scores[row, k]) for k in n),
            tuple(bool(found.ended[row, k]) for k in n),
        )
