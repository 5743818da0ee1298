"""From token ids to generated token ids: for one batch, or for any number of sources in batches of similar length.

Shapes in names: B rows, K sequences of a row, T source tokens, L positions of a target, U tokens of the longest.
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
from mtl_jax.decoding import prompts, search
from mtl_jax.decoding.batching import UNPLACED, Devices, buckets, share_devices
from mtl_jax.decoding.config import TOKENS, GenerationConfig, resolve, split_options
from mtl_jax.decoding.logits import Generator, Vocabulary, prepare
from mtl_jax.decoding.state import State
from mtl_jax.models.causal_model import CausalModel, LMHead
from mtl_jax.models.encoder_decoder import Seq2Seq
from mtl_jax.models.seq2seq_decoder import Decoder
from mtl_jax.pretrained.checkpoint import Checkpoint

FIRST_CACHE = 32  # fewest positions of the first cache, which otherwise has the source's tokens, up to a power of two
LONGER_CACHES = (128, 512, 2048)  # positions of the caches after it; the last cache has as many as a sequence may need
BUCKETS = 3  # most lengths that sources are padded to


@dataclasses.dataclass(frozen=True)
class Answer:
    """The sequences that were generated for one source.

    Attributes:
        index: The index of the source.
        tokens: Sequences i32[length], the best first, without start token, end token and padding.
        scores: Log-probability of each sequence over length ** length_penalty.
        ended: Whether each sequence has an end token; else the length limit cut it.
    """

    index: int
    tokens: tuple[np.ndarray, ...]
    scores: tuple[float, ...]
    ended: tuple[bool, ...]


class Sequences(NamedTuple):
    """Generated sequences of a batch, on the host, the best of each row first.

    Attributes:
        tokens: i32[B, K, L], start token first, padded; at least as long as the longest.
        scores: f32[B, K].
        lengths: i32[B, K], tokens after the start token.
        ended: bool[B, K], whether there is an end token.
        length: Tokens of the longest sequence in the search, the start token included.
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
    """Generates for one batch, as generate() of transformers 5 does.

    A decoder-only model continues each row after its last real token. Rows may be padded on the left, as transformers needs
    it, or on the right; in the result they are padded on the left.

    Args:
        checkpoint: An encoder-decoder or a decoder-only model with an LM head.
        input_ids: i32[B, T], the sources, or the prompts.
        attention_mask: [B, T], 1 at real tokens; None: all are real.
        key: PRNG key, needed with do_sample.
        vocabulary: prepare(checkpoint.model, checkpoint.params), which calls with few rows can share; None: computed.
        options: Fields of GenerationConfig. Others are taken from the checkpoint's generation_config.json and config.json.

    Returns:
        i32[B * num_return_sequences, U], the start token or the prompt first, padded after the end; and
        f32[B * num_return_sequences], the log-probability of the new tokens over their number ** length_penalty.

    Raises:
        UserError: The checkpoint cannot generate, a token id is outside its vocabulary, an option is refused, or rows are
            longer than the model's positions.
    """
    model = require_generator(checkpoint.model, str(checkpoint.raw.get("model_type")))
    ids_BxT = np.asarray(input_ids, np.int32)
    if ids_BxT.ndim != 2 or not ids_BxT.size:
        raise UserError(f"input_ids has the shape {ids_BxT.shape}; rows of token ids are needed, i32[B, T]")
    mask_BxT = np.ones_like(ids_BxT) if attention_mask is None else np.asarray(attention_mask, np.int32)
    if mask_BxT.shape != ids_BxT.shape:
        raise UserError(f"attention_mask has the shape {mask_BxT.shape}, input_ids {ids_BxT.shape}")
    vocab_size = model.trunk.config.vocab_size
    for token in (int(ids_BxT.min()), int(ids_BxT.max())):
        if not 0 <= token < vocab_size:
            raise UserError(f"input_ids holds {token}; the model knows {count(vocab_size, 'token')}")
    _check_source(model, ids_BxT.shape[1])
    decoder_only = isinstance(model, CausalModel)
    if decoder_only:
        ids_BxT, mask_BxT = prompts.padded_left(ids_BxT, mask_BxT)
        config = prompts.resolve(checkpoint.raw, checkpoint.location, ids_BxT.shape[1], options)
    else:
        config = resolve(checkpoint.raw, checkpoint.location, **options)
    config = fit_to_model(model, config)
    keys = _keys(config, key, np.arange(len(ids_BxT)))
    vocabulary = vocabulary or prepare(model, checkpoint.params)
    searcher = _Search(model, checkpoint.params, vocabulary, config, ids_BxT.shape[1], UNPLACED)
    sequences = searcher.finish(searcher.start(ids_BxT, mask_BxT, keys, np.ones(len(ids_BxT), bool)))
    n = config.num_return_sequences
    longest = 1 + int(sequences.lengths[:, :n].max()) if config.num_beams > 1 else sequences.length
    tokens = sequences.tokens[:, :n, :longest].reshape(-1, longest)
    if decoder_only:
        tokens = np.concatenate([np.repeat(ids_BxT[:, :-1], n, axis=0), tokens], axis=1)
    return tokens, sequences.scores[:, :n].reshape(-1)


def generate_all(
    model: Generator,
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

    Sources of similar length share a batch, padded to one of a few lengths, which are chosen for the least padding. The answer
    to a source does not depend on the other sources, except for rounding; with the same key, draws do not either.

    Args:
        model: An encoder-decoder, or a decoder-only model.
        params: {"trunk": ..., "head": ...}.
        sources: Token ids i32[T] with special tokens, none empty; for decoder-only models the prompts.
        config: The options, from resolve().
        rows: Sources in a batch, on each device.
        key: PRNG key, needed with do_sample; or an array of keys, one for each source.
        done: Indices of sources that have answers already. A batch is left out if all its sources have; the other batches do
            not change, so answers are equal to the bit wherever a search resumes.
        devices: Devices of this process that share every batch; no more are used than there are batches for. They exchange
            whether rows are left to search, and with no_repeat_ngram_size or repetition_penalty their tokens. If empty, the
            device of the parameters is used.

    Yields:
        An answer for each source of a batch that is not left out, batch by batch.

    Raises:
        UserError: As generate().
    """
    if rows < 1:
        raise UserError(f"rows is {rows}; it must be at least 1")
    config.check()
    config = fit_to_model(require_generator(model, "this model"), config)
    lengths = np.array([len(source) for source in sources], np.int64)
    if not len(lengths):
        return
    _check_source(model, int(lengths.max()))
    if not lengths.min():
        raise UserError(f"source {int(lengths.argmin())} has no tokens")
    placement = share_devices(devices, -(-len(lengths) // rows))
    rows = min(rows, 1 << (len(lengths) - 1).bit_length()) * placement.number
    order = np.argsort(-lengths, kind="stable")
    limit = model.trunk.config.max_length
    sizes = buckets(lengths, BUCKETS, limit)
    params = placement.replicate(params)
    searcher = _Search(model, params, prepare(model, params), config, sizes[-1], placement)
    waiting: tuple[np.ndarray, Any] | None = None
    for first in range(0, len(order), rows):
        members = order[first : first + rows]
        if all(int(member) in done for member in members):
            continue
        T = next(size for size in sizes if size >= lengths[members[0]])
        ids_BxT, mask_BxT = np.zeros((rows, T), np.int32), np.zeros((rows, T), np.int32)
        mask_BxT[len(members) :, 0] = 1  # a row that only fills the batch has one token: nothing is divided by 0
        for row, member in enumerate(members):
            place = slice(T - lengths[member], T) if isinstance(model, CausalModel) else slice(0, lengths[member])
            ids_BxT[row, place], mask_BxT[row, place] = sources[member], 1
        real_B = np.arange(rows) < len(members)
        keys = _keys(config, key, np.pad(members, (0, rows - len(members))))
        started = members, searcher.start(ids_BxT, mask_BxT, keys, real_B)
        if waiting is not None:  # the device works on the next batch while the host reads this one
            yield from _answers(waiting[0], searcher.finish(waiting[1]), config)
        waiting = started
    if waiting is not None:
        yield from _answers(waiting[0], searcher.finish(waiting[1]), config)


def require_generator(model: Any, name: str) -> Generator:
    """The model, if it predicts tokens one after another.

    Raises:
        UserError: It is another kind of model; the message names the kind.
    """
    heads = {Seq2Seq: Decoder, CausalModel: LMHead}
    if type(model) not in heads or not isinstance(model.head, heads[type(model)]):
        kind = type(getattr(model, "head", None) or model).__name__
        raise UserError(
            f"{name} ({kind}) generates no text; an encoder-decoder with an LM head is needed (Marian, BART, T5), or a "
            "decoder-only model with one (Llama, Qwen, Gemma)"
        )
    generator: Generator = model
    return generator


def fit_to_model(model: Generator, config: GenerationConfig) -> GenerationConfig:
    """The options for a model, with the length limited to the positions of its decoder.

    Raises:
        UserError: A forced or forbidden token is outside the vocabulary, or the least length is above the largest.
    """
    vocabulary, most = model.vocabulary, model.most_generated
    if most is not None and config.length > most:
        config = dataclasses.replace(config, max_length=most, max_new_tokens=None)
    if config.minimum_length > config.length and config.eos_token_id:
        raise UserError(f"the least length, {config.minimum_length}, is above the largest, {count(config.length, 'token')}")
    tokens = [(name, getattr(config, name)) for name in TOKENS]
    tokens += [("eos_token_id", token) for token in config.eos_token_id]
    tokens += [("bad_words_ids", token) for word in config.bad_words_ids for token in word]
    for name, token in tokens:
        if token is not None and not 0 <= token < vocabulary:
            raise UserError(f"token {token} of the generation options is outside the vocabulary of {vocabulary} ({name})")
    return config


def _check_source(model: Generator, length: int) -> None:
    limit = model.trunk.config.max_length
    if limit is not None and length > limit:
        raise UserError(f"a source of {count(length, 'token')} is too long for this model; it has {count(limit, 'position')}")


def _keys(config: GenerationConfig, key: jax.Array | None, indices: np.ndarray) -> np.ndarray:
    """Key data u32[B, 2] of each row, from its index: folded into the key, or that of an array of keys."""
    if not config.do_sample:
        return np.zeros((len(indices), 2), np.uint32)
    if key is None:
        raise UserError("do_sample needs a key, for example jax.random.key(0)")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.ndim:
        return np.asarray(jax.random.key_data(key[jnp.asarray(indices)]))
    fold = jax.vmap(functools.partial(jax.random.fold_in, key))
    return np.asarray(jax.random.key_data(fold(jnp.asarray(indices))))


class _Search(NamedTuple):
    """A search with one model and one set of options.

    Attributes:
        model: The model.
        params: {"trunk": ..., "head": ...}.
        vocabulary: From logits.prepare().
        config: The options.
        longest: Source tokens of the widest batch; sources of searches that need a longer cache are padded to it, to share a
            program.
        devices: The devices that share each batch.
    """

    model: Generator
    params: Any
    vocabulary: Vocabulary
    config: GenerationConfig
    longest: int
    devices: Devices

    def start(self, ids: np.ndarray, mask: np.ndarray, keys: np.ndarray, real: np.ndarray) -> tuple[Any, State]:
        """Starts the search for a batch on the device; does not wait for it."""
        static, traced = split_options(self.config)
        positions = min(max(FIRST_CACHE, 1 << (ids.shape[1] - 1).bit_length()), self.config.length - 1)
        rows = self.devices.place_rows((ids, mask, keys, real))
        return search.begin(self.model, self.params, self.vocabulary, *rows, traced, config=static, positions=positions)

    def finish(self, started: tuple[Any, State]) -> Sequences:
        """Continues the search with longer caches until every row is done, and reads the result."""
        source, state = started
        config = self.config
        static, traced = split_options(config)
        while bool(state.active.any()) and int(state.length) < config.length:
            if source.real.shape[1] < self.longest:
                source = search.pad_source(source, self.longest)
            longer = (size for size in LONGER_CACHES if state.ancestry.shape[-1] < size < config.length - 1)
            positions = next(longer, config.length - 1)
            state = search.resume(
                self.model, self.params, self.vocabulary, source, state, traced, config=static, positions=positions
            )
        beam = config.num_beams > 1
        tokens, scores = (state.finished, state.finished_scores) if beam else (state.tokens, state.scores)
        lengths, means = np.asarray(state.lengths), np.asarray(scores)
        if not beam:
            means = means / np.maximum(lengths, 1).astype(np.float32) ** config.length_penalty
        return Sequences(np.asarray(tokens), means, lengths, np.asarray(state.reached_end), int(state.length))


def _answers(members: np.ndarray, sequences: Sequences, config: GenerationConfig) -> Iterator[Answer]:
    for row, member in enumerate(members):
        n = range(config.num_return_sequences)
        spans = [(1, 1 + int(sequences.lengths[row, k]) - int(sequences.ended[row, k])) for k in n]
        yield Answer(
            int(member),
            tuple(sequences.tokens[row, k, a:b] for k, (a, b) in zip(n, spans, strict=True)),
            tuple(float(sequences.scores[row, k]) for k in n),
            tuple(bool(sequences.ended[row, k]) for k in n),
        )
