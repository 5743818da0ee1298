"""Greedy search, sampling and beam search, step by step on the device.

Beams stay where they are in the cache: a beam that goes on from another one looks at that one's entries (ancestry). Keys and
values of the source are kept once for all beams of a row.

Shapes in names: B rows, K beams, C candidates, L places of a target, S places of the cache, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.decoding import processors
from mtl_jax.decoding.config import GenerationConfig, Numbers
from mtl_jax.models.attention import KeyValue
from mtl_jax.models.seq2seq import Seq2Seq
from mtl_jax.models.seq2seq_decoder import Source

WORST = -1e9  # the score of a beam that is not there yet, as in transformers: added, not put in its place


class State(NamedTuple):
    """A search under way.

    Attributes:
        length: i32[], tokens so far, the start token included.
        tokens: i32[B, K, L], of the running beams.
        scores: f32[B, K], their summed scores, best first.
        ended: bool[B, K]; greedy search and sampling: the beam has its end token.
        found: i32[B, K, L], finished sequences of beam search, best first.
        found_scores: f32[B, K], over their penalised lengths.
        found_lengths: i32[B, K], tokens after the start token.
        full: bool[B, K], whether there is such a sequence.
        by_end: bool[B, K], whether it has its end token; else it is cut.
        open: bool[B], rows that are not done.
        ancestry: i32[B, K, S], see models.seq2seq.Seq2Seq.decode.
        cache: Keys and values of the beams.
        keys: u32[B, 2], key data for each row's draws.
    """

    length: jax.Array
    tokens: jax.Array
    scores: jax.Array
    ended: jax.Array
    found: jax.Array
    found_scores: jax.Array
    found_lengths: jax.Array
    full: jax.Array
    by_end: jax.Array
    open: jax.Array
    ancestry: jax.Array
    cache: tuple[KeyValue, ...]
    keys: jax.Array


def beams(config: GenerationConfig) -> int:
    """K: beams of beam search, or the sequences that are drawn for a row."""
    return config.num_beams if config.num_beams > 1 else config.num_return_sequences


@functools.partial(jax.jit, static_argnames=("model", "config", "places"))
def begin(
    model: Seq2Seq,
    params: Any,
    input_ids: jax.Array,
    attention_mask: jax.Array,
    keys: jax.Array,
    real: jax.Array,
    numbers: Numbers,
    *,
    config: GenerationConfig,
    places: int,
) -> tuple[Source, State]:
    """Encodes the rows and searches until all are done, or the cache is full.

    Args:
        model: Encoder and decoder.
        params: {"trunk": ..., "head": ...}.
        input_ids: i32[B, T].
        attention_mask: [B, T].
        keys: u32[B, 2].
        real: bool[B], false for rows that only fill the batch.
        numbers: The options' numbers.
        config: The options, from config.divided().
        places: S.

    Returns:
        What the decoder sees of the source, and the state.
    """
    variables = {"params": params}
    hidden = model.apply(variables, input_ids, attention_mask, method="encode").hidden  # type: ignore[union-attr]
    source: Any = model.apply(variables, hidden, attention_mask, method="source")
    B, K, L = len(input_ids), beams(config), config.length
    padding = config.beam_padding if config.num_beams > 1 else config.padding
    tokens = jnp.full((B, K, L), padding, jnp.int32).at[..., 0].set(config.start)
    # At first all beams are the same: only one of them counts.
    scores = jnp.zeros((B, K)).at[:, 1:].set(WORST if config.num_beams > 1 else 0.0)
    state = State(
        length=jnp.ones((), jnp.int32),
        tokens=tokens,
        scores=scores,
        ended=jnp.zeros((B, K), bool),
        found=tokens,
        found_scores=jnp.full((B, K), WORST),
        found_lengths=jnp.zeros((B, K), jnp.int32),
        full=jnp.zeros((B, K), bool),
        by_end=jnp.zeros((B, K), bool),
        open=real,
        ancestry=jnp.broadcast_to(jnp.arange(K, dtype=jnp.int32)[:, None], (B, K, places)),
        cache=model.init_cache(B, places, K),
        keys=keys,
    )
    return source, _until(model, params, source, state, config, numbers)


@functools.partial(jax.jit, static_argnames=("model", "config", "places"))
def go_on(
    model: Seq2Seq, params: Any, source: Source, state: State, numbers: Numbers, *, config: GenerationConfig, places: int
) -> State:
    """Searches on with a longer cache; arguments and result as in begin()."""
    S = state.ancestry.shape[-1]
    K = beams(config)
    more = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, (places - S) * K), (0, 0), (0, 0))), state.cache)
    own_1xKx1 = jnp.arange(K, dtype=jnp.int32)[None, :, None]
    new = jnp.broadcast_to(own_1xKx1, (*state.ancestry.shape[:2], places - S))
    state = state._replace(cache=more, ancestry=jnp.concatenate([state.ancestry, new], axis=-1))
    return _until(model, params, source, state, config, numbers)


def _until(model: Seq2Seq, params: Any, source: Source, state: State, config: GenerationConfig, numbers: Numbers) -> State:
    """Step by step until all rows are done, the cache is full, or the sequences are as long as they may be."""
    places = state.ancestry.shape[-1]
    choose = _beam_step if config.num_beams > 1 else _plain_step

    def body(state: State) -> State:
        place = state.length - 1
        last_BxK = jnp.take(state.tokens, place, axis=-1)
        output: Any = model.apply(
            {"params": params}, last_BxK, source, cache=state.cache, step=place, ancestry=state.ancestry, method="decode"
        )
        return choose(state._replace(cache=output.cache), output.logits, config, numbers)

    def unfinished(state: State) -> jax.Array:
        return state.open.any() & (state.length < config.length) & (state.length <= places)

    return jax.lax.while_loop(unfinished, body, state)


def _put(tokens_BxKxL: jax.Array, new_BxK: jax.Array, place: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(tokens_BxKxL, new_BxK[..., None], place, axis=-1)


def _plain_step(state: State, logits_BxKxV: jax.Array, config: GenerationConfig, numbers: Numbers) -> State:
    """Every beam by itself takes its likeliest token, or draws one; beams are the sequences to return."""
    scores_BxKxV = processors.process(logits_BxKxV, state.tokens, state.length, config, numbers)
    if config.do_sample:
        tokens_BxKxW, scores_BxKxW = processors.likely(scores_BxKxV, config, numbers)
        noise_BxKxW = _gumbel(state, scores_BxKxW.shape[1:])
        at_BxKx1 = jnp.argmax(scores_BxKxW + noise_BxKxW, axis=-1, keepdims=True)
        new_BxK = jnp.take_along_axis(tokens_BxKxW, at_BxKx1, axis=-1)[..., 0]
        gained_BxK = jnp.take_along_axis(jax.nn.log_softmax(scores_BxKxW, axis=-1), at_BxKx1, axis=-1)[..., 0]
    else:
        new_BxK = jnp.argmax(scores_BxKxV, axis=-1).astype(jnp.int32)
        gained_BxK = scores_BxKxV.max(axis=-1) - jax.nn.logsumexp(scores_BxKxV, axis=-1)
    new_BxK = jnp.where(state.ended, config.padding, new_BxK)
    ended_BxK = state.ended | _is_end(new_BxK, config)
    running_BxK = ~state.ended
    return state._replace(
        length=state.length + 1,
        tokens=_put(state.tokens, new_BxK, state.length),
        scores=state.scores + jnp.where(running_BxK, gained_BxK, 0.0),
        found_lengths=state.found_lengths + running_BxK,
        ended=ended_BxK,
        by_end=ended_BxK,
        open=state.open & ~ended_BxK.all(axis=-1),
    )


def _gumbel(state: State, shape: tuple[int, ...]) -> jax.Array:
    """Noise f32[B, *shape] with which the largest of log-probabilities is a draw from them; each row has its own."""

    def draw(data: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.wrap_key_data(data), state.length), shape)

    return jax.vmap(draw)(state.keys)


def _is_end(tokens: jax.Array, config: GenerationConfig) -> jax.Array:
    ends = jnp.zeros(tokens.shape, bool)
    for end in config.eos_token_id:
        ends |= tokens == end
    return ends


def _candidates(
    state: State, logits_BxKxV: jax.Array, config: GenerationConfig, numbers: Numbers, C: int
) -> tuple[jax.Array, ...]:
    """The C best continuations of each row, or C drawn ones: scores f32[B, C], beams i32[B, C], tokens i32[B, C]."""
    B, K, V = logits_BxKxV.shape

    def processed() -> jax.Array:
        scores_BxKxV = jax.nn.log_softmax(logits_BxKxV, axis=-1)
        return processors.process(scores_BxKxV, state.tokens, state.length, config, numbers)

    if config.do_sample:
        tokens_BxKxW, best_BxKxW = processors.likely(processed(), config, numbers, least=max(len(config.eos_token_id), 1) + 1)
        W = best_BxKxW.shape[-1]
        total_BxN = (best_BxKxW + state.scores[..., None]).reshape(B, K * W)
        _, at_BxC = jax.lax.top_k(total_BxN + _gumbel(state, (K * W,)), C)  # without replacement
        scores_BxC = jnp.take_along_axis(total_BxN, at_BxC, axis=-1)
        return scores_BxC, at_BxC // W, jnp.take_along_axis(tokens_BxKxW.reshape(B, K * W), at_BxC, axis=-1)
    W = min(C, V)
    if processors.changes_scores(config):
        best_BxKxW, tokens_BxKxW = jax.lax.top_k(processed(), W)
    else:  # only the best of each beam need to become log-probabilities
        best_BxKxW, tokens_BxKxW = jax.lax.top_k(logits_BxKxV, W)
        most_BxKx1 = best_BxKxW[..., :1]
        rest_BxKx1 = jnp.log(jnp.exp(logits_BxKxV - most_BxKx1).sum(axis=-1, keepdims=True))
        best_BxKxW = (best_BxKxW - most_BxKx1) - rest_BxKx1
    total_BxN = (best_BxKxW + state.scores[..., None]).reshape(B, K * W)
    scores_BxC, at_BxC = jax.lax.top_k(total_BxN, C)
    return scores_BxC, at_BxC // W, jnp.take_along_axis(tokens_BxKxW.reshape(B, K * W), at_BxC, axis=-1)


def _beam_step(state: State, logits_BxKxV: jax.Array, config: GenerationConfig, numbers: Numbers) -> State:
    """One step of beam search with the rules of transformers 5."""
    B, K, _ = logits_BxKxV.shape
    C = max(2, 1 + len(config.eos_token_id)) * K  # so many that K go on, also if all of the best end here
    scores_BxC, beam_BxC, new_BxC = _candidates(state, logits_BxKxV, config, numbers, C)
    tokens_BxCxL = _put(jnp.take_along_axis(state.tokens, beam_BxC[..., None], axis=1), new_BxC, state.length)
    ended_BxC = _is_end(new_BxC, config)
    last = state.length + 1 >= config.length
    finished_BxC = ended_BxC | last

    # What goes on: the best that have no end.
    running_BxC = scores_BxC + finished_BxC * WORST
    scores_BxK, next_BxK = jax.lax.top_k(running_BxC, K)
    parent_BxK = jnp.take_along_axis(beam_BxC, next_BxK, axis=-1)
    ancestry_BxKxS = jnp.take_along_axis(state.ancestry, parent_BxK[..., None], axis=1)
    own_KxS = jnp.arange(ancestry_BxKxS.shape[-1]) >= state.length  # places that are not written yet will be the beam's own
    ancestry_BxKxS = jnp.where(own_KxS, jnp.arange(K, dtype=jnp.int32)[:, None], ancestry_BxKxS)

    # What is finished: only the K best candidates may be, and only in rows that are not done.
    generated = state.length.astype(jnp.float32)  # with the new token, without the start token
    final_BxC = scores_BxC / generated**numbers.length_penalty
    final_BxC += (~state.open[:, None]) * WORST
    counts_BxC = finished_BxC & (jnp.arange(C) < K)
    final_BxC += ~counts_BxC * WORST

    def best(old: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
        both = jnp.concatenate([old, new], axis=1)
        return jnp.take_along_axis(both, at.reshape(*at.shape, *(1,) * (both.ndim - 2)), axis=1)

    found_scores_BxK, at_BxK = jax.lax.top_k(jnp.concatenate([state.found_scores, final_BxC], axis=1), K)
    full_BxK = best(state.full, counts_BxC, at_BxK)

    # A row is done when nothing that still runs could be better than what it has.
    longest = jnp.where(numbers.hope_for_more & (numbers.length_penalty > 0), config.length - 1.0, generated)
    hope_Bx1 = scores_BxK[:, :1] / longest**numbers.length_penalty
    worst_BxK = jnp.where(full_BxK, found_scores_BxK.min(axis=1, keepdims=True), WORST)
    open_B = state.open & (hope_Bx1 > worst_BxK).any(axis=1)
    open_B &= ~(full_BxK.all(axis=1) & numbers.stop_when_full)
    return state._replace(
        length=state.length + 1,
        tokens=jnp.take_along_axis(tokens_BxCxL, next_BxK[..., None], axis=1),
        scores=scores_BxK,
        found=best(state.found, tokens_BxCxL, at_BxK),
        found_scores=found_scores_BxK,
        found_lengths=best(state.found_lengths, jnp.broadcast_to(state.length, (B, C)), at_BxK),
        full=full_BxK,
        by_end=best(state.by_end, ended_BxC, at_BxK),
        open=open_B & ~last,
        ancestry=ancestry_BxKxS,
    )
