"""What changes the scores of the next token, one after another in the order of transformers 5.

Shapes in names: B rows, K beams, L places of a target, V vocabulary, W best tokens.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.decoding.config import GenerationConfig, Numbers

FLOOR = -jnp.inf


def changes_scores(config: GenerationConfig) -> bool:
    """Whether process() does anything."""
    return bool(
        config.repetition_penalty != 1
        or config.no_repeat_ngram_size
        or config.bad_words_ids
        or (config.least and config.eos_token_id)
        or config.forced_bos_token_id is not None
        or config.forced_eos_token_id is not None
        or config.renormalize_logits
    )


def process(
    scores_BxKxV: jax.Array, tokens_BxKxL: jax.Array, length: jax.Array, config: GenerationConfig, numbers: Numbers
) -> jax.Array:
    """The scores after every option that asks for a change; those of sampling are not among them.

    Args:
        scores_BxKxV: f32, logits (greedy search, sampling) or log-probabilities (beam search).
        tokens_BxKxL: i32, what stands there so far.
        length: i32[], how many tokens that is, the start token included.
        config: The options.
        numbers: Their numbers.
    """
    x = scores_BxKxV
    ends = np.array(config.eos_token_id, np.int32)
    if config.repetition_penalty != 1:
        x = _penalise(x, tokens_BxKxL, length, numbers.repetition_penalty)
    if config.no_repeat_ngram_size:
        x = _forbid_repeated(x, tokens_BxKxL, length, config.no_repeat_ngram_size)
    if config.bad_words_ids:
        x = _forbid_words(x, tokens_BxKxL, length, config.bad_words_ids)
    if config.least and len(ends):
        x = jnp.where(length < config.least, x.at[..., ends].set(FLOOR), x)
    if config.forced_bos_token_id is not None:
        x = jnp.where(length == 1, _only(x, config.forced_bos_token_id), x)
    if config.forced_eos_token_id is not None:
        x = jnp.where(length == config.length - 1, _only(x, config.forced_eos_token_id), x)
    return jax.nn.log_softmax(x, axis=-1) if config.renormalize_logits and not config.do_sample else x


def _only(x_BxKxV: jax.Array, token: int) -> jax.Array:
    return jnp.full_like(x_BxKxV, FLOOR).at[..., token].set(0.0)


def _known(tokens_BxKxL: jax.Array, length: jax.Array, vocabulary: int) -> jax.Array:
    """The tokens; those of places that are not filled yet are no token at all."""
    return jnp.where(jnp.arange(tokens_BxKxL.shape[-1]) < length, tokens_BxKxL, vocabulary)


def _set(x_BxKxV: jax.Array, tokens_BxKxL: jax.Array, values: jax.Array | float) -> jax.Array:
    """x with values at the tokens; tokens beyond the vocabulary are left out."""
    rows, beams = (jnp.arange(size) for size in x_BxKxV.shape[:2])
    return x_BxKxV.at[rows[:, None, None], beams[:, None], tokens_BxKxL].set(values, mode="drop")


def _penalise(x_BxKxV: jax.Array, tokens_BxKxL: jax.Array, length: jax.Array, penalty: Any) -> jax.Array:
    """A score below 0 is multiplied by the penalty, another divided, of every token that stands there (Keskar et al. 2019)."""
    V = x_BxKxV.shape[-1]
    tokens_BxKxL = _known(tokens_BxKxL, length, V)
    now_BxKxL = jnp.take_along_axis(x_BxKxV, jnp.minimum(tokens_BxKxL, V - 1), axis=-1)
    return _set(x_BxKxV, tokens_BxKxL, jnp.where(now_BxKxL < 0, now_BxKxL * penalty, now_BxKxL / penalty))


def _forbid_repeated(x_BxKxV: jax.Array, tokens_BxKxL: jax.Array, length: jax.Array, n: int) -> jax.Array:
    """No token that would make the last n tokens what n tokens before were."""
    L = tokens_BxKxL.shape[-1]
    if n > L:
        return x_BxKxV
    last = jnp.maximum(length - (n - 1), 0) + jnp.arange(n - 1)
    same_BxKxP = jnp.broadcast_to(jnp.arange(L - n + 1) + n <= length, (*tokens_BxKxL.shape[:2], L - n + 1))
    for i in range(n - 1):
        same_BxKxP &= tokens_BxKxL[..., i : L - n + 1 + i] == jnp.take(tokens_BxKxL, last[i : i + 1], axis=-1)
    next_BxKxP = jnp.where(same_BxKxP, tokens_BxKxL[..., n - 1 :], x_BxKxV.shape[-1])
    return _set(x_BxKxV, next_BxKxP, FLOOR)


def _forbid_words(
    x_BxKxV: jax.Array, tokens_BxKxL: jax.Array, length: jax.Array, words: tuple[tuple[int, ...], ...]
) -> jax.Array:
    """No token that would complete one of the words."""
    single = np.array([word[0] for word in words if len(word) == 1], np.int32)
    x_BxKxV = x_BxKxV.at[..., single].set(FLOOR) if len(single) else x_BxKxV
    for *before, last in (word for word in words if len(word) > 1):
        at = jnp.maximum(length - len(before), 0) + jnp.arange(len(before))
        stand = (jnp.take(tokens_BxKxL, at, axis=-1) == jnp.array(before)).all(axis=-1) & (length >= len(before))
        x_BxKxV = x_BxKxV.at[..., last].set(jnp.where(stand, FLOOR, x_BxKxV[..., last]))
    return x_BxKxV


def likely(scores_BxKxV: jax.Array, config: GenerationConfig, numbers: Numbers, least: int = 1) -> tuple[jax.Array, jax.Array]:
    """The tokens that sampling may draw, and their scores over the temperature; the others are -inf or not there.

    Args:
        scores_BxKxV: f32.
        config: top_k; whether there is top_p (Holtzman et al. 2020).
        numbers: temperature, top_p.
        least: So many tokens stay in any case.

    Returns:
        i32[B, K, W] tokens, the likeliest first, and f32[B, K, W] scores, normalised to log-probabilities where renormalised.
    """
    V = scores_BxKxV.shape[-1]
    scores_BxKxV = scores_BxKxV / numbers.temperature
    W = min(max(config.top_k, least), V) if config.top_k else V
    best_BxKxW, tokens_BxKxW = jax.lax.top_k(scores_BxKxV, W)
    if config.top_p < 1:
        probability = jax.nn.softmax(best_BxKxW, axis=-1)
        # What the tokens from this one down hold together: at most 1 - top_p and they are too many.
        rest_BxKxW = jnp.cumsum(probability[..., ::-1], axis=-1)[..., ::-1]
        keep = (rest_BxKxW > 1 - numbers.top_p) | (jnp.arange(W) < least)
        best_BxKxW = jnp.where(keep, best_BxKxW, FLOOR)
    if config.renormalize_logits:
        best_BxKxW = jax.nn.log_softmax(best_BxKxW, axis=-1)
    return tokens_BxKxW, best_BxKxW
