"""What changes the scores of the next token, in the order of transformers 5.

A vocabulary has up to a hundred thousand tokens, so that each pass over their scores counts. Changes of a few tokens of a beam
are written into the logits; changes that are the same for all beams are functions of a token, applied where its score is read;
only the repetition penalty and renormalising need all scores as they are.

Shapes in names: B rows, K beams, L places of a target, W vocabulary in whole blocks, C candidates.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.decoding import steps
from mtl_jax.decoding.config import GenerationConfig, Numbers

FLOOR = -jnp.inf


def needs_all(config: GenerationConfig) -> bool:
    """Whether beam search has to make every score before it looks for the best."""
    return config.repetition_penalty != 1 or config.renormalize_logits


def process(
    scores_BxKxW: jax.Array, tokens_BxKxL: jax.Array, length: jax.Array, config: GenerationConfig, numbers: Numbers
) -> jax.Array:
    """The scores after every option that asks for a change; those of sampling are not among them.

    Args:
        scores_BxKxW: f32, logits (greedy search, sampling) or log-probabilities (beam search).
        tokens_BxKxL: i32, what stands there so far.
        length: i32[], how many tokens that is, the start token included.
        config: The options.
        numbers: Their numbers.
    """
    x = scores_BxKxW
    if config.repetition_penalty != 1:
        x = _penalise(x, tokens_BxKxL, length, numbers.repetition_penalty)
    x = forbid(x, tokens_BxKxL, length, config)
    x = of_token(x, None, length, config)
    return jax.nn.log_softmax(x, axis=-1) if config.renormalize_logits and not config.do_sample else x


def forbid(x_BxKxW: jax.Array, tokens_BxKxL: jax.Array, length: jax.Array, config: GenerationConfig) -> jax.Array:
    """-inf for the tokens that may not follow what stands there: n-grams of before, the ends of forbidden words.

    Args:
        x_BxKxW: f32, logits or log-probabilities: it makes no difference.
        tokens_BxKxL: As in process(); so are the next two.
        length: i32[].
        config: The options.
    """
    if config.no_repeat_ngram_size:
        x_BxKxW = _forbid_repeated(x_BxKxW, tokens_BxKxL, length, config.no_repeat_ngram_size)
    return _forbid_words(x_BxKxW, tokens_BxKxL, length, [word for word in config.bad_words_ids if len(word) > 1])


def of_token(
    scores: jax.Array, tokens: jax.Array | None, length: jax.Array, config: GenerationConfig, size: int = 0
) -> jax.Array:
    """Scores after the changes that are the same for all beams: forbidden tokens, no end before min_length, forced tokens.

    Args:
        scores: f32[..., C], normalised already.
        tokens: i32[..., C], whose they are; None: all tokens in their order.
        length: i32[], as in process().
        config: The options.
        size: W, where tokens are given.
    """
    single = np.array([word[0] for word in config.bad_words_ids if len(word) == 1], np.int32)
    if len(single) or (config.least and config.eos_token_id):
        floor_W = jnp.zeros(scores.shape[-1] if tokens is None else size).at[single].set(FLOOR)
        if config.least and config.eos_token_id:
            without_W = floor_W.at[np.array(config.eos_token_id, np.int32)].set(FLOOR)
            floor_W = jnp.where(length < config.least, without_W, floor_W)
        scores = scores + (floor_W if tokens is None else floor_W[tokens])
    if tokens is None:
        tokens = jnp.arange(scores.shape[-1])
    for token, at in ((config.forced_bos_token_id, 1), (config.forced_eos_token_id, config.length - 1)):
        if token is not None:
            scores = jnp.where(length == at, jnp.where(tokens == token, 0.0, FLOOR), scores)
    return scores


def _known(tokens_BxKxL: jax.Array, length: jax.Array, vocabulary: int) -> jax.Array:
    """The tokens; those of places that are not filled yet are no token at all."""
    return jnp.where(jnp.arange(tokens_BxKxL.shape[-1]) < length, tokens_BxKxL, vocabulary)


def _set(x_BxKxW: jax.Array, tokens_BxKxL: jax.Array, values: jax.Array | float) -> jax.Array:
    """x with values at the tokens; tokens beyond the vocabulary are left out."""
    rows, beams = (jnp.arange(size) for size in x_BxKxW.shape[:2])
    return x_BxKxW.at[rows[:, None, None], beams[:, None], tokens_BxKxL].set(values, mode="drop")


def _penalise(x_BxKxW: jax.Array, tokens_BxKxL: jax.Array, length: jax.Array, penalty: Any) -> jax.Array:
    """A score below 0 is multiplied by the penalty, another divided, of every token that stands there (Keskar et al. 2019)."""
    W = x_BxKxW.shape[-1]
    tokens_BxKxL = _known(tokens_BxKxL, length, W)
    now_BxKxL = jnp.take_along_axis(x_BxKxW, jnp.minimum(tokens_BxKxL, W - 1), axis=-1)
    return _set(x_BxKxW, tokens_BxKxL, jnp.where(now_BxKxL < 0, now_BxKxL * penalty, now_BxKxL / penalty))


def _forbid_repeated(x_BxKxW: jax.Array, tokens_BxKxL: jax.Array, length: jax.Array, n: int) -> jax.Array:
    """No token that would make the last n tokens what n tokens before were."""
    L = tokens_BxKxL.shape[-1]
    if n > L:
        return x_BxKxW
    last = jnp.maximum(length - (n - 1), 0) + jnp.arange(n - 1)
    same_BxKxP = jnp.broadcast_to(jnp.arange(L - n + 1) + n <= length, (*tokens_BxKxL.shape[:2], L - n + 1))
    for i in range(n - 1):
        same_BxKxP &= tokens_BxKxL[..., i : L - n + 1 + i] == jnp.take(tokens_BxKxL, last[i : i + 1], axis=-1)
    next_BxKxP = jnp.where(same_BxKxP, tokens_BxKxL[..., n - 1 :], x_BxKxW.shape[-1])
    return _set(x_BxKxW, next_BxKxP, FLOOR)


def _forbid_words(x_BxKxW: jax.Array, tokens_BxKxL: jax.Array, length: jax.Array, words: list[tuple[int, ...]]) -> jax.Array:
    """No token that would complete one of the words, which have two tokens or more."""
    ends = []
    for *before, last in words:
        at = jnp.maximum(length - len(before), 0) + jnp.arange(len(before))
        stand_BxK = (jnp.take(tokens_BxKxL, at, axis=-1) == jnp.array(before)).all(axis=-1) & (length >= len(before))
        ends.append(jnp.where(stand_BxK, last, x_BxKxW.shape[-1]))
    return _set(x_BxKxW, jnp.stack(ends, axis=-1), FLOOR) if ends else x_BxKxW


def likely(scores_BxKxW: jax.Array, config: GenerationConfig, numbers: Numbers, least: int = 1) -> tuple[jax.Array, jax.Array]:
    """The tokens that sampling may draw, and their scores over the temperature; the others are -inf or not there.

    Args:
        scores_BxKxW: f32.
        config: top_k; whether there is top_p (Holtzman et al. 2020).
        numbers: temperature, top_p.
        least: So many tokens stay in any case.

    Returns:
        i32[B, K, C] tokens, with top_k the likeliest first, else all; and f32[B, K, C] scores, normalised to log-probabilities
        where renormalised.
    """
    if config.top_k and max(config.top_k, least) < scores_BxKxW.shape[-1]:
        x, tokens = steps.top_of_many(scores_BxKxW, max(config.top_k, least))
    else:
        x, tokens = scores_BxKxW, jnp.broadcast_to(jnp.arange(scores_BxKxW.shape[-1]), scores_BxKxW.shape)
    x = x / numbers.temperature
    if config.top_p < 1:
        keep = jax.nn.softmax(x, axis=-1)
        keep = keep >= _nucleus(keep, numbers.top_p)
        if least > 1:
            keep |= x >= steps.top_of_many(scores_BxKxW, least)[0][..., -1:] / numbers.temperature
        x = jnp.where(keep, x, FLOOR)
    return tokens, jax.nn.log_softmax(x, axis=-1) if config.renormalize_logits else x


def _nucleus(probability: jax.Array, top_p: Any) -> jax.Array:
    """The least probability f32[..., 1] of a token to which all likelier ones leave something of top_p.

    Without sorting: floats of one sign are ordered as their bits are, and a bit is found with each look.
    """
    bits = jax.lax.bitcast_convert_type(probability, jnp.int32)

    def halve(_: int, between: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = between
        middle = low + (high - low) // 2
        enough = jnp.where(bits > middle, probability, 0.0).sum(axis=-1, keepdims=True) >= top_p
        return jnp.where(enough, middle + 1, low), jnp.where(enough, high, middle)

    ends = jnp.zeros_like(bits[..., :1]), bits.max(axis=-1, keepdims=True)
    _, least = jax.lax.fori_loop(0, 31, halve, ends)
    return jax.lax.bitcast_convert_type(least, jnp.float32)
