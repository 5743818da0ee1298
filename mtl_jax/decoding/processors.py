"""Options that change the scores of the next token, applied in the order of transformers 5.

A vocabulary has up to a hundred thousand tokens, so each pass over their scores costs time. Changes of a few tokens of a beam
are written into the logits. Changes that are the same for all beams are functions of a token, applied where its score is read.
Only the repetition penalty and renormalising need all scores.

Shapes in names: B rows, K beams, L positions of a target, W vocabulary in whole blocks, C candidates.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.decoding.config import GenerationConfig, TracedOptions
from mtl_jax.decoding.logits import top_of_many

FLOOR = -jnp.inf


def needs_all_scores(config: GenerationConfig) -> bool:
    """Whether beam search must compute every score before it looks for the best."""
    return config.repetition_penalty != 1 or config.renormalize_logits


def reads_tokens(config: GenerationConfig) -> bool:
    """Whether scores depend on the tokens so far, those of a prompt included."""
    words = any(len(word) > 1 for word in config.bad_words_ids)
    return config.repetition_penalty != 1 or config.no_repeat_ngram_size > 0 or words


def process(
    scores_BxKxW: jax.Array,
    tokens_BxKxL: jax.Array,
    length: jax.Array,
    config: GenerationConfig,
    traced: TracedOptions,
    prompt_BxP: jax.Array | None = None,
) -> jax.Array:
    """The scores after all options that change them, except those of sampling.

    Args:
        scores_BxKxW: f32, logits (greedy search, sampling) or log-probabilities (beam search).
        tokens_BxKxL: i32, the tokens so far.
        length: i32[], their number, the start token included.
        config: The static options.
        traced: The traced options.
        prompt_BxP: i32, the tokens before them, -1 at padding; None: there are none.
    """
    x = scores_BxKxW
    if config.repetition_penalty != 1:
        x = _penalise(x, *_with_prompt(tokens_BxKxL, length, prompt_BxP, x.shape[-1]), traced.repetition_penalty)
    x = forbid(x, tokens_BxKxL, length, config, prompt_BxP)
    x = change_by_token(x, None, length, config)
    return jax.nn.log_softmax(x, axis=-1) if config.renormalize_logits and not config.do_sample else x


def forbid(
    x_BxKxW: jax.Array,
    tokens_BxKxL: jax.Array,
    length: jax.Array,
    config: GenerationConfig,
    prompt_BxP: jax.Array | None = None,
) -> jax.Array:
    """Gives -inf to tokens that would repeat an n-gram or complete a forbidden word of several tokens.

    Args:
        x_BxKxW: f32, logits or log-probabilities.
        tokens_BxKxL: i32, the tokens so far.
        length: i32[], their number, the start token included.
        config: The static options.
        prompt_BxP: As in process().
    """
    tokens_BxKxL, length = _with_prompt(tokens_BxKxL, length, prompt_BxP, x_BxKxW.shape[-1])
    if config.no_repeat_ngram_size:
        x_BxKxW = _forbid_repeated(x_BxKxW, tokens_BxKxL, length, config.no_repeat_ngram_size)
    return _forbid_words(x_BxKxW, tokens_BxKxL, length, [word for word in config.bad_words_ids if len(word) > 1])


def change_by_token(
    scores: jax.Array, tokens: jax.Array | None, length: jax.Array, config: GenerationConfig, size: int = 0
) -> jax.Array:
    """Scores after changes that are the same for all beams: forbidden tokens, no end before min_length, forced tokens.

    Args:
        scores: f32[..., C], normalised.
        tokens: i32[..., C], their tokens; None: all tokens in order.
        length: i32[], as in process().
        config: The static options.
        size: W, where tokens are given.
    """
    single = np.array([word[0] for word in config.bad_words_ids if len(word) == 1], np.int32)
    if len(single) or (config.minimum_length and config.eos_token_id):
        floor_W = jnp.zeros(scores.shape[-1] if tokens is None else size).at[single].set(FLOOR)
        if config.minimum_length and config.eos_token_id:
            without_W = floor_W.at[np.array(config.eos_token_id, np.int32)].set(FLOOR)
            floor_W = jnp.where(length < config.minimum_length, without_W, floor_W)
        scores = scores + (floor_W if tokens is None else floor_W[tokens])
    if tokens is None:
        tokens = jnp.arange(scores.shape[-1])
    for token, at in ((config.forced_bos_token_id, 1), (config.forced_eos_token_id, config.length - 1)):
        if token is not None:
            scores = jnp.where(length == at, jnp.where(tokens == token, 0.0, FLOOR), scores)
    return scores


def _with_prompt(
    tokens_BxKxL: jax.Array, length: jax.Array, prompt_BxP: jax.Array | None, vocabulary: int
) -> tuple[jax.Array, jax.Array]:
    """The tokens with those of the prompt before them, padding as an id beyond the vocabulary; and their number."""
    if prompt_BxP is None:
        return tokens_BxKxL, length
    prompt_BxP = jnp.where(prompt_BxP < 0, vocabulary, prompt_BxP)
    prompt_BxKxP = jnp.broadcast_to(prompt_BxP[:, None], (*tokens_BxKxL.shape[:2], prompt_BxP.shape[1]))
    return jnp.concatenate([prompt_BxKxP, tokens_BxKxL], axis=-1), length + prompt_BxP.shape[1]


def _known(tokens_BxKxL: jax.Array, length: jax.Array, vocabulary: int) -> jax.Array:
    """The tokens; at positions that are not filled yet an id beyond the vocabulary."""
    return jnp.where(jnp.arange(tokens_BxKxL.shape[-1]) < length, tokens_BxKxL, vocabulary)


def _set(x_BxKxW: jax.Array, tokens_BxKxL: jax.Array, values: jax.Array | float) -> jax.Array:
    """x with the values at the tokens; ids beyond the vocabulary are ignored."""
    rows, beams = (jnp.arange(size) for size in x_BxKxW.shape[:2])
    return x_BxKxW.at[rows[:, None, None], beams[:, None], tokens_BxKxL].set(values, mode="drop")


def _penalise(x_BxKxW: jax.Array, tokens_BxKxL: jax.Array, length: jax.Array, penalty: Any) -> jax.Array:
    """Penalises tokens that occur already: scores below 0 are multiplied, others divided (Keskar et al. 2019)."""
    W = x_BxKxW.shape[-1]
    tokens_BxKxL = _known(tokens_BxKxL, length, W)
    scores_BxKxL = jnp.take_along_axis(x_BxKxW, jnp.minimum(tokens_BxKxL, W - 1), axis=-1)
    return _set(x_BxKxW, tokens_BxKxL, jnp.where(scores_BxKxL < 0, scores_BxKxL * penalty, scores_BxKxL / penalty))


def _forbid_repeated(x_BxKxW: jax.Array, tokens_BxKxL: jax.Array, length: jax.Array, n: int) -> jax.Array:
    """Forbids tokens that would complete an n-gram that occurs already."""
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
    """Forbids tokens that would complete one of the words, which have at least two tokens."""
    ends = []
    for *start, last in words:
        at = jnp.maximum(length - len(start), 0) + jnp.arange(len(start))
        begun_BxK = (jnp.take(tokens_BxKxL, at, axis=-1) == jnp.array(start)).all(axis=-1) & (length >= len(start))
        ends.append(jnp.where(begun_BxK, last, x_BxKxW.shape[-1]))
    return _set(x_BxKxW, jnp.stack(ends, axis=-1), FLOOR) if ends else x_BxKxW


def likely(
    scores_BxKxW: jax.Array, config: GenerationConfig, traced: TracedOptions, least: int = 1
) -> tuple[jax.Array, jax.Array]:
    """The tokens that sampling may draw, and their scores over the temperature; others have -inf or are left out.

    Args:
        scores_BxKxW: f32.
        config: The static options; of them top_k, and whether top_p is used (Holtzman et al. 2020).
        traced: The traced options; of them temperature and top_p.
        least: The number of tokens that may always be drawn.

    Returns:
        Tokens i32[B, K, C], with top_k the likeliest first, else all in order; and their scores f32[B, K, C], which are
        log-probabilities with renormalize_logits.
    """
    if config.top_k and max(config.top_k, least) < scores_BxKxW.shape[-1]:
        x, tokens = top_of_many(scores_BxKxW, max(config.top_k, least))
    else:
        x, tokens = scores_BxKxW, jnp.broadcast_to(jnp.arange(scores_BxKxW.shape[-1]), scores_BxKxW.shape)
    x = x / traced.temperature
    if config.top_p < 1:
        keep = jax.nn.softmax(x, axis=-1)
        keep = keep >= _nucleus(keep, traced.top_p)
        if least > 1:
            keep |= x >= top_of_many(scores_BxKxW, least)[0][..., -1:] / traced.temperature
        x = jnp.where(keep, x, FLOOR)
    return tokens, jax.nn.log_softmax(x, axis=-1) if config.renormalize_logits else x


def _nucleus(probability: jax.Array, top_p: Any) -> jax.Array:
    """The smallest probability f32[..., 1] of a token in the nucleus: those before it sum to less than top_p.

    Bisection over the bits takes the place of sorting: positive floats are ordered like their bits.
    """
    bits = jax.lax.bitcast_convert_type(probability, jnp.int32)

    def halve(_: int, interval: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = interval
        middle = low + (high - low) // 2
        enough = jnp.where(bits > middle, probability, 0.0).sum(axis=-1, keepdims=True) >= top_p
        return jnp.where(enough, middle + 1, low), jnp.where(enough, high, middle)

    ends = jnp.zeros_like(bits[..., :1]), bits.max(axis=-1, keepdims=True)
    _, least = jax.lax.fori_loop(0, 31, halve, ends)
    return jax.lax.bitcast_convert_type(least, jnp.float32)
