"""One step of greedy search, sampling and beam search: from logits to the next beams.

Shapes in names: B rows, K beams, C candidates, L positions of a target, S positions of the cache,
W vocabulary in whole blocks, M blocks.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from mtl_jax.decoding import processors
from mtl_jax.decoding.config import GenerationConfig, TracedOptions
from mtl_jax.decoding.logits import BLOCK, best_blocks, top, top_of_many
from mtl_jax.decoding.state import WORST, State


def plain_step(state: State, logits_BxKxW: jax.Array, config: GenerationConfig, traced: TracedOptions) -> State:
    """Each beam takes its likeliest token, or draws one; the beams are the sequences to return."""
    scores_BxKxW = processors.process(logits_BxKxW, state.tokens, state.length, config, traced, state.prompt)
    if config.do_sample:
        tokens_BxKxC, scores_BxKxC = processors.likely(scores_BxKxW, config, traced)
        noise_BxKxC = _gumbel(state, scores_BxKxC.shape[1:])
        at_BxKx1 = jnp.argmax(scores_BxKxC + noise_BxKxC, axis=-1, keepdims=True)
        new_BxK = jnp.take_along_axis(tokens_BxKxC, at_BxKx1, axis=-1)[..., 0]
        gained_BxK = jnp.take_along_axis(jax.nn.log_softmax(scores_BxKxC, axis=-1), at_BxKx1, axis=-1)[..., 0]
    else:
        most_BxKx1, at_BxKx1 = top_of_many(scores_BxKxW, 1)
        new_BxK = at_BxKx1[..., 0]
        gained_BxK = -jnp.log(jnp.exp(scores_BxKxW - most_BxKx1).sum(axis=-1))
    new_BxK = jnp.where(state.ended, config.padding, new_BxK)
    ended_BxK = state.ended | _is_end(new_BxK, config)
    running_BxK = ~state.ended
    return state._replace(
        length=state.length + 1,
        tokens=_put(state.tokens, new_BxK, state.length),
        scores=state.scores + jnp.where(running_BxK, gained_BxK, 0.0),
        lengths=state.lengths + running_BxK,
        ended=ended_BxK,
        reached_end=ended_BxK,
        active=state.active & ~ended_BxK.all(axis=-1),
    )


def beam_step(state: State, logits_BxKxW: jax.Array, config: GenerationConfig, traced: TracedOptions) -> State:
    """One step of beam search with the rules of transformers 5."""
    B, K, _ = logits_BxKxW.shape
    C = max(2, 1 + len(config.eos_token_id)) * K  # enough that K can continue even if all end tokens are among the best
    candidates = _drawn if config.do_sample else _best
    scores_BxC, beam_BxC, new_BxC = candidates(state, logits_BxKxW, config, traced, C)
    tokens_BxCxL = _put(jnp.take_along_axis(state.tokens, beam_BxC[..., None], axis=1), new_BxC, state.length)
    ended_BxC = _is_end(new_BxC, config)
    last = state.length + 1 >= config.length
    finished_BxC = ended_BxC | last

    # The K best candidates without an end are the next beams.
    scores_BxK, next_BxK = top(scores_BxC + finished_BxC * WORST, K)
    parent_BxK = jnp.take_along_axis(beam_BxC, next_BxK, axis=-1)
    ancestry_BxKxS = jnp.take_along_axis(state.ancestry, parent_BxK[..., None], axis=1)
    unwritten_S = jnp.arange(ancestry_BxKxS.shape[-1]) >= state.length  # the beam itself will write these
    ancestry_BxKxS = jnp.where(unwritten_S, jnp.arange(K, dtype=jnp.int32)[:, None], ancestry_BxKxS)

    # Only the K best candidates may finish, and only in rows that are not done.
    generated = state.length.astype(jnp.float32)  # with the new token, without the start token
    counts_BxC = finished_BxC & (jnp.arange(C) < K)
    final_BxC = scores_BxC / generated**traced.length_penalty
    final_BxC += ~state.active[:, None] * WORST
    final_BxC += ~counts_BxC * WORST

    def best(old: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
        both = jnp.concatenate([old, new], axis=1)
        return jnp.take_along_axis(both, at.reshape(*at.shape, *(1,) * (both.ndim - 2)), axis=1)

    finished_scores_BxK, at_BxK = top(jnp.concatenate([state.finished_scores, final_BxC], axis=1), K)
    is_finished_BxK = best(state.is_finished, counts_BxC, at_BxK)

    # A row is done when no running beam can become better than its finished sequences.
    longest = jnp.where(traced.early_never & (traced.length_penalty > 0), config.length - 1.0, generated)
    attainable_Bx1 = scores_BxK[:, :1] / longest**traced.length_penalty
    worst_BxK = jnp.where(is_finished_BxK, finished_scores_BxK.min(axis=1, keepdims=True), WORST)
    active_B = state.active & (attainable_Bx1 > worst_BxK).any(axis=1)
    active_B &= ~(is_finished_BxK.all(axis=1) & traced.early_always)
    return state._replace(
        length=state.length + 1,
        tokens=jnp.take_along_axis(tokens_BxCxL, next_BxK[..., None], axis=1),
        scores=scores_BxK,
        finished=best(state.finished, tokens_BxCxL, at_BxK),
        finished_scores=finished_scores_BxK,
        lengths=best(state.lengths, jnp.broadcast_to(state.length, (B, C)), at_BxK),
        is_finished=is_finished_BxK,
        reached_end=best(state.reached_end, ended_BxC, at_BxK),
        active=active_B & ~last,
        ancestry=ancestry_BxKxS,
    )


def _best(
    state: State, logits_BxKxW: jax.Array, config: GenerationConfig, traced: TracedOptions, C: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The C best continuations of each row: scores f32[B, C], beams i32[B, C], tokens i32[B, C].

    Log-probabilities are computed only where they are read: for the best of each block, and in the best blocks.
    """
    B, K, W = logits_BxKxW.shape
    M = W // BLOCK
    most_BxKx1 = logits_BxKxW.max(axis=-1, keepdims=True)
    rest_BxKx1 = jnp.log(jnp.exp(logits_BxKxW - most_BxKx1).sum(axis=-1, keepdims=True))
    if processors.needs_all_scores(config):
        log_probabilities = (logits_BxKxW - most_BxKx1) - rest_BxKx1
        x_BxKxW = processors.process(log_probabilities, state.tokens, state.length, config, traced, state.prompt)
    else:
        x_BxKxW = processors.forbid(logits_BxKxW, state.tokens, state.length, config, state.prompt)

    def score(x: jax.Array, most: jax.Array, rest: jax.Array, tokens: jax.Array | None) -> jax.Array:
        if processors.needs_all_scores(config):
            return x
        return processors.change_by_token((x - most) - rest, tokens, state.length, config, W)

    maxima_BxKxM = score(x_BxKxW, most_BxKx1, rest_BxKx1, None).reshape(B, K, M, BLOCK).max(axis=-1)
    block_BxP = best_blocks((maxima_BxKxM + state.scores[..., None]).reshape(B, K * M), C)
    few_BxPxW = jnp.take_along_axis(x_BxKxW.reshape(B, K * M, BLOCK), block_BxP[..., None], axis=1)
    beam_BxP, tokens_BxPxW = block_BxP // M, (block_BxP % M * BLOCK)[..., None] + jnp.arange(BLOCK)
    most, rest, total = (
        jnp.take_along_axis(x_BxK, beam_BxP, axis=1)[..., None]
        for x_BxK in (most_BxKx1[..., 0], rest_BxKx1[..., 0], state.scores)
    )
    few_BxPxW = score(few_BxPxW, most, rest, tokens_BxPxW) + total
    scores_BxC, at_BxC = top(few_BxPxW.reshape(B, -1), C)
    beam_BxC = jnp.take_along_axis(beam_BxP, at_BxC // BLOCK, axis=1)
    return scores_BxC, beam_BxC, jnp.take_along_axis(tokens_BxPxW.reshape(B, -1), at_BxC, axis=1)


def _drawn(
    state: State, logits_BxKxW: jax.Array, config: GenerationConfig, traced: TracedOptions, C: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """C continuations of each row, drawn without replacement, in the order of drawing; results as in _best()."""
    B, K, _ = logits_BxKxW.shape
    scores_BxKxW = jax.nn.log_softmax(logits_BxKxW, axis=-1)
    scores_BxKxW = processors.process(scores_BxKxW, state.tokens, state.length, config, traced, state.prompt)
    tokens_BxKxP, scores_BxKxP = processors.likely(scores_BxKxW, config, traced, least=max(len(config.eos_token_id), 1) + 1)
    P = tokens_BxKxP.shape[-1]
    total_BxN = (scores_BxKxP + state.scores[..., None]).reshape(B, K * P)
    noisy_BxN = total_BxN + _gumbel(state, (K * P,))
    _, at_BxC = (top if P % BLOCK else top_of_many)(noisy_BxN, C)
    scores_BxC = jnp.take_along_axis(total_BxN, at_BxC, axis=-1)
    return scores_BxC, at_BxC // P, jnp.take_along_axis(tokens_BxKxP.reshape(B, K * P), at_BxC, axis=-1)


def _put(tokens_BxKxL: jax.Array, new_BxK: jax.Array, place: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(tokens_BxKxL, new_BxK[..., None], place, axis=-1)


def _gumbel(state: State, shape: tuple[int, ...]) -> jax.Array:
    """Gumbel noise f32[B, *shape]: the argmax of log-probabilities plus this noise is a draw. Each row has its own key."""

    def draw(data: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.wrap_key_data(data), state.length), shape)

    return jax.vmap(draw)(state.keys)


def _is_end(tokens: jax.Array, config: GenerationConfig) -> jax.Array:
    return functools.reduce(jnp.logical_or, (tokens == end for end in config.eos_token_id), jnp.zeros(tokens.shape, bool))
