"""The state of a search between two steps.

Shapes in names: B rows, K beams, S positions of the cache, L = S + 1 positions of a target.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.decoding.config import GenerationConfig
from mtl_jax.models.kv_cache import KeyValue

WORST = -1e9  # added to the score of a beam that does not count, as in transformers


class State(NamedTuple):
    """The state of a search.

    Attributes:
        length: i32[], tokens so far, the start token included.
        tokens: i32[B, K, L], tokens of the running beams.
        scores: f32[B, K], summed scores of the running beams, best first.
        ended: bool[B, K], whether a running beam has an end token; for greedy search and sampling.
        finished: i32[B, K, L], tokens of the finished sequences, best first; for beam search, and so are the next four.
        finished_scores: f32[B, K], their scores over their penalised lengths.
        lengths: i32[B, K], tokens after the start token; for greedy search and sampling, those of the running beams.
        is_finished: bool[B, K], whether there is a finished sequence.
        reached_end: bool[B, K], whether it has an end token; else the limit cut it. For all kinds of search.
        active: bool[B], rows whose search is not done.
        ancestry: i32[B, K, S], see models.encoder_decoder.Seq2Seq.decode.
        cache: Keys and values of the running beams.
        keys: u32[B, 2], key data for drawing, one key a row.
        prompt: i32[B, P], what stands before the start token, where options read it; -1 at padding. None: nothing.
    """

    length: jax.Array
    tokens: jax.Array
    scores: jax.Array
    ended: jax.Array
    finished: jax.Array
    finished_scores: jax.Array
    lengths: jax.Array
    is_finished: jax.Array
    reached_end: jax.Array
    active: jax.Array
    ancestry: jax.Array
    cache: tuple[KeyValue, ...]
    keys: jax.Array
    prompt: jax.Array | None = None


def beams(config: GenerationConfig) -> int:
    """K: the beams of beam search, or the sequences that are drawn for each row."""
    return config.num_beams if config.num_beams > 1 else config.num_return_sequences


def _padding(config: GenerationConfig) -> int:
    return config.beam_padding if config.num_beams > 1 else config.padding


def initial(
    config: GenerationConfig,
    positions: int,
    active_B: jax.Array,
    keys_Bx2: jax.Array,
    cache: tuple[KeyValue, ...],
    start_B: jax.Array | None = None,
    prompt_BxP: jax.Array | None = None,
) -> State:
    """The state before the first step. All beams of a row are equal then, so only one of them counts.

    Args:
        config: The static options.
        positions: S.
        active_B: bool, False for rows that only fill the batch.
        keys_Bx2: Key data for drawing.
        cache: Of the running beams.
        start_B: The token that each row's first step reads; None: the options' start token.
        prompt_BxP: See State.prompt.
    """
    B, K = len(active_B), beams(config)
    start = config.start if start_B is None else start_B[:, None]
    tokens = jnp.full((B, K, positions + 1), _padding(config), jnp.int32).at[..., 0].set(start)
    return State(
        length=jnp.ones((), jnp.int32),
        tokens=tokens,
        scores=jnp.zeros((B, K)).at[:, 1:].set(WORST if config.num_beams > 1 else 0.0),
        ended=jnp.zeros((B, K), bool),
        finished=tokens,
        finished_scores=jnp.full((B, K), WORST),
        lengths=jnp.zeros((B, K), jnp.int32),
        is_finished=jnp.zeros((B, K), bool),
        reached_end=jnp.zeros((B, K), bool),
        active=active_B,
        ancestry=jnp.broadcast_to(jnp.arange(K, dtype=jnp.int32)[:, None], (B, K, positions)),
        cache=cache,
        keys=keys_Bx2,
        prompt=prompt_BxP,
    )


def enlarged(state: State, config: GenerationConfig, positions: int) -> State:
    """The state with a cache of so many positions."""
    K, more = state.ancestry.shape[1], positions - state.ancestry.shape[2]

    def widen(x_BxKxL: jax.Array) -> jax.Array:
        return jnp.pad(x_BxKxL, ((0, 0), (0, 0), (0, more)), constant_values=_padding(config))

    self_BxKxS = jnp.broadcast_to(jnp.arange(K, dtype=jnp.int32)[:, None], (*state.ancestry.shape[:2], more))
    return state._replace(
        tokens=widen(state.tokens),
        finished=widen(state.finished),
        ancestry=jnp.concatenate([state.ancestry, self_BxKxS], axis=-1),
        cache=jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, more * K), (0, 0))), state.cache),
    )
