"""One step of greedy search, sampling and beam search: from logits to the beams that go on.

Shapes in names: B rows, K beams, C candidates, L places of a target, S places of the cache, W vocabulary in whole blocks,
M blocks.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from mtl_jax.decoding import processors
from mtl_jax.decoding.config import GenerationConfig, Numbers
from mtl_jax.decoding.state import WORST, State


def plain_step(state: State, logits_BxKxW: jax.Array, config: GenerationConfig, numbers: Numbers) -> State:
    """Every beam by itself takes its likeliest token, or draws one; beams are the sequences to return."""
    scores_BxKxW = processors.process(logits_BxKxW, state.tokens, state.length, config, numbers)
    if config.do_sample:
        tokens_BxKxC, scores_BxKxC = processors.likely(scores_BxKxW, config, numbers)
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
        found_lengths=state.found_lengths + running_BxK,
        ended=ended_BxK,
        by_end=ended_BxK,
        open=state.open & ~ended_BxK.all(axis=-1),
    )


def beam_step(state: State, logits_BxKxW: jax.Array, config: GenerationConfig, numbers: Numbers) -> State:
    """One step of beam search with the rules of transformers 5."""
    B, K, _ = logits_BxKxW.shape
    C = max(2, 1 + len(config.eos_token_id)) * K  # so many that K go on, also if all of the best end here
    candidates = _drawn if config.do_sample else _best
    scores_BxC, beam_BxC, new_BxC = candidates(state, logits_BxKxW, config, numbers, C)
    tokens_BxCxL = _put(jnp.take_along_axis(state.tokens, beam_BxC[..., None], axis=1), new_BxC, state.length)
    ended_BxC = _is_end(new_BxC, config)
    last = state.length + 1 >= config.length
    finished_BxC = ended_BxC | last

    # What goes on: the best that have no end.
    scores_BxK, next_BxK = top(scores_BxC + finished_BxC * WORST, K)
    parent_BxK = jnp.take_along_axis(beam_BxC, next_BxK, axis=-1)
    ancestry_BxKxS = jnp.take_along_axis(state.ancestry, parent_BxK[..., None], axis=1)
    own_KxS = jnp.arange(ancestry_BxKxS.shape[-1]) >= state.length  # places that are not written yet will be the beam's own
    ancestry_BxKxS = jnp.where(own_KxS, jnp.arange(K, dtype=jnp.int32)[:, None], ancestry_BxKxS)

    # What is finished: only the K best candidates may be, and only in rows that are not done.
    generated = state.length.astype(jnp.float32)  # with the new token, without the start token
    counts_BxC = finished_BxC & (jnp.arange(C) < K)
    final_BxC = scores_BxC / generated**numbers.length_penalty
    final_BxC += ~state.open[:, None] * WORST
    final_BxC += ~counts_BxC * WORST

    def best(old: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
        both = jnp.concatenate([old, new], axis=1)
        return jnp.take_along_axis(both, at.reshape(*at.shape, *(1,) * (both.ndim - 2)), axis=1)

    found_scores_BxK, at_BxK = top(jnp.concatenate([state.found_scores, final_BxC], axis=1), K)
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


def _best(
    state: State, logits_BxKxW: jax.Array, config: GenerationConfig, numbers: Numbers, C: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The C best continuations of each row: scores f32[B, C], beams i32[B, C], tokens i32[B, C].

    Log-probabilities are made where they are read: once for the best of each block, once in the best blocks.
    """
    B, K, W = logits_BxKxW.shape
    M = W // BLOCK
    most_BxKx1 = logits_BxKxW.max(axis=-1, keepdims=True)
    rest_BxKx1 = jnp.log(jnp.exp(logits_BxKxW - most_BxKx1).sum(axis=-1, keepdims=True))
    if processors.needs_all(config):
        log_probabilities = (logits_BxKxW - most_BxKx1) - rest_BxKx1
        x_BxKxW = processors.process(log_probabilities, state.tokens, state.length, config, numbers)
    else:
        x_BxKxW = processors.forbid(logits_BxKxW, state.tokens, state.length, config)

    def score(x: jax.Array, most: jax.Array, rest: jax.Array, tokens: jax.Array | None) -> jax.Array:
        if processors.needs_all(config):
            return x
        return processors.of_token((x - most) - rest, tokens, state.length, config, W)

    maxima_BxKxM = score(x_BxKxW, most_BxKx1, rest_BxKx1, None).reshape(B, K, M, BLOCK).max(axis=-1)
    which_BxP = best_blocks((maxima_BxKxM + state.scores[..., None]).reshape(B, K * M), C)
    few_BxPxW = jnp.take_along_axis(x_BxKxW.reshape(B, K * M, BLOCK), which_BxP[..., None], axis=1)
    beam_BxP, tokens_BxPxW = which_BxP // M, (which_BxP % M * BLOCK)[..., None] + jnp.arange(BLOCK)
    most, rest, total = (
        jnp.take_along_axis(x_BxK, beam_BxP, axis=1)[..., None]
        for x_BxK in (most_BxKx1[..., 0], rest_BxKx1[..., 0], state.scores)
    )
    few_BxPxW = score(few_BxPxW, most, rest, tokens_BxPxW) + total
    scores_BxC, at_BxC = top(few_BxPxW.reshape(B, -1), C)
    beam_BxC = jnp.take_along_axis(beam_BxP, at_BxC // BLOCK, axis=1)
    return scores_BxC, beam_BxC, jnp.take_along_axis(tokens_BxPxW.reshape(B, -1), at_BxC, axis=1)


def _drawn(
    state: State, logits_BxKxW: jax.Array, config: GenerationConfig, numbers: Numbers, C: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """C continuations of each row, drawn without replacement in this order; as in _best()."""
    B, K, _ = logits_BxKxW.shape
    scores_BxKxW = jax.nn.log_softmax(logits_BxKxW, axis=-1)
    scores_BxKxW = processors.process(scores_BxKxW, state.tokens, state.length, config, numbers)
    tokens_BxKxP, scores_BxKxP = processors.likely(scores_BxKxW, config, numbers, least=max(len(config.eos_token_id), 1) + 1)
    P = tokens_BxKxP.shape[-1]
    total_BxN = (scores_BxKxP + state.scores[..., None]).reshape(B, K * P)
    noisy_BxN = total_BxN + _gumbel(state, (K * P,))
    _, at_BxC = (top if P % BLOCK else top_of_many)(noisy_BxN, C)
    scores_BxC = jnp.take_along_axis(total_BxN, at_BxC, axis=-1)
    return scores_BxC, at_BxC // P, jnp.take_along_axis(tokens_BxKxP.reshape(B, K * P), at_BxC, axis=-1)


def _put(tokens_BxKxL: jax.Array, new_BxK: jax.Array, place: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(tokens_BxKxL, new_BxK[..., None], place, axis=-1)


def _gumbel(state: State, shape: tuple[int, ...]) -> jax.Array:
    """Noise f32[B, *shape] with which the largest of log-probabilities is a draw from them; each row has its own."""

    def draw(data: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.wrap_key_data(data), state.length), shape)

    return jax.vmap(draw)(state.keys)


def _is_end(tokens: jax.Array, config: GenerationConfig) -> jax.Array:
    return functools.reduce(jnp.logical_or, (tokens == end for end in config.eos_token_id), jnp.zeros(tokens.shape, bool))


BLOCK = 128  # W


def top(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """What jax.lax.top_k gives, the largest of the last axis and their places, of equal ones the first: few of some hundred."""

    def one_by_one(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        places = jnp.arange(x.shape[-1], dtype=jnp.int32)

        def following(before: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], tuple]:
            value, place = before
            left = (x < value) | ((x == value) & (places > place))
            value = jnp.where(left, x, -jnp.inf).max(axis=-1, keepdims=True)
            place = jnp.where(left & (x == value), places, x.shape[-1] - 1).min(axis=-1, keepdims=True)
            return (value, place), (value[..., 0], place[..., 0])

        start = jnp.full_like(x[..., :1], jnp.inf), jnp.full_like(x[..., :1], -1, jnp.int32)
        _, found = jax.lax.scan(following, start, None, length=count)
        values, at = (jnp.moveaxis(part, 0, -1) for part in found)
        return values, at

    def sorting(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, at = jax.lax.top_k(x, count)
        return values, at

    return jax.lax.platform_dependent(x, cpu=one_by_one, default=sorting)


def best_blocks(maxima_BxM: jax.Array, count: int) -> jax.Array:
    """Numbers i32[B, min(count, M)], ascending, of the blocks that hold the `count` best scores, given each block's best.

    The best C scores stand in the C blocks with the best maxima, also where scores are equal and the first ones count.
    """
    _, which_BxC = top(maxima_BxM, min(count, maxima_BxM.shape[-1]))
    return jnp.sort(which_BxC, axis=-1)


def top_of_many(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """As top(), of many scores f32[..., M * BLOCK]."""
    *batch, N = x.shape
    x_RxMxW = x.reshape(-1, N // BLOCK, BLOCK)
    which_RxC = best_blocks(x_RxMxW.max(axis=-1), count)
    few_RxCxW = jnp.take_along_axis(x_RxMxW, which_RxC[..., None], axis=1)
    values, at = top(few_RxCxW.reshape(len(x_RxMxW), -1), count)
    places = jnp.take_along_axis(which_RxC, at // BLOCK, axis=1) * BLOCK + at % BLOCK
    return values.reshape(*batch, count), places.reshape(*batch, count)
